"""Files below a folder, opened so that nothing leads out of it, and read so that the loop does not wait for a disk.

The kernel resolves a name beneath the folder (openat2(2), RESOLVE_BENEATH) or refuses; where it cannot, each part of
the name is opened by itself and no symbolic link is followed. What the kernel has in its memory is opened and read at
once; only what it would have to fetch (RESOLVE_CACHED, RWF_NOWAIT) goes to a thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import struct
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

#: Bytes that are read and written at a time.
PIECE = 256 * 1024
_OPENAT2 = 437  # the same on all machines
_BENEATH, _NO_MAGIC, _CACHED = 0x08, 0x02, 0x20
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
T = TypeVar("T")


class NotCached(Exception):
    """It would have to be fetched from a disk: ask again in a thread."""


def _openat2(folder: int, name: bytes, resolve: int) -> int:
    """A descriptor, or the error's number, negative."""
    if _libc is None:
        return -errno.ENOSYS
    how = struct.pack("QQQ", _FLAGS, 0, resolve)
    fd: int = _libc.syscall(_OPENAT2, folder, name, how, len(how))
    return fd if fd >= 0 else -ctypes.get_errno()


def _walk(folder: int, name: str) -> int:
    """As openat2 does, but without any symbolic link."""
    at = os.dup(folder)
    try:
        *parents, last = name.split("/")
        for part in parents:
            deeper = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = deeper
        return os.open(last, _FLAGS | os.O_NOFOLLOW, dir_fd=at)
    finally:
        os.close(at)


def open_beneath(folder: int, name: str, *, cached: bool = False) -> int:
    """A descriptor of what ``name`` is below the folder. ``cached``: only where no disk is needed.

    Raises ``OSError`` (whatever leads out is ``FileNotFoundError``), ``NotCached``, ``ValueError``.
    """
    raw = os.fsencode(name or ".")
    if b"\0" in raw:
        raise ValueError("a name with a zero byte")
    fd = _openat2(folder, raw, _BENEATH | _NO_MAGIC | (_CACHED if cached else 0))
    while fd == -errno.EAGAIN and not cached:  # something was renamed meanwhile
        fd = _openat2(folder, raw, _BENEATH | _NO_MAGIC)
    if fd >= 0:
        return fd
    if fd == -errno.EAGAIN or (cached and fd in (-errno.EINVAL, -errno.ENOSYS, -errno.EPERM)):
        raise NotCached
    if fd in (-errno.ENOSYS, -errno.EPERM):
        parts = [p for p in name.split("/") if p]
        if ".." in parts:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return _walk(folder, "/".join(parts) or ".")
    if fd in (-errno.EXDEV, -errno.ELOOP):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    raise OSError(-fd, os.strerror(-fd))


def read_cached(fd: int, size: int, at: int) -> bytes | None:
    """The bytes where the kernel has them in memory; None: a disk would be needed. Raises ``OSError``."""
    buffer = bytearray(size)
    try:
        got = os.preadv(fd, [buffer], at, os.RWF_NOWAIT)
    except BlockingIOError:
        return None
    except OSError as e:
        if e.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return None
        raise
    return bytes(buffer) if got == size else bytes(memoryview(buffer)[:got])


class Reader:
    """Threads for what waits for a disk; they are started when there is something."""

    def __init__(self, threads: int = 4) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._threads = threads

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "gateway-files")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    async def pieces(self, fd: int, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from ``start`` to ``end``. Raises ``OSError``, also when the file is shorter now."""
        at = start
        while at < end:
            wanted = min(PIECE, end - at)
            got = read_cached(fd, wanted, at)
            if got is None:
                got = await self.run(os.pread, fd, wanted, at)
            if not got:
                raise OSError(errno.EIO, "the file became shorter")
            at += len(got)
            yield got

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
