"""The HTTP API of hub and agent: the same shape on both, made from the registry.

``/api/v1/<plural>[/<name>]`` and ``/api/v1/namespaces/<ns>/<plural>[/<name>]``: list with selectors and pages, get,
create, replace, merge patch, delete, watch by server-sent events, status. Every call carries a token (the agent's unix
socket is guarded by its file mode instead); every error is a problem document (RFC 9457). What a write must obey is in
``resources.py``; what is stored, in the store.
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
from starlette.types import ASGIApp, Receive, Scope, Send

from edgeward.core import clock
from edgeward.core.context import correlation
from edgeward.core.errors import EdgewardError, Invalid, NotFound, Refused, TooLarge, Unauthorized
from edgeward.core.manifest import MAX_DEPTH, load
from edgeward.core.registry import Kind, kinds
from edgeward.core.resource import CLUSTER, MAX_DOCUMENT, Key, Resource, check_name, decode, merge_patch, parse_revision
from edgeward.core.resources import Resources
from edgeward.core.selectors import parse_fields, parse_labels
from edgeward.core.store import Change, Store
from edgeward.core.streaming import flag, json, number

log = logging.getLogger("edgeward.api")

MAX_PAGE = 1000
_HEARTBEAT = 15.0
_OPEN = ("/healthz", "/readyz")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. Roles come with the identity room; every principal of today is an administrator."""

    name: str


Auth = Callable[[str | None, Any], Principal]


def _problem(e: EdgewardError, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(e.problem()), e.status, media_type="application/problem+json", headers=headers)


def _failed_inside() -> Response:
    return _problem(EdgewardError("failed inside", remedy=f"the log says why, under request {correlation.get()}"))


class _Gate:
    """Around every request: correlation id, token, errors as problems, nothing of the inside in an answer."""

    def __init__(self, app: ASGIApp, auth: Auth, open_metrics: bool) -> None:
        self._app, self._auth, self._open_metrics = app, auth, open_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if 0 < len(given) <= 64 and given.isprintable() else clock.new_id(12)
        token = correlation.set(request_id)
        started = False

        async def sending(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        try:
            response: Response | None = None
            try:
                path = scope["path"]
                client = scope.get("client")
                local = client is None or client[0] in ("127.0.0.1", "::1", "")
                if path not in _OPEN and not (path == "/metrics" and self._open_metrics and local):
                    scheme, _, secret = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
                    scope["principal"] = self._auth(secret.strip() if scheme.lower() == "bearer" else None, client)
                await self._app(scope, receive, sending)
            except EdgewardError as e:
                extra = {"WWW-Authenticate": "Bearer"} if isinstance(e, Unauthorized) else None
                response = _problem(e, extra)
            except (ClientDisconnect, asyncio.CancelledError):
                raise
            except Exception:
                log.exception("request %s %s failed", scope.get("method"), scope.get("path"))
                response = _failed_inside()
            if response is not None and not started:
                await response(scope, receive, sending)
        finally:
            correlation.reset(token)


async def read_body(request: Request, limit: int = MAX_DOCUMENT) -> bytes:
    """The body, refused as soon as it is known to be too large."""
    remedy = f"at most {limit} bytes"
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise TooLarge(f"the body has {length} bytes", remedy=remedy)
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            raise TooLarge(f"the body has more than {limit} bytes", remedy=remedy)
    return bytes(data)


def _duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    doc: dict[str, Any] = {}
    for key, value in pairs:
        if key in doc:
            raise Invalid("is given twice", field=f"$.{key}", remedy="keep one of them")
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
            doc = stdjson.loads(data, object_pairs_hook=_duplicates)
        except (ValueError, RecursionError) as e:
            raise Invalid(f"the body is no valid JSON: {e}", field="$", remedy="or send application/yaml") from None
    _check_storable(doc, "$", 0)
    return doc


def _check_storable(value: Any, path: str, depth: int) -> None:
    """Refuses what a parser takes and the store's JSON cannot hold."""
    if depth > MAX_DEPTH:
        raise Invalid(f"is nested deeper than {MAX_DEPTH} levels", field=path[:200], remedy="flatten it")
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
    def _actor(request: Request) -> dict[str, str]:
        client = request.client
        return {"actor": request.scope["principal"].name, "source": client.host if client and client.host else "local"}

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
    def _one(resource: Resource, status: int = 200) -> Response:
        response = json(resource.document(), status)
        response.headers["etag"] = f'"{resource.metadata.resourceVersion}"'
        return response

    # -- reads -----------------------------------------------------------------------------------------------------

    async def collection(self, request: Request) -> Response:
        if request.method == "POST":
            resource = await self._document(request)
            dry = flag(request, "dryRun")
            return self._one(await self.resources.create(resource, dry_run=dry, **self._actor(request)), 201)
        kind = self._kind(request)
        namespace = request.path_params.get("ns")
        wanted = parse_labels(request.query_params.get("labelSelector", ""))
        fields = parse_fields(request.query_params.get("fieldSelector", ""))

        def chosen(r: Resource) -> bool:
            return wanted(r.metadata.labels) and fields(r.document())

        if flag(request, "watch"):
            return self._watch(request, kind, namespace, chosen)
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
            items.append(_listed(r))
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
        self, request: Request, kind: Kind, namespace: str | None, chosen: Callable[[Resource], bool]
    ) -> Response:
        since_text = request.headers.get("last-event-id") or request.query_params.get("resourceVersion")
        since = parse_revision(since_text) if since_text else None
        if since_text and since is None:
            raise Invalid(f"{since_text[:40]!r} is no revision", field="?resourceVersion", remedy="list first")
        shown = {r.key for r in self.store.items(kind.name, namespace) if chosen(r)} if since else set()
        changes = self.store.watch(since)
        if since is None:
            changes.close()
            changes = self.store.watch(0)

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
                        event = self._event(change, kind, namespace, chosen, shown)
                        if event is not None:
                            yield event
                        following = asyncio.ensure_future(anext(iterator))
                finally:
                    following.cancel()

        return StreamingResponse(
            events(), media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )

    @staticmethod
    def _event(
        change: Change, kind: Kind, namespace: str | None, chosen: Callable[[Resource], bool], shown: set[Key]
    ) -> bytes | None:
        key = change.key
        if key.kind != kind.name or (namespace is not None and key.namespace != namespace):
            return None
        was = key in shown
        if change.resource is not None and chosen(change.resource):
            name, doc = ("MODIFIED" if was else "ADDED"), change.resource.document()
            shown.add(key)
        elif was or change.resource is None:
            meta = {"name": key.name, "namespace": "" if key.namespace == CLUSTER else key.namespace}
            name = "DELETED"
            doc = change.resource.document() if change.resource is not None else {"kind": key.kind, "metadata": meta}
            shown.discard(key)
        else:
            return None
        return b"event: %b\nid: %d\ndata: %b\n\n" % (name.encode(), change.revision, msgspec.json.encode(doc))

    async def one(self, request: Request) -> Response:
        key = self._key(request)
        if request.method in ("GET", "HEAD"):
            return self._one(self.store.get(key))
        who, dry = self._actor(request), flag(request, "dryRun")
        expect = self._expect(request)
        if request.method == "DELETE":
            return self._one(await self.resources.delete(key, expect=expect, dry_run=dry, **who))
        if request.method == "PATCH":
            return self._one(await self._patch(request, key, expect, dry, who))
        resource = await self._document(request, key)
        return self._one(await self.resources.replace(resource, expect=expect, dry_run=dry, **who))

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
            doc = old.document()
            doc.pop("status", None)
            asked = (
                patch.get("metadata", {}).get("resourceVersion") if isinstance(patch.get("metadata"), dict) else None
            )
            doc["metadata"]["resourceVersion"] = ""
            merged = merge_patch(doc, {k: v for k, v in patch.items() if k != "status"})
            resource = decode(merged, namespace=key.namespace)
            if resource.key != key:
                raise Invalid("a patch cannot rename", resource=str(key), field="$.metadata.name", remedy="remove it")
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
        if request.method in ("GET", "HEAD"):
            return self._one(self.store.get(key))
        doc = parse_body(await read_body(request), request.headers.get("content-type", "application/json"))
        status = doc.get("status", doc) if isinstance(doc, dict) else None
        if not isinstance(status, dict):
            raise Invalid("expected an object", resource=str(key), field="$.status")
        if request.method == "PATCH":
            status = merge_patch(self.store.get(key).status, status)
        return self._one(await self.resources.status(key, status, **self._actor(request)))


