"""Every call is decided: the declared action of each route, and what the handlers of the API ask.

A route's handler is wrapped by :func:`needs`, :func:`signed_in` or :func:`opened`; the wrapper carries the
:class:`Action`, so that a test can walk the routes, and a route that declares nothing is for administrators only. The
decision itself is in ``authz.py`` and pure; who calls is put into the request by ``gate.py``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.core import clock
from edgeward.core.authz import ANY, HUB, VERBS, Ask, Principal, Rule, beyond, perhaps
from edgeward.core.body import parse_body
from edgeward.core.describe import FOLLOW, RECORDS, about_of, described
from edgeward.core.errors import Invalid, Unauthorized
from edgeward.core.records import KEEP, Records
from edgeward.core.registry import HIDDEN, Kind, kinds
from edgeward.core.resource import CLUSTER, Key, Metadata, Resource, check_name
from edgeward.core.resources import Resources
from edgeward.core.roles import AccessTokenSpec
from edgeward.core.store import Store
from edgeward.core.streaming import flag, follow, json, number, read_body, sifted
from edgeward.core.tokens import DEFAULT_TTL, expiry, make_token, rules_of

Handler = Callable[[Request], Awaitable[Response]]
#: open: nobody need say who they are. signed: anybody who is known. whole: the verb on the kind without bounds.
#: object: the verb on the object that the path names. each: the handler leaves out what may not be seen.
#: own: the handler asks for itself.
How = Literal["open", "signed", "whole", "object", "each", "own"]


@dataclass(frozen=True, slots=True)
class Action:
    """What a route needs."""

    how: How
    verbs: tuple[str, ...] = ()
    kind: str = ""


def declare(handler: Handler, action: Action) -> Handler:
    """The handler behind its check; what it declares is found again by :func:`action_of`."""
    for verb in action.verbs:
        if verb not in VERBS and verb != ANY:
            raise ValueError(f"unknown verb {verb!r}: add it to authz.VERBS")

    async def guarded(request: Request) -> Response:
        _check(request, action)
        return await handler(request)

    guarded.action = action  # type: ignore[attr-defined]
    guarded.about = about_of(handler)  # type: ignore[attr-defined]
    return guarded


def needs(verb: str, kind: str, how: How = "whole") -> Callable[[Handler], Handler]:
    """``Route(path, needs("top", "Node")(handler))``"""
    return lambda handler: declare(handler, Action(how, (verb,), kind))


def object_route(kind: str, what: str, verb: str, handler: Handler, method: str = "GET") -> Route:
    """``WHAT`` below the path of an object, for who may do ``verb`` with it; the hub's and a node's are one."""
    path = f"/api/v1/namespaces/{{ns}}/{kinds.get(kind).plural}/{{name}}/{what}"
    return Route(path, needs(verb, kind, "object")(handler), methods=[method])


def signed_in(handler: Handler) -> Handler:
    """For everybody who is known: it tells nothing that a role could keep from them."""
    return declare(handler, Action("signed"))


def opened(handler: Handler) -> Handler:
    """For everybody, without a token: the handler must prove the caller by other means, or tell nothing."""
    return declare(handler, Action("open"))


def action_of(route: Route) -> Action | None:
    found = getattr(route.endpoint, "action", None)
    return found if isinstance(found, Action) else None


def closed(route: Route) -> Route:
    """The route itself, or when it declares nothing, one that only an administrator may use."""
    if action_of(route) is not None:
        return route
    handler = declare(route.endpoint, Action("whole", (ANY,), ANY))
    del handler.action  # type: ignore[attr-defined]  # the test that walks the routes must still find it undeclared
    return Route(route.path, handler, methods=sorted(route.methods or ()), name=route.name)


def principal(request: Request) -> Principal:
    found = request.scope.get("principal")
    if not isinstance(found, Principal):
        raise Unauthorized("nobody was found to be asking", remedy="the API's gate must stand before every route")
    return found


def actor_of(request: Request) -> dict[str, str]:
    """Who writes and from where, for the audit."""
    client = request.client
    return {"actor": principal(request).name, "source": client.host if client and client.host else "local"}


def _check(request: Request, action: Action) -> None:
    if action.how in ("open", "own"):
        return
    who = principal(request)
    if action.how == "signed":
        return
    verb, kind = action.verbs[0], action.kind
    if action.how == "whole":
        who.require(Ask(verb, kind))
    elif action.how == "each":
        sift(request, verb, kind)
    else:
        known = kinds.get(kind)
        namespace = request.path_params.get("ns", "default") if known.namespaced else CLUSTER
        who.require(ask_for(request.app.state.store, verb, Key(kind, namespace, request.path_params["name"])))


def ask_for(store: Store, verb: str, key: Key) -> Ask:
    """The question about an object that may be there or not."""
    found = store.find(key)
    return Ask(verb, key.kind, key.namespace, key.name, found.metadata.labels if found else None)


def ask_of(verb: str, r: Resource) -> Ask:
    return Ask(verb, r.kind, r.key.namespace, r.metadata.name, r.metadata.labels)


def sift(request: Request, verb: str, kind: str, namespace: str | None = None) -> Callable[[Resource], bool]:
    """Which objects the caller may see so. Raises ``Forbidden`` when none at all."""
    who = principal(request)
    if not perhaps(who.rules, verb, kind, namespace):
        raise who.refusal(Ask(verb, kind, namespace))
    if who.may(Ask(verb, kind)):
        return lambda _: True
    return lambda r: who.may(ask_of(verb, r))


def sift_records(request: Request, verb: str) -> Callable[[Mapping[str, Any]], bool] | None:
    """Which records (events, journal, audit) the caller may see: those about objects that they may see so.

    None: all of them.
    """
    who, store = principal(request), request.app.state.store
    if who.may(Ask(verb, ANY)):
        return None
    if not any(perhaps(who.rules, verb, k) for k in (*kinds.names(), HUB)):
        raise who.refusal(Ask(verb, HUB))

    def seen(record: Mapping[str, Any]) -> bool:
        key = record_key(record)
        return who.may(ask_for(store, verb, key) if key else Ask(verb, HUB))

    return seen


def top_sift(request: Request) -> tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any]], bool]]:
    """Which nodes and which apps of a `top` answer the caller may see. Raises ``Forbidden`` when none at all."""
    who, store = principal(request), request.app.state.store
    if not (perhaps(who.rules, "top", "Node") or perhaps(who.rules, "top", "App")):
        raise who.refusal(Ask("top", "Node"))

    def node(item: Mapping[str, Any]) -> bool:
        return who.may(ask_for(store, "top", Key("Node", CLUSTER, str(item.get("name", "")))))

    def app(item: Mapping[str, Any]) -> bool:
        namespace = str(item.get("namespace") or "default")
        return who.may(ask_for(store, "top", Key("App", namespace, str(item.get("name", "")))))

    return node, app


def record_key(record: Mapping[str, Any]) -> Key | None:
    """The object that a record is about: its own fields, or ``resource`` as ``Kind/name`` or ``Kind/ns/name``."""
    if isinstance(record.get("kind"), str) and isinstance(record.get("name"), str):
        return Key(record["kind"], str(record.get("namespace") or CLUSTER), record["name"])
    parts = str(record.get("resource", "")).split("/")
    if len(parts) == 3:
        return Key(parts[0], parts[1], parts[2])
    kind = kinds.named(parts[0])
    if len(parts) == 2 and kind is not None:
        return Key(kind.name, "default" if kind.namespaced else CLUSTER, parts[1])
    return None


def record_routes(records: Records) -> list[Route]:
    """``/api/v1/events`` and ``/api/v1/journal``: lists, or followed with ``?follow=true``."""

    def route(name: str, summary: str) -> Route:
        @described(summary, query={**RECORDS, **FOLLOW})
        async def get(request: Request) -> Response:
            seen = sift_records(request, name)
            since = number(request, "since", 0)
            limit = number(request, "limit", 500, low=1, high=KEEP)
            if flag(request, "follow"):
                new = records.follow(name, since=since, limit=limit)
                return follow(new if seen is None else sifted(new, seen))
            if seen is None:
                return json({"items": records.items(name, since=since, limit=limit)})
            found = [r for r in records.items(name, since=since, limit=KEEP) if seen(r)]
            return json({"items": found[-limit:]})

        return Route(f"/api/v1/{name}", declare(get, Action("own", (name,))), methods=["GET"])

    return [route("events", "What happened"), route("journal", "How changes of both sides were decided")]


# -- what is written ------------------------------------------------------------------------------------------------


def check_write(request: Request, verb: str, new: Resource | None, old: Resource | None) -> None:
    """Whether the caller may make ``new`` out of ``old``: by both their labels, and giving nobody more than they have.

    Raises ``Forbidden``.
    """
    who, store = principal(request), request.app.state.store
    for r in (old, new):
        if r is None:
            continue
        who.require(ask_of(verb, r))
        if r.kind == "Override":
            # it changes another object at a site: as good as a change of that one
            target = Key(r.spec.target.kind, r.spec.target.namespace or CLUSTER, r.spec.target.name)
            who.require(ask_for(store, "update", target))
    if new is None:
        return
    if new.kind == "Role":
        _within_own(who, Ask(verb, new.kind, CLUSTER, new.metadata.name), tuple(new.spec.rules))
    elif new.kind == "AccessToken":
        ask = Ask(verb, new.kind, CLUSTER, new.metadata.name)
        if old is None:
            raise who.refusal(ask, "tokens are made by the hub", "use: edgeward token create --role ROLE")
        if old.spec.hash != new.spec.hash:
            raise who.refusal(ask, "a token's hash cannot be changed", "make a new token")
        _within_own(who, ask, rules_of(store, new.spec.role) or ())


def _within_own(who: Principal, ask: Ask, rules: tuple[Rule, ...]) -> None:
    more = beyond(who.rules, rules)
    if more is not None:
        where = "all namespaces" if more.namespace == ANY else f"namespace {more.namespace}"
        raise who.refusal(
            ask,
            f"it would allow {more.verb} on {more.kind} in {where}, which goes beyond your own rules",
            "nobody can give away more than they have",
        )


# -- what is shown --------------------------------------------------------------------------------------------------


def shown(request: Request, r: Resource) -> dict[str, Any]:
    """The object's document for the caller: secret values only with the verb ``reveal``."""
    return r.document(show_secrets=may_reveal(principal(request), r))


