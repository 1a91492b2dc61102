"""What a function may reach over the network, and whether an address is part of it. Pure.

In comes ``limits.network`` as it is declared: ``host:port`` entries, a host being an address, a network or a name. A
name gets an address of its own that nobody else has (:func:`hosts`): the function's resolver gives it out, and the node
looks the name up when the function connects to it. So a function needs no DNS, and a name means what it means now.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from edgeward.core.spans import Network, parse_span

Protocol = Literal["tcp", "udp"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Entries at most.
MOST = 64
#: Of names: loopback addresses that nothing listens on (a node's own listeners are asked for by 127.0.0.1), and a
#: network of RFC 4193 made for this.
_V4 = int(ipaddress.IPv4Address("127.199.0.0"))
_V6 = int(ipaddress.IPv6Address("fd65:6467:6577:6172::"))


class Entry(NamedTuple):
    """One line of the list."""

    #: The name, or empty.
    name: str
    network: Network | None
    low: int
    high: int
    protocol: Protocol

    def takes(self, protocol: Protocol, port: int) -> bool:
        return protocol == self.protocol and self.low <= port <= self.high


class Target(NamedTuple):
    """Where a connection may go: an address, or a name that is looked up first."""

    host: str
    named: bool


def parse(text: str) -> Entry:
    """``host:port``, ``host:from-to`` or ``host:*``, with ``/udp`` behind it for UDP. Raises ``ValueError``."""
    tcp = text.removesuffix("/udp")
    span = parse_span(tcp, need_port=True)
    return Entry(span.name, span.network, span.low, span.high, "tcp" if tcp == text else "udp")


class Allowed:
    """What one function may reach."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Raises ``ValueError``."""
        self.entries = [parse(e) for e in entries]
        self._names = sorted({e.name for e in self.entries if e.name})

    def hosts(self) -> dict[str, tuple[str, str]]:
        """Each name's own addresses: IPv4 and IPv6."""
        return {
            name: (str(ipaddress.IPv4Address(_V4 + n)), str(ipaddress.IPv6Address(_V6 + n)))
            for n, name in enumerate(self._names, start=1)
        }

    def _name_of(self, address: Address) -> str | None:
        base = _V4 if address.version == 4 else _V6
        n = int(address) - base
        return self._names[n - 1] if 1 <= n <= len(self._names) else None

    def target(self, protocol: Protocol, host: str, port: int) -> Target | None:
        """Where a connection to this address goes; None: nowhere. ``host``: as the kernel is told, no name."""
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return None
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        name = self._name_of(address)
        for entry in self.entries:
            if not entry.takes(protocol, port):
                continue
            if name is not None and entry.name == name:
                return Target(name, True)
            if entry.network is not None and address.version == entry.network.version and address in entry.network:
                return Target(str(address), False)
        return None


def plausible(address: str) -> bool:
    """Whether a name may mean this address: one that names the node itself, or nobody, is not what was declared."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return not (ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified)


def environment(entries: Sequence[str]) -> str:
    """``EDGEWARD_HOSTS``: what a worker's resolver gives out. ``name=v4,v6`` with blanks between."""
    return " ".join(f"{name}={v4},{v6}" for name, (v4, v6) in Allowed(entries).hosts().items())
