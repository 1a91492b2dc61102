"""The process that every Python worker is forked from: it has imported what they need, so a new one costs a fork.

In come messages on a socket pair whose other end the dispatcher holds (``nursery.py``): a number, what the worker needs
to know, and one end of the worker's own socket. Out goes who was started (with a pidfd) and who ended. It never runs a
function's code itself, has one thread, and dies with the dispatcher; its workers die with it. Between two forks it does
as little as it can: a page that it writes to is a page that a worker no longer shares.
"""

from __future__ import annotations

import asyncio as _asyncio  # noqa: F401 - workers find it here, imported and shared
import base64 as _base64  # noqa: F401
import contextlib
import datetime as _datetime  # noqa: F401
import decimal as _decimal  # noqa: F401
import email.utils as _email  # noqa: F401
import encodings.idna as _idna  # noqa: F401
import errno
import gc
import hashlib as _hashlib  # noqa: F401
import hmac as _hmac  # noqa: F401
import math as _math  # noqa: F401
import os
import random as _random  # noqa: F401 - it is seeded anew after a fork
import re as _re  # noqa: F401
import select
import signal
import socket
import struct
import sys
import traceback
import urllib.parse as _parse  # noqa: F401
import uuid as _uuid  # noqa: F401
import zlib as _zlib  # noqa: F401
from collections.abc import Callable

import msgspec

from edgeward.core import invocation
from edgeward.functions import kernel, sandbox, sdk, seccomp, stdio
from edgeward.functions.shelves import PACKAGES

#: Bytes of one message.
MAX_MESSAGE = 160 * 1024
#: Before each message: the worker's number.
NUMBER = struct.Struct("=Q")
#: From the zygote: number, pid, and how it ended (``STARTED``, with its pidfd: it has not); without a pid the errno
#: for which it could not be forked.
TOLD = struct.Struct("=Qii")
STARTED = -(1 << 31)


class Program(msgspec.Struct):
    """What takes the worker's place once the cage is closed."""

    argv: list[str]  #: the first: an absolute path
    #: One process per call, by standard input and output (``stdio.py``), instead of one that speaks the protocol.
    per_call: bool = False


class Spawn(msgspec.Struct):
    """To the zygote behind the number, with the worker's socket, and for a program where its output goes. Read by the
    worker itself."""

    cage: sandbox.Cage
    env: dict[str, str]
    #: Try the promises instead of serving: the answer is one ``Jailed`` frame.
    probe: bool = False
    #: Only enter the groups, then wait for another ``Spawn`` as a frame on the worker's socket: a start that is ready.
    spare: bool = False
    program: Program | None = None


encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Spawn).decode


