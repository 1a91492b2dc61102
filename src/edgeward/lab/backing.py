"""How a lab's links are made: one face, two backings.

*Relays* (no root, any system, :class:`RelayBacking`): every node dials a relay on loopback. *Namespaces* (root on
Linux, ``namespaces.py``): each node has a network stack and addresses of its own. ``describe`` says which one is used.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from edgeward.core.errors import Invalid
from edgeward.lab.links import Counters, NodeCounters, Profile
from edgeward.lab.relay import Link, Relay
from edgeward.lab.topology import Topology


class Backing(Protocol):
    async def open(self, topology: Topology, hub_port: int) -> None: ...
    def link_url_host_port(self, node: str) -> tuple[str, int]: ...
    def spawn_prefix(self, node: str | None) -> list[str]: ...
    def host_address(self, node: str | None) -> str: ...
    def bind_address(self, node: str | None) -> str: ...
    async def cut(self, site: str) -> None: ...
    async def heal(self, site: str) -> None: ...
    async def set_profile(self, site: str, profile: Profile) -> None: ...
    async def partition(self, site: str, groups: list[list[str]]) -> None: ...
    def describe(self) -> str: ...
    def counters(self) -> dict[str, Any]: ...
    async def close(self) -> None: ...


class RelayBacking:
    """User-space TCP relays on loopback, one per node; the nodes of a site share its link."""

    def __init__(self, *, seed: int = 1) -> None:
        self._seed = seed
        self._links: dict[str, Link] = {}
        self._relays: dict[str, Relay] = {}
        self._site_of: dict[str, str] = {}

    async def open(self, topology: Topology, hub_port: int) -> None:
        for n, site in enumerate(topology.sites):
            link = self._links[site.name] = Link(site.profile, self._seed * 1000 + n)
            for node in site.node_names:
                self._site_of[node] = site.name
                relay = self._relays[node] = Relay(("127.0.0.1", hub_port), link)
                await relay.open()

    def link(self, site: str) -> Link:
        """A site's link, for relays of other things over it."""
        return self._links[site]

    def link_url_host_port(self, node: str) -> tuple[str, int]:
        return "127.0.0.1", self._relays[node].port

    def spawn_prefix(self, node: str | None) -> list[str]:
        return []

    def host_address(self, node: str | None) -> str:
        return "127.0.0.1"

    def bind_address(self, node: str | None) -> str:
        return "127.0.0.1"

    async def cut(self, site: str) -> None:
        self._links[site].cut()

    async def heal(self, site: str) -> None:
        self._links[site].heal()

    async def set_profile(self, site: str, profile: Profile) -> None:
        self._links[site].set_profile(profile)

    async def partition(self, site: str, groups: list[list[str]]) -> None:
        raise Invalid(
            "nodes behind relays share loopback and cannot be parted",
            field="partition",
            remedy="run the lab with --backing namespaces (needs root)",
        )

    def describe(self) -> str:
        return "relays on loopback, emulated in user space (no root needed; nodes share this machine's network)"

    def counters(self) -> dict[str, Any]:
        nodes = {
            node: NodeCounters(self._site_of[node], r.up, r.down, r.connections, r.active, r.refused)
            for node, r in self._relays.items()
        }
        found: dict[str, Any] = msgspec.to_builtins(Counters(nodes, {}))
        return found

    async def close(self) -> None:
        for relay in self._relays.values():
            await relay.close()
