"""What the API does with resources: list with selectors and pages, get, create, replace, merge patch, delete, status.

In: a request that the gate let through. Out: documents, as much of them as the caller may see. Each call asks the
caller's rules (``access.py``) before it reads a body and again with what is in it. What a write must obey is in
``resources.py``; what is stored, in the store; a watch goes on in ``watching.py``.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from edgeward.core.access import actor_of, ask_for, ask_of, check_write, keep_hidden, principal, shown, sift
from edgeward.core.authz import Ask, perhaps
from edgeward.core.body import parse_body
from edgeward.core.errors import EdgewardError, Invalid, NotFound, Refused
from edgeward.core.registry import Kind, kinds
from edgeward.core.resource import CLUSTER, Key, Resource, check_name, decode, merge_patch, parse_revision
from edgeward.core.resources import Resources
from edgeward.core.selectors import parse_fields, parse_labels
from edgeward.core.store import Store
from edgeward.core.streaming import flag, json, number, only, read_body
from edgeward.core.watching import watch

MAX_PAGE = 1000
_VERB = {"GET": "get", "HEAD": "get", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


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
            return watch(request, self.store, kind, namespace, chosen, allowed)
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


def _revision(resource: Resource | None) -> int | None:
    return resource.revision if resource is not None else None
