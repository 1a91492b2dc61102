"""Where a function's last versions are kept: the hub's store (``m.versions.…``), and a file of each node.

Both follow what is declared and note it (``history.py``). The hub learns digests from nodes' reports, a node from what
it tells its own plane. Several hub processes may note the same: whoever comes second writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
from nats.aio.msg import Msg

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError
from edgeward.core.files import ensure_dir, read_json, write_atomic
from edgeward.core.reconcile import Loop
from edgeward.core.resource import CLUSTER, Key, Resource
from edgeward.core.scope import takes
from edgeward.core.store import Subscription
from edgeward.functions.history import Past, back_is, back_of, declared, reported, told_by

log = logging.getLogger("edgeward.functions")


#: The verb by which a node asks for the code that a canary is tried beside.
BESIDE = "beside"


class BesideAsk(msgspec.Struct):
    namespace: str
    name: str


class BesideTold(msgspec.Struct):
    """``spec``: the code; None: there was no version before."""

    spec: dict[str, Any] | None = None


class Facts(Protocol):
    """What is used of the hub's store."""

    def find(self, key: Key) -> Resource | None: ...
    def watch(self, since: int | None = None) -> Subscription: ...
    def fact(self, name: str) -> bytes | None: ...
    def facts(self, prefix: str) -> dict[str, bytes]: ...
    def fact_revision(self, name: str) -> int: ...
    async def set_fact(self, name: str, value: bytes, *, expect: int | None = None) -> None: ...


def _spec(function: Resource) -> dict[str, Any]:
    spec: dict[str, Any] = msgspec.to_builtins(function.spec)
    return spec


def _known(data: bytes | None) -> list[Past]:
    if not data:
        return []
    try:
        return msgspec.json.decode(zlib.decompress(data), type=list[Past])
    except (zlib.error, msgspec.MsgspecError) as e:
        log.error("the versions of a function that were kept are not readable: %s", e)
        return []


