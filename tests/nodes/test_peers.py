"""Two hub processes on one nats-server: each answers what comes to it, both know all, one writes, either may die."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from nats.aio.msg import Msg
from tests.core.pair import until
from tests.nodes.fleet import Fleet, another, app, fleet

from edgeward.core.resource import CLUSTER, Key
from edgeward.hub.kinds import load
from edgeward.nodes.wire import BeatAnswer, BeatAsk, Ok, ReportAsk, Status

load()

NODE = Key("Node", CLUSTER, "plant-1")
WEB = Key("App", "default", "web")


def report(phase: str, full: bool = False) -> ReportAsk:
    instance = {"node": "plant-1", "phase": phase}
    return ReportAsk([Status("App", "default", "web", {"phase": phase, "instances": [instance]})], full, None, [])


async def beat(f: Fleet, n: int = 1) -> BeatAnswer:
    answer: BeatAnswer = await f.ask("plant-1", "beat", BeatAsk(n, "run"), BeatAnswer)
    return answer


def phase(f: Fleet) -> Any:
    return f.store.get(WEB).status.get("phase")


def test_both_know_one_writes_and_the_other_takes_over(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, serve=False) as f:
            await f.store.put(app("web", "plant", replicas=1))
            async with another(f, "second") as (second, second_peers):
                assert second_peers.leads and second_peers.alone
                async with another(f, "first") as (first, first_peers):
                    # by the clock of its machine it was there before: all the same, one leads, and both say which
                    first_peers.lease.born = 1.0
                    await until(lambda: second_peers.leader == first_peers.leader == "first", 20)
                    assert first_peers.leads and not second_peers.leads and not second_peers.alone
                    poked: list[str] = []

                    async def seen(msg: Msg) -> None:
                        poked.append(msg.subject)

                    bus = await f.bus("plant-1")
                    await bus.subscribe("ew.node.plant-1.poke", seen)
                    await bus.flush()
                    answers = [await beat(f, n) for n in range(6)]  # to either, as it happens
                    assert {a.hub for a in answers} == {"first"}, (
                        "not one process after the other, or reports never end"
                    )
                    await until(lambda: first.is_online("plant-1") and second.is_online("plant-1"), 20)
                    await until(lambda: f.store.get(NODE).status.get("online") is True, 20)
                    for n in range(6):
                        await f.ask("plant-1", "report", report(f"P{n}"), Ok)
                        await until(lambda n=n: phase(f) is not None and _says(first, f"P{n}"), 20)
                        await until(lambda n=n: _says(second, f"P{n}"), 20)
                    await f.ask("plant-1", "report", report("Running"), Ok)
                    await until(lambda: phase(f) == "Running", 20)
                    poked.clear()
                    changed = await f.store.put(app("web", "plant", replicas=2))
                    await until(lambda: bool(poked), 20)
                    await until(lambda: second._store.revision >= changed.revision, 20)
                    await second._poke.settled()
                    await first._poke.settled()
                    await bus.flush()
                    assert len(poked) == 1, "by the one that leads"
                    events = len([r for r in f.records.items("events") if r["reason"] == "NodeOnline"])
                    assert events == 1
                # the first is gone
                await until(lambda: second_peers.leads, 20)
                assert second.is_online("plant-1"), "it heard of the node all the time"
                assert (await beat(f)).hub == "second", "so the node says all again"
                await f.ask("plant-1", "report", report("Failed", full=True), Ok)
                await until(lambda: phase(f) == "Failed", 20)
                assert second_peers.alone

    asyncio.run(asyncio.wait_for(body(), 110))


def _says(hub: Any, phase: str) -> bool:
    return bool(hub._reports.get("plant-1", {}).get("App/default/web", {}).get("phase") == phase)


def test_a_node_that_was_told_by_one_may_ask_the_other(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, serve=False) as f, another(f, "a") as (_, one), another(f, "b") as (_, other):
            await until(lambda: not one.alone and not other.alone, 20)
            first = await f.sync("plant-1")
            for n in range(8):
                # the node has this already, of the process that is quicker
                put = await f.store.put(app(f"x{n}", "plant"))
                then = await f.sync("plant-1", put.revision, first.epoch)
                assert not then.full, "one whose cache is behind waits for it"
                assert then.revision >= put.revision

    asyncio.run(asyncio.wait_for(body(), 60))
