"""Which site serves a client, and why. Pure: sites and an address in, one site with its reasons out.

A client's place is that of the site whose prefix, the longest of all, its address is in. Its own site serves it, or
the nearest by great circle that is there. A site that is loaded or has lost nodes gives up a *share* of the client
networks: which ones is drawn by a hash of site and network, so a site that gets weaker loses clients and moves nobody
else's, and the same question has the same answer at every hub. Clients whose place nobody knows are shared out.

With the answer comes its *scope* (RFC 7871): how long a prefix of the client's address it was made of, so that no
resolver gives it to clients that would get another one. DNS is in ``dnszone.py``, HTTP in ``hub/steering.py``.
"""

from __future__ import annotations

import hashlib
import heapq
import ipaddress
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Of a client's address only so much is looked at where clients are shared out, as resolvers send it (RFC 7871, 11.1).
SHARED = {4: 24, 6: 56}
BITS = {4: 32, 6: 128}
#: Up to this load (processes that want to run, for each processor) a site takes all its clients ...
FREE = 0.7
#: ... and from here on only this share of them.
FULL = 1.5
LEAST = 0.1
#: So many sites are looked at for a client before the first of them must take it.
_NEAREST = 16
#: Mean radius of the earth, km (IUGG R1).
_RADIUS = 6371.0088


@dataclass(frozen=True, slots=True)
class Edge:
    """A site as steering sees it. ``nodes``/``online``: how many it has, and how many of them are heard.

    ``place``: latitude and longitude in degrees. ``load``: the mean of its nodes, 1.0 is all processors in use.
    """

    name: str
    prefixes: tuple[str, ...] = ()
    place: tuple[float, float] | None = None
    addresses: tuple[str, ...] = ()
    nodes: int = 1
    online: int = 1
    load: float = 0.0

    @property
    def out(self) -> str:
        """Why it takes nobody; empty when it does."""
        if not self.addresses:
            return "it has no spec.addresses"
        if not self.nodes:
            return "it has no node"
        if not self.online:
            return f"none of its {self.nodes} nodes is heard" if self.nodes > 1 else "its node is not heard"
        return ""

    @property
    def share(self) -> float:
        """The part of its clients that it takes, above 0 and up to 1."""
        busy = min(1.0, max(0.0, (self.load - FREE) / (FULL - FREE)))
        return max(LEAST, (self.online / self.nodes) * (1.0 - (1.0 - LEAST) * busy)) if self.nodes else LEAST


@dataclass(frozen=True, slots=True)
class Answer:
    """``site`` None: none is there. ``scope``: bits of the client's address that the answer holds for."""

    site: str | None
    addresses: tuple[str, ...]
    scope: int
    why: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        return {"site": self.site, "addresses": list(self.addresses), "why": list(self.why)}


def distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Kilometres along the great circle between two points in degrees (haversine)."""
    lat1, lon1, lat2, lon2 = map(math.radians, (*a, *b))
    h = math.sin((lat2 - lat1) / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin((lon2 - lon1) / 2) ** 2
    return 2 * _RADIUS * math.asin(min(1.0, math.sqrt(h)))


def client_address(text: str) -> Address:
    """An address as people and sockets write it; an IPv4 one inside IPv6 is the IPv4 one. Raises ``ValueError``."""
    address = ipaddress.ip_address(text.strip().partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


@dataclass(slots=True)
class _Knot:
    """A bit of the tree of prefixes; ``here`` is the prefix that ends at it, and whose it is."""

    zero: _Knot | None = None
    one: _Knot | None = None
    here: tuple[str, str] | None = None


class Prefixes:
    """Longest match over all sites' prefixes; of two sites with the same one the first by name has it."""

    def __init__(self, edges: Iterable[Edge]) -> None:
        self._roots = {4: _Knot(), 6: _Knot()}
        for edge in sorted(edges, key=lambda e: e.name):
            for text in edge.prefixes:
                net = ipaddress.ip_network(text)
                self._add(net.version, int(net.network_address), net.prefixlen, (text, edge.name))

    def _add(self, version: int, value: int, length: int, what: tuple[str, str]) -> None:
        knot = self._roots[version]
        for n in range(length):
            if value >> (BITS[version] - 1 - n) & 1:
                knot.one = knot = knot.one or _Knot()
            else:
                knot.zero = knot = knot.zero or _Knot()
        knot.here = knot.here or what

    def match(self, version: int, value: int, source: int) -> tuple[tuple[str, str] | None, int]:
        """Prefix and site of an address of which ``source`` bits are known, and the scope of that knowledge.

        The scope is the shortest prefix of the address with which everybody in it would be matched the same. It is
        longer than ``source`` where that was too short to tell; what is not known is then taken as zeros.
        """
        knot, found, top = self._roots[version], None, BITS[version] - 1
        for n in range(top + 2):
            if knot.here is not None and n <= source:
                found = knot.here
            if knot.zero is None and knot.one is None:
                return found, n
            step = knot.one if n < source and value >> (top - n) & 1 else knot.zero
            if step is None:
                return found, n + 1
            knot = step
        raise AssertionError("a prefix is no longer than an address")