class CloudHistory:
    """At the hub."""

    def __init__(self, store: Facts) -> None:
        self._store = store
        self._loop: Loop[Key] = Loop("versions", self._note, workers=1)
        #: What was noted last of each: most of a fleet's reports say nothing new, and what is kept may be large.
        self._noted: dict[Key, tuple[str, int, frozenset[tuple[int, str]]]] = {}

    @staticmethod
    def _fact(namespace: str, name: str) -> str:
        return f"versions.{namespace}.{name}"

    def of(self, namespace: str, name: str) -> list[dict[str, Any]]:
        """The versions that are kept, the present one last."""
        return [p.shown() for p in _known(self._store.fact(self._fact(namespace, name)))]

    def specs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The code of every version that is kept: (namespace, spec)."""
        for name, data in self._store.facts("versions.").items():
            for past in _known(data):
                yield name.partition(".")[0], past.spec

    async def open(self, bus: Bus) -> None:
        """Answers nodes."""
        await bus.serve(f"ew.hub.{BESIDE}.*", self._beside, node_token=3, queue="hub")

    async def _beside(self, msg: Msg) -> bytes:
        """Of functions that the node has; of others it is told nothing."""
        told = BesideTold()
        with contextlib.suppress(msgspec.MsgspecError):
            ask = msgspec.msgpack.decode(msg.data, type=BesideAsk)
            node = self._store.find(Key("Node", CLUSTER, msg.subject.rsplit(".", 1)[1]))
            function = self._store.find(Key("Function", ask.namespace, ask.name))
            if node is not None and function is not None and takes(function, node):
                known = _known(self._store.fact(self._fact(ask.namespace, ask.name)))
                told.spec = back_of(known, _spec(function))
        return msgspec.msgpack.encode(told)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._loop.run())
            group.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            try:
                with self._store.watch(0) as changes:
                    async for change in changes:
                        if change.key.kind == "Function":
                            self._loop.add(change.key)
            except EdgewardError as e:
                log.info("watch starts anew: %s", e)

    async def _note(self, key: Key) -> None:
        name = self._fact(key.namespace, key.name)
        data, revision = self._store.fact(name), self._store.fact_revision(name)
        function = self._store.find(key)
        if function is None:
            self._noted.pop(key, None)
            known, kept = _known(data), list[Past]()
        else:
            meta, told = function.metadata, told_by(function.status.get("nodes") or {})
            state = (meta.uid, meta.generation, frozenset(told))
            if data and self._noted.get(key) == state:
                return
            known = _known(data)
            kept = reported(declared(known, _spec(function), meta.generation, clock.timestamp()), told)
        if kept != known:
            # a Conflict is tried again: somebody else has noted it, or something newer
            await self._store.set_fact(name, zlib.compress(msgspec.json.encode(kept)) if kept else b"", expect=revision)
        if function is not None:
            self._noted[key] = state


class EdgeHistory:
    """On a node: a file per function below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        #: What was noted last, so that nothing is read or written while nothing changes.
        self._noted: dict[tuple[str, str], tuple[int, str, str]] = {}
        self._there: set[tuple[str, str]] | None = None

    def _file(self, namespace: str, name: str) -> Path:
        return self._folder / namespace / f"{name}.json"

    def _read(self, namespace: str, name: str) -> list[Past]:
        try:
            return msgspec.convert(read_json(self._file(namespace, name), []), list[Past])
        except (EdgewardError, msgspec.ValidationError) as e:
            log.error("the versions of %s/%s that were kept are not readable: %s", namespace, name, e)
            return []

    def of(self, namespace: str, name: str) -> list[dict[str, Any]]:
        """The versions that are kept, the present one last."""
        return [p.shown() for p in self._read(namespace, name)]

    def specs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The code of every version that is kept: (namespace, spec)."""
        for file in self._folder.glob("*/*.json"):
            for past in self._read(file.parent.name, file.stem):
                yield file.parent.name, past.spec

    def back(self, namespace: str, name: str, function: Resource) -> dict[str, Any] | None:
        """The code of the version that had all calls before what is declared now."""
        return back_of(self._read(namespace, name), _spec(function))

    def adopt(self, namespace: str, name: str, code: dict[str, Any]) -> None:
        """A version that had all calls elsewhere, before this node had the function. Raises ``EdgewardError``."""
        known = self._read(namespace, name)
        if all(p.spec != code for p in known):
            # older than what is declared here, and newer than nothing
            self._write(namespace, name, [Past(code, 0, 0, clock.timestamp(), stood=1), *known])

    def _write(self, namespace: str, name: str, kept: list[Past]) -> None:
        file = self._file(namespace, name)
        ensure_dir(file.parent)
        write_atomic(file, msgspec.json.encode(kept))

    def note(self, functions: Sequence[Resource], entries: Iterable[Mapping[str, Any]]) -> None:
        """``entries``: what the plane is told of them, with the digest. A disk that is full costs the note only."""
        digests = {
            str(e["key"]): (str(e.get("digest", "")), str(e.get("before", {}).get("digest", ""))) for e in entries
        }
        there = set()
        for function in functions:
            meta = function.metadata
            at = (meta.namespace, meta.name)
            there.add(at)
            digest, beside = digests.get(f"{meta.namespace}/{meta.name}", ("", ""))
            state = (meta.generation, meta.resourceVersion, digest + beside)
            if self._noted.get(at) == state:
                continue
            known = self._read(*at)
            kept = declared(known, _spec(function), meta.generation, clock.timestamp())
            kept = back_is(reported(kept, [(meta.generation, digest)]), _spec(function), beside)
            try:
                if kept != known:
                    self._write(*at, kept)
                self._noted[at] = state
            except OSError as e:
                log.error("the versions of %s/%s cannot be kept: %s", *at, e)
        if there != self._there:
            self._forget(there)
            self._there = there

    def _forget(self, there: set[tuple[str, str]]) -> None:
        """Functions that are not on this node any more."""
        for file in self._folder.glob("*/*.json"):
            at = (file.parent.name, file.stem)
            if at not in there:
                self._noted.pop(at, None)
                with contextlib.suppress(OSError):
                    file.unlink()
