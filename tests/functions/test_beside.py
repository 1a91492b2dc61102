"""A node that gets a function in the middle of a canary's trial has the version that answers elsewhere."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from tests.core.pair import until
from tests.functions.node import looped
from tests.functions.test_plane import Voice, invoke, nothing, resource, running, take

from edgeward.core.errors import Unreachable
from edgeward.core.invocation import Call, Event
from edgeward.core.resource import Resource
from edgeward.core.vault import Vault
from edgeward.functions.beside import Beside
from edgeward.functions.edge import Sections
from edgeward.functions.history import code_of
from edgeward.functions.keeping import BesideAsk, BesideTold, EdgeHistory

OLD = "def handler(e, c):\n    return c.version"
NEW = OLD + "\n"


class Hub:
    """What a node hears when it asks; ``gate`` holds the answer back."""

    def __init__(self, code: dict[str, Any] | None, *, away: bool = False) -> None:
        self.code, self.away, self.asked = code, away, 0
        self.gate = asyncio.Event()

    async def ask(self, verb: str, data: bytes, seconds: float) -> bytes:
        self.asked += 1
        assert (verb, msgspec.msgpack.decode(data, type=BesideAsk)) == ("beside", BesideAsk("default", "f"))
        if self.away:
            raise Unreachable("the hub is not reached")
        await self.gate.wait()
        return msgspec.msgpack.encode(BesideTold(self.code))


class Agent:
    """What the agent does with it."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.history = EdgeHistory(folder / "versions")
        self.moved = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        beside = Beside(
            self.history, hub.ask, lambda work: self.tasks.append(asyncio.create_task(work)), self.moved.set
        )
        self.sections = Sections(nothing, nothing, Vault.open(folder / "identity"), None, beside.of)

    def section(self, function: Resource) -> dict[str, Any]:
        made = self.sections.section([function])
        self.history.note([function], made["functions"])
        return made


def trial(generation: int = 2, **more: Any) -> Resource:
    found = resource("f", NEW, canary={"weight": 20}, **more)
    found.metadata.generation = generation
    return found


def code(text: str) -> dict[str, Any]:
    spec: dict[str, Any] = msgspec.to_builtins(resource("f", text).spec)
    return code_of(spec)


def status(voice: Voice) -> dict[str, Any]:
    return voice.statuses.get("default/f") or {}


@looped
async def test_it_waits_for_the_hubs_word_and_then_keeps_the_share(tmp_path: Path) -> None:
    hub = Hub(code(OLD))
    agent = Agent(tmp_path, hub)
    async with running(tmp_path) as (part, voice):
        await take(part, agent.section(trial()))
        assert status(voice) == {"phase": "Pending", "message": "asks the hub what it is to be tried beside"}
        assert (await invoke(part, "f"))[0]["status"] == 404, "no caller gets the canary for want of the other"
        await take(part, agent.section(trial()))
        hub.gate.set()
        await agent.moved.wait()
        section = agent.section(trial())
        digests = [section["functions"][0]["before"]["digest"], section["functions"][0]["digest"]]
        await take(part, section)
        await until(lambda: "canary" in status(voice), 30)
        got = Counter([(await part.invoke(Call("default/f", Event("1", "/t", "t")))).version for _ in range(50)])
        assert got == {digests[0]: 40, digests[1]: 10}
        assert hub.asked == 1
    again = Agent(tmp_path, Hub(None, away=True))
    async with running(tmp_path) as (part, voice):  # cut off, and everything was started anew
        await take(part, again.section(trial()))
        await until(lambda: "canary" in status(voice), 30)
        assert status(voice)["version"] == digests[0]
        promoted = resource("f", NEW)
        promoted.metadata.generation = 3
        section = again.section(promoted)
        assert "before" not in section["functions"][0]
        await take(part, section)
        await until(lambda: status(voice).get("version") == digests[1], 30)
        kept = [(i["version"], i["stood"]) for i in again.history.of("default", "f")]
        assert kept == [(digests[0], 1), (digests[1], 3)], "and there is a way back"


@looped
async def test_without_an_answer_or_a_version_before_the_canary_is_all_there_is(tmp_path: Path) -> None:
    for n, hub in enumerate((Hub(None), Hub(None, away=True))):
        hub.gate.set()
        agent = Agent(tmp_path / str(n), hub)
        async with running(tmp_path / str(n)) as (part, voice):
            await take(part, agent.section(trial()))
            await agent.moved.wait()
            await take(part, agent.section(trial()))
            head, _ = await invoke(part, "f")
            assert head["status"] == 200
            await until(lambda: status(voice).get("version") == head["version"], 30)  # noqa: B023
            agent.section(trial(3))
            assert hub.asked == 1, "not again and again"


def test_a_node_that_was_there_asks_nobody(tmp_path: Path) -> None:
    async def body() -> None:
        hub = Hub(None)
        agent = Agent(tmp_path, hub)
        stable = resource("f", OLD)
        stable.metadata.generation = 1
        before = agent.section(stable)["functions"][0]
        entry = agent.section(trial())["functions"][0]
        assert entry["before"]["digest"] == before["digest"]
        assert "before" not in agent.section(stable)["functions"][0]
        assert hub.asked == 0

    asyncio.run(body())
