"""What nodes ask the hub for: pieces of blobs, and the bundle of a lock file, which is made here when nobody has.

A node gets blobs of the namespaces whose functions it has, and bundles of the lock files that those functions declare;
the text of the lock file is the hub's own, so a node cannot have anything fetched that nobody declared. One bundle is
made at a time; what could not be made is told for a while before it is tried again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import msgspec
from nats.aio.msg import Msg

from edgeward.core import clock
from edgeward.core.blobs import BlobAsk, BlobPart, BundleAsk, BundleTold, Target, hex_of
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Refused, Unreachable
from edgeward.core.kinds import quota_of
from edgeward.core.resource import CLUSTER, Key, check_name
from edgeward.core.scope import takes
from edgeward.core.store import Store
from edgeward.functions.bundling import Source, make
from edgeward.functions.parts import Parts, named, parts_of
from edgeward.functions.wheels import lacking, parse_lock, tags_of, wanted, where
from edgeward.hub.blobs import Blobs, Bundle

log = logging.getLogger("edgeward.blobs")

#: Seconds after which what could not be made is tried again.
_AGAIN = 120.0
#: Bundles that wait to be made; a node whose ask finds no place asks again.
_WAITING = 64
#: Seconds between two looks for what nobody needs.
_SWEEP = 3600.0

Job = tuple[str, str, str]


class Bundles:
    def __init__(
        self,
        store: Store,
        bus: Bus,
        blobs: Blobs,
        source: Source,
        scratch: Path,
        *,
        revoked: Callable[[str], bool],
        leads: Callable[[], bool],
        kept: Callable[[], Iterable[tuple[str, Any]]] = lambda: (),
    ) -> None:
        """``scratch``: a folder for what is being fetched. ``kept``: (namespace, spec) of versions that there is a way
        back to."""
        self._store, self._bus, self._blobs, self._source, self._scratch = store, bus, blobs, source, scratch
        self._revoked, self._leads, self._kept = revoked, leads, kept
        self._queue: asyncio.Queue[tuple[Job, str, Target]] = asyncio.Queue(_WAITING)
        self._making: set[Job] = set()
        #: Why it could not be made, and when (monotonic).
        self._failed: dict[Job, tuple[str, float]] = {}

    async def open(self) -> None:
        for verb, answer in (("blob", self._blob), ("bundle", self._bundle)):
            await self._bus.serve(f"ew.hub.{verb}.*", answer, node_token=3, queue="hub", concurrency=16)
        await self._bus.flush()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._make_all())
            group.create_task(self._sweep())

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _allowed(self, node: str, namespace: str) -> None:
        """Raises ``Refused`` where nothing of the namespace is for any node of its site: those share."""
        check_name(namespace, "namespace")
        me = self._store.find(Key("Node", CLUSTER, node))
        if me is None or self._revoked(node):
            raise Refused("is not known here, or revoked", resource=f"Node/{node}")
        found = [r for kind in ("Function", "App", "Release") for r in self._store.items(kind, namespace)]
        if any(takes(r, me) for r in found):  # asked for each piece of a blob: not the whole fleet for the usual case
            return
        site = [n for n in self._store.items("Node") if n.spec.site == me.spec.site]
        if not any(takes(r, n) for r in found for n in site):
            raise Refused(f"has no function and no app of namespace {namespace!r}", resource=f"Node/{node}")

    async def _blob(self, msg: Msg) -> bytes:
        try:
            ask = msgspec.msgpack.decode(msg.data, type=BlobAsk)
            self._allowed(msg.subject.rsplit(".", 1)[1], ask.namespace)
            size, data = await self._blobs.read(ask.namespace, hex_of(ask.digest), ask.offset, ask.most)
            part = BlobPart(size, data)
        except (EdgewardError, msgspec.DecodeError) as e:
            # what one process of the hub does not know yet, another one may
            part = BlobPart(error=str(e), again=isinstance(e, Unreachable | Refused))
        return msgspec.msgpack.encode(part)

    async def _bundle(self, msg: Msg) -> bytes:
        try:
            ask = msgspec.msgpack.decode(msg.data, type=BundleAsk)
            self._allowed(msg.subject.rsplit(".", 1)[1], ask.namespace)
            told = await self._told(ask)
        except (EdgewardError, msgspec.DecodeError) as e:
            told = BundleTold("unknown" if isinstance(e, Unreachable | Refused) else "failed", message=str(e))
        return msgspec.msgpack.encode(told)

    def _parts(self) -> Parts:
        return parts_of([*self._store.items("Function"), *self._store.items("Override")])

    async def _told(self, ask: BundleAsk) -> BundleTold:
        text = self._parts().locks.get((ask.namespace, ask.lock))
        if text is None:
            return BundleTold("unknown", message="the hub does not know of a function with this lock file yet")
        found = await self.fitting(ask.namespace, ask.lock, text, ask.target)
        if found is not None:
            return BundleTold("ready", found.digest)
        mark = hashlib.sha256(msgspec.msgpack.encode(ask.target, order="deterministic")).hexdigest()
        job = (ask.namespace, ask.lock, mark)
        why, at = self._failed.get(job, ("", 0.0))
        if why and clock.monotonic() - at < _AGAIN:
            return BundleTold("failed", message=why)
        if job not in self._making and not self._queue.full():
            self._making.add(job)
            self._queue.put_nowait((job, text, ask.target))
        return BundleTold("making", message="the hub fetches its packages")

    async def fitting(self, namespace: str, lock: str, text: str, target: Target) -> Bundle | None:
        """A bundle that there is already, whoever made it, whose wheels are all and run on the target."""
        there = await self._blobs.bundles(namespace, lock)
        if not there:
            return None
        pins, tags = wanted(parse_lock(text), target.environment), tags_of(target)
        for bundle in there:
            if not lacking(pins, bundle.wheels, tags, where(target)):
                return bundle
        return None

    # -- making ----------------------------------------------------------------------------------------------------

    async def _make_all(self) -> None:
        while True:
            job, text, target = await self._queue.get()
            try:
                await self._make(job, text, target)
                self._failed.pop(job, None)
            except EdgewardError as e:
                log.warning("the packages of lock file %s for %s: %s", job[1][:12], where(target), e)
                self._note(job, str(e))
            except Exception:
                log.exception("making a bundle failed")
                self._note(job, "the hub failed to fetch its packages; its log says why")
            finally:
                self._making.discard(job)

    def _note(self, job: Job, why: str) -> None:
        now = clock.monotonic()
        self._failed = {k: v for k, v in self._failed.items() if now - v[1] < _AGAIN}
        self._failed[job] = (why, now)

    async def _make(self, job: Job, text: str, target: Target) -> None:
        namespace, lock, _ = job
        if await self.fitting(namespace, lock, text, target) is not None:
            return  # made meanwhile, for a node that differs in what does not matter
        with NamedTemporaryFile(dir=self._scratch) as file:
            wheels = await make(text, target, self._source, Path(file.name))
            hex = await asyncio.to_thread(lambda: hashlib.file_digest(file, "sha256").hexdigest())
            file.seek(0)

            async def pieces() -> AsyncIterator[bytes]:
                while piece := file.read(1 << 18):
                    yield piece

            await self._blobs.put(namespace, hex, pieces(), self._scratch, clock.now(), quota=self.quota(namespace))
        await self._blobs.add_bundle(namespace, lock, hex, wheels)
        log.info("bundle sha256:%s of %d packages made for %s", hex, len(wheels), where(target))

    def quota(self, namespace: str) -> float:
        return quota_of(self._store.find(Key("Namespace", CLUSTER, namespace))).get("blobs", 0.0)

    # -- what nobody needs -----------------------------------------------------------------------------------------

    def used(self) -> set[tuple[str, str]]:
        """(namespace, hex) of all archives and lock files that something declared or kept refers to."""
        parts = self._parts()
        for namespace, spec in self._kept():
            parts.add(namespace, spec)
        return parts.all | self._images()

    def _images(self) -> set[tuple[str, str]]:
        """Digests that Apps name, what is said of them for single sites or by Overrides, and what is being rolled out:
        archives of images among them."""
        found: set[tuple[str, str]] = set()
        for kind in ("App", "Override", "Release", "Rollout"):
            for r in self._store.items(kind):
                namespace = r.spec.target.namespace if kind == "Override" else r.metadata.namespace
                said = r.status if kind == "Rollout" else r.spec
                found |= {(namespace, hex) for hex in named([msgspec.json.encode(said)])}
        return found

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP)  # the period
            if not self._leads():
                continue
            try:
                await self._blobs.sweep(self.used(), clock.now())
            except EdgewardError as e:
                log.warning("blobs were not swept: %s", e)
