"""The workers of one version, and the calls that wait for one: each worker has one call at a time.

A call comes in as a :class:`Job` and leaves as its future's result: a ``Reply`` or a ``CallFailed``. A worker that is
free takes the oldest job at once, inside of the very callback that brought its last answer. How many workers there
should be is decided in ``scale.py``; deadlines are kept by the dispatcher, which calls :meth:`Pool.expire`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edgeward.core import invocation as wire
from edgeward.core.errors import EdgewardError
from edgeward.core.invocation import Call, CallFailed, Event, FailKind, Reply, frame
from edgeward.core.proc import ending
from edgeward.functions import scale
from edgeward.functions.asks import Asks, Tally, Work, refusal
from edgeward.functions.guard import Guard
from edgeward.functions.origins import Origin, Worker
from edgeward.functions.output import Output
from edgeward.functions.reach import Reach, environment
from edgeward.functions.sandbox import Cage
from edgeward.functions.versions import Policy, Version

log = logging.getLogger("edgeward.functions")

#: Seconds in which a worker that was let go ends by itself.
_GRACE = 2.0
#: Seconds until the zygote has told how a worker ended.
_TOLD = 2.0
#: Characters of a program's last words that are told.
_LAST = 300
#: Bytes of log that one call may send before its worker counts as broken.
_MAX_LOG = 16 << 20
#: Bytes of answers to what it asked for that a worker may leave unread.
_UNREAD = 32 << 20
#: Bytes of an answer in pieces that wait for a slow reader.
_STREAM = 256 * 1024


class Host(Protocol):
    """What a pool needs of the dispatcher."""

    #: runtime -> where its workers come from
    origins: dict[str, Origin]
    asks: Asks
    tmp: Path
    node: str
    site: str

    def new_instance(self) -> str: ...
    def library(self, version: Version) -> list[str]: ...
    def now(self) -> float: ...
    def spawn(self, work: Any) -> None: ...


class _Ended(EdgewardError):
    """It ended by itself while it was being started."""


class _Broken(EdgewardError):
    """It said that it cannot; then it ends."""


class Job:
    """One call on its way."""

    __slots__ = ("begun", "cold", "deadline", "event", "future", "id", "stream")

    def __init__(self, id: str, event: Event, begun: float, deadline: float, future: asyncio.Future[Reply]) -> None:
        self.id, self.event, self.begun, self.deadline, self.future = id, event, begun, deadline, future
        self.cold = False
        self.stream: _Stream | None = None


class _Stream:
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
        except msgspec.MsgspecError as e:
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
            self.ready.set_exception(_Broken(message.message))
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
            self.guard = Guard(Reach(reach), self.child.pid, jailed.listener, self._beyond)
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
            job.stream = _Stream(self)
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

    def abandon(self, stream: _Stream) -> None:
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


class Pool:
    """All workers of one version."""

    def __init__(
        self,
        host: Host,
        version: Version,
        policy: Policy,
        *,
        say: Callable[[Pool, wire.Log], None],
        count: Callable[[str, float], None],
        told: Callable[[], None],
    ) -> None:
        self.host, self.version, self.policy = host, version, policy
        self._say, self._count, self._told = say, count, told
        self.links: set[Link] = set()
        self.idle: list[Link] = []
        self.queue: deque[Job] = deque()
        self.starting = 0
        self.closed = False
        #: It has not proved itself: calls wait.
        self.probation = False
        self.jailed: wire.Jailed | None = None
        #: Failures in a row of starting a worker or of a process that ended; answers that were good.
        self.failures = self.good = self.cold = 0
        self.last_error = ""
        self._not_before = 0.0

    # -- calls -----------------------------------------------------------------------------------------------------

    def submit(self, job: Job, now: float) -> None:
        if self.idle and not self.probation:
            self.idle.pop().give(job, now)
            return
        self.queue.append(job)
        self.grow(now)

    def open(self, now: float) -> None:
        """The probation is over: calls that waited are answered."""
        self.probation = False
        while self.idle and self.queue:
            self._next(self.idle.pop())
        self.grow(now)

    def grow(self, now: float) -> None:
        """Starts what is missing."""
        if self.closed or self.probation:
            return
        if now < self._not_before:
            if not self.links and not self.starting:
                self._refuse_waiting(self._not_before - now)
            return
        for _ in range(scale.missing(len(self.queue), len(self.links), self.starting, self.policy)):
            self.starting += 1
            self.host.spawn(self._start_one())

    def _refuse_waiting(self, after: float) -> None:
        while self.queue:
            job = self.queue.popleft()
            self.fail(job, self.failure("unavailable", f"cannot be started: {self.last_error}", job, after=after))

    def _next(self, link: Link) -> None:
        """A worker is free."""
        link.job = None
        if link.last:
            link.leave()  # another one is started when it has gone
            return
        if self.closed:
            if self.queue:
                link.give(self.queue.popleft(), self.host.now())
            else:
                link.leave()
            return
        queue = self.queue
        while queue and not self.probation:
            job = queue.popleft()
            if not job.future.done():
                link.give(job, self.host.now())
                return
        link.idle_since = self.host.now()
        self.idle.append(link)

    def reply(self, job: Job, status: int, headers: list[tuple[str, str]], body: bytes = b"") -> Reply:
        duration = self.host.now() - job.begun
        return Reply(status, headers, body, None, self.version.digest, job.id, duration, job.cold)

    def answered(self, link: Link, job: Job, message: wire.Result) -> None:
        if not job.future.done():
            reply = self.reply(job, message.status, message.headers, message.body)
            job.future.set_result(reply)
            self._count("", reply.duration)
        self.good += 1
        self.failures = 0
        self._next(link)

    def streamed(self, link: Link) -> None:
        if link.job is not None:
            self._count("", self.host.now() - link.job.begun)
        self.good += 1
        self.failures = 0
        link.resume()
        self._next(link)

    def raised(self, link: Link, job: Job, message: wire.Raised) -> None:
        kind: FailKind = message.kind if message.kind in ("memory", "too-large") else "error"  # type: ignore[assignment]
        if message.kind == "timeout":
            error = self._late(job)
        elif kind == "memory":
            error = self.failure(kind, f"was over its memory ({message.message})", job, memory=self.version.memory)
        elif kind == "too-large":
            error = self.failure(kind, message.message, job, body=self.version.body)
        else:
            error = self.failure(kind, f"the handler raised {message.message}; its log says where", job)
        if message.trace:
            self.say(wire.Log(job.id, 40, 0.0, message.trace))
        self.fail(job, error)
        self.failures = 0
        link.resume()
        self._next(link)

    def fail(self, job: Job, error: CallFailed) -> None:
        self._count(error.kind, self.host.now() - job.begun)
        if job.stream is not None:
            job.stream.end(error)
        elif not job.future.done():
            job.future.set_exception(error)

    def failure(self, kind: FailKind, why: str, job: Job | None, *, after: float = 0.0, **limit: object) -> CallFailed:
        return CallFailed(
            kind,
            why,
            function=self.version.key,
            limit=limit,
            invocation=job.id if job is not None else "",
            version=self.version.digest,
            retry_after=after,
        )

    def say(self, line: wire.Log) -> None:
        self._say(self, line)

    # -- time ------------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> float:
        """Ends what is over its deadline; the earliest deadline that is left."""
        earliest = float("inf")
        for link in list(self.links):
            if link.job is not None:
                if link.job.deadline <= now:
                    link.end(self._late(link.job))
                else:
                    earliest = min(earliest, link.job.deadline)
        if any(j.deadline <= now or j.future.done() for j in self.queue):
            left: deque[Job] = deque()
            for job in self.queue:
                if job.deadline <= now:
                    self.fail(job, self._late(job))
                elif not job.future.done():
                    left.append(job)
            self.queue = left
        return min([earliest, *(j.deadline for j in self.queue)])

    def _late(self, job: Job) -> CallFailed:
        allowed = job.deadline - job.begun
        return self.failure("timeout", f"did not answer within {allowed:.4g} s", job, timeout=self.version.timeout)

    def rest(self, now: float) -> float:
        """Lets workers go that were idle for long enough; when to look again."""
        keep = max(0, len(self.links) + self.starting - self.policy.minimum)
        # the longest idle are at the front: calls take from the end
        while self.idle and keep and now - self.idle[0].idle_since >= self.policy.idle:
            self.idle.pop(0).leave()
            keep -= 1
            self._told()
        return self.idle[0].idle_since + self.policy.idle if self.idle and keep else float("inf")

    # -- workers ---------------------------------------------------------------------------------------------------

    async def _start_one(self) -> None:
        try:
            link = await self.start()
        except EdgewardError as e:
            self.starting -= 1
            self.start_failed(e.message)
            return
        except asyncio.CancelledError:
            self.starting -= 1
            raise
        self.starting -= 1
        self.welcome(link)

    def welcome(self, link: Link) -> None:
        self.cold += 1
        if self.queue:
            self.queue[0].cold = True
        if link in self.links and link.job is None:
            self._next(link)
        self._told()

    def start_failed(self, why: str) -> None:
        self.failures += 1
        self.last_error = why
        pause = scale.pause(self.failures)
        now = self.host.now()
        self._not_before = now + pause
        if not self.links and not self.starting:
            self._refuse_waiting(pause)
        asyncio.get_running_loop().call_later(pause + 0.001, lambda: self.grow(self.host.now()))
        self._told()

    async def start(self) -> Link:
        """A worker that has loaded the code. Raises ``EdgewardError`` that says why not."""
        version = self.version
        origin = self.host.origins.get(version.runtime)
        if origin is None:
            raise EdgewardError(f"this node does not run {version.runtime}")
        instance = self.host.new_instance()
        tmp = self.host.tmp / instance
        cage = Cage(
            instance=instance,
            tmp=str(tmp),
            user=version.user,
            memory=version.memory,
            cpu=version.cpu,
            pids=version.pids,
            tmp_size=version.tmp,
            open_files=version.open_files,
            network=version.network or bool(version.reach),
            reach=version.reach,
            library=self.host.library(version),
        )
        env = {**version.env, "HOME": str(tmp), "TMPDIR": str(tmp), "LANG": "C.UTF-8"}
        if version.reach:
            env["EDGEWARD_HOSTS"] = environment(version.reach)
        child = await origin.worker(version, cage, env)
        link = Link(self)
        link.child = child
        loop = asyncio.get_running_loop()
        try:
            await loop.create_unix_connection(lambda: link, sock=child.sock)
            if child.output is not None:
                link.output = output = Output(self.say, link.call, link.logged)
                await loop.connect_read_pipe(lambda: output, child.output)
            await self._load(link, origin.files(version))
        except BaseException as e:
            if isinstance(e, _Broken):
                await self._told_end(link)  # what it still has to say goes to the log
            child.kill()
            if link.transport is not None:
                link.transport.abort()
            if isinstance(e, EdgewardError):
                error = await self._why_not(link, e)
                self.last_error = error.message
                raise error from None
            if link.output is not None:
                link.output.close()
            raise
        self.links.add(link)
        return link

    async def _why_not(self, link: Link, e: EdgewardError) -> EdgewardError:
        """Why a worker could not be started, in the words of whoever knows best."""
        memory, how = await self._told_end(link)
        if memory:
            return EdgewardError("was over its memory while it loaded the code")
        if not isinstance(e, _Ended) or link.output is None:
            return e
        remedy = ""
        if self.version.command and ending(0) in how:
            remedy = " (it spoke no worker protocol; a program that reads its input and writes its answer: mode: stdio)"
        return EdgewardError(f"its process {how}{remedy}")

    async def _load(self, link: Link, files: dict[str, str]) -> None:
        version = self.version
        init = wire.Init(
            version.namespace,
            version.name,
            version.digest,
            self.host.node,
            self.host.site,
            version.handler,
            files,
            version.body,
            self.policy.log_level,
            version.secrets,
        )
        if link.transport is not None and not link.transport.is_closing():  # it may have ended by now
            link.transport.write(frame(init))
        try:
            async with asyncio.timeout(version.startup):
                await link.ready
        except TimeoutError:
            told = (
                "" if not version.command else " (a worker says Ready on the descriptor that EDGEWARD_WORKER_FD names)"
            )
            raise EdgewardError(f"did not load within {version.startup:g} s{told}") from None
        if link.jailed is not None:
            self.jailed = link.jailed
            missing = sorted(set(version.require) - set(link.jailed.enforced))
            if missing:
                why = "; ".join(f"{m}: {link.jailed.refused.get(m, 'not promised')}" for m in missing)
                raise EdgewardError(f"this node does not enforce what it requires: {why}")

    def lost(self, link: Link) -> None:
        """A worker's socket is closed."""
        if link.guard is not None:
            link.guard.close()
        if link not in self.links:
            if not link.ready.done():
                link.ready.set_exception(_Ended("its process ended while it loaded the code"))
            return
        self.links.discard(link)
        if link in self.idle:
            self.idle.remove(link)
        if link.job is not None or (not link.leaving and link.sentence is None):
            self.host.spawn(self._autopsy(link))
        else:
            self.grow(self.host.now())
        self._told()

    async def _autopsy(self, link: Link) -> None:
        """Why a worker ended that nobody ended; its call fails with that."""
        job, link.job = link.job, None
        if link.child is None:
            return
        link.child.kill()  # it closed its socket: whatever it still does is nobody's
        memory, how = await self._told_end(link)
        why = "was over its memory" if memory else f"its process {how}"
        if job is None:
            self.start_failed(why)  # it ended while it had nothing to do: not again and again at once
            return
        self.failures += 1
        self.last_error = why
        if memory:
            self.fail(job, self.failure("memory", why, job, memory=self.version.memory))
        else:
            self.fail(job, self.failure("crashed", why, job))
        self.grow(self.host.now())

    @staticmethod
    async def _told_end(link: Link) -> tuple[bool, str]:
        """(over its memory, how it ended in words, its own last ones too)"""
        child, output = link.child, link.output
        if child is None:
            return False, "ended"
        try:
            async with asyncio.timeout(_TOLD):
                told = await asyncio.shield(child.ended)
                if output is not None:
                    await output.over.wait()
        except TimeoutError:
            if not child.ended.done():
                return False, "ended"
            told = child.ended.result()
        if output is None:
            return told.out_of_memory, ending(told.status)
        output.close()
        last = f": {output.last[:_LAST]}" if output.last else ""
        return told.out_of_memory or output.out_of_memory, ending(told.status) + last

    def drain(self) -> None:
        """No more calls come here: workers go as they get free."""
        self.closed = True
        for link in self.idle:
            link.leave()
        self.idle.clear()

    def forget(self, job: Job) -> None:
        """Its caller went away: a call that waits is not begun, and its event is not kept."""
        if job in self.queue:
            self.queue.remove(job)

    def take_waiting(self) -> list[Job]:
        """Calls that no worker has begun: another version may answer them."""
        jobs = [j for j in self.queue if not j.future.done()]
        self.queue.clear()
        return jobs


def deadline_of(call: Call, now: float, timeout: float) -> float:
    return min(call.deadline, now + timeout) if call.deadline else now + timeout
