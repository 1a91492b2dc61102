"""The agent's side of the gateway: what is declared for this node becomes the plane's section ``gateway``. Pure.

Routes and the endpoints of their Services come in, plain values go out: the plane needs no registry, no replica and no
hub to serve them. Which other sites may be asked is what the hub wrote last into the status of this node's own Site
(``neighbours``, the nearest first): it holds while the link is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from edgeward.core.certs import NODE_DOMAIN
from edgeward.core.errors import Invalid
from edgeward.core.quantity import parse_bytes, parse_duration
from edgeward.core.resource import Resource
from edgeward.gateway.auth import AuthConfig
from edgeward.gateway.auth_edge import Auths, Values
from edgeward.gateway.balance import Endpoint
from edgeward.gateway.cors import CorsConfig
from edgeward.gateway.rules import CacheConfig, GatewayConfig, Listen, PlaceConfig, RouteConfig
from edgeward.gateway.spec import RouteSpec, Static, origin_of, split_function
from edgeward.gateway.squeeze import CompressConfig
from edgeward.gateway.static import StaticConfig

#: ``(namespace, service)`` to its endpoints: ``{address, port, here}``; None: no such Service on this node.
Endpoints = Callable[[str, str], list[dict[str, Any]] | None]


def _static(namespace: str, static: Static, values: Values | None, folders: object) -> dict[str, Any]:
    """What a node gives of a static target: the texts of a Config, or a folder that ``node.json`` allows by name."""
    more: dict[str, Any] = {"index": static.index, "cache_control": static.cacheControl}
    if static.config:
        found = values("Config", namespace, static.config) if values is not None else None
        problem = "" if found is not None else f"Config/{static.config} is not here yet"
        made = StaticConfig(files=found[0] if found is not None else {}, problem=problem, **more)
        return {"to": "static", "target": f"Config/{static.config}", "static": made}
    allowed = folders if isinstance(folders, Mapping) else {}
    folder = allowed.get(static.folder)
    problem = "" if folder else f"node.json allows no folder {static.folder!r} (gateway.folders)"
    if folder and not str(folder).startswith("/"):
        problem = f"the folder {static.folder!r} of node.json is no path from /"
    made = StaticConfig(folder="" if problem else str(folder), problem=problem, **more)
    return {"to": "static", "target": f"Folder/{static.folder}", "static": made}


def _target(
    namespace: str, spec: RouteSpec, endpoints: Endpoints, values: Values | None, folders: object
) -> dict[str, Any]:
    to = spec.to
    if to.static is not None:
        return _static(namespace, to.static, values, folders)
    if to.function:
        function, alias = split_function(to.function)
        return {
            "to": "function", "target": f"Function/{function}", "function": f"{namespace}/{function}", "version": alias
        }  # fmt: skip
    if to.service:
        found = endpoints(namespace, to.service) or []
        places = [Endpoint(str(e["address"]), int(e["port"]), False, bool(e["here"])) for e in found]
        return {"to": "service", "target": f"Service/{to.service}", "endpoints": tuple(sorted(places, key=str))}
    endpoint, host = _upstream(to.upstream)
    return {"to": "upstream", "target": to.upstream.rstrip("/"), "endpoints": (endpoint,), "send_host": host}


class Around(NamedTuple):
    """What this node's site knows of places beside it."""

    #: ``{site, url}`` of its neighbours, the nearest first.
    neighbours: Sequence[Mapping[str, Any]] = ()
    #: ``(namespace, service)`` to the Service's own fallback: fail, nearest, cloud.
    fallback: Callable[[str, str], str] = lambda namespace, service: "fail"
    #: To the nodes of other sites that may ask this one for it; None: it names none.
    guests: Callable[[str, str], Sequence[str] | None] = lambda namespace, service: None
    #: To where other sites let this one ask for it, ``{node, site, address}``; None: it names none.
    doors: Callable[[str, str], Sequence[Mapping[str, str]] | None] = lambda namespace, service: None
    #: Whether it is another site's altogether: its App is not here.
    remote: Callable[[str, str], bool] = lambda namespace, service: False


