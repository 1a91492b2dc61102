"""The HTTP API of hub and agent: the same shape on both, made from the registry.

``/api/v1/<plural>[/<name>]`` and ``/api/v1/namespaces/<ns>/<plural>[/<name>]``: list with selectors and pages, get,
create, replace, merge patch, delete, watch by server-sent events, status. Every call carries a token (on the agent's
unix socket, which is its owner's, it may lack) and is decided by the caller's rules (``access.py``); every error is a
problem document (RFC 9457). What a write must obey is in ``resources.py``; what is stored, in the store.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json as stdjson
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edgeward.core import clock
from edgeward.core.access import (
    Action,
    access_routes,
    action_of,
    ask_for,
    ask_of,
    check_write,
    closed,
    declare,
    keep_hidden,
    needs,
    opened,
    principal,
    shown,
    sift,
    signed_in,
)
from edgeward.core.audit import Audit
from edgeward.core.audit_routes import audit_routes
from edgeward.core.authz import Ask, Principal, Rule, perhaps
from edgeward.core.chain import Head
from edgeward.core.context import correlation
from edgeward.core.describe import described
from edgeward.core.errors import (
    EdgewardError,
    Forbidden,
    Gone,
    Invalid,
    NotFound,
    Refused,
    TooLarge,
    TooMany,
    TooSlow,
    Unauthorized,
)
from edgeward.core.manifest import MAX_DEPTH, load
from edgeward.core.registry import Kind, kinds
from edgeward.core.resource import CLUSTER, MAX_DOCUMENT, Key, Resource, check_name, decode, merge_patch, parse_revision
from edgeward.core.resources import Resources
from edgeward.core.selectors import parse_fields, parse_labels
from edgeward.core.store import Change, Store
from edgeward.core.streaming import flag, json, number, only
from edgeward.core.throttle import Throttle, source_of

log = logging.getLogger("edgeward.api")

MAX_PAGE = 1000
#: Seconds that a body may take.
BODY_TIME = 60.0
_HEARTBEAT = 15.0
#: Seconds after which a caller whose answer is still streaming is looked at again: tokens end, roles change.
_AGAIN = 1.0

#: (token, client) to who that is; raises ``Unauthorized``.
Auth = Callable[[str | None, Any], Principal]


def actor_of(request: Request) -> dict[str, str]:
    """Who writes and from where, for the audit."""
    client = request.client
    return {"actor": principal(request).name, "source": client.host if client and client.host else "local"}


def _problem(e: EdgewardError, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(e.problem()), e.status, media_type="application/problem+json", headers=headers)


def _failed_inside() -> Response:
    return _problem(EdgewardError("failed inside", remedy=f"the log says why, under request {correlation.get()}"))


class _Ended(Exception):
    """Ends a stream whose caller may no longer see it."""


class Gate:
    """Around every request: correlation id, token, errors as problems, nothing of the inside in an answer."""

    def __init__(self, app: Starlette, auth: Auth, open_paths: frozenset[str], audit: Audit) -> None:
        self.routes = app.routes
        self._app, self._auth, self._open, self._audit = app, auth, open_paths, audit
        # a good token always passes: only bad ones are counted, so nobody can lock another one out
        self._bad = Throttle(burst=20, rate=1.0)
        # a refused caller must not be able to push what others did out of the audit
        self._refused = Throttle(burst=30, rate=1 / 60)
        self._unkept: dict[str, int] = {}

    def _login(self, scope: Scope, headers: dict[bytes, bytes]) -> Callable[[], Principal]:
        """Who calls, as a question that can be asked again. Raises ``Unauthorized``, or ``TooMany`` of such."""
        client = scope.get("client")
        scheme, _, secret = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        token = secret.strip() if scheme.lower() == "bearer" else None

        def who() -> Principal:
            return self._auth(token, client)

        try:
            scope["principal"] = who()
        except Unauthorized:
            wait = self._bad.take(source_of(client[0] if client else ""), clock.monotonic()) if token else 0.0
            if wait:
                raise TooMany(
                    "too many wrong tokens from your address", after=wait, remedy="wait, and use a valid token"
                ) from None
            raise
        return who

    async def _note(self, scope: Scope, e: Forbidden) -> None:
        """A refused call goes into the audit; a storm of them does not flood it."""
        who, m = scope.get("principal"), e.members
        if who is None:
            return
        if self._refused.take(who.name, clock.monotonic()):
            self._unkept[who.name] = self._unkept.get(who.name, 0) + 1
            return
        more = self._unkept.pop(who.name, 0)
        client = scope.get("client")
        key = Key(m.get("kind", ""), m.get("namespace") or CLUSTER, m.get("name", ""))
        source = client[0] if client and client[0] else "local"
        try:
            await self._audit.write(
                m.get("verb", "?"), key, actor=who.name, source=source, request=correlation.get(),
                outcome=f"{e.reason}: {e.message}" + (f" (and {more} refused calls before, not kept)" if more else ""),
            )  # fmt: skip
        except EdgewardError as failed:
            log.warning("a refusal was not audited: %s", failed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if 0 < len(given) <= 64 and given.isprintable() else clock.new_id(12)
        token = correlation.set(request_id)
        started = False
        again: Callable[[], Principal] | None = None
        looked = clock.monotonic()

        async def sending(message: Any) -> None:
            nonlocal started, looked
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("latin-1"))]
            elif again is not None and message.get("more_body") and clock.monotonic() - looked > _AGAIN:
                looked = clock.monotonic()
                try:
                    same = again().rules == scope["principal"].rules
                except EdgewardError:
                    same = False
                if not same:
                    raise _Ended
            await send(message)

        try:
            response: Response | None = None
            try:
                if not self._needs_nobody(scope):
                    again = self._login(scope, headers)
                await self._app(scope, receive, sending)
                if isinstance(refusal := scope.get("refusal"), Forbidden):
                    await self._note(scope, refusal)
            except EdgewardError as e:
                response = refused(e)
            except _Ended:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except (ClientDisconnect, asyncio.CancelledError):
                raise
            except Exception:
                log.exception("request %s %s failed", scope.get("method"), scope.get("path"))
                response = _failed_inside()
            if response is not None and not started:
                await response(scope, receive, sending)
        finally:
            correlation.reset(token)

    def _needs_nobody(self, scope: Scope) -> bool:
        path, client = scope["path"], scope.get("client")
        local = client is None or client[0] in ("127.0.0.1", "::1", "")
        if path == "/metrics" and local:
            scope["principal"] = _SCRAPER
            return True
        return path in self._open


#: What scrapes metrics on the machine itself.
_SCRAPER = Principal("metrics", "local", rules=(Rule(verbs=["metrics"], kinds=["Hub"]),))


def refused(e: EdgewardError) -> Response:
    """The problem document of an error, with the headers that go with it."""
    headers = {}
    if isinstance(e, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(e, TooMany):
        headers["Retry-After"] = str(math.ceil(e.after))
    return _problem(e, headers or None)


async def read_body(request: Request, limit: int = MAX_DOCUMENT) -> bytes:
    """The body, refused as soon as it is known to be too large."""
    remedy = f"at most {limit} bytes"
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise TooLarge(f"the body has {length} bytes", remedy=remedy)
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_TIME):
            async for piece in request.stream():
                data += piece
                if len(data) > limit:
                    raise TooLarge(f"the body has more than {limit} bytes", remedy=remedy)
    except TimeoutError:
        raise TooSlow(f"the body was not there within {BODY_TIME:g} s", remedy="send it again, faster") from None
    return bytes(data)


@dataclass(frozen=True, slots=True)
class _Twice:
    """Stands for an object that has a key twice, until it is known where it is."""

    key: str


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Twice:
    doc: dict[str, Any] = {}
    for key, value in pairs:
        if key in doc:
            return _Twice(key)
        doc[key] = value
    return doc


def parse_body(data: bytes, content_type: str) -> Any:
    if "yaml" in content_type:
        documents = load(data, "body")
        if len(documents) != 1:
            raise Invalid(f"the body has {len(documents)} documents", field="$", remedy="send one")
        doc = documents[0].doc
    else:
        try:
            doc = stdjson.loads(data, object_pairs_hook=_pairs)
        except (ValueError, RecursionError) as e:
            raise Invalid(f"the body is no valid JSON: {e}", field="$", remedy="or send application/yaml") from None
    _check_storable(doc, "$", 0)
    return doc


def _check_storable(value: Any, path: str, depth: int) -> None:
    """Refuses what a parser takes and the store's JSON cannot hold."""
    if depth > MAX_DEPTH:
        raise Invalid(f"is nested deeper than {MAX_DEPTH} levels", field=path[:200], remedy="flatten it")
    if isinstance(value, _Twice):
        raise Invalid("is given twice", field=f"{path}.{value.key}"[:200], remedy="keep one of them")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_storable(key, path, depth + 1)
            _check_storable(inner, f"{path}.{key}", depth + 1)
    elif isinstance(value, list):
        for n, inner in enumerate(value):
            _check_storable(inner, f"{path}[{n}]", depth + 1)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Invalid("holds half a character", field=path, remedy="write surrogates in pairs") from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise Invalid(f"{value} is no number", field=path, remedy="write a finite one")


