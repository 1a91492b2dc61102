"""What a service on the tunnel works with: a stream, and what was asked when it was opened.

A *stream* is two directions of bytes with credit: who writes waits until the other end has room, so a reader that
stalls stops its writer and nobody else. Either direction ends by itself (half-close); a reset ends both, with a reason.
The transport makes streams (``session.py``); services (``exec.py``, ``copy.py``) only use them, so :func:`pair`, two
ends in memory, is enough to test one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Protocol

from edgeward.core.errors import EdgewardError
from edgeward.tunnel.framing import Open

__all__ = ["Open", "Reset", "Service", "Stream", "pair"]

#: Bytes that a writer may be ahead of its reader.
WINDOW = 256 * 1024


class Reset(EdgewardError):
    """The stream was ended, by the other side or because the link is lost. ``code``: a word for machines."""

    reason: ClassVar[str] = "Reset"

    def __init__(self, code: str, why: str = "", **where: Any) -> None:
        super().__init__(why or f"the stream was ended: {code}", **where)
        self.code, self.why = code, why


class Stream(Protocol):
    """One end. One task may read and another write at the same time."""

    async def accept(self, info: dict[str, Any] | None = None) -> None:
        """At the node: the service works; ``info`` goes to who opened it."""

    async def read(self, n: int = 65536) -> bytes:
        """Some bytes, at most ``n``; ``b""`` after the other side's end. Raises ``Reset``."""

    async def write(self, data: bytes) -> None:
        """Returns when all of it is on its way and within the credit. Raises ``Reset``."""

    async def end(self) -> None:
        """Nothing more is written; reading goes on."""

    def reset(self, code: str, why: str) -> None:
        """Both directions are over, for both sides; what was not read yet is dropped."""


#: Serves one stream; what it raises resets the stream with its words, and when it is cancelled it cleans up first.
Service = Callable[[Open, Stream], Awaitable[None]]


class _Way:
    """One direction in memory."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.pieces: deque[bytes] = deque()
        self.held, self.ended = 0, False
        self.error: Reset | None = None
        self.moved = asyncio.Condition()

    async def put(self, data: bytes) -> None:
        view = memoryview(data)
        async with self.moved:
            while view:
                await self.moved.wait_for(lambda: self.error or self.held < self.window)
                if self.error:
                    raise self.error
                if self.ended:
                    raise Reset("ended", "this side of the stream has ended")
                piece = bytes(view[: self.window - self.held])
                view = view[len(piece) :]
                self.pieces.append(piece)
                self.held += len(piece)
                self.moved.notify_all()

    async def take(self, n: int) -> bytes:
        async with self.moved:
            await self.moved.wait_for(lambda: self.error or self.pieces or self.ended)
            if self.error:
                raise self.error
            if not self.pieces:
                return b""
            piece = self.pieces.popleft()
            if len(piece) > n:
                self.pieces.appendleft(piece[n:])
                piece = piece[:n]
            self.held -= len(piece)
            self.moved.notify_all()
            return piece

    async def close(self) -> None:
        async with self.moved:
            self.ended = True
            self.moved.notify_all()

    async def tell(self) -> None:
        async with self.moved:
            self.moved.notify_all()


class MemoryStream:
    """One end of a :func:`pair`."""

    def __init__(self, inward: _Way, outward: _Way) -> None:
        self._in, self._out = inward, outward
        self._tasks: set[asyncio.Task[None]] = set()
        self.info: dict[str, Any] | None = None

    async def accept(self, info: dict[str, Any] | None = None) -> None:
        self.info = info or {}

    async def read(self, n: int = 65536) -> bytes:
        return await self._in.take(n)

    async def write(self, data: bytes) -> None:
        await self._out.put(data)

    async def end(self) -> None:
        await self._out.close()

    def reset(self, code: str, why: str = "") -> None:
        for way in (self._in, self._out):
            way.error = way.error or Reset(code, why)
            way.pieces.clear()
            task = asyncio.ensure_future(way.tell())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


def pair(window: int = WINDOW) -> tuple[MemoryStream, MemoryStream]:
    """Two ends of one stream in this process."""
    there, back = _Way(window), _Way(window)
    return MemoryStream(back, there), MemoryStream(there, back)
