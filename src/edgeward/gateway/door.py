"""A client's connection: bytes in, requests out, answers back in the order of the requests.

The door reads heads strictly, keeps the time of slow ones, and gives bodies on piece by piece while somebody takes
them. Answers that are in the memory it writes itself, without any task. After a refusal that leaves the connection in
doubt it answers, waits a moment for the client to read that, and closes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from edgeward.core import clock
from edgeward.gateway.answers import problem
from edgeward.gateway.cache import choose
from edgeward.gateway.cors import CorsConfig, is_preflight, preflight, with_cors
from edgeward.gateway.http1 import CHUNKED, Bad, Chunks, Headers, Request, check_partial, write_response
from edgeward.gateway.match import NotAllowed
from edgeward.gateway.rules import Rule
from edgeward.gateway.serving import from_store
from edgeward.gateway.shelf import hit_head, key_of

if TYPE_CHECKING:
    from edgeward.gateway.exchange import Exchange
    from edgeward.gateway.gate import Gate

#: Seconds for a head from its first byte, between requests, and to read what a refused client still sends.
HEAD_TIME = 15.0
IDLE_TIME = 75.0
LINGER_TIME = 2.0
#: A body must come at this pace (bytes a second), after a start of so many seconds.
PACE = 512
BODY_TIME = 20.0
#: What a client may send ahead while its request is being answered.
AHEAD = 64 * 1024
_LINGER_BYTES = 1024 * 1024
#: Smaller stored answers are written with their head in one piece.
_WHOLE = 64 * 1024


class Door(asyncio.Protocol):
    """One connection of one client."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.transport: asyncio.Transport | None = None
        self.client = ""
        self.deadline = gate.loop.time() + HEAD_TIME
        self.exchange: Exchange | None = None
        self.waiting = False
        #: The connection ends after the answer that is being written.
        self.closing = False
        self._buffer = b""
        self._left = 0
        self._chunks: Chunks | None = None
        self._body = False
        self._body_size = 0
        self._paused = False
        self._full = False
        self._lingering = 0
        self._in_heads = False
        self._head_begun = self._served = False
        self._roomy: asyncio.Future[None] | None = None

    # -- the transport's side ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = self.transport.get_extra_info("peername")
        self.client = str(peer[0]) if isinstance(peer, tuple) else ""
        if not self.gate.entered(self):
            self.write(problem(503, "too many connections", close=True, headers=[("retry-after", "1")]))
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
                request, rule = self.gate.read(head)
                if rule is None:
                    self._refuse_request(request)
                else:
                    self._begin(request, rule)
        except Bad as e:
            self.refuse(e.status, e.why)
        finally:
            self._in_heads = False

    def _refuse_request(self, request: Request) -> None:
        """No rule: what it would be is said by asking again; the connection goes on where its framing is clear."""
        try:
            self.gate.table.find(request)
        except Bad as e:
            close = request.length != 0 or not request.keep
            allow = [("allow", ", ".join(e.methods))] if isinstance(e, NotAllowed) else []
            self.gate.refused(self.client, request, e.status)
            remedy = "see: edgeward gateway explain URL" if e.status == 404 else ""
            head = request.method == "HEAD"
            self.write(problem(e.status, e.why, remedy=remedy, close=close, head=head, headers=allow))
            if close:
                self._linger()
            else:
                self.deadline = self.gate.loop.time() + IDLE_TIME

    def _begin(self, request: Request, rule: Rule) -> None:
        gate = self.gate
        config = rule.config
        self._served = True
        if gate.via_name in request.fields.get("via", ""):
            self.refuse(508, "the request has been here before: a target leads back to this gateway", request)
            return
        if rule.cors is not None and is_preflight(request) and request.length == 0:
            self._preflight(request, rule, rule.cors)
            return
        if rule.pace is not None and (wait := rule.pace.take(self.client, gate.loop.time())):
            after = [("retry-after", str(max(1, round(wait))))]
            why = f"more than {config.burst} requests at once, or {config.rate:g} a second (limits.rate)"
            headers = with_cors(rule.cors, request, after)
            self.refuse(429, why, request, keep=request.length == 0, headers=headers)
            return
        if request.length > config.body:
            self.refuse(413, f"a body of more than {config.body} bytes", request)
            return
        if rule.cache is not None and not request.upgrade:
            self._from_memory(request, rule)
        else:
            self._start(request, rule, gate.exchange(self, request, rule, self.client))

    def _preflight(self, request: Request, rule: Rule, cors: CorsConfig) -> None:
        fields = preflight(cors, request)
        close = [] if request.keep and request.minor else [("connection", "close")]
        self.write(write_response(204, [*fields, *close]))
        self.gate.hit(self.client, request, rule, None, 204, 0, "")
        if close:
            self._close_soon()
        else:
            self.deadline = self.gate.loop.time() + IDLE_TIME

    def _start(self, request: Request, rule: Rule, exchange: Exchange) -> None:
        gate = self.gate
        self.exchange = exchange
        gate.exchanges.add(exchange)
        if request.length:  # first of all: what follows the head is a body, whatever becomes of the request
            self._body, self._left = True, request.length
            self._chunks = Chunks() if request.length == CHUNKED else None
            self._body_size = 0
            self.deadline = gate.loop.time() + BODY_TIME
        if rule.active[0] > rule.config.requests:
            exchange.busy()
            return
        rule.budget.earn()
        if request.expect:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        exchange.attempt()
        if self._body and self._buffer:
            data, self._buffer = self._buffer, b""
            self._read_body(data)

    # -- what is in the memory -----------------------------------------------------------------------------------------

    def _from_memory(self, request: Request, rule: Rule, waited: bool = False) -> None:
        """Answers from the store, or asks the target."""
        gate = self.gate
        key = key_of(request)
        stored, others = gate.shelf.find(key, request, rule.owner)
        now = clock.now()
        if (
            stored is not None
            and request.plain
            and stored.ttl(now) > 0.0
            and len(stored.body) < _WHOLE
            and rule.cors is None
        ):
            self.write(hit_head(stored, now) + stored.body)
            gate.hit(self.client, request, rule, stored, stored.status, len(stored.body), "hit")
            self.deadline = gate.loop.time() + IDLE_TIME
            return
        choice = choose(request, stored, now, other_variant=others)
        way = choice.way
        if stored is not None and way in ("hit", "stale", "renew"):
            if way == "renew" and not stored.renewing:
                stored.renewing = True
                gate.renew(request, rule, self.client, key, stored)
            status, head, body = from_store(request, stored, now, cors=rule.cors)
            self.write(head)
            if body:
                self.write(body)
            gate.hit(self.client, request, rule, stored, status, len(body), way)
            if request.keep:
                self.deadline = gate.loop.time() + IDLE_TIME
            else:
                self._close_soon()
            return
        if way == "refuse":
            self.refuse(504, "not in the cache, and the request wants it from there only", request, keep=True)
            return
        keep = way in ("miss", "validate") and request.method == "GET"
        conditional = way == "miss" and not request.unconditional
        if keep and not conditional:
            leader = gate.fetching.get(key)
            if leader is not None and not waited and way == "miss":
                self.waiting = True
                leader.waiters.append(lambda _stored: self._waited(request, rule))
                return
            exchange = gate.exchange(
                self, request, rule, self.client, key=key, stored=stored if way == "validate" else None,
                fwd=choice.fwd,
            )  # fmt: skip
            if leader is None:
                gate.fetching[key] = exchange
        else:
            exchange = gate.exchange(self, request, rule, self.client, fwd=choice.fwd)
        self._start(request, rule, exchange)

    def _waited(self, request: Request, rule: Rule) -> None:
        if self.waiting and self.transport is not None:
            self.waiting = False
            self._from_memory(request, rule, waited=True)
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
                self._break(e)
                return
            done = self._chunks.done
        else:
            piece, rest = data[: self._left], data[self._left :]
            self._left -= len(piece)
            done = not self._left
        self._body_size += len(piece)
        if self._body_size > exchange.rule.config.body:
            self._break(Bad(413, f"a body of more than {exchange.rule.config.body} bytes"))
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

    def _break(self, bad: Bad) -> None:
        """The body cannot go on: neither the target nor the client may take what came for the whole."""
        exchange, self.exchange = self.exchange, None
        answered = exchange is not None and exchange.answered
        if exchange is not None:
            exchange.give_up()
        if answered:
            self.drop()
        else:
            self.refuse(bad.status, bad.why)

    def want_body(self, wanted: bool) -> None:
        """From the exchange: whether more of the body, or of the tunnel, can be taken."""
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

    def switch(self) -> None:
        """From here on the bytes are the two sides' own."""
        data, self._buffer = self._buffer, b""
        if data and self.exchange is not None:
            self.exchange.client_tunnel(data)

    def finished(self) -> None:
        """From the exchange: it is over, and the answer is written."""
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
        self,
        status: int,
        why: str,
        request: Request | None = None,
        *,
        keep: bool = False,
        headers: Headers | None = None,
    ) -> None:
        """A refusal by the gateway itself. Without ``keep`` the connection ends: what follows is not to be trusted."""
        self.gate.refused(self.client, request, status)
        head = request is not None and request.method == "HEAD"
        close = not keep or request is None or not request.keep
        self.write(problem(status, why, close=close, head=head, headers=headers or ()))
        if close:
            self._linger()

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
        """The target ended what was switched to; what it said last still goes out."""
        if self.transport is not None:
            self.transport.close()

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
            self._break(Bad(408, "the body comes too slowly"))
        elif self.exchange is None and not self.waiting:
            if self._buffer:
                self.refuse(408, "the head comes too slowly")
            elif self._full:
                self.drop()
            else:
                self._close_soon()

    def _make_room(self) -> None:
        if self._roomy is not None and not self._roomy.done():
            self._roomy.set_result(None)
        self._roomy = None

    @property
    def idle(self) -> bool:
        """Between two requests, or before the first."""
        return self.exchange is None and not (self.waiting or self._buffer or self._body or self._full)

    @property
    def idle_since(self) -> float:
        return self.deadline - (IDLE_TIME if self._served else HEAD_TIME)

    async def room(self) -> None:
        """Until the client takes more."""
        if self._full and self.transport is not None:
            self._roomy = self._roomy or self.gate.loop.create_future()
            await asyncio.shield(self._roomy)
