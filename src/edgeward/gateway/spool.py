"""A large answer on its way to the disk: written in a thread as it comes, so that it costs no memory.

Who brings it is told to wait when the disk falls behind; a disk that stands still is given up, and the answer goes on
to its client all the same. What came whole gets its place; what did not leaves nothing.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from edgeward.gateway import entry
from edgeward.gateway.entry import Blob
from edgeward.gateway.files import Reader

#: Bytes that wait before the target is told to wait, and at most; seconds that it does.
BEHIND, SPOOL, LATE = 2 * 1024**2, 8 * 1024**2, 5.0


class Owner(Protocol):
    """The disk (``disk.py``)."""

    folder: Path
    spools: int

    def room(self, size: int) -> None: ...
    def off(self, error: OSError) -> None: ...


class Spool:
    """A large answer on its way to the disk."""

    def __init__(self, disk: Owner, reader: Reader) -> None:
        self._disk, self._reader = disk, reader
        disk.spools += 1
        self._file = disk.folder / "tmp" / f"{secrets.token_hex(8)}.b"
        self._fd = -1
        self._pieces: deque[bytes] = deque()
        self._waiting = self._total = 0
        self._sums = entry.Sums()
        self._task: asyncio.Task[None] | None = None
        self._over = False
        #: Told when there is room again, or nothing is written any more.
        self.then: Callable[[], None] | None = None
        self._late: asyncio.TimerHandle | None = None

    @property
    def behind(self) -> bool:
        """More waits than is good: :attr:`then` is told when that is over. One that takes too long is given up."""
        return not self._over and self._waiting > BEHIND

    def write(self, data: bytes) -> bool:
        """False: the disk does not keep up, or failed; it is given up."""
        if self._over or (self._waiting and self._waiting + len(data) > SPOOL):
            self.abort()
            return False
        self._pieces.append(data)
        self._waiting += len(data)
        if self._waiting > BEHIND and self._late is None:
            self._late = asyncio.get_running_loop().call_later(LATE, self.abort)
        self._total += len(data)
        self._start()
        return True

    def _start(self) -> None:
        if self._task is None and self._pieces:
            self._task = asyncio.get_running_loop().create_task(self._work())
            self._task.add_done_callback(self._rested)

    def _rested(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if self._over:
            self._clean()
        else:
            self._start()  # a piece that came at the last moment

    async def _work(self) -> None:
        while self._pieces and not self._over:
            data = b"".join(self._pieces)
            self._pieces.clear()
            try:
                await self._reader.run(self._append, data)
            except OSError as e:
                self._disk.off(e)
                self.abort()
                return
            self._waiting -= len(data)
            if not self.behind:
                self._tell()

    def _tell(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
        if self.then is not None:
            self.then()

    def _append(self, data: bytes) -> None:
        self._disk.room(len(data))
        if self._fd < 0:
            self._fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._sums.feed(data)

    async def end(self, file: str) -> Blob | None:
        """All came: the body in its place, or None where it could not be written."""
        while self._task is not None:
            await asyncio.wait({self._task})
        if self._over or self._fd < 0 or self._sums.length != self._total:
            self.abort()
            return None
        blob = Blob(file, self._sums.length, self._sums.end())
        try:
            await self._reader.run(self._file.replace, self._disk.folder / file)
        except OSError as e:
            self._disk.off(e)
            self.abort()
            return None
        self._leave()
        return blob

    def _leave(self) -> None:
        self._over = True
        self._disk.spools -= 1
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def abort(self) -> None:
        """It is not wanted, or could not be written."""
        if self._over:
            return
        self._over = True
        self._pieces.clear()
        self._tell()
        if self._task is None:  # else when its thread is done with the file
            self._clean()

    def _clean(self) -> None:
        self._leave()
        self._file.unlink(missing_ok=True)
