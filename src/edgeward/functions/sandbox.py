"""What a function's process may not do: set up by the process itself, just before the function's code is there.

In comes a :class:`Cage`, out goes what is enforced from now on and what is not, with the reason. Every mechanism is
optional: groups (cgroups v1 or v2; ``nursery.py`` makes them), a mount of its own for temporary files, another user,
``landlock.py`` (files, TCP, signals), ``seccomp.py`` (sockets, programs, the kernel's doors), rlimits. :func:`attempts`
tries from inside to break each promise; a node claims only what was tried in vain. Everything here works on the calling
process and cannot be undone. What is the same for all cages is found out beforehand (:func:`warm`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import resource
import socket
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgeward.functions import landlock, seccomp
from edgeward.functions.kernel import capset, checked, dies_with_parent, mount, prctl, prctl_, unshare

#: Everything that can be promised of a function, and what it means.
PROMISES = {
    "memory": "ended alone when it is over limits.memory",
    "cpu": "no more processor time than limits.cpu",
    "pids": "no more processes and threads than limits.pids",
    "tmp": "no more than limits.tmp in its folder for temporary files, which goes with the instance",
    "files": "reads its own code, its runtime's library and nothing else; writes its temporary folder and nothing else",
    "network": "opens no socket; or connects to what limits.network lists, and to nothing else",
    "exec": "starts no program, beside its own runtime where that is one",
    "user": "has a system user of its own, with no rights",
    "signals": "signals no process but its own",
    "kernel": "cannot mount, trace, load modules, make namespaces, use keys or memory that outlives it",
}


class Cage(msgspec.Struct):
    """What one instance is held to. Sizes in bytes."""

    instance: str
    tmp: str  #: its folder for temporary files; it is there. Empty: it has none, and may write nowhere
    user: int = 0  #: 0: stays who it is
    memory: int | None = None
    cpu: float | None = None
    pids: int | None = None
    tmp_size: int = 16 << 20
    open_files: int = 64
    network: bool = False
    #: Not empty: the network is open only so far (``reach.py``), and the node is asked for each connection.
    reach: list[str] = []
    #: Folders and files that it may read beside its runtime's library; it is nobody's to write to.
    library: list[str] = []
    #: Files, and folders of them, that it may run: it is a program, not a fork of the zygote. Empty: none at all.
    runs: list[str] = []
    #: Why ``exec`` cannot be promised although the kernel could; empty: it is promised.
    runs_more: str = ""
    #: Promises that this node was seen not to hold, and how.
    refuted: dict[str, str] = {}
    #: Where a program's own code lies: there it starts.
    code: str = ""
    #: What its groups hold already, what not and why, and where it enters them.
    grouped: list[str] = []
    ungrouped: dict[str, str] = {}
    doors: list[str] = []


class Verdict(msgspec.Struct):
    enforced: list[str] = []
    refused: dict[str, str] = {}
    #: Number of the descriptor by which the node is asked for connections; -1: it is not.
    listener: int = -1


_PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE, _PR_CAP_AMBIENT = 8, 38, 4, 47
_CLONE_NEWNS = 0x20000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
_CAP_DAC_READ_SEARCH = 2


def warm() -> None:
    """Finds out beforehand what is the same for every cage: what is done here, workers share."""
    _closed_to_others()
    for network in (False, True):
        if landlock.abi() >= 1:
            landlock.rules(network, True)
        for may_fork in (False, True):
            with contextlib.suppress(OSError):
                seccomp.compiled(network, may_fork, False)


def shut_in(folder: str, reads: list[str]) -> list[str]:
    """For a process of ours that opens what came from elsewhere: from here on it writes below ``folder``, reads
    Python's library and ``reads``, opens no socket and starts no program. Gives what this kernel does not hold."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    steps: dict[str, Callable[[], object]] = {
        "files": lambda: landlock.restrict(False, reads, [], folder),
        "network, exec": lambda: seccomp.restrict(False, False, False),
    }
    missing = []
    for name, step in steps.items():
        try:
            step()
        except OSError as e:
            missing.append(f"{name}: {e.strerror or e}")
    return missing


