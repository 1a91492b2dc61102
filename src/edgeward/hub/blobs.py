"""The hub's store of blobs: files named by their content, in pieces in one JetStream stream.

A blob lies as messages ``ew.blob.<hex>.p.<n>`` of ``PIECE`` bytes, then ``ew.blob.<hex>.meta``, which says that it is
whole. ``ew.blob.<hex>.ns.<namespace>`` says who holds it, and when it was last seen in use; a blob that nobody holds is
gone. ``ew.bundle.<namespace>.<lock>.<hex>`` says that a blob is the bundle of a lock file, and for which wheels. So a
cluster has everything on all its servers, and a backup takes it along as it takes every stream. Nothing is kept in this
process but what the last sweep found without a holder. Who may do what is decided where it is called:
``blob_routes.py`` and ``bundles.py``.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from edgeward.core.blobs import LARGEST, MOST, PIECE
from edgeward.core.bus import Bus, cancellable
from edgeward.core.errors import EdgewardError, Invalid, NotFound, Refused, TooLarge, TooSlow, Unreachable
from edgeward.core.jsread import read_batch
from edgeward.core.quantity import format_bytes, parse_bytes, parse_duration

log = logging.getLogger("edgeward.blobs")

STREAM = "BLOBS"
_BATCH = 256
#: Uploads at once, each with a file of its own size on this disk.
_UPLOADS = 4
#: A holder's mark is written again when it is older than this. Seconds.
_FRESH = 24 * 3600.0


class Settings(msgspec.Struct, frozen=True):
    """``blobs`` of ``hub.json``: bytes kept in all, bytes of one, seconds that one lives that nothing refers to."""

    keep: int = 4 << 30
    largest: int = LARGEST
    after: float = 7 * 86400.0

    @classmethod
    def read(cls, given: object) -> Settings:
        doc = given if isinstance(given, dict) else {}
        try:
            return cls(
                parse_bytes(doc.get("keep", "4Gi")),
                min(MOST, parse_bytes(doc.get("largest", LARGEST))),
                parse_duration(doc.get("after", "7d")),
            )
        except ValueError as e:
            raise Invalid(str(e), field="$.blobs", file="hub.json") from None


class Mark(msgspec.Struct):
    """That a namespace holds a blob: its bytes, and when it was last seen in use (Unix time)."""

    size: int
    seen: float


class Meta(msgspec.Struct):
    size: int


class Bundle(msgspec.Struct):
    """That a blob is the bundle of a lock file. ``wheels``: their file names."""

    digest: str
    wheels: list[str]


class Blobs:
    def __init__(self, bus: Bus, settings: Settings, *, replicas: int = 1) -> None:
        self._bus, self.settings, self._replicas = bus, settings, replicas
        self._slots = asyncio.Semaphore(_UPLOADS)
        #: Held while the store is changed by what it holds: there is room for one more, nobody needs this one.
        self._room = asyncio.Lock()
        #: Seen without a holder at the last sweep.
        self._orphans: set[str] = set()

    async def open(self) -> None:
        """Makes the stream where it is missing."""
        js = self._bus.jetstream(timeout=10.0)
        config = StreamConfig(
            name=STREAM,
            subjects=["ew.blob.>", "ew.bundle.>"],
            max_msgs_per_subject=1,
            max_msg_size=PIECE + 64 * 1024,
            num_replicas=self._replicas,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            allow_direct=True,
            duplicate_window=1.0,
        )
        try:
            await js.stream_info(STREAM)
        except nats.js.errors.NotFoundError:
            # no max_bytes: the server would set them aside, and not start on a small disk; put() counts
            await js.add_stream(config)

    # -- reading ---------------------------------------------------------------------------------------------------

    async def _last(self, subject: str) -> bytes | None:
        """The last message of a subject. A replica that is behind may not have it: the leader has the last word."""
        found = await self._bus.last_message(STREAM, subject)
        if found is not None:
            return found.data
        try:
            got = await cancellable(self._bus.jetstream(timeout=10.0).get_last_msg(STREAM, subject))
        except nats.js.errors.NotFoundError:
            return None
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the hub's store does not answer ({type(e).__name__})", remedy="try again") from e
        return got.data or b""

    async def size(self, namespace: str, hex: str) -> int:
        """Bytes of a blob that the namespace holds. Raises ``NotFound``."""
        meta = await self._last(f"ew.blob.{hex}.meta")
        mark = await self._last(f"ew.blob.{hex}.ns.{namespace}") if meta else None
        if meta is None or mark is None:
            raise NotFound(
                f"namespace {namespace!r} holds no blob sha256:{hex}", remedy="upload it: apply the folder again"
            )
        return msgspec.msgpack.decode(meta, type=Meta).size

    async def read(self, namespace: str, hex: str, offset: int, most: int) -> tuple[int, bytes]:
        """The blob's size, and some bytes from ``offset`` on; b"" at its end. Raises ``NotFound``."""
        size = await self.size(namespace, hex)
        if not 0 <= offset < size:
            return size, b""
        number, start = divmod(offset, PIECE)
        piece = await self._last(f"ew.blob.{hex}.p.{number}")
        if piece is None:
            raise NotFound(f"the blob sha256:{hex} is damaged at the hub", remedy="upload it again")
        return size, piece[start : start + max(1, min(most, PIECE))]

    async def held(self, namespace: str = "*") -> dict[tuple[str, str], Mark]:
        """(namespace, hex) to mark."""
        found: dict[tuple[str, str], Mark] = {}
        at = 1
        while True:
            got = await read_batch(
                self._bus.client, "$JS.API", STREAM, at, f"ew.blob.*.ns.{namespace}", _BATCH, timeout=10.0
            )
            if not got:
                return found
            for _, subject, _, data in got:
                parts = subject.split(".")
                found[parts[4], parts[2]] = msgspec.msgpack.decode(data, type=Mark)
            at = got[-1][0] + 1

    # -- writing ---------------------------------------------------------------------------------------------------

    async def put(
        self, namespace: str, hex: str, data: AsyncIterator[bytes], scratch: Path, now: float, *, quota: float = 0.0
    ) -> int:
        """Takes a blob, whole and right or not at all; its size. ``quota``: bytes that the namespace may hold; 0: any.

        Raises ``Invalid`` for other bytes than the name says, ``TooLarge``, ``Refused`` where there is no room.
        """
        if self._slots.locked():
            raise Refused(f"{_UPLOADS} uploads are being taken", remedy="try again in a moment")
        async with self._slots:
            with TemporaryFile(dir=scratch) as file:
                size = await self._receive(hex, data, file)
                async with self._room:
                    held = await self.held()
                    if (namespace, hex) not in held:
                        self._within(namespace, hex, size, held, quota)
                    await self._store(hex, file, size)
                    await self._mark(namespace, hex, Mark(size, now))
                return size

    async def _receive(self, hex: str, data: AsyncIterator[bytes], file: IO[bytes]) -> int:
        digest, size = hashlib.sha256(), 0
        async for piece in data:
            size += len(piece)
            if size > self.settings.largest:
                raise TooLarge(
                    f"is more than {format_bytes(self.settings.largest)}",
                    remedy="leave out what is not used, or raise blobs.largest in hub.json",
                )
            digest.update(piece)
            file.write(piece)
        if digest.hexdigest() != hex:
            raise Invalid(
                f"these bytes are sha256:{digest.hexdigest()}, not what they are called", remedy="upload them again"
            )
        return size

    def _within(self, namespace: str, hex: str, size: int, held: dict[tuple[str, str], Mark], quota: float) -> None:
        own = sum(m.size for (ns, _), m in held.items() if ns == namespace)
        total = sum({h: m.size for (_, h), m in held.items() if h != hex}.values())
        if total + size > self.settings.keep:
            raise Refused(
                f"the hub keeps {format_bytes(self.settings.keep)} of blobs, it has {format_bytes(total)} and this has "
                f"{format_bytes(size)}",
                remedy="delete functions that are not used, or raise blobs.keep in hub.json",
            )
        if quota and own + size > quota:
            raise Refused(
                f"namespace {namespace!r} may hold {format_bytes(int(quota))} of blobs, it holds {format_bytes(own)} "
                f"and this has {format_bytes(size)}",
                field="$.spec.quota.blobs",
                remedy="delete functions that are not used, or ask for a higher quota",
            )

    async def _store(self, hex: str, file: IO[bytes], size: int) -> None:
        if await self._last(f"ew.blob.{hex}.meta") is not None:
            return
        file.seek(0)
        number = 0
        while piece := file.read(PIECE):
            await self._bus.publish_acked(f"ew.blob.{hex}.p.{number}", piece, timeout=20.0)
            number += 1
        # last: who sees it finds all pieces
        await self._bus.publish_acked(f"ew.blob.{hex}.meta", msgspec.msgpack.encode(Meta(size)), timeout=20.0)

    async def _mark(self, namespace: str, hex: str, mark: Mark) -> None:
        await self._bus.publish_acked(f"ew.blob.{hex}.ns.{namespace}", msgspec.msgpack.encode(mark), timeout=20.0)

    # -- bundles ---------------------------------------------------------------------------------------------------

    async def bundles(self, namespace: str, lock: str) -> list[Bundle]:
        """The bundles that there are of a lock file (its hex digest)."""
        got = await read_batch(
            self._bus.client, "$JS.API", STREAM, 1, f"ew.bundle.{namespace}.{lock}.*", _BATCH, timeout=10.0
        )
        return [msgspec.msgpack.decode(data, type=Bundle) for _, _, _, data in got]

    async def add_bundle(self, namespace: str, lock: str, hex: str, wheels: list[str]) -> None:
        """Raises ``NotFound`` when the namespace holds no such blob."""
        await self.size(namespace, hex)
        data = msgspec.msgpack.encode(Bundle(f"sha256:{hex}", wheels))
        await self._bus.publish_acked(f"ew.bundle.{namespace}.{lock}.{hex}", data, timeout=20.0)

    # -- what nobody needs -----------------------------------------------------------------------------------------

    async def sweep(self, used: Collection[tuple[str, str]], now: float) -> int:
        """Takes away what nothing has referred to for long. ``used``: (namespace, hex of a blob or of a lock file).

        A blob without a holder (an upload that broke off) goes at the second sweep that finds it so. Gives how many
        went.
        """
        async with self._room:  # an upload that ends meanwhile would lose what it found, or what it brought
            return await self._sweep(used, now)

    async def _sweep(self, used: Collection[tuple[str, str]], now: float) -> int:
        locks = await self._subjects("ew.bundle.>")
        in_use = {(ns, hex) for _, _, ns, lock, hex in (s.split(".") for s in locks) if (ns, lock) in used}
        in_use |= set(used)
        held: set[str] = set()
        for (namespace, hex), mark in (await self.held()).items():
            if (namespace, hex) in in_use:
                held.add(hex)
                if now - mark.seen > _FRESH:
                    await self._mark(namespace, hex, Mark(mark.size, now))
            elif now - mark.seen <= self.settings.after:
                held.add(hex)
            else:
                await self._purge(f"ew.blob.{hex}.ns.{namespace}")
                for subject in locks:
                    if subject.startswith(f"ew.bundle.{namespace}.") and subject.endswith(f".{hex}"):
                        await self._purge(subject)
        there = {s.split(".")[2] for s in await self._subjects("ew.blob.>")}
        orphans = there - held
        gone = orphans & self._orphans
        for hex in gone:
            await self._purge(f"ew.blob.{hex}.>")
            log.info("the blob sha256:%s was not used any more and is gone", hex)
        self._orphans = orphans - gone
        return len(gone)

    async def _subjects(self, wanted: str) -> list[str]:
        try:
            info = await self._bus.jetstream(timeout=10.0).stream_info(STREAM, subjects_filter=wanted)
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the blobs cannot be listed ({type(e).__name__})") from e
        return sorted(info.state.subjects or {})

    async def _purge(self, subject: str) -> None:
        try:
            await self._bus.jetstream(timeout=10.0).purge_stream(STREAM, subject=subject)
        except (nats.errors.Error, TimeoutError) as e:
            raise EdgewardError(f"{subject} cannot be taken away ({type(e).__name__})") from e


async def bounded(pieces: AsyncIterator[bytes], stall: float, whole: float) -> AsyncIterator[bytes]:
    """Pieces of a body, each and all within their seconds: a caller who stalls does not hold an upload's place."""
    until = asyncio.get_running_loop().time() + whole
    while True:
        try:
            async with asyncio.timeout(max(0.0, min(stall, until - asyncio.get_running_loop().time()))):
                piece = await anext(pieces, None)
        except TimeoutError:
            raise TooSlow(f"nothing came for {stall:g} s, or not all in {whole:g} s", remedy="send it again") from None
        if piece is None:
            return
        yield piece
