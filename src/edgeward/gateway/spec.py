"""Kind Route: which requests that reach a node's gateway are answered by what. Pure.

A Route names a host, a path, methods and header fields, and one target: a function, a Service of the namespace, or an
upstream anywhere. What is left out matches everything. The rules of precedence are in ``match.py``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from edgeward.core.declared import Declared, Placement
from edgeward.core.errors import Invalid
from edgeward.core.quantity import BYTES_PATTERN, DURATION_PATTERN, parse_bytes, parse_duration
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import NAME_PATTERN, Resource
from edgeward.gateway.auth_spec import Auth, auth_refs, check_auth
from edgeward.gateway.http1 import CLAIMS, HOP, Bad
from edgeward.gateway.match import clean

Duration = Annotated[str, Meta(pattern=DURATION_PATTERN)] | float | int
Size = Annotated[str, Meta(pattern=BYTES_PATTERN)] | int
Method = Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*|\[[0-9a-f:.]+\]")
_FIELD = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_ORIGIN = re.compile(r"https?://([a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


class Static(Declared):
    """Files that the node itself gives. Exactly one of config and folder."""

    config: Annotated[str, Meta(description="A Config of the namespace: its keys are the files' names")] = ""
    folder: Annotated[str, Meta(description="A folder that node.json allows by this name (gateway.folders)")] = ""
    index: Annotated[str, Meta(description="What a folder's own path gives", max_length=128)] = "index.html"
    cacheControl: Annotated[str, Meta(description="e.g. public, max-age=60; left out: not said", max_length=256)] = ""


class RouteTarget(Declared):
    """What answers. Exactly one."""

    function: Annotated[str, Meta(description="A Function of the namespace, or one of its aliases: name@alias")] = ""
    static: Annotated[Static | None, Meta(description="Files of the node")] = None
    service: Annotated[str, Meta(description="A Service of the namespace: its endpoints at this site")] = ""
    upstream: Annotated[
        str, Meta(description="http://host:port or https://host: the request's path goes on as it is", max_length=1024)
    ] = ""


class Sticky(Declared):
    """What makes two requests the same caller's, for a function that has a canary. At most one; empty: the client."""

    header: Annotated[str, Meta(description="The value of this header field")] = ""
    cookie: Annotated[str, Meta(description="The value of this cookie")] = ""


class RouteTimeouts(Declared):
    connect: Annotated[Duration, Meta(description="To open a connection to the target; then the next is tried")] = "2s"
    answer: Annotated[Duration, Meta(description="To the head of the answer; a function's own limit holds as well")] = (
        "30s"
    )
    idle: Annotated[Duration, Meta(description="Between two pieces of a body, or of a WebSocket's traffic")] = "60s"


class Retries(Declared):
    """A request is sent again only where that cannot do it twice: none of it was sent, or it is idempotent."""

    attempts: Annotated[int, Meta(description="How often it is sent at most", ge=1, le=5)] = 2
    budget: Annotated[
        float, Meta(description="Repeats for each request of the last time; a down target is not flooded", ge=0, le=1)
    ] = 0.2


class Breaker(Declared):
    """An endpoint that fails again and again is left alone for a while; then one request tries it."""

    failures: Annotated[int, Meta(description="Failures in a row that open it; 0: never", ge=0, le=1000)] = 5
    pause: Annotated[Duration, Meta(description="How long it is left alone")] = "5s"


class Rate(Declared):
    """How often one client address may ask; more gets 429 with Retry-After."""

    requests: Annotated[int, Meta(description="Requests", ge=1, le=1_000_000)]
    per: Annotated[Duration, Meta(description="In this time, on each node")] = "1s"
    burst: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)] | None,
        Meta(description="So many at once, when it was quiet before; as many as requests if left out"),
    ] = None


class RouteLimits(Declared):
    body: Annotated[Size, Meta(description="A request's body; a function's is at most 6Mi")] = "64Mi"
    requests: Annotated[int, Meta(description="In progress at once on a node; more are refused (503)", ge=1)] = 1024

    rate: Annotated[Rate | None, Meta(description="Of each client; left out: no limit")] = None


class Cors(Declared):
    """Which pages of other origins may ask and read; the gateway says it in place of the target."""

    origins: Annotated[
        list[str], Meta(description="e.g. https://app.example.org; * is every page", min_length=1, max_length=64)
    ]
    methods: Annotated[list[Method], Meta(description="That they may use")] = msgspec.field(
        default_factory=lambda: ["GET", "HEAD", "POST"]
    )
    headers: Annotated[list[str], Meta(description="Header fields that they may send; * is any", max_length=64)] = []
    expose: Annotated[list[str], Meta(description="Header fields that they may read", max_length=64)] = []
    credentials: Annotated[bool, Meta(description="With cookies; not with origins: ['*']")] = False
    maxAge: Annotated[Duration, Meta(description="How long a browser remembers it")] = "10m"


