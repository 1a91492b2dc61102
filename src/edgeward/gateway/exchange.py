"""One request on its way to a target, and the answer on its way back.

The door gives the request and its body, an endpoint's connection (or a function) gives the answer; every step is a
callback, so a request that finds an open connection costs no task. Here it is decided when a request is sent again,
when an answer is kept, and what the client is told when nothing comes. An exchange ends exactly once, by ``_done``.

A Route may name more places than this site: then a request that this one cannot answer goes to the next of them, where
that cannot do it twice. Another site's gateway answers from its own site or says that nothing was done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeward.core import clock
from edgeward.gateway import cache, squeeze
from edgeward.gateway.answers import problem_parts
from edgeward.gateway.balance import Circuit, Endpoint, may_repeat
from edgeward.gateway.cache import Stored
from edgeward.gateway.cors import with_cors
from edgeward.gateway.entry import Damaged
from edgeward.gateway.http1 import (
    CHUNKED,
    FALLBACK,
    REFUSED,
    SAFE,
    UNANSWERED,
    UNTOUCHED,
    Headers,
    Request,
    Response,
    end_to_end,
    write_request,
)
from edgeward.gateway.rules import Place, Rule
from edgeward.gateway.serving import asked_of, forwarded, said_place
from edgeward.gateway.shelf import NAME, Key, key_of
from edgeward.gateway.upstream import Connection

if TYPE_CHECKING:
    from edgeward.gateway.desk import Desk
    from edgeward.gateway.entry import Blob
    from edgeward.gateway.gate import Gate
    from edgeward.gateway.spool import Spool

#: Bytes of a request's body that are kept to send it again; the client waits while no connection is open beyond it.
REPLAY = 64 * 1024
#: Bytes of bodies that requests in progress have in memory, all together: events of functions, answers to be kept.
HELD = 64 * 1024**2
#: A larger answer goes to the disk, not into the memory.
OBJECT = 16 * 1024**2
_NO_BODY = frozenset({204, 304})
_FAILED = frozenset({500, 502, 503, 504})
Waiter = Callable[[bool], None]


class Exchange:
    """A request that is being answered by its rule's target."""

    # what most requests never change stands here: an exchange is made for each, and each field costs it
    endpoint: Endpoint | None = None
    connection: Connection | None = None
    task: asyncio.Task[None] | None = None
    sent = answered = ended = tunnel = False
    sends = status = size = 0
    cache_word = ""
    _failed_by = _kept = _stored_size = _held = 0
    #: Before the last time it was sent, it had been sent already.
    _sent_before = False
    _replayable = True
    _chunked = _client_full = _swallow = False
    _response: Response | None = None
    _storing: list[bytes] | None = None
    _spool: Spool | None = None
    #: The answer is compressed on its way.
    _press: squeeze.Press | None = None
    #: A stored answer is on its way from the disk.
    _streams = False
    #: No kept connection any more: one was closed under our hands.
    _fresh = False

    def __init__(
        self, gate: Gate, door: Desk | None, request: Request, rule: Rule, client: str,
        *, key: Key | None = None, stored: Stored | None = None, fwd: str = "",
    ) -> None:  # fmt: skip
        self.gate, self.door, self.request, self.rule, self.client = gate, door, request, rule, client
        #: Where the answer may be kept; None: nowhere.
        self.key = key
        #: What is asked about: the answer that is there already.
        self.stored = stored
        self.fwd = fwd
        self.started = clock.monotonic()  # the loop's clock is too coarse for what is measured
        self.asked = clock.now() if key is not None or stored is not None else 0.0
        self.deadline = gate.loop.time() + rule.config.connect + 1.0
        #: Of the rule's places the one that is asked; a gateway that is asked by another site's asks nobody else.
        self.place: Place = rule.places[0]
        self._last = len(rule.places) == 1
        if not self._last and FALLBACK in request.fields:
            self.place, self._last = rule.home, True
        elif door is None:
            self._last = True  # what is asked for the store alone
        #: Why the places before could not answer, in words, and with which status.
        self.because: list[str] = []
        self.tried: list[Endpoint] = []
        self.body_done = request.length == 0
        self._pieces: list[bytes] = []
        self.waiters: list[Waiter] = []
        rule.active[0] += 1

    # -- to the target -------------------------------------------------------------------------------------------------

    def attempt(self) -> None:
        now = self.gate.loop.time()
        balance = self.place.balance
        endpoint = balance.pick(now, self.tried)
        if endpoint is None:
            wait = max(1, round(self.rule.config.pause)) if balance.endpoints else 1
            why = (
                f"{self.place.target} failed again and again; it is left alone for a moment"
                if balance.endpoints
                else f"{self.place.target} has no endpoint here"
            )
            self._unserved(503, why, [("retry-after", str(wait))])
            return
        self.endpoint = endpoint
        balance.circuits[endpoint].took()
        self.deadline = now + self.rule.config.connect + 1.0
        connection = None if self._fresh else self.gate.pool.take(endpoint)
        if connection is not None:
            self._send(connection)
        else:
            self.task = self.gate.spawn(self, self._open(endpoint))

    async def _open(self, endpoint: Endpoint) -> None:
        try:
            connection = await self.gate.pool.open(endpoint, self.rule.config.connect)
        except (OSError, TimeoutError) as e:
            if not self.ended:
                self.on_fail(
                    502, f"no connection to the target: {getattr(e, 'strerror', None) or 'it does not answer'}"
                )
            return
        if self.ended:
            self.gate.pool.give(connection)
        elif connection.closed:
            self.on_fail(502, "the target closed the connection before it was asked")
        else:
            self._send(connection)

    def _unserved(self, status: int, why: str, headers: Headers | None = None) -> None:
        """The place cannot answer, and has done nothing: the next one, or a stale answer, or a refusal."""
        if self._elsewhere(status, why) or (self.stored is not None and self._stand_in(status)):
            return
        self._refuse(status, why, headers)

    def _elsewhere(self, status: int, why: str) -> bool:
        """To the next place, where the request may go on and there is one."""
        if self._last or not may_repeat(
            self.request.method, sent=self.sent, answered=self.answered, replayable=self._replayable
        ):
            return False
        places = self.rule.places
        at = places.index(self.place) + 1
        self._last = at == len(places) - 1
        self.because.append(why)
        self._failed_by = self._failed_by or status
        self.place, self.endpoint = places[at], None
        self.tried, self.sends, self._fresh = [], 0, False
        self.attempt()
        return True

    def _head(self) -> bytes:
        request, rule, place = self.request, self.rule, self.place
        main = place is rule.places[0]
        if self.stored is None and request.length == 0 and main:
            wire = self.gate.wires.get(request)
            if wire is not None and wire[0] is rule and wire[1] == self.client:
                return wire[2]
        # another place's answers are not kept, so they are asked for as the client asks
        validators = self.stored.validators if self.stored is not None and main else None
        via = self.gate.via_of(request)
        headers = forwarded(request, rule, place, self.gate.authority, self.client, via, validators=validators)
        if request.length > 0:
            headers.append(("content-length", str(request.length)))
        elif request.length == CHUNKED:
            headers.append(("transfer-encoding", "chunked"))
        elif request.method in ("POST", "PUT", "PATCH"):
            headers.append(("content-length", "0"))
        head = write_request(request.method, request.path + request.query, headers)
        if self.stored is None and request.length == 0 and request.known and main:
            self.gate.wires[request] = rule, self.client, head
        return head

    def _send(self, connection: Connection) -> None:
        self.connection = connection
        self.task = None
        self.sends += 1
        self._sent_before, self.sent = self.sent, True
        self.deadline = self.gate.loop.time() + self.rule.config.answer
        # a server that reads no body there would take it for somebody's next request
        connection.last = self.request.length != 0 and self.request.method in SAFE
        connection.begin(self, self.request.method, self._head(), done=self.body_done)
        for piece in self._pieces:
            connection.write(self._chunk(piece))
        if self.body_done and self.request.length == CHUNKED:
            connection.write(b"0\r\n\r\n")
        if self.sends >= self.rule.config.attempts and not connection.used and self._last:
            self._forget_pieces()
        if self.door is not None and not self.body_done:
            self.door.want_body(True)

    def _forget_pieces(self) -> None:
        self._replayable = not self._pieces
        self._pieces = []

    def _chunk(self, piece: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(piece), piece) if self.request.length == CHUNKED else piece

    def on_request_body(self, piece: bytes) -> None:
        """From the door: a piece of the request's body."""
        self.deadline = self.gate.loop.time() + self.rule.config.answer
        self._kept += len(piece)
        if self.connection is None or (self._replayable and self._kept <= REPLAY):
            self._pieces.append(piece)
        elif self._replayable:
            self._replayable, self._pieces = False, []
        if self.connection is not None:
            self.connection.write(self._chunk(piece))
        elif self._kept > REPLAY and self.door is not None:
            self.door.want_body(False)

    def on_request_end(self) -> None:
        self.body_done = True
        if self.connection is not None:
            if self.request.length == CHUNKED:
                self.connection.write(b"0\r\n\r\n")
            self.connection.request_done = True

    # -- from the target ---------------------------------------------------------------------------------------------

    def on_head(self, response: Response) -> None:
        if self.place.kind == "site" and REFUSED in response.fields:
            self._declined(response)
            return
        if (circuit := self._circuit()) is not None:
            circuit.good()
        self._response = response
        self.deadline = self.gate.loop.time() + self.rule.config.idle
        if response.status == 101:
            self._switch(response)
            return
        if self.stored is not None:
            if response.status == 304 and self.place is self.rule.places[0]:
                self._validated(response, self.stored)
                return
            if response.status in _FAILED and self._stand_in(response.status):
                return
        headers = end_to_end(response.headers)
        if self.key is not None:
            self._consider(response)
        if cache.invalidates(self.request.method, response.status):
            self.gate.forget(self.request)
        self._write_head(response, headers)

    def _circuit(self) -> Circuit | None:
        """Of the endpoint that is asked; it may be none of the place's any more."""
        return self.place.balance.circuits.get(self.endpoint) if self.endpoint is not None else None

    def _declined(self, response: Response) -> None:
        """The other site's gateway says that it has no answer, and whether its target may have seen the request. It is
        not asked again and again, either."""
        untouched = response.fields[REFUSED] == UNTOUCHED
        if untouched:
            self.sent = self._sent_before
        if self.connection is not None:
            self.connection.abort()
            self.connection = None
        why = f"{self.place.target} cannot answer it either ({response.status})"
        if (circuit := self._circuit()) is not None:
            circuit.bad(self.gate.loop.time())
        self._unserved(503 if untouched else response.status, why)

    def _consider(self, response: Response) -> None:
        most = self.rule.cache.object if self.rule.cache is not None else 0
        why = cache.why_not_stored(self.request, response)
        main = self.place is self.rule.places[0]  # what stands in for it is not kept
        if main and not why and CHUNKED <= response.length <= most:
            if response.length <= self._memory_most():
                self._storing = []
                self.cache_word = "stored"
                return
            self._to_disk(response.length)
        self._release(False)

    def _memory_most(self) -> int:
        return min(self.rule.cache.object if self.rule.cache is not None else 0, OBJECT, self.gate.shelf.limit // 4)

    def _disk_most(self) -> int:
        disk = self.gate.disk
        return min(self.rule.cache.object, disk.limit // 2) if self.rule.cache is not None and disk is not None else 0

    def _to_disk(self, size: int) -> None:
        """Too large for the memory: to the disk as it comes, at the client's pace. Nobody waits for it."""
        disk = self.gate.disk
        config = self.rule.cache
        if disk is not None and config is not None and config.disk and self.key is not None:
            self._spool = disk.spool(size)
            if self._spool is not None:
                self._spool.then = lambda: self.client_full(self._client_full)
        self.cache_word = "miss" if self._spool is None else "stored"

    def _write_head(self, response: Response, headers: Headers) -> None:
        self.answered = True
        self.status = response.status
        request, door = self.request, self.door
        if door is None:
            return
        close = not request.keep or not self.body_done
        fields = [h for h in with_cors(self.rule.cors, request, headers) if h[0] != "content-length"]
        length = response.length
        if self.rule.compress is not None:
            fields, length = self._smaller(self.rule.compress, response, fields)
        if request.method == "HEAD" or response.status in _NO_BODY:
            if "content-length" in response.fields and response.status != 204:
                fields.append(("content-length", response.fields["content-length"]))
        elif length >= 0:
            fields.append(("content-length", str(length)))
        elif request.minor == 1:
            self._chunked = True
            fields.append(("transfer-encoding", "chunked"))
        elif request.minor == 0:
            close = True
        if self.rule.cache is not None:
            fwd = self.fwd or "bypass"
            said = f"{NAME}; fwd={fwd}; fwd-status={response.status}"
            fields.append(
                ("cache-status", said + ("; stored" if self._storing is not None or self._spool is not None else ""))
            )
            self.cache_word = self.cache_word or "miss"
        if len(self.rule.places) > 1:
            fields.append(said_place(self.place, self.because))
        if "date" not in response.fields:
            fields.append(("date", cache.http_date(clock.now())))
        if close:
            door.closing = True
            fields.append(("connection", "close"))
        elif request.minor == 0:
            fields.append(("connection", "keep-alive"))
        door.head(response.status, fields, response.reason)

    def _smaller(self, config: squeeze.CompressConfig, response: Response, fields: Headers) -> tuple[Headers, int]:
        """``(fields, length)`` of the answer as it goes out where the route compresses."""
        if self._shrinks(config, response):
            return squeeze.pressed(fields), CHUNKED
        size = response.length
        if self.request.method == "HEAD" and not size:  # it has no body; what GET would give varies all the same
            size = int(response.fields.get("content-length", -1))
        if squeeze.eligible(config, response.status, response.fields, size):
            fields = squeeze.with_vary(fields)
        return fields, response.length

    def _shrinks(self, config: squeeze.CompressConfig, response: Response) -> bool:
        """Whether this answer is compressed on its way; then it is made ready for that."""
        request = self.request
        if (
            request.method == "HEAD"
            or not squeeze.eligible(config, response.status, response.fields, response.length)
            or not squeeze.takes(request)
            or not self.gate.presses.may(self.gate.loop.time())
        ):
            return False
        self._press = squeeze.Press(flush=response.length < 0)
        self.gate.presses.live += 1
        return True

    def _pressed(self, work: Callable[[bytes], bytes], data: bytes) -> bytes:
        began = clock.monotonic()
        out = work(data)
        self.gate.presses.spent(clock.monotonic() - began)
        return out

    def on_body(self, data: bytes) -> None:
        if self._swallow:
            return
        if self._storing is not None:
            self._storing.append(data)
            self._stored_size += len(data)
            self.hold(len(data))
            if self._stored_size > self._memory_most() or self.gate.held > HELD // 2:
                self._outgrown(self._storing)
        elif self._spool is not None:
            self._stored_size += len(data)
            if self._stored_size > self._disk_most() or not self._spool.write(data):
                self._unspool(self._spool)
            elif self._spool.behind and self.connection is not None:
                self.connection.pause()
        if self._press is not None and self.door is not None:
            data = self._pressed(self._press.feed, data)
        self._piece(data)

    def _piece(self, data: bytes) -> None:
        """Of the answer's body, as it goes to the client."""
        self.deadline = self.gate.loop.time() + self.rule.config.idle
        self.size += len(data)
        if self.door is not None and data and self.request.method != "HEAD":
            self.door.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def _outgrown(self, pieces: list[bytes]) -> None:
        """It is more than the memory takes."""
        self._storing = None
        self._to_disk(0)
        self.hold(-self._held)
        if self._spool is not None and not (
            self._stored_size <= self._disk_most() and self._spool.write(b"".join(pieces))
        ):
            self._unspool(self._spool)
        self._release(False)
        self.client_full(self._client_full)

    def _unspool(self, spool: Spool) -> None:
        self._spool, self.cache_word = None, "miss"
        spool.then = None
        spool.abort()
        self.client_full(self._client_full)

    def on_end(self) -> None:
        self.connection = None
        if self._streams:
            return  # what was asked about is on its way from the disk
        if self.tunnel:
            if self.door is not None:
                self.door.end()
            self._done()
            return
        if self._storing is not None and self._response is not None and self.key is not None:
            self._keep(self.key, self._response, b"".join(self._storing))
        if self._spool is not None and self._response is not None and self.key is not None:
            self._spooled(self._spool, self.key, self._response)
        if self._press is not None:
            press, self._press = self._press, None
            self.gate.presses.live -= 1
            self._piece(press.end())
        if self._chunked and self.door is not None:
            self.door.write(b"0\r\n\r\n")
        self._done()

    def on_full(self, full: bool) -> None:
        """The connection to the target takes no more of the body for now."""
        if self.door is not None:
            self.door.want_body(not full)

    def client_full(self, full: bool) -> None:
        """The client takes no more of the answer for now. One that is being kept comes whole all the same: others wait
        for it."""
        self._client_full = full
        if self.connection is not None:
            behind = self._spool is not None and self._spool.behind
            if behind or (full and self._storing is None):
                self.connection.pause()
            elif not full:
                self.connection.resume()

    def hold(self, size: int) -> None:
        """So many bytes more are in memory until this is over."""
        self._held += size
        self.gate.held += size

    def on_fail(self, status: int, why: str) -> None:
        connection, self.connection = self.connection, None
        stale = connection is not None and connection.used and not self.answered
        if stale:
            self._fresh = True
        if self.endpoint is not None:
            circuit = self._circuit()
            if stale:
                if circuit is not None:
                    circuit.dropped()
            elif circuit is not None and circuit.bad(self.gate.loop.time()):
                self.gate.opened(self.rule, self.place, self.endpoint, why)
            self.tried.append(self.endpoint)
        if self.answered:
            if self.door is not None:
                self.door.drop()  # a cut answer must look like one
            self._storing = None
            self._done()
            return
        repeat = may_repeat(self.request.method, sent=self.sent, answered=False, replayable=self._replayable)
        # with another place to go to, the same endpoint is not asked twice
        enough = self.rule.config.attempts if self._last else min(
            self.rule.config.attempts, len(self.place.balance.endpoints)
        )  # fmt: skip
        if (
            status != 504
            and repeat
            and (
                (stale and self.sends <= self.rule.config.attempts)
                or (len(self.tried) < enough and self.rule.budget.spend())
            )
        ):
            self.rule.counters.retries += 1
            self.attempt()
            return
        self._unserved(status, why)

    # -- the cache -----------------------------------------------------------------------------------------------------

    def _keep(self, key: Key, response: Response, body: bytes) -> None:
        made = self._made(response, body)
        if made is not None:
            self.gate.keep(key, self.rule, made)
            self._release(True)

    def _made(self, response: Response, body: bytes) -> Stored | None:
        config = self.rule.cache
        if config is None:
            return None
        made = cache.store(
            self.request, response, end_to_end(response.headers), body, self.asked, clock.now(),
            if_error=config.stale_if_error, while_revalidate=config.stale_while_revalidate,
        )  # fmt: skip
        made.owner = self.rule.owner
        return made

    def _spooled(self, spool: Spool, key: Key, response: Response) -> None:
        self._spool = spool.then = None
        made = self._made(response, b"")
        if made is None or self.gate.disk is None:
            spool.abort()
        else:
            self.gate.shelf.drop(key)  # it takes the place of what was kept
            self.gate.disk.finish(spool, key, made)

    def _validated(self, response: Response, old: Stored) -> None:
        now = clock.now()
        made = cache.refreshed(old, response, end_to_end(response.headers), self.asked, now)
        why = cache.why_not_refreshed(self.request, made, response)
        if self.key is not None and not why:
            self.gate.keep(self.key, self.rule, made, old)
        elif self.key is not None and "set-cookie" not in response.fields:
            self.gate.forget(self.request)  # it is for others no longer
        self._release(True)
        self._answer(made, now, "validated", fwd=f"fwd={self.fwd}; fwd-status=304" + ("" if why else "; stored"))

    def _stand_in(self, status: int) -> bool:
        """The stale answer in place of a failed target's, where that is allowed."""
        now = clock.now()
        if self.stored is None or not cache.serve_on_error(self.stored, self.request, now):
            return False
        if self.connection is not None:
            self.connection.abort()
            self.connection = None
        self._release(False)
        self._answer(self.stored, now, "stale", detail=f"stale-if-error-{status}")
        if not self._streams:
            self._done()
        return True

    def _answer(self, stored: Stored, now: float, word: str, *, detail: str = "", fwd: str = "") -> None:
        self.answered = self._swallow = True
        self.cache_word = word
        if self.rule.compress is not None and self.key is not None:
            stored = self.gate.fitting(self.key, stored, self.request)
        self.status, fields, part = asked_of(self.request, stored, now, detail, fwd, cors=self.rule.cors)
        reason = stored.reason if self.status == stored.status else ""
        if self.door is None:
            return
        if stored.blob is not None and part is not None:
            self._streams = True
            self.task = self.gate.spawn(self, self._from_disk(stored, stored.blob, part, fields, reason))
            return
        body = stored.body[part[0] : part[1]] if part is not None else b""
        self.size = len(body)
        self.door.whole(self.status, fields, body, reason)
        self.door.closing = self.door.closing or not self.request.keep

    async def _from_disk(self, stored: Stored, blob: Blob, part: tuple[int, int], fields: Headers, reason: str) -> None:
        """Its head goes out when its first piece was found whole; a piece that is not ends it."""
        disk, begun = self.gate.disk, False
        try:
            if disk is None:
                raise FileNotFoundError("the cache has no disk any more")
            async for piece in disk.pieces(blob, *part):
                if self.door is None:
                    break
                if not begun:
                    begun = True
                    self.door.head(self.status, fields, reason)
                    self.door.closing = self.door.closing or not self.request.keep
                self.size += len(piece)
                self.deadline = self.gate.loop.time() + self.rule.config.idle
                self.door.write(piece)
                await self.door.room()
        except (OSError, Damaged) as e:
            self._lost(stored, e, begun)
            return
        self._done()

    def _lost(self, stored: Stored, why: Exception, begun: bool) -> None:
        """What was kept is not there, or is not what it was."""
        key = key_of(self.request)
        self.gate.shelf.drop(key)
        if self.gate.disk is not None:
            self.gate.disk.spoilt(key, stored, why)
        if begun:
            if self.door is not None:
                self.door.drop()  # a cut answer must look like one
            self._done()
            return
        if self.rule.config.to == "function":
            self._refuse(503, "what was kept is not what it was; ask again", [("retry-after", "1")])
            return
        self.stored, self.task = None, None
        self.answered = self._swallow = self._streams = False
        self.cache_word, self.fwd = "", "uri-miss"
        Exchange.attempt(self)

    def _release(self, stored: bool) -> None:
        """Those who waited for this answer go on: to the store, or on their own."""
        if self.key is not None and self.gate.fetching.get(self.key) is self:
            del self.gate.fetching[self.key]
        if self.stored is not None:
            self.stored.renewing = False
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter(stored)

    # -- WebSocket -----------------------------------------------------------------------------------------------------

    def _switch(self, response: Response) -> None:
        if not self.request.upgrade or response.fields.get("upgrade", "").lower() != self.request.upgrade:
            if self.connection is not None:
                self.connection.abort()
            self.on_fail(502, "the target switched to a protocol that nobody asked for")
            return
        headers = [*end_to_end(response.headers), ("connection", "upgrade"), ("upgrade", self.request.upgrade)]
        self.answered = self.tunnel = True
        self.status = 101
        if self.door is not None:
            self.door.head(101, headers, response.reason)
            self.door.switch()

    def on_tunnel(self, data: bytes) -> None:
        self.size += len(data)
        self.deadline = self.gate.loop.time() + self.rule.config.idle
        if self.door is not None:
            self.door.write(data)

    def client_tunnel(self, data: bytes) -> None:
        self.deadline = self.gate.loop.time() + self.rule.config.idle
        if self.connection is not None:
            self.connection.write(data)

    # -- the end -------------------------------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Ends what takes too long; called several times a second."""
        if now < self.deadline or self.ended:
            return
        if self.connection is not None:
            self.connection.abort()
        if self.task is not None:
            self.task.cancel()
        if self.tunnel:
            self.on_end()
        else:
            what = "went on answering" if self.answered else "answered"
            limit = self.rule.config.idle if self.answered else self.rule.config.answer
            self.on_fail(504, f"{self.place.target} has not {what} within {limit:g} s")

    def give_up(self) -> None:
        """The client went away."""
        self.door = None
        if self.waiters and not self.tunnel:
            return  # others wait for the answer
        if self.connection is not None:
            self.connection.leave() if self.tunnel else self.connection.abort()
            self.connection = None
        if self.task is not None:
            self.task.cancel()
        if (circuit := self._circuit()) is not None:
            circuit.dropped()
        self.status = self.status or 499
        self._storing = None
        self._done()

    def busy(self) -> None:
        """More requests of this route are in progress than it allows."""
        why = f"{self.rule.config.requests} requests of this route are in progress, its limit (limits.requests)"
        self._refuse(503, why, [("retry-after", "1")])

    def _refuse(self, status: int, why: str, headers: Headers | None = None) -> None:
        self.answered = True
        if self.because:  # each place's reason; the status is the first one's, unless it may have been done by now
            status = status if self.sent else self._failed_by
            why = "; ".join([*self.because, why])
        self.status = status
        close = not self.request.keep or not self.body_done
        more = list(headers or [])
        if FALLBACK in self.request.fields:
            more.append((REFUSED, UNANSWERED if self.sent else UNTOUCHED))
        if self.door is not None:
            self.door.closing = self.door.closing or close
            fields, body = problem_parts(
                status, why, route=f"Route/{self.rule.key}", target=self.rule.config.target, close=close,
                head=self.request.method == "HEAD", headers=with_cors(self.rule.cors, self.request, more),
            )  # fmt: skip
            self.door.whole(status, fields, body)
        self._done()

    def _done(self) -> None:
        if self.ended:
            return
        self.ended = True
        if self._spool is not None:
            self._spool.then = None
            self._spool.abort()
            self._spool = None
        if self._press is not None:
            self._press = None
            self.gate.presses.live -= 1
        self.gate.held -= self._held
        self._release(False)
        self.rule.active[0] -= 1
        self.gate.finished(self)
        if self.door is not None:
            self.door.finished()


class StoredExchange(Exchange):
    """A stored answer whose body lies on the disk: given from there; where it is not what it was, from the target."""

    def __init__(
        self, gate: Gate, door: Desk, request: Request, rule: Rule, client: str, given: Stored, word: str
    ) -> None:
        super().__init__(gate, door, request, rule, client, fwd="")
        self._given, self._word = given, word

    def attempt(self) -> None:
        self.deadline = self.gate.loop.time() + self.rule.config.idle
        self._answer(self._given, clock.now(), self._word)
        if not self._streams:
            self._done()
