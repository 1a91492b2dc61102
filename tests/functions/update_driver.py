"""One side of a Function's update that dies at a step, for test_kill_at_every_step: the agent's, or the plane's.

``python update_driver.py agent DIR VERSION STEP``: an agent's share of an update, until the new version answers.
``python update_driver.py plane --data DIR``: a plane that kills itself at the step which DIR/die-at names, once. Steps
are the moments when a file is whole beside its place, and in it; and before and after each side does its part.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeward.agent import keeper as keeping
from edgeward.agent import plane
from edgeward.agent.keeper import Keeper
from edgeward.core import proc
from edgeward.core.errors import Unreachable
from edgeward.core.resource import Resource, decode
from edgeward.functions import plane as part
from edgeward.functions import spec as _spec  # noqa: F401
from edgeward.functions.dispatcher import Dispatcher
from edgeward.functions.edge import Sections
from edgeward.functions.keeping import EdgeHistory

CODE = "def handler(event, context):\n    return {version}\n"
WAIT = 60.0


def function(version: int) -> Resource:
    spec = {"runtime": "python", "source": {"inline": CODE.format(version=version)}}
    meta = {"name": "f"}
    doc = {"apiVersion": "edgeward/v1", "kind": "Function", "metadata": meta, "spec": spec}
    made = decode(doc)
    made.metadata.generation = version
    return made


class Agent:
    """What an agent does of an update: notes the version, writes what the plane shall do, tells it."""

    def __init__(self, data: Path, version: int) -> None:
        self.data, self.version = data, version
        self.history = EdgeHistory(data / "functions" / "versions")
        self.made = Sections(lambda *_: None, lambda *_: None, None)  # type: ignore[arg-type]  # nothing is sealed
        self.keeper = Armed(
            data, sections=self.sections, status=lambda *_: None, event=lambda *_: None, refused=lambda _: False,
            say=lambda: None,
        )  # fmt: skip

    def sections(self) -> dict[str, Any]:
        declared = [function(self.version)]
        found = self.made.section(declared)
        self.history.note(declared, found["functions"])
        return {"node": "n", "site": "s", "functions": found}

    async def says(self) -> int | str:
        """The version that answers, or the words of what went wrong."""
        said = b""
        try:
            async for doc in self.keeper.ask("invoke", namespace="default", name="f"):
                if doc.get("head", {}).get("status", 200) != 200:
                    return str(doc)
                said += base64.b64decode(doc.get("data", ""))
        except Unreachable:
            return -1  # no plane runs at this moment
        return int(said) if said else -1


class Armed(Keeper):
    """Starts the plane of this file."""

    def _spawn(self) -> None:
        env = {k: os.environ[k] for k in ("PATH", "LANG", "PYTHONPATH", "HOME") if k in os.environ}
        env |= {"EDGEWARD_DATA": str(self.data), keeping.MARK: str(self.data)}
        argv = [sys.executable, __file__, "plane", "--data", str(self.data)]
        self.process, self._child = proc.spawn_detached(argv, env, self.data, self.data / "plane.log", umask=0o077)


def stepped(owner: Any, name: str, step: Callable[[str], None]) -> None:
    inner: Callable[..., Any] = getattr(owner, name)
    if asyncio.iscoroutinefunction(inner):

        @functools.wraps(inner)
        async def call(*args: Any, **kwargs: Any) -> Any:
            step(name)
            got = await inner(*args, **kwargs)
            step(name)
            return got
    else:

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            step(name)
            got = inner(*args, **kwargs)
            step(name)
            return got

    setattr(owner, name, call)


async def agent(data: Path, version: int, at: int) -> None:
    steps = itertools.count()

    def step(name: str) -> None:
        if next(steps) == at:
            print(name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    stepped(os, "replace", step)
    stepped(Keeper, "one", step)
    one = Agent(data, version)
    running = asyncio.create_task(one.keeper.run())
    async with asyncio.timeout(WAIT):
        while await one.says() != version:  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # the period of looking
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def armed_plane() -> int:
    data = Path(sys.argv[3])
    steps = itertools.count()

    def step(_: str) -> None:
        armed = data / "die-at"
        if armed.exists() and next(steps) == int(armed.read_text()):
            armed.unlink()  # once: the next plane lives
            os.kill(os.getpid(), signal.SIGKILL)

    stepped(os, "replace", step)
    kept = part.write_atomic

    def done(path: Path, text: bytes) -> None:
        kept(path, text)
        (data / "all-done").write_bytes(text)

    part.write_atomic = done  # type: ignore[assignment]
    for name in ("provision", "commit", "_good"):
        stepped(part.FunctionsPart, name, step)
    stepped(Dispatcher, "configure", step)
    del sys.argv[1]
    return plane.main()


if __name__ == "__main__":
    if sys.argv[1] == "plane":
        sys.exit(armed_plane())
    asyncio.run(agent(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
