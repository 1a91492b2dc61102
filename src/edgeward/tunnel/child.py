"""One program for one session: started by an argument list, as one user, in an environment that is made here.

In comes what to run and as whom; out go its descriptors and its process. Nothing of the agent's environment is passed
on, no descriptor but the program's own is inherited, and it never passes a shell. It leads a session of its own; when
it is over, :meth:`Child.end` leaves nothing of it: neither its process group nor what left the group, which is known by
the mark in its environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import pwd
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeward.core import proc
from edgeward.core.errors import EdgewardError, Refused
from edgeward.tunnel.tree import become

#: In the environment of everything that a session starts: which session, and of which node's agent.
MARK, MARK_ALL = "EDGEWARD_SESSION", "EDGEWARD_SESSIONS_OF"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Passed on from the agent; everything else of its environment stays with it.
_INHERIT = ("LANG", "LC_ALL", "TZ")
#: Seconds between asking a session's programs to end and ending them.
GRACE = 2.0


@dataclass(frozen=True, slots=True)
class Account:
    """Whom a session runs as. ``uid`` None: as the agent itself."""

    name: str
    home: str
    shell: str
    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()

    def options(self) -> dict[str, Any]:
        if self.uid is None:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": list(self.groups)}


def account(name: str) -> Account:
    """The user whom node.json names (``tunnel.user``), else the agent's own. Raises ``Refused``."""
    if not name:
        try:
            own = pwd.getpwuid(os.geteuid())
        except KeyError:
            return Account(str(os.geteuid()), "/", "/bin/sh")
        return Account(own.pw_name, own.pw_dir or "/", own.pw_shell or "/bin/sh")
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise Refused(
            f"node.json says that sessions run as {name!r}, and there is no such user on this node",
            field="$.tunnel.user", remedy="create the user, or correct node.json",
        ) from None  # fmt: skip
    shell = entry.pw_shell or "/bin/sh"
    if entry.pw_uid == os.geteuid():
        return Account(entry.pw_name, entry.pw_dir or "/", shell)
    if os.geteuid() != 0:
        raise Refused(
            f"node.json says that sessions run as {name!r}, and this agent does not run as root",
            field="$.tunnel.user", remedy=f"leave it out, or run the agent as root or as {name}",
        )  # fmt: skip
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return Account(entry.pw_name, entry.pw_dir or "/", shell, entry.pw_uid, entry.pw_gid, groups)


def environment(
    who: Account, session: str, given: Mapping[str, str], *, data: str = "", term: str = ""
) -> dict[str, str]:
    """A login's few variables, what the operator gave, and the marks, which nobody can take away."""
    env = {k: os.environ[k] for k in _INHERIT if k in os.environ}
    env |= {"PATH": PATH, "HOME": who.home, "USER": who.name, "LOGNAME": who.name, "SHELL": who.shell}
    if term:
        env["TERM"] = term
    env |= given
    env[MARK] = session
    if data:
        env[MARK_ALL] = env["EDGEWARD_DATA"] = data
    return env


class NotStarted(EdgewardError):
    """The program cannot be started. ``code``: 127 where there is none, else 126, as shells say it."""

    def __init__(self, program: str, error: OSError) -> None:
        missing = error.errno == errno.ENOENT
        self.code = 127 if missing else 126
        why = "there is no such program" if missing else error.strerror or str(error)
        super().__init__(f"{program[:200]!r} cannot be started: {why}")


@dataclass(slots=True)
class Child:
    """A running program. ``stdin`` is -1 once closed; with a terminal all three are its one descriptor."""

    popen: subprocess.Popen[bytes]
    process: proc.ProcId
    session: str
    stdin: int
    stdout: int
    stderr: int = -1
    tty: bool = False
    #: ``process`` only asks an engine for the program, which is known by the session's mark alone.
    apart: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)
    _swept: bool = False

    async def wait(self) -> int:
        """The exit status, negative for a signal."""
        await proc.wait_exit(self.process)
        code = self.popen.wait(5)
        self.over.set()
        return code

    def signal(self, number: int) -> None:
        """To the foreground of a terminal, else to the whole process group."""
        if self.apart and number != signal.SIGWINCH:
            for process in proc.find_by_env(MARK, self.session):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, number)
            return
        if self.tty and self.stdout >= 0:
            with contextlib.suppress(OSError):
                front = os.tcgetpgrp(self.stdout)
                if front > 0:
                    os.killpg(front, number)
                    return
        with contextlib.suppress(OSError):
            proc.kill_group(self.process, number)

    def resize(self, rows: int, columns: int) -> None:
        if self.tty and self.stdout >= 0:
            set_size(self.stdout, rows, columns)

    def close_stdin(self) -> None:
        if self.stdin >= 0 and not self.tty:
            os.close(self.stdin)
        self.stdin = -1

    async def end(self) -> None:
        """Ends what still runs of it: asked first, then made to. Nothing of the session is left behind."""
        if self._swept:
            return
        if self.apart and self.popen.returncode is None:
            self.signal(signal.SIGHUP if self.tty else signal.SIGTERM)
            await proc.wait_exit(self.process, GRACE)
        if self.popen.returncode is None:
            with contextlib.suppress(PermissionError):
                if await proc.terminate(self.process, sig=signal.SIGHUP if self.tty else signal.SIGTERM, grace=GRACE):
                    self.popen.wait(5)
        with contextlib.suppress(PermissionError):
            proc.kill_group(self.process, signal.SIGKILL)
        await asyncio.to_thread(sweep, MARK, self.session)
        self._swept = True
        self.over.set()

    def close(self) -> None:
        for fd in {self.stdin, self.stdout, self.stderr} - {-1}:
            os.close(fd)
        self.stdin = self.stdout = self.stderr = -1


