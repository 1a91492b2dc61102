"""Random histories of a hub and a node, a backup somewhere in them, a restore at the end: nothing newer is lost.

Values grow with every write of either side, so of two values the larger is the newer one.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from tests.hub.test_backup import make, recovery
from tests.nodes.fleet import Fleet, app, fleet

from edgeward.agent.replica import Replica
from edgeward.core.resource import Key
from edgeward.hub.restore import restore
from edgeward.nodes.wire import PushAnswer, PushAsk

NODE = "plant-1"
NAMES = [f"a{i}" for i in range(5)]


class World:
    """One node's replica, and what is done to it and to the hub."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.replica = Replica(folder / "replica.db", site="plant")
        self.count = 0

    def value(self, name: str) -> int:
        found = self.replica.find(Key("App", "default", name))
        return int(found.spec.restart.backoff[:-1]) if found else 0

    def next(self) -> tuple[str, object]:
        self.count += 1
        name = self.rng.choice(NAMES)
        return name, app(name, "plant", restart={"backoff": f"{self.count}s"})

    async def sync(self, f: Fleet) -> None:
        got = await f.sync(NODE, self.replica.hub_revision, self.replica.epoch)
        self.replica.apply_sync(got.objects, revision=got.revision, epoch=got.epoch, full=got.full, line=got.line)
        assert self.replica.hub_view() == got.view

    async def push(self, f: Fleet) -> None:
        while pending := self.replica.pending():
            answer = await f.ask(NODE, "push", PushAsk(self.replica.store_id, pending), PushAnswer)
            assert not answer.error, answer.error
            for decided in answer.decided:
                self.replica.resolve(decided.seq, decided.now)

    async def steps(self, f: Fleet, n: int) -> None:
        for _ in range(n):
            act = self.rng.choice(("hub", "hub", "node", "sync", "push"))
            if act in ("hub", "node"):
                _, new = self.next()
                await (f.store if act == "hub" else self.replica).put(new)  # type: ignore[arg-type]
            else:
                await getattr(self, act)(f)


def hub_values(f: Fleet) -> dict[str, int]:
    return {a.metadata.name: int(a.spec.restart.backoff[:-1]) for a in f.store.items("App")}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_newer_survives_and_both_sides_agree(seed: int, times: int, tmp_path: Path) -> None:
    """``times`` 2: the same backup is restored once more, after the node had gone on with the first one."""

    async def body() -> None:
        world, hub = World(tmp_path, seed), tmp_path / "hub"
        async with fleet(hub) as f:
            await world.steps(f, 25)
            backup = await make(f, hub)
            saved = hub_values(f)
            await world.steps(f, 25)
            seen = f.store.revision
        if times == 2:
            await restore(backup, hub, recovery(hub))
            async with fleet(hub) as f:
                await world.steps(f, 20)
                seen = f.store.revision
        had = {name: world.value(name) for name in NAMES}
        pending = {c.name: world.value(c.name) for c in world.replica.pending()}
        await restore(backup, hub, recovery(hub))
        async with fleet(hub) as f:
            touched: dict[str, int] = {}
            for _ in range(world.rng.randrange(3)):
                name, new = world.next()
                await f.store.put(new)  # type: ignore[arg-type]
                touched[name] = world.count
            for act in world.rng.choice((("sync", "push"), ("push", "sync"))):
                await getattr(world, act)(f)
            await world.push(f)
            await world.sync(f)
            final = hub_values(f)
            assert {n: world.value(n) for n in NAMES} == {n: final.get(n, 0) for n in NAMES}
            for name in NAMES:
                if name in touched:
                    assert final[name] == touched[name], "the rule is cloud, and the hub changed it since"
                elif name in pending:
                    assert final[name] in (pending[name], saved.get(name)), name
                else:
                    assert final.get(name, 0) == max(had[name], saved.get(name, 0)), name
            assert all(a.revision > seen for a in f.store.items("App"))
        # the seeds are of use only if nodes were ahead in some of them
        ahead.append(any(had[n] > saved.get(n, 0) and n not in pending for n in NAMES))

    asyncio.run(body())


ahead: list[bool] = []


def test_nodes_were_ahead_in_some_of_them() -> None:
    assert not ahead or any(ahead)
