"""What must never run twice: when a node that has no majority of its site starts it, lets it go on, and stops it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.core.pair import until
from tests.nodes.meshes import Site
from tests.nodes.test_verdicts import Link

from edgeward.agent.desired import Desired
from edgeward.agent.kinds import load
from edgeward.agent.replica import Replica
from edgeward.agent.standing import Standing
from edgeward.core import clock
from edgeward.core.errors import Unreachable
from edgeward.core.resource import CLUSTER, Key, Resource, decode, to_stored
from edgeward.nodes.mesh_wire import PeerInfo
from edgeward.nodes.wire import HubObject
from edgeward.workloads.edge import AppsEdge

load()

NAMES = ("a", "b", "c")
STOP_AFTER = 600.0  # longer than any test: whatever does not run is not stopped by it


def app(name: str, **disconnect: Any) -> Resource:
    spec = {
        "process": {"command": ["sleep", "1000"]},
        "replicas": len(NAMES),
        "stop": {"grace": "2s"},
        "disconnect": disconnect,
    }
    return decode({"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": name}, "spec": spec})


ONCE, ANY = app("once", stopAfter=STOP_AFTER), app("any")


class NoMesh:
    """One that hears nobody."""

    node, site, epoch = "a", "plant", 1

    def peers(self) -> Mapping[str, PeerInfo]:
        return {}

    def say(self, topic: str, data: bytes, peers: Any = None) -> int:
        return 0

    def hear(self, topic: str, fn: Any) -> None:
        pass

    def sign(self, data: bytes) -> bytes:
        return b""


class Uplink(Link):
    def report_site(self, said: Any) -> None:
        pass


async def no_hub(verb: str, data: bytes, timeout: float) -> bytes:
    raise Unreachable("no link")


class Box:
    """One node's run: what it is to do by its replica and its standing, and its apps."""

    def __init__(self, root: Path, mesh: Any, name: str = "a") -> None:
        self.said: dict[str, dict[str, Any]] = {}
        self.root, self.name = root / name, name
        self.root.mkdir(exist_ok=True)
        self.replica = Replica(self.root / "replica.db", site="plant", node=name)
        self.replica.apply_sync(objects(), revision=9, epoch="e", full=True)
        self.desired = Desired(self.replica, name, "plant")
        link = Uplink()
        link.online = False
        self.running: set[str] = set()
        self.apps: AppsEdge | None = None
        self.standing = Standing(
            name, "plant", self.root, mesh=mesh, replica=self.replica, link=link, ask_hub=no_hub,  # type: ignore[arg-type]
            event=lambda *_: None, moved=lambda: None, poke=self._poke, alive=self._alive,
        )  # fmt: skip
        self.desired.gone, self.desired.stops = self.standing.gone, self.standing.stops
        self.tasks: list[asyncio.Task[Any]] = []

    def _poke(self, namespace: str, name: str) -> None:
        if self.apps is not None:
            self.apps.poke(namespace, name)

    def _alive(self, namespace: str, name: str) -> bool:
        return name in self.running if self.apps is None else self.apps.alive(namespace, name)

    def wanted(self) -> set[str]:
        return {name for _, name in self.desired.apps()}

    def start(self) -> None:
        """With apps that are real processes."""
        self.apps = AppsEdge(
            node=self.name, site="plant", data_dir=self.root, source=self.desired, event=lambda *_: None,
            report=lambda namespace, name, status: self.said.update({name: status or {}}),
        )  # fmt: skip
        self.tasks = [asyncio.create_task(self.standing.run()), asyncio.create_task(self.apps.run())]

    async def stop(self, *, leave: bool = False) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.apps is not None:
            await self.apps.shutdown(leave=leave)
        self.replica.close()

    def pids(self) -> dict[str, int]:
        """App to the process of its one instance that runs."""
        said = ((name, i) for name, status in self.said.items() for i in status.get("instances", []))
        return {name: i["pid"] for name, i in said if i["phase"] == "Running"}


def objects() -> list[HubObject]:
    docs = [
        {"apiVersion": "edgeward/v1", "kind": "Node", "metadata": {"name": n}, "spec": {"site": "plant"}} for n in NAMES
    ]
    found = [*(decode(d) for d in docs), ONCE, ANY]
    status = {"Node": {"mesh": "127.0.0.1:1"}}
    return [
        HubObject(r.kind, r.key.namespace, r.key.name, n, to_stored(r), status.get(r.kind))
        for n, r in enumerate(found, 1)
    ]