def _places(namespace: str, spec: RouteSpec, around: Around, *, closed: bool) -> dict[str, Any]:
    """The places before and after this site, and what of the declared ones is not there.

    ``closed``: requests have credentials, which go to another site by HTTPS only.
    """
    wanted: list[str] = list(spec.fallback)
    if not wanted and spec.to.service:
        own = around.fallback(namespace, spec.to.service)
        wanted = [own] if own != "fail" and not (own == spec.prefer == "cloud") else []
    doors = around.doors(namespace, spec.to.service) if spec.to.service else None
    if doors is not None and "nearest" not in wanted and around.remote(namespace, spec.to.service):
        wanted = ["nearest", *wanted]  # it was let in for nothing else
    then: list[PlaceConfig] = []
    lacking = ""
    for name in wanted:
        if name == "nearest" and doors is not None:
            near = _behind(doors, around.neighbours)
            then += near
            if not near:
                lacking = f"no site lets this one ask for Service/{spec.to.service} (its allowFrom, its status.doors)"
        elif name == "nearest":
            known = [p for p in map(_neighbour, around.neighbours) if p is not None]
            near = [p for p in known if p.endpoint.tls or not closed]
            then += near
            if known and not near:
                lacking = "keys and tokens go to no other site without TLS (steering.scheme of the hub is http)"
            elif not near:
                lacking = "no other site is known that could answer (see Site status.neighbours)"
        elif spec.cloud:
            then.append(_cloud(spec.cloud))
        else:
            lacking = f"Service/{spec.to.service} falls back to the cloud, and this Route does not say where it is"
    first = (_cloud(spec.cloud),) if spec.prefer == "cloud" else ()
    return {"first": first, "then": tuple(then), "lacking": lacking}


def _behind(doors: Sequence[Mapping[str, str]], neighbours: Sequence[Mapping[str, Any]]) -> list[PlaceConfig]:
    """A place for each site that has doors, the nearest first as far as that is known."""
    at: dict[str, list[Endpoint]] = {}
    for door in doors:
        host, _, port = door["address"].rpartition(":")
        if host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536:
            endpoint = Endpoint(host.strip("[]"), int(port), tls=True, node=door["node"] + NODE_DOMAIN)
            at.setdefault(door["site"], []).append(endpoint)
    order = {str(n.get("site")): rank for rank, n in enumerate(neighbours)}
    sites = sorted(at, key=lambda s: (order.get(s, len(order)), s))
    return [PlaceConfig("site", s, at[s][0], more=tuple(at[s][1:])) for s in sites]


def _cloud(url: str) -> PlaceConfig:
    endpoint, host = _upstream(url)
    return PlaceConfig("cloud", url.rstrip("/"), endpoint, host)


def _neighbour(said: Mapping[str, Any]) -> PlaceConfig | None:
    """A place of what the hub says of a neighbour; one that cannot be understood is left out."""
    name = said.get("site")
    try:
        endpoint, _ = _upstream(str(said.get("url", "")))
    except Invalid:
        return None
    endpoint = msgspec.structs.replace(endpoint, ours=True)
    return PlaceConfig("site", name, endpoint) if isinstance(name, str) and name else None


def _upstream(url: str) -> tuple[Endpoint, str]:
    """Where an upstream is, and the Host that it is asked by."""
    scheme, host, port = origin_of(url)
    authority = f"[{host}]" if ":" in host else host
    default = 443 if scheme == "https" else 80
    return Endpoint(host, port, scheme == "https"), authority if port == default else f"{authority}:{port}"


