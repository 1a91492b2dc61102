"""What a function's process may not do: set up by the process itself, just before the function's code is there.

In comes a :class:`Cage`, out goes what is enforced from now on and what is not, with the reason. Every mechanism is
optional: groups (cgroups v1 or v2; ``nursery.py`` makes them), a mount of its own for temporary files, another user,
Landlock (files, TCP, signals), seccomp (sockets, programs, the kernel's doors), rlimits. :func:`attempts` tries from
inside to break each promise; a node claims only what was tried in vain. Everything here works on the calling process
and cannot be undone. What is the same for all cages is found out beforehand (:func:`warm`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import resource
import socket
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

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


# -- the kernel's calls ------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
# found once, so that workers share what finding them takes
_syscall, _prctl_, _unshare, _mount, _capset = _libc.syscall, _libc.prctl, _libc.unshare, _libc.mount, _libc.capset
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE = 1, 8, 22, 38, 4
_PR_SET_CHILD_SUBREAPER, _PR_CAP_AMBIENT = 36, 47
_CLONE_NEWNS = 0x20000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
_CAP_DAC_READ_SEARCH = 2


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, a: int = 0) -> None:
    _checked(_prctl_(option, ctypes.c_ulong(a), 0, 0, 0), f"prctl({option})")


def dies_with_parent() -> None:
    """The kernel ends this process when the one that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def adopts_orphans() -> None:
    """Children of children that lose their parent become ours, so that somebody reaps them."""
    with contextlib.suppress(OSError):
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


# -- files, TCP and signals: Landlock ----------------------------------------------------------------------------------

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
#: Bits that a rule for something that is no directory may have.
_OF_FILES = 1 << 0 | _WRITE_FILE | _READ_FILE | _TRUNCATE | 1 << 15
_READ = _READ_FILE | _READ_DIR
_EXECUTE = 1 << 0
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


@functools.cache
def landlock_abi() -> int:
    """0: not there."""
    return max(0, int(_syscall(444, None, ctypes.c_size_t(0), 1)))


@functools.cache
def _readable(python: bool) -> list[str]:
    """What every program needs of the system, and Python's library."""
    found = ["/usr/lib", "/lib", "/lib64", "/usr/lib64", "/usr/share/zoneinfo"]
    found += ["/etc/localtime", "/etc/ssl/certs", "/usr/local/lib", "/usr/share/ca-certificates"]
    if python:
        found += [sys.base_prefix, sys.prefix, str(Path(__file__).resolve().parent.parent.parent)]
    else:
        found.append("/etc/ld.so.cache")
    return [p for p in dict.fromkeys(found) if p != "/"]


class _Rules(NamedTuple):
    """What is the same for every cage: attributes of the ruleset, and rules with open descriptors in them."""

    attr: bytes
    every: int
    rules: list[bytes]
    fds: list[int]
    promised: list[str]


