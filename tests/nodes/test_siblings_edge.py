"""Nodes of a site keep one another's changes, over real meshes on the loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.core.pair import until
from tests.nodes.fleet import config
from tests.nodes.meshes import Site

from edgeward.agent.replica import Replica
from edgeward.core.records import SqliteRecords
from edgeward.core.resource import Key
from edgeward.hub.kinds import load
from edgeward.nodes import siblings_edge
from edgeward.nodes.edge import NodeEdge
from edgeward.nodes.siblings import Answer, Digest, Finished
from edgeward.nodes.siblings_edge import Siblings

load()


class Box:
    """One node: its mesh, its replica, and what keeps the two together. No hub."""

    def __init__(self, site: Site, name: str) -> None:
        self.name, self._site = name, site
        self.replica = Replica(site.root / name / "replica.db", site="plant", node=name)
        self.records = SqliteRecords()
        self.link = NodeEdge(name, self.replica, self.records)
        self.siblings = Siblings(
            name, "plant", replica=self.replica, records=self.records, link=self.link, mesh=site.meshes[name]
        )
        self.replica.listen(lambda change: self.siblings.changed())

    async def write(self, name: str, value: str) -> None:
        self.replica.actor = f"who-{self.name}"
        await self.replica.put(config(name, value))

    def value(self, name: str) -> str | None:
        found = self.replica.find(Key("Config", "default", name))
        return found.spec.data["k"] if found else None


@asynccontextmanager
async def boxes(root: Path) -> AsyncIterator[tuple[Site, list[Box]]]:
    site = Site(root, "a", "b", "c")
    made = [Box(site, name) for name in site.meshes]
    async with site.running():
        tasks = [asyncio.create_task(b.siblings.run()) for b in made]
        try:
            yield site, made
            assert not any(t.done() for t in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def test_what_is_written_at_one_node_is_seen_at_the_others(tmp_path: Path) -> None:
    async def body() -> None:
        async with boxes(tmp_path) as (site, (a, b, c)):
            await site.linked()
            await a.write("x", "1")
            await until(lambda: b.value("x") == c.value("x") == "1")
            await b.write("x", "2")
            await until(lambda: a.value("x") == c.value("x") == "2")
            await c.replica.remove(Key("Config", "default", "x"))
            await until(lambda: a.value("x") is None and b.value("x") is None)
            await until(lambda: len({n.siblings.print() for n in (a, b, c)}) == 1)
            assert not [r for n in (a, b, c) for r in n.records.items("journal")], "nobody lost anything"
            # a secret with a large document, and many at once
            for n in range(60):
                await a.write(f"n{n}", "x" * 40_000)
            await until(lambda: all(c.value(f"n{n}") for n in range(60)))

    asyncio.run(body())


def test_who_was_apart_hears_it_and_the_loser_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings_edge, "SAY", 0.5)

    async def body() -> None:
        async with boxes(tmp_path) as (site, (a, b, c)):
            await site.linked()
            await site.stop("b")  # its mesh is away; what it holds is not
            a.replica.hub_time, b.replica.hub_time = lambda: 1e9, lambda: 2e9
            await a.write("x", "first")
            await b.write("x", "later")
            await until(lambda: c.value("x") == "first")
            site.start("b")
            await until(lambda: a.value("x") == b.value("x") == c.value("x") == "later")
            (lost,) = a.records.items("journal")
            assert (lost["node"], lost["actor"], lost["loser"]) == ("a", "who-a", "edge")
            assert lost["lost"]["spec"] == {"data": {"k": "first"}}
            assert [e["reason"] for e in a.records.items("events")] == ["LocalChangeLost"]
            assert not b.records.items("events"), "who wrote it is told, nobody else"
            assert not b.replica.pending_of(["b"]) and [c.seq for c in b.replica.pending()] == [1]
            assert not a.replica.pending()

    asyncio.run(body())


def test_a_sibling_that_lies_does_away_with_no_change_that_its_maker_can_send(tmp_path: Path) -> None:
    async def body() -> None:
        async with boxes(tmp_path) as (site, (a, b, _)):
            await site.linked()
            await a.write("x", "1")
            await until(lambda: b.value("x") == "1")
            (change,) = a.replica.open_changes().values()
            at = (change.kind, change.namespace, change.name)
            lie = Finished(*change.dot, *at, None, "", "accept", "as you wished")
            answer = b.replica.answer

            def lies(ask: Digest) -> Answer:
                got = answer(ask)
                got.finished = [lie]
                return got

            b.replica.answer = lies  # type: ignore[method-assign]
            a.link._live.online = True
            await a.siblings.pull("b")
            assert a.replica.pending() and a.value("x") == "1"
            a.link._live.online = False  # then it has nobody else to ask
            await a.siblings.pull("b")
            assert not a.replica.pending()

    asyncio.run(body())
