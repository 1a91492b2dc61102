"""What a node runs while a Rollout is on its way, read from a real replica."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tests.agent.test_desired import doc

from edgeward.agent.desired import Desired
from edgeward.agent.replica import Replica
from edgeward.core.registry import kinds
from edgeward.core.resource import Key, Resource, to_stored
from edgeward.nodes.wire import HubObject
from edgeward.workloads.release import digest_of, parts_of

KEY = Key("App", "default", "web")
MADE = "2026-02-01T00:00:00Z"


def app(word: str, generation: int, **more: Any) -> Resource:
    spec = {"process": {"command": ["run"], "args": [word]}, **more}
    return doc("App", "web", spec, uid="u", generation=generation, creationTimestamp="2026-01-01T00:00:00Z")


def version(of: Resource) -> dict[str, Any]:
    parts = parts_of(to_stored(of).spec, kinds.get("App").at_once)
    return {"generation": of.metadata.generation, "digest": digest_of(parts), "parts": parts}


def status(phase: str, of: Resource, baseline: Resource | None, *nodes: str, until: float = 0.0) -> dict[str, Any]:
    moved = version(of)
    target = {"kind": "App", "name": "web", "uid": "u", "generation": moved["generation"], "digest": moved["digest"]}
    if baseline is not None:
        target["baseline"] = version(baseline)
    groups = [{"name": "g", "nodes": list(nodes), "until": until}]
    return {"phase": phase, "run": "r", "targets": [target], "groups": groups}


class Plant:
    """A node's replica, and what the hub tells it."""

    def __init__(self, path: Path) -> None:
        self.path, self.now, self.revision = path / "r.db", 0.0, 0
        self.open()

    def open(self) -> None:
        self.replica = Replica(self.path, site="plant")
        self.desired = Desired(self.replica, "plant-1", "plant", lambda: self.now)

    def hear(self, *objects: Resource, rollout: dict[str, Any] | None = None, **spec: Any) -> None:
        self.revision += 1
        targets = [{"kind": "App", "name": "web"}]
        policy = doc("Rollout", "web", {"targets": targets, **spec}, creationTimestamp=MADE)
        told = [doc("Node", "plant-1", {"site": "plant"}), *objects, *([policy] if rollout is not None else [])]
        self.replica.apply_sync(
            [
                HubObject(
                    r.kind, r.key.namespace, r.key.name, self.revision, to_stored(r),
                    rollout if r.kind == "Rollout" else None,
                )
                for r in told
            ],
            revision=self.revision, epoch="e", full=True,
        )  # fmt: skip

    @property
    def runs(self) -> tuple[int, str] | None:
        """Generation and word of what runs here."""
        found = self.desired.apps().get(("default", "web"))
        return (found[0].metadata.generation, found[0].spec.process.args[0]) if found else None