def _rule_of(path: str, access: int) -> tuple[bytes, int] | None:
    """A rule for what is at ``path`` (``struct landlock_path_beneath_attr``), and its descriptor."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        access &= _OF_FILES
    return struct.pack("=Qi", access, fd), fd


@functools.cache
def _rules(network: bool, python: bool = True) -> _Rules:
    abi = landlock_abi()
    every = (1 << 13) - 1
    every |= 1 << 13 if abi >= 2 else 0
    every |= _TRUNCATE if abi >= 3 else 0
    every |= 1 << 15 if abi >= 5 else 0
    net = 0b11 if abi >= 4 and not network else 0
    scoped = 0b11 if abi >= 6 else 0
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    wanted = [(path, _READ & every) for path in _readable(python)]
    wanted += [(path, (_READ_FILE | _WRITE_FILE | 1 << 15) & every) for path in _DEVICES]
    if network:
        wanted += [(p, _READ_FILE) for p in ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf")]
    made = [rule for path, access in wanted if (rule := _rule_of(path, access)) is not None]
    promised = ["files", *(["signals"] if scoped else [])]
    return _Rules(
        struct.pack("=QQQ", every, net, scoped)[:size], every, [r for r, _ in made], [fd for _, fd in made], promised
    )


def _landlock(cage: Cage) -> list[str]:
    """Keeps from all files but those that it needs; promises of this kernel's Landlock."""
    if landlock_abi() < 1:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock")
    prepared = _rules(cage.network, not cage.runs)
    size = len(prepared.attr)
    ruleset = _checked(_syscall(444, prepared.attr, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    for rule in prepared.rules:
        _checked(_syscall(445, ruleset, 1, rule, 0), "landlock_add_rule")
    more = [*((path, _READ) for path in cage.library), *((path, _READ | _EXECUTE) for path in cage.runs)]
    for path, access in more:
        if (found := _rule_of(path, access & prepared.every)) is not None:
            _checked(_syscall(445, ruleset, 1, found[0], 0), "landlock_add_rule")
            os.close(found[1])
    if cage.tmp:
        own = _rule_of(cage.tmp, prepared.every & ~(1 << 0 | 1 << 6 | 1 << 11))  # all but execute and device nodes
        if own is None:
            raise OSError(errno.ENOENT, "its folder cannot be opened")
        _checked(_syscall(445, ruleset, 1, own[0], 0), "landlock_add_rule")
        os.close(own[1])
    _checked(_syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
    return prepared.promised


def _close_prepared() -> None:
    """Descriptors that were opened for rules are no business of a function's code."""
    if landlock_abi() >= 1:
        for network in (False, True):
            for fd in _rules(network).fds:
                os.close(fd)


# -- system calls: seccomp ---------------------------------------------------------------------------------------------

#: machine -> (AUDIT_ARCH, name -> number). Numbers of 424 and above are the same everywhere.
_ARCH: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (0xC000003E, {
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "mount": 165, "umount2": 166,
        "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "bpf": 321, "perf_event_open": 298,
        "userfaultfd": 323, "add_key": 248, "request_key": 249, "keyctl": 250, "kexec_load": 246,
        "kexec_file_load": 320, "init_module": 175, "finit_module": 313, "delete_module": 176,
        "open_by_handle_at": 304, "name_to_handle_at": 303, "swapon": 167, "swapoff": 168, "reboot": 169,
        "sethostname": 170, "setdomainname": 171, "settimeofday": 164, "clock_settime": 227, "clock_adjtime": 305,
        "adjtimex": 159, "acct": 163, "quotactl": 179, "personality": 135, "execve": 59, "execveat": 322,
        "setsid": 112, "setpgid": 109, "clone": 56, "fork": 57, "vfork": 58, "socket": 41, "mknod": 133,
        "mknodat": 259, "fanotify_init": 300, "kcmp": 312, "syslog": 103, "iopl": 172, "ioperm": 173,
        "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
        "modify_ldt": 154, "prctl": 157,
    }),
    "aarch64": (0xC00000B7, {
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "mount": 40, "umount2": 39,
        "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268, "bpf": 280, "perf_event_open": 241,
        "userfaultfd": 282, "add_key": 217, "request_key": 218, "keyctl": 219, "kexec_load": 104,
        "kexec_file_load": 294, "init_module": 105, "finit_module": 273, "delete_module": 106,
        "open_by_handle_at": 265, "name_to_handle_at": 264, "swapon": 224, "swapoff": 225, "reboot": 142,
        "sethostname": 161, "setdomainname": 162, "settimeofday": 170, "clock_settime": 112, "clock_adjtime": 266,
        "adjtimex": 171, "acct": 89, "quotactl": 60, "personality": 92, "execve": 221, "execveat": 281,
        "setsid": 157, "setpgid": 154, "clone": 220, "socket": 198, "mknodat": 33, "fanotify_init": 262,
        "kcmp": 272, "syslog": 116, "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180,
        "prctl": 167,
    }),
}  # fmt: skip
_NEWER = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "clone3": 435, "pidfd_getfd": 438,
    "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
_NAMESPACES = 0x7E020080  # CLONE_NEW*: time, mounts, cgroup, uts, ipc, user, pid, net
_CLONE_THREAD = 0x10000
_LD, _JEQ, _JSET, _JGE, _RET = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _DENY, _NOTIFY = 0x7FFF0000, 0x00050000, 0x7FC00000
#: Of a function with a list of what it may reach: calls that the node makes for it, and those that it may not make.
_ASKED, _INBOUND = ("connect", "sendto", "sendmsg", "bind"), ("listen", "accept", "accept4")
_CONNECTING: dict[str, dict[str, int]] = {
    "x86_64": {
        "connect": 42, "sendto": 44, "sendmsg": 46, "bind": 49, "listen": 50, "accept": 43, "accept4": 288,
        "sendmmsg": 307, "seccomp": 317, "socket": 41,
    },
    "aarch64": {
        "connect": 203, "sendto": 206, "sendmsg": 211, "bind": 200, "listen": 201, "accept": 202, "accept4": 242,
        "sendmmsg": 269, "seccomp": 277, "socket": 198,
    },
}  # fmt: skip
#: This machine's numbers of the calls that are asked for.
CALLS = {n: name for name, n in _CONNECTING.get(platform.machine(), {}).items() if name in _ASKED}


def program(*, network: bool, may_fork: bool, may_exec: bool = False, machine: str = "") -> bytes:
    """The filter (classic BPF, seccomp(2)): denies what is listed, allows the rest.

    ``may_exec``: for a program, which begins with an ``execve``; which files that may name is Landlock's to say.

    Raises ``OSError`` for a machine whose numbers are not known.
    """
    machine = machine or platform.machine()
    if machine not in _ARCH:
        raise OSError(errno.ENOSYS, f"the system calls of {machine} are not known")
    arch, numbers = _ARCH[machine]
    numbers = {**numbers, **_NEWER}
    code: list[tuple[int, int, int, int]] = []

    def add(op: int, k: int, yes: int = 0, no: int = 0) -> None:
        code.append((op, yes, no, k))

    def deny(error: int = errno.EPERM) -> None:
        add(_RET, _DENY | error)

    add(_LD, 4)
    add(_JEQ, arch, 1, 0)
    deny()
    add(_LD, 0)
    if machine == "x86_64":  # the x32 way to call the same
        add(_JGE, 0x40000000, 0, 1)
        deny()
    special = {*(["execve"] if may_exec else []), "clone", "clone3", "fork", "vfork", "socket", "prctl"}
    for name, number in numbers.items():
        if name not in special:
            add(_JEQ, number, 0, 1)
            deny()
    add(_JEQ, numbers["clone3"], 0, 1)  # its flags are in memory, where a filter cannot look: glibc then uses clone
    deny(errno.ENOSYS)
    for name in ("fork", "vfork"):
        if name in numbers and not may_fork:
            add(_JEQ, numbers[name], 0, 1)
            deny()
    denied = (_RET, 0, 0, _DENY | errno.EPERM)
    allowed = (_RET, 0, 0, _ALLOW)
    # prctl: it must not outlive the one that it dies with
    body = [(_LD, 0, 0, 16), (_JEQ, 0, 1, _PR_SET_PDEATHSIG), denied, allowed]
    code.append((_JEQ, 0, len(body), numbers["prctl"]))
    code += body
    # clone: no namespaces; without a bound on processes threads only
    body = [(_LD, 0, 0, 16), (_JSET, 0, 1, _NAMESPACES), denied]
    if not may_fork:
        body += [(_JSET, 1, 0, _CLONE_THREAD), denied]
    body.append(allowed)
    code.append((_JEQ, 0, len(body), numbers["clone"]))
    code += body
    body = [(_RET, 0, 0, _DENY | errno.EACCES)]
    if network:  # the internet's families; never a local socket, which may be the agent's own
        body = [(_LD, 0, 0, 16), (_JEQ, 1, 0, socket.AF_INET), (_JEQ, 0, 1, socket.AF_INET6), allowed, *body]
    code.append((_JEQ, 0, len(body), numbers["socket"]))
    code += body
    add(_RET, _ALLOW)
    return b"".join(struct.pack("=HBBI", *one) for one in code)


def asking(machine: str = "") -> bytes:
    """The filter of a function with a list of what it may reach, beside :func:`program`: what names an address is asked
    for, nobody is listened to, and a socket is TCP's or UDP's."""
    numbers = _CONNECTING[machine or platform.machine()]
    code: list[tuple[int, int, int, int]] = [(_LD, 0, 0, 0)]
    denied, notify, allowed = (_RET, 0, 0, _DENY | errno.EPERM), (_RET, 0, 0, _NOTIFY), (_RET, 0, 0, _ALLOW)

    def rule(name: str, body: list[tuple[int, int, int, int]]) -> None:
        code.append((_JEQ, 0, len(body), numbers[name]))
        code.extend(body)

    for name in ("connect", "sendmsg", "bind"):
        rule(name, [notify])
    # an address of nothing is none: both halves of the pointer
    rule("sendto", [(_LD, 0, 0, 48), (_JEQ, 0, 2, 0), (_LD, 0, 0, 52), (_JEQ, 1, 0, 0), notify, allowed])
    for name in _INBOUND:
        rule(name, [denied])
    rule("sendmmsg", [(_RET, 0, 0, _DENY | errno.ENOSYS)])  # whoever has it can do without
    kinds = [
        (_LD, 0, 0, 24),
        (0x54, 0, 0, 0xF),
        (_JEQ, 2, 0, socket.SOCK_STREAM),
        (_JEQ, 1, 0, socket.SOCK_DGRAM),
        denied,
    ]
    protocols = [
        (_LD, 0, 0, 32),
        (_JEQ, 3, 0, 0),
        (_JEQ, 2, 0, socket.IPPROTO_TCP),
        (_JEQ, 1, 0, socket.IPPROTO_UDP),
        denied,
    ]
    rule("socket", [*kinds, *protocols, allowed])
    code.append(allowed)
    return b"".join(struct.pack("=HBBI", *one) for one in code)


@functools.cache
def _program(network: bool, may_fork: bool, may_exec: bool = False) -> bytes:
    return program(network=network, may_fork=may_fork, may_exec=may_exec)


def warm() -> None:
    """Finds out beforehand what is the same for every cage: what is done here, workers share."""
    _closed_to_others()
    for network in (False, True):
        if landlock_abi() >= 1:
            _rules(network)
        for may_fork in (False, True):
            with contextlib.suppress(OSError):
                _program(network, may_fork)


def _seccomp(network: bool, may_fork: bool, may_exec: bool) -> None:
    text = _program(network, may_fork, may_exec)
    buffer = ctypes.create_string_buffer(text, len(text))
    fprog = struct.pack("@HP", len(text) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(fprog, len(fprog))
    _checked(_prctl_(_PR_SET_SECCOMP, ctypes.c_ulong(2), holder, 0, 0), "prctl(PR_SET_SECCOMP)")


def shut_in(folder: str, reads: list[str]) -> list[str]:
    """For a process of ours that opens what came from elsewhere: from here on it writes below ``folder``, reads
    Python's library and ``reads``, opens no socket and starts no program. Gives what this kernel does not hold."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    steps: dict[str, Callable[[], object]] = {
        "files": lambda: _landlock(Cage("", folder, library=reads)),
        "network, exec": lambda: _seccomp(False, False, False),
    }
    missing = []
    for name, step in steps.items():
        try:
            step()
        except OSError as e:
            missing.append(f"{name}: {e.strerror or e}")
    return missing


def _ask_for_connections() -> int:
    """From here on the node is asked; the descriptor by which it is. Raises ``OSError``."""
    if platform.machine() not in _CONNECTING:
        raise OSError(errno.ENOSYS, f"the system calls of {platform.machine()} are not known")
    text = asking()
    buffer = ctypes.create_string_buffer(text, len(text))
    holder = ctypes.create_string_buffer(struct.pack("@HP", len(text) // 8, ctypes.addressof(buffer)))
    number = _CONNECTING[platform.machine()]["seccomp"]
    new_listener = ctypes.c_ulong(1 << 3)
    return _checked(_syscall(number, 1, new_listener, holder), "seccomp(SECCOMP_FILTER_FLAG_NEW_LISTENER)")


def await_guard(listener: int) -> None:
    """Waits until the node has taken the descriptor, then gives it up: it must not be the function's.

    A call that is asked for ends when it is answered; this one means nothing else.
    """
    _libc.connect(-1, None, 0)
    os.close(listener)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A descriptor of another process as one of ours (pidfd_getfd(2)). Raises ``OSError``."""
    return int(_checked(_syscall(438, pidfd, fd, 0), "pidfd_getfd"))


# -- the rest ----------------------------------------------------------------------------------------------------------


def _own_mount(cage: Cage) -> None:
    """A file system in memory for its temporary files: bounded, unseen by others, gone with the process."""
    _checked(_unshare(_CLONE_NEWNS), "unshare")
    _checked(_mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount --make-rprivate")
    data = f"size={cage.tmp_size},mode=0700,uid={cage.user},nr_inodes=4096".encode()
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _checked(_mount(b"tmpfs", cage.tmp.encode(), b"tmpfs", flags, data), "mount tmpfs")
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
    if not path or _mount(path.encode(), at.encode(), None, ctypes.c_ulong(_MS_BIND), None):
        return path
    return at


def _become(user: int, keep_reading: bool, program: bool) -> None:
    """Another user, for good. ``keep_reading``: it may pass directories that are closed to it (Landlock says which);
    so may the ``program`` that takes its place."""
    if keep_reading:
        _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if keep_reading:
        bit = 1 << _CAP_DAC_READ_SEARCH
        header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
        kept = bit if program else 0
        data = ctypes.create_string_buffer(struct.pack("=IIIIII", bit, bit, kept, 0, 0, 0), 24)
        _checked(_capset(header, data), "capset")
        if program:
            _checked(_prctl_(_PR_CAP_AMBIENT, ctypes.c_ulong(2), ctypes.c_ulong(_CAP_DAC_READ_SEARCH), 0, 0), "prctl")


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
    abi = landlock_abi()
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
            _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    try:
        verdict.enforced += _landlock(cage)
        if not cage.tmp:
            verdict.enforced.append("tmp")
            verdict.refused.pop("tmp", None)
    except OSError as e:
        verdict.refused["files"] = e.strerror or str(e)
    may_fork, network = "pids" in verdict.enforced, cage.network
    if cage.reach:

        def ask() -> None:
            verdict.listener = _ask_for_connections()

        network = step(("network",), ask)  # where nobody can be asked, nothing is reached
    promised = (*(() if cage.runs else ("exec",)), "kernel", *(() if cage.network else ("network",)))
    held = step(promised, lambda: _seccomp(network, may_fork, bool(cage.runs)))
    if held and not may_fork and cage.pids is not None:
        verdict.refused["pids"] += "; it may start threads, but no process"
    if cage.runs and (cage.runs_more or "files" not in verdict.enforced):
        verdict.refused["exec"] = cage.runs_more or "without Landlock a program may start any other"
    elif cage.runs:
        verdict.enforced.append("exec")  # by Landlock
    if cage.network and not cage.reach:
        verdict.refused["network"] = "limits.network is open"
    _close_prepared()
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
        "kernel": lambda: _checked(_unshare(_CLONE_NEWNS), "unshare"),
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
