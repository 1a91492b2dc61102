"""The hub's routes for blobs: what the command line uploads, and what there is.

Whoever may create functions in a namespace may bring blobs into it, within its quota; who may see its functions may see
which blobs it holds. Their bytes go to nodes only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.core import clock
from edgeward.core.access import Action, actor_of, declare, principal
from edgeward.core.audit import Audit
from edgeward.core.authz import Ask
from edgeward.core.blobs import DIGEST, hex_of
from edgeward.core.context import correlation
from edgeward.core.describe import described
from edgeward.core.errors import Invalid, NotFound, TooLarge
from edgeward.core.resource import CLUSTER, Key, check_name
from edgeward.core.store import Store
from edgeward.core.streaming import json, read_body
from edgeward.functions.wheels import MAX_PINS, wheel_of
from edgeward.hub.blobs import Blobs, bounded
from edgeward.hub.bundles import Bundles

#: Seconds that an upload may stand still, and take.
_STALL, _WHOLE = 30.0, 900.0
_MAX_BUNDLE = 256 * 1024


class Blob(msgspec.Struct):
    """One blob that a namespace holds."""

    digest: str
    size: int


class BlobList(msgspec.Struct):
    items: list[Blob]


class BundleGiven(msgspec.Struct, forbid_unknown_fields=True):
    """That a blob, uploaded before, is the bundle of a lock file."""

    digest: Annotated[str, Meta(description="Of the blob", pattern=DIGEST)]
    wheels: Annotated[list[str], Meta(description="Names of the wheels in it", max_length=2 * MAX_PINS)]


class BlobRoutes:
    def __init__(self, store: Store, blobs: Blobs, bundles: Bundles, audit: Audit, scratch: Path) -> None:
        self._store, self._blobs, self._bundles = store, blobs, bundles
        self._audit, self._scratch = audit, scratch

    def routes(self) -> list[Route]:
        base = "/api/v1/namespaces/{ns}"
        create, see = Action("own", ("create",), "Function"), Action("own", ("list",), "Function")
        return [
            Route(f"{base}/blobs", declare(self.list, see), methods=["GET"]),
            Route(f"{base}/blobs/{{digest}}", declare(self.get, see), methods=["GET"]),
            Route(f"{base}/blobs/{{digest}}", declare(self.put, create), methods=["PUT"]),
            Route(f"{base}/bundles/{{lock}}", declare(self.put_bundle, create), methods=["PUT"]),
        ]

    def _namespace(self, request: Request, verb: str) -> str:
        """The namespace of the path, where the caller may do so and it is there."""
        name = check_name(request.path_params["ns"], "namespace")
        principal(request).require(Ask(verb, "Function", name))
        home = self._store.find(Key("Namespace", CLUSTER, name))
        if name != "default" and (home is None or home.metadata.deletionTimestamp):
            raise NotFound(f"there is no namespace {name!r}", remedy="create it first")
        return name

    @described("The blobs that a namespace holds", answer=BlobList)
    async def list(self, request: Request) -> Response:
        namespace = self._namespace(request, "list")
        held = await self._blobs.held(namespace)
        return json(BlobList([Blob(f"sha256:{hex}", mark.size) for (_, hex), mark in sorted(held.items())]))

    @described("Whether a namespace holds a blob", answer=Blob)
    async def get(self, request: Request) -> Response:
        namespace = self._namespace(request, "list")
        digest = request.path_params["digest"]
        return json(Blob(digest, await self._blobs.size(namespace, hex_of(digest, "digest"))))

    @described("Bring a blob: the body's bytes, named by their SHA-256", answer=Blob)
    async def put(self, request: Request) -> Response:
        namespace = self._namespace(request, "create")
        digest = request.path_params["digest"]
        hex = hex_of(digest, "digest")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._blobs.settings.largest:
            raise TooLarge(f"has {length} bytes", remedy=f"at most {self._blobs.settings.largest}")
        pieces = bounded(request.stream(), _STALL, _WHOLE)
        quota = self._bundles.quota(namespace)
        size = await self._blobs.put(namespace, hex, pieces, self._scratch, clock.now(), quota=quota)
        key = Key("Blob", namespace, hex)
        by = actor_of(request)
        await self._audit.write("create", key, actor=by["actor"], source=by["source"], request=correlation.get())
        return json(Blob(digest, size))

    @described("Say that a blob is the bundle of a lock file, by the SHA-256 of its text", body=BundleGiven)
    async def put_bundle(self, request: Request) -> Response:
        namespace = self._namespace(request, "create")
        lock = hex_of(request.path_params["lock"], "lock")
        try:
            given = msgspec.json.decode(await read_body(request, _MAX_BUNDLE), type=BundleGiven)
        except msgspec.DecodeError as e:
            raise Invalid(str(e), remedy="send {digest, wheels}") from None
        for name in given.wheels:
            wheel_of(name)
        await self._blobs.add_bundle(namespace, lock, hex_of(given.digest), given.wheels)
        return json({"digest": given.digest})
