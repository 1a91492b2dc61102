"""What the steering zone answers: one query in, its answer out. Pure.

The zone has its apex and some hosts, all steered alike; name servers with fixed addresses; nothing else. The client is
the one of the query's client subnet, else who asks. Over UDP an answer is never more than :data:`FACTOR` times the
query, else it is cut (TC) and fetched again over TCP, where nobody asks in another's name; ANY is refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from edgeward.gateway import dnswire as dns
from edgeward.gateway.dnswire import POINTER, Query, Record
from edgeward.gateway.steer import Address, Answer, client_address

#: An answer over UDP is at most this many times as long as its query.
FACTOR = 4
#: Over TCP, and in one answer.
TCP_MOST = 4096
#: Addresses in one answer.
MOST_ADDRESSES = 16


def literal(address: str) -> Address | None:
    """The IP address of an entry of ``spec.addresses``; None when it is a host name."""
    host = address
    if address.startswith("["):
        host = address[1:].partition("]")[0]
    elif address.count(":") == 1:
        host = address.partition(":")[0]
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@dataclass
class Zone:
    """``name``: e.g. ``edge.example.org``. ``hosts``: names in it, beside the apex. ``servers``: its name servers.

    ``ttl``: seconds that answers are kept elsewhere. Raises ``ValueError`` for what is no DNS name or address.
    """

    name: str
    hosts: tuple[str, ...] = ()
    servers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ttl: int = 10
    serial: int = 1

    def __post_init__(self) -> None:
        apex = dns.name_of(self.name)
        self._apex = apex
        below = {h: dns.name_of(f"{h}.{self.name}") for h in self.hosts}
        self._steered = frozenset({apex, *below.values()})
        servers = self.servers or {f"ns.{self.name}": ()}
        self._fixed = {dns.name_of(n): tuple(ipaddress.ip_address(a) for a in at) for n, at in servers.items()}
        known = self._steered | {n for n in self._fixed if self._inside(n)}
        # names that are only the way to others exist, too (RFC 8020)
        self._exist = frozenset(up for name in known for up in _upwards(name) if self._inside(up))
        first = next(iter(self._fixed))
        self._soa = dns.soa(first, dns.name_of(f"hostmaster.{self.name}"), self.serial, self.ttl)

    def _inside(self, name: bytes) -> bool:
        return name == self._apex or (name.endswith(self._apex) and self._apex in _upwards(name))

    def answer(self, query: Query, asker: str, steer: Callable[[Address, int | None], Answer], limit: int) -> bytes:
        """The answer to a query from ``asker`` (an address), at most ``limit`` bytes."""
        if query.fault:
            return dns.answer(query, query.fault, limit=limit, authoritative=False)
        if query.name in self._steered and query.type in (dns.A, dns.AAAA) and query.klass == dns.IN:
            return self._steer(query, asker, steer, limit)
        if query.klass != dns.IN or query.type == dns.ANY or not self._inside(query.name):
            return dns.answer(query, dns.REFUSED, limit=limit, authoritative=False)
        found = self._records(query)
        if found:
            return dns.answer(query, dns.NOERROR, found, limit=limit)
        code = dns.NOERROR if query.name in self._exist else dns.NXDOMAIN
        return dns.answer(query, code, (), self._nothing(query), limit=limit)

    def _steer(self, query: Query, asker: str, steer: Callable[[Address, int | None], Answer], limit: int) -> bytes:
        subnet, scope = query.subnet, 0
        if subnet is not None and subnet.source:
            got = steer(subnet.client, subnet.source)
            scope = got.scope
        else:
            got = steer(client_address(asker), None)
        if got.site is None:
            return dns.answer(query, dns.SERVFAIL, scope=scope, limit=limit)
        records = _addresses(query.type, (literal(a) for a in got.addresses), self.ttl)
        nothing = () if records else self._nothing(query)
        return dns.answer(query, dns.NOERROR, records, nothing, scope=scope, limit=limit)

    def _records(self, query: Query) -> tuple[Record, ...]:
        if query.name == self._apex and query.type == dns.SOA:
            return (Record(POINTER, dns.SOA, self.ttl, self._soa),)
        if query.name == self._apex and query.type == dns.NS:
            return tuple(Record(POINTER, dns.NS, self.ttl, name) for name in self._fixed)
        return _addresses(query.type, self._fixed.get(query.name, ()), self.ttl)

    def _nothing(self, query: Query) -> tuple[Record, ...]:
        """The SOA that says how long a no holds (RFC 2308); the apex is the end of the question's name."""
        at = 12 + len(query.name) - len(self._apex)
        return (Record((0xC000 | at).to_bytes(2, "big"), dns.SOA, self.ttl, self._soa),)


def _addresses(type_: int, found: Iterable[Address | None], ttl: int) -> tuple[Record, ...]:
    version = {dns.A: 4, dns.AAAA: 6}.get(type_)
    fit = [a.packed for a in found if a is not None and a.version == version]
    return tuple(Record(POINTER, type_, ttl, data) for data in dict.fromkeys(fit[:MOST_ADDRESSES]))


def _upwards(name: bytes) -> list[bytes]:
    """The name and all above it."""
    found, at = [], 0
    while at < len(name):
        found.append(name[at:])
        at += name[at] + 1
    return found


def udp_limit(query: Query, length: int) -> int:
    """Bytes that may be answered over UDP to a query of ``length`` bytes."""
    return min(query.size, dns.UDP_MOST, FACTOR * length)


def respond(
    data: bytes, asker: str, zone: Zone, steer: Callable[[Address, int | None], Answer], *, udp: bool = True
) -> tuple[bytes | None, bool]:
    """The answer to a message (None: none may be given), and whether it depends on who asks."""
    query = dns.parse(data)
    if query is None:
        return None, False
    limit = udp_limit(query, len(data)) if udp else TCP_MOST
    given = query.subnet is not None and query.subnet.source > 0
    return zone.answer(query, asker, steer, limit), not given
