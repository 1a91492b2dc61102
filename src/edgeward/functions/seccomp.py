"""seccomp: which system calls a process may make, as a filter in classic BPF; a list of what is denied.

:func:`program` makes the filter, for x86-64 and arm64, and is tested with an interpreter; :func:`restrict` lays it upon
the calling process, for good. :func:`asking` is a second one, of functions with a list of what they may reach: there
the node is asked (``guard.py``).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import socket
import struct

from edgeward.functions.kernel import checked, connect, prctl_, syscall

_PR_SET_SECCOMP, _PR_SET_PDEATHSIG = 22, 1

#: machine -> (AUDITARCH, name -> number). Numbers of 424 and above are the same everywhere.
ARCH: dict[str, tuple[int, dict[str, int]]] = {
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
CONNECTING: dict[str, dict[str, int]] = {
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
CALLS = {n: name for name, n in CONNECTING.get(platform.machine(), {}).items() if name in _ASKED}


def program(*, network: bool, may_fork: bool, may_exec: bool = False, machine: str = "") -> bytes:
    """The filter (classic BPF, seccomp(2)): denies what is listed, allows the rest.

    ``may_exec``: for a program, which begins with an ``execve``; which files that may name is Landlock's to say.

    Raises ``OSError`` for a machine whose numbers are not known.
    """
    machine = machine or platform.machine()
    if machine not in ARCH:
        raise OSError(errno.ENOSYS, f"the system calls of {machine} are not known")
    arch, numbers = ARCH[machine]
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
    numbers = CONNECTING[machine or platform.machine()]
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
def compiled(network: bool, may_fork: bool, may_exec: bool) -> bytes:
    return program(network=network, may_fork=may_fork, may_exec=may_exec)


def restrict(network: bool, may_fork: bool, may_exec: bool) -> None:
    text = compiled(network, may_fork, may_exec)
    buffer = ctypes.create_string_buffer(text, len(text))
    fprog = struct.pack("@HP", len(text) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(fprog, len(fprog))
    checked(prctl_(_PR_SET_SECCOMP, ctypes.c_ulong(2), holder, 0, 0), "prctl(PR_SET_SECCOMP)")


def ask_for_connections() -> int:
    """From here on the node is asked; the descriptor by which it is. Raises ``OSError``."""
    if platform.machine() not in CONNECTING:
        raise OSError(errno.ENOSYS, f"the system calls of {platform.machine()} are not known")
    text = asking()
    buffer = ctypes.create_string_buffer(text, len(text))
    holder = ctypes.create_string_buffer(struct.pack("@HP", len(text) // 8, ctypes.addressof(buffer)))
    number = CONNECTING[platform.machine()]["seccomp"]
    new_listener = ctypes.c_ulong(1 << 3)
    return checked(syscall(number, 1, new_listener, holder), "seccomp(SECCOMP_FILTER_FLAG_NEW_LISTENER)")


def await_guard(listener: int) -> None:
    """Waits until the node has taken the descriptor, then gives it up: it must not be the function's.

    A call that is asked for ends when it is answered; this one means nothing else.
    """
    connect(-1, None, 0)
    os.close(listener)
