"""Where a declared Listener may listen on a node: on the loopback, unless the node's owner allows more. Pure.

The owner says so in ``node.json``: ``"gateway": {"allow": ["192.0.2.10:443", "10.0.0.0/8:8000-8999", "0.0.0.0:80"]}``.
An entry is an address or a network, and a port or a range of ports where not every one is meant. ``0.0.0.0`` and ``::``
are all interfaces, and only an entry that says just that allows them. What the cloud declares never goes beyond it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import msgspec

from edgeward.core.errors import Invalid
from edgeward.core.spans import Network, parse_span

LOOPBACK = ("127.0.0.0/8", "[::1]")
_FIELD = "$.gateway.allow"
_REMEDY = 'write e.g. "192.0.2.10:443", "10.0.0.0/8:8000-8999" or "[::1]"'


class Bound(msgspec.Struct, frozen=True):
    network: Network
    low: int = 1
    high: int = 65535

    def takes(self, address: str, port: int) -> bool:
        ip = ipaddress.ip_address(address)
        if ip.is_unspecified and self.network.num_addresses > 1:
            return False  # it is more than any network
        return ip in self.network and self.low <= port <= self.high


def bounds(entries: object) -> list[Bound]:
    """Raises ``Invalid``. None: the loopback."""
    if entries is None:
        entries = LOOPBACK
    if not isinstance(entries, list | tuple):
        raise Invalid("is no list", field=_FIELD, remedy=_REMEDY)
    return [_bound(n, entry) for n, entry in enumerate(entries)]


def _bound(n: int, entry: object) -> Bound:
    try:
        span = parse_span(str(entry))
    except ValueError:
        span = None
    if not isinstance(entry, str) or span is None or span.network is None:
        raise Invalid(f"{str(entry)[:60]!r} is no address", field=f"{_FIELD}[{n}]", remedy=_REMEDY)
    return Bound(span.network, span.low, span.high)


def why_not(address: str, port: int, allowed: Iterable[Bound]) -> str:
    """Why nothing may listen there; empty when it may."""
    if any(b.takes(address, port) for b in allowed):
        return ""
    at = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    return f'this node lets nothing listen on {at}; its owner may: node.json: "gateway": {{"allow": ["{at}"]}}'