class Zygote:
    def __init__(self, control: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        self._control, self._work = control, serve
        self._children: dict[int, int] = {}
        self._bell, self._ring = socket.socketpair()
        for end in (self._bell, self._ring):
            end.setblocking(False)

    def run(self) -> None:
        """Until the dispatcher's end closes."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._ring.fileno(), warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._bell, select.POLLIN)
        control, bell = self._control.fileno(), self._bell.fileno()
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if bell in ready:
                with contextlib.suppress(BlockingIOError):
                    while self._bell.recv(4096):
                        pass
                self._reap()
            if control in ready and not self._serve():
                break
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so it is ours

    def _serve(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 2)
        if not data:
            return False
        (number,) = NUMBER.unpack_from(data)
        try:
            self._fork(number, data, fds)
        except OSError as e:  # no memory, no process, no descriptor: this one is not born, the others live on
            self._control.send(TOLD.pack(number, 0, e.errno or errno.EAGAIN))
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _fork(self, number: int, data: bytes, fds: list[int]) -> None:
        if not fds:
            raise OSError(errno.EMFILE, "its socket did not arrive")
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            _child(data, fds, (self._control, self._bell, self._ring), me, self._work)
        try:
            # nobody but us reaps it, so the number is still its own
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            raise
        self._children[pid] = number
        try:
            socket.send_fds(self._control, [TOLD.pack(number, pid, STARTED)], [pidfd])
        finally:
            os.close(pidfd)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            number = self._children.pop(pid, None)
            if number is not None:  # else a worker's child: it came to us when its parent ended
                self._control.send(TOLD.pack(number, pid, os.waitstatus_to_exitcode(status)))


def _frame(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One frame, and the descriptors that came with it; raises ``ConnectionResetError`` when the other end closes."""
    came: list[int] = []

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece, fds, _, _ = socket.recv_fds(sock, size - len(data), 1)
            came.extend(fds)
            if not piece:
                raise ConnectionResetError
            data += piece
        return data

    return exactly(int.from_bytes(exactly(4), "big")), came


def _tied_to(parent: int) -> None:
    """Ends with its parent, and now if it has ended: nobody else could end it."""
    kernel.dies_with_parent()
    if os.getppid() != parent:
        os._exit(0)


def _find_in(library: list[str]) -> None:
    """Modules of the function's code come first; its packages come where packages do: behind Python's own library, and
    before what Edgeward brings."""
    for folder in library:
        if folder.rsplit("/", 2)[-2] != PACKAGES:
            sys.path.insert(0, folder)
        else:
            at = next((n for n, path in enumerate(sys.path) if path.endswith("-packages")), len(sys.path))
            sys.path.insert(at, folder)


def _child(
    data: bytes,
    fds: list[int],
    others: tuple[socket.socket, ...],
    parent: int,
    serve: Callable[[socket.socket], None],
) -> None:
    """The worker, from the fork to its end. Never returns."""
    status = 1
    sock = socket.socket(fileno=fds.pop(0))
    try:
        _tied_to(parent)  # a spare waits before it is in its cage
        for other in others:
            other.close()
        spawn = _decode(memoryview(data)[NUMBER.size :])
        signal.set_wakeup_fd(-1)
        os.dup2(0, 1)  # /dev/null: the zygote's log is not theirs to fill
        os.dup2(0, 2)
        os.setsid()
        outside = sandbox.join(spawn.cage.doors)
        if spawn.spare:
            text, fds = _frame(sock)
            spawn = _decode(text)
        for fd in fds:  # a program's output
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            os.close(fd)
        os.environ.update(spawn.env)
        verdict = sandbox.enter(spawn.cage, outside)
        if os.getppid() != parent:
            os._exit(0)  # it ended while the change of user had untied us
        if spawn.program is not None:
            os.environ["HOME"] = os.environ["TMPDIR"] = spawn.cage.tmp
        else:
            _find_in(spawn.cage.library)  # what is loaded from there is loaded inside the cage
        if spawn.probe:
            verdict = sandbox.attempts(spawn.cage, verdict)
        sock.sendall(
            invocation.frame(invocation.Jailed(os.getpid(), verdict.enforced, verdict.refused, verdict.listener))
        )
        if verdict.listener >= 0:
            seccomp.await_guard(verdict.listener)
        gc.enable()
        if spawn.program is not None and not spawn.probe:
            if spawn.program.per_call:
                kernel.adopts_orphans()
            stdio.run(sock, spawn.program.argv, spawn.program.per_call, "pids" in verdict.enforced)
        elif not spawn.probe:
            serve(sock)
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the dispatcher has gone
    except BaseException as e:  # noqa: BLE001 - whatever it is, the fork must not run on as a second zygote
        with contextlib.suppress(OSError):
            sock.sendall(invocation.frame(invocation.Broken(f"{type(e).__name__}: {e}", traceback.format_exc())))
    finally:
        os._exit(status)


def main(serve: Callable[[socket.socket], None] = sdk.serve) -> None:
    """``serve``: what a worker does with its socket once it is in its cage."""
    kernel.dies_with_parent()
    kernel.adopts_orphans()
    control = socket.socket(fileno=int(sys.argv[1]))
    sandbox.warm()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers have it from here
    os.environ.clear()  # a worker has its own, and nothing of ours
    os.environ["LANG"] = "C.UTF-8"
    msgspec.json.encode({"warm": [1, "2", None]})
    gc.collect()
    gc.disable()
    gc.freeze()
    control.send(TOLD.pack(0, os.getpid(), STARTED))
    Zygote(control, serve).run()


if __name__ == "__main__":
    main()
