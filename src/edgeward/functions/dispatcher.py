"""Every function of one node: which version answers, how many calls there may be, and when a call is over.

In come configurations (what should be) and calls; out go replies, problem documents and a status per function. A new
version is started beside the old, loads, answers its check, then takes over at once; calls that wait move along, calls
that were begun are finished by the old, which then goes. Where the new one fails, the old one stays. This is the
``Invoker`` of the node: the gateway calls it in the same process, with no hop between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeward.core import cgroup, clock
from edgeward.core import invocation as wire
from edgeward.core.errors import EdgewardError
from edgeward.core.files import ensure_dir
from edgeward.core.invocation import Call, CallFailed, Event, Reply
from edgeward.functions import scale
from edgeward.functions.asks import Asks, Sampler
from edgeward.functions.logs import Line, LogFile, level_name, log_path
from edgeward.functions.memory import Memory
from edgeward.functions.nursery import Nursery
from edgeward.functions.origins import Forked, Origin
from edgeward.functions.pool import Job, Pool, deadline_of
from edgeward.functions.sandbox import Cage, Verdict
from edgeward.functions.stats import BUCKETS
from edgeward.functions.versions import Config, Policy, Version

log = logging.getLogger("edgeward.functions")

#: (namespace, name, status or None when it is gone)
Report = Callable[[str, str, dict[str, Any] | None], None]
#: (type, reason, message, namespace, name)
Tell = Callable[[str, str, str, str, str], None]
#: A log line waits so long for others to be written with it. Seconds.
_GATHER = 0.05
#: A status is told so long after it changed; counts of instances change often, so they are told less often.
_TELL, _TELL_COUNTS = 0.05, 10.0
#: Failed calls in a row, none good, after which a version that has just taken over is taken back; how long it is new.
_BAD, _NEW = 5, 60.0
#: Seconds after which it is looked again whether a node that lacked something has it.
_LOOK = 15.0


class Function:
    """One function of this node."""

    def __init__(self, config: Config) -> None:
        self.policy = config.policy
        self.wanted = config.version
        self.current: Pool | None = None
        #: Being tried.
        self.coming: Pool | None = None
        #: What ``current`` took over from, and when: the way back.
        self.former: Version | None = None
        self.switched = 0.0
        self.fallback: Version | None = None
        self.draining: set[Pool] = set()
        self.in_hand = 0
        self.phase, self.message = "Starting", ""
        #: Digests that failed here and why.
        self.bad: dict[str, str] = {}
        self.attempts = 0
        self.trying: asyncio.Task[None] | None = None
        self.calls = 0
        self.failed: Counter[str] = Counter()
        self.bad_in_row = 0
        self.latency = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0
        self.told: tuple[Any, ...] = ()
        self.telling: asyncio.TimerHandle | None = None
        self.log: LogFile | None = None

    def pool(self) -> Pool | None:
        return self.current or self.coming


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
    ) -> None:
        self.asks = Asks(Memory(folder / "state.db"))
        self.asks.sampler = sample
        self.folder, self.node, self.site = ensure_dir(folder), node, site
        self.tmp = ensure_dir(folder / "tmp")
        self._report, self._tell, self._good = report, tell, good
        self._functions: dict[str, Function] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        # groups are named by the folder too: on one machine several nodes may have one name
        self._prefix = f"fn-{zlib.crc32(str(folder.absolute()).encode()):08x}-"
        self.nursery = Nursery(folder / "zygote.log", node, self._prefix)
        self.origins: dict[str, Origin] = {"python": Forked(self.nursery)}
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
        self._sweep()

    # -- calls -----------------------------------------------------------------------------------------------------

    async def invoke(self, call: Call) -> Reply:
        """The function's answer. Raises :class:`CallFailed`."""
        f = self._functions.get(call.function) or self._functions.get(f"default/{call.function}")
        if f is None:
            raise CallFailed("unknown", "there is no such function on this node", function=call.function)
        pool = f.pool()
        if pool is None or (call.version and call.version != pool.version.digest):
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
            return await job.future
        finally:
            f.in_hand -= 1
            if job.future.cancelled():
                for waiting in self._pools(f):
                    waiting.forget(job)

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
            for pool in self._pools(f):
                earliest = min(earliest, pool.expire(now))
        if earliest < float("inf"):
            self._arm(earliest)

    @staticmethod
    def _pools(f: Function) -> list[Pool]:
        return [p for p in (f.current, f.coming, *f.draining) if p is not None]

    # -- what pools need ---------------------------------------------------------------------------------------------

    def now(self) -> float:
        return (self._loop or self._in_loop()).time()

    def new_instance(self) -> str:
        self._instances += 1
        return f"{self._prefix}{os.getpid():x}-{self._instances}"

    def spawn(self, work: Any) -> None:
        if self._closed:
            work.close()
            return
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the functions failed", exc_info=task.exception())

    # -- what should be ----------------------------------------------------------------------------------------------

    def configure(self, wanted: Sequence[Config], fallbacks: Mapping[str, Version] | None = None) -> None:
        """Makes the functions be what is wanted, without a pause: returns at once, goes on in the background.

        ``fallbacks``: what a function ran well with before this process began; used when what is wanted fails.
        """
        keys = {c.version.key for c in wanted}
        for key in [k for k in self._functions if k not in keys]:
            self._drop(key)
        for config in wanted:
            f = self._functions.get(config.version.key)
            if f is None:
                f = self._functions[config.version.key] = Function(config)
                f.fallback = (fallbacks or {}).get(config.version.key)
            self._adjust(f, config)
        self._wake.set()

    def _adjust(self, f: Function, config: Config) -> None:
        path = log_path(self.folder, config.version.namespace, config.version.name)
        if f.log is None or f.log.cap != config.policy.log_bytes:
            f.log = LogFile(path, config.policy.log_bytes)
        f.policy = config.policy
        for pool in self._pools(f):
            pool.policy = config.policy
        changed = f.wanted.digest != config.version.digest
        f.wanted = config.version
        current = f.current
        if current is not None and current.version.digest == config.version.digest:
            self._give_up(f)
            f.phase, f.message = "Running", ""
            current.grow(self.now())
        elif changed or (f.trying is None and config.version.digest not in f.bad):
            self._give_up(f)
            f.attempts = 0
            self._begin(f, config.version)
            f.trying = asyncio.ensure_future(self._try(f))
            self._tasks.add(f.trying)
            f.trying.add_done_callback(self._ended)
        self._tell_soon(f)

    def _give_up(self, f: Function) -> None:
        """The version being tried is no longer wanted."""
        if f.trying is not None:
            f.trying.cancel()
            f.trying = None
        self._withdraw(f)

    def _withdraw(self, f: Function) -> None:
        coming, f.coming = f.coming, None
        if coming is not None:
            self._hand_over(f, coming, f.current)
            f.draining.add(coming)
            coming.drain()

    def _drop(self, key: str) -> None:
        f = self._functions.pop(key)
        if f.trying is not None:
            f.trying.cancel()
        gone = CallFailed("unknown", "was deleted while the call waited", function=key)
        for pool in self._pools(f):
            for job in pool.take_waiting():
                pool.fail(job, gone)
            pool.drain()
        if f.log is not None:
            self._unwritten.discard(f.log)
            f.log.remove()
        self._report(f.wanted.namespace, f.wanted.name, None)

    def _new_pool(self, f: Function, version: Version) -> Pool:
        return Pool(
            self,
            version,
            f.policy,
            say=lambda pool, line: self._say(f, pool, line),
            count=lambda kind, seconds: self._count(f, kind, seconds),
            told=lambda: self._tell_soon(f),
        )

    # -- start new, check, switch, drain, stop old -----------------------------------------------------------------

    async def _try(self, f: Function) -> None:
        """Until the wanted version has taken over; a failure of the node's is tried again, one of the code's is not."""
        version = f.wanted
        while refusal := await self._refusal(version):
            self._withdraw(f)
            self._settle(f, "Refused", refusal)
            await asyncio.sleep(_LOOK)  # the period of looking whether the node can by now
        while True:
            if not f.attempts:
                f.phase = "Starting" if f.current is None else "Updating"
                self._tell_soon(f)
            pool = f.coming or self._begin(f, version)
            try:
                pool.starting += 1
                try:
                    link = await pool.start()
                finally:
                    pool.starting -= 1
                pool.welcome(link)
                await self._check(f, pool)
            except EdgewardError as e:
                f.attempts += 1
                self._failed_try(f, pool, e.message)
                await asyncio.sleep(scale.pause(f.attempts + 3))  # the back-off between two tries of the same version
                continue
            self._switch(f, pool)
            return

    def _begin(self, f: Function, version: Version) -> Pool:
        """The pool of a version that has to prove itself; calls may wait in it where there is no other."""
        pool = f.coming = self._new_pool(f, version)
        pool.probation = True
        return pool

    async def _refusal(self, version: Version) -> str:
        """Why this node cannot or must not run it; empty: it may."""
        if version.runtime not in self.origins:
            return f"this node does not run {version.runtime}; update Edgeward on it"
        if lacking := await self.origins[version.runtime].lacks(version):
            return lacking
        if self.probed is None or not version.require:
            return ""
        missing = [r for r in version.require if r not in self.probed.enforced and r != "cpu"]
        whys = [f"{r} ({self.probed.refused.get(r, 'not promised')})" for r in missing]
        return f"this node does not enforce {', '.join(whys)}" if missing else ""

    async def _check(self, f: Function, pool: Pool) -> None:
        if f.policy.check is None:
            return
        now = self.now()
        self._calls += 1
        event = Event(f"check-{self._calls}", "edgeward:check", "edgeward.check", f.policy.check)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        job = Job(f"{self._serial:08x}{self._calls:08x}", event, now, now + pool.version.timeout, future)
        if job.deadline < self._due:
            self._arm(job.deadline)
        if not pool.idle:
            raise EdgewardError("its process ended right after it had loaded the code")
        pool.idle.pop().give(job, now)
        try:
            reply = await future
        except CallFailed as e:
            raise EdgewardError(f"its check failed: {e.message}") from None
        if reply.chunks is not None:
            await reply.chunks.aclose()  # type: ignore[attr-defined]
        if reply.status >= 400:
            raise EdgewardError(f"its check was answered {reply.status}")

    def _failed_try(self, f: Function, pool: Pool, why: str) -> None:
        f.coming = None
        if f.current is None and f.fallback is not None:
            f.current = self._new_pool(f, f.fallback)
        now = f.current
        self._hand_over(f, pool, now)
        pool.drain()
        f.bad[pool.version.digest] = why
        if now is not None:
            message = f"version {pool.version.digest} failed: {why}; {now.version.digest} goes on"
        else:
            message = f"version {pool.version.digest} failed: {why}"
        if f.message != message:
            self._tell("Warning", "VersionFailed", message, f.wanted.namespace, f.wanted.name)
        self._settle(f, "Degraded" if now is not None else "Failed", message)

    def _hand_over(self, f: Function, pool: Pool, to: Pool | None) -> None:
        """Calls that wait for a pool that goes."""
        now = self.now()
        for job in pool.take_waiting():
            if to is not None:
                to.submit(job, now)
            else:
                pool.fail(job, pool.failure("unavailable", pool.last_error or "cannot be started", job, after=1.0))

    def _switch(self, f: Function, pool: Pool) -> None:
        """From here on the new version answers."""
        old, f.current, f.coming = f.current, pool, None
        f.trying = None
        f.former, f.switched, f.bad_in_row = (old.version if old else None), self.now(), 0
        f.bad.pop(pool.version.digest, None)
        if old is not None:
            self._hand_over(f, old, pool)
            old.drain()
            f.draining.add(old)
            self._tell(
                "Normal", "VersionSwitched", f"{pool.version.digest} took over from {old.version.digest}",
                f.wanted.namespace, f.wanted.name,
            )  # fmt: skip
        pool.open(self.now())
        self._good(Config(pool.version, f.policy))
        self._settle(f, "Running", "")

    def _settle(self, f: Function, phase: str, message: str) -> None:
        f.phase, f.message = phase, message
        self._tell_soon(f)

    def _roll_back(self, f: Function, why: str) -> None:
        bad, back = f.current, f.former
        if bad is None or back is None:
            return
        f.former = None
        message = f"version {bad.version.digest} was taken back: {why}; {back.digest} goes on"
        log.warning("%s: %s", f.wanted.key, message)
        f.bad[bad.version.digest] = why
        pool = self._new_pool(f, back)
        f.current = pool
        self._hand_over(f, bad, pool)
        bad.drain()
        f.draining.add(bad)
        pool.grow(self.now())
        self._good(Config(back, f.policy))
        self._tell("Warning", "RolledBack", message, f.wanted.namespace, f.wanted.name)
        self._settle(f, "Degraded", message)

    # -- what was seen -----------------------------------------------------------------------------------------------

    def _count(self, f: Function, kind: str, seconds: float) -> None:
        f.calls += 1
        f.seconds += seconds
        n = 0
        for bound in BUCKETS:
            if seconds <= bound:
                break
            n += 1
        f.latency[n] += 1
        if not kind:
            f.bad_in_row = 0
            f.former = None if f.former is not None and self.now() - f.switched > _NEW else f.former
            return
        f.failed[kind] += 1
        f.bad_in_row += 1
        current = f.current
        if f.former is not None and current is not None and not current.good and f.bad_in_row >= _BAD:
            self._roll_back(f, f"its first {f.bad_in_row} calls failed, the last with {kind}")

    def _say(self, f: Function, pool: Pool, line: wire.Log) -> None:
        if f.log is None:
            return
        at = clock.timestamp(line.time or None)
        kept = Line(at, level_name(line.level), line.message, line.id, pool.version.digest, line.fields)
        if f.log.add(kept) and not self._unwritten:
            asyncio.get_running_loop().call_later(_GATHER, self._write_logs)
        self._unwritten.add(f.log)

    def _write_logs(self) -> None:
        files, self._unwritten = self._unwritten, set()
        for file in files:
            file.flush()

    # -- status ------------------------------------------------------------------------------------------------------

    def status(self, key: str) -> dict[str, Any] | None:
        f = self._functions.get(key)
        return None if f is None else self._status(f)

    def keys(self) -> list[str]:
        return sorted(self._functions)

    def _status(self, f: Function) -> dict[str, Any]:
        current = f.current
        doc: dict[str, Any] = {
            "phase": f.phase,
            "instances": sum(len(p.links) for p in self._pools(f)),
            "observedGeneration": f.policy.generation,
        }
        if current is not None:
            doc["version"] = current.version.digest
            jailed = current.jailed
            if jailed is not None:
                refuted = {k: v for k, v in self._refuted().items() if k in jailed.enforced}
                doc["enforced"] = sorted(set(jailed.enforced) - set(refuted))
                refused = {**jailed.refused, **refuted}
                doc["notEnforced"] = [{"what": k, "why": v} for k, v in sorted(refused.items())]
        if f.wanted.digest != doc.get("version"):
            doc["wanted"] = f.wanted.digest
        if f.message:
            doc["message"] = f.message
        return doc

    def _refuted(self) -> dict[str, str]:
        """Promises that could be broken when this node was probed."""
        return {} if self.probed is None else self.probed.refused

    def counters(self) -> dict[str, dict[str, Any]]:
        """For metrics: key -> calls, failures by kind, latency (cumulative buckets), cold starts, lost lines."""
        return {
            key: {
                "calls": f.calls,
                "failed": dict(f.failed),
                "latency": list(f.latency),
                "seconds": f.seconds,
                "cold": sum(p.cold for p in self._pools(f)),
                "in_hand": f.in_hand,
                "instances": sum(len(p.links) for p in self._pools(f)),
                "log_dropped": f.log.dropped if f.log else 0,
            }
            for key, f in sorted(self._functions.items())
        }

    def _tell_soon(self, f: Function) -> None:
        """What a status consists of may have changed."""
        f.draining = {p for p in f.draining if p.links or p.starting}
        self._wake.set()
        said = tuple((k, str(v)) for k, v in self._status(f).items() if k != "instances")
        if said != f.told:
            f.told = said
            after = _TELL
        elif f.telling is None:
            after = _TELL_COUNTS
        else:
            return
        if f.telling is not None:
            f.telling.cancel()
        f.telling = asyncio.get_running_loop().call_later(after, self._told, f)

    def _told(self, f: Function) -> None:
        f.telling = None
        if self._functions.get(f.wanted.key) is f and not self._closed:
            self._report(f.wanted.namespace, f.wanted.name, self._status(f))

    # -- life --------------------------------------------------------------------------------------------------------

    async def probe(self) -> Verdict:
        """What this node really enforces: a worker that tries to break out, and tells."""
        instance = self.new_instance()
        cage = Cage(instance, str(self.tmp / instance), user=1_900_000_000, memory=256 << 20, cpu=1.0, pids=16)
        child = await self.nursery.spawn(cage, {"LANG": "C.UTF-8"}, probe=True)
        reader, writer = await asyncio.open_unix_connection(sock=child.sock)
        try:
            async with asyncio.timeout(10.0):
                size = int.from_bytes(await reader.readexactly(4), "big")
                if size > wire.MAX_FRAME:
                    raise EdgewardError("the probe's answer is too long")
                told = wire.decode_from_worker(await reader.readexactly(size))
        except (TimeoutError, asyncio.IncompleteReadError):
            told = wire.Broken("it did not answer")
        finally:
            writer.close()
            child.kill()
        if isinstance(told, wire.Jailed):
            self.probed = Verdict(sorted(told.enforced), told.refused)
        else:
            why = told.message if isinstance(told, wire.Broken) else "it answered something else"
            log.error("the sandbox's probe failed: %s", why)
            self.probed = Verdict([], {"everything": f"the probe failed: {why}"})
        return self.probed

    async def run(self) -> None:
        """Until cancelled; then every worker is ended."""
        try:
            while True:
                now = self.now()
                again = min([float("inf"), *(p.rest(now) for f in self._functions.values() for p in self._pools(f))])
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(1.0, max(0.01, again - now)) if self._busy() else None):
                        await self._wake.wait()
        finally:
            await self.close()

    def _busy(self) -> bool:
        return any(p.links or p.starting for f in self._functions.values() for p in self._pools(f))

    def _sweep(self) -> None:
        """What a dispatcher that was killed left behind."""
        for instance in cgroup.leftovers(self.node, self._prefix):
            if cgroup.kill(self.node, instance):
                cgroup.remove(self.node, instance)
        for path in self.tmp.iterdir():
            shutil.rmtree(path, ignore_errors=True)

    async def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for f in self._functions.values():
            for pool in self._pools(f):
                pool.drain()
                for link in list(pool.links):
                    link.end(pool.failure("unavailable", "the node's plane is ending", link.job))
                for job in pool.take_waiting():
                    pool.fail(job, pool.failure("unavailable", "the node's plane is ending", job))
        self._write_logs()
        await self.asks.memory.close()
        await self.nursery.close()


__all__ = ["Dispatcher", "Policy"]
