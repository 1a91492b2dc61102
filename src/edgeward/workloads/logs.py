"""What instances wrote: read from the end, followed as it grows.

The pump (``pump.py``) writes ``<instance>.log`` and makes it ``.log.1`` when it is full. An :class:`Output` reads the
two as the one text that they are: its ``follow`` goes on right behind its ``tail``, over any number of new files, and
says so where the writer was faster than the reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

_CHUNK = 64 * 1024
#: Bytes of a line that is a record, and of no use in pieces.
_RECORD = 2 * 1024 * 1024
#: Seconds between two looks at a file that grew, and at one that does not.
_LOOKS = (0.02, 0.2)
GAP = b"[edgeward: it wrote faster than this was read: something may be missing here]\n"


def _open(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb", buffering=0)
    except OSError:
        return None


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


class Output:
    """One instance's output, from a moment on. Close it; what it has open keeps no byte on the disk."""

    def __init__(self, path: Path) -> None:
        self.path, self._old = path, path.with_name(path.name + ".1")
        self._file: BinaryIO | None = None
        self._at = 0
        #: The last byte given ended a line.
        self._even = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _pair(self) -> tuple[BinaryIO | None, BinaryIO | None]:
        """The file that is written to and the one before it, as they were at one moment."""
        for _ in range(20):
            now = _open(self.path)
            old = _open(self._old)
            if now is not None and _same(now, self.path):
                break
            for file in (now, old):
                if file is not None:
                    file.close()
            now = old = None
        return now, old

    def tail(self, lines: int) -> bytes:
        """The last ``lines`` lines up to this moment; reads from the end, in pieces."""
        self.close()
        now, old = self._pair()
        self._file = now
        try:
            self._at = os.fstat(now.fileno()).st_size if now is not None else 0
            data = _behind(now, self._at, lines)
            missing = lines - data.count(b"\n")
            if missing >= 0 and old is not None:
                data = _behind(old, os.fstat(old.fileno()).st_size, missing) + data
        finally:
            if old is not None:
                old.close()
        self._even = not data or data.endswith(b"\n")
        # a line ends with a newline and nothing else: what a progress bar writes is one line
        at = len(data) - data.endswith(b"\n")
        for _ in range(lines):
            at = data.rfind(b"\n", 0, at)
            if at < 0:
                return data
        return data[at + 1 :]

    def mark(self, back: int = 0) -> str:
        """Where it stands, or ``back`` bytes before that, for :meth:`resume`; "" when it cannot be said."""
        at = self._at - back
        if self._file is None or at < 0:
            return ""
        return f"{os.fstat(self._file.fileno()).st_ino}.{at}.{_sum(self._file, at)}"

    def resume(self, mark: str) -> bool:
        """Goes on where a reader of an earlier process stood. False: what was behind that may be gone, and it begins
        with the oldest (as for no mark at all)."""
        self.close()
        now, old = self._pair()
        inode, _, rest = mark.partition(".")
        at = int(rest.partition(".")[0] or 0) if rest.partition(".")[0].isdecimal() else 0
        found = None
        for file in (now, old):
            if file is not None and found is None:
                stat = os.fstat(file.fileno())
                if str(stat.st_ino) == inode and stat.st_size >= at and mark == f"{inode}.{at}.{_sum(file, at)}":
                    found = file
        self._file, self._at = (found, at) if found is not None else (old or now, 0)
        for file in (now, old):
            if file is not None and file is not self._file:
                file.close()
        return found is not None

    async def follow(self) -> AsyncIterator[bytes]:
        """What is written from where :meth:`tail` ended (or the beginning), until the files are gone."""
        pause = _LOOKS[0]
        while True:
            piece = self._next()
            if piece is None:
                return
            if piece:
                pause = _LOOKS[0]
                yield piece
            else:
                await asyncio.sleep(pause)  # the period of looking at a growing file
                pause = min(pause * 2, _LOOKS[1])

    def _next(self) -> bytes | None:
        """What comes next, b"" when nothing is there yet, None when nothing will be."""
        if self._file is None:
            self._file, self._at = _open(self.path), 0
        if self._file is None:  # between two files, or gone
            return b"" if self._old.exists() else None
        if piece := self._read(self._file):
            return piece
        if _same(self._file, self.path):
            if os.fstat(self._file.fileno()).st_size < self._at:
                self._at = 0  # cut in place
            return b""
        # a new one was begun: what came before that and after our last look is in ours
        return self._read(self._file) or self._turn(self._file)

    def _read(self, file: BinaryIO) -> bytes:
        piece = os.pread(file.fileno(), _CHUNK, self._at)
        self._at += len(piece)
        if piece:
            self._even = piece.endswith(b"\n")
        return piece

    def _turn(self, mine: BinaryIO) -> bytes | None:
        """Goes on to the file behind ours."""
        if not self.path.exists():
            return b"" if self._old.exists() else None
        now, old = self._pair()
        if now is None:
            if old is not None:
                old.close()
            return b""
        in_time = old is None or _same(mine, self._old)
        mine.close()
        self._at = 0
        if in_time or old is None:
            self._file = now
            if old is not None:
                old.close()
            return b""
        self._file = old
        now.close()
        return GAP if self._even else b"\n" + GAP


def _sum(file: BinaryIO, at: int) -> int:
    """Of the bytes before ``at``: an inode's number comes again, what was written does not."""
    start = max(0, at - 256)
    return zlib.crc32(os.pread(file.fileno(), at - start, start))


def _behind(file: BinaryIO | None, end: int, newlines: int) -> bytes:
    """The part of a file before ``end`` with more than so many newlines; all of it when it has no more."""
    data = b""
    with contextlib.suppress(OSError):
        while file is not None and end > 0 and data.count(b"\n") <= newlines:
            step = min(_CHUNK, end)
            end -= step
            data = os.pread(file.fileno(), step, end) + data
    return data


class Marked:
    """Puts a mark before each line of pieces that end anywhere.

    An empty mark lets everything through as it comes; with ``whole`` line by line, so that it can be mixed with others.
    """

    def __init__(self, mark: bytes, *, whole: bool = False) -> None:
        self._mark, self._whole = mark, whole
        self._begun = b""

    def feed(self, piece: bytes) -> bytes:
        """The lines that ``piece`` completes."""
        if not self._mark and not self._whole:
            return piece
        *lines, self._begun = (self._begun + piece).split(b"\n")
        if len(self._begun) > (_CHUNK if self._mark else _RECORD):
            lines, self._begun = [*lines, self._begun], b""
        return b"".join(b"%b%b\n" % (self._mark, line) for line in lines)

    @property
    def begun(self) -> int:
        """Bytes of a line that was begun: fed, and not given yet."""
        return len(self._begun)

    def rest(self) -> bytes:
        """The line that was begun and not ended."""
        return self.feed(b"\n") if self._begun else b""


def changed_since(path: Path, seconds: float) -> bool:
    """Whether the file was written to in the last ``seconds``."""
    try:
        return time.time() - path.stat().st_mtime <= seconds
    except OSError:
        return False
