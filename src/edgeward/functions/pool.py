"""The workers of one version, and the calls that wait for one: each worker has one call at a time.

A call comes in as a :class:`Job` and leaves as its future's result: a ``Reply`` or a ``CallFailed``. A worker that is
free takes the oldest job at once, inside of the very callback that brought its last answer. How many workers there
should be is decided in ``scale.py``; deadlines are kept by the dispatcher, which calls :meth:`Pool.expire`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from edgeward.core import invocation as wire
from edgeward.core.errors import EdgewardError
from edgeward.core.invocation import Call, CallFailed, FailKind, Reply, frame
from edgeward.core.proc import ending
from edgeward.functions import scale
from edgeward.functions.asks import Asks
from edgeward.functions.link import EndedEarly, Job, Link, SaidBroken
from edgeward.functions.origins import Origin
from edgeward.functions.output import Output
from edgeward.functions.reach import environment
from edgeward.functions.sandbox import Cage
from edgeward.functions.versions import Policy, Version

log = logging.getLogger("edgeward.functions")

#: Seconds until the zygote has told how a worker ended.
_TOLD = 2.0
#: Characters of a program's last words that are told.
_LAST = 300


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
            if isinstance(e, SaidBroken):
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
        if not isinstance(e, EndedEarly) or link.output is None:
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
                link.ready.set_exception(EndedEarly("its process ended while it loaded the code"))
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
