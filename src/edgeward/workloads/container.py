"""The container runtime: a version's snapshot becomes a container of podman's or docker's, and a process of the node.

The container is made of the image that ``images.py`` noted for the version, sees its files and volumes, and writes into
a pipe as every instance does. Its first process is one of the node's: the kernel tells when it ends, signals stop it,
and its group of limits is read. The engine (``podman.py``, ``docker.py``) makes and removes containers, and knows how
one ended; ours have the node's label, and those that no instance is known of are taken away.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import msgspec

from edgeward.core import cgroup, clock, proc
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.files import ensure_dir
from edgeward.core.quantity import parse_bytes, parse_duration
from edgeward.core.registry import extensions
from edgeward.core.spans import is_address
from edgeward.workloads.container_spec import Container
from edgeward.workloads.docker import Docker
from edgeward.workloads.engine import Engine, Mount, Run
from edgeward.workloads.ground import Ground, write_file
from edgeward.workloads.images import Images
from edgeward.workloads.podman import Podman
from edgeward.workloads.runtime import Inside, Kept, Started
from edgeward.workloads.spec import AppSpec, substitute
from edgeward.workloads.state import InstanceRow, Snapshot

log = logging.getLogger("edgeward.containers")

#: Seconds: between two looks for what nothing needs (the second comes soon: what a killed agent had begun may have gone
#: on), and how long the last word of an engine is waited for.
_TIDY, _SOON, _WORD = 3600.0, 60.0, 30.0


class ContainerRuntime:
    def __init__(self, ground: Ground, engine: Engine | None = None) -> None:
        self.ground = ground
        self.engine: Engine = engine or choose(ground)
        self.images = Images(ground, self.engine)
        #: Tells this node's containers from those of other nodes on the machine.
        self.label = hashlib.sha256(str(ground.data.absolute()).encode()).hexdigest()[:12]
        self._used = ground.data / "containers"
        self._look = asyncio.Event()

    def ahead(self, namespace: str, name: str, version: str, spec: AppSpec) -> bool | None:
        return self.images.ahead((namespace, name, version), _of(spec))

    def drop(self, namespace: str, name: str) -> None:
        self.images.drop(namespace, name)

    def waits_for(self, namespace: str, name: str, version: str, spec: AppSpec) -> str:
        return self.images.waits_for((namespace, name, version), _of(spec))

    def _name(self, row: InstanceRow) -> str:
        return f"edgeward-{self.label}-{row.id}"

    # -- starting ------------------------------------------------------------------------------------------------------

    async def start(self, row: InstanceRow, snapshot: Snapshot, extra: Mapping[str, str]) -> Started:
        spec = msgspec.convert(snapshot.spec, AppSpec)
        try:
            if why := self.engine.absent():
                raise EdgewardError(why, remedy="install podman or docker on this node")
            run, image = await self._made(row, spec, snapshot, extra)
            return await self._start(row, spec, run, image)
        except EdgewardError as e:
            e.resource = e.resource or f"App/{row.name}"
            e.field = e.field or "$.spec.container"
            raise

    async def _made(
        self, row: InstanceRow, spec: AppSpec, snapshot: Snapshot, extra: Mapping[str, str]
    ) -> tuple[Run, str]:
        version = (row.namespace, row.name, row.version)
        note = self.images.note(version)
        if note is not None and await self.engine.image(note.id) is None:
            self.images.gone(version)
            note = None
        if note is None:
            why = self.images.waits_for(version, _of(spec))
            raise EdgewardError(f"its image is not on this node: {why}", field="$.spec.container.image")
        container = _of(spec)
        env = self.environment(row, snapshot, extra)
        at = "$.spec.container"
        command = [substitute(t, env, f"{at}.command[{n}]") for n, t in enumerate(container.command)]
        args = [substitute(t, env, f"{at}.args[{n}]") for n, t in enumerate(container.args)]
        ensure_dir(self._used)
        (self._used / "engine").write_text(self.engine.name, "ascii")
        folder = ensure_dir(self.ground.folder(row))
        mounts = [self._volume(row, v, f"{at}.volumes[{n}]") for n, v in enumerate(container.volumes)]
        for path, text in snapshot.files.items():
            # whoever the program runs as may read it; on the node nobody gets to it, the folder is closed
            target = write_file(ensure_dir(folder / "files"), path, text, 0o444)[-1]
            mounts.append(Mount(str(target), str(PurePosixPath(container.filesAt) / path), True))
        addresses = ["127.0.0.1"]  # and where other nodes look for it; nothing listens on all addresses
        if self.ground.address != "127.0.0.1" and is_address(self.ground.address):
            addresses.append(self.ground.address)
        publish = [
            (a, row.ports[p.name], self._ports_inside(row, container)[p.name]) for p in spec.ports for a in addresses
        ]
        run = Run(
            self._name(row), note.id, self.label, row.id, folder.absolute(), env, command or None, args,
            container.user, container.workingDir, mounts, container.network == "host", publish, _limits(spec),
        )  # fmt: skip
        return run, note.digest

    @staticmethod
    def _ports_inside(row: InstanceRow, container: Container) -> dict[str, int]:
        return {**row.ports, **container.ports}

    def environment(self, row: InstanceRow, snapshot: Snapshot, extra: Mapping[str, str]) -> dict[str, str]:
        container = _of(msgspec.convert(snapshot.spec, AppSpec))
        inside = self._ports_inside(row, container)
        return self.ground.environment(row, snapshot, extra, container.env, "$.spec.container.env", inside)

    def _volume(self, row: InstanceRow, volume: Any, field: str) -> Mount:
        if volume.name:
            name = f"edgeward-{self.label}-{row.namespace}-{volume.name}"
            return Mount(name, volume.path, volume.readOnly, volume=True)
        if not Path(volume.hostPath).exists():
            raise Invalid(f"{volume.hostPath} is not on this node", field=f"{field}.hostPath", remedy="make it first")
        return Mount(volume.hostPath, volume.path, volume.readOnly)

    async def _start(self, row: InstanceRow, spec: AppSpec, run: Run, image: str) -> Started:
        out = -1
        try:
            out = self.ground.pipes.make(self.ground.log_file(row), parse_bytes(spec.logs.bytes))
            os.fchmod(out, 0o622)  # a program may open /dev/stdout by its name, whoever it runs as
            await self.engine.run(run, out)
        except OSError as e:
            raise EdgewardError(f"it cannot be started: {e.strerror or e}") from None
        except EdgewardError as e:
            self._look.set()
            e.message = f"the container cannot be started: {e.message}"
            raise
        finally:
            if out >= 0:
                os.close(out)
        process = self._process(run.folder) or proc.ended(_pid(run.folder))
        verdict = cgroup.holds(process.pid, run.limits)
        if not proc.alive(process):  # it is over already: nothing can be read of it
            verdict = cgroup.Verdict([], {})
        enforced = [*verdict.enforced, *(["user"] if run.user else [])]
        return Started(process, enforced, [{"what": k, "why": v} for k, v in verdict.refused.items()], image)

    # -- a running one -------------------------------------------------------------------------------------------------

    @staticmethod
    def _process(folder: Path) -> proc.ProcId | None:
        """The first process of the container of an instance's folder, if it lives: nobody else who has its number."""
        try:
            pid, cid = int((folder / "pid").read_text("ascii")), (folder / "cid").read_text("ascii").strip()
            found = proc.identify(pid)
            if found is not None and cid and cid in Path(f"/proc/{pid}/cgroup").read_text():
                return found
        except (OSError, ValueError):
            pass
        return None

    def find(self, row: InstanceRow) -> proc.ProcId | None:
        return self._process(self.ground.folder(row))

    def resume(self, row: InstanceRow, spec: AppSpec, process: proc.ProcId) -> None:
        self.ground.pipes.adopt(self.ground.log_file(row))
        if self.engine.keeps_output:
            with contextlib.suppress(OSError):  # too many open files, say: then it stays with the engine
                out = self.ground.pipes.make(self.ground.log_file(row), parse_bytes(spec.logs.bytes))
                self.engine.follow(self._name(row), self.ground.folder(row), out)
        verdict = cgroup.holds(process.pid, _limits(spec))
        own = {*verdict.enforced, *verdict.refused}
        row.enforced = [*verdict.enforced, *(what for what in row.enforced if what not in own)]
        row.not_enforced = [{"what": k, "why": v} for k, v in verdict.refused.items()]
        note = self.images.note((row.namespace, row.name, row.version))
        row.image = row.image or (note.digest if note is not None else "")

    def inside(
        self,
        row: InstanceRow,
        snapshot: Snapshot,
        extra: Mapping[str, str],
        argv: Sequence[str],
        *,
        stdin: bool = False,
        tty: bool = False,
        marks: Mapping[str, str] = MappingProxyType({}),
    ) -> Inside:
        """The engine runs it in the container, with its environment and user."""
        words, around = self.engine.exec(self._name(row), [*argv], stdin=stdin, tty=tty, env=marks)
        return Inside(words, around, self.ground.folder(row), {}, apart=True)

    def pids(self, process: proc.ProcId) -> list[int]:
        return cgroup.members(process.pid) if proc.alive(process) else []

    async def exit_code(self, row: InstanceRow, spec: AppSpec) -> int | None:
        """None when the machine was switched off meanwhile: then the engine does not know either."""
        if not row.process or not proc.this_boot(proc.ProcId.parse(row.process)):
            return None
        try:
            async with asyncio.timeout(_WORD):
                code = await self.engine.wait(self._name(row))
        except (EdgewardError, TimeoutError) as e:
            log.warning("it is not known how %s ended: %s", row.id, e)
            return None
        return 128 - code if code is not None and 128 < code <= 192 else code

    async def stop(self, row: InstanceRow, spec: AppSpec) -> bool:
        """Only the first process is asked, as engines do: it answers for the others."""
        if not row.process:
            return True
        process = proc.ProcId.parse(row.process)
        for sig, grace in ((getattr(signal, f"SIG{spec.stop.signal}"), parse_duration(spec.stop.grace)), (9, 5.0)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if proc.alive(process):
                    os.kill(process.pid, sig)
            if await proc.wait_exit(process, grace):
                return True
        with contextlib.suppress(EdgewardError):  # another user's, to whom only the engine gets through
            await self.engine.remove(self._name(row))
        return await proc.wait_exit(process, 5.0)

    # -- what nothing needs --------------------------------------------------------------------------------------------

    async def clean(self, row: InstanceRow) -> None:
        try:
            await self.engine.remove(self._name(row))
        except EdgewardError as e:
            log.warning("the container of %s was not taken away: %s", row.id, e)
            self._look.set()
        shutil.rmtree(self.ground.folder(row), ignore_errors=True)

    def about(self) -> dict[str, Any]:
        why = self.engine.absent()
        return {"containers": {"missing": why} if why else {"engine": self.engine.name}}

    def hurry(self) -> None:
        self.images.hurry()

    async def run(self, kept: Kept) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.images.run())
            group.create_task(self.engine.background())
            pause = _SOON
            while True:
                if self._used.is_dir() and not self.engine.absent():
                    try:
                        await self._sweep(kept)
                    except (EdgewardError, OSError) as e:
                        log.warning("containers and images that nothing needs were not taken away: %s", e)
                self._look.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._look.wait()
                pause = _TIDY

    async def _sweep(self, kept: Kept) -> None:
        """What an agent that was killed had just begun, and images of versions that are over."""
        there = await self.engine.containers(self.label)
        known = kept.instances()  # asked after the list: what is made meanwhile is not on it
        for name, instance in there.items():
            if instance not in known:
                log.info("container %s is no instance's and is taken away", name)
                await self.engine.remove(name)
        await self.images.tidy(kept.versions(), clock.now())

    def forget(self, namespace: str, name: str) -> None:
        self.images.forget(namespace, name)
        self._look.set()


