"""The process runtime: a version's snapshot becomes a process of the node, in its own session, folder and limits.

What every runtime does is in ``runtime.py``, where an instance's files and output are in ``ground.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from edgeward.core import cgroup, proc
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.files import ensure_dir
from edgeward.core.quantity import parse_bytes, parse_duration
from edgeward.core.registry import extensions
from edgeward.workloads.ground import MARK, Ground, write_file
from edgeward.workloads.runtime import Inside, Kept, Started
from edgeward.workloads.spec import AppSpec, substitute
from edgeward.workloads.state import InstanceRow, Snapshot

#: Passed on from the agent; everything else of its environment stays with it.
_INHERIT = ("LANG", "LC_ALL", "TZ", "HOME", "TMPDIR")
#: Stands above a program whose exit status matters and leaves it in a file: an agent that adopted the program is not
#: its parent and cannot ask. One that a signal asked to end did not finish, so nothing is left of it.
_WITNESS = 'trap _ew_t=1 TERM INT QUIT HUP USR1; "$@"; _ew_s=$?; [ "$_ew_t" ] || echo "$_ew_s" >"$0"; exit "$_ew_s"'
_STATUS = ".exit-status"
_OLDER = "it was started by an older release, which let it write into the file; restart it"


def _limits(spec: AppSpec) -> cgroup.Limits:
    memory = parse_bytes(spec.limits.memory) if spec.limits.memory is not None else None
    pids = None if spec.limits.pids is None else spec.limits.pids + _witnessed(spec)
    return cgroup.Limits(memory, spec.limits.cpu, pids)


def _even_chance(process: proc.ProcId) -> None:
    """The agent is among the last that a machine out of memory ends; its apps, who inherit that, are not."""
    for pid in proc.group_pids(process):
        proc.even_chance(pid)


class ProcessRuntime:
    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self._node = ground.node
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def environment(self, row: InstanceRow, snapshot: Snapshot, extra: Mapping[str, str]) -> dict[str, str]:
        """The instance's whole environment: nothing of the agent's leaks but a few harmless names."""
        process = msgspec.convert(snapshot.spec, AppSpec).process
        env = {k: os.environ[k] for k in _INHERIT if k in os.environ}
        if process is not None and process.inheritPath:
            env["PATH"] = os.environ.get("PATH", os.defpath)
        own = process.env if process is not None else {}
        return self.ground.environment(row, snapshot, env | dict(extra), own, "$.spec.process.env")

    def waits_for(self, namespace: str, name: str, version: str, spec: AppSpec) -> str:
        return ""

    def ahead(self, namespace: str, name: str, version: str, spec: AppSpec) -> bool | None:
        return None

    def drop(self, namespace: str, name: str) -> None:
        """It fetches nothing."""

    async def start(self, row: InstanceRow, snapshot: Snapshot, extra: Mapping[str, str]) -> Started:
        """Raises ``EdgewardError`` (or ``Invalid``) with the reason when the program cannot be started."""
        try:
            return self._start(row, snapshot, extra)
        except EdgewardError as e:
            e.resource = e.resource or f"App/{row.name}"
            raise

    def _start(self, row: InstanceRow, snapshot: Snapshot, extra: Mapping[str, str]) -> Started:
        spec = msgspec.convert(snapshot.spec, AppSpec)
        if spec.process is None:
            raise Invalid("no process is declared", field="$.spec.process")
        env = self.environment(row, snapshot, extra)
        argv = [substitute(t, env, f"$.spec.process.command[{n}]") for n, t in enumerate(spec.process.command)]
        argv += [substitute(t, env, f"$.spec.process.args[{n}]") for n, t in enumerate(spec.process.args)]
        uid, gid, groups, refused = self._user(spec.process.user)
        folder = ensure_dir(self.ground.folder(row))
        owned = [folder]
        for path, text in snapshot.files.items():
            owned += write_file(folder, path, text)
        if uid is not None:
            for p in owned:
                os.chown(p, uid, gid if gid is not None else -1)
        self._open_to(folder, uid)
        verdict = cgroup.prepare(self._node, row.id, _limits(spec))
        command, out = argv[0], -1
        try:
            if _witnessed(spec):
                argv = ["/bin/sh", "-c", _WITNESS, str(folder / _STATUS), _program(command, env, folder), *argv[1:]]
            out = self.ground.pipes.make(self.ground.log_file(row), parse_bytes(spec.logs.bytes), uid, gid)
            process, popen = proc.spawn_detached(
                argv, env, folder, stdout=out, user=uid, group=gid, extra_groups=groups, umask=0o077
            )
        except (OSError, ValueError, subprocess.SubprocessError) as e:
            cgroup.remove(self._node, row.id)
            reason = getattr(e, "strerror", None) or str(e)
            raise EdgewardError(
                f"{command!r} cannot be started: {reason}",
                field="$.spec.process.command",
                remedy="check the program's name, the files and the user",
            ) from None
        finally:
            if out >= 0:
                os.close(out)
        self._children[process.pid] = popen
        _even_chance(process)
        enforced, missed = self._enter(row, process, verdict)
        refused = {**missed, **refused}
        if uid is not None:
            enforced.append("user")
        return Started(process, enforced, [{"what": k, "why": v} for k, v in refused.items()])

    def _enter(
        self, row: InstanceRow, process: proc.ProcId, verdict: cgroup.Verdict
    ) -> tuple[list[str], dict[str, str]]:
        """Moves the instance below its limits; what holds, and what does not and why."""
        if not verdict.enforced:
            return [], dict(verdict.refused)
        try:
            # itself first: what it starts from then on is born there
            cgroup.enter(self._node, row.id, process.pid)
            for pid in proc.group_pids(process):
                with contextlib.suppress(ProcessLookupError):
                    cgroup.enter(self._node, row.id, pid)
        except OSError as e:
            if proc.alive(process):
                why = f"the process cannot be moved into its group: {e.strerror}"
                return [], verdict.refused | dict.fromkeys(verdict.enforced, why)
        return list(verdict.enforced), dict(verdict.refused)

    def resume(self, row: InstanceRow, spec: AppSpec, process: proc.ProcId) -> None:
        """Sets the limits of an adopted instance again, and says in ``row`` which of them hold now."""
        if row.piped:
            self.ground.pipes.adopt(self.ground.log_file(row))
        else:
            self.ground.pipes.cut(self.ground.log_file(row), parse_bytes(spec.logs.bytes), process.pid)
        verdict = cgroup.prepare(self._node, row.id, _limits(spec))
        enforced, refused = self._enter(row, process, verdict)
        own = {*verdict.enforced, *verdict.refused}
        row.enforced = [*enforced, *(what for what in row.enforced if what not in own)]
        others = [one for one in row.not_enforced if one["what"] not in own]
        if not row.piped and "logs" not in {one["what"] for one in others}:
            others.append({"what": "logs", "why": _OLDER})
        row.not_enforced = [*({"what": k, "why": v} for k, v in refused.items()), *others]

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
        spec = msgspec.convert(snapshot.spec, AppSpec)
        env = self.environment(row, snapshot, extra)
        uid, gid, groups, _ = self._user(spec.process.user if spec.process is not None else "")
        user = {} if uid is None else {"user": uid, "group": gid, "extra_groups": groups}

        def enter(process: proc.ProcId) -> None:
            if row.enforced:
                for pid in (process.pid, *proc.group_pids(process)):  # itself first, as in _enter()
                    with contextlib.suppress(ProcessLookupError):
                        cgroup.enter(self._node, row.id, pid)

        return Inside([*argv], env | dict(marks), self.ground.folder(row), user, enter=enter)

    @staticmethod
    def _user(name: str) -> tuple[int | None, int | None, list[int] | None, dict[str, str]]:
        if not name:
            return None, None, None, {}
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise Invalid(
                f"there is no user {name!r} on this node",
                field="$.spec.process.user",
                remedy="create it, or leave it out",
            ) from None
        if os.geteuid() != 0:
            if entry.pw_uid == os.geteuid():
                return None, None, None, {}
            return None, None, None, {"user": "the agent does not run as root"}
        return entry.pw_uid, entry.pw_gid, os.getgrouplist(name, entry.pw_gid), {}

    def _open_to(self, folder: Path, uid: int | None) -> None:
        """Lets another user walk to its own folder, and see nothing on the way."""
        if uid is None:
            return
        for parent in (folder.parent, folder.parent.parent, self.ground.apps, self.ground.data):
            with contextlib.suppress(OSError):
                parent.chmod(parent.stat().st_mode & ~0o006 | 0o001)

    async def exit_code(self, row: InstanceRow, spec: AppSpec) -> int | None:
        """The status of an instance that ended, negative for a signal; None when nobody can tell (an adopted one whose
        policy does not ask, or that was asked to end)."""
        popen = self._children.pop(proc.ProcId.parse(row.process).pid, None) if row.process else None
        code = popen.wait(5) if popen is not None else None
        if not _witnessed(spec):
            return code
        with contextlib.suppress(OSError, ValueError):
            code = int((self.ground.folder(row) / _STATUS).read_text("ascii"))
        # so a shell says that a signal ended what it ran
        return 128 - code if code is not None and 128 < code <= 192 else code

    async def stop(self, row: InstanceRow, spec: AppSpec) -> bool:
        if not row.process:
            return True
        process = proc.ProcId.parse(row.process)
        sig = getattr(signal, f"SIG{spec.stop.signal}")
        return await proc.terminate(process, sig=sig, grace=parse_duration(spec.stop.grace))

    def find(self, row: InstanceRow) -> proc.ProcId | None:
        """The process of a row that was being started when the agent was killed."""
        found = proc.find_by_env(MARK, row.id)
        return min(found, key=lambda p: p.pid) if found else None

    async def clean(self, row: InstanceRow) -> None:
        """Ends what an instance left of its group, and takes its folder and limits away. Its log stays."""
        if row.process:
            with contextlib.suppress(OSError):
                proc.kill_group(proc.ProcId.parse(row.process), signal.SIGKILL)
        shutil.rmtree(self.ground.folder(row), ignore_errors=True)
        cgroup.remove(self._node, row.id)

    def pids(self, process: proc.ProcId) -> list[int]:
        return proc.group_pids(process)

    def forget(self, namespace: str, name: str) -> None:
        """What it wrote lies on the ground."""

    def about(self) -> dict[str, Any]:
        return {}

    def hurry(self) -> None:
        """It waits for nothing."""

    async def run(self, kept: Kept) -> None:
        """A process leaves nothing outside its folder."""


def _witnessed(spec: AppSpec) -> bool:
    return spec.restart.policy == "on-failure"


def _program(name: str, env: Mapping[str, str], folder: Path) -> str:
    """The program's path. Raises ``OSError`` as starting it would (a shell that cannot start it only ends)."""
    found = shutil.which(folder / name if "/" in name else name, path=env.get("PATH", os.defpath))
    if found is None:
        code = errno.EACCES if "/" in name and (folder / name).exists() else errno.ENOENT
        raise OSError(code, os.strerror(code))
    return name if "/" in name else found


if "process" not in extensions.names("runtime"):
    extensions.add("runtime", "process", ProcessRuntime)