def _own_mount(cage: Cage) -> None:
    """A file system in memory for its temporary files: bounded, unseen by others, gone with the process."""
    checked(unshare(_CLONE_NEWNS), "unshare")
    checked(mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount --make-rprivate")
    data = f"size={cage.tmp_size},mode=0700,uid={cage.user},nr_inodes=4096".encode()
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    checked(mount(b"tmpfs", cage.tmp.encode(), b"tmpfs", flags, data), "mount tmpfs")
    if cage.runs:
        # the node's folder is closed to others, and access(2), which programs ask, knows no capability
        code, cage.code = cage.code, _seen_at(cage.code, "/srv")
        cage.library = [cage.code if p == code else p for p in cage.library]
        cage.runs = [cage.code if p == code else p for p in cage.runs]
        # not over what it needs: a node's folder, or Edgeward itself, may lie below /tmp
        hidden = any(f"{p}/".startswith("/tmp/") for p in (cage.code, *cage.library, *cage.runs))  # noqa: S108
        cage.tmp = _seen_at(cage.tmp, "/mnt" if hidden else "/tmp")  # noqa: S108 - its own


def _seen_at(path: str, at: str) -> str:
    """Mounts ``path`` at ``at`` too, where that is there; where it is to be looked for."""
    if not path or mount(path.encode(), at.encode(), None, ctypes.c_ulong(_MS_BIND), None):
        return path
    return at


def _become(user: int, keep_reading: bool, program: bool) -> None:
    """Another user, for good. ``keep_reading``: it may pass directories that are closed to it (Landlock says which);
    so may the ``program`` that takes its place."""
    if keep_reading:
        prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if keep_reading:
        bit = 1 << _CAP_DAC_READ_SEARCH
        header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
        kept = bit if program else 0
        data = ctypes.create_string_buffer(struct.pack("=IIIIII", bit, bit, kept, 0, 0, 0), 24)
        checked(capset(header, data), "capset")
        if program:
            checked(prctl_(_PR_CAP_AMBIENT, ctypes.c_ulong(2), ctypes.c_ulong(_CAP_DAC_READ_SEARCH), 0, 0), "prctl")


@functools.cache
def _closed_to_others() -> bool:
    """Whether another user could not read Python's library, e.g. below root's home."""
    return _closed(sys.base_prefix, sys.prefix, str(Path(__file__).resolve().parent))


def _closed(*paths: str) -> bool:
    """Whether another user could not come to one of these."""
    for path in paths:
        for parent in (Path(path), *Path(path).parents):
            with contextlib.suppress(OSError):
                if stat.S_ISDIR(mode := parent.stat().st_mode) and not mode & 0o001:
                    return True
    return False


def _closed_cage(cage: Cage) -> bool:
    """Whether there is something that the worker shall read and another user could not: a node's folder is closed."""
    return _closed(*filter(None, (cage.code, *cage.library, *cage.runs))) or (not cage.runs and _closed_to_others())


#: Memory of its own that a program may have beside what a function is allowed: its runtime's, and its threads' stacks.
_PROGRAM = 64 << 20


def _data_bytes() -> int:
    """Memory of its own that the process has now (RLIMIT_DATA counts it)."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 64 << 20


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, value) if hard == resource.RLIM_INFINITY or value <= hard else (hard, hard))


def enter(cage: Cage, outside: str) -> Verdict:
    """Puts the calling process into its cage, step by step; a step that fails is told and the next one is taken.
    ``cage.tmp`` and ``cage.code`` are afterwards where the process finds them.

    ``outside``: why it is not in its groups (:func:`join`); empty: it is.
    """
    verdict = Verdict([] if outside else list(cage.grouped), dict(cage.ungrouped))
    if outside:
        verdict.refused.update(dict.fromkeys(cage.grouped, outside))
    root = os.geteuid() == 0

    def step(promises: tuple[str, ...], work: Callable[[], object]) -> bool:
        try:
            work()
        except OSError as e:
            verdict.refused.update(dict.fromkeys(promises, e.strerror or str(e)))
            return False
        verdict.enforced += promises
        return True

    if not cage.tmp:
        verdict.refused["tmp"] = "it has no such folder, but it is not kept from others"  # until Landlock is there
    elif root:
        step(("tmp",), lambda: _own_mount(cage))
    else:
        verdict.refused["tmp"] = "the agent does not run as root"
    os.chdir(cage.code or cage.tmp or "/")
    for what, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, cage.open_files),
        (resource.RLIMIT_FSIZE, cage.tmp_size),
    ):
        with contextlib.suppress(OSError, ValueError):
            _limit(what, value)
    if "memory" not in verdict.enforced and cage.memory is not None:
        allowed = (_PROGRAM if cage.runs else _data_bytes()) + cage.memory
        if step(("memory",), lambda: _limit(resource.RLIMIT_DATA, allowed)):
            verdict.refused.pop("memory", None)
    abi = landlock.abi()
    if not root or not cage.user:
        verdict.refused["user"] = "the agent does not run as root" if not root else "no user was given"
    elif (closed := _closed_cage(cage)) and abi < 1:
        verdict.refused["user"] = "another user could not read its runtime's library, or the function's code, here"
    else:
        if cage.tmp:
            with contextlib.suppress(OSError):
                os.chown(cage.tmp, cage.user, cage.user)
        # its folder may lie below one that is the agent's alone
        keep = closed or (abi >= 1 and bool(cage.tmp) and _closed(str(Path(cage.tmp).parent)))
        step(("user",), lambda: _become(cage.user, keep, bool(cage.runs)))
    dies_with_parent()  # after the change of user, which would undo it
    if root or not cage.reach:  # without root the node could then not take the worker's sockets
        with contextlib.suppress(OSError):
            prctl(_PR_SET_DUMPABLE, 0)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    try:
        verdict.enforced += landlock.restrict(cage.network, cage.library, cage.runs, cage.tmp)
        if not cage.tmp:
            verdict.enforced.append("tmp")
            verdict.refused.pop("tmp", None)
    except OSError as e:
        verdict.refused["files"] = e.strerror or str(e)
    may_fork, network = "pids" in verdict.enforced, cage.network
    if cage.reach:

        def ask() -> None:
            verdict.listener = seccomp.ask_for_connections()

        network = step(("network",), ask)  # where nobody can be asked, nothing is reached
    promised = (*(() if cage.runs else ("exec",)), "kernel", *(() if cage.network else ("network",)))
    held = step(promised, lambda: seccomp.restrict(network, may_fork, bool(cage.runs)))
    if held and not may_fork and cage.pids is not None:
        verdict.refused["pids"] += "; it may start threads, but no process"
    if cage.runs and (cage.runs_more or "files" not in verdict.enforced):
        verdict.refused["exec"] = cage.runs_more or "without Landlock a program may start any other"
    elif cage.runs:
        verdict.enforced.append("exec")  # by Landlock
    if cage.network and not cage.reach:
        verdict.refused["network"] = "limits.network is open"
    landlock.close_prepared()
    if "signals" not in verdict.enforced:
        verdict.refused["signals"] = f"Landlock of this kernel has version {abi}, it takes 6"
    for name in set(verdict.enforced) & set(cage.refuted):
        verdict.enforced.remove(name)
        verdict.refused[name] = cage.refuted[name]
    return verdict


def join(doors: list[str]) -> str:
    """Enters the groups behind these files; why not, or nothing. The kernel may take some 5 ms for each."""
    me = str(os.getpid()).encode()
    try:
        for door in doors:
            fd = os.open(door, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, me)
            finally:
                os.close(fd)
    except OSError as e:
        return f"it cannot be moved into its group: {e.strerror}"
    return ""


# -- is it true? -------------------------------------------------------------------------------------------------------


def attempts(cage: Cage, verdict: Verdict) -> Verdict:
    """The verdict with every promise taken back that could be broken from inside; ends what it starts."""
    tries: dict[str, Callable[[], object]] = {
        "files": lambda: list(Path("/etc").iterdir()),
        "network": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
        "exec": lambda: os.execv("/bin/true", ["true"]),  # noqa: S606
        "user": lambda: os.setresuid(0, 0, 0),
        "signals": lambda: os.kill(os.getppid(), 0),
        "kernel": lambda: checked(unshare(_CLONE_NEWNS), "unshare"),
        "tmp": lambda: _fill(Path(cage.tmp) / "probe", cage.tmp_size + (1 << 20)),
    }
    for name, attempt in tries.items():
        if name not in verdict.enforced:
            continue
        try:
            attempt()
        except OSError:
            continue
        verdict.enforced.remove(name)
        verdict.refused[name] = "tried, and it was not held"
    return verdict


def _fill(path: Path, size: int) -> None:
    piece = bytes(1 << 20)
    try:
        with contextlib.ExitStack() as stack:
            # two files: the bound must be on the folder, not on each file
            files = [stack.enter_context(path.with_suffix(f".{n}").open("wb", buffering=0)) for n in range(2)]
            for n in range(size // len(piece) + 1):
                if files[n % 2].write(piece) < len(piece):
                    raise OSError(errno.ENOSPC, "full")
    finally:
        for n in range(2):
            path.with_suffix(f".{n}").unlink(missing_ok=True)
