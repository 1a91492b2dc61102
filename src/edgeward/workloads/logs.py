"""What instances wrote: files with a hard cap, read from the end, followed as they grow.

A process appends to its own file directly, so it needs nobody to go on writing while the agent is away. When a file
passes half of its cap it is copied to ``.1`` and cut to nothing in place (the writer appends on). Between copy and cut
a line may be lost. The faster a file grows the sooner it is looked at again (:class:`Growth`): a writer passes the cap
by what it writes within ``SOONEST`` at most, and one that was quiet until then by what it writes within ``LATEST``.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

_CHUNK = 64 * 1024
_LOOK = 0.2
#: Seconds between two looks at a file's size: of one that grows fast, of one that does not.
SOONEST, LATEST = 0.02, 0.1


def rotate(path: Path, cap: int) -> bool:
    """Keeps file and predecessor together within ``cap`` bytes. True when it cut."""
    try:
        size = path.stat().st_size
    except OSError:
        return False
    if size <= cap // 2:
        return False
    old = path.with_name(path.name + ".1")
    keep = min(size, cap // 2)
    try:
        with path.open("rb") as source, old.open("wb") as target:
            source.seek(size - keep)
            shutil.copyfileobj(source, target, _CHUNK)
    except OSError:
        # a full disk: what is cut is lost, but the app and the node live on
        old.unlink(missing_ok=True)
    os.truncate(path, 0)
    return True


class Growth:
    """How fast a file grows, and so when its size must be looked at again. Time is an argument."""

    def __init__(self) -> None:
        self._at = self._rate = 0.0
        self._size = 0

    def look_in(self, now: float, size: int, cap: int) -> float:
        """Seconds until the next look, given the size at this one."""
        if self._at and now > self._at:
            # right after a cut all that is there is new
            grown = size - self._size if size >= self._size else size
            # one quiet look is no reason to trust it
            self._rate = max(grown / (now - self._at), self._rate / 2)
        self._at, self._size = now, size
        if self._rate <= 0:
            return LATEST
        return min(LATEST, max(SOONEST, (cap / 2 - size) / self._rate / 2))

    def cut(self) -> None:
        """The file was cut to nothing."""
        self._size = 0


def tail(path: Path, lines: int) -> bytes:
    """The last ``lines`` lines of a file and its predecessor; reads from the end, in pieces."""
    data = _behind(path, lines)
    missing = lines - data.count(b"\n")
    if missing >= 0:
        data = _behind(path.with_name(path.name + ".1"), missing) + data
    # a line ends with a newline and nothing else: what a progress bar writes is one line
    at = len(data) - data.endswith(b"\n")
    for _ in range(lines):
        at = data.rfind(b"\n", 0, at)
        if at < 0:
            return data
    return data[at + 1 :]


def _behind(path: Path, newlines: int) -> bytes:
    """The file's end with more than so many newlines; all of it when it has no more."""
    try:
        with path.open("rb") as f:
            at = f.seek(0, os.SEEK_END)
            data = b""
            while at > 0 and data.count(b"\n") <= newlines:
                step = min(_CHUNK, at)
                at -= step
                f.seek(at)
                data = f.read(step) + data
            return data
    except OSError:
        return b""


class Marked:
    """Puts a mark before each line of pieces that end anywhere; an empty mark lets everything through as it comes."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._begun = b""

    def feed(self, piece: bytes) -> bytes:
        """The lines that ``piece`` completes."""
        if not self._mark:
            return piece
        *lines, self._begun = (self._begun + piece).split(b"\n")
        if len(self._begun) > _CHUNK:
            lines, self._begun = [*lines, self._begun], b""
        return b"".join(b"%b%b\n" % (self._mark, line) for line in lines)

    def rest(self) -> bytes:
        """The line that was begun and not ended."""
        return self.feed(b"\n") if self._begun else b""


async def follow(path: Path, start: int) -> AsyncIterator[bytes]:
    """What is appended behind byte ``start``, without end; a cut file is read from its beginning."""
    at = start
    while True:
        try:
            size = path.stat().st_size
            if size < at:
                at = 0
            if size > at:
                with path.open("rb") as f:
                    f.seek(at)
                    piece = f.read(min(_CHUNK, size - at))
                at += len(piece)
                if piece:
                    yield piece
                    continue
        except FileNotFoundError:
            return
        await asyncio.sleep(_LOOK)  # the period of looking at a growing file


def changed_since(path: Path, seconds: float) -> bool:
    """Whether the file was written to in the last ``seconds``."""
    try:
        return time.time() - path.stat().st_mtime <= seconds
    except OSError:
        return False
