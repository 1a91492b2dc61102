"""One worker's socket as the node sees it: frames in, frames out, one job at a time.

What comes is checked against what may come now; whatever does not keep to the protocol ends the worker. What an answer
means is the pool's business (``pool.py``), to which a :class:`Link` belongs; its pieces wait in a :class:`Stream` for a
reader that may be slower.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec

from edgeward.core import invocation as wire
from edgeward.core.errors import EdgewardError
from edgeward.core.invocation import CallFailed, Event, Reply, frame
from edgeward.functions.asks import Tally, Work, refusal
from edgeward.functions.guard import Guard
from edgeward.functions.origins import Worker
from edgeward.functions.output import Output
from edgeward.functions.reach import Allowed

if TYPE_CHECKING:
    from edgeward.functions.pool import Pool

#: Seconds in which a worker that was let go ends by itself.
_GRACE = 2.0
#: Bytes of log that one call may send before its worker counts as broken.
_MAX_LOG = 16 << 20
#: Bytes of answers to what it asked for that a worker may leave unread.
_UNREAD = 32 << 20
#: Bytes of an answer in pieces that wait for a slow reader.
_STREAM = 256 * 1024


class EndedEarly(EdgewardError):
    """It ended by itself while it was being started."""


class SaidBroken(EdgewardError):
    """It said that it cannot; then it ends."""


class Job:
    """One call on its way."""

    __slots__ = ("begun", "cold", "deadline", "event", "future", "id", "stream")

    def __init__(self, id: str, event: Event, begun: float, deadline: float, future: asyncio.Future[Reply]) -> None:
        self.id, self.event, self.begun, self.deadline, self.future = id, event, begun, deadline, future
        self.cold = False
        self.stream: Stream | None = None


class Stream:
    """The pieces of an answer between a worker and a reader that may be slower."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._pieces: deque[bytes] = deque()
        self._bytes = 0
        self._more = asyncio.Event()
        self._error: CallFailed | None = None
        self._ended = False

    def add(self, data: bytes) -> None:
        if not data:
            return  # pieces of nothing would be without bound
        self._pieces.append(data)
        self._bytes += len(data)
        if self._bytes > _STREAM:
            self._link.pause()
        self._more.set()

    def end(self, error: CallFailed | None = None) -> None:
        self._ended, self._error = True, error
        self._more.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while True:
                while self._pieces:
                    piece = self._pieces.popleft()
                    self._bytes -= len(piece)
                    if self._bytes <= _STREAM // 2:
                        self._link.resume()
                    yield piece
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return
                self._more.clear()
                await self._more.wait()  # bounded by the call's deadline, which ends the stream
        finally:
            if not self._ended:
                self._link.abandon(self)


