"""The process that every Python worker is forked from: it has imported what they need, so a new one costs a fork.

In come messages on a socket pair whose other end the dispatcher holds (``nursery.py``): a cage, an environment and one
end of the worker's own socket. Out goes who was started (with a pidfd) and who ended, and whether it was over its
memory. It never runs a function's code itself, has one thread, and dies with the dispatcher; its workers die with it.
"""

from __future__ import annotations

import asyncio as _asyncio  # noqa: F401 - workers find it here, imported and shared
import base64 as _base64  # noqa: F401
import contextlib
import datetime as _datetime  # noqa: F401
import decimal as _decimal  # noqa: F401
import email.utils as _email  # noqa: F401
import encodings.idna as _idna  # noqa: F401
import gc
import hashlib as _hashlib  # noqa: F401
import hmac as _hmac  # noqa: F401
import math as _math  # noqa: F401
import os
import random
import re as _re  # noqa: F401
import select
import shutil
import signal
import socket
import sys
import time
import traceback
import urllib.parse as _parse  # noqa: F401
import uuid as _uuid  # noqa: F401
import zlib as _zlib  # noqa: F401

import msgspec

from edgeward.core import cgroup, invocation
from edgeward.functions import sandbox, sdk

#: Bytes of one message.
MAX_MESSAGE = 160 * 1024
#: How long what a worker left behind is ended again and again.
_CLEANING = 10.0
_AGAIN = 0.01


class Spawn(msgspec.Struct):
    """To the zygote, with one descriptor: the worker's socket."""

    cage: sandbox.Cage
    env: dict[str, str]
    #: Try the promises instead of serving: the answer is one ``Jailed`` frame.
    probe: bool = False


class Started(msgspec.Struct, tag=True):
    """From the zygote, with one descriptor: the worker's pidfd."""

    instance: str
    pid: int


class Ended(msgspec.Struct, tag=True):
    instance: str
    status: int  #: exit status, or minus the signal
    out_of_memory: bool


encode = msgspec.msgpack.Encoder().encode
decode_spawn = msgspec.msgpack.Decoder(Spawn).decode
decode_told = msgspec.msgpack.Decoder(Started | Ended).decode


class Zygote:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, sandbox.Cage] = {}
        #: What ended and left something behind: instance -> (cage, until when it is tried).
        self._dirty: dict[str, tuple[sandbox.Cage, float]] = {}
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
        while True:
            ready = dict(poll.poll(_AGAIN * 1000 if self._dirty else None))
            if self._bell.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    while self._bell.recv(4096):
                        pass
                self._reap()
            for cage, until in list(self._dirty.values()):
                self._clean(cage, until)
            if self._control.fileno() in ready and not self._serve():
                break
        self._finish()

    def _finish(self) -> None:
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so it is ours
        until = time.monotonic() + _CLEANING
        while (self._children or self._dirty) and time.monotonic() < until:
            self._reap()
            for cage, limit in list(self._dirty.values()):
                self._clean(cage, limit)
            time.sleep(_AGAIN)  # the period of looking whether they are gone

    def _serve(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 1)
        if not data:
            return False
        try:
            self._spawn(decode_spawn(data), fds[0])
        finally:
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        return True

    def _spawn(self, spawn: Spawn, fd: int) -> None:
        pid = os.fork()
        if pid == 0:
            self._control.close()
            self._bell.close()
            self._ring.close()
            _child(spawn, fd)
        self._children[pid] = spawn.cage
        # nobody but us reaps it, so the number is still its own
        pidfd = os.pidfd_open(pid)
        try:
            socket.send_fds(self._control, [encode(Started(spawn.cage.instance, pid))], [pidfd])
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
            cage = self._children.pop(pid, None)
            if cage is None:
                continue  # a worker's child: it came to us when its parent ended
            full = cgroup.out_of_memory(cage.node, cage.instance) > 0
            with contextlib.suppress(OSError):  # nobody is there to hear it any more
                self._control.send(encode(Ended(cage.instance, os.waitstatus_to_exitcode(status), full)))
            self._clean(cage, time.monotonic() + _CLEANING)

    def _clean(self, cage: sandbox.Cage, until: float) -> None:
        """Ends what the worker left of processes and takes its groups and files away; else again in a moment."""
        self._dirty[cage.instance] = (cage, until)
        if cgroup.kill(cage.node, cage.instance) or time.monotonic() > until:
            cgroup.remove(cage.node, cage.instance)
            shutil.rmtree(cage.tmp, ignore_errors=True)
            del self._dirty[cage.instance]


def _child(spawn: Spawn, fd: int) -> None:
    """The worker, from the fork to its end. Never returns."""
    status = 1
    sock = socket.socket(fileno=fd)
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.setsid()
        random.seed()
        os.environ.clear()
        os.environ.update(spawn.env)
        time.tzset()
        verdict = sandbox.enter(spawn.cage)
        if spawn.probe:
            verdict = sandbox.attempts(spawn.cage, verdict)
        sock.sendall(invocation.frame(invocation.Jailed(os.getpid(), verdict.enforced, verdict.refused)))
        gc.enable()
        if not spawn.probe:
            sdk.serve(sock)
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the dispatcher has gone
    except BaseException as e:  # noqa: BLE001 - whatever it is, the fork must not run on as a second zygote
        with contextlib.suppress(OSError):
            sock.sendall(invocation.frame(invocation.Broken(f"{type(e).__name__}: {e}", traceback.format_exc())))
    finally:
        os._exit(status)


def main() -> None:
    sandbox._prctl(1, signal.SIGKILL)  # dies with the dispatcher
    with contextlib.suppress(OSError):
        sandbox._prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans of workers come here to be reaped
    control = socket.socket(fileno=int(sys.argv[1]))
    cgroup.host()
    sandbox.landlock_abi()
    msgspec.json.encode({"warm": [1, "2", None]})
    gc.collect()
    gc.disable()
    gc.freeze()
    control.send(encode(Started("", os.getpid())))
    Zygote(control).run()


if __name__ == "__main__":
    main()
