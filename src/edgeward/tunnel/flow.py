"""One stream of a tunnel: bytes both ways, each way ended by itself, each with its own credit.

Two ways to use it. A service reads and writes like with a socket (:meth:`Stream.read`, :meth:`Stream.write`). What only
passes bytes on attaches a :class:`Sink` instead and is called; then nothing waits in between, and no task is woken for
each piece. Either way what was not taken yet is not credited, so a sender stops when the reader does, and stops alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from edgeward.core.errors import (
    EdgewardError,
    Forbidden,
    Gone,
    Invalid,
    NotFound,
    Refused,
    TooMany,
    TooSlow,
    Unreachable,
    from_problem,
)
from edgeward.tunnel import framing
from edgeward.tunnel.credit import Window

if TYPE_CHECKING:
    from edgeward.tunnel.session import Session

#: Bytes that may wait in a stream for credit before its writer is held, and under which it goes on.
HIGH, LOW = 256 * 1024, 64 * 1024
_CODES: dict[str, type[EdgewardError]] = {
    "refused": Refused,
    "unreachable": Unreachable,
    "forbidden": Forbidden,
    "invalid": Invalid,
    "missing": NotFound,
    "gone": Gone,
    "slow": TooSlow,
    "many": TooMany,
}


class Sink:
    """What is called with what comes on a stream. Every method may be left as it is."""

    def received(self, data: bytes) -> None:
        """More bytes. Call ``stream.consumed(len(data))`` when they are out of your hands."""

    def ended(self) -> None:
        """The other side sends no more."""

    def failed(self, error: EdgewardError) -> None:
        """The stream is no more, both ways."""

    def writable(self) -> None:
        """Less than :data:`LOW` waits to be sent."""

    def sent(self, n: int) -> None:
        """So many bytes of what was given to the stream are on their way."""

    def accepted(self, info: dict[str, Any]) -> None:
        """The other side serves the stream."""


class Stream:
    """Made by :meth:`Session.open` and by sessions for what the other side opens."""

    __slots__ = (
        "_accepted",
        "_buffer",
        "_closed",
        "_failed",
        "_reader",
        "_session",
        "_sink",
        "_waiters",
        "came",
        "credit",
        "end_received",
        "end_sent",
        "ending",
        "error",
        "id",
        "info",
        "moved",
        "out",
        "purpose",
        "queued",
        "waiting",
        "went",
        "window",
    )  # fmt: skip

    def __init__(self, session: Session, id: int, purpose: framing.Open, now: float) -> None:
        self._session = session
        self.id = id
        self.purpose = purpose
        self.window = Window(now)
        #: Bytes that may be sent, the pieces that wait to be, and their size.
        self.credit = framing.FIRST
        self.out: deque[bytes] = deque()
        self.waiting = 0
        self.queued = False
        self.ending = self.end_sent = self.end_received = False
        self.error: EdgewardError | None = None
        #: Bytes that came and went, and when the last did.
        self.came = self.went = 0
        self.moved = now
        self.info: dict[str, Any] | None = None
        self._sink: Sink | None = None
        self._buffer: deque[bytes] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._accepted: asyncio.Future[None] | None = None
        self._closed: list[asyncio.Future[None]] = []
        self._failed: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        return f"<stream {self.id} {self.purpose.service} of {self._session.name}>"

    # -- sending ---------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> int:
        """Takes the data, whatever waits already; gives the bytes that wait now. Nothing is sent on a dead stream."""
        if data and self.error is None and not self.ending:
            self.out.append(data)
            self.waiting += len(data)
            self._session.wants(self)
        return self.waiting

    async def write(self, data: bytes) -> None:
        """Raises what the stream was reset with."""
        if self.error is not None:
            raise self.error
        if self.send(data) >= HIGH:
            future = asyncio.get_running_loop().create_future()
            self._waiters.append(future)
            await future
            self._check()

    def end(self) -> None:
        """No more data from this side."""
        if not self.ending and self.error is None:
            self.ending = True
            self._session.wants(self)

    def reset(self, code: str, why: str) -> None:
        """Ends the stream both ways; ``code``: one of refused, unreachable, forbidden, invalid, missing, gone, slow,
        many, failed."""
        self.fail(_CODES.get(code, EdgewardError)(why))

    def fail(self, error: EdgewardError) -> None:
        """Ends the stream both ways with an error that the other side gets."""
        if self.error is None and not self.closed:
            self._session.drop(self, error)
            self.failed(error, told=False)

    def accept(self, info: dict[str, Any] | None = None) -> None:
        """Tells the other side that the stream is served."""
        if self.error is None:
            self._session.control(framing.frame(framing.OPENED, self.id, msgspec.msgpack.encode(info or {})))

    # -- receiving -------------------------------------------------------------------------------------------------

    def attach(self, sink: Sink) -> None:
        """From now on ``sink`` is called; at once with what is there already."""
        self._sink = sink
        while self._buffer:
            sink.received(self._buffer.popleft())
        if self.info is not None:
            sink.accepted(self.info)
        if self.error is not None:
            sink.failed(self.error)
        elif self.end_received:
            sink.ended()

    async def read(self, n: int = 65536) -> bytes:
        """At most ``n`` bytes; ``b""`` at the end. Raises what the stream was reset with."""
        while not self._buffer:
            if self.error is not None:
                raise self.error
            if self.end_received:
                return b""
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        data = self._buffer.popleft()
        if len(data) > n:
            self._buffer.appendleft(data[n:])
            data = data[:n]
        self.consumed(len(data))
        return data

    async def readexactly(self, n: int) -> bytes:
        """Raises ``Gone`` when the stream ends before."""
        parts, missing = [], n
        while missing:
            data = await self.read(missing)
            if not data:
                raise Gone(f"the stream ended {missing} bytes early")
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    async def opened(self) -> dict[str, Any]:
        """What the other side said when it began to serve the stream. Raises what it refused it with."""
        if self.info is None:
            self._check()
            if self._accepted is None:
                self._accepted = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._accepted)
            self._check()
        return self.info or {}

    def consumed(self, n: int) -> None:
        """So many of the bytes that came are out of our hands."""
        if self.error is None and not self.end_received:
            self._session.took(self, n)

    async def wait_closed(self) -> None:
        """Until both ways have ended, or the stream is no more."""
        if not self.closed:
            future = asyncio.get_running_loop().create_future()
            self._closed.append(future)
            await future

    async def wait_failed(self) -> None:
        """Until the stream is reset."""
        if self.error is None:
            future = asyncio.get_running_loop().create_future()
            self._failed.append(future)
            await future

    @property
    def session(self) -> Session:
        return self._session

    @property
    def closed(self) -> bool:
        return self.error is not None or (self.end_sent and self.end_received)

    # -- what the session tells ------------------------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        self.came += len(data)
        if self._sink is not None:
            self._sink.received(data)
            return
        self._buffer.append(data)
        self._wake_reader()

    def ended(self) -> None:
        self.end_received = True
        if self._sink is not None:
            self._sink.ended()
        self._wake_reader()
        self._settled()

    def said(self, info: dict[str, Any]) -> None:
        self.info = info
        if self._accepted is not None and not self._accepted.done():
            self._accepted.set_result(None)
        if self._sink is not None:
            self._sink.accepted(info)

    def drained(self, n: int) -> None:
        """``n`` bytes were put on the link."""
        self.went += n
        if self._sink is not None:
            self._sink.sent(n)
        if self.waiting < LOW:
            if self._waiters:
                self._wake(self._waiters)
            if self._sink is not None:
                self._sink.writable()

    def was_ended(self) -> None:
        self.end_sent = True
        self._settled()

    def failed(self, error: EdgewardError, *, told: bool = True) -> None:
        """The stream is no more; ``told``: the other side said so, or the session ended."""
        if self.error is not None:
            return
        self.error = error
        self.out.clear()
        self.waiting = 0
        if self._accepted is not None and not self._accepted.done():
            self._accepted.set_result(None)
        self._wake(self._waiters)
        self._wake_reader()
        self._wake(self._closed)
        self._wake(self._failed)
        if self._sink is not None:
            self._sink.failed(error)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _settled(self) -> None:
        if self.closed:
            self._wake(self._closed)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    @staticmethod
    def _wake(waiters: list[asyncio.Future[None]]) -> None:
        for future in waiters:
            if not future.done():
                future.set_result(None)
        waiters.clear()


def error_of(payload: bytes) -> EdgewardError:
    """The error in a RESET or a BYE."""
    try:
        doc = msgspec.msgpack.decode(payload, type=dict[str, Any]) if payload else {}
        return from_problem(doc, int(doc.get("status", 500)))
    except (msgspec.DecodeError, msgspec.ValidationError, TypeError, ValueError):
        return EdgewardError("the other side ended it without a readable reason")
