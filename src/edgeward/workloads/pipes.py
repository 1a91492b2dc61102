"""The agent's side of the pump: pipes for instances, and one living pump as long as there are any.

A pipe is made with its writing end open, and only then gets the name by which the pump knows it: a named pipe that
nobody has open is over. Instances hold it open for reading too, so it outlives agent and pump: no write ends in
SIGPIPE, and what does not fit while no pump is there waits for the next. The agent has them open for reading as well,
so that the last words of an instance that ends while there is no pump are not lost. The pump has a lock for its life;
the next agent finds it by that, and replaces one whose program is not its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

from edgeward.core import clock, proc
from edgeward.core.files import ensure_dir
from edgeward.workloads import pump

log = logging.getLogger("edgeward.logs")

_PROGRAM = Path(pump.__file__)
_MARK = "EDGEWARD_PUMP"
#: Pauses before a pump that ended is started again, in seconds (the first is long enough for somebody who kills a whole
#: node to come to the agent); it has to live ``_STEADY`` to be trusted again.
_BACKOFF = (0.1, 5.0)
_STEADY = 10.0
#: Looks until one that has the lock and does not say who it is, is searched for.
_UNSIGNED = 40


class Pipes:
    """The pipes below ``root``, which is ``logs/`` of the node; :meth:`run` keeps the pump."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._held: dict[Path, int] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._wake = asyncio.Event()
        self._code = hashlib.sha256(_PROGRAM.read_bytes()).hexdigest()[:16]
        #: How often a pump ended that was needed.
        self.restarts = 0

    # -- instances -----------------------------------------------------------------------------------------------------

    def make(self, log_file: Path, cap: int, uid: int | None = None, gid: int | None = None) -> int:
        """A pipe for the instance that ``log_file`` belongs to: the descriptor for its stdout, to be closed by the
        caller once it runs. ``cap`` in bytes. Raises ``OSError``."""
        ensure_dir(log_file.parent)
        os.close(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        new = log_file.with_suffix(".new")
        new.unlink(missing_ok=True)
        os.mkfifo(new, 0o600)
        fd = os.open(new, os.O_RDWR | os.O_CLOEXEC)
        try:
            if uid is not None:  # a program may open /dev/stdout by its name
                os.fchown(fd, uid, -1 if gid is None else gid)
            name = log_file.with_suffix(f".{cap}.pipe")
            while name.exists():  # of an agent before us: the pump has still to empty it and take the name away
                name = name.with_name(name.name.removesuffix(f"{cap}.pipe") + f"0{cap}.pipe")
            named = new.rename(name)
            self.hold(named)
            self.poke()
        except BaseException:
            os.close(fd)
            raise
        return fd

    def adopt(self, log_file: Path) -> None:
        """An instance that an earlier agent started."""
        for named in log_file.parent.glob(f"{log_file.stem}.*.pipe"):
            self.hold(named)

    def hold(self, named: Path) -> None:
        """Keeps what is in a pipe, whoever ends, until the pump has taken it and the pipe away."""
        for path in [p for p in self._held if not p.exists()]:
            os.close(self._held.pop(path))
        with contextlib.suppress(OSError):  # too many open files: then it is kept by instance and pump alone
            fd = os.open(named, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._held[named] = fd

    def cut(self, log_file: Path, cap: int, pid: int) -> None:
        """Asks for the file of an instance that writes into it itself to be looked at."""
        with contextlib.suppress(OSError):
            log_file.with_suffix(f".{cap}.{pid}.cut").touch(mode=0o600)
            self.poke()

    # -- the pump ------------------------------------------------------------------------------------------------------

    def needed(self) -> bool:
        return bool(pump.names(str(self.root)))

    def poke(self) -> None:
        """Something changed in the folders: tells the pump, or starts one."""
        self._wake.set()
        control = self.root / ".pump"
        try:
            fd = os.open(control, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            if e.errno in (errno.ENXIO, errno.ENOENT):
                self._start()
            return
        try:
            with contextlib.suppress(BlockingIOError):  # full of earlier pokes
                os.write(fd, b".")
        finally:
            os.close(fd)

    def _start(self) -> None:
        """Starts a pump unless one lives (one that has the lock and cannot be told yet will look by itself)."""
        lock = self._lock()
        if lock is None:
            return
        with lock:
            with contextlib.suppress(FileExistsError):
                os.mkfifo(self.root / ".pump", 0o600)
            self._reap()
            env = {_MARK: str(self.root)}
            if "EDGEWARD_DATA" in os.environ:
                env["EDGEWARD_DATA"] = os.environ["EDGEWARD_DATA"]
            said = self.root / ".pump.err"
            said.unlink(missing_ok=True)
            argv = [sys.executable, "-I", "-S", "-E", str(_PROGRAM), str(self.root), self._code]
            try:
                _, self._child = proc.spawn_detached(argv, env, "/", said, stdin=lock)
            except OSError as e:  # apps start all the same; run() tries again
                log.error("the pump of logs cannot be started: %s", e)

    def _lock(self) -> IO[bytes] | None:
        """The lock, empty; None while a pump has it."""
        lock = (ensure_dir(self.root) / ".pump.lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
        except BlockingIOError:
            lock.close()
            return None
        return lock

    def _reap(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._child = None

    async def _living(self) -> tuple[proc.ProcId, str] | None:
        """Who has the lock, and the program it runs; None when nobody has."""
        for look in range(600):
            if (lock := self._lock()) is not None:
                lock.close()
                return None
            pid, _, code = (self.root / ".pump.lock").read_text("ascii").strip().partition(" ")
            found = proc.identify(int(pid)) if pid else None
            if found is not None and proc.alive(found):
                return found, code
            # a full disk may have kept it from saying who it is: this release's does, when there is room
            if look >= _UNSIGNED and not pid and (pumps := proc.find_by_env(_MARK, str(self.root))):
                return pumps[0], self._code
            await asyncio.sleep(0.05)  # it is just starting or ending
        return None

    async def run(self) -> None:
        """Keeps a pump while it is needed, until cancelled; the pump goes on."""
        pause = _BACKOFF[0]
        while True:
            try:
                pause = await self._keep(pause)
            except OSError as e:  # too many open files, or a full disk: apps and agent live on
                log.error("the pump of logs cannot be looked after: %s", e)
                await asyncio.sleep(_BACKOFF[1])

    async def _keep(self, pause: float) -> float:
        """Until something changed with the pump; gives the pause before the next one is started."""
        living = await self._living()
        self._reap()
        if living is None:
            if self.needed():
                await asyncio.sleep(pause)
                self.poke()
                return min(pause * 2, _BACKOFF[1])
            await self._wake.wait()
            self._wake.clear()
        elif living[1] != self._code:
            log.info("the pump of logs is of another release: it is replaced")
            await proc.terminate(living[0], grace=5.0)
        else:
            began = clock.monotonic()
            await proc.wait_exit(living[0])
            pause = _BACKOFF[0] if clock.monotonic() - began > _STEADY else pause
            if self.needed():
                self.restarts += 1
                log.warning("the pump of logs ended: %s", self._last_words())
        return pause

    def _last_words(self) -> str:
        try:
            said = (self.root / ".pump.err").read_text("utf-8", "replace").strip().splitlines()
        except OSError:
            return "it left no word"
        return said[-1][:200] if said else "it left no word"

    async def close(self, *, leave: bool) -> None:
        """``leave``: a pump that is needed goes on; else it writes what there is, and ends."""
        try:
            if not (leave and self.needed()) and (living := await self._living()) is not None:
                await proc.terminate(living[0], grace=5.0)
        finally:
            self._reap()
            for fd in self._held.values():
                os.close(fd)
            self._held.clear()
