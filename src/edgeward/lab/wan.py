"""Who of a lab may send IP packets to whom over the WAN, and when they arrive: decided without any packet moving.

In come packets as a machine's ``wan0`` gives them out, the time and random numbers; out come deliveries. Every machine
(the hub, each node) has one IPv4 address, in a /25 per site. A site's machines share its link to the hub; what they say
to one another goes by the site's own LAN, not here. Site to site is dropped and counted, or goes up the one site's
link and down the other's where the topology says ``between: open``.

:class:`Plan` is the addressing; :class:`Wan` the links. The shell is ``namespaces.py``.
"""

from __future__ import annotations

import heapq
import ipaddress
import random
from dataclasses import dataclass, field
from typing import NamedTuple

from edgeward.lab.links import Counts, Draws, Drop, NodeCounters, Profile, Shaper
from edgeward.lab.topology import Topology

#: RFC 2544: for tests of networks, so no real network is shadowed. Each lab on a machine takes one of these blocks.
BLOCKS = tuple(ipaddress.IPv4Network("198.18.0.0/15").subnets(new_prefix=18))
HUB = "hub"
_SITE_PREFIX = 25
_VERSION_4 = 4


class Plan:
    """The addresses of a lab: the first /25 of its block has this machine and the hub, each further one a site."""

    def __init__(self, topology: Topology, block: ipaddress.IPv4Network) -> None:
        nets = list(block.subnets(new_prefix=_SITE_PREFIX))
        first = nets[0].network_address
        #: The machine that runs the lab, as its namespaces see it.
        self.host = first + 1
        self.address: dict[str, ipaddress.IPv4Address] = {HUB: first + 2}
        self.lan: dict[str, ipaddress.IPv4Network] = {}
        self.site_of: dict[str, str] = {}
        for net, site in zip(nets[1:], topology.sites, strict=False):
            self.lan[site.name] = net
            for number, node in enumerate(site.node_names, 1):
                self.address[node] = net.network_address + number
                self.site_of[node] = site.name


def groups_of(nodes: tuple[str, ...], groups: list[list[str]]) -> list[list[str]]:
    """The parts of a site: the groups given, and one more of the nodes that were not named.

    Raises ``ValueError`` for a node that is not there or is named twice.
    """
    seen: set[str] = set()
    for node in (n for group in groups for n in group):
        if node not in nodes:
            raise ValueError(f"there is no node {node!r} in this site")
        if node in seen:
            raise ValueError(f"node {node} is in two groups")
        seen.add(node)
    rest = [n for n in nodes if n not in seen]
    return [g for g in [*groups, rest] if g]


@dataclass
class SiteLink:
    """A site's link in both directions."""

    profile: Profile
    up: Shaper = field(init=False)
    down: Shaper = field(init=False)
    cut: bool = False

    def __post_init__(self) -> None:
        self.up, self.down = Shaper(self.profile, "up"), Shaper(self.profile, "down")

    def set_profile(self, profile: Profile) -> None:
        self.profile = profile
        self.up.set_profile(profile)
        self.down.set_profile(profile)


class Delivery(NamedTuple):
    """A packet on its way: it comes out at ``to``'s end ``at`` a time; ``half``: at the far end of the sender's link,
    from where another site's brings it on."""

    at: float
    number: int
    origin: str
    to: str
    packet: bytes
    half: bool = False


class Wan:
    """All links of a lab; times are seconds of any clock that does not go backwards."""

    def __init__(self, topology: Topology, plan: Plan, seed: int = 1) -> None:
        self.plan = plan
        self.links = {s.name: SiteLink(s.profile) for s in topology.sites}
        self.nodes = {n: NodeCounters(s.name, Counts(), Counts()) for s, n in topology.nodes()}
        self._open = topology.between == "open"
        #: What was said past the hub, as ``from>to``, or what was tried to.
        self.pairs: dict[str, Counts] = {}
        self._by_address = {a.packed: name for name, a in plan.address.items()}
        self._flight: list[Delivery] = []
        self._number = 0
        self._rng = random.Random(seed)  # noqa: S311 - an emulation, repeatable by its seed

    def send(self, now: float, origin: str, packet: bytes) -> None:
        """``origin`` sent ``packet`` into its WAN interface."""
        if len(packet) < 20 or packet[0] >> 4 != _VERSION_4:
            return  # IPv6 neighbour discovery and the like: this WAN is IPv4
        source, target = self._by_address.get(packet[12:16]), self._by_address.get(packet[16:20])
        node = target if origin == HUB else origin
        if node not in self.nodes:
            return  # the hub to nowhere
        counters = self.nodes[node]
        if source != origin or target is None or target == origin:
            counters.refused += 1
            return
        past = origin != HUB and target != HUB
        if past and not self._open:
            self.pairs.setdefault(f"{origin}>{target}", Counts()).cut += 1
            return
        self._offer(now, Delivery(0.0, 0, origin, target, packet, past))

    def _offer(self, now: float, delivery: Delivery) -> None:
        """Onto the link of the site that it leaves or, else, comes to."""
        up = delivery.half or delivery.to == HUB
        counters = self.nodes[delivery.origin if up else delivery.to]
        link = self.links[counters.site]
        shaper, counts = (link.up, counters.up) if up else (link.down, counters.down)
        if link.cut:
            self._lost(delivery, counts, "cut")
            return
        draw = self._rng.random
        fate = shaper.offer(now, len(delivery.packet), Draws(draw(), draw(), draw()))
        if fate.dropped:
            self._lost(delivery, counts, fate.dropped)
            return
        self._number += 1
        heapq.heappush(self._flight, delivery._replace(at=fate.at, number=self._number))

    def _lost(self, delivery: Delivery, counts: Counts, why: Drop) -> None:
        counts.drop(why)
        if HUB not in (delivery.origin, delivery.to):
            self.pairs.setdefault(f"{delivery.origin}>{delivery.to}", Counts()).drop(why)

    def due(self, now: float) -> list[Delivery]:
        """What comes out by now, in order. A link that was cut meanwhile swallows it."""
        out = []
        while self._flight and self._flight[0].at <= now:
            delivery = heapq.heappop(self._flight)
            up = delivery.half or delivery.to == HUB
            counters = self.nodes[delivery.origin if up else delivery.to]
            counts = counters.up if up else counters.down
            if self.links[counters.site].cut:
                self._lost(delivery, counts, "cut")
                continue
            counts.arrived(len(delivery.packet))
            if delivery.half:
                self._offer(now, delivery._replace(half=False))
                continue
            if HUB not in (delivery.origin, delivery.to):
                self.pairs.setdefault(f"{delivery.origin}>{delivery.to}", Counts()).arrived(len(delivery.packet))
            out.append(delivery)
        return out

    @property
    def next_at(self) -> float | None:
        """When the next packet comes out; None when nothing is on its way."""
        return self._flight[0].at if self._flight else None
