"""Steering at the hub: what is known of the sites, told by DNS, by JSON and by redirect. A thin shell.

Sites and Nodes come from the store's watch, load from the nodes themselves, asked now and then; each change makes a
new :class:`Steering`. The decisions are in ``gateway/steer.py``, what DNS says in ``gateway/dnszone.py``, its sockets
are in ``responder.py``. All of it is off unless ``steering`` of hub.json (or ``--dns``) says so, but the question
``/api/v1/steer`` that readers of Sites may ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import msgspec
import nats.errors
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.core.access import needs, opened
from edgeward.core.describe import described
from edgeward.core.errors import EdgewardError, Invalid, Unreachable
from edgeward.core.quantity import parse_duration
from edgeward.core.store import Change, Store
from edgeward.core.streaming import json, only
from edgeward.gateway.dnszone import Zone, literal
from edgeward.gateway.steer import Answer, Edge, Prefixes, Steering, client_address
from edgeward.hub.neighbours import Neighbours, authority
from edgeward.hub.responder import DnsServer, Responder

log = logging.getLogger("edgeward.steering")

#: Nodes asked at once for their load, and the least difference that counts.
_AT_ONCE, _STEP = 16, 0.05
_MOST_PATH = 2048

Ask = Callable[[str], Awaitable[dict[str, Any]]]


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``steering`` of hub.json."""

    #: The zone, e.g. edge.example.org; needed for DNS.
    zone: str = ""
    #: ADDRESS:PORT for UDP and TCP; empty: no DNS.
    dns: str = ""
    #: Names in the zone that are steered beside its apex.
    hosts: list[str] = []
    #: The zone's name servers and their addresses.
    servers: dict[str, list[str]] = {}
    #: Seconds that resolvers keep an answer.
    ttl: int = 10
    #: Answers a second for each source over UDP.
    rate: float = 200.0
    #: Whether GET /steer is open to everybody.
    redirect: bool = False
    scheme: str = "http"
    #: How often nodes are asked for their load; 0s: never.
    load: str = "60s"

    @classmethod
    def read(cls, found: Any, dns: str = "", zone: str = "") -> Settings:
        """``found``: as it stands in hub.json, or None. Raises ``Invalid``."""
        try:
            s = msgspec.convert(found or {}, cls)
        except msgspec.ValidationError as e:
            raise _wrong(str(e), "") from None
        s = msgspec.structs.replace(s, dns=dns or s.dns, zone=zone or s.zone)
        if s.scheme not in ("http", "https"):
            raise _wrong(f"{s.scheme!r} is neither http nor https", "scheme")
        if not 0 <= s.ttl <= 86400 or not 0 < s.rate <= 1e6:
            raise _wrong("ttl is 0 to 86400 seconds, rate up to a million answers a second", "ttl")
        try:
            parse_duration(s.load)
        except ValueError as e:
            raise _wrong(str(e), "load") from None
        if s.dns:
            s.listen()
            s.made_zone("")
        return s

    def listen(self) -> tuple[str, int]:
        host, _, port = self.dns.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if literal(host) is None or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise _wrong(f"{self.dns!r} is no ADDRESS:PORT", "dns", "write it as 127.0.0.1:5353")
        return host, int(port)

    def made_zone(self, own: str) -> Zone:
        """``own``: an address of this process, for a zone that names no servers."""
        if not self.zone:
            raise _wrong("DNS needs the name of its zone", "zone", "name it, e.g. edge.example.org")
        servers = {n: tuple(a) for n, a in self.servers.items()} or {f"ns.{self.zone}": (own,) if own else ()}
        try:
            return Zone(self.zone, tuple(self.hosts), servers, self.ttl)
        except ValueError as e:
            raise _wrong(str(e), "zone") from None


def _wrong(what: str, field: str, remedy: str = "") -> Invalid:
    return Invalid(what, file="hub.json", field=f"$.steering.{field}".rstrip("."), remedy=remedy or "correct hub.json")


