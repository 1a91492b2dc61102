"""The dispatcher's side of the zygote: where new workers come from, and where it is heard that one ended.

:meth:`Nursery.spawn` makes a worker's groups and its folder and gives a :class:`Child`: its socket, its pidfd, and a
future of how it ended; afterwards groups and folder are taken away again. When the zygote itself dies all workers are
over (they die with it) and another zygote is started, later each time it happens again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NamedTuple

from edgeward.core import cgroup
from edgeward.core import invocation as wire
from edgeward.core.backoff import backoff
from edgeward.core.errors import Unreachable
from edgeward.functions import zygote
from edgeward.functions.sandbox import Cage, Verdict

log = logging.getLogger("edgeward.functions")

#: Workers that are being forked at once: what waits in the socket stays within its buffer.
_AT_ONCE = 8
_START = 20.0
#: Seconds that a probe takes at most.
_PROBE = 10.0
#: Seconds that a closing zygote has to end its workers.
_CLOSE = 10.0
#: How often, and after how many seconds again, what a worker left behind is ended.
_TRIES, _AGAIN = 200, 0.02
#: What a spare's groups allow until it is known what it becomes.
_NO_MEMORY, _NO_PIDS = 1 << 40, 4096
_PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "EDGEWARD_DATA", "EDGEWARD_PLANE", "LD_LIBRARY_PATH", "TZ")


class Ended(NamedTuple):
    status: int  #: exit status, or minus the signal
    out_of_memory: bool


class Child:
    """One worker process."""

    def __init__(self, cage: Cage, sock: socket.socket, ended: asyncio.Future[Ended]) -> None:
        self.cage, self.sock = cage, sock
        self.pid = 0
        #: Where what a program writes to its standard output and error can be read; None: it is none.
        self.output: IO[bytes] | None = None
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


def code_of(cage: Cage) -> str:
    """Where a program's files are put that go with the instance."""
    return f"{cage.tmp}.code"


def _write(folder: Path, code: Mapping[str, str]) -> None:
    """For all to read; a script (its first line says by what it is run) is for all to run."""
    folder.mkdir()
    for name, text in code.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        path.chmod(0o755)