class Api:
    def __init__(self, resources: Resources, store: Store) -> None:
        self.resources, self.store = resources, store

    # -- addressing --------------------------------------------------------------------------------------------------

    @staticmethod
    def _kind(request: Request) -> Kind:
        plural = request.path_params["plural"]
        kind = kinds.by_plural(plural)
        if kind is None:
            known = ", ".join(k.plural for k in kinds)
            raise NotFound(f"there is no {plural[:60]!r}", remedy=f"known: {known}")
        if "ns" in request.path_params and not kind.namespaced:
            raise NotFound(f"{kind.plural} have no namespace", remedy=f"ask for /api/v1/{kind.plural}")
        return kind

    def _key(self, request: Request) -> Key:
        kind = self._kind(request)
        namespace = request.path_params.get("ns", "default" if kind.namespaced else CLUSTER)
        return Key(
            kind.name,
            check_name(namespace, "namespace") if namespace != CLUSTER else CLUSTER,
            check_name(request.path_params["name"], "name", kind.name),
        )

    @staticmethod
    def _expect(request: Request) -> int | None:
        match = request.headers.get("if-match", "").strip()
        if not match or match == "*":
            return None
        revision = parse_revision(match.removeprefix("W/").strip('"'))
        if revision is None:
            raise Invalid(f"{match[:40]!r} is no revision", field="If-Match", remedy="send the ETag you read")
        return revision

    async def _document(self, request: Request, key: Key | None = None) -> Resource:
        kind = self._kind(request)
        content_type = request.headers.get("content-type", "application/json")
        doc = parse_body(await read_body(request), content_type)
        namespace = request.path_params.get("ns", "default")
        if isinstance(doc, dict):
            keep_hidden(doc, self.store.find(key) if key is not None else None)
        resource = decode(doc, namespace=namespace)
        if resource.kind != kind.name:
            raise Invalid(f"the path says {kind.name}, the document {resource.kind}", field="$.kind")
        if "ns" in request.path_params and resource.metadata.namespace != namespace:
            raise Invalid(
                f"the path says {namespace!r}, the document {resource.metadata.namespace!r}",
                resource=str(resource.key),
                field="$.metadata.namespace",
            )
        if key is not None and resource.key != key:
            raise Invalid(
                f"the path says {key.name!r}, the document {resource.metadata.name!r}", field="$.metadata.name"
            )
        self._own_status(resource, self.store.find(resource.key))
        return resource

    @staticmethod
    def _own_status(resource: Resource, old: Resource | None) -> None:
        """A status that comes back as it was read is fine; a made-up one would be a lie."""
        if resource.status and old is None:
            raise Invalid(
                "is written by the system", resource=str(resource.key), field="$.status", remedy="leave it out"
            )
        resource.status = {}

    @staticmethod
    def _one(request: Request, resource: Resource, status: int = 200) -> Response:
        response = json(shown(request, resource), status)
        response.headers["etag"] = f'"{resource.metadata.resourceVersion}"'
        return response

    # -- reads -----------------------------------------------------------------------------------------------------

    async def collection(self, request: Request) -> Response:
        kind = self._kind(request)
        namespace = request.path_params.get("ns")
        if request.method == "POST":
            only(request, "dryRun")
            self._perhaps(request, "create", kind, namespace or ("default" if kind.namespaced else CLUSTER))
            resource = await self._document(request)
            check_write(request, "create", resource, None)
            dry = flag(request, "dryRun", "all")
            return self._one(request, await self.resources.create(resource, dry_run=dry, **actor_of(request)), 201)
        only(request, "labelSelector", "fieldSelector", "limit", "continue", "watch", "resourceVersion")
        watching = flag(request, "watch")
        asked = namespace if kind.namespaced else CLUSTER
        allowed = sift(request, "watch" if watching else "list", kind.name, asked)
        wanted = parse_labels(request.query_params.get("labelSelector", ""))
        fields = parse_fields(request.query_params.get("fieldSelector", ""))

        def chosen(r: Resource) -> bool:
            # fields of what is shown: else a selector could feel for a hidden value
            return allowed(r) and wanted(r.metadata.labels) and fields(shown(request, r))

        if watching:
            return self._watch(request, kind, namespace, chosen, allowed)
        limit = number(request, "limit", MAX_PAGE, low=1, high=MAX_PAGE)
        after = self._continued(request.query_params.get("continue", ""))
        items: list[dict[str, Any]] = []
        more = ""
        # pages go by name, so writes between two pages neither repeat nor skip what stayed
        for r in self.store.items(kind.name, namespace):
            position = [r.metadata.namespace, r.metadata.name]
            if after and position <= after:
                continue
            if not chosen(r):
                continue
            if len(items) == limit:
                last = items[-1]["metadata"]
                token = msgspec.json.encode([last["namespace"] if kind.namespaced else "", last["name"]])
                more = base64.urlsafe_b64encode(token).decode()
                break
            items.append(shown(request, r))
        metadata = {"resourceVersion": str(self.store.revision)}
        if more:
            metadata["continue"] = more
        return json({"apiVersion": "edgeward/v1", "kind": f"{kind.name}List", "metadata": metadata, "items": items})

    @staticmethod
    def _continued(token: str) -> list[str]:
        if not token:
            return []
        try:
            found = msgspec.json.decode(base64.urlsafe_b64decode(token), type=list[str])
        except (msgspec.DecodeError, binascii.Error, ValueError):
            raise Invalid("is not one of ours", field="?continue", remedy="list again from the start") from None
        return found

    def _watch(
        self,
        request: Request,
        kind: Kind,
        namespace: str | None,
        chosen: Callable[[Resource], bool],
        allowed: Callable[[Resource], bool],
    ) -> Response:
        since_text = request.headers.get("last-event-id") or request.query_params.get("resourceVersion")
        since = parse_revision(since_text) if since_text else None
        if since_text and since is None:
            raise Invalid(f"{since_text[:40]!r} is no revision", field="?resourceVersion", remedy="list first")
        if since and since > self.store.revision:
            # of a store that was since restored, or of another system: what comes below it would never be told
            raise Gone(
                f"revision {since} is not reached yet (the newest is {self.store.revision})",
                remedy="list again and watch from the list's revision",
            )
        shown_keys = {r.key for r in self.store.items(kind.name, namespace) if chosen(r)} if since else set()
        changes = self.store.watch(since)
        if since is None:
            changes.close()
            changes = self.store.watch(0)
        who = principal(request)

        def known(key: Key) -> bool:
            """Whether the caller may hear of an object that is gone: its labels are gone with it."""
            return who.may(Ask("watch", key.kind, key.namespace, key.name))

        def untold(c: Change) -> bool:
            """A deletion that the caller may have to hear of, and cannot be told."""
            if c.resource is not None or not self._in(c.key, kind, namespace) or known(c.key):
                return False
            return perhaps(who.rules, "watch", kind.name, c.key.namespace)

        if since and any(untold(c) for c in changes.backlog()):
            changes.close()
            raise Gone("what was deleted since then cannot be told by its labels", remedy="list again and watch on")

        async def events() -> AsyncIterator[bytes]:
            with changes:
                iterator = aiter(changes)
                following = asyncio.ensure_future(anext(iterator))
                try:
                    yield b": watching\n\n"
                    while True:
                        done, _ = await asyncio.wait({following}, timeout=_HEARTBEAT)
                        if not done:
                            yield b": still here\n\n"
                            continue
                        try:
                            change = following.result()
                        except StopAsyncIteration:
                            return
                        except EdgewardError as e:
                            yield b"event: ERROR\ndata: %b\n\n" % msgspec.json.encode(e.problem())
                            return
                        event = self._event(request, change, kind, namespace, chosen, allowed, known, shown_keys)
                        if event is not None:
                            yield event
                        following = asyncio.ensure_future(anext(iterator))
                finally:
                    following.cancel()

        return StreamingResponse(
            events(), media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )

    @staticmethod
    def _in(key: Key, kind: Kind, namespace: str | None) -> bool:
        return key.kind == kind.name and (namespace is None or key.namespace == namespace)

    def _event(
        self,
        request: Request,
        change: Change,
        kind: Kind,
        namespace: str | None,
        chosen: Callable[[Resource], bool],
        allowed: Callable[[Resource], bool],
        known: Callable[[Key], bool],
        shown_keys: set[Key],
    ) -> bytes | None:
        key = change.key
        if not self._in(key, kind, namespace):
            return None
        was = key in shown_keys
        if change.resource is not None and chosen(change.resource):
            name, doc = ("MODIFIED" if was else "ADDED"), shown(request, change.resource)
            shown_keys.add(key)
        elif was or (change.resource is None and known(key)):
            meta = {"name": key.name, "namespace": "" if key.namespace == CLUSTER else key.namespace}
            name = "DELETED"
            doc = {"kind": key.kind, "metadata": meta}
            if change.resource is not None and allowed(change.resource):
                doc = shown(request, change.resource)
            shown_keys.discard(key)
        else:
            return None
        return b"event: %b\nid: %d\ndata: %b\n\n" % (name.encode(), change.revision, msgspec.json.encode(doc))

    def _perhaps(self, request: Request, verb: str, kind: Kind, namespace: str) -> None:
        """Refuses before the body is read what no body could make allowed."""
        who = principal(request)
        if not perhaps(who.rules, verb, kind.name, namespace):
            raise who.refusal(Ask(verb, kind.name, namespace, request.path_params.get("name", "")))

    async def one(self, request: Request) -> Response:
        key = self._key(request)
        verb = _VERB[request.method]
        who = principal(request)
        if verb in ("get", "delete"):
            who.require(ask_for(self.store, verb, key))
        else:
            self._perhaps(request, verb, self._kind(request), key.namespace)
            if self.store.find(key) is None:
                who.require(Ask(verb, key.kind, key.namespace, key.name))  # there or not: the same refusal
        if verb == "get":
            only(request)
            return self._one(request, self.store.get(key))
        only(request, "dryRun")
        by, dry = actor_of(request), flag(request, "dryRun", "all")
        expect = self._expect(request)
        if verb == "patch":
            return self._one(request, await self._patch(request, key, expect, dry, by))
        resource = await self._document(request, key) if verb == "update" else None
        for _ in range(8):
            old = self.store.find(key)
            check_write(request, verb, resource, old)
            # what was decided by its labels must be what is written over
            base = expect if expect is not None or who.may(Ask(verb, key.kind, key.namespace)) else _revision(old)
            own = expect is not None or base is None or (resource is not None and resource.metadata.resourceVersion)
            try:
                if resource is None:
                    return self._one(request, await self.resources.delete(key, expect=base, dry_run=dry, **by))
                return self._one(request, await self.resources.replace(resource, expect=base, dry_run=dry, **by))
            except EdgewardError as e:
                if e.status != 409 or own:
                    raise
        raise Refused("changes too fast to be written", resource=str(key), remedy="try again")

    async def _patch(self, request: Request, key: Key, expect: int | None, dry: bool, who: dict[str, str]) -> Resource:
        content_type = request.headers.get("content-type", "")
        if "json" not in content_type and "yaml" not in content_type:
            raise Invalid(
                f"a patch of type {content_type[:60]!r} is not taken",
                field="Content-Type",
                remedy="send application/merge-patch+json",
            )
        patch = parse_body(await read_body(request), content_type)
        if not isinstance(patch, dict):
            raise Invalid("a merge patch is an object", field="$", remedy="see RFC 7396")
        for _ in range(8):
            old = self.store.get(key)
            principal(request).require(ask_of("patch", old))
            doc = old.document()
            doc.pop("status", None)
            asked = (
                patch.get("metadata", {}).get("resourceVersion") if isinstance(patch.get("metadata"), dict) else None
            )
            doc["metadata"]["resourceVersion"] = ""
            merged = merge_patch(doc, {k: v for k, v in patch.items() if k != "status"})
            keep_hidden(merged, old)
            resource = decode(merged, namespace=key.namespace)
            if resource.key != key:
                raise Invalid("a patch cannot rename", resource=str(key), field="$.metadata.name", remedy="remove it")
            check_write(request, "patch", resource, old)
            base = expect if expect is not None else None if asked else old.revision
            try:
                return await self.resources.replace(resource, expect=base, dry_run=dry, **who)
            except EdgewardError as e:
                # without a revision of the caller's own, the patch is made anew on what is there now
                if e.status != 409 or expect is not None or asked:
                    raise
        raise Refused("changes too fast to be patched", resource=str(key), remedy="try again")

    async def status(self, request: Request) -> Response:
        key = self._key(request)
        reading = request.method in ("GET", "HEAD")
        principal(request).require(ask_for(self.store, "get" if reading else "status", key))
        if reading:
            only(request)
            return self._one(request, self.store.get(key))
        only(request, "dryRun")
        dry = flag(request, "dryRun", "all")
        doc = parse_body(await read_body(request), request.headers.get("content-type", "application/json"))
        status = doc.get("status", doc) if isinstance(doc, dict) else None
        if not isinstance(status, dict):
            raise Invalid("expected an object", resource=str(key), field="$.status")
        if request.method == "PATCH":
            status = merge_patch(self.store.get(key).status, status)
        return self._one(request, await self.resources.status(key, status, dry_run=dry, **actor_of(request)))


