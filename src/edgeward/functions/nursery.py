"""The dispatcher's side of the zygote: where new workers come from, and where it is heard that one ended.

:meth:`Nursery.spawn` gives a :class:`Child`: its socket, its pidfd, and a future of how it ended. When the zygote
itself dies all of them are over (they die with it) and another zygote is started, later each time it happens again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from edgeward.core import cgroup
from edgeward.core.errors import Unreachable
from edgeward.functions import zygote
from edgeward.functions.sandbox import Cage
from edgeward.functions.zygote import Ended, Spawn, Started

log = logging.getLogger("edgeward.functions")

#: Workers that are being forked at once: what waits in the socket stays within its buffer.
_AT_ONCE = 8
_START = 20.0
#: Seconds that a closing zygote has to end its workers and take their things away.
_CLOSE = 10.0
_PASSED_ON = (
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "EDGEWARD_DATA",
    "EDGEWARD_PLANE",
    "LD_LIBRARY_PATH",
    "TZ",
    cgroup.DELEGATED_ENV,
)


class Child:
    """One worker process."""

    def __init__(self, cage: Cage, sock: socket.socket, ended: asyncio.Future[Ended]) -> None:
        self.cage, self.sock = cage, sock
        self.pid = 0
        self._pidfd = -1
        #: How it ended; set when it was reaped.
        self.ended = ended

    def born(self, pid: int, pidfd: int) -> None:
        self.pid, self._pidfd = pid, pidfd

    def kill(self) -> None:
        """SIGKILL to exactly this process; no other can ever be meant."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class Nursery:
    def __init__(self, log_file: Path) -> None:
        self._log_file = log_file
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._children: dict[str, Child] = {}
        self._born: dict[str, asyncio.Future[None]] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._failures, self._not_before = 0, 0.0
        self._closed = False

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        """The zygote, ready to fork; at once when it is. Raises ``Unreachable``."""
        if self._ready is None:
            now = time.monotonic()
            if now < self._not_before:
                raise Unreachable("the process that workers are forked from cannot be started; it is tried again soon")
            self._ready = asyncio.get_running_loop().create_future()
            self._launch()
        try:
            async with asyncio.timeout(_START):
                await asyncio.shield(self._ready)
        except TimeoutError:
            self._lost("it did not start in time")
            raise Unreachable(f"the process that workers are forked from did not start within {_START:g} s") from None

    def _launch(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        env = {k: os.environ[k] for k in _PASSED_ON if k in os.environ}
        env |= {"LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "MALLOC_ARENA_MAX": "1"}
        with theirs, self._log_file.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgeward.functions.zygote", str(theirs.fileno())],
                env=env,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._control = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._hear)

    def _hear(self) -> None:
        for _ in range(32):
            if self._control is None:
                return
            try:
                data, fds, _, _ = socket.recv_fds(self._control, zygote.MAX_MESSAGE, 1)
            except BlockingIOError:
                return
            except OSError as e:
                self._lost(str(e))
                return
            if not data:
                self._lost("it ended")
                return
            told = zygote.decode_told(data)
            if isinstance(told, Ended):
                self._gone(told)
            elif not told.instance:
                self._failures = 0
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(None)
            else:
                self._started(told, fds)

    def _started(self, told: Started, fds: list[int]) -> None:
        child, born = self._children.get(told.instance), self._born.pop(told.instance, None)
        if child is None or not fds:
            for fd in fds:
                os.close(fd)
            return
        child.born(told.pid, fds[0])
        if born is not None and not born.done():
            born.set_result(None)

    def _gone(self, told: Ended) -> None:
        child = self._children.pop(told.instance, None)
        if child is not None:
            child.close()
            if not child.ended.done():
                child.ended.set_result(told)

    def _lost(self, why: str) -> None:
        """The zygote is gone, and so are its workers."""
        control, self._control = self._control, None
        if control is not None:
            asyncio.get_running_loop().remove_reader(control.fileno())
            control.close()
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        ready, self._ready = self._ready, None
        if not self._closed:
            self._failures += 1
            self._not_before = time.monotonic() + min(30.0, 0.1 * 2**self._failures)
            log.warning("the zygote is gone (%s); another is started when it is needed", why)
        error = Unreachable(f"the process that workers are forked from is gone: {why}")
        for future in (ready, *self._born.values()):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # nobody need be waiting
        self._born.clear()
        for name in list(self._children):
            self._gone(Ended(name, -signal.SIGKILL, False))

    async def spawn(self, cage: Cage, env: dict[str, str], *, probe: bool = False) -> Child:
        """A new worker in its cage. Raises ``Unreachable``."""
        async with self._slots:
            await self.start()
            loop = asyncio.get_running_loop()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            ours.setblocking(False)
            child = Child(cage, ours, loop.create_future())
            self._children[cage.instance] = child
            born = self._born[cage.instance] = loop.create_future()
            try:
                with theirs:
                    if self._control is None:
                        raise OSError("it has just ended")
                    socket.send_fds(self._control, [zygote.encode(Spawn(cage, env, probe))], [theirs.fileno()])
                async with asyncio.timeout(_START):
                    await born
            except (OSError, TimeoutError) as e:
                self._children.pop(cage.instance, None)
                self._born.pop(cage.instance, None)
                ours.close()
                raise Unreachable(f"a worker cannot be forked: {e or 'no answer'}") from None
            except BaseException:
                self._born.pop(cage.instance, None)
                ours.close()  # the worker, if there is one, ends when it finds nobody there
                raise
            return child

    async def close(self) -> None:
        """Ends the zygote, and with it every worker."""
        self._closed = True
        control, process = self._control, self._process
        if control is not None and process is not None:
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_WR)
            # it takes their groups and files away, then it ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, _CLOSE)
        self._lost("closed")
