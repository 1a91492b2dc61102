"""What the agent tells the gateway, and what the gateway makes of it.

In: the section of ``plane.json``; out: a table of rules. Pure. A rule keeps its counters, its breakers and its budget
over a change of the others; a section that cannot be understood is refused whole, and the old table goes on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edgeward.core.errors import Invalid
from edgeward.core.throttle import Throttle
from edgeward.gateway.auth import AuthConfig, Guard
from edgeward.gateway.balance import Balance, Budget, Endpoint
from edgeward.gateway.cors import CorsConfig
from edgeward.gateway.listens import ListenerConfig
from edgeward.gateway.match import Table
from edgeward.gateway.squeeze import CompressConfig
from edgeward.gateway.static import StaticConfig

if TYPE_CHECKING:
    from edgeward.gateway.site import Site

#: Upper bounds of the latency histogram, in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class CacheConfig(msgspec.Struct, frozen=True):
    object: int = 1024**2
    stale_if_error: float = 0.0
    stale_while_revalidate: float = 0.0
    #: On the disk, too.
    disk: bool = True


class PlaceConfig(msgspec.Struct, frozen=True):
    """Where a request may be answered beside this site: another site's gateway, or an upstream that is the cloud."""

    kind: Literal["site", "cloud"]
    #: The site's name, or the upstream's URL.
    name: str
    endpoint: Endpoint
    #: The Host that is asked for; empty: the client's.
    send_host: str = ""
    #: The same place's other endpoints.
    more: tuple[Endpoint, ...] = ()


class RouteConfig(msgspec.Struct, frozen=True):
    #: ``namespace/name`` of the Route.
    key: str
    to: Literal["function", "service", "upstream", "static"]
    #: What the target is called in answers and logs: ``Service/web``.
    target: str
    host: str = ""
    path: str = "/"
    methods: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    #: The Host that an upstream is asked by; empty: the client's.
    send_host: str = ""
    function: str = ""
    #: The function is not on this node.
    missing: bool = False
    version: str | None = None
    #: The header field and the cookie in it whose value says who is asking; empty: the client's address.
    sticky: tuple[str, str] = ("", "")
    connect: float = 2.0
    answer: float = 30.0
    idle: float = 60.0
    attempts: int = 2
    budget: float = 0.2
    failures: int = 5
    pause: float = 5.0
    body: int = 64 * 1024**2
    requests: int = 1024
    cache: CacheConfig | None = None
    #: Requests a second of one client, and how many at once; 0: no limit.
    rate: float = 0.0
    cors: CorsConfig | None = None
    burst: int = 0
    auth: AuthConfig | None = None
    static: StaticConfig | None = None
    #: Who is asked before the target, and after it when it cannot answer.
    first: tuple[PlaceConfig, ...] = ()
    then: tuple[PlaceConfig, ...] = ()
    #: Which of the places that are declared are not there, in words; empty: all are.
    lacking: str = ""
    #: Names (``dns:NAME``) in certificates of other sites' nodes that may ask; None: that is not looked at.
    guests: tuple[str, ...] | None = None
    compress: CompressConfig | None = None


class Listen(msgspec.Struct, frozen=True):
    host: str
    port: int


class GatewayConfig(msgspec.Struct, frozen=True):
    """The section ``gateway`` of ``plane.json``."""

    node: str = ""
    listen: tuple[Listen, ...] = ()
    routes: tuple[RouteConfig, ...] = ()
    #: Bytes of the cache's memory.
    memory: int = 32 * 1024**2
    #: Bytes of the cache on the disk; 0: none.
    disk: int = 0
    access_log: Literal["all", "errors", "off"] = "all"
    #: The declared ones.
    listeners: tuple[ListenerConfig, ...] = ()
    #: Who listens: the plane itself, or nginx before it.
    engine: Literal["embedded", "nginx"] = "embedded"