_VERB = {"GET": "get", "HEAD": "get", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


def _revision(resource: Resource | None) -> int | None:
    return resource.revision if resource is not None else None


def build_app(
    resources: Resources,
    store: Store,
    *,
    auth: Auth,
    extra_routes: Sequence[Route] = (),
    health: Callable[[], tuple[bool, dict[str, Any]]],
    metrics: Callable[[], str | Awaitable[str]],
    info: dict[str, Any],
    audit_head: Callable[[], Head | None] | None = None,
) -> Gate:
    """The whole API as an ASGI app. ``audit_head``: the audit's head as it is kept elsewhere."""
    api = Api(resources, store)

    @described("Whether the process lives")
    async def healthz(_: Request) -> Response:
        return json({"state": "alive"})

    @described("Whether it does its work", more={"503": "Not ready"})
    async def readyz(_: Request) -> Response:
        ok, doc = health()
        return json(doc, 200 if ok else 503)

    @described("Prometheus metrics; open on loopback", media="text/plain")
    async def metric(_: Request) -> Response:
        text = metrics()
        if not isinstance(text, str):
            text = await text
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @described("Role and version")
    async def version(_: Request) -> Response:
        return json(info)

    @described("This document")
    async def openapi(_: Request) -> Response:
        from edgeward.core.openapi import document

        return json(document(str(info.get("version", "")), routes))

    async def namespace_status(request: Request) -> Response:
        """Else ``namespaces/x/status`` would be the list of a kind called status."""
        request.scope["path_params"] = {**request.path_params, "plural": "namespaces"}
        return await api.status(request)

    base = "/api/v1"
    reading = ["GET", "HEAD"]
    routes = [
        Route("/healthz", opened(healthz)),
        Route("/readyz", opened(readyz)),
        Route("/metrics", needs("metrics", "Hub")(metric)),
        Route("/openapi.json", signed_in(openapi)),
        Route(f"{base}/version", signed_in(version)),
        *audit_routes(resources.audit, audit_head or (lambda: None)),
        Route(
            f"{base}/namespaces/{{name}}/status",
            declare(namespace_status, Action("own", ("get", "status"))),
            methods=[*reading, "PUT", "PATCH"],
        ),
        *access_routes(resources, issue=info.get("role") != "agent"),
        *(closed(route) for route in extra_routes),
    ]
    for prefix in (f"{base}/namespaces/{{ns}}/{{plural}}", f"{base}/{{plural}}"):
        routes += [
            Route(
                f"{prefix}/{{name}}/status",
                declare(api.status, Action("own", ("get", "status"))),
                methods=[*reading, "PUT", "PATCH"],
            ),
            Route(
                f"{prefix}/{{name}}",
                declare(api.one, Action("own", ("get", "update", "patch", "delete"))),
                methods=[*reading, "PUT", "PATCH", "DELETE"],
            ),
            Route(
                prefix, declare(api.collection, Action("own", ("list", "watch", "create"))), methods=[*reading, "POST"]
            ),
        ]
    # /api/v1/namespaces/default is the kind Namespace, not a list of kinds in it: two parts behind namespaces decide
    app = Starlette(
        routes=_ordered(routes),
        exception_handlers={EdgewardError: _refused, 404: _not_found, 405: _not_allowed, Exception: _failed},
    )
    app.state.store = store
    return Gate(app, auth, _open_paths(routes), resources.audit)


def _open_paths(routes: Sequence[Route]) -> frozenset[str]:
    """Paths that need no token. Only whole ones: a pattern would be matched by other eyes than the router's."""
    found = [r.path for r in routes if (action := action_of(r)) is not None and action.how == "open"]
    for path in found:
        if "{" in path:
            raise ValueError(f"an open route has no parameters in its path: {path}")
    return frozenset(found)


def _ordered(routes: list[Route]) -> list[Route]:
    """Fixed paths before those with parameters, so that ``nodes/x/enrol`` is no sub-resource lookup."""
    return sorted(routes, key=lambda r: r.path.count("{"))


async def _refused(request: Request, exc: Exception) -> Response:
    request.scope["refusal"] = exc  # the gate keeps it in the audit
    return refused(exc if isinstance(exc, EdgewardError) else EdgewardError("failed inside"))


async def _failed(request: Request, exc: Exception) -> Response:
    """Else Starlette answers in plain text; the exception still reaches the gate, which logs it."""
    return _failed_inside()


async def _not_found(request: Request, exc: Exception) -> Response:
    return _problem(NotFound(f"there is no {request.url.path[:200]}", remedy="see /openapi.json"))


async def _not_allowed(request: Request, exc: Exception) -> Response:
    allow = (getattr(exc, "headers", None) or {}).get("Allow", "")
    e = Refused(f"{request.method} is not taken at {request.url.path[:200]}", remedy=f"it takes: {allow}")
    doc = {**e.problem(), "status": 405}
    return Response(
        msgspec.json.encode(doc),
        405,
        media_type="application/problem+json",
        headers={"Allow": allow} if allow else None,
    )


Handler = Callable[[Request], Awaitable[Response]]

__all__ = ["Auth", "Gate", "Handler", "Principal", "actor_of", "build_app", "parse_body", "read_body", "refused"]