def sweep(mark: str, value: str) -> int:
    """Kills every process that has the mark; gives how many. One that is born meanwhile is met by the next round."""
    killed = 0
    for _ in range(5):
        found = [p for p in proc.find_by_env(mark, value) if p.pid != os.getpid()]
        if not found:
            break
        for process in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
        for process in found:
            proc.wait_exit_blocking(process, 1.0)
    return killed


def set_size(fd: int, rows: int, columns: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def start(
    argv: Sequence[str],
    env: Mapping[str, str],
    who: Account,
    session: str,
    cwd: str,
    size: tuple[int, int] | None = None,
) -> Child:
    """``size`` (rows, columns): with a terminal. Raises :class:`NotStarted`."""
    started = _on_terminal if size is not None else _on_pipes
    try:
        with _folder(cwd, who) as there:
            child = started(argv, env, who, session, there, size or (0, 0))
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        raise NotStarted(argv[0], e if isinstance(e, OSError) else OSError(0, str(e))) from None
    proc.even_chance(child.process.pid)
    return child


def home(who: Account) -> str:
    """Where a login of the account begins: at its home, or in / where it cannot."""
    try:
        with _folder(who.home, who):
            return who.home
    except OSError:
        return "/"


@contextlib.contextmanager
def _folder(path: str, who: Account) -> Iterator[str]:
    """The folder, as a path for the program's start. It is entered with root's rights, before the program becomes its
    user: so it is found by the user's own. Raises ``OSError``."""
    if who.uid is None or who.gid is None:
        if not Path(path).is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"there is no folder {path[:200]}")
        yield path
        return
    with ThreadPoolExecutor(1) as pool:  # a thread of its own: it stays that user
        fd = pool.submit(_found_as, path, who.uid, who.gid, who.groups).result()
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _found_as(path: str, uid: int, gid: int, groups: tuple[int, ...]) -> int:
    become(uid, gid, groups)
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.stat(".", dir_fd=fd)  # it may be gone into as well
        except OSError:
            os.close(fd)
            raise
    except OSError as e:
        raise NotADirectoryError(errno.ENOTDIR, f"the folder {path[:200]}: {e.strerror or e}") from None
    return fd


def _on_pipes(
    argv: Sequence[str], env: Mapping[str, str], who: Account, session: str, cwd: str, size: tuple[int, int]
) -> Child:
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        fds = []
        for read_is_ours in (False, True, True):
            r, w = os.pipe2(os.O_CLOEXEC) if hasattr(os, "pipe2") else os.pipe()
            mine, its = (r, w) if read_is_ours else (w, r)
            ours.callback(os.close, mine)
            theirs.callback(os.close, its)
            os.set_blocking(mine, False)
            fds.append((mine, its))
        popen = subprocess.Popen(
            list(argv), env=dict(env), cwd=cwd, stdin=fds[0][1], stdout=fds[1][1], stderr=fds[2][1],
            start_new_session=True, umask=0o022, **who.options(),
        )  # fmt: skip
        ours.pop_all()
        return Child(popen, _known(popen), session, fds[0][0], fds[1][0], fds[2][0])


def _on_terminal(
    argv: Sequence[str], env: Mapping[str, str], who: Account, session: str, cwd: str, size: tuple[int, int]
) -> Child:
    master, slave = os.openpty()
    with contextlib.ExitStack() as ours:
        ours.callback(os.close, master)
        try:
            set_size(slave, *size)
            if who.uid is not None:
                os.fchown(slave, who.uid, -1)  # programs open their terminal again by name
            os.set_blocking(master, False)
            popen = subprocess.Popen(
                list(argv), env=dict(env), cwd=cwd, stdin=slave, stdout=slave, stderr=slave,
                start_new_session=True, umask=0o022, **who.options(),
                preexec_fn=_take_terminal,  # noqa: PLW1509 - one call into the kernel; nothing else gives a terminal
            )  # fmt: skip
        finally:
            os.close(slave)
        ours.pop_all()
    return Child(popen, _known(popen), session, master, master, -1, tty=True)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _known(popen: subprocess.Popen[bytes]) -> proc.ProcId:
    process = proc.identify(popen.pid)
    if process is None:  # cannot be: an unreaped child keeps its pid
        popen.kill()
        popen.wait(5)
        raise OSError(errno.ESRCH, f"process {popen.pid} cannot be identified")
    return process
