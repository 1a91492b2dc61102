"""How often a source may do something: token buckets by source, bounded in number. Pure; time is an argument.

One source that storms fills its own bucket only. When more sources come than are kept, the ones heard of least
recently are forgotten: they begin with a full bucket, which harms nobody but lets a flood of addresses be a flood.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict


class Throttle:
    """``burst`` at once, then ``rate`` a second, for each source."""

    def __init__(self, *, burst: float, rate: float, sources: int = 4096) -> None:
        self._burst, self._rate, self._most = burst, rate, sources
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # source -> (left, at)

    def take(self, source: str, now: float) -> float:
        """0.0 when it may; else the seconds until it may again."""
        left, at = self._left.pop(source, (self._burst, now))
        left = min(self._burst, left + max(0.0, now - at) * self._rate)
        wait = 0.0 if left >= 1.0 else (1.0 - left) / self._rate
        self._left[source] = (left - 1.0 if left >= 1.0 else left, now)
        if len(self._left) > self._most:
            self._left.popitem(last=False)
        return wait

    def __len__(self) -> int:
        return len(self._left)


def source_of(host: str) -> str:
    """What counts as one source: an IPv4 address, or an IPv6 network of 64 bits, which is one customer's."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or "local"
    if isinstance(address, ipaddress.IPv4Address):
        return host
    mapped = address.ipv4_mapped
    return str(mapped) if mapped else str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