def may_reveal(who: Principal, r: Resource) -> bool:
    if r.kind == "Override":
        t = r.spec.target
        if not _secret_fields(t.kind):
            return True
        return who.may(ask_of("reveal", r)) and who.may(Ask("reveal", t.kind, t.namespace or CLUSTER, t.name))
    return not _secret_fields(r.kind) or who.may(ask_of("reveal", r))


def _secret_fields(kind: str) -> tuple[str, ...]:
    known = kinds.named(kind)
    return known.secret_fields if known is not None else ()


def keep_hidden(doc: dict[str, Any], old: Resource | None) -> None:
    """Puts stored secret values where a document gives :data:`HIDDEN` back, as someone does who was not shown them.

    Raises ``Invalid`` where there is nothing to put.
    """
    spec = doc.get("spec")
    if not isinstance(spec, dict):
        return
    fields, was = _secret_fields(str(doc.get("kind"))), msgspec.to_builtins(old.spec) if old else {}
    where = "$.spec"
    if doc.get("kind") == "Override" and isinstance(spec.get("patch"), dict) and isinstance(spec.get("target"), dict):
        fields, spec, was = _secret_fields(str(spec["target"].get("kind"))), spec["patch"], was.get("patch") or {}
        where = "$.spec.patch"
    for name in fields:
        value, before = spec.get(name), was.get(name)
        if isinstance(value, dict):
            inner: Mapping[str, Any] = before if isinstance(before, Mapping) else {}
            for k in [k for k, v in value.items() if v == HIDDEN]:
                value[k] = _kept(inner.get(k), f"{where}.{name}.{k}")
        elif value == HIDDEN:
            spec[name] = _kept(before, f"{where}.{name}")