class Time:
    """A test's own clocks."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return 5000.0 + self.passed

    def steady(self) -> float:
        return 1.8e9 + self.passed


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Iterator[Time]:
    it = Time()
    monkeypatch.setattr(clock, "monotonic", it.monotonic)
    monkeypatch.setattr(clock, "steady", it.steady)
    yield it


def vote(box: Box, *present: str) -> None:
    """The site's vote as this node sees it, when it hears these."""
    verdicts = box.standing.verdicts
    verdicts.council.members(NAMES, clock.monotonic())
    for name, member in verdicts.council._others.items():
        member.present = name in present
    verdicts._vote(clock.monotonic())


def test_a_run_that_had_no_majority_yet_starts_nothing_that_must_not_run_twice(tmp_path: Path, time: Time) -> None:
    box = Box(tmp_path, NoMesh())
    for _ in range(3):  # before the first vote, after it, and however long that lasts
        assert box.standing.stops(ONCE) and not box.standing.stops(ANY)
        assert box.wanted() == {"any"}
        vote(box)
        time.passed += STOP_AFTER
    vote(box, "b")
    assert box.wanted() == {"once", "any"}
    # it had one: now it has its time, also to start it again
    vote(box)
    time.passed += STOP_AFTER - 1
    assert box.wanted() == {"once", "any"}
    time.passed += 1
    assert box.wanted() == {"any"}


def test_what_goes_on_since_the_run_before_has_its_time_and_no_more(tmp_path: Path, time: Time) -> None:
    box = Box(tmp_path, NoMesh())
    box.running = {"once"}
    vote(box, "b")
    vote(box)
    time.passed += STOP_AFTER / 2
    assert box.wanted() == {"once", "any"}
    for _ in range(2):  # each restart of the agent must not count it anew: others start it by their clocks
        box.replica.close()
        box = Box(tmp_path, NoMesh())
        box.running = {"once"}
        assert box.wanted() == {"once", "any"}
        vote(box)
        time.passed += STOP_AFTER / 4
    assert box.wanted() == {"any"}, "alone for as long as it says"
    box.running = set()
    vote(box, "c")
    assert box.wanted() == {"once", "any"}
    box.replica.close()
    box = Box(tmp_path, NoMesh())
    box.running = {"once"}
    assert box.wanted() == {"once", "any"}, "the run before had a majority to its end"
    assert box.standing.verdicts.alone() == 0.0


def test_of_a_node_that_was_deleted_nothing_is_remembered(tmp_path: Path) -> None:
    box = Box(tmp_path, NoMesh())
    vote(box, "b")
    verdicts = box.standing.verdicts
    box.standing._told["b"] = "dead"
    shown = lambda: box.replica.get(Key("Node", CLUSTER, "b")).status.get("verdict")  # noqa: E731
    assert shown()
    assert {"b", "c"} <= verdicts._since.keys()
    verdicts._names = lambda: ["c"]
    verdicts._members(clock.monotonic())
    assert "c" in verdicts._since
    assert "b" not in {**verdicts._since, **verdicts.verdicts, **box.standing._told}
    assert shown() is None, "a new box of that name has no verdict yet"


def test_after_a_power_cut_it_waits_for_the_others(tmp_path: Path) -> None:
    """Real meshes, votes and processes; all but one node are off."""

    async def body() -> None:
        site = Site(tmp_path, *NAMES)
        boxes = {name: Box(tmp_path, site.meshes[name], name) for name in ("a", "b")}
        for name, box in boxes.items():
            site.start(name)
            box.start()
        try:
            await until(lambda: all(box.pids().keys() == {"once", "any"} for box in boxes.values()))
            # the power goes: no process of them is left
            before = boxes["a"].pids()
            for name in tuple(boxes):
                box = boxes.pop(name)
                await site.stop(name)
                left = box.pids()
                await box.stop(leave=True)
                for pid in left.values():
                    os.killpg(os.getpgid(pid), signal.SIGKILL)
            # one is switched on, and hears nobody
            for name in NAMES:
                site.make(name)
            a = boxes["a"] = Box(tmp_path, site.meshes["a"], "a")
            site.start("a")
            a.start()
            await until(lambda: "any" in a.pids() and "once" in a.said)
            await until(lambda: a.standing.verdicts.alone() > 2)
            assert "once" not in a.pids()
            assert a.apps is not None and not a.apps.alive("default", "once")
            # the next one is switched on
            boxes["b"] = Box(tmp_path, site.meshes["b"], "b")
            site.start("b")
            boxes["b"].start()
            await until(lambda: all(box.pids().keys() == {"once", "any"} for box in boxes.values()))
            assert a.pids()["once"] != before["once"]
        finally:
            for box in boxes.values():
                await site.stop(box.name)
                await box.stop()

    asyncio.run(body())