class Cache(Declared):
    """A shared cache as RFC 9111 asks; what is left out is what the RFC says, and nothing else."""

    object: Annotated[Size, Meta(description="Larger answers are passed on and not kept; over 16Mi: on the disk")] = (
        "1Mi"
    )
    disk: Annotated[bool, Meta(description="On the node's disk, too: it survives a restart and a power cut")] = True
    staleIfError: Annotated[
        Duration, Meta(description="Keep answering from the cache so long when the target fails, unless it forbids it")
    ] = 0
    staleWhileRevalidate: Annotated[
        Duration, Meta(description="Answer from the cache so long while it is renewed, unless the target forbids it")
    ] = 0


class Compress(Declared):
    """Text goes out gzipped to those who take it. Not for answers that hold a secret beside what a stranger chose."""

    minSize: Annotated[Size, Meta(description="Smaller answers go out as they are")] = "1Ki"
    types: Annotated[
        list[str], Meta(description="More media types than text/*, JSON, XML, JavaScript, SVG, fonts", max_length=32)
    ] = []


class RouteSpec(Declared):
    """Requests that reach the gateway of a node, and what answers them there."""

    to: Annotated[RouteTarget, Meta(description="What answers")]
    path: Annotated[
        str, Meta(description="Exactly this path; one that ends in / matches all below it", max_length=1024)
    ] = "/"
    host: Annotated[str, Meta(description="The host asked for, or *.example.org; empty: any", max_length=253)] = ""
    methods: Annotated[list[Method], Meta(description="Only these; GET includes HEAD; empty: all")] = []
    headers: Annotated[dict[str, str], Meta(description="Only requests with these fields and values")] = {}
    sticky: Annotated[
        Sticky | None, Meta(description="Who stays with which version of a function; left out: by client address")
    ] = None
    timeouts: Annotated[RouteTimeouts, Meta(description="How long is waited")] = msgspec.field(
        default_factory=RouteTimeouts
    )
    retries: Annotated[Retries, Meta(description="When a target fails")] = msgspec.field(default_factory=Retries)
    breaker: Annotated[Breaker, Meta(description="When an endpoint goes on failing")] = msgspec.field(
        default_factory=Breaker
    )
    limits: Annotated[RouteLimits, Meta(description="What a request may be")] = msgspec.field(
        default_factory=RouteLimits
    )
    prefer: Annotated[
        Literal["edge", "cloud"],
        Meta(description="Who is asked first: this site, or the cloud, and this site when it does not answer"),
    ] = "edge"
    fallback: Annotated[
        list[Literal["nearest", "cloud"]],
        Meta(
            description="Who answers what this site cannot, in this order: the nearest sites that have addresses and "
            "this Route, the cloud; left out: as the Service's fallback says",
            max_length=2,
        ),
    ] = []
    cloud: Annotated[
        str, Meta(description="Where the cloud answers: http://host:port or https://host", max_length=1024)
    ] = ""
    cache: Annotated[Cache | None, Meta(description="Keep answers; {} is RFC 9111 and nothing else")] = None
    compress: Annotated[Compress | None, Meta(description="Gzip what shrinks; left out: the target's own word")] = None
    auth: Annotated[Auth | None, Meta(description="Who may ask; left out: everybody")] = None
    cors: Annotated[Cors | None, Meta(description="For pages of other origins; left out: the target's own word")] = None
    placement: Annotated[Placement, Meta(description="Which nodes serve it; empty: all")] = msgspec.field(
        default_factory=Placement
    )


def split_function(name: str) -> tuple[str, str | None]:
    """``hello@canary`` -> (function, alias)."""
    function, at, alias = name.partition("@")
    return function, alias if at else None


def origin_of(upstream: str, where: str = "$.spec.to.upstream") -> tuple[str, str, int]:
    """``(scheme, host, port)`` of an upstream's URL. Raises ``Invalid``."""
    try:
        url = urlsplit(upstream)
        port = url.port
    except ValueError:
        raise Invalid(f"{upstream[:80]!r} is no URL", field=where, remedy="write http://host:port") from None
    if url.scheme not in ("http", "https") or not url.hostname or url.username is not None or url.password is not None:
        raise Invalid(f"{upstream[:80]!r} is no http URL", field=where, remedy="write http://host:port")
    if (
        url.path not in ("", "/")
        or url.query
        or url.fragment
        or not upstream.isascii()
        or any(c <= " " for c in upstream)
    ):
        raise Invalid("an upstream has no path", field=where, remedy="the request's own path is passed on: remove it")
    return url.scheme, url.hostname, port or (443 if url.scheme == "https" else 80)


