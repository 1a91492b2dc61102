"""Holds a function to the list of what it may reach: the node makes its connections.

The worker's seccomp filter stops each ``connect``, ``bind``, ``sendmsg`` and ``sendto`` with an address and asks here
(user notification, seccomp_unotify(2)). The guard reads the address once, decides (``reach.py``), and makes
the connection itself, on a duplicate of the worker's own socket: what was checked is what is done, whatever another
thread of the worker writes into its memory meanwhile. Where a call says no address, nothing is asked and nothing costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeward.functions.kernel import pidfd_getfd
from edgeward.functions.reach import Allowed, plausible
from edgeward.functions.seccomp import CALLS

log = logging.getLogger("edgeward.functions")

#: Seconds that a worker's blocking connect may take, and that a name's addresses are remembered.
CONNECT, REMEMBER = 60.0, 30.0
#: Calls of one worker that are looked at at once; it has no more threads than ``limits.pids``, this is beside that.
AT_ONCE = 256
#: Refused addresses of one worker that are told.
TELL = 64
#: Bytes of one datagram, or of one piece of a message.
_MOST = 65536
_RECV, _SEND, _VALID = 0xC0502100, 0xC0182101, 0x40082102
_NOTIF = struct.Struct("=QIIiIQ6Q")  # id, pid, flags, {nr, arch, ip, args}
_FASTOPEN = 0x20000000
_AF_UNSPEC = struct.pack("=H", 0)
_MESSAGE = struct.Struct("=QIxxxxQQQQi")  # struct msghdr: name, its length, iov, their count, control, its length
_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Refused(OSError):
    """What the worker's call shall fail with."""


def _read(pid: int, at: int, size: int) -> bytes:
    """Memory of a worker (process_vm_readv)."""
    buffer = ctypes.create_string_buffer(size)
    local = _Iovec(ctypes.addressof(buffer), size)
    remote = _Iovec(at, size)
    got = _libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if got < 0:
        raise _Refused(errno.EFAULT, "its memory cannot be read")
    return buffer.raw[:got]


