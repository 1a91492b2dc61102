"""Three nodes of one site and a hub: any order of writes, partitions, restarts, lost answers and clock steps.

Real replica files, a real hub, the real exchange between nodes; only the wire between nodes is a function call, so that
each step meets whom the script says. Once all have met they show the same; once the hub was there too there is one
state, nothing is open any more, and every change that anybody made is in that state, was seen by who changed it, or is
in a journal.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.nodes.fleet import Fleet, app, doc
from tests.nodes.test_convergence import Loop, Value

from edgeward.agent.replica import Replica
from edgeward.core.errors import Unreachable
from edgeward.core.records import SqliteRecords
from edgeward.core.resource import Key
from edgeward.nodes.edge import NodeEdge
from edgeward.nodes.siblings_edge import Siblings
from edgeward.nodes.wire import PushAnswer, PushAsk

#: ``EDGEWARD_SITE_INTERLEAVINGS=1000`` for a long run.
EXAMPLES = int(os.environ.get("EDGEWARD_SITE_INTERLEAVINGS", "60"))
NODES = ("plant-1", "plant-2", "plant-3")


class Wire:
    """The mesh of one node: asks reach the others' handlers, words reach nobody."""

    def __init__(self, node: str, all: dict[str, Wire]) -> None:
        self.node, self.all = node, all
        self.on_peers: list[Callable[[], None]] = []
        self.verbs: dict[str, Callable[[str, bytes], Awaitable[bytes]]] = {}
        all[node] = self

    def peers(self) -> Mapping[str, Any]:
        return {n: None for n in self.all if n != self.node}

    def say(self, topic: str, data: bytes, peers: Iterable[str] | None = None) -> int:
        return 0

    def hear(self, topic: str, fn: Callable[[str, bytes, Any], None]) -> None:
        pass

    def serve(self, verb: str, handler: Callable[[str, bytes], Awaitable[bytes]]) -> None:
        self.verbs[verb] = handler

    async def ask(self, peer: str, verb: str, data: bytes = b"", timeout: float = 10.0) -> bytes:
        if peer not in self.all:
            raise Unreachable("no such node", resource=f"Node/{peer}")
        return await self.all[peer].verbs[verb](self.node, data)


class Node:
    def __init__(self, f: Fleet, name: str, path: Path, wires: dict[str, Wire]) -> None:
        self.f, self.name, self.path, self.wires = f, name, path, wires
        self.records = SqliteRecords()
        self.step = 0.0
        self.restart()

    def restart(self) -> None:
        self.replica = Replica(self.path, site="plant", node=self.name)
        self.replica.hub_time = lambda: time.time() + self.step
        self.edge = NodeEdge(self.name, self.replica, self.records)
        self.edge._live.online = True
        wire = Wire(self.name, self.wires)
        self.siblings = Siblings(
            self.name, "plant", replica=self.replica, records=self.records, link=self.edge, mesh=wire
        )

    def value(self, key: Key) -> Value:
        found = self.replica.find(key)
        return found.spec.replicas if found else None

    async def linked(self) -> None:
        self.edge._bus = await self.f.bus(self.name)


class World:
    numbers = itertools.count()

    def __init__(self, f: Fleet, root: Path, rule: str) -> None:
        n = next(self.numbers)
        self.f, self.rule = f, rule
        wires: dict[str, Wire] = {}
        self.nodes = [Node(f, name, root / f"{name}-{n}.db", wires) for name in NODES]
        self.keys = [Key("App", "default", f"a{n}"), Key("App", "default", f"b{n}")]
        #: number -> (object, what is wanted, what its writer saw, whose of several deletions)
        self.writes: dict[int, tuple[Key, Value, Value]] = {}
        self.hub_was_none: dict[Key, int] = {}

    def wanted(self, key: Key, number: int) -> Any:
        made = app(key.name, "plant", replicas=number)
        made.metadata.conflict = self.rule  # type: ignore[assignment]
        return made

    def hub_value(self, key: Key) -> Value:
        found = self.f.store.find(key)
        return found.spec.replicas if found else None

    async def write(self, who: int, key: Key, delete: bool) -> None:
        number = len(self.writes) + 2  # one replica is left out of a document
        seen = self.hub_value(key) if who < 0 else self.nodes[who].value(key)
        if delete and seen is None:
            return
        self.writes[number] = key, None if delete else number, seen
        if who < 0:
            if delete:
                await self.f.resources.delete(key, actor=f"w{number}")
            elif seen is None:
                await self.f.resources.create(self.wanted(key, number), actor=f"w{number}")
            else:
                await self.f.resources.replace(self.wanted(key, number), actor=f"w{number}")
        else:
            replica = self.nodes[who].replica
            replica.actor = f"w{number}"
            if delete:
                await replica.remove(key)
            else:
                await replica.put(self.wanted(key, number))
            assert self.nodes[who].value(key) == self.writes[number][1], "who writes it, sees it"
        self._look()

    def _look(self) -> None:
        for key in self.keys:
            if self.hub_value(key) is None:
                self.hub_was_none[key] = len(self.writes) + 1

    async def act(self, act: str, *args: int) -> None:
        node = self.nodes[args[0]]
        if act == "meet":
            other = self.nodes[args[1]]
            if other is not node:
                await node.siblings.pull(other.name)
        elif act == "restart":
            node.restart()
        elif act == "clock":
            node.step += args[1]
        else:
            await node.linked()
            if act == "push":
                await node.edge._push()
            elif act == "push lost":
                if changes := node.replica.pending():
                    sent = node.edge._dated(changes)
                    answer = await self.f.ask(node.name, "push", PushAsk(node.replica.store_id, sent), PushAnswer)
                    assert not answer.error, answer.error
            elif act == "push for":
                await node.siblings.push_for([self.nodes[args[1]].name])
            elif act == "sync":
                await node.edge._sync()
        self._look()

    async def gather(self) -> None:
        """All meet all, with no hub: they hold the same open, and show the same of it."""
        for _ in range(2):
            for a, b in itertools.permutations(range(3), 2):
                await self.act("meet", a, b)
        held = [n.replica.open_changes() for n in self.nodes]
        assert len({n.siblings.print() for n in self.nodes}) == 1, [h.keys() for h in held]
        for key in held[0]:
            assert len({n.value(key) for n in self.nodes}) == 1, [h[key] for h in held]

    async def heal(self) -> None:
        for _ in range(6):
            for a, b in itertools.permutations(range(3), 2):
                await self.act("meet", a, b)
            for n in range(3):
                await self.act("push", n)
            for n in range(3):
                await self.act("sync", n)
            if not any(n.replica.digest().open for n in self.nodes):
                break

    def one_state(self) -> None:
        for key in self.keys:
            values = [n.value(key) for n in self.nodes]
            assert values == [self.hub_value(key)] * 3, (str(key), values, self.hub_value(key))
        assert [n.replica.digest().open for n in self.nodes] == [[], [], []]

    def missing(self) -> list[int]:
        """Changes that nobody knows any more."""
        kept = [r for n in self.nodes for r in n.records.items("journal")] + self.f.records.items("journal")
        kept = [r for r in kept if r["name"] in (k.name for k in self.keys) and r["loser"]]
        docs = {r["lost"]["spec"]["replicas"] for r in kept if "lost" in r}
        actors = {r["actor"] for r in kept if r["loser"] == "edge"}
        found = []
        for number, (key, value, _) in self.writes.items():
            later = [w for n, w in self.writes.items() if n > number and w[0] == key]
            if f"w{number}" in actors or self.hub_value(key) == value:
                continue
            if value is None and (self.hub_was_none.get(key, 0) >= number or any(w[2] is None for w in later)):
                continue
            if value is not None and (value in docs or any(w[2] == value for w in later)):
                continue
            found.append(number)
        return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    made = Loop(tmp_path_factory.mktemp("site"))
    made.run(_third(made.f))
    yield made
    made.close()