def choose(ground: Ground) -> Engine:
    """The engine that ``node.json`` names, or the one that has this node's containers, or the first that is there."""
    named, file = str(ground.settings.get("engine", "")), ground.data / "containers" / "engine"
    if named:
        return extensions.get("engine", named)(ground.settings)  # type: ignore[no-any-return]
    engines: dict[str, Engine] = {n: extensions.get("engine", n)(ground.settings) for n in ("podman", "docker")}
    with contextlib.suppress(OSError):
        known = engines.get(file.read_text("ascii").strip())
        if known is not None and not known.absent():
            return known
    return next((e for e in engines.values() if not e.absent()), engines["podman"])


def _of(spec: AppSpec) -> Container:
    if spec.container is None:
        raise Invalid("no container is declared", field="$.spec.container")
    return spec.container


def _pid(folder: Path) -> int:
    try:
        return int((folder / "pid").read_text("ascii"))
    except (OSError, ValueError):
        raise EdgewardError("the engine does not say which process it started") from None


def _limits(spec: AppSpec) -> cgroup.Limits:
    memory = parse_bytes(spec.limits.memory) if spec.limits.memory is not None else None
    return cgroup.Limits(memory, spec.limits.cpu, spec.limits.pids)


for _name, _engine in (("podman", Podman), ("docker", Docker)):
    if _name not in extensions.names("engine"):
        extensions.add("engine", _name, _engine)
if "container" not in extensions.names("runtime"):
    extensions.add("runtime", "container", ContainerRuntime)