class Counters:
    """What happened at one route since the plane started."""

    __slots__ = ("buckets", "bytes", "cache", "places", "retries", "seconds", "statuses")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0
        self.bytes = 0
        self.retries = 0
        self.cache: dict[str, int] = {}
        #: Answers by the kind of place that gave them, where there are several.
        self.places: dict[str, int] = {}

    def counted(self, status: int, seconds: float, size: int, cache: str, times: int) -> None:
        """So many alike, by the engine before the plane."""
        self.statuses[status] = self.statuses.get(status, 0) + times
        self.buckets[bisect_left(BUCKETS, seconds)] += times
        self.seconds += seconds * times
        self.bytes += size * times
        if cache:
            self.cache[cache] = self.cache.get(cache, 0) + times

    def count(self, status: int, seconds: float, size: int, cache: str) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.buckets[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds
        self.bytes += size
        if cache:
            self.cache[cache] = self.cache.get(cache, 0) + 1


class Place:
    """One of the places that may answer: ``here`` (the Route's own target), a ``site`` or the ``cloud``."""

    __slots__ = ("balance", "kind", "name", "send_host", "target")

    def __init__(self, kind: str, name: str, target: str, send_host: str, balance: Balance) -> None:
        self.kind, self.name, self.target, self.send_host, self.balance = kind, name, target, send_host, balance

    def __str__(self) -> str:
        return f"site {self.name}" if self.kind == "site" else self.target


class Rule:
    """A route at work. It is what ``match.Table`` finds."""

    __slots__ = (
        "active",
        "balance",
        "budget",
        "cache",
        "compress",
        "config",
        "cors",
        "counters",
        "guard",
        "guests",
        "home",
        "host",
        "key",
        "match_headers",
        "methods",
        "owner",
        "pace",
        "path",
        "places",
        "preflight",
        "site",
    )  # fmt: skip

    def __init__(
        self, config: RouteConfig, old: Rule | None, guard: Guard | None = None, site: Site | None = None
    ) -> None:
        self.config = config
        self.key, self.host, self.path = config.key, config.host, config.path
        self.methods, self.match_headers = config.methods, config.headers
        self.cache = config.cache
        self.cors = config.cors
        self.compress = config.compress
        #: Who is let in; None: everybody.
        self.guard = guard
        self.guests = None if config.guests is None else frozenset(config.guests)
        #: Its files, where it has some.
        self.site = site
        if config.auth is not None and guard is None:
            raise ValueError(f"{config.key} has nobody at its door")
        #: The gateway itself answers what a browser asks before a request.
        self.preflight = config.cors is not None
        self.balance: Balance = Balance(config.endpoints, config.failures, config.pause, old.balance if old else None)
        self.home = Place("here", "", config.target, config.send_host, self.balance)
        known = {(p.kind, p.name): p.balance for p in old.places} if old is not None else {}
        #: In the order in which they are asked.
        self.places: tuple[Place, ...] = (
            *(_place(config, p, known) for p in config.first), self.home,
            *(_place(config, p, known) for p in config.then),
        )  # fmt: skip
        main = self.places[0]
        self.owner = f"{config.key} {main.target} {main.send_host}"
        same = old is not None and old.config.budget == config.budget
        self.budget: Budget = old.budget if old is not None and same else Budget(config.budget)
        self.counters: Counters = old.counters if old is not None else Counters()
        paced = old is not None and (old.config.rate, old.config.burst) == (config.rate, config.burst)
        self.pace: Throttle | None = None
        if config.rate:
            self.pace = old.pace if old is not None and paced else Throttle(burst=config.burst, rate=config.rate)
        #: Requests in progress.
        self.active: list[int] = old.active if old is not None else [0]

    def __repr__(self) -> str:
        return f"<Rule {self.key}>"


def _place(config: RouteConfig, place: PlaceConfig, known: Mapping[tuple[str, str], Balance]) -> Place:
    balance = Balance((place.endpoint, *place.more), config.failures, config.pause, known.get((place.kind, place.name)))
    target = f"the gateway of site {place.name}" if place.kind == "site" else place.name
    return Place(place.kind, place.name, target, place.send_host, balance)


def decode(section: Mapping[str, Any]) -> GatewayConfig:
    """Raises ``Invalid``."""
    try:
        return msgspec.convert(section, GatewayConfig)
    except msgspec.ValidationError as e:
        raise Invalid(str(e), field="$.gateway") from None


def table(
    config: GatewayConfig,
    old: Table[Rule] | None = None,
    guards: Mapping[str, Guard] | None = None,
    sites: Mapping[str, Site] | None = None,
) -> Table[Rule]:
    known = {r.key: r for r in old.rules} if old is not None else {}
    return Table(
        [Rule(c, known.get(c.key), (guards or {}).get(c.key), (sites or {}).get(c.key)) for c in config.routes]
    )
