"""Landlock (Linux 5.13 and later): which files a process may touch, whether it opens TCP, whom it may signal.

:func:`restrict` works on the calling process and cannot be undone. Rules that are the same for every cage are made once
(:func:`rules`), before the zygote forks.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgeward.functions.kernel import checked, syscall

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
#: Bits that a rule for something that is no directory may have.
_OF_FILES = 1 << 0 | _WRITE_FILE | _READ_FILE | _TRUNCATE | 1 << 15
_READ = _READ_FILE | _READ_DIR
_EXECUTE = 1 << 0
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


@functools.cache
def abi() -> int:
    """0: not there."""
    return max(0, int(syscall(444, None, ctypes.c_size_t(0), 1)))


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


#: Descriptors in rules that were made.
_opened: list[int] = []


@functools.cache
def rules(network: bool, python: bool) -> _Rules:
    version = abi()
    every = (1 << 13) - 1
    every |= 1 << 13 if version >= 2 else 0
    every |= _TRUNCATE if version >= 3 else 0
    every |= 1 << 15 if version >= 5 else 0
    net = 0b11 if version >= 4 and not network else 0
    scoped = 0b11 if version >= 6 else 0
    size = 8 if version < 4 else 16 if version < 6 else 24
    wanted = [(path, _READ & every) for path in _readable(python)]
    wanted += [(path, (_READ_FILE | _WRITE_FILE | 1 << 15) & every) for path in _DEVICES]
    if network:
        wanted += [(p, _READ_FILE) for p in ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf")]
    made = [rule for path, access in wanted if (rule := _rule_of(path, access)) is not None]
    _opened.extend(fd for _, fd in made)
    promised = ["files", *(["signals"] if scoped else [])]
    return _Rules(struct.pack("=QQQ", every, net, scoped)[:size], every, [r for r, _ in made], promised)


def restrict(network: bool, library: Sequence[str], runs: Sequence[str], tmp: str) -> list[str]:
    """Keeps from all files but those that are needed; promises of this kernel's Landlock. Raises ``OSError``.

    ``library`` may be read, ``runs`` executed too (where there are some it is a program, else Python), ``tmp`` is its
    own where it has one.
    """
    if abi() < 1:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock")
    prepared = rules(network, not runs)
    size = len(prepared.attr)
    ruleset = checked(syscall(444, prepared.attr, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    for rule in prepared.rules:
        checked(syscall(445, ruleset, 1, rule, 0), "landlock_add_rule")
    more = [*((path, _READ) for path in library), *((path, _READ | _EXECUTE) for path in runs)]
    for path, access in more:
        if (found := _rule_of(path, access & prepared.every)) is not None:
            checked(syscall(445, ruleset, 1, found[0], 0), "landlock_add_rule")
            os.close(found[1])
    if tmp:
        own = _rule_of(tmp, prepared.every & ~(1 << 0 | 1 << 6 | 1 << 11))  # all but execute and device nodes
        if own is None:
            raise OSError(errno.ENOENT, "its folder cannot be opened")
        checked(syscall(445, ruleset, 1, own[0], 0), "landlock_add_rule")
        os.close(own[1])
    checked(syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
    return prepared.promised


def close_prepared() -> None:
    """Descriptors that were opened for rules are no business of a function's code."""
    for fd in _opened:
        os.close(fd)
