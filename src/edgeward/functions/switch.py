"""One function of a node: which of its versions answers, and how one takes over from another.

In come what should be (:meth:`Function.adjust`) and how calls ended (:meth:`Function.count`); out go the pool for a
call, a status, and what a restart must remember. A new version is started beside the old, loads and answers its check;
then it takes over at once, or, as a canary, gets its share of the calls while the old one goes on. Calls that
wait move along, calls that were begun are finished by the version that began them. A new one that fails goes, the old
one stays: all of this is decided here, on the node, with and without a link. Shares and verdicts are in ``canary.py``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from edgeward.core import invocation as wire
from edgeward.core.errors import EdgewardError
from edgeward.core.invocation import Call, CallFailed, Event, Reply
from edgeward.functions import canary as judge
from edgeward.functions import scale
from edgeward.functions.canary import Tally
from edgeward.functions.link import Job
from edgeward.functions.logs import LogFile, log_path
from edgeward.functions.pool import Host, Pool
from edgeward.functions.samples import SampleFile, forget, samples_path
from edgeward.functions.stats import BUCKETS
from edgeward.functions.versions import Config, Version

log = logging.getLogger("edgeward.functions")

#: A status is told so long after it changed; counts of instances change often, so they are told less often.
_TELL, _TELL_COUNTS = 0.05, 10.0
#: Failed calls in a row, none good, after which a version that has just taken over is taken back; how long it is new.
_BAD, _NEW = 5, 60.0
#: Seconds after which it is looked again whether a node that lacked something has it.
_LOOK = 15.0
#: Digits of a digest that a caller must at least give.
_PREFIX = 8


class Home(Host, Protocol):
    """What a function needs of the dispatcher."""

    folder: Path

    def job(self, event: Event, timeout: float) -> Job: ...
    def own(self, task: asyncio.Task[None]) -> None: ...
    def wake(self) -> None: ...
    async def lacks(self, version: Version) -> str: ...
    def refuted(self) -> dict[str, str]: ...
    def say(self, f: Function, pool: Pool, line: wire.Log) -> None: ...
    def tell(self, f: Function, type: str, reason: str, message: str) -> None: ...
    def report(self, f: Function) -> None: ...
    def good(self, config: Config) -> None: ...
    def judged(self, key: str, verdict: tuple[str, str] | None) -> None: ...


class Function:
    """One function of this node.

    ``fallback``: what ran well before this process began. ``verdict``: the digest of a version that was taken back
    here for the way its calls ended, and why.
    """

    def __init__(
        self, home: Home, config: Config, fallback: Version | None = None, verdict: tuple[str, str] | None = None
    ) -> None:
        self._home = home
        self.key = config.version.key
        self.policy = config.policy
        self.wanted = config.version
        self.current: Pool | None = None
        #: Being tried; and what has a share of the calls while ``current`` goes on.
        self.coming: Pool | None = None
        self.canary: Pool | None = None
        #: How the calls of the two ended since the canary began.
        self.tallies = (Tally(), Tally())
        self._dealt = 0
        #: What ``current`` took over from, and when: the way back.
        self.former: Version | None = None
        self.switched = 0.0
        self.fallback, self.verdict = fallback, verdict
        self.draining: set[Pool] = set()
        self.in_hand = 0
        #: Cold starts of versions that are gone.
        self.cold = 0
        self.phase, self.message = "Starting", ""
        #: Why a newer version cannot be had yet: the phase that this is, the reason, and the generation it is of.
        self.held: tuple[str, str, int] | None = None
        #: Digests that could not be started here and why.
        self.bad: dict[str, str] = {}
        self.attempts = 0
        self.trying: asyncio.Task[None] | None = None
        self.calls = 0
        self.failed: Counter[str] = Counter()
        self.bad_in_row = 0
        self.latency = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0
        self._told: tuple[Any, ...] = ()
        self._telling: asyncio.TimerHandle | None = None
        self.gone = False
        self.log: LogFile | None = None
        self.samples: SampleFile | None = None

    # -- which version answers -------------------------------------------------------------------------------------

    def pool(self) -> Pool | None:
        return self.current or self.coming

    def pools(self) -> list[Pool]:
        return [p for p in (self.current, self.coming, self.canary, *self.draining) if p is not None]

    def choose(self, call: Call) -> Pool | None:
        """The version that answers a call: as it asks for, else as the shares are."""
        current, canary, plan, asked = self.pool(), self.canary, self.policy.canary, call.version
        if asked is None:
            if canary is None or plan is None:
                return current
            if call.key is not None:
                return canary if judge.gets_canary(call.key, self.key, plan.weight) else current
            self._dealt += 1
            return canary if judge.deals_canary(self._dealt - 1, plan.weight) else current
        if asked == "stable":
            return current
        if asked == "canary":
            return canary or current
        if len(asked) >= _PREFIX:
            for pool in (current, canary):
                if pool is not None and pool.version.digest.startswith(asked):
                    return pool
        return None

    # -- what should be ----------------------------------------------------------------------------------------------

    def adjust(self, config: Config) -> None:
        """Makes it be what is wanted: returns at once, goes on in the background."""
        version, plan = config.version, config.policy.canary
        path = log_path(self._home.folder, version.namespace, version.name)
        if self.log is None or self.log.cap != config.policy.log_bytes:
            self.log = LogFile(path, config.policy.log_bytes)
        self._sampled(config)
        changed = self.wanted.digest != version.digest
        # what was taken back as a canary is now wanted for all calls: somebody insists
        changed |= self.policy.canary is not None and plan is None and self._condemned()
        self.policy, self.wanted = config.policy, version
        for pool in self.pools():
            pool.policy = config.policy
        if changed:
            self._pardon()
        self._go_on_with_the_old()
        current, canary = self.current, self.canary
        if current is not None and current.version.digest == version.digest:
            self._give_up()
            self.phase, self.message = "Running", ""
            current.grow(self._home.now())
        elif canary is not None and canary.version.digest == version.digest:
            if plan is None:
                self._switch(canary)
        elif changed or (self.trying is None and version.digest not in self.bad and not self._condemned()):
            self._give_up()
            self.attempts = 0
            # said at once: who waits for this generation must not take the old one's word for it
            self.phase, self.message = "Starting" if self.current is None else "Updating", ""
            self._begin(version)
            self.trying = asyncio.ensure_future(self._try())
            self._home.own(self.trying)
        self.tell_soon()

    def _sampled(self, config: Config) -> None:
        plan = config.policy.samples
        if plan is None:
            self.samples = None
        elif self.samples is not None:
            self.samples.replan(plan)
        else:
            version = config.version
            self.samples = SampleFile(samples_path(self._home.folder, version.namespace, version.name), plan)

    def _condemned(self) -> bool:
        return self.verdict is not None and self.verdict[0] == self.wanted.digest

    def _pardon(self) -> None:
        """What is wanted is to be tried, whatever was said of it before."""
        if self.verdict is not None:
            self.verdict = None
            self._home.judged(self.key, None)

    def _go_on_with_the_old(self) -> None:
        """After a start of this process: what is wanted has only a share, or was taken back; the rest is the old's."""
        old = self.fallback
        if self.current is not None or old is None or old.digest == self.wanted.digest:
            return
        if self.policy.canary is not None or self._condemned():
            self.current = self._new_pool(old)
            if self.verdict is not None and self._condemned():
                self._settle("Degraded", self._words_of(*self.verdict))

    def _give_up(self) -> None:
        """What is being tried or has a share is no longer wanted."""
        if self.trying is not None:
            self.trying.cancel()
            self.trying = None
        self._withdraw()

    def _withdraw(self) -> None:
        leaving = [p for p in (self.coming, self.canary) if p is not None]
        self.coming = self.canary = None
        for pool in leaving:
            self._let_go(pool, self.current)

    def _let_go(self, pool: Pool, to: Pool | None) -> None:
        self._hand_over(pool, to)
        pool.drain()
        self.draining.add(pool)

    def drop(self) -> None:
        """It was deleted."""
        self.gone = True
        if self.trying is not None:
            self.trying.cancel()
        error = CallFailed("unknown", "was deleted while the call waited", function=self.key)
        for pool in self.pools():
            for job in pool.take_waiting():
                pool.fail(job, error)
            pool.drain()
        if self.log is not None:
            self.log.remove()
        forget(self._home.folder, self.wanted.namespace, self.wanted.name)

    def _new_pool(self, version: Version) -> Pool:
        pool = Pool(
            self._home,
            version,
            self.policy,
            say=lambda pool, line: self._home.say(self, pool, line),
            count=lambda kind, seconds: self.count(pool, kind, seconds),
            told=self.tell_soon,
        )
        return pool

    # -- start new, check, switch, drain, stop old -----------------------------------------------------------------

    async def _try(self) -> None:
        """Until the wanted version has taken over; a failure of the node's is tried again, one of the code's is not."""
        version = self.wanted
        while refusal := await self._home.lacks(version):
            self._withdraw()
            self._settle("Refused", refusal)
            await asyncio.sleep(_LOOK)  # the period of looking whether the node can by now
        while True:
            if not self.attempts:
                self.phase = "Starting" if self.current is None else "Updating"
                self.tell_soon()
            pool = self.coming or self._begin(version)
            try:
                pool.starting += 1
                try:
                    link = await pool.start()
                finally:
                    pool.starting -= 1
                pool.welcome(link)
                await self._check(pool)
            except EdgewardError as e:
                self.attempts += 1
                self._failed_try(pool, e.message)
                await asyncio.sleep(
                    scale.pause(self.attempts + 3)
                )  # the back-off between two tries of the same version
                continue
            self.trying = None
            if self.policy.canary is not None and self.current is not None:
                self._share(pool)
            else:
                self._switch(pool)
            return

    def _begin(self, version: Version) -> Pool:
        """The pool of a version that has to prove itself; calls may wait in it where there is no other."""
        pool = self.coming = self._new_pool(version)
        pool.probation = True
        return pool

    async def _check(self, pool: Pool) -> None:
        if self.policy.check is None:
            return
        event = Event(f"check-{pool.version.digest}", "edgeward:check", "edgeward.check", self.policy.check)
        job = self._home.job(event, pool.version.timeout)
        if not pool.idle:
            raise EdgewardError("its process ended right after it had loaded the code")
        pool.idle.pop().give(job, self._home.now())
        try:
            reply = await job.future
        except CallFailed as e:
            raise EdgewardError(f"its check failed: {e.message}") from None
        if reply.chunks is not None:
            await reply.chunks.aclose()  # type: ignore[attr-defined]
        if reply.status >= 400:
            raise EdgewardError(f"its check was answered {reply.status}")

    def _failed_try(self, pool: Pool, why: str) -> None:
        self.coming = None
        if self.current is None and self.fallback is not None:
            self.current = self._new_pool(self.fallback)
        now = self.current
        self._hand_over(pool, now)
        pool.drain()
        self.bad[pool.version.digest] = why
        message = f"version {pool.version.digest} failed: {why}"
        if now is not None:
            message += f"; {now.version.digest} goes on"
        if self.message != message:
            self._home.tell(self, "Warning", "VersionFailed", message)
        self._settle("Degraded" if now is not None else "Failed", message)

    def _hand_over(self, pool: Pool, to: Pool | None) -> None:
        """Calls that wait for a pool that goes."""
        now = self._home.now()
        for job in pool.take_waiting():
            if to is not None:
                to.submit(job, now)
            else:
                pool.fail(job, pool.failure("unavailable", pool.last_error or "cannot be started", job, after=1.0))

    def _switch(self, pool: Pool) -> None:
        """From here on the new version answers all calls."""
        old, self.current, self.coming, self.canary = self.current, pool, None, None
        # a process that has just started has no old one running: what ran well before it is the way back
        back = old.version if old is not None else self.fallback
        self.former = back if back is not None and back.digest != pool.version.digest else None
        self.switched, self.bad_in_row = self._home.now(), 0
        self.bad.pop(pool.version.digest, None)
        if old is not None:
            self._let_go(old, pool)
            said = f"{pool.version.digest} took over from {old.version.digest}"
            self._home.tell(self, "Normal", "VersionSwitched", said)
        pool.open(self._home.now())
        self._home.good(Config(pool.version, self.policy))
        self._settle("Running", "")

    def _share(self, pool: Pool) -> None:
        """From here on the new version answers its share of the calls."""
        self.coming, self.canary, self.tallies = None, pool, (Tally(), Tally())
        self.bad.pop(pool.version.digest, None)
        pool.open(self._home.now())
        if self.policy.canary is not None and self.current is not None:
            weight, beside = f"{self.policy.canary.weight:g} %", self.current.version.digest
            said = f"{pool.version.digest} answers {weight} of the calls beside {beside}"
            self._home.tell(self, "Normal", "CanaryStarted", said)
        self._settle("Running", "")

    def _settle(self, phase: str, message: str) -> None:
        self.phase, self.message = phase, message
        self.tell_soon()

    # -- a version that does badly goes back -------------------------------------------------------------------------

    def _words_of(self, digest: str, why: str) -> str:
        on = f"; {self.current.version.digest} goes on" if self.current is not None else ""
        return f"version {digest} was taken back: {why}{on}"

    def _condemn(self, pool: Pool, why: str, reason: str) -> None:
        self.verdict = (pool.version.digest, why)
        self._home.judged(self.key, self.verdict)
        message = self._words_of(*self.verdict)
        log.warning("%s: %s", self.key, message)
        self._home.tell(self, "Warning", reason, message)
        self._settle("Degraded", message)

    def _roll_back(self, bad: Pool, why: str) -> None:
        back = self.former
        if bad is not self.current or back is None or self.gone:
            return
        self.former = None
        self.current = self._new_pool(back)
        self._let_go(bad, self.current)
        self.current.grow(self._home.now())
        self._home.good(Config(back, self.policy))
        self._condemn(bad, why, "RolledBack")

    def _take_back(self, bad: Pool, why: str) -> None:
        if bad is not self.canary or self.gone:
            return
        self.canary = None
        self._let_go(bad, self.current)
        self._condemn(bad, why, "CanaryTakenBack")

    def _later(self, what: Callable[[Pool, str], None], pool: Pool, why: str) -> None:
        """Right behind what is happening now: the pool may be in the middle of its queue. A call that comes because
        this one failed comes later."""
        asyncio.get_running_loop().call_soon(what, pool, why)

    # -- what was seen -----------------------------------------------------------------------------------------------

    def count(self, pool: Pool, kind: str, seconds: float) -> None:
        """A call has ended: ``kind`` says what went wrong, if anything."""
        self.calls += 1
        self.seconds += seconds
        n = 0
        for bound in BUCKETS:
            if seconds <= bound:
                break
            n += 1
        self.latency[n] += 1
        if self.canary is not None:
            self._weigh(pool, kind, seconds)
        if kind:
            self.failed[kind] += 1
        if pool is not self.current:
            return
        if not kind:
            self.bad_in_row = 0
            if self.former is not None and self._home.now() - self.switched > _NEW:
                self.former = None
            return
        self.bad_in_row += 1
        if self.former is not None and not pool.good and self.bad_in_row >= _BAD:
            self._later(self._roll_back, pool, f"its first {self.bad_in_row} calls failed, the last with {kind}")

    def _weigh(self, pool: Pool, kind: str, seconds: float) -> None:
        plan, canary = self.policy.canary, self.canary
        if plan is None or canary is None or pool not in (canary, self.current):
            return
        tally = self.tallies[pool is canary]
        tally.calls += 1
        if judge.is_failure(kind, seconds, plan):
            tally.failed += 1
            self._judge()
        judge.forget(*self.tallies, plan)

    def answered_badly(self, reply: Reply) -> None:
        """The handler itself answered 500 or above: for the judge that is a failure as well."""
        canary, current = self.canary, self.current
        if canary is not None and reply.version == canary.version.digest:
            self.tallies[1].failed += 1
            self._judge()
        elif current is not None and reply.version == current.version.digest:
            self.tallies[0].failed += 1

    def _judge(self) -> None:
        plan, canary = self.policy.canary, self.canary
        if plan is not None and canary is not None and (why := judge.bad(*self.tallies, plan)):
            self._later(self._take_back, canary, why)

    # -- status ------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        current, canary = self.current, self.canary
        doc: dict[str, Any] = {
            "phase": self.phase,
            "instances": sum(len(p.links) for p in self.pools()),
            "observedGeneration": self.policy.generation,
        }
        if current is not None:
            doc["version"] = current.version.digest
            jailed = current.jailed
            if jailed is not None:
                refuted = {k: v for k, v in self._home.refuted().items() if k in jailed.enforced}
                doc["enforced"] = sorted(set(jailed.enforced) - set(refuted))
                refused = {**jailed.refused, **refuted}
                doc["notEnforced"] = [{"what": k, "why": v} for k, v in sorted(refused.items())]
        if canary is not None and self.policy.canary is not None:
            doc["canary"] = {"version": canary.version.digest, "weight": self.policy.canary.weight}
        if self.wanted.digest not in (doc.get("version"), doc.get("canary", {}).get("version")):
            doc["wanted"] = self.wanted.digest
        if self._condemned():
            doc["takenBack"] = self.wanted.digest
        if self.message:
            doc["message"] = self.message
        elif self.held is not None:
            doc["message"] = f"a newer version waits: {self.held[1]}"
            doc["phase"] = "Updating"
            if self.held[0] != "Pending":  # it is not on its way
                doc |= {"phase": "Degraded", "refusedGeneration": self.held[2]}
        return doc

    def trial(self) -> tuple[str, float] | None:
        """The canary and its weight; None where there is none."""
        plan = self.policy.canary
        return None if self.canary is None or plan is None else (self.canary.version.digest, plan.weight)

    def numbers(self) -> dict[str, Any]:
        """Its instances, and how stable and canary do beside one another."""
        doc: dict[str, Any] = {
            "running": [
                {"version": p.version.digest, "pid": link.child.pid if link.child else 0, "busy": link.job is not None}
                for p in self.pools()
                for link in p.links
            ]
        }
        if self.canary is not None and self.current is not None:
            arms = zip((self.current, self.canary), self.tallies, strict=True)
            names = ("stable", "canary")
            doc["judged"] = {
                name: {"version": pool.version.digest, "calls": tally.calls, "failed": tally.failed}
                for name, (pool, tally) in zip(names, arms, strict=True)
            }
        return doc

    def tell_soon(self) -> None:
        """What a status consists of may have changed."""
        for pool in [p for p in self.draining if not p.links and not p.starting]:
            self.draining.discard(pool)
            self.cold += pool.cold
        self._home.wake()
        said = tuple((k, str(v)) for k, v in self.status().items() if k != "instances")
        if said != self._told:
            self._told = said
            after = _TELL
        elif self._telling is None:
            after = _TELL_COUNTS
        else:
            return
        if self._telling is not None:
            self._telling.cancel()
        self._telling = asyncio.get_running_loop().call_later(after, self._tell)

    def _tell(self) -> None:
        self._telling = None
        if not self.gone:
            self._home.report(self)