def route_config(
    route: Resource, endpoints: Endpoints, around: Around, auth: AuthConfig | None = None,
    *, values: Values | None = None, folders: object = None,
) -> RouteConfig:  # fmt: skip
    spec: RouteSpec = route.spec
    namespace = route.metadata.namespace
    cache = None
    if spec.cache is not None:
        cache = CacheConfig(
            parse_bytes(spec.cache.object),
            parse_duration(spec.cache.staleIfError),
            parse_duration(spec.cache.staleWhileRevalidate),
            spec.cache.disk,
        )
    return RouteConfig(
        key=f"{namespace}/{route.metadata.name}",
        host=spec.host,
        path=spec.path,
        methods=tuple(spec.methods),
        headers=tuple(sorted((k.lower(), v) for k, v in spec.headers.items())),
        connect=parse_duration(spec.timeouts.connect),
        answer=parse_duration(spec.timeouts.answer),
        idle=parse_duration(spec.timeouts.idle),
        attempts=spec.retries.attempts,
        budget=spec.retries.budget,
        failures=spec.breaker.failures,
        pause=parse_duration(spec.breaker.pause),
        sticky=_sticky(spec),
        body=parse_bytes(spec.limits.body),
        requests=spec.limits.requests,
        cache=cache,
        cors=_cors(spec),
        auth=auth,
        compress=_compress(spec),
        rate=spec.limits.rate.requests / parse_duration(spec.limits.rate.per) if spec.limits.rate else 0.0,
        burst=(spec.limits.rate.burst or spec.limits.rate.requests) if spec.limits.rate else 0,
        guests=_guests(around.guests(namespace, spec.to.service)) if spec.to.service else None,
        **_target(namespace, spec, endpoints, values, folders),
        **_places(namespace, spec, around, closed=spec.auth is not None),
    )


def _guests(nodes: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if nodes is None else tuple(f"dns:{n}{NODE_DOMAIN}" for n in nodes)


def _sticky(spec: RouteSpec) -> tuple[str, str]:
    if spec.sticky is None:
        return "", ""
    return ("cookie", spec.sticky.cookie) if spec.sticky.cookie else (spec.sticky.header.lower(), "")


def _compress(spec: RouteSpec) -> CompressConfig | None:
    compress = spec.compress
    if compress is None:
        return None
    return CompressConfig(parse_bytes(compress.minSize), tuple(sorted(t.lower() for t in compress.types)))


def _cors(spec: RouteSpec) -> CorsConfig | None:
    cors = spec.cors
    if cors is None:
        return None
    return CorsConfig(
        tuple(cors.origins),
        tuple(cors.methods),
        tuple(h.lower() for h in cors.headers),
        tuple(cors.expose),
        cors.credentials,
        int(parse_duration(cors.maxAge)),
    )


def _bytes(name: str, value: Any) -> int:
    try:
        return parse_bytes(value)
    except (ValueError, TypeError) as e:
        raise Invalid(str(e), file="node.json", field=f"$.gateway.cache.{name}", remedy="write e.g. 256Mi") from None


def section(
    node: str, routes: Sequence[Resource], endpoints: Endpoints, settings: Mapping[str, Any], listen: Iterable[Listen],
    functions: Container[str] | None = None, *, auths: Auths | None = None,
    values: Values | None = None, around: Around | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The section of ``plane.json``. ``settings``: ``gateway`` of ``node.json``. ``functions``: those of this node
    (``namespace/name``); None: not known."""
    known = auths.all(routes) if auths is not None else {}
    folders = settings.get("folders")
    made = sorted(
        (
            route_config(r, endpoints, around or Around(), known.get(str(r.key)), values=values, folders=folders)
            for r in routes
        ),
        key=lambda c: c.key,
    )
    if functions is not None:
        made = [
            msgspec.structs.replace(c, missing=True) if c.to == "function" and c.function not in functions else c
            for c in made
        ]
    given = settings.get("cache")
    sizes: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    config = GatewayConfig(
        node=node,
        listen=tuple(listen),
        routes=tuple(made),
        memory=_bytes("memory", sizes.get("memory", settings.get("memory", "32Mi"))),
        disk=_bytes("disk", sizes.get("disk", "256Mi")),
        access_log=settings.get("accessLog", "all"),
        engine=settings.get("engine", "embedded"),
    )
    plain: dict[str, Any] = msgspec.to_builtins(config)
    return plain
