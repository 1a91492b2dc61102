"""Every function of one node: how many calls there may be, who is asked, and when a call is over.

In come configurations (what should be) and calls; out go replies, problem documents and a status per function. Which
version answers, and how one takes over from another, is each function's own business (``switch.py``). This is the
``Invoker`` of the node: the gateway calls it in the same process, with no hop between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core import cgroup, clock
from edgeward.core import invocation as wire
from edgeward.core.errors import NotFound
from edgeward.core.files import ensure_dir
from edgeward.core.invocation import Call, CallFailed, Event, Reply
from edgeward.functions import picks, samples
from edgeward.functions.asks import Asks, Sampler
from edgeward.functions.link import Job
from edgeward.functions.logs import Line, LogFile, level_name
from edgeward.functions.memory import Memory
from edgeward.functions.nursery import Nursery, probe
from edgeward.functions.origins import Forked, Node, Origin, Programs
from edgeward.functions.pool import Pool, deadline_of
from edgeward.functions.sandbox import Cage, Verdict
from edgeward.functions.shelves import shelves
from edgeward.functions.switch import Function
from edgeward.functions.versions import Config, Policy, Version
from edgeward.functions.wasm import Wasm

log = logging.getLogger("edgeward.functions")

#: (namespace, name, status or None when it is gone)
Report = Callable[[str, str, dict[str, Any] | None], None]
#: (type, reason, message, namespace, name)
Tell = Callable[[str, str, str, str, str], None]
#: (key, digest of the version that was taken back and why; None when that is forgotten)
Judged = Callable[[str, tuple[str, str] | None], None]
#: A log line waits so long for others to be written with it. Seconds.
_GATHER = 0.05
#: Seconds between two looks whether what a killed dispatcher left has ended.
_SWEEP = 0.1
#: A worker's clock is not taken behind this (the year 2096); characters of fields that are not JSON's.
_TIMES, _SHOWN = 4e9, 1000


class Dispatcher:
    """The functions of one node; :meth:`run` until cancelled."""

    def __init__(
        self,
        folder: Path,
        node: str,
        site: str,
        *,
        report: Report = lambda *_: None,
        tell: Tell = lambda *_: None,
        good: Callable[[Config], None] = lambda _: None,
        sample: Sampler | None = None,
        judged: Judged = lambda *_: None,
    ) -> None:
        self.asks = Asks(Memory(folder / "state.db"))
        self.asks.sampler = sample or self._offered
        self.folder, self.node, self.site = ensure_dir(folder), node, site
        self.tmp = ensure_dir(folder / "tmp")
        self._report, self._tell, self.good, self.judged = report, tell, good, judged
        self._functions: dict[str, Function] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        # groups are named by the folder too: on one machine several nodes may have one name
        self._prefix = f"fn-{zlib.crc32(str(folder.absolute()).encode()):08x}-"
        self.nursery = Nursery(folder / "zygote.log", node, self._prefix)
        self._wasm = Wasm(folder, node, self._prefix, self.new_instance, self.spawn)
        self.origins: dict[str, Origin] = {
            "python": Forked(self.nursery),
            "node": Node(self.nursery),
            "command": Programs(self.nursery),
            "wasm": self._wasm,
        }
        self._serial = int(clock.now() * 1000) % 0xFFFFFFFF
        self._instances = 0
        self._calls = 0
        self._due = float("inf")
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unwritten: set[LogFile] = set()
        self._wake = asyncio.Event()
        self.probed: Verdict | None = None
        self._closed = False
        self._left = self._sweep(cgroup.leftovers(node, self._prefix))
        for path in self.tmp.iterdir():
            shutil.rmtree(path, ignore_errors=True)

    # -- calls -----------------------------------------------------------------------------------------------------

    async def invoke(self, call: Call) -> Reply:
        """The function's answer. Raises :class:`CallFailed`."""
        f = self._functions.get(call.function) or self._functions.get(f"default/{call.function}")
        if f is None:
            raise CallFailed("unknown", "there is no such function on this node", function=call.function)
        pool = f.current if f.canary is None and call.version is None else f.choose(call)
        if pool is None and (call.version or (pool := f.coming) is None):
            raise self._cannot(f, call)
        if f.in_hand >= f.policy.concurrency:
            f.failed["busy"] += 1
            raise CallFailed(
                "busy",
                f"has {f.in_hand} calls in hand, its bound on one node",
                function=pool.version.key,
                limit={"concurrency": f.policy.concurrency},
                version=pool.version.digest,
                retry_after=1.0,
            )
        if len(call.event.data) > pool.version.body:
            raise CallFailed(
                "too-large",
                f"the event has {len(call.event.data)} bytes",
                function=pool.version.key,
                limit={"body": pool.version.body},
                status=413,
            )
        loop = self._loop or self._in_loop()
        now = loop.time()
        deadline = deadline_of(call, now, pool.version.timeout)
        self._calls += 1
        job = Job(f"{self._serial:08x}{self._calls:08x}", call.event, now, deadline, loop.create_future())
        f.in_hand += 1
        try:
            if deadline < self._due:
                self._arm(deadline)
            pool.submit(job, now)
            reply = await job.future
            if reply.status >= 500 and f.canary is not None:
                f.answered_badly(reply)
            if f.samples is not None:
                self._sample(f, call, reply, None)
            return reply
        except CallFailed as e:
            if f.samples is not None:
                self._sample(f, call, None, e)
            raise
        finally:
            f.in_hand -= 1
            if job.future.cancelled():
                for waiting in f.pools():
                    waiting.forget(job)

    def _sample(self, f: Function, call: Call, reply: Reply | None, error: CallFailed | None) -> None:
        """A call ended of a function whose samples are kept."""
        file, done = f.samples, reply or error
        if file is None or done is None:
            return
        if why := picks.why_kept(file.plan, done.invocation, error.kind if error else "", done.status):
            time = clock.timestamp()
            if file.has_room(time, len(call.event.data) + (len(reply.body) if reply else 0)):
                file.keep(samples.of_call(time, why, self.node, call.event, reply, error, done.version))

    async def _offered(self, version: Version, invocation: str, offer: wire.Sample) -> bool:
        """A handler offers a pair: whether it is kept."""
        f = self._functions.get(version.key)
        file = f.samples if f is not None else None
        if file is None or not picks.is_wanted(file.plan, offer.score):
            return False
        time = clock.timestamp()
        if not file.has_room(time, len(offer.input) + len(offer.output)):
            return False
        return file.keep(samples.of_offer(time, self.node, invocation, offer, version.digest))

    def _cannot(self, f: Function, call: Call) -> CallFailed:
        name = f.wanted.key
        if f.phase == "Refused":
            return CallFailed("refused", f.message, function=name, limit={"require": f.wanted.require})
        if call.version and f.pool() is not None:
            return CallFailed("unknown", f"there is no version {call.version[:64]!r} of it here", function=name)
        return CallFailed("unavailable", f.message or "is not ready", function=name, retry_after=1.0)

    def _in_loop(self) -> asyncio.AbstractEventLoop:
        self._loop = asyncio.get_running_loop()
        return self._loop

    def _arm(self, deadline: float) -> None:
        self._due = deadline
        if self._timer is not None:
            self._timer.cancel()
        self._timer = (self._loop or self._in_loop()).call_at(deadline, self._expire)

    def _expire(self) -> None:
        """One timer for all: set for the earliest deadline, and not moved when that call is answered in time."""
        now = self.now()
        self._timer, self._due = None, float("inf")
        earliest = float("inf")
        for f in self._functions.values():
            for pool in f.pools():
                earliest = min(earliest, pool.expire(now))
        if earliest < float("inf"):
            self._arm(earliest)

    # -- what functions and their pools need -------------------------------------------------------------------------

    def now(self) -> float:
        return (self._loop or self._in_loop()).time()

    def library(self, version: Version) -> list[str]:
        """Folders of the version's code and packages, where it has such; ``stock.py`` put them there."""
        return [str(p) for p in shelves(self.folder, version.code, version.packages)]

    def new_instance(self) -> str:
        self._instances += 1
        return f"{self._prefix}{os.getpid():x}-{self._instances}"

    def spawn(self, work: Any) -> None:
        if self._closed:
            work.close()
            return
        self.own(asyncio.ensure_future(work))

    def own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def wake(self) -> None:
        self._wake.set()

    def job(self, event: Event, timeout: float) -> Job:
        """A call of our own, whose deadline is kept."""
        now = self.now()
        self._calls += 1
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        job = Job(f"{self._serial:08x}{self._calls:08x}", event, now, now + timeout, future)
        if job.deadline < self._due:
            self._arm(job.deadline)
        return job

    async def lacks(self, version: Version) -> str:
        """Why this node cannot or must not run it; empty: it may."""
        gone = [p for p in shelves(self.folder, version.code, version.packages) if not p.is_dir()]
        if gone:
            return f"its {gone[0].parent.name} is not on this node; the agent fetches it"
        if version.runtime not in self.origins:
            return f"this node does not run {version.runtime}; update Edgeward on it"
        if lacking := await self.origins[version.runtime].lacks(version):
            return lacking
        if self.probed is None or not version.require:
            return ""
        missing = [r for r in version.require if r not in self.probed.enforced and r != "cpu"]
        whys = [f"{r} ({self.probed.refused.get(r, 'not promised')})" for r in missing]
        return f"this node does not enforce {', '.join(whys)}" if missing else ""

    def refuted(self) -> dict[str, str]:
        """Promises that could be broken when this node was probed."""
        return {} if self.probed is None else self.probed.refused

    def tell(self, f: Function, type: str, reason: str, message: str) -> None:
        self._tell(type, reason, message, f.wanted.namespace, f.wanted.name)

    def report(self, f: Function) -> None:
        if not self._closed:
            self._report(f.wanted.namespace, f.wanted.name, f.status())

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the functions failed", exc_info=task.exception())

    # -- what should be ----------------------------------------------------------------------------------------------

    def configure(
        self,
        wanted: Sequence[Config],
        fallbacks: Mapping[str, Version] | None = None,
        verdicts: Mapping[str, tuple[str, str]] | None = None,
        held: Mapping[str, tuple[str, str, int]] | None = None,
    ) -> None:
        """Makes the functions be what is wanted, without a pause: returns at once, goes on in the background.

        Of what was before this process began: ``fallbacks``, what a function ran well with; ``verdicts``, the version
        that was taken back, and why. ``held``: why a newer version cannot be had yet, with the phase (``Pending``,
        ``Degraded``) that this is and the generation that it is of.
        """
        keys = {c.version.key for c in wanted}
        for key in [k for k in self._functions if k not in keys]:
            f = self._functions.pop(key)
            f.drop()
            if f.log is not None:
                self._unwritten.discard(f.log)
            self._report(f.wanted.namespace, f.wanted.name, None)
        for config in wanted:
            key = config.version.key
            if (known := self._functions.get(key)) is None:
                known = Function(self, config, (fallbacks or {}).get(key), (verdicts or {}).get(key))
                self._functions[key] = known
            known.held = (held or {}).get(key)
            known.adjust(config)
        self._wake.set()

    # -- what they wrote ---------------------------------------------------------------------------------------------

    def say(self, f: Function, pool: Pool, line: wire.Log) -> None:
        if f.log is None:
            return
        at = clock.timestamp(line.time if 0 < line.time < _TIMES else None)
        kept = Line(at, level_name(line.level), line.message, line.id, pool.version.digest, line.fields)
        try:
            first = f.log.add(kept)
        except (TypeError, ValueError, RecursionError):  # msgpack can say what JSON cannot
            first = f.log.add(msgspec.structs.replace(kept, fields={"fields": repr(line.fields)[:_SHOWN]}))
        if first and not self._unwritten:
            asyncio.get_running_loop().call_later(_GATHER, self.flush_logs)
        self._unwritten.add(f.log)

    def flush_logs(self) -> None:
        """Writes what was said so far: a call's lines are here before its answer."""
        files, self._unwritten = self._unwritten, set()
        for file in files:
            file.flush()

    # -- status ------------------------------------------------------------------------------------------------------

    def status(self, key: str) -> dict[str, Any] | None:
        f = self._functions.get(key)
        return None if f is None else f.status()

    def keys(self) -> list[str]:
        return sorted(self._functions)

    def counters(self) -> dict[str, dict[str, Any]]:
        """For metrics: key -> calls, failures by kind, latency (cumulative buckets), cold starts, lost lines."""
        return {
            key: {
                "calls": f.calls,
                "failed": dict(f.failed),
                "latency": list(f.latency),
                "seconds": f.seconds,
                "cold": f.cold + sum(p.cold for p in f.pools()),
                "in_hand": f.in_hand,
                "instances": sum(len(p.links) for p in f.pools()),
                "log_dropped": f.log.dropped if f.log else 0,
                **samples.counters(f.samples),
                "canary": f.trial(),
            }
            for key, f in sorted(self._functions.items())
        }

    def numbers(self, key: str) -> dict[str, Any]:
        """Of one function: its counters, its instances (version, process), how its canary does. Raises ``NotFound``."""
        f = self._functions.get(key)
        if f is None:
            raise NotFound("is not on this node", resource=f"Function/{key}")
        return {**self.counters()[key], **f.numbers()}

    # -- life --------------------------------------------------------------------------------------------------------

    async def probe(self) -> Verdict:
        """What this node really enforces: a worker that tries to break out, and tells."""
        instance = self.new_instance()
        cage = Cage(instance, str(self.tmp / instance), user=1_900_000_000, memory=256 << 20, cpu=1.0, pids=16)
        self.probed = await probe(self.nursery, cage)
        return self.probed

    async def run(self) -> None:
        """Until cancelled; then every worker is ended."""
        try:
            if self._left:
                self.spawn(self._sweep_rest())
            while True:
                now = self.now()
                again = min([float("inf"), *(p.rest(now) for f in self._functions.values() for p in f.pools())])
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(1.0, max(0.01, again - now)) if self._busy() else None):
                        await self._wake.wait()
        finally:
            await self.close()

    def _busy(self) -> bool:
        return any(p.links or p.starting for f in self._functions.values() for p in f.pools())

    def _sweep(self, instances: list[str]) -> list[str]:
        """What a dispatcher that was killed left behind; gives back whose processes are still ending."""
        left = []
        for instance in instances:
            if cgroup.kill(self.node, instance):
                cgroup.remove(self.node, instance)
            else:
                left.append(instance)
        return left

    async def _sweep_rest(self) -> None:
        """Its last processes may end only now: a group goes when nobody is in it."""
        while self._left:
            await asyncio.sleep(_SWEEP)  # the period of looking whether they are gone
            self._left = await asyncio.to_thread(self._sweep, self._left)

    async def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for f in self._functions.values():
            for pool in f.pools():
                pool.drain()
                for link in list(pool.links):
                    link.end(pool.failure("unavailable", "the node's plane is ending", link.job))
                for job in pool.take_waiting():
                    pool.fail(job, pool.failure("unavailable", "the node's plane is ending", job))
        self.flush_logs()
        await self.asks.memory.close()
        await self.nursery.close()
        await self._wasm.close()


__all__ = ["Dispatcher", "Policy"]