class Known:
    """What the store and the nodes say of the sites; :attr:`now` is made anew when that has changed."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._sites: dict[str, Any] = {}
        self._nodes: dict[str, tuple[str, bool]] = {}
        self._loads: dict[str, float] = {}
        self._prefixes: Prefixes | None = None
        self._now: Steering | None = None

    @property
    def now(self) -> Steering:
        if self._now is None:
            edges = self._edges()
            self._prefixes = self._prefixes or Prefixes(edges)
            self._now = Steering.of(edges, self._prefixes)
        return self._now

    def take(self, change: Change) -> bool:
        """Whether it is news of where sites are and which of them are there."""
        name, found = change.key.name, change.resource
        if change.key.kind == "Site":
            if found is not None and found.spec == self._sites.get(name):
                return False
            self._now = self._prefixes = None
            self._sites.pop(name, None)
            if found is not None:
                self._sites[name] = found.spec
        elif change.key.kind == "Node":
            new = (found.spec.site, bool(found.status.get("online"))) if found is not None else None
            if new == self._nodes.get(name):
                return False
            self._now = None
            self._nodes.pop(name, None)
            if new is None or not new[1]:
                self._loads.pop(name, None)
            if new is not None:
                self._nodes[name] = new
        return change.key.kind in ("Site", "Node")

    def loaded(self, node: str, load: float | None) -> None:
        """``load``: processes that want to run, for each processor; None: not known."""
        new = None if load is None else round(load / _STEP) * _STEP
        if new == self._loads.get(node) or node not in self._nodes:
            return
        self._now = None
        self._loads.pop(node, None)
        if new is not None:
            self._loads[node] = new

    def serving(self) -> list[str]:
        """Nodes that are heard and whose site has addresses: those whose load matters."""
        sites = {n for n, spec in self._sites.items() if spec.addresses}
        return sorted(n for n, (site, online) in self._nodes.items() if online and site in sites)

    def said(self) -> set[str]:
        """The sites of which a node's load is known."""
        return {self._nodes[n][0] for n in self._loads if n in self._nodes}

    def _edges(self) -> list[Edge]:
        at: dict[str, list[tuple[str, bool]]] = {}
        for node, (site, online) in self._nodes.items():
            at.setdefault(site, []).append((node, online))
        edges = []
        for name, spec in self._sites.items():
            nodes = at.get(name, [])
            loads = [self._loads[n] for n, online in nodes if online and n in self._loads]
            edges.append(
                Edge(
                    name,
                    tuple(spec.prefixes),
                    (spec.coordinates.lat, spec.coordinates.lon) if spec.coordinates else None,
                    tuple(spec.addresses),
                    nodes=len(nodes),
                    online=sum(online for _, online in nodes),
                    load=sum(loads) / len(loads) if loads else 0.0,
                )
            )
        return edges


class Steered(msgspec.Struct):
    """Which site serves a client. ``site``: null when none is there; ``addresses``: those of the site."""

    client: str
    site: str | None
    addresses: list[str]
    why: list[str]