def _draw(site: str, version: int, network: int) -> float:
    """A number above 0 and below 1, always the same for a site and a network."""
    digest = hashlib.blake2b(f"{version}/{network:x}/{site}".encode(), digest_size=7).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**56


@dataclass(slots=True)
class Steering:
    """What is known of the sites now; a new one is made of new knowledge."""

    edges: Mapping[str, Edge]
    prefixes: Prefixes
    _there: tuple[Edge, ...] = ()
    _orders: dict[str, tuple[tuple[Edge, float | None], ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, edges: Iterable[Edge], prefixes: Prefixes | None = None) -> Steering:
        known = {e.name: e for e in sorted(edges, key=lambda e: e.name)}
        there = tuple(e for e in known.values() if not e.out)
        return cls(known, prefixes or Prefixes(known.values()), there)

    def steer(self, client: Address, source: int | None = None) -> Answer:
        """The site for a client of whose address the first ``source`` bits are known (None: all)."""
        version, bits = client.version, BITS[client.version]
        known = bits if source is None else max(0, min(bits, source))
        value = int(client) >> (bits - known) << (bits - known)
        found, scope = self.prefixes.match(version, value, known)
        asked = f"{client}" if known == bits else f"{ipaddress.ip_network((value, known))}"
        network = value >> (bits - SHARED[version])
        if found is None:
            return self._shared_out(version, network, scope, f"{asked} is in no site's prefixes")
        prefix, home = found
        return self._near(self.edges[home], version, network, scope, f"{asked} is in {prefix} of site {home}")

    def neighbours(self, name: str, most: int) -> list[tuple[Edge, float | None]]:
        """The sites that are there, as seen from ``name`` (itself left out), and how far they are in kilometres: the
        nearest first, then those of no known place, by name."""
        home = self.edges[name]
        ranked = (
            (e, distance(home.place, e.place) if home.place and e.place else None)
            for e in self._there
            if e.name != name
        )
        return heapq.nsmallest(most, ranked, lambda p: (p[1] is None, p[1] or 0.0, p[0].name))

    def _near(self, home: Edge, version: int, network: int, scope: int, why: str) -> Answer:
        reasons = [why]
        if not home.out and home.share == 1.0:  # as nearly always
            return self._answer(home, scope, False, version, [why, self._because(home, home, 0.0)])
        if home.out:
            reasons.append(f"{home.name} is not taken: {home.out}")
        drawn = False
        order = self._order(home)
        for edge, far in order:
            if edge.share < 1.0 and len(order) > 1:
                drawn = True
                if _draw(edge.name, version, network) >= edge.share:
                    reasons.append(f"{edge.name} takes {edge.share:.0%} of its networks, not this one: {_weak(edge)}")
                    continue
            return self._answer(edge, scope, drawn, version, [*reasons, self._because(edge, home, far)])
        if not order:
            return Answer(None, (), scope, (*reasons, "no site is there"))
        edge, far = order[0]  # all are weak, and none has drawn it: it must go somewhere
        reasons.append(f"no site takes it, so it goes to the first: {self._because(edge, home, far)}")
        return self._answer(edge, scope, drawn, version, reasons)

    def _order(self, home: Edge) -> tuple[tuple[Edge, float | None], ...]:
        """The first :data:`_NEAREST` that are there, as seen from one: itself, by distance, those of no known place."""
        order = self._orders.get(home.name)
        if order is None:

            def far(e: Edge) -> float | None:
                if e.name == home.name:
                    return 0.0
                return distance(home.place, e.place) if home.place and e.place else None

            ranked = ((e, far(e)) for e in self._there)
            self._orders[home.name] = order = tuple(
                heapq.nsmallest(
                    _NEAREST, ranked, lambda p: (p[0].name != home.name, p[1] is None, p[1] or 0.0, p[0].name)
                )
            )
        return order

    @staticmethod
    def _because(edge: Edge, home: Edge, far: float | None) -> str:
        if edge.name == home.name:
            return f"{edge.name} is its own site"
        if far is None:
            return f"{edge.name} is there, the first by name: how far it is is not known without coordinates"
        return f"{edge.name} is the nearest that takes it, {far:.0f} km from {home.name}"

    def _shared_out(self, version: int, network: int, scope: int, why: str) -> Answer:
        """Weighted rendezvous hashing: each site gets its part, and a change of one site's share moves only its own."""
        if not self._there:
            return Answer(None, (), scope, (why, "no site is there"))
        several = len(self._there) > 1
        edge = max(self._there, key=lambda e: (-e.share / math.log(_draw(e.name, version, network)), e.name))
        parts = sum(e.share for e in self._there)
        text = f"{edge.name} has {edge.share / parts:.0%} of such networks, this one among them"
        return self._answer(edge, scope, several, version, [why, text if several else f"only {edge.name} is there"])

    @staticmethod
    def _answer(edge: Edge, scope: int, drawn: bool, version: int, why: list[str]) -> Answer:
        return Answer(edge.name, edge.addresses, max(scope, SHARED[version]) if drawn else scope, tuple(why))


def _weak(edge: Edge) -> str:
    lost = f"{edge.online} of {edge.nodes} nodes are heard"
    return lost if edge.online < edge.nodes else f"its load is {edge.load:.2f}"
