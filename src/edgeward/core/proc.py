"""Processes that are known by more than their number.

A pid comes in, a :class:`ProcId` goes out: the pid together with the kernel's start time of the process (and the boot
it belongs to), so that a recycled pid is never trusted, signalled or waited for. Everything that outlives its starter
(apps, nats-server, agents) is started, found again, waited for and stopped through this file. Linux reads ``/proc`` and
waits on pidfds; elsewhere ``ps`` and polling do the same job. It never decides whether something should run.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

_PROC = Path("/proc")
_LINUX = sys.platform.startswith("linux")
#: Longest pause between two looks where the system has no pidfd.
_POLL_CAP = 0.25


class ProcId(NamedTuple):
    """One process, for good. ``start`` is opaque; it is compared, stored and never parsed."""

    pid: int
    start: str

    def __str__(self) -> str:
        return f"{self.pid}/{self.start}"

    @classmethod
    def parse(cls, text: str) -> ProcId:
        """The inverse of ``str()``; raises ValueError."""
        pid, _, start = text.partition("/")
        if not start:
            raise ValueError(f"{text!r} is no process identity")
        return cls(int(pid), start)


class _Stat(NamedTuple):
    state: str
    ppid: int
    pgrp: int
    session: int
    ticks: int  # user + system
    start: str


@functools.cache
def _boot() -> str:
    """Names this boot: after a reboot the same pid can have the same start tick."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()[:8]
    except OSError:
        return "0"


def _stat(pid: int) -> _Stat | None:
    try:
        with Path(f"/proc/{pid}/stat").open("rb") as f:
            data = f.read()
    except OSError:
        return None
    # the command name is in parentheses and may itself hold blanks and parentheses
    fields = data[data.rfind(b")") + 2 :].split()
    if len(fields) < 20:
        return None
    return _Stat(
        fields[0].decode("ascii"),
        int(fields[1]),
        int(fields[2]),
        int(fields[3]),
        int(fields[11]) + int(fields[12]),
        f"{int(fields[19])}.{_boot()}",
    )