def _listed(r: Resource) -> dict[str, Any]:
    return r.document()


def build_app(
    resources: Resources,
    store: Store,
    *,
    auth: Auth,
    extra_routes: Sequence[Route] = (),
    health: Callable[[], tuple[bool, dict[str, Any]]],
    metrics: Callable[[], str],
    info: dict[str, Any],
) -> ASGIApp:
    """The whole API as an ASGI app."""
    api = Api(resources, store)

    async def healthz(_: Request) -> Response:
        return json({"state": "alive"})

    async def readyz(_: Request) -> Response:
        ok, doc = health()
        return json(doc, 200 if ok else 503)

    async def metric(_: Request) -> Response:
        return PlainTextResponse(metrics(), media_type="text/plain; version=0.0.4")

    async def version(_: Request) -> Response:
        return json(info)

    async def openapi(_: Request) -> Response:
        from edgeward.core.openapi import document

        return json(document(str(info.get("version", ""))))

    async def audit(request: Request) -> Response:
        limit = number(request, "limit", 500, low=1, high=10_000)
        return json({"items": resources.audit.items(since=number(request, "since", 0), limit=limit)})

    base = "/api/v1"
    reading = ["GET", "HEAD"]
    routes = [
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metric),
        Route("/openapi.json", openapi),
        Route(f"{base}/version", version),
        Route(f"{base}/audit", audit),
        *extra_routes,
    ]
    for prefix in (f"{base}/namespaces/{{ns}}/{{plural}}", f"{base}/{{plural}}"):
        routes += [
            Route(f"{prefix}/{{name}}/status", api.status, methods=[*reading, "PUT", "PATCH"]),
            Route(f"{prefix}/{{name}}", api.one, methods=[*reading, "PUT", "PATCH", "DELETE"]),
            Route(prefix, api.collection, methods=[*reading, "POST"]),
        ]
    # /api/v1/namespaces/default is the kind Namespace, not a list of kinds in it: two parts behind namespaces decide
    app = Starlette(
        routes=_ordered(routes),
        exception_handlers={EdgewardError: _refused, 404: _not_found, 405: _not_allowed, Exception: _failed},
    )
    return _Gate(app, auth, open_metrics=True)


def _ordered(routes: list[Route]) -> list[Route]:
    """Fixed paths before those with parameters, so that ``nodes/x/enrol`` is no sub-resource lookup."""
    return sorted(routes, key=lambda r: r.path.count("{"))


async def _refused(request: Request, exc: Exception) -> Response:
    return _problem(exc if isinstance(exc, EdgewardError) else EdgewardError("failed inside"))


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