def _kept(value: Any, where: str) -> Any:
    if value is None:
        raise Invalid(f"{HIDDEN!r} stands for a hidden value, and there is none", field=where, remedy="give the value")
    return value


# -- routes of its own ----------------------------------------------------------------------------------------------


def access_routes(resources: Resources, *, issue: bool) -> list[Route]:
    """``whoami``, ``can``; at the hub ``issue/accesstoken``."""
    base = "/api/v1"
    routes = [
        Route(f"{base}/whoami", signed_in(_whoami), methods=["GET"]),
        Route(f"{base}/can", signed_in(_can), methods=["GET"]),
    ]
    if issue:
        routes.append(
            Route(
                f"{base}/issue/accesstoken",
                declare(_Issue(resources).token, Action("own", ("issue",), "AccessToken")),
                methods=["POST"],
            )
        )
    return routes


@described("Who the caller is, and what their rules allow")
async def _whoami(request: Request) -> Response:
    who = principal(request)
    return json(
        {
            "name": who.name,
            "kind": who.kind,
            "role": who.role,
            "rules": msgspec.to_builtins(who.rules),
            "expires": who.expires,
        }
    )


@described(
    "Whether the caller may do something",
    query={
        "verb": ("string", "A verb, e.g. delete"),
        "kind": ("string", "A kind, e.g. App; or Hub"),
        "namespace": ("string", "In this namespace; everywhere if left out"),
        "name": ("string", "With this very object"),
    },
)
async def _can(request: Request) -> Response:
    """``?verb=&kind=&namespace=&name=`` -> ``{allowed, some}``; ``some``: not all of that kind, but perhaps some."""
    q, who = request.query_params, principal(request)
    verb, kind = q.get("verb", ""), q.get("kind", "")
    if verb not in VERBS and verb != ANY:
        raise Invalid(f"there is no verb {verb[:40]!r}", field="?verb", remedy=", ".join(VERBS))
    if kind not in (HUB, ANY):
        kinds.get(kind)
    namespace, name = q.get("namespace") or None, q.get("name", "")
    known: Kind | None = kinds.get(kind) if kind not in (HUB, ANY) else None
    if known is not None and not known.namespaced:
        namespace = CLUSTER
    ask = Ask(verb, kind, namespace, name)
    if name and known is not None:
        ask = ask_for(request.app.state.store, verb, Key(kind, namespace or "default", name))
    allowed = who.may(ask)
    some = allowed or (not name and perhaps(who.rules, verb, kind, namespace))
    return json({"allowed": allowed, "some": some, "who": who.name, "role": who.role})