async def _third(f: Fleet) -> None:
    await f.store.put(doc("Node", "plant-3", {"site": "plant"}))
    for live in f.nodes._live.values():
        live.down_after = 3600.0


who = st.integers(0, 2)
acts = st.one_of(
    st.tuples(st.just("write"), who, st.integers(0, 1), st.sampled_from([False, False, True])),
    st.tuples(st.just("write"), who, st.just(0), st.just(False)),
    st.tuples(st.just("hub"), st.integers(0, 1), st.sampled_from([False, False, True])),
    st.tuples(st.just("meet"), who, who),
    st.tuples(st.just("meet"), who, who),
    st.tuples(st.sampled_from(["push", "push lost", "sync", "restart"]), who),
    st.tuples(st.just("push for"), who, who),
    st.tuples(st.just("gather")),
    st.tuples(st.just("clock"), who, st.sampled_from([-3600, 3600, 400 * 86400])),
)


async def play(hub: Loop, rule: str, script: list[tuple[Any, ...]]) -> None:
    world = World(hub.f, hub.root, rule)
    for act, *args in script:
        if act == "write":
            await world.write(args[0], world.keys[args[1]], args[2])
        elif act == "hub":
            await world.write(-1, world.keys[args[0]], args[1])
        elif act == "gather":
            await world.gather()
        else:
            await world.act(act, *args)
    await world.gather()
    await world.heal()
    world.one_state()
    deadline = time.monotonic() + 60
    while missing := world.missing():
        assert time.monotonic() < deadline, f"vanished: {[(n, world.writes[n]) for n in missing]}"
        await hub.f.records._follow()
    for key in world.keys:
        if world.hub_value(key) is not None:  # the next example's view stays small
            await world.f.store.remove(key)


W, H, M = "write", "hub", "meet"


@pytest.mark.timeout(max(300, 3 * EXAMPLES))
@settings(
    max_examples=EXAMPLES,
    derandomize="EDGEWARD_SITE_INTERLEAVINGS" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# two who do not know of each other; one on top of another's; and the hub in between
@example(rule="cloud", script=[(W, 0, 0, False), (W, 1, 0, False), (M, 0, 1), (M, 1, 0)])
@example(rule="cloud", script=[(W, 0, 0, False), (M, 1, 0), (W, 1, 0, False), ("push", 0), ("push", 1)])
@example(rule="cloud", script=[(W, 0, 0, False), (M, 1, 0), ("push for", 1, 0), (W, 0, 1, False), ("push", 0)])
@example(rule="cloud", script=[(W, 0, 1, False), (W, 0, 0, False), (M, 1, 0), ("push for", 1, 0), (W, 0, 0, True)])
@example(
    rule="cloud",
    script=[("clock", 0, 3600), (W, 0, 0, False), (M, 1, 0), (W, 2, 0, False), (W, 1, 0, False), (M, 2, 1)],
)
@example(rule="edge", script=[(H, 0, False), ("sync", 0), (W, 0, 0, True), (M, 1, 0), ("push", 0), (H, 0, False)])
@given(rule=st.sampled_from(["cloud", "edge", "newest"]), script=st.lists(acts, max_size=20))
def test_the_nodes_of_a_site_and_the_hub_become_one(hub: Loop, rule: str, script: list[tuple[Any, ...]]) -> None:
    hub.run(play(hub, rule, script))
