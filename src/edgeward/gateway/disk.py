"""The cache's disk: what was kept survives the plane, the power and the cloud; what does not fit is never given.

The loop knows an index: which answer lies in which file, least recently used first. Files are written one after another
in a thread, each under another name first and then put into its place, so a kill leaves the old or the new, and what a
power cut tore is found by its digests (``entry.py``). Nothing is flushed: a cache that lost its last seconds is one
that asks again. What is purged is gone from the disk before the purge is answered. A disk that is full, or fails, is
left alone for a while and said once; the memory goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import shutil
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from edgeward.core import clock
from edgeward.gateway import entry
from edgeward.gateway.cache import Stored, varied
from edgeward.gateway.entry import HEAD, PIECE, SUM, Blob, Damaged, Meta
from edgeward.gateway.files import NotCached, Reader, open_beneath, read_cached
from edgeward.gateway.http1 import Request
from edgeward.gateway.shelf import SECURE, VARIANTS, Key
from edgeward.gateway.spool import Spool

log = logging.getLogger("edgeward.gateway")

#: Bytes that wait to be written, and answers that do; more are kept in memory only.
WAITING, JOBS = 32 * 1024**2, 4096
#: Large answers that are written while they come.
SPOOLS = 4
#: Answers that are useful for less (seconds) are not written; one that was validated is written anew so often.
WORTH, AGAIN = 10.0, 30.0
#: Bytes that are left free for others; seconds that a disk is left alone after it failed; to wait for a read.
RESERVE, PAUSE, LOAD = 64 * 1024**2, 60.0, 10.0
ENTRIES = 20_000
#: Bodies up to this size come back into the memory; larger ones are given from the disk.
PROMOTED = 1024 * 1024
_BLOCK = 4096
_SCAN = 8192


class Mark:
    """What the index knows of a file."""

    __slots__ = ("blob", "control", "fresh_for", "gone", "got", "key", "name", "owner", "size", "tags", "varied")

    def __init__(self, name: str, meta: Meta, size: int) -> None:
        """``size``: bytes of the entry itself."""
        self.name = name
        self.key: Key = meta.key
        self.owner, self.varied, self.tags = meta.owner, tuple(meta.varied), frozenset(meta.tags)
        self.got, self.fresh_for, self.control = meta.got, meta.fresh_for, meta.fields.get("cache-control", "")
        self.blob = meta.file
        self.size = sum(-(-n // _BLOCK) * _BLOCK for n in (size, meta.length))
        self.gone = False


class Disk:
    def __init__(
        self, folder: Path, limit: int, reader: Reader, spawn: Callable[[Coroutine[Any, Any, None]], object],
        say: Callable[[str, str], None], hot: Callable[[Key], bool],
    ) -> None:  # fmt: skip
        """``say``: told the reason and the words of an event. ``hot``: whether a key is in the memory, too."""
        self.folder, self.limit = folder, limit
        self._reader, self._spawn, self._say, self._hot = reader, spawn, say, hot
        self.used = self.evicted = self.skipped = self.dropped = self.loads = 0
        self.trouble = ""
        self._root = -1
        self._closed = False
        self._marks: OrderedDict[str, Mark] = OrderedDict()
        self._keys: dict[Key, list[Mark]] = {}
        self._jobs: deque[tuple[Callable[[], Mark | None], Mark | None, int, asyncio.Future[None] | None]] = deque()
        self._queued = 0
        self._working = False
        self._pending: dict[str, Mark] = {}
        self._loading: dict[str, list[Callable[[Stored | None], None]]] = {}
        self._off_until = 0.0
        self.spools = 0

    def __len__(self) -> int:
        return len(self._marks)

    # -- the beginning -------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Looks at what is there. Raises ``OSError``."""
        root, found = await self._reader.run(self._scan)
        if self._closed:
            os.close(root)
            return
        self._root = root  # from here on it is written to: a look would take what comes for what is left over
        for mark in found:
            self._insert(mark)

    def _scan(self) -> tuple[int, list[Mark]]:
        """What is whole, the oldest first; everything else is removed. In a thread."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        (self.folder / "tmp").mkdir(mode=0o700)
        marks: list[tuple[float, Mark]] = []
        bodies: dict[str, Path] = {}
        for n in range(256):
            part = self.folder / f"{n:02x}"
            part.mkdir(mode=0o700, exist_ok=True)
            with os.scandir(part) as files:
                for file in files:
                    path = Path(file.path)
                    if file.is_dir(follow_symlinks=False):
                        continue
                    if file.is_file(follow_symlinks=False) and path.suffix == ".b":
                        bodies[f"{part.name}/{path.name}"] = path
                        continue
                    mark = self._looked_at(path) if file.is_file(follow_symlinks=False) else None
                    if mark is None:
                        self.dropped += 1
                        path.unlink(missing_ok=True)
                    else:
                        marks.append((file.stat(follow_symlinks=False).st_mtime, mark))
        whole = []
        for _, mark in sorted(marks, key=lambda m: m[0]):
            body = bodies.pop(mark.blob, None) if mark.blob else None
            if mark.blob and (body is None or body.stat().st_size != self._length(mark)):
                self.dropped += 1
                self._path(mark.name).unlink(missing_ok=True)
                if body is not None:
                    body.unlink(missing_ok=True)
            else:
                whole.append(mark)
        for path in bodies.values():
            path.unlink(missing_ok=True)
        return os.open(self.folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), whole

    def _looked_at(self, path: Path) -> Mark | None:
        try:
            with path.open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                data = f.read(_SCAN)
                said, _ = entry.sizes(data, size)
                if HEAD + said > len(data):
                    data += f.read(HEAD + said - len(data))
            meta = entry.meta(data, size)
        except (OSError, Damaged):
            return None
        name = entry.name_of(meta.key, meta.owner, tuple(meta.varied))
        return Mark(name, meta, size) if path == self._path(name) else None

    def _length(self, mark: Mark) -> int:
        data = self._path(mark.name).read_bytes()
        return entry.meta(data, len(data)).length

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.e"

    # -- the index -----------------------------------------------------------------------------------------------------

    def _insert(self, mark: Mark) -> None:
        self._forget(self._marks.get(mark.name))
        self._marks[mark.name] = mark
        variants = self._keys.setdefault(mark.key, [])
        variants.append(mark)
        self.used += mark.size
        if len(variants) > VARIANTS:
            self._remove(variants[0])
        self._shrink()

    def _forget(self, mark: Mark | None) -> None:
        if mark is None or self._marks.get(mark.name) is not mark:
            return
        del self._marks[mark.name]
        self.used -= mark.size
        variants = self._keys[mark.key]
        variants.remove(mark)
        if not variants:
            del self._keys[mark.key]

    def _shrink(self) -> None:
        spared = 0
        while self._marks and (self.used > self.limit or len(self._marks) > ENTRIES):
            mark = next(iter(self._marks.values()))
            if spared < 64 and self._hot(mark.key):  # the memory answers for it, so nobody has looked for it here
                spared += 1
                self._marks.move_to_end(mark.name)
                continue
            self.evicted += 1
            self._remove(mark)

    def resize(self, limit: int) -> None:
        self.limit = limit
        self._shrink()

    def _remove(self, mark: Mark) -> None:
        """Out of the index at once, off the disk soon."""
        mark.gone = True
        self._forget(mark)
        self._do(lambda: self._unlink(mark), None, 0)

    def _unlink(self, mark: Mark) -> None:
        """In the thread. What has taken the name since stays; what will take it is written after this."""
        current = self._marks.get(mark.name)
        if current is None:
            self._path(mark.name).unlink(missing_ok=True)
        if mark.blob and (current is None or current.blob != mark.blob):
            (self.folder / mark.blob).unlink(missing_ok=True)

    def find(self, key: Key, request: Request, owner: str) -> Mark | None:
        """The variant that fits the request."""
        for mark in self._keys.get(key, ()):
            if mark.owner == owner and (
                not mark.varied or mark.varied == varied(request, tuple(n for n, _ in mark.varied))
            ):
                self._marks.move_to_end(mark.name)
                return mark
        return None

    # -- reading -------------------------------------------------------------------------------------------------------

    def load_now(self, mark: Mark) -> Stored | None:
        """The answer, where no disk is needed for it; None: it is damaged, and gone. Raises ``NotCached``."""
        try:
            fd = open_beneath(self._root, f"{mark.name[:2]}/{mark.name}.e", cached=True)
            try:
                data = read_cached(fd, os.fstat(fd).st_size, 0)
            finally:
                os.close(fd)
            if data is None:
                raise NotCached
            stored = self._opened(mark, data)
            if stored.blob is not None and stored.blob.length <= PROMOTED:
                raise NotCached  # its body is read, too
            return stored
        except (OSError, Damaged) as e:
            self._spoilt(mark, e)
            return None

    def load(self, mark: Mark, then: Callable[[Stored | None], None]) -> None:
        """The answer, from a thread; None: there is none. Many wait for one read."""
        waiting = self._loading.get(mark.name)
        if waiting is not None:
            waiting.append(then)
            return
        self._loading[mark.name] = [then]
        self._spawn(self._load(mark))

    async def _load(self, mark: Mark) -> None:
        found: Stored | None = None
        try:
            async with asyncio.timeout(LOAD):
                stored = await self._reader.run(self._read, mark)
            found = None if mark.gone else stored
        except (OSError, TimeoutError, Damaged) as e:
            self._spoilt(mark, e)
        finally:
            for then in self._loading.pop(mark.name, ()):
                then(found)

    def _read(self, mark: Mark) -> Stored:
        """In a thread. A body that fits into the memory comes whole."""
        path = self._path(mark.name)
        with path.open("rb") as f:
            data = f.read(HEAD + entry.META_MOST + PIECE)
        with contextlib.suppress(OSError):
            os.utime(path)  # by which a scan knows what was used last
        stored = self._opened(mark, data)
        if stored.blob is not None and stored.blob.length <= PROMOTED:
            body = (self.folder / stored.blob.file).read_bytes()
            if len(body) != stored.blob.length or entry.sums_of(body) != stored.blob.sums:
                raise Damaged("its body was changed")
            stored.body, stored.blob = body, None
        return stored

    def _opened(self, mark: Mark, data: bytes) -> Stored:
        key, stored = entry.unpack(data)
        if key != mark.key or stored.owner != mark.owner or stored.varied != mark.varied:
            raise Damaged("it is another answer")
        self.loads += 1
        return entry.seen_at(stored, clock.now())

    def _spoilt(self, mark: Mark, why: Exception) -> None:
        log.warning("what was kept of %s cannot be read: %s", "".join(mark.key)[:200], str(why) or type(why).__name__)
        if isinstance(why, Damaged | FileNotFoundError):  # anything else may be better in a moment
            self.dropped += 1
            self._remove(mark)

    async def pieces(self, blob: Blob, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of a large body, each held against its digest. Raises ``OSError`` and ``Damaged``."""
        try:
            fd = open_beneath(self._root, blob.file, cached=True)
        except NotCached:
            fd = await self._reader.run(open_beneath, self._root, blob.file)
        try:
            at = start // PIECE * PIECE
            while at < end:
                size = min(4 * PIECE, blob.length - at)
                data = read_cached(fd, size, at)
                if data is None or len(data) < size:
                    data = await self._reader.run(os.pread, fd, size, at)
                if (
                    len(data) != size
                    or entry.sums_of(data) != blob.sums[at // PIECE * SUM :][: -(-size // PIECE) * SUM]
                ):
                    raise Damaged("a piece of it was changed")
                yield data[max(0, start - at) : min(size, end - at)]
                at += size
        finally:
            os.close(fd)

    def spoilt(self, key: Key, stored: Stored, why: Exception) -> None:
        """From who gave it: its body does not fit."""
        mark = self._marks.get(entry.name_of(key, stored.owner, stored.varied))
        if mark is not None:
            self._spoilt(mark, why)

    # -- writing -------------------------------------------------------------------------------------------------------

    def keep(self, key: Key, stored: Stored, *, same_body: bool = False) -> bool:
        """Soon; False: not on the disk. ``same_body``: only what is said of it is new."""
        name = entry.name_of(key, stored.owner, stored.varied)
        old = self._marks.get(name)
        useful = stored.fresh_for + max(stored.stale_if_error, stored.stale_while_revalidate)
        size = len(stored.body)
        if useful < WORTH or size > self.limit // 4 or not self._may(size):
            self.skipped += useful >= WORTH
            if old is not None:  # it would come back as if it were the newest
                self._remove(old)
            return False
        control = stored.fields.get("cache-control", "")
        same = same_body and old is not None
        told = same and old is not None and (old.control, old.fresh_for) == (control, stored.fresh_for)
        if told and old is not None and stored.got - old.got < AGAIN:
            return True
        blob = stored.blob
        if blob is None and size > PIECE:
            new = Blob(f"{name[:2]}/{name}-{secrets.token_hex(4)}.b", size, b"")
            blob = Blob(old.blob, size, b"") if same and old is not None and old.blob else new
        meta = entry.meta_of(key, stored, blob)
        mark = Mark(name, meta, HEAD + 1024 + (0 if blob else size))
        self._pending[name] = mark
        fresh = old is None or mark.blob != old.blob
        self._do(lambda: self._write(mark, meta, stored.body, fresh=fresh), mark, size)
        return True

    def _may(self, size: int) -> bool:
        return (
            clock.monotonic() >= self._off_until and self._queued + size <= WAITING and len(self._jobs) < JOBS
            and self._root >= 0
        )  # fmt: skip

    def _write(self, mark: Mark, meta: Meta, body: bytes, *, fresh: bool) -> Mark | None:
        """In the thread. ``fresh``: the body is not on the disk yet. Raises ``OSError``."""
        if mark.gone or self._pending.get(mark.name) is not mark:
            return None
        self.room(len(body))
        if meta.file and not meta.sums:
            meta.sums = entry.sums_of(body)
            if fresh:
                self._put(meta.file, body)
        data = entry.pack(meta, b"" if meta.file else body)
        self._put(f"{mark.name[:2]}/{mark.name}.e", data)
        mark.size = sum(-(-n // _BLOCK) * _BLOCK for n in (len(data), meta.length))
        return mark

    def room(self, size: int) -> None:
        """Raises ``OSError`` where too little would be left for others."""
        free = os.statvfs(self.folder)
        if free.f_bavail * free.f_frsize < RESERVE + size or not free.f_favail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _put(self, file: str, data: bytes) -> None:
        """The whole of it, or nothing."""
        tmp = self.folder / "tmp" / secrets.token_hex(8)
        try:
            with tmp.open("xb") as out:
                out.write(data)
            tmp.replace(self.folder / file)
        except OSError:
            tmp.unlink(missing_ok=True)
            raise

    def _do(
        self, work: Callable[[], Mark | None], mark: Mark | None, size: int, done: asyncio.Future[None] | None = None
    ) -> None:
        """One after another, in the order of their coming."""
        self._jobs.append((work, mark, size, done))
        self._queued += size
        if not self._working:
            self._working = True
            self._spawn(self._work())

    async def _work(self) -> None:
        try:
            while self._jobs:
                work, mark, size, done = self._jobs[0]
                made: Mark | None = None
                try:
                    made = await self._reader.run(work)
                except OSError as e:
                    self._failed(e, mark)
                finally:
                    self._jobs.popleft()
                    self._queued -= size
                if mark is not None:
                    self._written(mark, made)
                if done is not None and not done.done():
                    done.set_result(None)
        finally:
            self._working = False

    def _written(self, mark: Mark, made: Mark | None) -> None:
        wanted = self._pending.get(mark.name)
        if wanted is mark:
            del self._pending[mark.name]
        if made is None or mark.gone:
            self._do(lambda: self._unlink(mark), None, 0)
            return
        if self.trouble:
            self.trouble = ""
            self._say("CacheDiskBack", "the disk takes the cache's answers again")
        old = self._marks.get(mark.name)
        self._insert(mark)
        if old is not None and old.blob and old.blob != mark.blob:
            stale = self.folder / old.blob
            self._do(lambda: stale.unlink(missing_ok=True), None, 0)

    def _failed(self, error: OSError, mark: Mark | None) -> None:
        if mark is None:
            log.warning("a file of the cache cannot be removed: %s", error)
            return
        old = self._marks.get(mark.name)
        if old is not None:
            self._remove(old)
        self.off(error)

    def off(self, error: OSError) -> None:
        """The disk is full, or fails: it is left alone for a while, and that is said once."""
        if self._closed:
            return
        self.skipped += 1
        self._off_until = clock.monotonic() + PAUSE
        why = error.strerror or str(error)
        if not self.trouble:
            self._say("CacheDiskFailed", f"answers are kept in memory only: {why} ({self.folder})")
        self.trouble = why

    # -- large answers, while they come --------------------------------------------------------------------------------

    def spool(self, size: int) -> Spool | None:
        """For an answer of ``size`` bytes (0: not known). None: not now."""
        if self.spools >= SPOOLS or size > self.limit // 2 or not self._may(0):
            return None
        return Spool(self, self._reader)

    def finish(self, spool: Spool, key: Key, stored: Stored) -> None:
        """All of it came: it gets its place when it is written."""
        self._spawn(self._finish(spool, key, stored))

    async def _finish(self, spool: Spool, key: Key, stored: Stored) -> None:
        name = entry.name_of(key, stored.owner, stored.varied)
        blob = await spool.end(f"{name[:2]}/{name}-{secrets.token_hex(4)}.b")
        if blob is None:
            return
        stored.blob = blob
        if not self.keep(key, stored):
            body = self.folder / blob.file
            self._do(lambda: body.unlink(missing_ok=True), None, 0)

    # -- taking away ---------------------------------------------------------------------------------------------------

    def drop(self, key: Key) -> int:
        """All variants of a key; gives how many there were."""
        marks = [*self._keys.get(key, ()), *(m for m in self._pending.values() if m.key == key)]
        for mark in marks:
            self._drop(mark)
        return len(marks)

    def _drop(self, mark: Mark) -> None:
        if self._pending.get(mark.name) is mark:
            del self._pending[mark.name]
        self._remove(mark)

    def purge(self, *, host: str = "", path: str = "", prefix: str = "", tag: str = "") -> list[Mark]:
        """As ``Shelf.purge``; after :meth:`settle` what went is off the disk."""
        gone = []
        for mark in [*self._marks.values(), *self._pending.values()]:
            key = mark.key
            if host and key[0].removeprefix(SECURE) != host.lower():
                continue
            if (tag in mark.tags) if tag else ((path and key[1] == path) or (prefix and key[1].startswith(prefix))):
                self._drop(mark)
                gone.append(mark)
        return gone

    async def settle(self) -> None:
        """Until what waits now to be written or removed is."""
        done = asyncio.get_running_loop().create_future()
        self._do(lambda: None, None, 0, done)
        await done

    def close(self) -> None:
        self._closed = True
        if self._root >= 0:
            os.close(self._root)
            self._root = -1