class AccessTokenAsk(msgspec.Struct):
    """What an access token is asked for with."""

    role: str
    ttl: str = DEFAULT_TTL
    name: str = ""
    sites: list[str] = []
    description: str = ""


class _Issue:
    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    @described("Make an access token; its text is shown here only", body=AccessTokenAsk, code=201)
    async def token(self, request: Request) -> Response:
        """``{role, ttl, name, sites, description}`` -> ``{token, name, expires}``; the token is shown here only."""
        who = principal(request)
        ask = Ask("issue", "AccessToken", CLUSTER)
        if not perhaps(who.rules, ask.verb, ask.kind, ask.namespace):
            raise who.refusal(ask)
        doc = parse_body(await read_body(request, 64 * 1024), request.headers.get("content-type", "application/json"))
        if not isinstance(doc, dict):
            raise Invalid("expected an object", field="$", remedy='send {"role": "viewer", "ttl": "24h"}')
        known = AccessTokenAsk.__struct_fields__
        unknown = sorted(set(doc) - set(known))
        if unknown:
            raise Invalid("unknown field", field=f"$.{unknown[0]}", remedy=", ".join(known))
        role = _text(doc, "role")
        name = check_name(_text(doc, "name", f"{role[:40]}-{clock.new_id(6)}"), "$.name", "AccessToken")
        who.require(Ask("issue", "AccessToken", CLUSTER, name, {}))
        rules = rules_of(self._resources.store, role)
        if rules is None:
            raise Invalid(f"there is no Role {role[:63]!r}", field="$.role", remedy="see: edgeward get roles")
        sites = doc.get("sites") or []
        if not isinstance(sites, list) or not all(isinstance(s, str) for s in sites):
            raise Invalid("expected a list of sites", field="$.sites")
        _within_own(who, Ask("issue", "AccessToken", CLUSTER, name), rules)
        token, digest = make_token(name)
        spec = AccessTokenSpec(
            role, digest, expiry(doc.get("ttl") or DEFAULT_TTL), sites, _text(doc, "description", "")
        )
        made = Resource(kind="AccessToken", metadata=Metadata(name=name), spec=spec)
        kinds.get("AccessToken").check(made)
        by = actor_of(request)
        await self._resources.create(made, actor=by["actor"], source=by["source"])
        return json({"token": token, "name": name, "role": role, "expires": spec.expires}, 201)


def _text(doc: dict[str, Any], name: str, default: str | None = None) -> str:
    value = doc.get(name) or default
    if not isinstance(value, str) or len(value) > 1024:
        raise Invalid("expected a text" if value is not None else "is required", field=f"$.{name}", remedy="add it")
    return value
