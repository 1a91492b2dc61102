"""A lab: a cluster whose links are emulated, and the acts that rehearse outages on it.

It puts together ``cluster.py`` (processes), ``backing.py`` (links) and ``control.py`` (the socket for other terminals).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from edgeward.core.errors import Invalid, NotFound, Unreachable, from_problem
from edgeward.lab.backing import Backing, RelayBacking
from edgeward.lab.cluster import Cluster, Say
from edgeward.lab.control import Verb, serve
from edgeward.lab.links import BUILTIN, Profile
from edgeward.lab.namespaces import NamespaceBacking, unusable
from edgeward.lab.relay import Relay
from edgeward.lab.topology import Topology


class BackedLinks:
    """A backing as the cluster sees it."""

    def __init__(self, backing: Backing) -> None:
        self.backing = backing

    async def open(self, topology: Topology, hub_port: int) -> None:
        await self.backing.open(topology, hub_port)

    def link_address(self, node: str) -> tuple[str, int]:
        return self.backing.link_url_host_port(node)

    def spawn_prefix(self, node: str | None) -> list[str]:
        return self.backing.spawn_prefix(node)

    def host_address(self, node: str | None) -> str:
        return self.backing.host_address(node)

    def bind_address(self, node: str | None) -> str:
        return self.backing.bind_address(node)

    async def close(self) -> None:
        await self.backing.close()


class Lab:
    def __init__(self, cluster: Cluster, backing: Backing, topology: Topology) -> None:
        self.cluster = cluster
        self.backing = backing
        self.topology = topology
        self._link = {s.name: (s.link if isinstance(s.link, str) else s.link.name) for s in topology.sites}
        self._profile = {s.name: s.profile for s in topology.sites}
        self._cut: set[str] = set()
        #: site -> the groups that it is parted into
        self._parted: dict[str, list[list[str]]] = {}
        self._relays: list[tuple[str, Relay]] = []

    async def up(self) -> None:
        await self.cluster.up()

    async def run(self) -> None:
        await self.cluster.run()

    def describe(self) -> str:
        return self.backing.describe()

    # -- acts ------------------------------------------------------------------------------------------------------

    def _site(self, site: str) -> str:
        if site not in self._link:
            raise NotFound(f"there is no site {site!r}", remedy=f"sites: {', '.join(self._link)}")
        return site

    async def cut(self, site: str) -> None:
        await self.backing.cut(self._site(site))
        self._cut.add(site)
        for where, relay in self._relays:
            if where == site:
                relay.cut()

    async def heal(self, site: str) -> None:
        await self.backing.heal(self._site(site))
        self._cut.discard(site)
        self._parted.pop(site, None)
        for where, relay in self._relays:
            if where == site:
                relay.heal()

    async def profile(self, site: str, name: str | Profile) -> None:
        profile = BUILTIN.get(name) if isinstance(name, str) else name
        if profile is None:
            raise Invalid(
                f"there is no profile {name!r}", field="name", remedy=f"profiles: {', '.join(sorted(BUILTIN))}"
            )
        await self.backing.set_profile(self._site(site), profile)
        self._link[site] = profile.name
        self._profile[site] = profile
        for where, relay in self._relays:
            if where == site:
                relay.set_profile(profile)

    async def partition(self, site: str, groups: list[list[str]]) -> None:
        await self.backing.partition(self._site(site), groups)
        self._parted[site] = groups

    async def kill(self, node: str) -> dict[str, Any]:
        return {"killed": await self.cluster.kill(node)}

    async def start(self, node: str) -> None:
        await self.cluster.start(node)

    def status(self) -> dict[str, Any]:
        sites = []
        for site in self.topology.sites:
            nodes = []
            for name in site.node_names:
                child = self.cluster.nodes[name]
                nats = child.state().get("nats") if child.pid else None
                nodes.append({"name": name, "agent": child.pid, "nats": nats, "ready": child.ready()})
            sites.append(
                {
                    "name": site.name,
                    "link": self._link[site.name],
                    "cut": site.name in self._cut,
                    "parted": self._parted.get(site.name, []),
                    "nodes": nodes,
                }
            )
        return {"sites": sites, "backing": self.describe(), "counters": self.backing.counters()}

    # -- for the demo and the scenario tests ---------------------------------------------------------------------------

    async def wan_relay(self, site: str, port: int) -> int:
        """A port at the site from which ``port`` beside the hub is reached over the site's emulated link."""
        relay = Relay(("127.0.0.1", port), self._profile[site])
        await relay.open()
        self._relays.append((self._site(site), relay))
        return relay.port

    async def close(self) -> None:
        for _, relay in self._relays:
            await relay.close()

    def node_api(self, node: str, path: str, timeout: float = 5.0) -> Any:
        """GET on a node's own API (blocking)."""
        api = self.cluster.nodes[node].state().get("api")
        if not api:
            raise Unreachable(f"node {node} has no API now", resource=f"Node/{node}")
        c = _UnixConnection(str(api), timeout)
        try:
            c.request("GET", path)
            answer = c.getresponse()
            doc = json.loads(answer.read())
        finally:
            c.close()
        if answer.status >= 400:
            raise from_problem(doc, answer.status)
        return doc


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def choose(topology: Topology, wanted: str = "", seed: int = 1) -> Backing:
    """The backing that the topology (or the command line) asks for; refuses one that cannot work here, and says why."""
    name = wanted or topology.backing
    if name not in ("auto", "relays", "namespaces"):
        raise Invalid(f"there is no backing {name!r}", field="backing", remedy="relays, namespaces or auto")
    if name == "namespaces":
        why = unusable()
        if why:
            raise Invalid(
                why, field="backing", remedy="run as root on Linux with iproute2, or use relays (the default)"
            )
        return NamespaceBacking(seed=seed)
    return RelayBacking(seed=seed)


@contextlib.asynccontextmanager
async def open_lab(
    data: Path,
    topology: Topology,
    *,
    backing: str = "",
    port: int = 0,
    ready_file: Path | None = None,
    say: Say | None = None,
    seed: int = 1,
) -> AsyncIterator[Lab]:
    """A lab that answers on its control socket inside the block; :meth:`Lab.up` starts it."""
    chosen = choose(topology, backing, seed)
    links = BackedLinks(chosen)
    async with Cluster(data, topology, links=links, port=port, ready_file=ready_file, say=say) as cluster:
        lab = Lab(cluster, chosen, topology)

        async def status(_: dict[str, Any]) -> Any:
            return lab.status()

        verbs: dict[str, Verb] = {
            "status": status,
            "cut": lambda a: lab.cut(str(a["site"])),
            "heal": lambda a: lab.heal(str(a["site"])),
            "profile": lambda a: lab.profile(str(a["site"]), str(a["name"])),
            "partition": lambda a: lab.partition(str(a["site"]), [[str(n) for n in g] for g in a["groups"]]),
            "kill": lambda a: lab.kill(str(a["node"])),
            "start": lambda a: lab.start(str(a["node"])),
        }
        async with serve(data, verbs):
            try:
                yield lab
            finally:
                await lab.close()