class Link(asyncio.Protocol):
    """One worker's socket: frames in, frames out, one job at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._frames = wire.Frames(pool.version.body + 256 * 1024)
        self.transport: asyncio.Transport | None = None
        self.child: Worker | None = None
        #: What a program writes beside the protocol.
        self.output: Output | None = None
        self.job: Job | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.jailed: wire.Jailed | None = None
        self.guard: Guard | None = None
        self.idle_since = 0.0
        self.leaving = False
        #: It takes no other call after this one.
        self.last = False
        self._paused = False
        #: Why we ended it, when it was us.
        self.sentence: CallFailed | None = None
        self._logged = 0
        self._tally = Tally()
        self._call = ""

    # -- asyncio's side --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                self._message(wire.decode_from_worker(payload), len(payload))
        except wire.FrameTooLong:
            bound = self._pool.version.body
            self.end(self._pool.failure("too-large", f"the answer is over {bound} bytes", self.job, body=bound))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            # text that is no text and what is nested too deep are the decoder's other words for garbage
            self.end(self._pool.failure("crashed", f"the worker does not keep to the protocol: {e}", self.job))

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.lost(self)

    # -- messages --------------------------------------------------------------------------------------------------

    def _message(self, message: wire.FromWorker, size: int) -> None:
        job = self.job
        kind = type(message)
        if kind is wire.Result:
            if job is None or job.stream is not None or message.id != job.id:  # type: ignore[union-attr]
                raise msgspec.ValidationError("an answer that nobody asked for")
            self._pool.answered(self, job, message)  # type: ignore[arg-type]
        elif isinstance(message, wire.Log):
            self.logged(size + 64)
            self._pool.say(message)
        elif isinstance(message, (wire.Jailed, wire.Ready, wire.Broken)):
            self._of_start(message)
        elif isinstance(message, wire.Ask):
            self._asked(job, message, size)
        else:
            self._of_call(job, message)

    def call(self) -> str:
        """The id of the call in hand, or of the last: what was written in it may be read after its answer."""
        return self._call

    def logged(self, size: int) -> None:
        """So many bytes of log; far too many end the worker."""
        self._logged += size
        if self._logged > _MAX_LOG and self.sentence is None:
            self.end(
                self._pool.failure(
                    "crashed", "the worker does not keep to the protocol: far too much log in one call", self.job
                )
            )

    def _of_start(self, message: wire.Jailed | wire.Ready | wire.Broken) -> None:
        if self.ready.done():
            if self.leaving or self.ready.cancelled():
                return
            raise msgspec.ValidationError("a start that was over")
        if isinstance(message, wire.Jailed):
            if self.jailed is None:
                self.jailed = message
                self._guarded(message)
        elif isinstance(message, wire.Broken):
            self.ready.set_exception(SaidBroken(message.message))
            self._pool.say(wire.Log("", 40, 0.0, message.trace or message.message))
        elif self.jailed is None:
            raise msgspec.ValidationError("ready before it was jailed")
        else:
            self.ready.set_result(None)

    def _guarded(self, jailed: wire.Jailed) -> None:
        """A worker with a list of what it may reach waits for its guard, before its code is there."""
        reach = self._pool.version.reach
        if not reach or self.child is None:
            return
        if jailed.listener < 0:
            why = jailed.refused.get("network", "not promised")
            self.ready.set_exception(EdgewardError(f"this node cannot hold it to limits.network: {why}"))
            return
        try:
            self.guard = Guard(Allowed(reach), self.child.pid, jailed.listener, self._beyond)
        except OSError as e:
            self.ready.set_exception(EdgewardError(f"this node cannot hold it to limits.network: {e.strerror}"))

    def _beyond(self, where: str) -> None:
        """It asked for an address that is not on its list."""
        id = self.job.id if self.job is not None else ""
        self._pool.say(wire.Log(id, 30, 0.0, f"{where} is not in limits.network: refused"))

    def _of_call(self, job: Job | None, message: Any) -> None:
        if job is None or message.id != job.id:
            raise msgspec.ValidationError("something of a call that it does not have")
        if isinstance(message, wire.Raised):
            self._pool.raised(self, job, message)
        elif isinstance(message, wire.Leaving):
            self.last = True
        elif isinstance(message, wire.Head):
            if job.stream is not None:  # whoever reads the first one must hear of its end
                raise msgspec.ValidationError("a second answer to one call")
            job.stream = Stream(self)
            reply = self._pool.reply(job, message.status, message.headers)
            reply.chunks = aiter(job.stream)
            if job.future.done():
                self.abandon(job.stream)
            else:
                job.future.set_result(reply)
        elif job.stream is None:
            raise msgspec.ValidationError("a piece of an answer that was not begun")
        elif isinstance(message, wire.Chunk):
            job.stream.add(message.data)
        else:
            job.stream.end()
            self._pool.streamed(self)

    def _asked(self, job: Job | None, ask: wire.Ask, size: int) -> None:
        """Something of the node's is asked for: answered at once, or when it is done."""
        tally, pool = self._tally, self._pool
        tally.asked += 1
        if tally.wild or self.transport.get_write_buffer_size() > _UNREAD:  # type: ignore[union-attr]
            raise msgspec.ValidationError("it goes on asking and does not heed the answers")
        if job is None or ask.id != job.id:
            self._tell(refusal(ask, "refused", "there is no such call in hand"))
        elif why := tally.over(size):
            self._tell(refusal(ask, "too-many", why))
        else:
            answer = pool.host.asks.answer(pool.version, pool.policy, job.id, job.event, ask)
            if isinstance(answer, wire.Answer):
                self._tell(answer)
            else:
                tally.open += 1
                tally.open_bytes += size
                pool.host.spawn(self._answered(answer, size))

    async def _answered(self, work: Work, size: int) -> None:
        try:
            self._tell(await work())
        finally:
            self._tally.open -= 1
            self._tally.open_bytes -= size

    def _tell(self, answer: wire.Answer) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(frame(answer))

    def give(self, job: Job, now: float) -> None:
        """Sends the call."""
        self.job, self._call = job, job.id
        self._logged = 0
        self._tally.begin()
        self.transport.write(frame(wire.Invoke(job.id, job.deadline - now, job.event)))  # type: ignore[union-attr]

    def pause(self) -> None:
        if not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self.transport is not None:
            self._paused = False
            self.transport.resume_reading()

    def abandon(self, stream: Stream) -> None:
        """The reader of an answer in pieces has gone: so is its worker, which may be anywhere in it."""
        if self.job is not None and self.job.stream is stream:
            self.end(self._pool.failure("crashed", "the caller went away", self.job))

    # -- the end ---------------------------------------------------------------------------------------------------

    def end(self, sentence: CallFailed | None) -> None:
        """Kills the worker; its call fails with ``sentence`` at once."""
        self.sentence = sentence
        if self.child is not None:
            self.child.kill()
        job, self.job = self.job, None
        if job is not None and sentence is not None:
            self._pool.fail(job, sentence)
        if self.transport is not None:
            self.transport.abort()

    def leave(self) -> None:
        """Lets an idle worker go: it ends when its socket closes."""
        self.leaving = True
        if self.transport is not None:
            self.transport.close()
        if self.child is not None:
            asyncio.get_running_loop().call_later(_GRACE, self.child.kill)