class Nursery:
    def __init__(self, log_file: Path, node: str, prefix: str, zygote: str = "edgeward.functions.zygote") -> None:
        """``prefix``: of the names of its groups. ``zygote``: the module that is run."""
        self._module = zygote
        self._log_file, self._node, self._prefix = log_file, node, prefix
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._last = 0
        self._children: dict[int, Child] = {}
        self._born: dict[int, asyncio.Future[None]] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._cleaning: set[asyncio.Task[None]] = set()
        self._failures, self._not_before = 0, 0.0
        self._closed = False
        self._spare: Child | None = None
        self._sparing: asyncio.Task[None] | None = None

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
            try:
                self._launch()
            except OSError as e:  # no memory, no descriptor, a disk that is full
                self._lost(str(e))
                raise Unreachable(f"the process that workers are forked from cannot be started: {e}") from None
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
                [sys.executable, "-m", self._module, str(theirs.fileno())],
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
            number, pid, status = zygote.TOLD.unpack(data)
            if status != zygote.STARTED:
                self._gone(number, status)
            elif not number:
                self._failures = 0
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(None)
            else:
                self._started(number, pid, fds)

    def _started(self, number: int, pid: int, fds: list[int]) -> None:
        child, born = self._children.get(number), self._born.pop(number, None)
        if child is None or not fds:
            for fd in fds:
                os.close(fd)
            return
        child.born(pid, fds[0])
        if born is not None and not born.done():
            born.set_result(None)

    def _gone(self, number: int, status: int) -> None:
        child, born = self._children.pop(number, None), self._born.pop(number, None)
        if born is not None and not born.done():
            born.set_exception(Unreachable(f"a worker cannot be forked: {os.strerror(status)}"))
            born.exception()  # its caller may have gone
        if child is None:
            return
        child.close()
        full = cgroup.out_of_memory(self._node, child.cage.instance) > 0
        if not child.ended.done():
            child.ended.set_result(Ended(status, full))
        self._clean_up(child.cage)

    def _clean_up(self, cage: Cage) -> None:
        task = asyncio.ensure_future(self._clean(cage))
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)

    async def _clean(self, cage: Cage) -> None:
        """Ends what a worker left of processes, and takes its groups and files away."""
        for _ in range(_TRIES):
            if await asyncio.to_thread(cgroup.kill, self._node, cage.instance):
                break
            await asyncio.sleep(_AGAIN)  # the period of looking whether they are gone
        await asyncio.to_thread(cgroup.remove, self._node, cage.instance)
        for folder in (cage.tmp, cage.code if cage.code == code_of(cage) else ""):
            if folder:
                await asyncio.to_thread(shutil.rmtree, folder, True)

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
        self._spare = None
        if not self._closed:
            self._failures += 1
            self._not_before = time.monotonic() + backoff(self._failures, 0.2, 30.0)
            log.warning("the zygote is gone (%s); another is started when it is needed", why)
        error = Unreachable(f"the process that workers are forked from is gone: {why}")
        for future in (ready, *self._born.values()):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # nobody need be waiting
        self._born.clear()
        for number in list(self._children):
            self._gone(number, -signal.SIGKILL)

    async def spawn(
        self,
        cage: Cage,
        env: dict[str, str],
        *,
        probe: bool = False,
        program: zygote.Program | None = None,
        code: Mapping[str, str] | None = None,
    ) -> Child:
        """A new worker in its cage; ``cage.instance`` may be another one afterwards. Raises ``Unreachable``.

        ``program``: what takes its place; ``code``: files to put into its ``cage.code`` first.
        """
        spawn = zygote.Spawn(cage, env, probe, program=program)
        try:
            if program is None:
                return await self._spawn(spawn, {}, -1)
            read, write = os.pipe2(os.O_CLOEXEC)
            output = os.fdopen(read, "rb", 0)
            try:
                child = await self._spawn(spawn, code or {}, write)
            except BaseException:
                output.close()
                raise
            finally:
                os.close(write)
            child.output = output
            return child
        except OSError as e:  # no room for its folder or its groups: whoever wants a worker tries again later
            raise Unreachable(f"a worker cannot be made: {e}") from None

    async def _spawn(self, spawn: zygote.Spawn, code: Mapping[str, str], output: int) -> Child:
        cage = spawn.cage
        async with self._slots:
            await self.start()
            spare, self._spare = self._spare, None
            if spare is None or spare.ended.done() or cage.cpu is not None or spawn.probe:
                self._spare = spare
                await asyncio.to_thread(self._prepare, cage, code)
                child = await self._fork(spawn, output)
            else:
                child = await self._dress(spare, spawn, code, output)
        if self._spare is None and self._sparing is None and not spawn.probe and not self._closed:
            self._sparing = asyncio.ensure_future(self._make_spare())
            self._cleaning.add(self._sparing)
            self._sparing.add_done_callback(self._cleaning.discard)
        return child

    async def _make_spare(self) -> None:
        """A worker that has entered its groups already: with cgroups v1 that is most of what a start takes."""
        try:
            cage = Cage(f"{self._prefix}{os.getpid():x}-spare-{self._last}", "", memory=_NO_MEMORY, pids=_NO_PIDS)
            await asyncio.to_thread(self._prepare, cage, {})
            self._spare = await self._fork(zygote.Spawn(cage, {}, spare=True), -1)
        except (Unreachable, OSError) as e:
            log.info("no spare worker: %s", e)
        finally:
            self._sparing = None

    async def _dress(self, spare: Child, spawn: zygote.Spawn, code: Mapping[str, str], output: int) -> Child:
        """Makes a spare the worker that is wanted: its groups get their limits, then it is told the rest."""
        cage = spawn.cage
        cage.instance = spare.cage.instance
        spare.cage = cage
        try:
            await asyncio.to_thread(self._prepare, cage, code)
            message = zygote.encode(spawn)
            message = len(message).to_bytes(4, "big") + message
            if socket.send_fds(spare.sock, [message], [] if output < 0 else [output]) < len(message):
                raise OSError("its socket is full")
        except BaseException as e:
            spare.kill()
            spare.sock.close()
            if isinstance(e, OSError):
                raise Unreachable(f"a worker cannot be told what it is: {e}") from None
            raise
        return spare

    async def _fork(self, spawn: zygote.Spawn, output: int) -> Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._last += 1
        number, loop = self._last, asyncio.get_running_loop()
        child = self._children[number] = Child(spawn.cage, ours, loop.create_future())
        born = self._born[number] = loop.create_future()
        try:
            with theirs:
                if self._control is None:
                    raise OSError("it has just ended")
                message = zygote.NUMBER.pack(number) + zygote.encode(spawn)
                socket.send_fds(self._control, [message], [theirs.fileno(), *([] if output < 0 else [output])])
            async with asyncio.timeout(_START):
                await born
        except (OSError, TimeoutError) as e:
            ours.close()
            self._born.pop(number, None)
            if self._children.pop(number, None) is not None:
                self._clean_up(spawn.cage)
            raise Unreachable(f"a worker cannot be forked: {e or 'no answer'}") from None
        except BaseException:
            self._born.pop(number, None)
            ours.close()  # the worker, if there is one, ends when it finds nobody there
            raise
        return child

    def _prepare(self, cage: Cage, code: Mapping[str, str]) -> None:
        """Its folders and its groups."""
        if cage.tmp:
            Path(cage.tmp).mkdir(mode=0o700)
        if code:
            _write(Path(cage.code), code)
        limits = cgroup.Limits(cage.memory, cage.cpu, cage.pids)
        made = cgroup.prepare(self._node, cage.instance, limits)
        cage.grouped, cage.ungrouped = made.enforced, made.refused
        cage.doors = cgroup.doors(self._node, cage.instance)

    async def close(self) -> None:
        """Ends the zygote, and with it every worker."""
        self._closed = True
        control, process = self._control, self._process
        if control is not None and process is not None:
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_WR)
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, _CLOSE)
        self._lost("closed")
        while self._cleaning:
            await asyncio.gather(*self._cleaning, return_exceptions=True)


async def probe(nursery: Nursery, cage: Cage) -> Verdict:
    """What this node really enforces on such a cage: a worker that tries to break out, and tells."""
    child = await nursery.spawn(cage, {"LANG": "C.UTF-8"}, probe=True)
    reader, writer = await asyncio.open_unix_connection(sock=child.sock)
    try:
        async with asyncio.timeout(_PROBE):
            size = int.from_bytes(await reader.readexactly(4), "big")
            if size > wire.MAX_FRAME:
                raise Unreachable("the probe's answer is too long")
            told = wire.decode_from_worker(await reader.readexactly(size))
    except (TimeoutError, asyncio.IncompleteReadError):
        told = wire.Broken("it did not answer")
    finally:
        writer.close()
        child.kill()
    if isinstance(told, wire.Jailed):
        return Verdict(sorted(told.enforced), told.refused)
    why = told.message if isinstance(told, wire.Broken) else "it answered something else"
    log.error("the sandbox's probe failed: %s", why)
    return Verdict([], {"everything": f"the probe failed: {why}"})
