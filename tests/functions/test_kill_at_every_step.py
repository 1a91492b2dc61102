"""SIGKILL of the agent and of the plane at every step of a Function's update: old or new whole, never none of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.functions import update_driver
from tests.functions.update_driver import Agent

from edgeward.agent import keeper as keeping
from edgeward.core.files import write_atomic
from edgeward.core.proc import find_by_env, wait_exit

DRIVER = Path(update_driver.__file__)
WAIT = 60.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes by their environment"),
]


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for process in find_by_env("EDGEWARD_DATA", str(tmp_path)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


async def becomes(agent: Agent, *allowed: int) -> None:
    """Until the last of these versions answers; on the way nothing but them does."""
    async with asyncio.timeout(WAIT):
        while (said := await agent.says()) != allowed[-1]:
            assert said in (-1, *allowed), said  # -1: the plane is being started again
            await asyncio.sleep(0.02)  # the period of looking


async def updated(agent: Agent, *allowed: int) -> None:
    """A run of an agent that nobody kills."""
    running = asyncio.create_task(agent.keeper.run())
    try:
        await becomes(agent, *allowed)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def after_a_power_cut(agent: Agent) -> int | str:
    """What answers when the plane is gone too, and comes back before any agent."""
    for process in find_by_env("EDGEWARD_DATA", str(agent.data)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        assert await wait_exit(process, WAIT)
    agent.keeper._spawn()
    async with asyncio.timeout(WAIT):
        while (said := await agent.says()) == -1:  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # the period of looking
    return said


def test_an_agent_killed_at_any_step_of_an_update(data: Path) -> None:
    async def main() -> None:
        await updated(Agent(data, 1), 1)
        killed, old = 0, 1
        while True:
            new = old + 1
            argv = [sys.executable, str(DRIVER), "agent", str(data), str(new), str(killed)]
            cut = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=100)
            if cut.returncode == 0:
                break
            assert cut.returncode == -signal.SIGKILL, cut.stderr
            assert await Agent(data, new).says() in (old, new), f"after the kill at step {killed}"
            if cut.stdout == "replace\n":  # the disk is another one
                assert await after_a_power_cut(Agent(data, new)) in (old, new), f"of the machine at step {killed}"
            await updated(Agent(data, new), old, new)
            killed, old = killed + 1, new
        assert killed > 6, "an update has more steps than that"
        kept = Agent(data, new).history.of("default", "f")
        assert text_of(new) in str(kept[-1]), "and the way back is known"
        assert text_of(old) in str(kept[-2])

    asyncio.run(main())


def text_of(version: int) -> str:
    return f"return {version}"


def test_a_plane_killed_at_any_step_of_an_update(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_PAUSE", 0.02)
    monkeypatch.setattr(keeping, "_PAUSE_MOST", 0.02)

    async def main() -> None:
        agent = Agent(data, 1)
        running = asyncio.create_task(agent.keeper.run())
        try:
            await becomes(agent, 1)
            killed = 0
            while True:
                old = agent.version
                write_atomic(data / "die-at", str(killed))
                agent.version = old + 1
                agent.keeper.poke()
                await becomes(agent, old, agent.version)
                async with asyncio.timeout(WAIT):
                    await written(data, agent.version)
                if (data / "die-at").exists():
                    break
                killed += 1
            assert killed > 6, "an update has more steps than that"
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


async def written(data: Path, version: int) -> None:
    """Until the plane has kept the version as the one to go back to; all steps are done then, or it died at one."""
    while True:
        kept = data / "functions" / "good.json" if not (data / "die-at").exists() else data / "all-done"
        if kept.exists() and text_of(version) in kept.read_text():
            return
        await asyncio.sleep(0.02)  # the period of looking