def _check_target(to: RouteTarget) -> None:
    given = [n for n in ("function", "service", "upstream", "static") if getattr(to, n)]
    if len(given) != 1:
        what = f"more than one target: {', '.join(given)}" if given else "no target"
        raise Invalid(what, field="$.spec.to", remedy="name exactly one of function, service, upstream, static")
    if to.upstream:
        origin_of(to.upstream)
    if to.static is not None:
        _check_static(to.static)
    for name in filter(None, (to.service, *split_function(to.function))):
        if not re.fullmatch(NAME_PATTERN, name):
            raise Invalid(f"{name[:63]!r} is no name", field=f"$.spec.to.{given[0]}")
    if to.function.endswith("@"):
        raise Invalid("an empty alias", field="$.spec.to.function", remedy="write name or name@alias")


def _check_sticky(spec: RouteSpec) -> None:
    sticky = spec.sticky
    if sticky is None:
        return
    if not spec.to.function:
        raise Invalid("is for functions", field="$.spec.sticky", remedy="remove it")
    if bool(sticky.header) == bool(sticky.cookie):
        raise Invalid("name one", field="$.spec.sticky", remedy="a header or a cookie")
    for name, value in (("header", sticky.header), ("cookie", sticky.cookie)):
        if value and not _FIELD.fullmatch(value):
            raise Invalid(f"{value[:64]!r} is no name of a {name}", field=f"$.spec.sticky.{name}")


def _check_static(static: Static) -> None:
    where = "$.spec.to.static"
    if bool(static.config) == bool(static.folder):
        raise Invalid("names no files" if not static.config else "names two", field=where, remedy="config or folder")
    if not re.fullmatch(NAME_PATTERN, static.config or static.folder):
        raise Invalid("is no name", field=f"{where}.{'config' if static.config else 'folder'}")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", static.index):
        raise Invalid(f"{static.index[:80]!r} is no file's name", field=f"{where}.index")
    if not re.fullmatch(r"[\x20-\x7e]*", static.cacheControl) or static.cacheControl != static.cacheControl.strip():
        raise Invalid("is no header field's value", field=f"{where}.cacheControl")


def _check_places(spec: RouteSpec) -> None:
    cloud = "cloud" in spec.fallback
    if len(set(spec.fallback)) != len(spec.fallback):
        raise Invalid("a place is given twice", field="$.spec.fallback", remedy="remove one")
    if spec.to.static is not None and (spec.fallback or spec.prefer == "cloud"):
        raise Invalid("files are here or nowhere", field="$.spec.fallback", remedy="remove fallback and prefer")
    if spec.prefer == "cloud" and cloud:
        raise Invalid("the cloud is asked first already", field="$.spec.fallback", remedy="remove cloud")
    if spec.cloud:
        origin_of(spec.cloud, "$.spec.cloud")
        if not (cloud or spec.prefer == "cloud" or spec.to.service):
            raise Invalid("is not asked by this Route", field="$.spec.cloud", remedy="add fallback: [cloud]")
    elif cloud or spec.prefer == "cloud":
        raise Invalid("is required: where does the cloud answer?", field="$.spec.cloud", remedy="write https://host")


def _check_durations(spec: RouteSpec) -> None:
    found = [(f"timeouts.{n}", getattr(spec.timeouts, n), 0.01) for n in ("connect", "answer", "idle")]
    found.append(("breaker.pause", spec.breaker.pause, 0.1))
    if spec.cors is not None:
        found.append(("cors.maxAge", spec.cors.maxAge, 0.0))
    if spec.limits.rate is not None:
        found.append(("limits.rate.per", spec.limits.rate.per, 0.001))
    if spec.cache is not None:
        found += [(f"cache.{n}", getattr(spec.cache, n), 0.0) for n in ("staleIfError", "staleWhileRevalidate")]
    for name, value, least in found:
        try:
            seconds = parse_duration(value)
        except ValueError as e:
            raise Invalid(str(e), field=f"$.spec.{name}") from None
        if not least <= seconds <= 366 * 86400:
            raise Invalid(f"{value} is out of range", field=f"$.spec.{name}", remedy=f"from {least:g}s to 366d")


def _check_cors(cors: Cors) -> None:
    for n, origin in enumerate(cors.origins):
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise Invalid(
                f"{origin[:80]!r} is no origin", field=f"$.spec.cors.origins[{n}]", remedy="write https://host or *"
            )
    if "*" in cors.origins and cors.credentials:
        raise Invalid("every page with cookies", field="$.spec.cors.credentials", remedy="name the origins")
    for name in ("headers", "expose"):
        for n, field in enumerate(getattr(cors, name)):
            if not _FIELD.fullmatch(field):
                raise Invalid(f"{field[:64]!r} is no header field", field=f"$.spec.cors.{name}[{n}]")