def _signed(value: int) -> int:
    """An argument that is an ``int``."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


def _address(raw: bytes) -> tuple[int, str, int]:
    """(family, host, port) of a ``sockaddr``."""
    if len(raw) < 2:
        raise _Refused(errno.EINVAL, "no address")
    (family,) = struct.unpack_from("=H", raw)
    if family == socket.AF_INET and len(raw) >= 8:
        return family, socket.inet_ntop(family, raw[4:8]), int.from_bytes(raw[2:4], "big")
    if family == socket.AF_INET6 and len(raw) >= 24:
        return family, socket.inet_ntop(family, raw[8:24]), int.from_bytes(raw[2:4], "big")
    raise _Refused(errno.EAFNOSUPPORT, "no address of the internet")


async def look_up(loop: asyncio.AbstractEventLoop, name: str) -> list[Any]:
    """What a name means to this machine."""
    return await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)


class Guard:
    """Of one worker. ``told``: called with an address that it asked for and did not get, once for each."""

    def __init__(self, reach: Allowed, pid: int, listener: int, told: Callable[[str], None]) -> None:
        """``listener``: the number of the notification's descriptor in process ``pid``. Raises ``OSError``."""
        self._reach, self._told = reach, told
        self._loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(pid)
        try:
            self._fd = pidfd_getfd(pidfd, listener)
        finally:
            os.close(pidfd)
        self._tasks: set[asyncio.Task[None]] = set()
        self._names: dict[str, tuple[float, list[str]]] = {}
        self._reading = True
        self._refused: set[str] = set()
        self._loop.add_reader(self._fd, self._ready)

    def close(self) -> None:
        """The worker's calls fail from here on."""
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        for task in self._tasks:
            task.cancel()
        os.close(self._fd)
        self._fd = -1

    def _ready(self) -> None:
        buffer = bytearray(_NOTIF.size)
        try:
            fcntl.ioctl(self._fd, _RECV, buffer)
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                self.close()  # the worker has ended
            return
        id, pid, _, number, _, _, *args = _NOTIF.unpack(buffer)
        task = self._loop.create_task(self._answer(id, pid, CALLS.get(number, ""), args))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if len(self._tasks) >= AT_ONCE:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a function's connection failed", exc_info=task.exception())
        if not self._reading and self._fd >= 0:
            self._reading = True
            self._loop.add_reader(self._fd, self._ready)

    async def _answer(self, id: int, pid: int, call: str, args: list[int]) -> None:
        value = error = 0
        try:
            value = await self._do(id, pid, call, args)
        except OSError as e:
            error = -(e.errno or errno.EPERM)
        except TimeoutError:
            error = -errno.ETIMEDOUT
        with contextlib.suppress(OSError):  # it has ended, or was interrupted, meanwhile
            if self._fd >= 0:
                fcntl.ioctl(self._fd, _SEND, struct.pack("=QqiI", id, value, error, 0))

    async def _do(self, id: int, pid: int, call: str, args: list[int]) -> int:
        """What the call does, and returns. Raises ``OSError`` with what it fails with."""
        fd = _signed(args[0])
        if fd < 0:
            raise _Refused(errno.EBADF, "no descriptor")
        if call in ("connect", "bind"):
            raw = _read(pid, args[1], min(args[2] & 0xFFFFFFFF, 128))
            with self._duplicate(id, pid, fd) as sock:
                return self._bind(sock, raw) if call == "bind" else await self._connect(sock, raw)
        if call == "sendto":
            data = _read(pid, args[1], min(args[2], _MOST)) if args[2] else b""
            raw = _read(pid, args[4], min(args[5] & 0xFFFFFFFF, 128))
            flags = _signed(args[3])
        elif call == "sendmsg":
            name, named, iov, count, _, control, _ = _MESSAGE.unpack(_read(pid, args[1], _MESSAGE.size))
            if control:
                raise _Refused(errno.EPERM, "control data")
            raw = _read(pid, name, min(named, 128)) if name and named else b""
            data = self._gather(pid, iov, count)
            flags = _signed(args[2])
        else:
            raise _Refused(errno.EPERM, "not allowed")
        with self._duplicate(id, pid, fd) as sock:
            return await self._send(sock, data, flags, raw)

    @staticmethod
    def _gather(pid: int, iov: int, count: int) -> bytes:
        if count > 1024:
            raise _Refused(errno.EMSGSIZE, "too many pieces")
        table = _read(pid, iov, 16 * count) if count else b""
        data = b""
        for base, size in struct.iter_unpack("=QQ", table):
            if size:
                data += _read(pid, base, min(size, _MOST - len(data)))
            if len(data) >= _MOST:
                break
        return data

    def _duplicate(self, id: int, pid: int, fd: int) -> socket.socket:
        """The worker's own socket. The notification is still valid afterwards, so it was that worker's."""
        with Path(f"/proc/{pid}/status").open() as f:
            leader = next(int(line.split()[1]) for line in f if line.startswith("Tgid:"))
        pidfd = os.pidfd_open(leader)
        try:
            mine = pidfd_getfd(pidfd, fd)
        finally:
            os.close(pidfd)
        try:
            fcntl.ioctl(self._fd, _VALID, struct.pack("=Q", id))
            return socket.socket(fileno=mine)
        except OSError:
            os.close(mine)
            raise

    # -- connecting ----------------------------------------------------------------------------------------------------

    async def _connect(self, sock: socket.socket, raw: bytes) -> int:
        if raw[:2] == _AF_UNSPEC and sock.type & socket.SOCK_DGRAM:
            _libc.connect(sock.fileno(), raw, len(raw))  # it lets a datagram socket's peer go
            return 0
        host, port = await self._where(sock, raw)
        fd = sock.fileno()
        if not os.get_blocking(fd):
            return self._checked(sock.connect_ex((host, port)))
        os.set_blocking(fd, False)  # the worker waits in the call: nobody sees it
        try:
            code = sock.connect_ex((host, port))
            if code != errno.EINPROGRESS:
                return self._checked(code)
            await self._writable(fd)
            return self._checked(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        finally:
            os.set_blocking(fd, True)

    @staticmethod
    def _bind(sock: socket.socket, raw: bytes) -> int:
        """Any port, as a socket has that sends without it; one of its own choice could be a server's."""
        _, host, port = _address(raw)
        if port or sock.family not in (socket.AF_INET, socket.AF_INET6):
            raise _Refused(errno.EACCES, "a port of its choice")
        sock.bind((host, 0))
        return 0

    @staticmethod
    def _checked(code: int) -> int:
        if code:
            raise _Refused(code, os.strerror(code))
        return 0

    async def _writable(self, fd: int) -> None:
        done = self._loop.create_future()
        self._loop.add_writer(fd, lambda: None if done.done() else done.set_result(None))
        try:
            async with asyncio.timeout(CONNECT):
                await done
        finally:
            self._loop.remove_writer(fd)

    async def _where(self, sock: socket.socket, raw: bytes) -> tuple[str, int]:
        """The address that the socket may go to. Raises ``OSError``."""
        family, host, port = _address(raw)
        kind = sock.type & 0xF
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or kind not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            raise _Refused(errno.EPERM, "no socket of the internet")
        target = self._reach.target("tcp" if kind == socket.SOCK_STREAM else "udp", host, port)
        if target is None:
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            if where not in self._refused and len(self._refused) < TELL:
                self._refused.add(where)
                self._told(where)
            raise _Refused(errno.EACCES, "not in limits.network")
        if not target.named:
            mapped = family == socket.AF_INET6 and ":" not in target.host
            return (f"::ffff:{target.host}" if mapped else target.host), port
        for address in await self._look_up(target.host):
            v6 = ":" in address
            if v6 == (family == socket.AF_INET6):
                return address, port
        raise _Refused(errno.ENETUNREACH, "it has no address of this family")

    async def _look_up(self, name: str) -> list[str]:
        known = self._names.get(name)
        if known is not None and self._loop.time() - known[0] < REMEMBER:
            return known[1]
        try:
            async with asyncio.timeout(10.0):
                found = await look_up(self._loop, name)
        except (OSError, TimeoutError):
            if known is not None:
                return known[1]  # its name server is away: what it was is better than nothing
            raise _Refused(errno.EHOSTUNREACH, "its name cannot be looked up") from None
        addresses = [a for a in dict.fromkeys(str(info[4][0]) for info in found) if plausible(a)]
        self._names[name] = (self._loop.time(), addresses)
        return addresses

    # -- sending -------------------------------------------------------------------------------------------------------

    async def _send(self, sock: socket.socket, data: bytes, flags: int, raw: bytes) -> int:
        if flags & _FASTOPEN:
            raise _Refused(errno.EOPNOTSUPP, "a connection is made by connect")
        if raw and sock.type & 0xF == socket.SOCK_STREAM:
            raw = b""  # a stream has its peer; the kernel takes no notice of an address either
        flags &= ~socket.MSG_NOSIGNAL
        if not raw:
            return await self._push(sock, data, flags)
        host, port = await self._where(sock, raw)
        return sock.sendto(data, flags | socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, (host, port))

    async def _push(self, sock: socket.socket, data: bytes, flags: int) -> int:
        waits = os.get_blocking(sock.fileno()) and not flags & socket.MSG_DONTWAIT
        while True:
            try:
                return sock.send(data, flags | socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not waits:
                    raise
                await self._writable(sock.fileno())
