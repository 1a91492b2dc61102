"""The agent's side of apps: makes the node run what is desired, and reports what it runs.

A level-triggered loop per app reads the wish, looks at the instances, asks ``plan.py`` what to do and does it; exits,
health changes and pokes only say that it is time to look. Everything decided is in ``workloads.db`` before it is done,
so after a SIGKILL the next agent finds the processes again (adopts them) and the plan goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from edgeward.core import cgroup, clock, proc
from edgeward.core.blobfetch import BlobFetch
from edgeward.core.errors import EdgewardError, NotFound
from edgeward.core.files import ensure_dir
from edgeward.core.reconcile import Loop
from edgeward.core.registry import extensions
from edgeward.core.resource import Resource
from edgeward.core.vault import Vault
from edgeward.workloads import ports
from edgeward.workloads.ahead import Ahead, Coming
from edgeward.workloads.ground import Ground
from edgeward.workloads.live import AppKey, Live, seen, told
from edgeward.workloads.plan import (
    Adopt,
    Forget,
    Gone,
    MarkBad,
    Plan,
    Rules,
    Slot,
    Start,
    State,
    Stop,
    Switch,
    delay_after,
    plan,
    slot_key,
)
from edgeward.workloads.reader import LogReader
from edgeward.workloads.runtime import Inside, Runtime
from edgeward.workloads.spec import AppSpec, runtime_of
from edgeward.workloads.state import InstanceRow, WorkloadState
from edgeward.workloads.times import Look, look
from edgeward.workloads.usage import Meter
from edgeward.workloads.versions import kept as kept_versions
from edgeward.workloads.watch import Watch
from edgeward.workloads.wish import Source, digest, rules_of, snapshot

log = logging.getLogger("edgeward.apps")

Report = Callable[[str, str, dict[str, Any] | None], None]
Event = Callable[[str, str, str, str, str], None]


class AppsEdge:
    """All apps of one node; :meth:`run` until cancelled, then :meth:`shutdown`."""

    def __init__(
        self,
        *,
        node: str,
        site: str,
        data_dir: Path,
        source: Source,
        report: Report,
        event: Event,
        address: str = "",
        vault: Vault | None = None,
        settings: Mapping[str, Any] | None = None,
        blobs: BlobFetch | None = None,
        coming: Coming = dict,
        fetched: Callable[[], None] = lambda: None,
    ) -> None:
        """``settings``: ``containers`` of ``node.json``. ``blobs``: gets what the hub keeps. ``coming``: what a Rollout
        will bring here; ``fetched``: called when :attr:`ahead` has something new to say."""
        self.node, self.site = node, site
        self._source = source
        self._report, self._event = report, event
        self._address = address or "127.0.0.1"
        ensure_dir(data_dir)
        self._db = WorkloadState(data_dir / "workloads.db", vault)
        self._ground = Ground(
            node=node,
            site=site,
            data_dir=data_dir,
            address=self._address,
            settings=settings,
            blobs=blobs,
            poke=self.poke,
        )
        self._runtimes: dict[str, Runtime] = {
            name: extensions.get("runtime", name)(self._ground) for name in extensions.names("runtime")
        }
        self.ahead = Ahead(source, self._runtimes, coming, fetched)
        self._states = self._db.apps()
        self._live: dict[AppKey, dict[str, Live]] = {}
        self._loop: Loop[AppKey] = Loop("apps", self._reconcile, workers=8, timeout=120.0)
        self.logs = LogReader(self._ground, self._live)
        self._watch = Watch(self._db, self._ground, self._runtime, source, self._loop.add)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._messages: dict[AppKey, str] = {}
        self._phases: dict[AppKey, str] = {}
        self._meter = Meter()
        for row in self._db.instances():
            self._adopt(row)
        self._ground.sweep(self.instances())

    # -- outside face --------------------------------------------------------------------------------------------------

    def poke(self, namespace: str, name: str) -> None:
        """Something about this app may have changed."""
        self._loop.add((namespace, name))

    def _runtime(self, spec: AppSpec) -> Runtime:
        return self._runtimes[runtime_of(spec)]

    def instances(self) -> set[str]:
        """Ids of all instances of this node."""
        return {i for all_ in self._live.values() for i in all_}

    def versions(self) -> set[tuple[str, str, str]]:
        return self._db.versions()

    def hurry(self) -> None:
        """The hub is reached again."""
        for runtime in self._runtimes.values():
            runtime.hurry()

    def alive(self, namespace: str, name: str) -> bool:
        """Whether any instance of this app lives here."""
        return any(live.alive for live in self._live.get((namespace, name), {}).values())

    async def run(self) -> None:
        """Runs until cancelled."""
        await self._look_back()
        self.ahead.begin()
        for key in {*self._source.apps(), *self._states, *self._live}:
            self._loop.add(key)
        try:
            async with asyncio.TaskGroup() as group:
                for instances in self._live.values():
                    for live in instances.values():
                        self._look_after(live)
                group.create_task(self._loop.run())
                group.create_task(self._ground.run())
                for runtime in self._runtimes.values():
                    group.create_task(runtime.run(self))
        finally:
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def shutdown(self, *, leave: bool) -> None:
        """The agent ends. ``leave``: apps go on and are adopted by the next one; else they are stopped."""
        self._stopping = True
        if not leave:

            async def stop(live: Live) -> None:
                runtime = self._runtime(live.spec)
                await runtime.stop(live.row, live.spec)
                await runtime.clean(live.row)
                self._db.remove_instance(live.row.id)

            everything = [i for all_ in self._live.values() for i in all_.values()]
            # one without a process was being started
            await asyncio.gather(*(stop(i) for i in everything if i.alive or i.process is None))
            for key, state in self._states.items():
                stopped = {"phase": "Stopped", "instances": [], "version": state.current[:12]}
                self._report(*key, {**stopped, "message": "the node's agent was stopped"})
        await self._ground.close(leave=leave)
        self._db.close()

    def enforced(self) -> list[str]:
        """Limits that this node can enforce."""
        import os

        found = [f"limits.{name}" for name in cgroup.available()]
        return [*found, *(["process.user"] if os.geteuid() == 0 else [])]

    def about(self) -> dict[str, Any]:
        """What the node says of what it can run."""
        said: dict[str, Any] = {}
        for runtime in self._runtimes.values():
            said |= runtime.about()
        return said

    def kept(self, namespace: str, name: str) -> list[dict[str, Any]]:
        """The versions of an App that are kept here, the present one last."""
        state = self._states.get((namespace, name))
        return kept_versions(state, lambda d: self._db.version(namespace, name, d)) if state is not None else []

    def usage(self) -> list[dict[str, Any]]:
        """Present use of every instance: processor in cores since the last call, memory in bytes."""
        return self._meter.measure(self.node, self._live, lambda i: self._runtime(i.spec).pids)

    def inside(
        self,
        namespace: str,
        name: str,
        argv: Sequence[str],
        instance: str = "",
        *,
        stdin: bool = False,
        tty: bool = False,
        marks: Mapping[str, str] = MappingProxyType({}),
    ) -> Inside:
        """What runs ``argv`` as a living instance of an app does, in its container where it has one; the first one's,
        unless one is named. Raises ``NotFound``."""
        living = [i for i in self._live.get((namespace, name), {}).values() if i.alive and instance in ("", i.row.id)]
        live = min(living, key=lambda i: (i.row.slot, i.row.id), default=None)
        snapshot = self._db.version(namespace, name, live.row.version) if live is not None else None
        if live is None or snapshot is None:
            what = f"instance {instance!r}" if instance else "instance"
            raise NotFound(f"no {what} of it runs on node {self.node}", resource=f"App/{name}")
        spec = msgspec.convert(snapshot.spec, AppSpec)
        extra = self._source.service_env(namespace)
        found = self._runtime(spec).inside(live.row, snapshot, extra, argv, stdin=stdin, tty=tty, marks=marks)
        return found._replace(instance=live.process)

    # -- adoption -----------------------------------------------------------------------------------------------------

    def _adopt(self, row: InstanceRow) -> None:
        snapshot = self._db.version(row.namespace, row.name, row.version)
        spec = msgspec.convert(snapshot.spec, AppSpec) if snapshot else AppSpec()
        runtime = self._runtime(spec)
        process = proc.ProcId.parse(row.process) if row.process else runtime.find(row)
        live = Live(row, spec, process, adopted=True)
        live.alive = process is not None and proc.alive(process)
        if process is not None and not row.process:
            row.process = str(process)
            self._db.save_instance(row)
        if live.alive and process is not None:
            before = (row.enforced, row.not_enforced)
            runtime.resume(row, spec, process)
            if (row.enforced, row.not_enforced) != before:
                self._db.save_instance(row)
        self._live.setdefault((row.namespace, row.name), {})[row.id] = live

    async def _look_back(self) -> None:
        """What can be known of instances that ended while no agent was there."""

        async def ask(live: Live) -> None:
            live.exit_code = await self._runtime(live.spec).exit_code(live.row, live.spec)
            live.lost = live.exit_code is None

        await asyncio.gather(*(ask(i) for all_ in self._live.values() for i in all_.values() if not i.alive))

    # -- the loop ------------------------------------------------------------------------------------------

    def _waits_for(self, app: Resource) -> list[str]:
        """The apps of this node that must be healthy before it starts, and are not. What runs on other nodes is not
        waited for: a cut site would wait for news that cannot come."""
        mine = self._source.apps()
        return [
            name
            for name in app.spec.dependsOn
            if (key := (app.metadata.namespace, name)) in mine and self._phases.get(key) not in ("Running", "Stopped")
        ]

    async def _reconcile(self, key: AppKey) -> float | None:
        if self._stopping:
            return None
        found = self._source.apps().get(key)
        wanted: str | None = None
        rules = Rules(0)
        message = ""
        waits_for: list[str] = []
        may_start, lacks = True, False
        state = self._states.get(key) or State()
        asked = ""
        if found is not None:
            app, replicas = found
            rules = rules_of(app.spec, replicas)
            waits_for = self._waits_for(app)
            may_start = not waits_for
            try:
                version = snapshot(app, self._source)
                asked = wanted = digest(version)
                if wanted not in (state.current, state.candidate):
                    self._db.save_version(*key, wanted, version)
                    message = "" if wanted in state.bad else self._runtime(app.spec).waits_for(*key, wanted, app.spec)
                    if message:
                        # what serves goes on until all is here that the next one needs
                        wanted = state.candidate or state.current or ""
            except EdgewardError as e:
                message = str(e)
                # what runs goes on: a missing setting is no reason to stop anything
                wanted = state.candidate or state.current or ""
                may_start = bool(wanted)
                lacks, asked = True, wanted
        self.ahead.look(key)  # after the wish: what is wanted now goes on being got
        again: float | None = None
        timed = self._timed(key, found[0], state, wanted, rules) if found is not None and wanted else None
        if timed is not None:
            wanted, may_start, again = timed.version, may_start and state.due, timed.again
        for _ in range(20):
            instances = self._live.setdefault(key, {})
            now = [seen(i) for i in instances.values()]
            if wanted == "":
                p = Plan(phase="Pending")
            else:
                p = plan(wanted, rules, state, now, clock.steady(), may_start=may_start)
            done = await self._act(key, state, p, rules, wanted)
            if p.look_at != float("inf"):
                again = min(max(0.0, p.look_at - clock.steady()), timed.again if timed else float("inf"))
            if not done or (p.actions and isinstance(p.actions[-1], Gone)):
                break
        else:
            again = 0.05
        if found is None and not self._live.get(key):
            self._report(*key, None)
            self._phases.pop(key, None)
            return None
        if not may_start and again is None:
            again = 0.2  # what it depends on tells by its phase, looked at again soon
        generation = found[0].metadata.generation if found else 0
        waits = f"waits for {', '.join(waits_for)}" if p.waits and waits_for else ""
        if timed is not None and found is not None and state.due:  # the run may be over now
            timed = self._timed(key, found[0], state, timed.version, rules) or timed
            again = min(timed.again, again or timed.again) if not timed.began else 0.0
        if timed is not None and not state.due:
            p.phase = "Stopped"
            message = message or "; ".join(
                filter(None, (self._messages.get(key, ""), f"runs next at {clock.timestamp(timed.next)}"))
            )
        words = message or p.message or waits or self._messages.get(key, "")
        self._tell(key, state, p, generation, words, "unknown" if lacks else asked)
        return again

    def _timed(self, key: AppKey, app: Resource, state: State, wanted: str, rules: Rules) -> Look | None:
        """What an App with a schedule is to do now; None for one that has none."""
        if app.spec.schedule is None:
            return None
        was = msgspec.json.encode(state)
        now = look(app.spec.schedule, state, wanted, rules.replicas, bool(self._live.get(key)), clock.now())
        if msgspec.json.encode(state) != was:
            self._save(key, state)
        if now.began:
            self._event("Normal", "RunBegins", f"a run of version {now.version[:8]}", *key)
        if now.left_out:
            self._event("Warning", "RunLeftOut", "the run before it still goes on", *key)
        return now

    async def _act(self, key: AppKey, state: State, p: Plan, rules: Rules, wanted: str | None) -> bool:
        """Does the plan's actions; True when there is reason to plan again at once."""
        again = False
        for action in p.actions:
            match action:
                case Adopt(version):
                    state.candidate = "" if version == state.current else version
                    state.bad = {v: why for v, why in state.bad.items() if v == wanted}
                    self._save(key, state)
                    self._trim(key, state, wanted)
                    again = True
                case Start(version, slot):
                    await self._start(key, state, version, slot, rules)
                    again = True
                case Stop(instance, why):
                    self._stop(key, instance, why)
                case Forget(instance, failed):
                    await self._forget(key, state, instance, failed, rules)
                    again = True
                case Switch(version):
                    old = state.current
                    state.serve(version)
                    state.switched_at = clock.steady()
                    self._save(key, state)
                    self._trim(key, state, wanted)
                    what = f"version {version[:8]} serves" + (f", {old[:8]} is kept" if old else "")
                    self._event("Normal", "Switched", what, *key)
                    again = True
                case MarkBad(version, why):
                    said = [i.why for i in self._live.get(key, {}).values() if i.row.version == version and i.why]
                    if reason := (said or [self._messages.get(key, "")])[0]:
                        why = f"{why} ({reason})"
                    state.bad[version] = why
                    state.candidate = ""
                    self._save(key, state)
                    self._trim(key, state, wanted)
                    going_on = f"{state.current[:8]} goes on"
                    self._event("Warning", "RolledBack", f"version {version[:8]} failed: {why}; {going_on}", *key)
                    again = True
                case Gone():
                    self._db.remove_app(*key)
                    self._states.pop(key, None)
                    self._live.pop(key, None)
                    self._messages.pop(key, None)
                    self._ground.forget(*key)
                    for runtime in self._runtimes.values():
                        runtime.forget(*key)
        return again

    def _save(self, key: AppKey, state: State) -> None:
        self._states[key] = state
        self._db.save_app(*key, state)

    def _trim(self, key: AppKey, state: State, wanted: str | None) -> None:
        """Keeps the versions that serve, served last, are asked for or still have an instance."""
        living = {i.row.version for i in self._live.get(key, {}).values()}
        asked = {wanted} if wanted else set()
        self._db.trim_versions(*key, {state.current, state.candidate, *state.history, *asked, *living})

    async def _start(self, key: AppKey, state: State, version: str, slot: int, rules: Rules) -> None:
        snapshot = self._db.version(*key, version)
        if snapshot is None:
            self._messages[key] = f"version {version[:8]} is not kept any more"
            return
        spec = msgspec.convert(snapshot.spec, AppSpec)
        row = InstanceRow(f"{key[1]}-{clock.new_id(6)}", *key, version, slot, started_at=clock.steady(), piped=True)
        live = Live(row, spec)
        try:
            record = state.slots.setdefault(slot_key(version, slot), Slot())
            taken = {p for all_ in self._live.values() for i in all_.values() for p in i.row.ports.values()}
            row.ports = ports.choose(spec, record.ports, taken)
            if record.ports != row.ports:
                record.ports = dict(row.ports)
                self._save(key, state)
            self._db.save_instance(row)
            self._live.setdefault(key, {})[row.id] = live
            started = await self._runtime(spec).start(row, snapshot, self._source.service_env(key[0]))
        except EdgewardError as e:
            self._messages[key] = str(e)
            live.why = str(e)
            self._event("Warning", "StartFailed", str(e), *key)
            await self._forget(key, state, row.id, True, rules)
            self._loop.add_after(key, delay_after(1, rules))
            return
        row.process = str(started.process)
        row.enforced, row.not_enforced, row.image = started.enforced, started.not_enforced, started.image
        self._db.save_instance(row)
        live.process, live.alive = started.process, True
        self._messages.pop(key, None)
        self._event("Normal", "Started", f"instance {row.id} of version {version[:8]}", *key)
        self._look_after(live)

    def _stop(self, key: AppKey, instance: str, why: str) -> None:
        live = self._live.get(key, {}).get(instance)
        if live is None or live.stopping:
            return
        live.stopping = True
        if not why.startswith(("an older", "no longer", "fewer")):
            self._event("Warning", "Stopping", f"instance {instance}: {why}", *key)

        async def stop() -> None:
            await self._runtime(live.spec).stop(live.row, live.spec)
            live.alive = live.process is not None and proc.alive(live.process)
            live.stopping = live.alive is False  # one that could not be ended is asked again
            self._loop.add(key)

        self._spawn(stop())

    async def _forget(self, key: AppKey, state: State, instance: str, failed: bool, rules: Rules) -> None:
        live = self._live.get(key, {}).pop(instance, None)
        if live is None:
            return
        slot = state.slots.setdefault(slot_key(live.row.version, live.row.slot), Slot())
        ran = clock.steady() - live.row.started_at
        if failed:
            slot.restarts = 1 if ran > 60 and slot.restarts > 3 else slot.restarts + 1
            slot.not_before = clock.steady() + delay_after(slot.restarts, rules)
            how = "ended" if live.exit_code is None else proc.ending(live.exit_code)
            if live.alive or live.process is not None:
                self._messages[key] = f"instance {instance} {how} after {ran:.1f} s"
                self._event("Warning", "Ended", self._messages[key], *key)
        elif live.lost:
            # what a power cut ended is started again at once
            slot.restarts, slot.not_before = 0, 0.0
        elif not live.stopping:
            slot.done = True
        if rules.policy == "never" and not live.stopping:
            slot.done = True
        live_versions = {state.current, state.candidate}
        state.slots = {k: v for k, v in state.slots.items() if k.partition(":")[0] in live_versions}
        self._save(key, state)
        await self._runtime(live.spec).clean(live.row)
        self._db.remove_instance(instance)
        self._meter.forget(instance)
        self.logs.trim(key)

    # -- looking after instances --------------------------------------------------------------------------------------

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _look_after(self, live: Live) -> None:
        self._spawn(self._watch.watch(live))

    # -- the report ----------------------------------------------------------------------------------------

    def _tell(self, key: AppKey, state: State, p: Plan, generation: int, message: str, wanted: str) -> None:
        all_ = self._live.get(key, {}).values()
        wall = clock.now() - clock.steady()
        status = told(self.node, self._address, all_, state, p, generation, message, wall, wanted)
        if p.phase != self._phases.get(key):
            self._phases[key] = p.phase
            for other in self._source.apps():
                if other != key and other[0] == key[0]:
                    self._loop.add(other)
        self._report(*key, status)