def _check(r: Resource) -> None:
    spec: RouteSpec = r.spec
    _check_target(spec.to)
    _check_sticky(spec)
    try:
        path, query = clean(spec.path)
    except Bad as e:
        raise Invalid(e.why, field="$.spec.path", remedy="write e.g. /hello or /news/") from None
    if path != spec.path or query or "?" in spec.path:
        remedy = f"write {path}" if path != spec.path else "a path has no query"
        raise Invalid(f"{spec.path[:80]!r} is not in its plain form", field="$.spec.path", remedy=remedy)
    if spec.host and not _HOST.fullmatch(spec.host):
        raise Invalid(
            f"{spec.host[:80]!r} is no host",
            field="$.spec.host",
            remedy="lower case, no port: example.org, *.example.org",
        )
    for name, value in spec.headers.items():
        where = f"$.spec.headers.{name[:64]}"
        if not _FIELD.fullmatch(name) or len(value) > 1024 or not value.isascii() or not value.isprintable():
            raise Invalid("is no header field that can be compared", field=where, remedy="a name and a plain value")
        if name.lower() in HOP | CLAIMS | {"host", "content-length"} or value != value.strip():
            raise Invalid("cannot be matched", field=where, remedy="use host for Host; the gateway drops such fields")
    if len(spec.headers) > 16:
        raise Invalid("more than 16 header fields", field="$.spec.headers")
    if len(set(spec.methods)) != len(spec.methods):
        raise Invalid("a method is given twice", field="$.spec.methods", remedy="remove one")
    if spec.to.static is not None and spec.cache is not None:
        raise Invalid("files are here already", field="$.spec.cache", remedy="say to.static.cacheControl to others")
    if spec.auth is not None:
        check_auth(spec.auth)
    if spec.cors is not None:
        _check_cors(spec.cors)
    _check_places(spec)
    _check_durations(spec)
    for n, media in enumerate(spec.compress.types if spec.compress is not None else []):
        if not re.fullmatch(r"[a-zA-Z0-9!#$&^_.+-]+/[a-zA-Z0-9!#$&^_.+-]+", media):
            raise Invalid(f"{media[:64]!r} is no media type", field=f"$.spec.compress.types[{n}]", remedy="write a/b")
    sizes = [("limits.body", spec.limits.body)]
    sizes += [("cache.object", spec.cache.object)] if spec.cache else []
    sizes += [("compress.minSize", spec.compress.minSize)] if spec.compress else []
    for name, size in sizes:
        try:
            parse_bytes(size)
        except ValueError as e:
            raise Invalid(str(e), field=f"$.spec.{name}") from None
    if spec.cache is not None and parse_bytes(spec.cache.object) > (256 if spec.cache.disk else 16) * 1024**2:
        remedy = "up to 256Mi" if spec.cache.disk else "in memory up to 16Mi; with disk: true up to 256Mi"
        raise Invalid("is too large", field="$.spec.cache.object", remedy=remedy)


def _refs(r: Resource) -> list[Ref]:
    spec: RouteSpec = r.spec
    refs = []
    if spec.to.service:
        refs.append(Ref("Service", r.metadata.namespace, spec.to.service, "$.spec.to.service"))
    if spec.to.static is not None and spec.to.static.config:
        refs.append(Ref("Config", r.metadata.namespace, spec.to.static.config, "$.spec.to.static.config"))
    if spec.to.function:
        function, _ = split_function(spec.to.function)
        refs.append(Ref("Function", r.metadata.namespace, function, "$.spec.to.function"))
    if spec.auth is not None:
        refs += auth_refs(spec.auth, r.metadata.namespace)
    if spec.placement.site:
        refs.append(Ref("Site", "_", spec.placement.site, "$.spec.placement.site"))
    return refs


def _target(d: dict[str, Any]) -> str:
    to = dict(d["spec"].get("to", {}))
    to |= {k: v for k, v in (to.pop("static", None) or {}).items() if k in ("config", "folder")}
    return ", ".join(f"{k} {v}" for k, v in to.items())


kinds.add(
    Kind(
        "Route",
        "routes",
        RouteSpec,
        reported=True,
        doc="Requests at a node's gateway, and what answers them.",
        scope="placed",
        level=2,
        check=_check,
        refs=_refs,
        columns=(
            Column("HOST", lambda d: d["spec"].get("host", "") or "*"),
            Column("PATH", lambda d: d["spec"].get("path", "/")),
            Column("TO", _target),
            Column("PHASE", lambda d: d.get("status", {}).get("phase", "Pending")),
            Column("MESSAGE", lambda d: d.get("status", {}).get("message", ""), wide=True),
        ),
        example=(
            "apiVersion: edgeward/v1\nkind: Route\nmetadata: {name: news}\n"
            'spec: {path: /news/, to: {upstream: "http://127.0.0.1:18080"}, cache: {}}\n'
        ),
    )
)
