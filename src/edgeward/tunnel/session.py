"""A session: the streams between two ends, over one link at a time.

The link (a WebSocket, ``link.py``) brings bytes and takes bytes. A session outlives it: what was sent and not confirmed
is kept, and a link that comes back within the session's patience goes on at the byte where the old one broke. When it
does not come back, every stream is reset. Streams that have something to say and credit to say it take turns, a small
piece each; pieces of one turn of the event loop go out as one write.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from edgeward.core.errors import EdgewardError, Gone, Refused, TooMany, Unreachable
from edgeward.tunnel import framing
from edgeward.tunnel.credit import Kept
from edgeward.tunnel.flow import Sink, Stream, error_of
from edgeward.tunnel.framing import Frames, Garbage, Open

__all__ = ["Open", "Session", "Sink", "Stream", "pair"]

log = logging.getLogger("edgeward.tunnel")

#: Streams that the other side may have open at once.
MOST_STREAMS = 1024
#: Frames that are no data and wait for the link: more are a flood.
_MOST_CONTROL = 4096
#: Bytes of one write, and of one stream's turn while others wait.
_BATCH, _TURN = 112 * 1024, 32 * 1024
#: Pieces from here on go out as they are; smaller ones are put together.
_LARGE = 8 * 1024
#: Bytes after which what was received is confirmed.
_CONFIRM = 256 * 1024
#: Seconds between two looks at the link; between two pings while something moves, and while nothing does.
_LOOK, _BUSY_PING, _IDLE_PING = 1.0, 1.0, 20.0
#: Seconds of silence behind a ping after which a link is suspect at the earliest, and after which it is given up.
_SUSPECT, _DEAD = 1.5, 20.0
#: Seconds without a link after which a session ends.
PATIENCE = 120.0


class Link(Protocol):
    """``paused``: it takes no more at present; then it calls :meth:`Session.resume` later."""

    paused: bool

    def send(self, pieces: list[bytes]) -> None:
        """Takes all of it, as one after the other."""

    def close(self) -> None: ...


class Session:
    """``dials``: this end makes the link (its streams have odd numbers). ``serve`` is called with what the other side
    opens, ``on_end`` once with the reason, ``on_suspect`` when the link does not answer or is lost."""

    def __init__(
        self,
        name: str,
        *,
        dials: bool,
        serve: Callable[[Stream], None],
        on_end: Callable[[Session], None] = lambda _: None,
        on_suspect: Callable[[], None] = lambda: None,
        patience: float = PATIENCE,
    ) -> None:
        self.name, self.dials = name, dials
        self._serve, self._on_end, self._on_suspect = serve, on_end, on_suspect
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self.streams: dict[int, Stream] = {}
        self._next = 1 if dials else 2
        self._highest = 0
        self._theirs = 0
        self.link: Link | None = None
        self._kept = Kept()
        self._frames = Frames()
        #: Bytes of frames that were received in all.
        self.received_bytes = 0
        self._confirmed = 0
        #: Bytes of the present link that came already.
        self._skip = 0
        self._control: deque[bytes] = deque()
        self._pong: bytes | None = None
        self._ready: deque[Stream] = deque()
        self._flushing = False
        self.error: EdgewardError | None = None
        # the link's pulse
        self.rtt = 0.1
        self._best = 1.0
        self._measured = False
        now = self._now()
        self._heard = self._moved = self._pinged = now
        self._waiting_pong = False
        self._lost = now
        self._timer = self._loop.call_later(_LOOK, self._look)

    # -- streams ---------------------------------------------------------------------------------------------------

    def open(self, service: str, args: dict[str, Any] | None = None, **more: str) -> Stream:
        """A new stream; data may be sent on it at once. Raises what the session ended with."""
        return self.open_for(Open(service, args or {}, **more))

    def open_for(self, purpose: Open) -> Stream:
        if self.error is not None:
            raise self.error
        payload = msgspec.msgpack.encode(purpose)
        if len(payload) > framing.MOST_OTHER:
            raise Refused("what the stream is opened with is too large", remedy="at most 64 KiB of arguments")
        stream = Stream(self, self._next, purpose, self._now())
        self._next += 2
        self.streams[stream.id] = stream
        self.control(framing.frame(framing.OPEN, stream.id, payload))
        return stream

    def wants(self, stream: Stream) -> None:
        """The stream has something to send."""
        if not stream.queued and (stream.credit > 0 or not stream.out):
            stream.queued = True
            self._ready.append(stream)
            self._plan()

    def drop(self, stream: Stream, error: EdgewardError) -> None:
        """Tells the other side that the stream is no more."""
        if self._forget(stream):
            self.control(framing.frame(framing.RESET, stream.id, msgspec.msgpack.encode(error.problem())))

    def took(self, stream: Stream, n: int) -> None:
        more = stream.window.consumed(n, self._now(), self._best)
        if more and stream.id in self.streams:
            self.control(framing.credit(stream.id, more))

    def _forget(self, stream: Stream) -> bool:
        if self.streams.pop(stream.id, None) is None:
            return False
        if stream.id % 2 == (0 if self.dials else 1):
            self._theirs -= 1
        return True

    # -- the link --------------------------------------------------------------------------------------------------

    def attach(self, link: Link, received: int, said: int | None = None) -> None:
        """Goes on over ``link``, whose other end has ``received`` bytes. Raises ``Gone`` when that cannot be.

        ``said``: what the other end was told that we have, and begins behind; the old link may have brought more since.
        """
        again = self._kept.behind(received)
        if again is None or self.error is not None:
            raise Gone("the tunnel's session cannot be resumed", remedy="open it anew")
        old, self.link = self.link, link
        if old is not None:
            old.close()
        self._kept.confirm(received)
        self._heard = self._now()
        self._waiting_pong = False
        self._measured = False
        self._skip = self.received_bytes - (self.received_bytes if said is None else said)
        if again:
            link.send(again)
        self._ping()
        self._plan()

    def knows(self, received: int) -> bool:
        """Whether what the other end lacks is still here."""
        return self.error is None and self._kept.behind(received) is not None

    def detach(self, link: Link, why: str = "") -> None:
        """The link is lost; an old one's end is no news."""
        if link is not self.link:
            return
        self.link = None
        self._lost = self._now()
        log.info("the link of tunnel %s is lost%s", self.name, f": {why}" if why else "")
        if self.error is None:
            self._on_suspect()

    def resume(self, link: Link) -> None:
        """The link takes more."""
        if link is self.link:
            self._flush()

    def close(self, error: EdgewardError | None = None, *, tell: bool = True) -> None:
        """Ends the session and all its streams."""
        if self.error is not None:
            return
        self.error = error or Gone("the tunnel was closed")
        self._timer.cancel()
        link, self.link = self.link, None
        if link is not None:
            if tell:
                self._control.append(framing.frame(framing.BYE, 0, msgspec.msgpack.encode(self.error.problem())))
                link.send([b"".join(self._control)])
            link.close()
        self._control.clear()
        self._ready.clear()
        for stream in tuple(self.streams.values()):
            stream.failed(self.error)
        self.streams.clear()
        self._on_end(self)

    # -- sending ---------------------------------------------------------------------------------------------------

    def control(self, data: bytes) -> None:
        """A frame that goes before all data."""
        if self.error is not None:
            return
        self._control.append(data)
        if len(self._control) > _MOST_CONTROL:
            self.close(TooMany("the other side of the tunnel asks more than it takes answers"), tell=False)
        self._plan()

    def _plan(self) -> None:
        if not self._flushing and self.link is not None:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        link = self.link
        while link is not None and not link.paused and not self._kept.full:
            parts = self._batch()
            if not parts:
                return
            pieces = _gathered(parts)
            for piece in pieces:
                self._kept.add(piece)
            link.send(pieces)
            self._moved = self._now()

    def _batch(self) -> list[bytes]:
        parts: list[bytes] = []
        if self._pong is not None:
            parts.append(self._pong)
            self._pong = None
        if self._control:
            parts.extend(self._control)
            self._control.clear()
        size = 0
        while self._ready and size < _BATCH:
            stream = self._ready.popleft()
            stream.queued = False
            if stream.error is not None:
                continue
            turn = min(stream.credit, _TURN if self._ready else _BATCH - size, stream.waiting)
            if turn:
                parts.append(framing.head(framing.DATA, stream.id, turn))
                self._take(stream, turn, parts)
                stream.moved = self._now()
                size += turn
            if stream.out:
                if stream.credit:
                    stream.queued = True
                    self._ready.append(stream)
            elif stream.ending and not stream.end_sent:
                parts.append(framing.frame(framing.END, stream.id))
                self._end(stream)
            if turn:
                stream.drained(turn)
        return parts

    @staticmethod
    def _take(stream: Stream, n: int, parts: list[bytes]) -> None:
        stream.credit -= n
        stream.waiting -= n
        out = stream.out
        while n:
            piece = out.popleft()
            if len(piece) > n:
                out.appendleft(piece[n:])
                piece = piece[:n]
            parts.append(piece)
            n -= len(piece)

    def _end(self, stream: Stream) -> None:
        if stream.end_received:
            self._forget(stream)
        stream.was_ended()

    # -- receiving -------------------------------------------------------------------------------------------------

    def received(self, link: Link, data: bytes | memoryview) -> None:
        """Bytes of the link, whose memory may be used again. What is no tunnel ends the session."""
        if link is not self.link:
            return
        self._heard = now = self._now()
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self.received_bytes += len(data)
        try:
            for kind, number, payload in self._frames.feed(data):
                if kind == framing.DATA:
                    self._data(number, payload, now)
                else:
                    self._frame(kind, number, payload)
        except Garbage as e:
            log.warning("tunnel %s: what comes is not by the rules: %s", self.name, e)
            self.close(Refused(f"what came through the tunnel is not by its rules: {e}"))
            return
        if self.received_bytes - self._confirmed >= _CONFIRM:
            self._confirmed = self.received_bytes
            self.control(framing.ack(self.received_bytes))

    def _data(self, number: int, data: bytes, now: float) -> None:
        self._moved = now
        stream = self.streams.get(number)
        if stream is None or stream.end_received:
            self._known(number)
            return
        stream.moved = now
        if not stream.window.received(len(data)):
            raise Garbage("more data than there was credit for")
        stream.received(data)

    def _frame(self, kind: int, number: int, payload: bytes) -> None:
        if kind == framing.OPEN:
            self._opened(number, payload)
        elif kind == framing.PING:
            if len(payload) != 8:
                raise Garbage("a ping has 8 bytes")
            self._pong = framing.frame(framing.PONG, 0, payload)
            self._plan()
        elif kind == framing.PONG:
            self._ponged()
        elif kind == framing.ACK:
            if not self._kept.confirm(framing.number(payload)):
                raise Garbage("a confirmation of what was never sent")
            self._plan()
        elif kind == framing.BYE:
            self.close(error_of(payload), tell=False)
        else:
            self._of_stream(kind, number, payload)

    def _of_stream(self, kind: int, number: int, payload: bytes) -> None:
        stream = self.streams.get(number)
        if stream is None:
            self._known(number)
        elif kind == framing.CREDIT:
            stream.credit += framing.number(payload)
            if stream.credit > 1 << 30:
                raise Garbage("credit without end")
            self.wants(stream)
        elif kind == framing.END:
            if stream.end_sent:
                self._forget(stream)
            if not stream.end_received:
                stream.ended()
        elif kind == framing.RESET:
            self._forget(stream)
            stream.failed(error_of(payload))
        elif kind == framing.OPENED:
            with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
                stream.said(msgspec.msgpack.decode(payload, type=dict[str, Any]))

    def _known(self, number: int) -> None:
        """Frames may still come for a stream that we ended, not for one that never was."""
        ours = number % 2 == (1 if self.dials else 0)
        if number > (self._next if ours else self._highest):
            raise Garbage("a stream that was never opened")

    def _opened(self, number: int, payload: bytes) -> None:
        if number <= self._highest or number % 2 == (1 if self.dials else 0):
            raise Garbage("a stream's number that is not new")
        self._highest = number
        try:
            purpose = msgspec.msgpack.decode(payload, type=Open)
        except (msgspec.DecodeError, msgspec.ValidationError) as e:
            raise Garbage(f"a stream without a purpose: {e}") from None
        stream = Stream(self, number, purpose, self._now())
        self.streams[number] = stream
        self._theirs += 1
        if self._theirs > MOST_STREAMS:
            stream.fail(TooMany(f"more than {MOST_STREAMS} streams at once", remedy="close some"))
            return
        self._serve(stream)

    # -- the link's pulse ------------------------------------------------------------------------------------------

    def _ping(self) -> None:
        if not self._waiting_pong:
            self._pinged = self._now()
            self._waiting_pong = True
            self.control(framing.frame(framing.PING, 0, b"edgeward"))

    def _ponged(self) -> None:
        if not self._waiting_pong:
            return
        self._waiting_pong = False
        rtt = max(self._now() - self._pinged, 1e-4)
        if not self._measured:
            self.rtt = self._best = rtt
            self._measured = True
        self.rtt += (rtt - self.rtt) / 4
        # the shortest one counts; a way that has become longer is believed slowly, queues are longer at times
        self._best = rtt if rtt < self._best else self._best + (rtt - self._best) * 0.005

    @property
    def suspect(self) -> bool:
        """Whether the link has not answered for longer than it should."""
        quiet = self._now() - max(self._heard, self._pinged)
        return self._waiting_pong and quiet > max(_SUSPECT, 4 * self.rtt)

    def _look(self) -> None:
        now = self._now()
        if self.link is None:
            if now - self._lost > self._patience:
                self.close(Unreachable("the tunnel's link did not come back", remedy="open it anew"), tell=False)
                return
            self._on_suspect()
        elif self._waiting_pong:
            quiet = now - max(self._heard, self._pinged)
            if quiet > max(_DEAD, 8 * self.rtt):
                link = self.link
                link.close()
                self.detach(link, "no answer")
            elif self.suspect:
                self._on_suspect()
        elif now - self._pinged >= (_BUSY_PING if now - self._moved < 3 else _IDLE_PING):
            self._ping()
        self._timer = self._loop.call_later(_LOOK, self._look)