def test_what_is_declared_only_when_the_run_has_come_here(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    old, new = app("old", 1), app("new", 2)
    plant.hear(old)
    assert plant.runs == (1, "old")
    plant.hear(old, rollout=status("Succeeded", old, old))
    plant.hear(new, rollout=status("Succeeded", old, old))
    assert plant.runs == (1, "old"), "the hub has not begun"
    plant.hear(new, rollout=status("Running", new, old, "other"))
    assert plant.runs == (1, "old")
    plant.hear(new, rollout=status("Running", new, old, "plant-1"))
    assert plant.runs == (2, "new")
    plant.open()  # the agent is started again, with or without a link
    assert plant.runs == (2, "new")
    plant.hear(new, rollout=status("Failed", new, old, "plant-1"))
    assert plant.runs == (1, "old")
    plant.hear(new)
    assert plant.runs == (2, "new"), "without its Rollout nothing keeps it back"


def test_of_what_is_deleted_nothing_is_remembered(tmp_path: Path) -> None:
    plant = Plant(tmp_path)

    def kept() -> int:
        query = "SELECT count(*) FROM meta WHERE k LIKE 'rolling.%'"
        return int(plant.replica._db.execute(query).fetchone()[0])

    old, new = app("old", 1), app("new", 2)
    plant.hear(new, rollout=status("Running", new, old, "plant-1"))
    assert (plant.runs, kept()) == ((2, "new"), 1)
    plant.open()  # also when the agent was started again since
    plant.hear(rollout=status("Running", new, old, "plant-1"))
    plant.desired.deleted(KEY)
    assert (plant.runs, kept()) == (None, 0)
    plant.hear(new, rollout=status("Running", new, old, "other"))
    assert (plant.runs, kept()) == ((1, "old"), 1), "whoever comes under its name begins anew"


def test_what_takes_effect_at_once_does_in_the_middle_of_a_run(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    old, new = app("old", 1), app("new", 2)
    plant.hear(new, rollout=status("Running", new, old, "plant-1"))
    more = app("new", 3, replicas=4)
    plant.hear(more, rollout=status("Running", new, old, "plant-1"))
    assert plant.runs == (3, "new"), "more instances of what it has, not a step back"
    plant.hear(more, rollout=status("Running", new, old, "other"))
    assert plant.runs == (1, "old")
    assert plant.desired.apps()["default", "web"][1] == 4


def test_what_came_after_its_rollout_waits(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    late = app("new", 1)
    late.metadata.creationTimestamp = "2026-03-01T00:00:00Z"
    plant.hear(late, rollout={})
    assert plant.runs is None
    said = {"phase": "Pending", "instances": [], "message": "waits for Rollout/web"}
    assert plant.desired.waits(KEY) == plant.desired.elsewhere(KEY) == said
    plant.hear(late, rollout=status("Running", late, None, "other"))
    assert plant.runs is None
    plant.hear(late, rollout=status("Running", late, None, "plant-1"))
    assert plant.runs == (1, "new")
    assert plant.desired.waits(KEY) == {}


def test_a_site_that_holds_stays_where_it_is_until_it_says_so(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    old, new, newer = app("old", 1), app("new", 2), app("newer", 3)
    plant.hear(old, rollout=status("Succeeded", old, old))
    assert plant.runs == (1, "old")
    plant.hear(new, rollout=status("Running", new, old, "plant-1"), hold=True)
    assert plant.runs == (1, "old")
    plant.hear(newer, rollout=status("Running", newer, new, "plant-1"), hold=True)
    plant.open()
    assert plant.runs == (1, "old"), "even though the hub does not say any more what that was"
    plant.hear(newer, rollout=status("Running", newer, new, "plant-1"), hold=False)
    assert plant.runs == (3, "newer")
    plant.hear(newer, rollout=status("Failed", newer, new, "plant-1"), hold=True)
    assert plant.runs == (3, "newer")


def test_who_heard_of_it_after_the_window_does_not_begin(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    old, new = app("old", 1), app("new", 2)
    plant.hear(old, rollout=status("Succeeded", old, old))
    plant.now = 101.0
    plant.hear(new, rollout=status("Running", new, old, "plant-1", until=100.0))
    assert plant.runs == (1, "old")
    plant.hear(new, rollout=status("Running", new, old, "plant-1", until=200.0))
    assert plant.runs == (2, "new")
    plant.now = 300.0
    assert plant.runs == (2, "new"), "a window that closes takes nothing back"


def test_what_people_change_here_waits_for_nobody(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    old, mine = app("old", 1), app("mine", 1)
    plant.hear(old, rollout=status("Succeeded", old, old))
    assert plant.runs == (1, "old")
    asyncio.run(plant.replica.put(mine))
    assert plant.runs == (2, "mine")
    change = plant.replica.pending()[0]
    taken = app("mine", 2)
    plant.replica.resolve(change.seq, HubObject(*(KEY.kind, KEY.namespace, KEY.name), 9, to_stored(taken)))
    assert not plant.replica.local_change(KEY)
    assert plant.runs == (2, "mine"), "the hub has taken it over: no step back until its run comes here"
    plant.open()
    assert plant.runs == (2, "mine")
    plant.hear(taken, rollout=status("Running", taken, old, "other"))
    assert plant.runs == (2, "mine")
    plant.hear(taken, rollout=status("Failed", taken, old, "plant-1"))
    assert plant.runs == (1, "old"), "when its run fails it goes back like any"
    plant.hear(taken, rollout=status("Succeeded", taken, taken))
    newer = app("newer", 3)
    plant.hear(newer, rollout=status("Succeeded", taken, taken))
    assert plant.runs == (2, "mine"), "and what the hub declares next is a run as any"


def test_an_override_of_the_site_holds_for_the_baseline_too(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    old, new = app("old", 1), app("new", 2)
    patch = {"process": {"command": ["mine"]}, "replicas": 3}
    own = doc(
        "Override",
        "o",
        {"target": {"kind": "App", "name": "web", "namespace": "default"}, "site": "plant", "patch": patch},
    )
    plant.hear(new, own, rollout=status("Running", new, old, "other"))
    found, count = plant.desired.apps()["default", "web"]
    assert (found.spec.process.command, found.spec.process.args, count) == (["mine"], ["old"], 3)


def test_an_app_that_was_made_anew_is_another_one(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    old = app("old", 1)
    plant.hear(old, rollout=status("Succeeded", old, old))
    assert plant.runs == (1, "old")
    anew = app("anew", 1)
    anew.metadata.uid, anew.metadata.creationTimestamp = "v", "2026-05-01T00:00:00Z"
    plant.hear(anew, rollout=status("Succeeded", old, old), hold=True)
    assert plant.runs is None


def test_a_site_that_scales_in_the_middle_of_a_run_does_not_take_the_new_version_with_it(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    old, new = app("old", 1), app("new", 2)
    plant.hear(new, rollout=status("Running", new, old, "other"))
    assert plant.runs == (1, "old")
    asyncio.run(plant.replica.put(app("new", 2, replicas=7)))
    assert plant.runs == (1, "old")
    assert plant.desired.apps()["default", "web"][1] == 7


def test_what_comes_is_fetched_before_and_the_hub_is_told(tmp_path: Path) -> None:
    def price(word: str, generation: int) -> Resource:
        spec = {"runtime": "python", "source": {"inline": f"def handler(e, c): return {word!r}"}}
        return doc("Function", "price", spec, uid="f", generation=generation, creationTimestamp="2026-01-01T00:00:00Z")

    def of(phase: str, moved: Resource, baseline: Resource, *nodes: str) -> dict[str, Any]:
        plain = [
            (r.metadata.generation, parts_of(to_stored(r).spec, kinds.get("Function").at_once))
            for r in (moved, baseline)
        ]
        new, old = ({"generation": g, "digest": digest_of(p), "parts": p} for g, p in plain)
        target = {
            "kind": "Function",
            "name": "price",
            "uid": "f",
            "generation": new["generation"],
            "digest": new["digest"],
        }
        return {
            "phase": phase,
            "targets": [{**target, "baseline": old}],
            "groups": [{"name": "g", "nodes": list(nodes)}],
        }

    plant = Plant(tmp_path)
    old, new = price("old", 1), price("new", 2)
    policy: dict[str, Any] = {"targets": [{"kind": "Function", "name": "price"}]}

    def coming(status: dict[str, Any], **spec: Any) -> list[int]:
        plant.hear(new, rollout=status, **policy | spec)
        return [f.metadata.generation for f in plant.desired.coming()]

    assert coming(of("Succeeded", old, old)) == [2], "as soon as it is heard of"
    assert coming(of("Running", new, old, "other")) == [2]
    assert [f.metadata.generation for f in plant.desired.functions()] == [1]
    here = {new.key: True}
    assert plant.desired.fetched(here) == {Key("Rollout", "default", "web"): {"prefetched": ["Function/price@2"]}}
    assert plant.desired.fetched({new.key: False}) == {}
    assert coming(of("Running", new, old, "plant-1")) == []
    assert coming(of("RolledBack", new, old, "other")) == [], "what was given up is not fetched"
    assert coming(of("Running", new, old, "other"), prefetch=False) == []


def test_an_app_that_a_run_will_bring_is_known_before(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    old, new = app("old", 1), app("new", 2)

    def coming(given: dict[str, Any], *objects: Resource, **spec: Any) -> list[tuple[int, str]]:
        plant.hear(*(objects or (new,)), rollout=given, **spec)
        found = plant.desired.coming_apps()
        return [(a.metadata.generation, a.spec.process.args[0]) for a in found.values()]

    assert coming(status("Running", new, old, "other")) == [(2, "new")]
    assert plant.runs == (1, "old")
    assert coming(status("Running", new, None, "other")) == [(2, "new")], "of which nothing runs here yet"
    assert plant.desired.fetched({KEY: True}) == {Key("Rollout", "default", "web"): {"prefetched": ["App/web@2"]}}
    assert coming(status("Running", new, old, "plant-1")) == []
    assert coming(status("RolledBack", new, old, "other")) == []
    assert coming(status("Running", new, old, "other"), prefetch=False) == []
    away = app("new", 2, placement={"nodeSelector": {"no": "such"}})
    assert coming(status("Running", away, old, "other"), away) == [], "not placed here"


def test_on_a_full_disk_what_runs_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = Plant(tmp_path)
    old, new = app("old", 1), app("new", 2)
    plant.hear(old, rollout=status("Succeeded", old, old))
    assert plant.runs == (1, "old")
    plant.hear(new, rollout=status("Running", new, old, "plant-1"))

    def full(*_: str) -> str:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as m:
        m.setattr(plant.replica, "set_meta", full)
        assert plant.runs == (2, "new")
        assert plant.runs == (2, "new")
    assert plant.runs == (2, "new")  # and written now
    plant.open()
    plant.hear(new, rollout=status("Failed", new, old, "plant-1"), hold=True)
    assert plant.runs == (2, "new")
