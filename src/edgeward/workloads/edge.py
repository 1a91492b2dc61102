"""The agent's side of apps: makes the node run what is desired, and reports what it runs.

A level-triggered loop per app reads the wish, looks at the instances, asks ``plan.py`` what to do and does it; exits,
health changes and pokes only say that it is time to look. Everything decided is in ``workloads.db`` before it is done,
so after a SIGKILL the next agent finds the processes again (adopts them) and the plan goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edgeward.core import cgroup, clock, proc
from edgeward.core.errors import EdgewardError, NotFound
from edgeward.core.files import ensure_dir
from edgeward.core.quantity import parse_duration
from edgeward.core.reconcile import Loop
from edgeward.core.registry import extensions
from edgeward.core.resource import Resource
from edgeward.core.streaming import Piece
from edgeward.core.vault import Vault
from edgeward.workloads import health
from edgeward.workloads.logs import GAP, Marked, Output, changed_since
from edgeward.workloads.plan import (
    Adopt,
    Forget,
    Gone,
    MarkBad,
    Plan,
    Rules,
    Seen,
    Slot,
    Start,
    State,
    Stop,
    Switch,
    delay_after,
    plan,
    slot_key,
)
from edgeward.workloads.process import Runtime
from edgeward.workloads.spec import AppSpec
from edgeward.workloads.state import KEEP, InstanceRow, Snapshot, WorkloadState

log = logging.getLogger("edgeward.apps")

AppKey = tuple[str, str]
Report = Callable[[str, str, dict[str, Any] | None], None]
Event = Callable[[str, str, str, str, str], None]

#: Pauses before the first health checks of an instance, in seconds; then the declared interval.
_FIRST_LOOKS = (0.03, 0.05, 0.07, 0.1, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5)
_PORTS = (20000, 31999)  # below the range that the kernel uses for outgoing connections
_KEPT_LOGS = 4


class Source(Protocol):
    """The wishes: read from the replica, the same with and without a link."""

    def apps(self) -> dict[AppKey, tuple[Resource, int]]: ...
    def config(self, namespace: str, name: str) -> dict[str, str] | None: ...
    def secret(self, namespace: str, name: str) -> dict[str, str] | None: ...
    def service_env(self, namespace: str) -> dict[str, str]: ...


class Live(msgspec.Struct):
    """One instance in memory: its row, and what was observed since this agent started."""

    row: InstanceRow
    spec: AppSpec
    process: proc.ProcId | None = None
    alive: bool = False
    healthy: bool = False
    healthy_since: float = 0.0
    ever_healthy: bool = False
    failures: int = 0
    why: str = ""
    stopping: bool = False
    exit_code: int | None = None
    adopted: bool = False
    #: It was dead when this agent started.
    lost: bool = False


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
    ) -> None:
        self.node, self.site = node, site
        self._source = source
        self._report, self._event = report, event
        self._address = address or "127.0.0.1"
        ensure_dir(data_dir)
        self._db = WorkloadState(data_dir / "workloads.db", vault)
        self._runtime: Runtime = extensions.get("runtime", "process")(node=node, site=site, data_dir=data_dir)
        self._states = self._db.apps()
        self._live: dict[AppKey, dict[str, Live]] = {}
        self._loop: Loop[AppKey] = Loop("apps", self._reconcile, workers=8, timeout=120.0)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._messages: dict[AppKey, str] = {}
        self._phases: dict[AppKey, str] = {}
        self._usage: dict[str, tuple[float, float]] = {}
        for row in self._db.instances():
            self._adopt(row)
        self._runtime.sweep({i for all_ in self._live.values() for i in all_})

    # -- outside face --------------------------------------------------------------------------------------------------

    def poke(self, namespace: str, name: str) -> None:
        """Something about this app may have changed."""
        self._loop.add((namespace, name))

    async def run(self) -> None:
        """Runs until cancelled."""
        for key in {*self._source.apps(), *self._states, *self._live}:
            self._loop.add(key)
        try:
            async with asyncio.TaskGroup() as group:
                for instances in self._live.values():
                    for live in instances.values():
                        self._look_after(live)
                group.create_task(self._loop.run())
                group.create_task(self._runtime.run())
        finally:
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def shutdown(self, *, leave: bool) -> None:
        """The agent ends. ``leave``: apps go on and are adopted by the next one; else they are stopped."""
        self._stopping = True
        if not leave:

            async def stop(live: Live) -> None:
                await self._runtime.stop(live.row, live.spec)
                self._runtime.clean(live.row)
                self._db.remove_instance(live.row.id)

            await asyncio.gather(*(stop(i) for all_ in self._live.values() for i in all_.values() if i.alive))
            for key, state in self._states.items():
                stopped = {"phase": "Stopped", "instances": [], "version": state.current[:12]}
                self._report(*key, {**stopped, "message": "the node's agent was stopped"})
        await self._runtime.close(leave=leave)
        self._db.close()

    def enforced(self) -> list[str]:
        """Limits that this node can enforce."""
        import os

        found = [f"limits.{name}" for name in cgroup.available()]
        return [*found, *(["process.user"] if os.geteuid() == 0 else [])]

    def usage(self) -> list[dict[str, Any]]:
        """Present use of every instance: processor in cores since the last call, memory in bytes."""
        found = []
        now = clock.monotonic()
        for (namespace, name), instances in sorted(self._live.items()):
            for live in instances.values():
                if not live.alive or live.process is None:
                    continue
                cpu = memory = 0.0
                for pid in proc.group_pids(live.process):
                    one = proc.usage(pid)
                    if one is not None:
                        cpu, memory = cpu + one.cpu, memory + one.memory
                was_at, was = self._usage.get(live.row.id, (0.0, 0.0))
                rate = max(0.0, (cpu - was) / (now - was_at)) if was_at and now > was_at else 0.0
                self._usage[live.row.id] = (now, cpu)
                found.append(
                    {"namespace": namespace, "name": name, "node": self.node, "instance": live.row.id,
                     "cpu": round(rate, 3), "memory": int(memory)}
                )  # fmt: skip
        return found

    async def logs(
        self,
        namespace: str,
        name: str,
        *,
        tail: int = 200,
        follow: bool = False,
        since: str = "",
        instance: str = "",
        after: Mapping[str, str] | None = None,
    ) -> AsyncIterator[bytes]:
        """The last lines that the app wrote, then (``follow``) what it writes, of all its instances here. ``after``:
        the mark of the last :class:`Piece` of a call that broke off, to go on behind it."""
        known = after or {}
        shown, several = self._shown(namespace, name, since, instance, known)
        outputs = {path: Output(path) for path in shown}
        marks = {path: Marked(f"[{path.stem}] ".encode() if several else b"") for path in shown}
        at = dict(known)
        try:
            for path, output in outputs.items():
                if known:
                    there = output.resume(known.get(path.stem, ""))
                    data = marks[path].feed(GAP) if path.stem in known and not there else b""
                else:
                    data = marks[path].feed(output.tail(tail))
                    at[path.stem] = output.mark(marks[path].begun)
                if data:
                    yield Piece(data, dict(at))
                if not follow and (data := marks[path].rest()):
                    yield data
            if not follow:
                return
            pieces = self._followed((namespace, name), outputs, marks, several, not instance)
            async with contextlib.aclosing(pieces):
                async for stem, data, mark in pieces:
                    at[stem] = mark or at.get(stem, "")
                    yield Piece(data, dict(at))
        finally:
            for output in outputs.values():
                output.close()

    def _shown(
        self, namespace: str, name: str, since: str, instance: str, known: Mapping[str, str]
    ) -> tuple[list[Path], bool]:
        """The files to show, and whether their lines are to be told apart."""
        folder = self._runtime.logs / namespace / name
        files = sorted(folder.glob("*.log"), key=lambda p: p.stat().st_mtime) if folder.is_dir() else []
        if instance:
            files = [f for f in files if f.stem == instance]
        if not files:
            raise NotFound("wrote nothing on this node", resource=f"App/{name}", remedy="see: edgeward describe app")
        if since:
            try:
                seconds = parse_duration(since)
            except ValueError as e:
                raise EdgewardError(str(e), field="?since") from None
            files = [f for f in files if changed_since(f, seconds) or f.stem in known]
        wanted = {i.row.id for i in self._live.get((namespace, name), {}).values() if i.alive} | known.keys()
        shown = files if len(files) == 1 else [f for f in files if f.stem in wanted] or files[-1:]
        return shown, len(shown) > 1

    async def _followed(
        self, key: AppKey, outputs: dict[Path, Output], marks: dict[Path, Marked], several: bool, more: bool
    ) -> AsyncGenerator[tuple[str, bytes, str]]:
        """What the outputs give, and (``more``) those of instances that come later: instance, data, mark."""
        queue: asyncio.Queue[tuple[str, bytes, str]] = asyncio.Queue(64)

        async def one(path: Path) -> None:
            async for piece in outputs[path].follow():
                if data := marks[path].feed(piece):
                    await queue.put((path.stem, data, outputs[path].mark(marks[path].begun)))

        tasks = {p: asyncio.create_task(one(p)) for p in outputs}
        try:
            while True:
                # an update brings new instances: follow them too
                for i in list(self._live.get(key, {}).values()):
                    path = self._runtime.log_file(i.row)
                    if path not in tasks and more and path.exists():
                        outputs[path] = Output(path)
                        outputs[path].resume("")
                        marks[path] = Marked(f"[{path.stem}] ".encode() if several else b"")
                        tasks[path] = asyncio.create_task(one(path))
                got = None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        got = await queue.get()
                if got is not None:  # given outside of the timeout, which would cancel a slow reader
                    yield got
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    # -- adoption -----------------------------------------------------------------------------------------------------

    def _adopt(self, row: InstanceRow) -> None:
        snapshot = self._db.version(row.namespace, row.name, row.version)
        process = proc.ProcId.parse(row.process) if row.process else self._runtime.find(row)
        spec = msgspec.convert(snapshot.spec, AppSpec) if snapshot else AppSpec()
        live = Live(row, spec, process, adopted=True)
        live.alive = process is not None and proc.alive(process)
        if process is not None and not row.process:
            row.process = str(process)
            self._db.save_instance(row)
        if live.alive and process is not None:
            before = (row.enforced, row.not_enforced)
            self._runtime.resume(row, spec, process)
            if (row.enforced, row.not_enforced) != before:
                self._db.save_instance(row)
        else:
            live.exit_code = self._runtime.exit_code(row, spec)
            live.lost = live.exit_code is None
        self._live.setdefault((row.namespace, row.name), {})[row.id] = live

    # -- the loop ------------------------------------------------------------------------------------------

    def _snapshot(self, app: Resource) -> Snapshot:
        """The version that is wanted now. Raises ``EdgewardError`` when a Config or Secret is missing."""
        namespace = app.metadata.namespace
        spec: AppSpec = app.spec
        what = str(app.key)

        def data(config: str, secret: str) -> dict[str, str]:
            found = self._source.config(namespace, config) if config else self._source.secret(namespace, secret)
            if found is None:
                kind = f"Config {config!r}" if config else f"Secret {secret!r}"
                raise EdgewardError(f"{kind} is not on this node (yet)", resource=what, remedy="apply it")
            return found

        env: dict[str, str] = {}
        for e in spec.envFrom:
            env |= data(e.config, e.secret)
        files = {}
        for f in spec.files:
            found = data(f.config, f.secret)
            if f.key not in found:
                raise EdgewardError(f"{f.config or f.secret} has no key {f.key!r}", resource=what, field="$.spec.files")
            files[f.path] = found[f.key]
        plain = msgspec.to_builtins(spec)
        for name in ("replicas", "placement", "dependsOn"):
            plain.pop(name, None)
        return Snapshot(plain, env, files)

    @staticmethod
    def _digest(snapshot: Snapshot) -> str:
        return hashlib.sha256(msgspec.json.encode(msgspec.to_builtins(snapshot), order="sorted")).hexdigest()

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
        may_start = True
        state = self._states.get(key) or State()
        if found is not None:
            app, replicas = found
            rules = _rules(app.spec, replicas)
            waits_for = self._waits_for(app)
            may_start = not waits_for
            try:
                snapshot = self._snapshot(app)
                wanted = self._digest(snapshot)
                if wanted not in (state.current, state.candidate):
                    self._db.save_version(*key, wanted, snapshot)
            except EdgewardError as e:
                message = str(e)
                # what runs goes on: a missing setting is no reason to stop anything
                wanted = state.candidate or state.current or ""
                may_start = bool(wanted)
        again: float | None = None
        for _ in range(20):
            instances = self._live.setdefault(key, {})
            seen = [self._seen(i) for i in instances.values()]
            if wanted == "":
                p = Plan(phase="Pending")
            else:
                p = plan(wanted, rules, state, seen, clock.steady(), may_start=may_start)
            done = await self._act(key, state, p, rules, wanted)
            if p.look_at != float("inf"):
                again = max(0.0, p.look_at - clock.steady())
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
        self._tell(key, state, p, generation, message or p.message or waits or self._messages.get(key, ""))
        return again

    def _seen(self, i: Live) -> Seen:
        limit = i.spec.health.failureThreshold
        return Seen(
            i.row.id, i.row.version, i.row.slot, i.alive, i.healthy, i.healthy_since if i.ever_healthy else 0.0,
            i.row.started_at, i.stopping, i.ever_healthy and i.failures >= limit, i.exit_code,
            i.lost,
        )  # fmt: skip

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
                    self._start(key, state, version, slot, rules)
                    again = True
                case Stop(instance, why):
                    self._stop(key, instance, why)
                case Forget(instance, failed):
                    self._forget(key, state, instance, failed, rules)
                    again = True
                case Switch(version):
                    if state.current:
                        state.history = [state.current, *(h for h in state.history if h != state.current)][: KEEP - 1]
                    old, state.current, state.candidate = state.current, version, ""
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
                    self._runtime.forget(*key)
        return again

    def _save(self, key: AppKey, state: State) -> None:
        self._states[key] = state
        self._db.save_app(*key, state)

    def _trim(self, key: AppKey, state: State, wanted: str | None) -> None:
        """Keeps the versions that serve, served last, are asked for or still have an instance."""
        living = {i.row.version for i in self._live.get(key, {}).values()}
        asked = {wanted} if wanted else set()
        self._db.trim_versions(*key, {state.current, state.candidate, *state.history, *asked, *living})

    def _start(self, key: AppKey, state: State, version: str, slot: int, rules: Rules) -> None:
        snapshot = self._db.version(*key, version)
        if snapshot is None:
            self._messages[key] = f"version {version[:8]} is not kept any more"
            return
        spec = msgspec.convert(snapshot.spec, AppSpec)
        row = InstanceRow(f"{key[1]}-{clock.new_id(6)}", *key, version, slot, started_at=clock.steady(), piped=True)
        live = Live(row, spec)
        try:
            record = state.slots.setdefault(slot_key(version, slot), Slot())
            row.ports = self._ports(spec, record.ports)
            if record.ports != row.ports:
                record.ports = dict(row.ports)
                self._save(key, state)
            self._db.save_instance(row)
            self._live.setdefault(key, {})[row.id] = live
            started = self._runtime.start(row, snapshot, self._source.service_env(key[0]))
        except EdgewardError as e:
            self._messages[key] = str(e)
            live.why = str(e)
            self._event("Warning", "StartFailed", str(e), *key)
            self._forget(key, state, row.id, True, rules)
            self._loop.add_after(key, delay_after(1, rules))
            return
        row.process = str(started.process)
        row.enforced, row.not_enforced = started.enforced, started.not_enforced
        self._db.save_instance(row)
        live.process, live.alive = started.process, True
        self._messages.pop(key, None)
        self._event("Normal", "Started", f"instance {row.id} of version {version[:8]}", *key)
        self._look_after(live)

    def _ports(self, spec: AppSpec, before: dict[str, int]) -> dict[str, int]:
        """A port for each that the spec names; those of ``before`` where nobody else has taken them."""
        taken = {p for all_ in self._live.values() for i in all_.values() for p in i.row.ports.values()}
        found: dict[str, int] = {}
        for port in spec.ports:
            if port.port is not None:
                found[port.name] = port.port
                continue
            for n in range(200):
                candidate = random.randint(*_PORTS)  # noqa: S311 - spreading, not secrecy
                if n == 0:
                    candidate = before.get(port.name, candidate)
                if candidate in taken:
                    continue
                with socket.socket() as s:
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    try:
                        s.bind(("", candidate))
                    except OSError:
                        continue
                found[port.name] = candidate
                taken.add(candidate)
                break
            else:
                raise EdgewardError("no free port found", field="$.spec.ports", remedy="free some ports of 20000-31999")
        return found

    def _stop(self, key: AppKey, instance: str, why: str) -> None:
        live = self._live.get(key, {}).get(instance)
        if live is None or live.stopping:
            return
        live.stopping = True
        if not why.startswith(("an older", "no longer", "fewer")):
            self._event("Warning", "Stopping", f"instance {instance}: {why}", *key)

        async def stop() -> None:
            await self._runtime.stop(live.row, live.spec)
            live.alive = live.process is not None and proc.alive(live.process)
            live.stopping = live.alive is False  # one that could not be ended is asked again
            self._loop.add(key)

        self._spawn(stop())

    def _forget(self, key: AppKey, state: State, instance: str, failed: bool, rules: Rules) -> None:
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
        self._runtime.clean(live.row)
        self._db.remove_instance(instance)
        self._usage.pop(instance, None)
        self._drop_old_logs(key)

    # -- looking after instances --------------------------------------------------------------------------------------

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _look_after(self, live: Live) -> None:
        self._spawn(self._watch(live))

    async def _watch(self, live: Live) -> None:
        """Waits for the instance's end and checks its health meanwhile."""
        key = (live.row.namespace, live.row.name)
        if live.process is None or not live.alive:
            live.alive = False
            self._loop.add(key)
            return
        checks = asyncio.create_task(self._check(live))
        try:
            await proc.wait_exit(live.process)
            live.exit_code = self._runtime.exit_code(live.row, live.spec)
        finally:
            checks.cancel()
            await asyncio.gather(checks, return_exceptions=True)
        live.alive = live.healthy = False
        self._loop.add(key)

    async def _check(self, live: Live) -> None:
        key = (live.row.namespace, live.row.name)
        spec = live.spec.health
        interval, timeout = parse_duration(spec.interval), parse_duration(spec.timeout)
        n = 0
        while True:
            if not live.ever_healthy:
                if n or not live.adopted:
                    await asyncio.sleep(_FIRST_LOOKS[min(n, len(_FIRST_LOOKS) - 1)])  # the pace of the first checks
            else:
                await asyncio.sleep(interval * random.uniform(0.9, 1.1))  # noqa: S311 - the declared period, with jitter
            n += 1
            why = await self._once(live, timeout)
            was, was_why = live.healthy, live.why
            if why:
                live.failures += 1
                live.why = why
                if live.failures >= spec.failureThreshold or not live.ever_healthy:
                    live.healthy = False
            else:
                live.failures, live.why = 0, ""
                if not live.healthy:
                    live.healthy, live.healthy_since, live.ever_healthy = True, clock.steady(), True
            if was != live.healthy or (live.ever_healthy and was_why != live.why):
                self._loop.add(key)

    async def _once(self, live: Live, timeout: float) -> str:
        spec = live.spec.health
        if spec.http is not None:
            return await health.http("127.0.0.1", live.row.ports[spec.http.port], spec.http.path, timeout)
        if spec.tcp is not None:
            return await health.tcp("127.0.0.1", live.row.ports[spec.tcp.port], timeout)
        if spec.exec is not None:
            snapshot = self._db.version(live.row.namespace, live.row.name, live.row.version)
            if snapshot is None:
                return "its version is not kept any more"
            try:
                argv, env, user = self._runtime.check(live.row, snapshot, self._source.service_env(live.row.namespace))
            except EdgewardError as e:
                return str(e)
            return await health.command(argv, env, self._runtime.folder(live.row), timeout, user)
        return ""

    def _drop_old_logs(self, key: AppKey) -> None:
        """Keeps what the last few instances that are gone wrote."""
        folder = self._runtime.logs / key[0] / key[1]
        keep = self._live.get(key, {})
        dead = []
        for path in folder.glob("*.log"):
            with contextlib.suppress(FileNotFoundError):
                if path.stem not in keep:
                    dead.append((path.stat().st_mtime, path))
        for _, path in sorted(dead)[:-_KEPT_LOGS]:
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".1").unlink(missing_ok=True)

    # -- the report ----------------------------------------------------------------------------------------

    def _tell(self, key: AppKey, state: State, p: Plan, generation: int, message: str) -> None:
        instances = []
        enforced: set[str] = set()
        refused: dict[str, str] = {}
        for live in sorted(self._live.get(key, {}).values(), key=lambda i: (i.row.version, i.row.slot, i.row.id)):
            slot = state.slots.get(slot_key(live.row.version, live.row.slot), Slot())
            if live.stopping:
                phase = "Stopped" if not live.alive else "Stopping"
            elif not live.alive:
                phase = "Failed"
            else:
                phase = "Running" if live.healthy else "Degraded" if live.ever_healthy else "Starting"
            enforced |= set(live.row.enforced)
            refused |= {n["what"]: n["why"] for n in live.row.not_enforced}
            one: dict[str, Any] = {
                "id": live.row.id,
                "node": self.node,
                "phase": phase,
                "version": live.row.version[:12],
                "ports": live.row.ports,
                "address": self._address,
                "pid": live.process.pid if live.process else 0,
                "restarts": slot.restarts,
                "startedAt": clock.timestamp(live.row.started_at + clock.now() - clock.steady()),
                "healthy": live.healthy,
            }
            if live.why:
                one["message"] = live.why
            instances.append(one)
        status: dict[str, Any] = {
            "phase": p.phase,
            "observedGeneration": generation,
            "instances": instances,
            "version": (state.current or state.candidate)[:12],
            "history": [h[:12] for h in state.history],
            "enforced": sorted(enforced),
            "notEnforced": [{"what": k, "why": v} for k, v in sorted(refused.items())],
        }
        if message:
            status["message"] = message
        if p.phase != self._phases.get(key):
            self._phases[key] = p.phase
            for other in self._source.apps():
                if other != key and other[0] == key[0]:
                    self._loop.add(other)
        self._report(*key, status)


def _rules(spec: AppSpec, replicas: int) -> Rules:
    return Rules(
        replicas,
        startup=parse_duration(spec.health.startup),
        window=parse_duration(spec.health.window),
        drain=parse_duration(spec.stop.drain),
        backoff=parse_duration(spec.restart.backoff),
        backoff_max=parse_duration(spec.restart.max),
        policy=spec.restart.policy,
        fixed_port=any(p.port is not None for p in spec.ports),
    )