def _gathered(parts: list[bytes]) -> list[bytes]:
    """The parts with small neighbours put together: each piece costs a TLS record at least."""
    if len(parts) == 1:
        return parts
    pieces: list[bytes] = []
    small: list[bytes] = []
    for part in parts:
        if len(part) < _LARGE:
            small.append(part)
            continue
        if small:
            pieces.append(b"".join(small))
            small.clear()
        pieces.append(part)
    if small:
        pieces.append(b"".join(small))
    return pieces


class _Wire:
    """One direction's end of a link in memory."""

    def __init__(self) -> None:
        self.paused = False
        self.other: _Wire | None = None
        self.session: Session | None = None
        self._loop = asyncio.get_running_loop()

    def send(self, pieces: list[bytes]) -> None:
        if self.other is not None and self.other.session is not None:
            self._loop.call_soon(self.other.session.received, self.other, b"".join(pieces))

    def close(self) -> None:
        other, self.other = self.other, None
        if other is not None and other.session is not None:
            self._loop.call_soon(other.session.detach, other)


def pair(
    serve: Callable[[Stream], None], serve_back: Callable[[Stream], None] | None = None
) -> tuple[Session, Session]:
    """Two sessions joined in memory: the first opens, the second serves. For services and tests."""

    def nobody(stream: Stream) -> None:
        stream.reset("refused", "nothing is served here")

    one = Session("one", dials=True, serve=serve_back or nobody)
    two = Session("two", dials=False, serve=serve)
    a, b = _Wire(), _Wire()
    a.session, b.session, a.other, b.other = one, two, b, a
    one.attach(a, 0)
    two.attach(b, 0)
    return one, two
