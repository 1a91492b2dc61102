"""What a program writes to its standard output and error: lines of the function's log, within bounds.

A program that has ended for a reason of its own most often said it there, so the last line is kept for the status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from edgeward.core import invocation as wire
from edgeward.core.invocation import MAX_LINE, MAX_LINES

#: How runtimes say that they had no memory left; where groups bound it, the kernel says so.
_NO_MEMORY = ("heap out of memory", "process out of memory", "Out of memory!", "cannot allocate memory")
_LEVEL = 20


class Output(asyncio.Protocol):
    def __init__(self, say: Callable[[wire.Log], None], call: Callable[[], str], spent: Callable[[int], None]) -> None:
        """``say``: takes a line; ``call``: the id of the call in hand; ``spent``: is told of every byte."""
        self._say, self._call, self._spent = say, call, spent
        self._transport: asyncio.BaseTransport | None = None
        self._begun = b""
        self._of, self._lines, self._dropped = "", 0, 0
        #: Set when nothing more comes.
        self.over = asyncio.Event()
        #: The last line that said something.
        self.last = ""
        self.out_of_memory = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._spent(len(data))
        *lines, self._begun = (self._begun + data).split(b"\n")
        if len(self._begun) > MAX_LINE:
            lines, self._begun = [*lines, self._begun], b""
        for line in lines:
            self._line(line)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._begun:
            self._line(self._begun)
        self._told_dropped()
        self.over.set()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _line(self, data: bytes) -> None:
        text = data[:MAX_LINE].decode(errors="replace").rstrip("\r").replace("\0", "")
        if not text.strip():
            return
        self.last = text
        self.out_of_memory = self.out_of_memory or any(words in text for words in _NO_MEMORY)
        call = self._call()
        if call != self._of:
            self._told_dropped()
            self._of, self._lines = call, 0
        self._lines += 1
        if self._lines > MAX_LINES:
            self._dropped += 1
        else:
            self._say(wire.Log(call, _LEVEL, 0.0, text))

    def _told_dropped(self) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._say(wire.Log(self._of, 30, 0.0, f"{dropped} more lines were dropped"))