class HubSteering:
    """All of steering at a hub. ``ask`` gives a node's ``usage``."""

    def __init__(self, store: Store, settings: Settings, ask: Ask, neighbours: Neighbours | None = None) -> None:
        self._store, self.settings, self._ask = store, settings, ask
        self.known = Known()
        self._neighbours = neighbours
        self.dns: DnsServer | None = None
        self._responder: Responder | None = None

    async def open(self) -> None:
        """Listens, where it is to. Raises ``Invalid`` where it may not."""
        if not self.settings.dns:
            return
        host, port = self.settings.listen()
        own = host if host not in ("0.0.0.0", "::") else ""  # noqa: S104 - compared, not bound
        self._responder = Responder(self.settings.made_zone(own), lambda: self.known.now, self.settings.rate)
        server = DnsServer(self._responder)
        try:
            await server.open(host, port)
        except OSError as e:
            raise _wrong(f"cannot listen on {self.settings.dns}: {e.strerror}", "dns", "choose another port") from None
        self.dns = server
        log.info("DNS for %s on %s port %s", self.settings.zone, *server.address)

    async def close(self) -> None:
        if self.dns is not None:
            await self.dns.close()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            if self._neighbours is not None:
                group.create_task(self._neighbours.run())
            every = parse_duration(self.settings.load)
            if every and (self.settings.dns or self.settings.redirect):
                group.create_task(self._loads(every))

    async def _follow(self) -> None:
        while True:
            try:
                with self._store.watch(0) as changes:
                    async for change in changes:
                        moved = self.known.take(change)
                        if self._neighbours is not None:
                            self._neighbours.take(change, moved)
            except EdgewardError as e:
                log.info("steering reads the sites anew: %s", e)
                self.known.forget()

    async def _loads(self, every: float) -> None:
        while True:
            await asyncio.sleep(every)  # the period of asking
            nodes = self.known.serving()
            for n in range(0, len(nodes), _AT_ONCE):
                await asyncio.gather(*(self._load(node) for node in nodes[n : n + _AT_ONCE]))

    async def _load(self, node: str) -> None:
        load = None
        with contextlib.suppress(EdgewardError, nats.errors.Error, msgspec.DecodeError, TimeoutError):
            load = load_of(node, await self._ask(node))
        self.known.loaded(node, load)

    def metrics(self) -> dict[str, float]:
        """For /metrics: queries by what became of them; of each site that has addresses its share and its load."""
        found: dict[str, float] = {}
        if self._responder is not None:
            for k in ("udp", "tcp", "over", "dropped"):
                found[f'edgeward_hub_dns_queries_total{{outcome="{k}"}}'] = float(self._responder.counts[k])
        said = self.known.said()
        for edge in self.known.now.edges.values():
            if edge.addresses:
                found[f'edgeward_hub_site_share{{site="{edge.name}"}}'] = 0.0 if edge.out else edge.share
                if edge.name in said:
                    found[f'edgeward_hub_site_load{{site="{edge.name}"}}'] = edge.load
        return found

    # -- over HTTP -------------------------------------------------------------------------------------------------

    def routes(self) -> list[Route]:
        found = [Route("/api/v1/steer", needs("get", "Site")(self.steer), methods=["GET"])]
        if self.settings.redirect:
            found.append(Route("/steer", opened(self.redirect), methods=["GET"]))
        return found

    @described(
        "Which site serves a client, and why",
        query={"client": ("string", "Address of the client; the caller's own if left out")},
        answer=Steered,
    )
    async def steer(self, request: Request) -> Response:
        only(request, "client")
        text = request.query_params.get("client", "") or _caller(request)
        got = self._for(text)
        return json({"client": text, **got.document()})

    @described(
        "Leads to the gateway of the site that serves the caller",
        query={"path": ("string", "Where to, there: a path with its query")},
        code=307,
    )
    async def redirect(self, request: Request) -> Response:
        only(request, "path")
        path = request.query_params.get("path", "") or "/"
        if not path.startswith("/") or len(path) > _MOST_PATH or not path.isprintable() or "\\" in path:
            raise Invalid("is no path", field="?path", remedy="begin it with / and encode what is special in a URL")
        got = self._for(_caller(request))
        if got.site is None:
            raise Unreachable("no site is there to serve you", remedy="ask again in a minute")
        where = f"{self.settings.scheme}://{authority(got.addresses[0])}{quote(path, safe=_SAFE)}"
        return Response(status_code=307, headers={"Location": where, "Cache-Control": "no-store"})

    def _for(self, text: str) -> Answer:
        try:
            client = client_address(text)
        except ValueError:
            raise Invalid(
                f"{text[:60]!r} is no IP address", field="?client", remedy="write it as 192.0.2.1 or 2001:db8::1"
            ) from None
        return self.known.now.steer(client)


#: What stays as it is in the path and query of a URL (RFC 3986, 3.3 and 3.4).
_SAFE = "/%:@!$&'()*+,;=~?-._"


def _caller(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def load_of(node: str, usage: dict[str, Any]) -> float | None:
    """The load of a node by its own ``usage``: for each processor; None from releases that do not say how many."""
    for n in usage.get("nodes", []):
        if isinstance(n, dict) and n.get("name") == node:
            load, cpus = n.get("load1"), n.get("cpus")
            if isinstance(load, int | float) and isinstance(cpus, int) and cpus > 0 and 0 <= load < 1e6:
                return load / cpus
    return None
