"""A client's connection: bytes in, requests out, answers back in the order of the requests.

The door reads heads strictly, keeps the time of slow ones, and gives bodies on piece by piece while somebody takes
them. Answers that are in the memory it writes itself, without any task. After a refusal that leaves the connection in
doubt it answers, waits a moment for the client to read that, and closes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from edgeward.gateway.answers import problem
from edgeward.gateway.cache import Stored
from edgeward.gateway.desk import BODY_TIME, HEAD_TIME, IDLE_TIME, LINGER_TIME, PACE, WHOLE, Desk, refusal
from edgeward.gateway.http1 import (
    CHUNKED,
    REFUSED,
    UNTOUCHED,
    Bad,
    Chunks,
    Headers,
    Request,
    check_partial,
    write_response,
)
from edgeward.gateway.shelf import hit_head
from edgeward.gateway.site import Kept

if TYPE_CHECKING:
    from edgeward.gateway.gate import Gate
    from edgeward.gateway.openings import Opening
    from edgeward.gateway.peer import Peer

#: What a client may send ahead while its request is being answered.
AHEAD = 64 * 1024
_LINGER_BYTES = 1024 * 1024


class Door(Desk, asyncio.Protocol):
    """One connection of one client."""

    def __init__(self, gate: Gate, listener: Opening | None = None, peer: Peer | None = None) -> None:
        super().__init__(gate)
        self.listener, self.peer = listener, peer
        self._scheme = "http" if listener is None or listener.config.tls is None else "https"
        self._known = gate.known(self._scheme, peer)
        self.transport: asyncio.Transport | None = None
        self.deadline = gate.loop.time() + HEAD_TIME
        self._buffer = b""
        self._left = 0
        self._chunks: Chunks | None = None
        self._body = False
        self._body_size = 0
        self._paused = False
        self._lingering = 0
        self._in_heads = False
        self._head_begun = self._served = False

    # -- the transport's side ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = self.transport.get_extra_info("peername")
        self.client = str(peer[0]) if isinstance(peer, tuple) else ""
        if not self.gate.entered(self):
            fields = [("retry-after", "1"), (REFUSED, UNTOUCHED)]
            self.write(problem(503, "too many connections", close=True, headers=fields))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gate.left(self)
        self.transport = None
        self.waiting = False
        self._make_room()
        if self.exchange is not None:
            self.exchange.give_up()
            self.exchange = None

    def pause_writing(self) -> None:
        self._full = True
        if self.exchange is not None:
            self.exchange.client_full(True)

    def resume_writing(self) -> None:
        self._full = False
        self._make_room()
        if self.exchange is not None:
            self.exchange.client_full(False)
        elif not self.waiting:
            self._pause(False)
            self._heads()

    def eof_received(self) -> bool:
        return False  # the client is gone, or as good as gone; what is written already still goes out

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            self._lingering += len(data)
            if self._lingering > _LINGER_BYTES:
                self.drop()
        elif self.exchange is not None and self.exchange.tunnel:
            self.exchange.client_tunnel(data)
        elif self._body:
            self._read_body(data)
        else:
            self._buffer = self._buffer + data if self._buffer else data
            if self.exchange is None and not self.waiting:
                self._heads()
            if len(self._buffer) > AHEAD:
                self._pause(True)

    # -- heads -------------------------------------------------------------------------------------------------------

    def _heads(self) -> None:
        if self._in_heads:
            return  # an answer that came at once: the loop below goes on by itself
        self._in_heads = True
        known = self._known
        try:
            while self._buffer and self.exchange is None and not (self.waiting or self.closing or self._full):
                if self._buffer[:2] == b"\r\n":
                    self._buffer = self._buffer[2:]  # RFC 9112, section 2.2
                    continue
                end = self._buffer.find(b"\r\n\r\n")
                if end < 0:
                    check_partial(self._buffer)
                    if not self._head_begun:
                        self._head_begun = True
                        self.deadline = self.gate.loop.time() + HEAD_TIME
                    return
                self._head_begun = False
                head, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
                request, rule = known.get(head) or self.gate.read(head, self._scheme, self.peer)
                self._served = True
                self.take(request, rule)
        except Bad as e:
            self.refuse(e.status, e.why)
        finally:
            self._in_heads = False

    def expect_body(self, request: Request) -> None:
        self._body, self._left = True, request.length
        self._chunks = Chunks() if request.length == CHUNKED else None
        self._body_size = 0
        self.deadline = self.gate.loop.time() + BODY_TIME

    def body_may_come(self) -> None:
        if self._body and self._buffer:
            data, self._buffer = self._buffer, b""
            self._read_body(data)

    def go_on(self) -> None:
        self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def went_on(self) -> None:
        self._pause(False)
        self._heads()

    # -- bodies --------------------------------------------------------------------------------------------------------

    def _read_body(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            self._linger()
            return
        now = self.gate.loop.time()
        self.deadline = min(now + BODY_TIME, self.deadline + len(data) / PACE)
        if self._chunks is not None:
            try:
                piece, rest = self._chunks.feed(data)
            except Bad as e:
                self._break(e.status, e.why)
                return
            done = self._chunks.done
        else:
            piece, rest = data[: self._left], data[self._left :]
            self._left -= len(piece)
            done = not self._left
        self._body_size += len(piece)
        if self._body_size > exchange.rule.config.body:
            self._break(413, f"a body of more than {exchange.rule.config.body} bytes")
            return
        if done:
            self._body = False
            self._chunks = None
            self._buffer = rest
            self._pause(False)
        if piece:
            exchange.on_request_body(piece)
        if done and self.exchange is exchange:
            self.deadline = now + IDLE_TIME
            exchange.on_request_end()

    def want_body(self, wanted: bool) -> None:
        self._pause(not wanted)
        if not wanted:
            self.deadline = self.gate.loop.time() + 3600.0  # the exchange has its own time
        elif self._body:
            self.deadline = self.gate.loop.time() + BODY_TIME

    def _pause(self, pause: bool) -> None:
        if self.transport is not None and pause != self._paused and not self.transport.is_closing():
            self._paused = pause
            if pause:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    # -- answers -------------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.write(data)

    @property
    def open(self) -> bool:
        return self.transport is not None

    def head(self, status: int, fields: Headers, reason: str = "") -> None:
        self.write(write_response(status, fields, reason))

    def whole(self, status: int, fields: Headers, body: bytes, reason: str = "") -> None:
        head = write_response(status, fields, reason)
        if len(body) < WHOLE:
            self.write(head + body)
        else:
            self.write(head)
            self.write(body)

    def respond(self, request: Request, status: int, fields: Headers, body: bytes, reason: str = "") -> None:
        self.whole(status, fields, body, reason)
        if request.keep:
            self.deadline = self.gate.loop.time() + IDLE_TIME
        else:
            self._close_soon()

    def give(self, stored: Stored, now: float) -> None:
        self.write(hit_head(stored, now) + stored.body)
        self.deadline = self.gate.loop.time() + IDLE_TIME

    def give_kept(self, request: Request, kept: Kept, now: float) -> None:
        self.write(kept.answer(now))
        self.deadline = self.gate.loop.time() + IDLE_TIME

    def switch(self) -> None:
        data, self._buffer = self._buffer, b""
        if data and self.exchange is not None:
            self.exchange.client_tunnel(data)

    def finished(self) -> None:
        self.exchange = None
        if self.transport is None or self.transport.is_closing():
            return
        if self._body:
            self._linger()
        elif self.closing:
            self._close_soon()
        else:
            self.deadline = self.gate.loop.time() + IDLE_TIME
            self._pause(False)
            if self._buffer:
                self._heads()

    def refuse(
        self, status: int, why: str, request: Request | None = None,
        *, keep: bool = False, headers: Headers | None = None, remedy: str = "",
    ) -> None:  # fmt: skip
        self.gate.refused(self.client, request, status)
        close = not keep or request is None or not request.keep
        fields, body = refusal(status, why, request, close=close, headers=headers, remedy=remedy)
        self.write(write_response(status, fields) + body)
        if close:
            self._linger()
        else:
            self.deadline = self.gate.loop.time() + IDLE_TIME

    def _close_soon(self) -> None:
        self.closing = True
        if self.transport is not None:
            self.transport.close()  # what is written is still sent

    def _linger(self) -> None:
        """Closes so that the client can read the answer: a close with unread bytes would take it away."""
        self.closing = True
        self._lingering = 1
        self._buffer = b""
        self._body = False
        self.deadline = self.gate.loop.time() + LINGER_TIME
        if self.transport is not None and not self.transport.is_closing():
            self._pause(False)
            if self.transport.can_write_eof():
                self.transport.write_eof()

    def end(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def retire(self) -> None:
        """Takes no further requests."""
        if self.idle:
            self._close_soon()
        else:
            self.closing = True

    def drop(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def check(self, now: float) -> None:
        """Ends what takes too long; called several times a second."""
        if now < self.deadline:
            return
        if self._lingering or self.transport is None:
            self.drop()
        elif self._body:
            self._break(408, "the body comes too slowly")
        elif self.exchange is None and not self.waiting:
            if self._buffer:
                self.refuse(408, "the head comes too slowly")
            elif self._full:
                self.drop()
            else:
                self._close_soon()

    @property
    def idle(self) -> bool:
        """Between two requests, or before the first."""
        return self.exchange is None and not (self.waiting or self._buffer or self._body or self._full)

    @property
    def beginning(self) -> bool:
        """A head has begun, and nothing else is there."""
        return self._head_begun and self.exchange is None and not (self.waiting or self._body or self._full)

    @property
    def idle_since(self) -> float:
        return self.deadline - (IDLE_TIME if self._served and not self._head_begun else HEAD_TIME)