def _ps(pid: int) -> tuple[str, str] | None:
    """(state, start) where there is no /proc."""
    try:
        done = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
            env={"LC_ALL": "C", "PATH": "/bin:/usr/bin"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    state, _, start = done.stdout.strip().partition(" ")
    return (state[:1], "-".join(start.split())) if start else None


def _state(pid: int) -> tuple[str, str] | None:
    if pid <= 0:
        return None
    if _LINUX:
        stat = _stat(pid)
        return (stat.state, stat.start) if stat else None
    return _ps(pid)


def identify(pid: int) -> ProcId | None:
    """Who has this pid now (a zombie included); None when nobody has."""
    found = _state(pid)
    return ProcId(pid, found[1]) if found else None


def alive(proc: ProcId) -> bool:
    """Whether exactly this process still runs. A zombie is dead: it will never do anything again."""
    found = _state(proc.pid)
    return found is not None and found[1] == proc.start and found[0] not in ("Z", "X", "x")


def this_boot(proc: ProcId) -> bool:
    """Whether it ran since the machine started; where the system does not say, True."""
    return not _LINUX or proc.start.rpartition(".")[2] == _boot()


def ended(pid: int) -> ProcId:
    """Stands for a process that was told to have run under this number, and is gone: never alive."""
    return ProcId(pid, f"ended.{_boot()}")


def capable(number: int) -> bool | None:
    """Whether this process has a capability (linux/capability.h); None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return None


def even_chance(pid: int) -> None:
    """Takes from a process what it inherits of an agent that is among the last that a machine out of memory ends."""
    score = _PROC / str(pid) / "oom_score_adj"
    with contextlib.suppress(OSError, ValueError):
        if int(score.read_text()) < 0:
            score.write_text("0")


async def wait_exit(proc: ProcId, timeout: float | None = None) -> bool:
    """Returns True once the process has ended (it need not be a child), False when ``timeout`` seconds passed first."""
    try:
        async with asyncio.timeout(timeout):
            await _wait(proc)
    except TimeoutError:
        return not alive(proc)
    return True


async def _wait(proc: ProcId) -> None:
    fd = -1
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):  # gone already, or a kernel before 5.3: the loop below finds out
            fd = os.pidfd_open(proc.pid)
    if fd < 0:
        pause = 0.01
        while alive(proc):
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _POLL_CAP)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        # opened by number: only now is it certain that the descriptor is of the process we mean
        if not alive(proc):
            return
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)
    finally:
        os.close(fd)


def wait_exit_blocking(proc: ProcId, timeout: float) -> bool:
    """:func:`wait_exit` for code without an event loop (stop commands, tests)."""
    if hasattr(os, "pidfd_open"):
        try:
            fd = os.pidfd_open(proc.pid)
        except OSError:
            return not alive(proc)
        try:
            if alive(proc):
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                poll.poll(max(0.0, timeout) * 1000)
        finally:
            os.close(fd)
        return not alive(proc)
    return asyncio.run(wait_exit(proc, timeout))


def kill_group(proc: ProcId, sig: int) -> bool:
    """Signals the process group that ``proc`` leads, or ``proc`` alone when it leads none.

    Works too when the leader is dead and its children are not. False when there is nobody to signal: the kernel gives
    no new process a pid that still names a group, so a stranger with this pid means that the group is gone.
    """
    present = identify(proc.pid)
    if present is not None and present != proc:
        return False
    try:
        os.killpg(proc.pid, sig)
        return True
    except ProcessLookupError:
        if not alive(proc):
            return False
    except PermissionError:
        # macOS answers so for a group of zombies
        if not alive(proc):
            return False
        raise
    try:
        os.kill(proc.pid, sig)
        return True
    except ProcessLookupError:
        return False


def _pids() -> Iterator[int]:
    with os.scandir(_PROC) as entries:
        for entry in entries:
            if entry.name.isdigit():
                yield int(entry.name)


def group_pids(proc: ProcId) -> list[int]:
    """Living processes of the session or group that ``proc`` leads (the leader too, if it lives)."""
    present = identify(proc.pid)
    if present is not None and present != proc:
        return []
    if not _LINUX:
        try:
            argv = ["ps", "-ax", "-o", "pid=,pgid=,stat="]
            done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            return []
        rows = [line.split() for line in done.stdout.splitlines()]
        return [int(r[0]) for r in rows if len(r) == 3 and int(r[1]) == proc.pid and not r[2].startswith("Z")]
    found = []
    for pid in _pids():
        stat = _stat(pid)
        if stat and proc.pid in (stat.session, stat.pgrp) and stat.state not in ("Z", "X"):
            found.append(pid)
    return found


def _environ(pid: int, patience: float) -> bytes:
    """The environment at exec; raises OSError.

    While a program is being executed the kernel shows none for a moment, though whoever started it was told that it
    runs: it is looked at again for ``patience`` seconds. A kernel's thread or a zombie has no program and no patience.
    """
    deadline = time.monotonic() + patience
    while True:
        with Path(f"/proc/{pid}/environ").open("rb") as f:
            environ = f.read()
        if environ or time.monotonic() >= deadline:
            return environ
        Path(f"/proc/{pid}/exe").readlink()
        time.sleep(0.0005)


def find_by_env(name: str, value: str) -> list[ProcId]:
    """Living processes whose environment at exec had ``name=value``; only those whose environment we may read."""
    if not _LINUX:
        return []
    marker = f"{name}={value}".encode()
    found = []
    for pid in _pids():
        try:
            environ = _environ(pid, 0.01)
        except OSError:
            continue
        if marker in environ.split(b"\0"):
            proc = identify(pid)
            if proc is not None and alive(proc):
                found.append(proc)
    return found


class Usage(NamedTuple):
    """``memory`` in bytes (PSS where it can be read, else RSS), ``cpu`` in seconds since the start."""

    memory: int
    cpu: float


def usage(pid: int) -> Usage | None:
    """What one process uses now; None when it is gone or the system has no /proc."""
    stat = _stat(pid) if _LINUX else None
    if stat is None:
        return None
    memory = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                memory = int(line.split()[1]) * 1024
                break
    if not memory:
        with contextlib.suppress(OSError, ValueError, IndexError):
            memory = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Usage(memory, stat.ticks / os.sysconf("SC_CLK_TCK"))


def spawn_detached(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    stdout_path: Path | str | None = None,
    *,
    stdout: int | None = None,
    stdin: int | IO[bytes] | None = None,
    user: int | None = None,
    group: int | None = None,
    extra_groups: Sequence[int] | None = None,
    umask: int = -1,
) -> tuple[ProcId, subprocess.Popen[bytes]]:
    """Starts ``argv`` in an own session that outlives us; stdout and stderr are appended to ``stdout_path``,
    or are the descriptor ``stdout``.

    It can be found by its environment when this returns. No descriptor but 0, 1 and 2 is inherited. The caller keeps
    the Popen and polls it once the process has ended, so that no zombie stays. Raises OSError when the program cannot
    be started.
    """
    out: int = subprocess.DEVNULL if stdout is None else stdout
    with contextlib.ExitStack() as stack:
        if stdout_path is not None:
            fd = os.open(stdout_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            out = fd
        popen = subprocess.Popen(
            list(argv),
            env=dict(env) if env is not None else None,
            cwd=cwd,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=out,
            stderr=out,
            start_new_session=True,
            user=user,
            group=group,
            extra_groups=list(extra_groups) if extra_groups is not None else None,
            umask=umask,
        )
    proc = identify(popen.pid)
    if proc is None:  # cannot be: an unreaped child keeps its pid, even dead; but ps may fail
        popen.kill()
        popen.wait(5)
        raise OSError(f"process {popen.pid} cannot be identified")
    if _LINUX and (env is None or env):
        with contextlib.suppress(OSError):  # it is over already, or another user's
            _environ(popen.pid, 2.0)
    return proc, popen


async def terminate(proc: ProcId, *, sig: int = signal.SIGTERM, grace: float = 10.0, kill_wait: float = 5.0) -> bool:
    """Signals the group, waits ``grace`` seconds, then SIGKILLs what is left of it. True when the leader is gone."""
    with contextlib.suppress(PermissionError):
        kill_group(proc, sig)
    await wait_exit(proc, grace)
    with contextlib.suppress(PermissionError):
        kill_group(proc, signal.SIGKILL)
    return await wait_exit(proc, kill_wait)


def ending(status: int | None) -> str:
    """How a process ended, in words; a negative status is the signal that ended it."""
    if status is None or status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
