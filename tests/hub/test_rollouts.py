"""A run at a real store: reports of nodes move it on, a site's word holds it, another process takes it over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.hub.test_steering import heard, until
from tests.nodes.fleet import Fleet, app, doc, fleet

from edgeward.core.resource import Key
from edgeward.core.store import Change
from edgeward.hub.rollouts import Rollouts, baselines
from edgeward.nodes.wire import LEVEL, Ok, ReportAsk, Status

APP, KEY = Key("App", "default", "web"), Key("Rollout", "default", "web")
NODES = ("plant-1", "plant-2", "shop-1")
SPEC = {
    "targets": [{"kind": "App", "name": "web"}],
    "groups": [{"name": "plant", "sites": ["plant"]}, {"name": "shop", "sites": ["shop"]}],
    "healthWindow": "0s",
}


class Hub:
    """The part of a hub that this is about."""

    def __init__(self, f: Fleet) -> None:
        self.f, self.levels = f, dict.fromkeys(NODES, LEVEL)
        self.leads = True

    @asynccontextmanager
    async def process(self) -> AsyncIterator[Rollouts]:
        rollouts = Rollouts(self.f.store, self.f.records, lambda: self.leads, lambda n: self.levels[n])
        task = asyncio.create_task(rollouts.run())
        try:
            yield rollouts
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def status(self) -> dict[str, Any]:
        return self.f.store.get(KEY).status

    @property
    def reasons(self) -> list[str]:
        """What happened, in the records."""
        return [r["reason"] for r in self.f.records.items("events") if r["resource"] == "Rollout/web"]

    def group(self, n: int) -> dict[str, Any]:
        found: dict[str, Any] = self.status["groups"][n]
        return found

    async def declare(self, word: str) -> int:
        stored = await self.f.store.put(app("web", replicas=2, process={"command": [word]}))
        return stored.metadata.generation

    async def say(self, node: str, generation: int, **more: Any) -> None:
        status = {"phase": "Running", "observedGeneration": generation, "instances": [], **more}
        ask = ReportAsk([Status("App", "default", "web", status)])
        assert not (await self.f.ask(node, "report", ask, Ok)).error


@asynccontextmanager
async def ready(folder: Path) -> AsyncIterator[Hub]:
    """Everybody runs the baseline."""
    async with fleet(folder) as f:
        await heard(f, *NODES)
        hub = Hub(f)
        first = await hub.declare("one")
        await f.store.put(doc("Rollout", "web", SPEC))
        for node in NODES:
            await hub.say(node, first)
        await until(lambda: all(n.status.get("online") for n in f.store.items("Node")))
        yield hub


async def _moved_on(folder: Path) -> None:
    async with ready(folder) as hub:
        async with hub.process():
            await until(lambda: hub.status.get("phase") == "Succeeded")
            two = await hub.declare("two")
            await until(lambda: hub.status["groups"] and hub.group(0)["nodes"] == ["plant-1", "plant-2"])
            await hub.say("plant-1", two)
            await until(lambda: hub.group(0)["done"] == 1)
        # another process goes on where this one was
        async with hub.process():
            await hub.say("plant-2", two)
            await until(lambda: hub.group(1)["nodes"] == ["shop-1"])
            assert [s["process"]["command"] for _, s in baselines(hub.f.store)] == [["one"]]
            await hub.say("shop-1", two)
            await until(lambda: hub.status["phase"] == "Succeeded")
            assert [s["process"]["command"] for _, s in baselines(hub.f.store)] == [["two"]]

            three = await hub.declare("three")
            await until(lambda: hub.group(0)["nodes"] == ["plant-1", "plant-2"])
            await hub.say("plant-1", three, takenBack="three", message="it ended")
            await until(lambda: hub.status["phase"] == "Failed")
            await hub.say("plant-1", two)
            await hub.say("plant-2", two)
            await until(lambda: hub.status["phase"] == "RolledBack")
            assert hub.group(0)["failed"] == {"plant-1": "App/web: it ended"}
            assert not hub.group(1)["nodes"]
            said = ["RolloutStarted", "RolloutFailed", "RolloutRolledBack"]
            await until(lambda: hub.reasons[-3:] == said)


def test_reports_move_it_on_and_another_process_takes_it_over(tmp_path: Path) -> None:
    asyncio.run(_moved_on(tmp_path))


async def _at_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ready(folder) as hub, hub.process() as rollouts:
        asked: list[Key] = []
        soon = rollouts.soon
        monkeypatch.setattr(rollouts, "soon", lambda key: (asked.append(key), soon(key)))
        node = hub.f.store.get(Key("Node", "_", "plant-1"))

        def looked_at() -> list[Key]:
            """What a change of the node alone has looked at: nothing else happens in between."""
            asked.clear()
            rollouts._changed(Change(1, node.key, node, status_only=True))
            return list(asked)

        await until(lambda: hub.status.get("phase") == "Succeeded")
        assert looked_at() == [], "nothing moves: no node matters"
        await hub.declare("two")
        await until(lambda: hub.status["phase"] == "Running")
        assert looked_at() == [KEY]


def test_a_rollout_at_rest_looks_at_no_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(_at_rest(tmp_path, monkeypatch))


async def _held(folder: Path) -> None:
    async with ready(folder) as hub, hub.process():
        await until(lambda: hub.status.get("phase") == "Succeeded")
        target = {"kind": "Rollout", "name": "web", "namespace": "default"}
        own = doc("Override", "o", {"target": target, "site": "plant", "patch": {"hold": True}})
        await hub.f.store.put(own)
        hub.levels["shop-1"] = 1
        await hub.declare("two")
        await until(lambda: hub.status["groups"] and "held" in hub.status["message"])
        assert hub.group(0)["nodes"] == []
        assert hub.status["ungoverned"] == ["shop-1"]
        await hub.f.store.put(doc("Override", "o", {**_plain(own), "patch": {"hold": False}}))
        await until(lambda: hub.group(0)["nodes"] == ["plant-1", "plant-2"])


def _plain(own: Any) -> dict[str, Any]:
    t = own.spec.target
    return {"target": {"kind": t.kind, "name": t.name, "namespace": t.namespace}, "site": own.spec.site}


def test_a_site_holds_and_an_older_node_is_named(tmp_path: Path) -> None:
    asyncio.run(_held(tmp_path))


async def _one_hand(folder: Path) -> None:
    async with ready(folder) as hub:
        await hub.f.store.put(doc("Rollout", "xtra", SPEC))
        xtra = Key("Rollout", "default", "xtra")
        hub.leads = False
        async with hub.process() as idle:
            await hub.declare("two")
            await until(lambda: not idle._gathered)  # it has looked
            await idle._loop.settled()
        assert hub.f.store.get(xtra).status == {} == hub.status, "who does not lead writes nothing"
        hub.leads = True
        async with hub.process():
            await until(lambda: hub.status and hub.f.store.get(xtra).status)
            assert "is moved by Rollout/web" in hub.f.store.get(xtra).status["message"]
            await hub.f.store.remove(KEY)
            await until(lambda: hub.f.store.get(xtra).status["phase"] == "Succeeded")
            assert hub.f.store.get(xtra).status["message"] == ""


def test_one_rollout_moves_a_target_and_one_process_writes(tmp_path: Path) -> None:
    asyncio.run(_one_hand(tmp_path))
