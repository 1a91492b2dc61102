"""A function's log: one JSON line each, two files that together never pass the cap, the oldest half goes first.

The plane is the only writer, so the cap is kept to the byte. Lines are gathered for a moment and written together; what
would have to wait longer than the buffer allows is counted. The agent reads, so a long log costs no caller of a
function anything; lines are filtered there, at the edge, before anything leaves the node.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core.errors import Invalid
from edgeward.functions.sieve import BATCH, Sieve

#: Bytes that wait to be written; more are dropped and counted.
_BUFFER = 1 << 20
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
#: Seconds between two looks at a log that is followed.
_LOOK = 0.2
#: Lines that an expression is held against at most, the newest.
_MOST = 1_000_000
_encode = msgspec.json.Encoder().encode


class Line(msgspec.Struct, omit_defaults=True):
    time: str
    level: str
    message: str
    invocation: str = ""
    version: str = ""
    fields: dict[str, Any] = {}


def level_name(level: int) -> str:
    """The name of the highest level that a number reaches."""
    return next((name for name, n in reversed(LEVELS.items()) if level >= n), "debug")


class LogFile:
    """What one function wrote on this node."""

    def __init__(self, path: Path, cap: int) -> None:
        self.path, self.cap = path, cap
        self._old = path.with_name(path.name + ".1")
        self._buffer = bytearray()
        #: Lines that were lost because the disk could not keep up, or was full.
        self.dropped = 0
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(self, line: Line) -> bool:
        """Takes a line; True when it is the first that waits for :meth:`flush`."""
        first = not self._buffer
        return self.add_raw(_encode(line)) and first

    def add_raw(self, data: bytes) -> bool:
        """Takes a line as it is to stand there; False when there is no room."""
        if len(self._buffer) + len(data) > _BUFFER or len(data) > self.cap // 4:
            self.dropped += 1
            return False
        self._buffer += data
        self._buffer += b"\n"
        return True

    def flush(self) -> None:
        """Writes what waits. A disk that is full costs the lines, not the function."""
        data, self._buffer = bytes(self._buffer), bytearray()
        half = self.cap // 2
        try:
            size = self.path.stat().st_size
        except OSError:
            size = 0
        try:
            while data:
                room = half - size
                cut = len(data) if len(data) <= room else data.rfind(b"\n", 0, max(0, room)) + 1
                if cut:
                    with self.path.open("ab") as f:
                        f.write(data[:cut])
                    data = data[cut:]
                if data:
                    if self.path.exists():
                        self.path.replace(self._old)
                    size = 0
        except OSError:
            self.dropped += data.count(b"\n")

    def remove(self) -> None:
        for path in (self.path, self._old):
            path.unlink(missing_ok=True)

    def end(self) -> int:
        """Where a follower begins."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def lines(self, wanted: Callable[[Line], bool], tail: int) -> list[Line]:
        """The last ``tail`` lines that are wanted, oldest first."""
        found: list[Line] = []
        for path in (self.path, self._old):
            try:
                data = path.read_bytes()
            except OSError:
                continue
            for line in _decoded(reversed(data.splitlines())):
                if len(found) >= tail:
                    break
                if wanted(line):
                    found.append(line)
        return found[::-1]

    def raw(self, wanted: Callable[[bytes], bool]) -> list[bytes]:
        """The lines that are wanted, as they stand there, oldest first."""
        found: list[bytes] = []
        for path in (self._old, self.path):
            with contextlib.suppress(OSError):
                found += filter(wanted, path.read_bytes().splitlines())
        return found

    def read(self, at: int) -> tuple[list[Line], int]:
        """What came behind byte ``at``, and where it ends; a file that was begun anew is read from its beginning."""
        size = self.end()
        if size < at:
            at = 0
        if size == at:
            return [], at
        with self.path.open("rb") as f:
            f.seek(at)
            data = f.read(_BUFFER)
        whole = data.rfind(b"\n") + 1
        return list(_decoded(data[:whole].splitlines())), at + whole


def _decoded(lines: Any) -> Iterator[Line]:
    for line in lines:
        with contextlib.suppress(msgspec.DecodeError):
            yield msgspec.json.decode(line, type=Line)


def log_path(folder: Path, namespace: str, name: str) -> Path:
    """Where a function's log lies below the node's ``functions/``."""
    return folder / "logs" / namespace / f"{name}.log"


def wanted(*, level: str = "", since: str = "", text: str = "", invocation: str = "") -> Callable[[Line], bool]:
    """What a reader asked for; ``since`` is a timestamp. Raises ``Invalid``.

    ``text`` is plain text: regular expressions are for a process of their own (``sieve.py``).
    """
    if level and level not in LEVELS:
        raise Invalid(f"{level[:20]!r} is no level", field="?level", remedy=", ".join(LEVELS))
    if len(text) > 200:
        raise Invalid("is too long", field="?grep", remedy="at most 200 characters")
    least = LEVELS.get(level, 0)

    def is_wanted(line: Line) -> bool:
        return (
            LEVELS.get(line.level, 0) >= least
            and line.time >= since
            and (not invocation or line.invocation == invocation)
            and text in line.message
        )

    return is_wanted


def text_of(line: Line) -> str:
    """A line for people."""
    fields = "".join(f" {k}={v}" for k, v in line.fields.items())
    where = f" {line.invocation}" if line.invocation else ""
    return f"{line.time} {line.level.upper():<7} {line.version}{where} {line.message}{fields}\n"


def problem_line(why: str, node: str, *, as_json: bool) -> bytes:
    """What stands where lines cannot be had."""
    return _encode({"node": node, "error": why}) + b"\n" if as_json else f"edgeward: {why}\n".encode()


async def read(
    file: LogFile,
    is_wanted: Callable[[Line], bool],
    tail: int,
    *,
    follow: bool,
    as_json: bool,
    regex: str = "",
    node: str = "",
) -> Any:
    """The last ``tail`` lines that are wanted, then what comes, as bytes; another process writes the file.

    ``regex``: of them only those with this expression in their message; one that takes too long ends it with a line
    that says so. ``node``: stands in each record (``as_json``), so that those of several nodes can be told apart.
    """
    head = b'{"node":%b,' % _encode(node)

    def shown(lines: list[Line]) -> bytes:
        if as_json:
            return b"".join(head + _encode(line)[1:] + b"\n" for line in lines)
        return "".join(map(text_of, lines)).encode("utf-8", "replace")

    at = file.end()
    async with contextlib.AsyncExitStack() as stack:
        sieve = await stack.enter_async_context(Sieve(regex)) if regex else None
        try:
            found = await asyncio.to_thread(file.lines, is_wanted, _MOST if sieve else tail)
            if found := await _sifted(sieve, found, tail):
                yield shown(found)
            while follow:
                await asyncio.sleep(_LOOK)  # the period of looking at a growing file
                lines, at = file.read(at)
                found = [line for line in lines if is_wanted(line)]
                if found := await _sifted(sieve, found, len(found)):
                    yield shown(found)
        except Invalid as e:
            yield problem_line(str(e), node, as_json=as_json)


async def _sifted(sieve: Sieve | None, lines: list[Line], tail: int) -> list[Line]:
    """The last ``tail`` of the lines that the sieve lets through; it looks at no more than it must."""
    if sieve is None:
        return lines
    found: list[Line] = []
    for end in range(len(lines), 0, -BATCH):
        batch = lines[max(0, end - BATCH) : end]
        kept = await sieve.matches([line.message for line in batch])
        found = [line for line, is_kept in zip(batch, kept, strict=True) if is_kept] + found
        if len(found) >= tail:
            break
    return found[-tail:] if tail else []
