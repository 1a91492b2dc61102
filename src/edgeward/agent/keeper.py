"""The agent's side of the data plane: starts it, finds it again, tells it what to do, and hears what it says.

The plane outlives the agent: an agent that starts looks for the one that runs (``plane.run.json``) and takes it over
when it is of the same code, else puts a new one in its place. A plane that ends is started again, after a pause that
grows when that happens again and again. What it shall do is the file ``plane.json``, written whole at each change.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from edgeward.agent.plane import LINE_BYTES, code
from edgeward.core import cgroup, daemon, proc
from edgeward.core.errors import EdgewardError, Invalid, TooMany, Unreachable, from_problem
from edgeward.core.files import read_json, write_atomic

log = logging.getLogger("edgeward.plane")

MARK = "EDGEWARD_PLANE"
START_TIMEOUT = 20.0
_PAUSE, _PAUSE_MOST = 0.2, 30.0
#: Seconds after which a plane counts as one that runs well.
_WELL = 60.0
_LOG_BYTES = 4 * 1024**2
_INHERIT = (
    "LANG",
    "LC_ALL",
    "TZ",
    "HOME",
    "TMPDIR",
    "PATH",
    "EDGEWARD_NGINX",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "EDGEWARD_LOG",
    "CREDENTIALS_DIRECTORY",
)

Status = Callable[[str, str, str, dict[str, Any] | None], None]
Event = Callable[[str, str, str, str, str, str], None]


class Keeper:
    """One node's plane, as the agent sees it; :meth:`run` until cancelled."""

    def __init__(
        self,
        data: Path,
        *,
        sections: Callable[[], dict[str, Any]],
        status: Status,
        event: Event,
        refused: Callable[[EdgewardError], bool],
        say: Callable[[], None],
    ) -> None:
        self.data = data
        self._sections, self._status, self._event = sections, status, event
        #: Told why the plane did not take a configuration; True: the sections are others now, try again.
        self._refused = refused
        self._say = say
        self.socket = daemon.socket_path(data, "plane.sock")
        self.process: proc.ProcId | None = None
        self.restarts = 0
        self.problem = ""
        #: Set when the plane has taken its first configuration (or refused it).
        self.started = asyncio.Event()
        self._dirty = asyncio.Event()
        self._child: Any = None

    # -- outside face --------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and proc.alive(self.process) else None

    def poke(self) -> None:
        """What the plane shall do may have changed."""
        self._dirty.set()

    async def ask(self, verb: str, *, timeout: float = 30.0, **args: Any) -> AsyncIterator[dict[str, Any]]:
        """The plane's answers to a verb, as they come. ``timeout``: until the next answer, in seconds; 0: none.

        Raises ``Unreachable``, or the error that the plane answers with.
        """
        try:
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_unix_connection(str(self.socket), limit=LINE_BYTES)
        except (OSError, TimeoutError):
            raise Unreachable(
                "the node's data plane does not answer", resource="plane", remedy=f"see {self.data / 'plane.log'}"
            ) from None
        try:
            writer.write(msgspec.json.encode({"verb": verb, "args": args}) + b"\n")
            async with asyncio.timeout(30):
                await writer.drain()
            while True:
                async with asyncio.timeout(timeout or None):
                    line = await reader.readline()
                if not line:
                    return
                doc = msgspec.json.decode(line, type=dict[str, Any])
                if "error" in doc and len(doc) == 1:
                    raise from_problem(doc["error"], int(doc["error"].get("status", 500)))
                yield doc
        except (OSError, TimeoutError, msgspec.DecodeError, ValueError) as e:
            raise Unreachable(f"the node's data plane broke off: {e or type(e).__name__}", resource="plane") from None
        finally:
            writer.close()

    async def one(self, verb: str, *, timeout: float = 30.0, **args: Any) -> dict[str, Any]:
        """The first answer."""
        async with contextlib.aclosing(self.ask(verb, timeout=timeout, **args)) as docs:  # type: ignore[type-var]
            async for doc in docs:
                return doc
        raise Unreachable("the node's data plane said nothing", resource="plane")

    async def run(self) -> None:
        pause = _PAUSE
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await self._bring_up()
                self._say()
                await self._look_after()
                why = "ended"
            except (EdgewardError, OSError) as e:
                why = str(e)
            self.started.set()
            self._reap()
            self._say()
            if asyncio.get_running_loop().time() - began > _WELL:
                pause = _PAUSE
            self.restarts += 1
            self._event("Warning", "PlaneEnded", f"the data plane {why}; it is started again", "", "", "Node")
            await asyncio.sleep(pause)
            pause = min(pause * 2, _PAUSE_MOST)

    async def stop(self) -> None:
        """Ends it: the node's apps are stopped, too."""
        found = self.process or self._find()
        if found is not None:
            await proc.terminate(found, grace=10.0)
        self._reap()
        self.process = None

    # -- the process ---------------------------------------------------------------------------------------------------

    def _find(self) -> proc.ProcId | None:
        """The plane that runs: by its record, else (an agent died before it was written) by its environment."""
        try:
            record = read_json(self.data / "plane.run.json", {})
        except Invalid:
            record = {}
        if record.get("pid") and record.get("start"):
            known = proc.ProcId(int(record["pid"]), str(record["start"]))
            if proc.alive(known):
                return known
        found = proc.find_by_env(MARK, str(self.data))
        leaders = [p for p in found if os.getsid(p.pid) == p.pid]  # functions' workers have the mark as well
        return leaders[0] if leaders else None

    async def _bring_up(self) -> None:
        """Afterwards a plane of our code runs and answers. Raises ``Unreachable``, ``OSError``."""
        self._write()
        found = self._find()
        if found is not None:
            if await self._ours(found):
                self.process = found
                log.info("the data plane %d is taken over", found.pid)
                return
            log.info("the data plane %d is of another release or does not answer: it is replaced", found.pid)
            await proc.terminate(found, grace=10.0)
        self._spawn()

        async def answers() -> None:
            while True:
                with contextlib.suppress(Unreachable, TooMany):
                    await self.one("hello", timeout=5.0)
                    return
                if self.process is None or not proc.alive(self.process):
                    raise Unreachable(f"the data plane does not start: see {self.data / 'plane.log'}")
                await asyncio.sleep(0.02)  # looking for the socket that it makes when it is ready

        try:
            async with asyncio.timeout(START_TIMEOUT):
                await answers()
        except TimeoutError:
            raise Unreachable(f"the data plane did not start within {START_TIMEOUT:.0f} s") from None

    async def _ours(self, found: proc.ProcId) -> bool:
        try:
            hello = await self.one("hello", timeout=5.0)
        except EdgewardError:
            return False
        return hello.get("pid") == found.pid and hello.get("code") == code()

    def _spawn(self) -> None:
        env = {k: os.environ[k] for k in _INHERIT if k in os.environ}
        if cgroup.DELEGATED_ENV in os.environ:
            env[cgroup.DELEGATED_ENV] = os.environ[cgroup.DELEGATED_ENV]
        env |= {"EDGEWARD_DATA": str(self.data), MARK: str(self.data)}
        file = self.data / "plane.log"
        if file.exists() and file.stat().st_size > _LOG_BYTES:
            file.replace(self.data / "plane.log.1")
        argv = [sys.executable, "-m", "edgeward.agent.plane", "--data", str(self.data)]
        self.process, self._child = proc.spawn_detached(argv, env, self.data, file, umask=0o077)

    def _reap(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._child = None

    async def _look_after(self) -> None:
        """Until it ends."""
        process = self.process
        if process is None:
            return
        watch = [asyncio.create_task(self._tell()), asyncio.create_task(self._listen())]
        try:
            await proc.wait_exit(process)
        finally:
            for task in watch:
                task.cancel()
            await asyncio.gather(*watch, return_exceptions=True)

    # -- what it shall do ----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """The file, when it would say something else."""
        self._dirty.clear()
        data = msgspec.json.encode(self._sections(), order="deterministic")
        file = self.data / "plane.json"
        if not file.exists() or file.read_bytes() != data:
            write_atomic(file, data)

    async def _tell(self) -> None:
        """Keeps the plane's configuration what it should be."""
        pause = _PAUSE
        while True:
            try:
                self._write()
                await self.one("reload")
                self.problem, pause = "", _PAUSE
            except (Unreachable, TooMany, OSError) as e:  # busy, or a full disk: nobody pokes again when that is over
                self.problem = str(e)
                log.info("%s", e)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _PAUSE_MOST)
                continue
            except EdgewardError as e:
                if self._refused(e):
                    continue
                if str(e) != self.problem:
                    self.problem = str(e)
                    self._event("Warning", "PlaneRefused", f"{e}; what was declared before goes on", "", "", "Node")
            if not self.started.is_set():
                self.started.set()
                self._say()
            await self._dirty.wait()

    async def _listen(self) -> None:
        """What the rooms in the plane report becomes the agent's word."""
        while True:
            with contextlib.suppress(EdgewardError):
                async for doc in self.ask("follow", timeout=0.0):
                    if (event := doc.get("event")) is not None:
                        names = ("type", "reason", "message", "namespace", "name", "kind")
                        self._event(*(str(event.get(n, "")) for n in names))
                    else:
                        self._status(str(doc["kind"]), str(doc["namespace"]), str(doc["name"]), doc["status"])
            await asyncio.sleep(_PAUSE)
