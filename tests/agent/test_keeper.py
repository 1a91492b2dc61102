"""The plane as a real process: started, told, found again after the agent's death, started again after its own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.core.pair import until

from edgeward.agent.keeper import Keeper
from edgeward.agent.plane import CALLERS, RESERVED
from edgeward.core import proc
from edgeward.core.errors import EdgewardError, TooMany
from edgeward.core.natsserver import free_port


class Agent:
    """What the keeper needs of an agent."""

    def __init__(self, data: Path, port: int) -> None:
        self.port = port
        self.routes: list[dict[str, Any]] = []
        self.statuses: dict[str, dict[str, Any] | None] = {}
        self.events: list[str] = []
        self.refusals: list[EdgewardError] = []
        self.news = asyncio.Event()
        self.keeper = Keeper(
            data, sections=self.sections, status=self.status, event=self.event, refused=self.refused, say=self.news.set
        )

    def sections(self) -> dict[str, Any]:
        listen = [{"host": "127.0.0.1", "port": self.port}]
        return {"node": "n1", "site": "s", "gateway": {"node": "n1", "listen": listen, "routes": self.routes}}

    def status(self, kind: str, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        self.statuses[f"{kind}/{namespace}/{name}"] = status
        self.news.set()

    def event(self, type: str, reason: str, message: str, namespace: str, name: str, kind: str) -> None:
        self.events.append(reason)
        self.news.set()

    def refused(self, error: EdgewardError) -> bool:
        self.refusals.append(error)
        self.news.set()
        return False

    async def until(self, ready: Callable[[], Any]) -> None:
        async with asyncio.timeout(60):
            while not ready():
                self.news.clear()
                await self.news.wait()

    async def get(self, path: str) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        writer.close()
        return int(line.split()[1])


@asynccontextmanager
async def running(agent: Agent) -> AsyncIterator[Agent]:
    task = asyncio.create_task(agent.keeper.run())
    try:
        async with asyncio.timeout(60):
            await agent.keeper.started.wait()
        yield agent
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def with_plane(data: Path, body: Callable[[int], Awaitable[None]]) -> None:
    async def run() -> None:
        port = free_port()
        try:
            await body(port)
        finally:
            await Agent(data, port).keeper.stop()
        assert proc.find_by_env("EDGEWARD_PLANE", str(data)) == []

    asyncio.run(run())


NONE = {"key": "default/a", "to": "service", "target": "Service/a", "path": "/a"}


def test_it_outlives_its_agent_and_is_told_what_is_new(tmp_path: Path) -> None:
    async def body(port: int) -> None:
        async with running(Agent(tmp_path, port)) as agent:
            pid = agent.keeper.pid
            assert await agent.get("/a") == 404
            agent.routes = [NONE]
            agent.keeper.poke()
            await agent.until(lambda: agent.statuses.get("Route/default/a"))
            assert await agent.get("/a") == 503
        # that agent is gone, as by a SIGKILL: nobody told the plane to end
        assert await agent.get("/a") == 503
        later = Agent(tmp_path, port)
        async with running(later):
            assert later.keeper.pid == pid
            # what the one before declared and this one does not is taken away
            assert await later.get("/a") == 404
            # the new agent hears of what is there
            later.routes = [NONE, {**NONE, "key": "default/b", "path": "/b"}]
            later.keeper.poke()
            await later.until(lambda: later.statuses.get("Route/default/b"))
            assert later.events == []

    with_plane(tmp_path, body)


def test_one_that_ends_is_started_again(tmp_path: Path) -> None:
    async def body(port: int) -> None:
        agent = Agent(tmp_path, port)
        agent.routes = [NONE]
        async with running(agent):
            pid = agent.keeper.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await agent.until(lambda: agent.keeper.pid not in (None, pid))
            assert agent.events == ["PlaneEnded"]
            async with asyncio.timeout(60):
                while True:
                    try:
                        assert await agent.get("/a") == 503
                        break
                    except OSError:
                        await asyncio.sleep(0.05)  # its listener comes a moment later

    with_plane(tmp_path, body)


def test_what_it_cannot_take_is_told_and_the_old_goes_on(tmp_path: Path) -> None:
    async def body(port: int) -> None:
        agent = Agent(tmp_path, port)
        agent.routes = [NONE]
        async with running(agent):
            await agent.until(lambda: agent.statuses.get("Route/default/a"))
            agent.routes = [{"key": "default/b", "to": "nonsense", "target": ""}]
            agent.keeper.poke()
            await agent.until(lambda: "PlaneRefused" in agent.events)
            assert agent.refusals[0].field == "$.gateway"
            assert await agent.get("/a") == 503

    with_plane(tmp_path, body)


def test_what_it_could_not_hear_is_told_later(tmp_path: Path) -> None:
    """Too many callers, or a disk that takes nothing: when that is over nobody pokes again."""

    async def body(port: int) -> None:
        async with running(Agent(tmp_path, port)) as agent:

            async def troubled() -> bool:
                return bool(agent.keeper.problem)

            callers = [await asyncio.open_unix_connection(str(agent.keeper.socket)) for _ in range(CALLERS)]
            agent.routes = [NONE]
            agent.keeper.poke()
            await until(troubled)
            for _, writer in callers:
                writer.close()
            await agent.until(lambda: agent.statuses.get("Route/default/a"))
            assert await agent.get("/a") == 503
            assert "PlaneRefused" not in agent.events

            file = tmp_path / "plane.json"
            file.unlink()
            file.mkdir()  # it cannot be written
            agent.routes = [{**NONE, "key": "default/b", "path": "/b"}]
            agent.keeper.poke()
            await until(troubled)
            file.rmdir()
            await agent.until(lambda: agent.statuses.get("Route/default/b"))
            assert await agent.get("/b") == 503

    with_plane(tmp_path, body)


def test_callers_of_the_rooms_keep_no_configuration_away(tmp_path: Path) -> None:
    async def body(port: int) -> None:
        async with running(Agent(tmp_path, port)) as agent:
            callers = [await asyncio.open_unix_connection(str(agent.keeper.socket)) for _ in range(CALLERS - RESERVED)]
            with pytest.raises(TooMany, match="callers already"):
                await agent.keeper.one("gateway.stats")
            agent.routes = [NONE]
            agent.keeper.poke()
            await agent.until(lambda: agent.statuses.get("Route/default/a"))
            assert await agent.get("/a") == 503
            for _, writer in callers:
                writer.close()

    with_plane(tmp_path, body)


def test_a_record_that_cannot_be_read_stops_nobody(tmp_path: Path) -> None:
    async def body(port: int) -> None:
        async with running(Agent(tmp_path, port)) as agent:
            pid = agent.keeper.pid
        (tmp_path / "plane.run.json").write_text("{")
        later = Agent(tmp_path, port)
        async with running(later):
            assert later.keeper.pid == pid
            assert later.keeper.restarts == 0

    with_plane(tmp_path, body)


def test_a_plane_of_other_code_is_replaced(tmp_path: Path) -> None:
    async def body(port: int) -> None:
        async with running(Agent(tmp_path, port)) as agent:
            pid = agent.keeper.pid
        later = Agent(tmp_path, port)
        async with running(later):
            assert later.keeper.pid == pid
        hello = await later.keeper.one("hello")
        assert hello["pid"] == pid
        newest = Agent(tmp_path, port)

        async def other(_: Any) -> bool:
            return False  # as if its code were another

        newest.keeper._ours = other  # type: ignore[method-assign]
        async with running(newest):
            assert newest.keeper.pid not in (None, pid)
            assert await newest.get("/a") == 404

    with_plane(tmp_path, body)


def test_its_socket_is_its_owners(tmp_path: Path) -> None:
    async def body(port: int) -> None:
        async with running(Agent(tmp_path, port)) as agent:
            assert agent.keeper.socket.stat().st_mode & 0o077 == 0
            assert (tmp_path / "plane.json").stat().st_mode & 0o077 == 0
            for verb in ("nonsense", ""):
                try:
                    await agent.keeper.one(verb)
                except EdgewardError as e:
                    assert e.reason == "NotFound"
                else:
                    raise AssertionError("it answered")
            reader, writer = await asyncio.open_unix_connection(str(agent.keeper.socket))
            writer.write(b"no json\n")
            assert b'"error"' in await reader.readline()
            writer.close()

    with_plane(tmp_path, body)
