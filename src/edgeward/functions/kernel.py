"""The kernel's calls that Python has no word for, through libc: what the sandbox is made of.

They are found once, so that workers, which are forks, share what finding them takes. What is :func:`checked` raises
``OSError`` with the kernel's reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
syscall, prctl_, unshare, mount, capset = _libc.syscall, _libc.prctl, _libc.unshare, _libc.mount, _libc.capset
connect = _libc.connect
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, a: int = 0) -> None:
    checked(prctl_(option, ctypes.c_ulong(a), 0, 0, 0), f"prctl({option})")


def dies_with_parent() -> None:
    """The kernel ends this process when the one that started it ends."""
    prctl(_PR_SET_PDEATHSIG, 9)


def adopts_orphans() -> None:
    """Children of children that lose their parent become ours, so that somebody reaps them."""
    with contextlib.suppress(OSError):
        prctl(_PR_SET_CHILD_SUBREAPER, 1)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A descriptor of another process as one of ours (pidfd_getfd(2))."""
    return int(checked(syscall(438, pidfd, fd, 0), "pidfd_getfd"))
