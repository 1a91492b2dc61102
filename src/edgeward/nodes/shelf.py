"""What is fetched from the hub for the whole site: blobs, piece by piece, kept for a while for those who come later.

A question for some bytes of a blob comes in (``core/blobs.py``), of this node or another one of the site; they go out
as soon as they are here. Each blob is fetched once, however many ask, in pieces as large as the link brings in a
moment, and goes on where it was after a cut. Who gets a blob hashes it; what is not what its name says is thrown away
here too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from edgeward.core import clock
from edgeward.core.blobs import MOST, PIECE, PREFIX, BlobAsk, BlobPart, Pace, hex_of
from edgeward.core.errors import EdgewardError, Refused, Unreachable
from edgeward.core.files import ensure_dir, sha256_of

log = logging.getLogger("edgeward.share")

Ask = Callable[[str, bytes, float], Awaitable[bytes]]

#: Bytes of whole blobs that stay, those that stay free on the disk; seconds that a blob stays that nobody asks for, for
#: which the hub's answer is waited for, after which a fetch that nobody waits for ends.
KEEP, _FREE, _STAYS, _ANSWER, _ALONE = 512 << 20, 256 << 20, 24 * 3600.0, 60.0, 120.0
_AT_ONCE = 4


class NoRoom(Refused):
    """It cannot be kept for the others; that is no reason not to have it."""


class _Blob:
    """One blob on its way, or here. ``have``: bytes from the beginning."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.have = file.stat().st_size if file.exists() else 0
        self.size = -1
        self.asked = clock.monotonic()
        self.task: asyncio.Task[None] | None = None
        self.error: EdgewardError | None = None
        self.moved = asyncio.Event()

    def move(self) -> None:
        self.moved.set()
        self.moved = asyncio.Event()


class Shelf:
    """``folder`` holds what is here. ``ask``: (verb, message, seconds) to the hub's answer."""

    def __init__(self, folder: Path, ask: Ask, *, keep: int = KEEP) -> None:
        self._folder, self._ask, self._keep = folder, ask, keep
        self._blobs: dict[str, _Blob] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)
        #: Bytes that came from the hub, and went to somebody.
        self.fetched = self.given = 0

    async def part(self, ask: BlobAsk, timeout: float) -> BlobPart:
        """Some bytes of a blob from ``ask.offset`` on. Raises ``Unreachable``, ``Refused``, :class:`NoRoom`."""
        hex = hex_of(ask.digest)
        blob = self._blobs.get(hex)
        if blob is None:
            blob = self._blobs[hex] = _Blob(ensure_dir(self._folder) / f"{hex}.blob")
        blob.asked = clock.monotonic()
        try:
            async with asyncio.timeout(timeout):
                while not (0 <= blob.size <= ask.offset or (ask.offset < blob.have and blob.size >= 0)):
                    if blob.task is None:
                        blob.error = None
                        blob.task = asyncio.create_task(self._fetch(hex, ask.namespace, blob))
                    await blob.moved.wait()
                    if blob.error is not None:
                        if not blob.have and self._blobs.get(hex) is blob:
                            del self._blobs[hex]  # there is none: whoever asks for what is nowhere fills nothing
                        raise blob.error
        except TimeoutError:
            raise Unreachable("the hub did not answer in time") from None
        size, most = blob.size, max(1, min(ask.most, PIECE, blob.have - ask.offset))
        try:
            data = await asyncio.to_thread(_read, blob.file, ask.offset, most) if ask.offset < size else b""
        except OSError:  # it was not what its name says, or nobody had asked for it in a long time
            raise Unreachable("it is fetched anew", remedy="try again") from None
        self.given += len(data)
        return BlobPart(size, data)

    async def _fetch(self, hex: str, namespace: str, blob: _Blob) -> None:
        """From where it is to its end."""
        try:
            async with self._slots:
                pace = Pace()
                # the size comes with any piece; of what is here already one byte is asked for again
                while blob.size < 0 or blob.have < blob.size:
                    if clock.monotonic() - blob.asked > _ALONE:
                        raise Unreachable("nobody waits for it")
                    at = blob.have if blob.size >= 0 or not blob.have else blob.have - 1
                    part = await self._piece(BlobAsk(namespace, PREFIX + hex, at, pace.most), pace)
                    self._check_room(part.size, at)
                    with blob.file.open("r+b" if blob.file.exists() else "w+b") as out:
                        out.seek(at)
                        out.write(part.data)
                    blob.have, blob.size = at + len(part.data), part.size
                    self.fetched += len(part.data)
                    if not part.data and blob.have < blob.size:
                        raise Unreachable("the hub sent nothing of it")
                    if blob.have < blob.size:
                        blob.move()
                if await asyncio.to_thread(sha256_of, blob.file) != hex:
                    blob.file.unlink(missing_ok=True)
                    blob.have, blob.size = 0, -1
                    raise Refused("what the hub sent is not what its name says", remedy="upload it again")
        except OSError as e:
            blob.error = NoRoom(f"cannot be kept here: {e.strerror or e}", remedy="free disk space")
        except EdgewardError as e:
            blob.error = e
        finally:
            blob.task = None
            blob.move()

    async def _piece(self, ask: BlobAsk, pace: Pace) -> BlobPart:
        began = clock.monotonic()
        try:
            answer = await self._ask("blob", msgspec.msgpack.encode(ask), _ANSWER)
            part = msgspec.msgpack.decode(answer, type=BlobPart)
        except msgspec.MsgspecError as e:
            raise Unreachable(f"the hub's answer is not understood: {e}") from e
        pace.took(clock.monotonic() - began)
        if part.error:
            raise (Unreachable if part.again else Refused)(part.error)
        return part

    def _check_room(self, size: int, have: int) -> None:
        if size > MOST or shutil.disk_usage(self._folder).free < size - have + _FREE:
            raise NoRoom(f"there is no room for {size} bytes here", remedy="free disk space")

    def tidy(self, now: float, wall: float) -> None:
        """Takes away what is old, and the oldest beyond what may stay. ``now`` is monotonic, ``wall`` is not."""
        for hex, blob in list(self._blobs.items()):
            if blob.task is None and now - blob.asked > _ALONE:
                del self._blobs[hex]  # the file stays
        if not self._folder.is_dir():
            return
        here = {f"{hex}.blob" for hex in self._blobs}
        files = sorted(
            (f.stat().st_mtime, f.stat().st_size, f) for f in self._folder.glob("*.blob") if f.name not in here
        )
        total = sum(size for _, size, _ in files)
        for at, size, file in files:
            if total > self._keep or wall - at > _STAYS or at > wall + _STAYS:
                file.unlink(missing_ok=True)
                total -= size

    async def stop(self) -> None:
        tasks = [b.task for b in self._blobs.values() if b.task is not None]
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _read(file: Path, offset: int, most: int) -> bytes:
    with file.open("rb") as f:
        f.seek(offset)
        return f.read(most)
