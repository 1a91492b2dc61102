"""Rollouts: whatever nodes say, do not say and go through, no more are touched than a group may have.

The model is a fleet whose nodes hear the hub only while they are online, decide by :func:`release.choose` alone, and
say what they run when they are heard. Chance drives it; what must hold is looked at after every step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.workloads.outcome import Node, Target, has_all, is_back, verdict
from edgeward.workloads.release import Declared, Handled, Status, Version, choose, digest_of, read_status, with_parts
from edgeward.workloads.rollout import REST, Amount, GroupRules, Rules, Step, step

MADE = "2026-01-01T00:00:00Z"
LATER = "2026-02-01T00:00:00Z"


@dataclass
class Box:
    """A node as it really is. ``fate``: what the new version does to it."""

    name: str
    site: str
    fate: str = "good"
    online: bool = True
    held: bool = False
    heard: Status = field(default_factory=Status)
    declared: tuple[int, str] = (1, "old")
    runs: tuple[int, str] | None = (1, "old")
    said: dict[str, object] = field(default_factory=dict)

    def look(self, status: Status, declared: tuple[int, str], now: float, created: str) -> None:
        """Hears the hub, if it can, and does what follows."""
        if not self.online:
            return
        self.heard, self.declared = status, declared
        generation, version = declared
        d = Declared("App", "web", "u", generation, digest_of({"v": version}), created)
        which = choose(status, MADE, d, self.name, now, has=self.runs == declared)
        if self.held:
            pass
        elif which == "declared":
            self.runs = declared
        elif which == "none":
            self.runs = None
        else:
            target = status.targets[0]
            assert target.baseline is not None
            self.runs = (target.baseline.generation, target.baseline.parts["v"])
        if self.runs is None:
            self.said = {}
            return
        self.said = {"observedGeneration": self.runs[0], "phase": "Running"}
        if self.runs[1] == "bad":
            self.said |= {
                "good": {},
                "slow": {"phase": "Degraded"},
                "fails": {"takenBack": "bad", "wanted": "bad", "message": "it ended"},
            }.get(self.fate, {})
            if self.fate == "dies":
                self.online, self.said = False, {}


class Fleet:
    def __init__(self, rules: Rules, boxes: list[Box], created: str = MADE) -> None:
        self.rules, self.boxes, self.created = rules, {b.name: b for b in boxes}, created
        self.status, self.now = Status(), 0.0
        self.declared = (1, "old")
        self.touched: dict[str, set[str]] = {}
        self.last = Step(self.status)

    def targets(self) -> list[Target]:
        generation, version = self.declared
        parts = {"v": version}
        reports = {b.name: b.said for b in self.boxes.values() if b.said}
        names = frozenset(self.boxes)
        return [Target("App", "web", "u", generation, digest_of(parts), parts, self.created, names, reports)]

    def declare(self, version: str) -> None:
        self.declared = (self.declared[0] + 1, version)

    def step(self, seconds: float = 0.0) -> Step:
        self.now += seconds
        nodes = [Node(b.name, b.site, {}, b.online, b.held) for b in self.boxes.values()]
        self.last = step(self.rules, self.status, self.targets(), nodes, self.now, MADE)
        # as it is stored and read again
        self.status = read_status(msgspec.json.decode(msgspec.json.encode(self.last.status)))
        return self.last

    def hear(self) -> None:
        for box in self.boxes.values():
            box.look(self.status, self.declared, self.now, self.created)

    def settle(self, rounds: int = 400, seconds: float = 20.0) -> str:
        for _ in range(rounds):
            self.hear()
            self.step(seconds)
            if self.status.phase in ("Succeeded", "RolledBack"):
                self.hear()
                break
        return self.status.phase

    def running(self, version: str) -> set[str]:
        return {b.name for b in self.boxes.values() if b.runs is not None and b.runs[1] == version}


def boxes(count: int, sites: int = 3) -> list[Box]:
    return [Box(f"n{n:03}", f"s{n % sites}") for n in range(count)]


def by_site(name: str, site: str, **more: object) -> GroupRules:
    return GroupRules(name, takes=lambda n: n.site == site, **more)  # type: ignore[arg-type]


def ready(rules: Rules, many: list[Box]) -> Fleet:
    """A fleet whose old version is the baseline."""
    fleet = Fleet(rules, many)
    fleet.step()
    assert fleet.status.phase == "Succeeded"
    fleet.hear()
    return fleet


# -- whatever happens ----------------------------------------------------------------------------------------------


def batch_of(rules: Rules, group: str, total: int) -> int:
    how = next((g for g in rules.groups if g.name == group), None)
    return how.batch.of(total, least=1) if how is not None and how.batch is not None else total


def check(fleet: Fleet, before: str = "") -> None:
    """What must hold after every step. ``before``: the phase before it."""
    status, rules = fleet.status, fleet.rules
    let_on = {n for g in status.groups for n in g.nodes}
    # one group's batch at most has yet to prove itself
    at_it = [g for g in status.groups if any(n in status.updating for n in g.nodes)]
    assert len(at_it) <= 1
    for g in at_it:
        assert sum(n in status.updating for n in g.nodes) <= batch_of(rules, g.name, g.total)
    # in order: a group begins when those before it are done
    begun = [bool(g.nodes) for g in status.groups]
    for n, group in enumerate(status.groups):
        if begun[n]:
            assert all(g.phase == "Succeeded" for g in status.groups[:n]) or status.phase in ("Failed", "RolledBack")
        if (how := next((r for r in rules.groups if r.name == group.name), None)) and how.size is not None:
            assert len(group.nodes) <= how.size.of(len(fleet.boxes), least=1)
    assert set(status.updating) <= let_on
    if status.phase == "RolledBack" and before != "RolledBack":
        # said only when all that can be heard said so themselves
        heard = [b for b in fleet.boxes.values() if b.online and b.name in let_on]
        assert all(b.said.get("observedGeneration") == 1 for b in heard)
    # nobody has it who was not let on
    if status.phase != "Succeeded":
        moved = fleet.running("bad")
        assert moved <= fleet.touched.setdefault("bad", set()) | let_on
        fleet.touched["bad"] |= let_on


@st.composite
def fleets(draw: st.DrawFn) -> tuple[Rules, list[Box], random.Random]:
    many = boxes(draw(st.integers(1, 14)))
    amounts = st.one_of(
        st.none(), st.builds(Amount, st.integers(1, 5)), st.builds(Amount, st.integers(1, 60), st.just(True))
    )
    declared = []
    for name in draw(st.lists(st.sampled_from(["s0", "s1", "s2", "any"]), unique=True, max_size=4)):
        more = {"size": draw(amounts), "batch": draw(amounts), "approval": draw(st.booleans())}
        declared.append(GroupRules(name, **more) if name == "any" else by_site(name, name, **more))
    failures = draw(st.sampled_from([Amount(0), Amount(1), Amount(20, True)]))
    rules = Rules(tuple(declared), failures, silent_after=100.0, timeout=100.0)
    for box in many:
        box.fate = draw(st.sampled_from(["good", "good", "good", "slow", "fails", "dies"]))
    return rules, many, random.Random(draw(st.integers(0, 2**32)))


def _happen(fleet: Fleet, chance: random.Random) -> None:
    box = chance.choice(list(fleet.boxes.values()))
    match chance.randrange(8):
        case 0:
            box.online = not box.online
        case 1:
            box.held = not box.held
        case 2:
            box.said = {}  # its report was lost
        case 3 if chance.random() < 0.1:
            fleet.rules = msgspec.structs.replace(fleet.rules, cancelled=fleet.status.run)
        case 4:
            fleet.rules = msgspec.structs.replace(fleet.rules, paused=chance.random() < 0.3)
        case _:
            box.look(fleet.status, fleet.declared, fleet.now, fleet.created)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(fleets())
def test_whatever_happens(drawn: tuple[Rules, list[Box], random.Random]) -> None:
    rules, many, chance = drawn
    for box in many:
        if box.fate == "dies":
            box.fate = "good" if chance.random() < 0.5 else "slow"  # a box that is away for good is tested below
    fleet = ready(rules, many)
    fleet.declare("bad")
    for _ in range(120):
        _happen(fleet, chance)
        before = fleet.status.phase
        fleet.step(chance.choice([0.0, 1.0, 15.0, 45.0]))
        check(fleet, before)
        if chance.random() < 0.2 and (waits := [g for g in fleet.status.groups if g.phase == "Waiting"]):
            _approve(fleet, waits[0].name)
    # the storm is over: it comes to an end
    fleet.rules = msgspec.structs.replace(fleet.rules, paused=False)
    for box in fleet.boxes.values():
        box.online, box.held = True, False
    for _ in range(600):
        fleet.hear()
        fleet.step(20.0)
        check(fleet)
        for g in fleet.status.groups:
            if g.phase == "Waiting":
                _approve(fleet, g.name)
        if fleet.status.phase in ("Succeeded", "RolledBack"):
            break
    fleet.hear()
    assert fleet.status.phase in ("Succeeded", "RolledBack"), fleet.status
    assert fleet.running("bad") == (set(fleet.boxes) if fleet.status.phase == "Succeeded" else set())
    doing_badly = {b.name for b in many if b.fate != "good"}
    if fleet.status.phase == "Succeeded":
        assert len(doing_badly & {n for g in fleet.status.groups for n in g.nodes}) <= rules.failures.of(len(many))


def _approve(fleet: Fleet, group: str) -> None:
    approved = fleet.rules.approved | {f"{fleet.status.run}/{group}"}
    fleet.rules = msgspec.structs.replace(fleet.rules, approved=approved)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_no_more_bad_boxes_than_one_batch(seed: int, batch: int) -> None:
    chance = random.Random(seed)
    many = boxes(60)
    for box in chance.sample(many, 9):
        box.fate = chance.choice(["fails", "slow", "dies"])
    fleet = ready(Rules((GroupRules("all", batch=Amount(batch)),), silent_after=60, timeout=60), many)
    fleet.declare("bad")
    ever: set[str] = set()
    for _ in range(300):
        for box in many:
            if chance.random() < 0.7:
                box.look(fleet.status, fleet.declared, fleet.now, MADE)
                ever |= {box.name} if box.runs == fleet.declared else set()
        fleet.step(10.0)
        check(fleet)
        assert len({b.name for b in many if b.fate != "good"} & ever) <= batch
        if fleet.status.phase == "RolledBack":
            break
    assert fleet.status.phase == "RolledBack"
    for box in many:
        box.online = True
    fleet.hear()
    assert fleet.running("old") == set(fleet.boxes)  # also who was silent, when it hears


# -- one thing at a time -------------------------------------------------------------------------------------------

RULES = Rules((by_site("first", "s0", window=30.0), by_site("second", "s1", window=30.0)))


def test_group_by_group_after_the_health_window() -> None:
    fleet = ready(RULES, boxes(6))
    fleet.declare("new")
    fleet.hear()
    assert fleet.running("new") == set()  # the hub has not begun: nobody takes it
    fleet.step()
    assert [g.name for g in fleet.status.groups] == ["first", "second", REST]
    fleet.hear()
    assert fleet.running("new") == {"n000", "n003"}
    fleet.step(1.0)
    assert fleet.last.look == 30.0
    fleet.step(29.0)
    assert fleet.status.groups[0].phase == "Running"
    fleet.step(1.0)
    assert fleet.status.groups[0].phase == "Succeeded"
    assert fleet.status.groups[0].done == 2
    fleet.hear()
    assert fleet.running("new") == {"n000", "n001", "n003", "n004"}
    assert fleet.settle() == "Succeeded"
    assert [g.phase for g in fleet.status.groups] == ["Succeeded"] * 3
    assert fleet.running("new") == set(fleet.boxes)


def test_a_bad_version_stops_in_the_first_group() -> None:
    fleet = ready(RULES, boxes(6))
    fleet.boxes["n003"].fate = "fails"
    fleet.declare("bad")
    assert fleet.settle() == "RolledBack"
    assert fleet.status.groups[0].failed == {"n003": "App/web: it ended"}
    assert not fleet.status.groups[1].nodes
    assert fleet.running("old") == set(fleet.boxes)
    assert "n003" in fleet.status.message
    # and a new box takes what is proven
    fleet.boxes["n100"] = Box("n100", "s0", runs=None)
    fleet.hear()
    assert fleet.running("old") == set(fleet.boxes)


def test_the_budget_lets_some_fail() -> None:
    fleet = ready(Rules((GroupRules("all", batch=Amount(2)),), failures=Amount(10, percent=True)), boxes(20))
    for name in ("n002", "n011"):
        fleet.boxes[name].fate = "fails"
    fleet.declare("bad")
    assert fleet.settle() == "Succeeded"
    assert set(fleet.status.groups[0].failed) == {"n002", "n011"}


def test_what_was_there_before_the_rollout_goes_on_and_what_came_after_waits() -> None:
    fresh = Declared("App", "web", "u", 1, "d", LATER)
    assert choose(Status(), MADE, fresh, "n", 0.0) == "none"
    assert choose(Status(), LATER, fresh, "n", 0.0) == "declared"
    fleet = Fleet(RULES, boxes(6), created=LATER)
    for box in fleet.boxes.values():
        box.runs = None
    assert fleet.settle() == "Succeeded"
    assert fleet.running("old") == set(fleet.boxes)
    fleet = Fleet(RULES, boxes(6), created=LATER)
    fleet.declared = (1, "bad")
    for box in fleet.boxes.values():
        box.runs, box.fate = None, "fails"
    assert fleet.settle() == "RolledBack"
    assert all(b.runs is None for b in fleet.boxes.values())


def test_an_offline_node_is_not_let_on_and_takes_it_when_all_is_done() -> None:
    fleet = ready(RULES, boxes(6))
    fleet.boxes["n003"].online = False
    fleet.declare("new")
    assert fleet.settle() == "Succeeded"
    assert fleet.status.groups[0].nodes == ["n000"]
    assert "n003" not in fleet.running("new")
    fleet.boxes["n003"].online = True
    fleet.hear()
    assert fleet.running("new") == set(fleet.boxes)


def test_a_node_that_goes_silent_after_it_was_let_on_has_failed() -> None:
    fleet = ready(RULES, boxes(6))
    fleet.declare("new")
    fleet.step()
    fleet.boxes["n000"].online = False
    assert fleet.settle() == "RolledBack"
    assert "silent" in fleet.status.groups[0].failed["n000"]
    assert "n000" in fleet.status.message  # not heard since


def test_a_box_that_dies_of_it_has_failed_even_when_others_took_its_share() -> None:
    parts = {"v": 2}
    everyone = [Node("a"), Node("b")]

    def target(*expected: str) -> Target:
        return Target("App", "web", "u", 2, digest_of(parts), parts, LATER, frozenset(expected))

    rules = Rules((GroupRules("one", size=Amount(1)),), silent_after=10.0)
    status = step(rules, Status(), [target("a")], everyone, 0.0, MADE).status
    assert status.groups[0].nodes == ["a"]
    dead = [Node("a", online=False), Node("b")]
    status = step(rules, status, [target("b")], dead, 1.0, MADE).status
    assert (status.groups[0].nodes, status.phase) == (["a"], "Running")
    status = step(rules, status, [target("b")], dead, 12.0, MADE).status
    assert "silent" in status.groups[0].failed["a"]
    # one that is well and only has nothing of it any more is none of the run's
    status = step(rules, Status(), [target("a")], everyone, 0.0, MADE).status
    assert step(rules, status, [target("b")], everyone, 1.0, MADE).status.groups[0].nodes == ["b"]


def test_pause_approve_cancel_and_resume() -> None:
    fleet = ready(
        msgspec.structs.replace(RULES, groups=(RULES.groups[0], by_site("second", "s1", approval=True))), boxes(6)
    )
    fleet.declare("new")
    for _ in range(5):
        fleet.hear()
        fleet.step(40.0)
    assert (fleet.status.phase, fleet.status.groups[1].phase) == ("Paused", "Waiting")
    assert fleet.running("new") == {"n000", "n003"}
    fleet.rules = msgspec.structs.replace(fleet.rules, approved=frozenset({"other/second"}))
    fleet.step()
    assert fleet.status.phase == "Paused"  # of another run
    fleet.rules = msgspec.structs.replace(fleet.rules, paused=True)
    _approve(fleet, "second")
    fleet.step(1.0)
    assert fleet.status.phase == "Paused"
    assert not fleet.status.groups[1].nodes
    run = fleet.status.run
    fleet.rules = msgspec.structs.replace(fleet.rules, paused=False, cancelled=run)
    assert fleet.settle() == "RolledBack"
    assert fleet.running("old") == set(fleet.boxes)
    fleet.rules = msgspec.structs.replace(fleet.rules, cancelled="")
    assert fleet.step().status.phase == "RolledBack"  # a manifest that is applied again starts nothing
    fleet.rules = msgspec.structs.replace(fleet.rules, approved=fleet.rules.approved | {run})
    assert fleet.settle() == "Succeeded"
    assert fleet.running("new") == set(fleet.boxes)


@pytest.mark.parametrize("rounds", range(9))
def test_cancelled_at_each_step(rounds: int) -> None:
    fleet = ready(RULES, boxes(6))
    fleet.declare("new")
    for _ in range(rounds):
        fleet.step(16.0)
        fleet.hear()
    fleet.step()
    whole = fleet.status.phase == "Succeeded"
    fleet.rules = msgspec.structs.replace(RULES, cancelled=fleet.status.run)
    fleet.settle(rounds=20)
    assert fleet.status.phase == ("Succeeded" if whole else "RolledBack")
    assert fleet.running("new") == (set(fleet.boxes) if whole else set())


def test_a_newer_version_supersedes_the_run() -> None:
    fleet = ready(RULES, boxes(6))
    fleet.declare("new")
    fleet.step()
    fleet.hear()
    fleet.declare("newer")
    fleet.hear()
    assert fleet.running("newer") == set()
    assert fleet.settle() == "Succeeded"
    assert fleet.running("newer") == set(fleet.boxes)


def test_going_back_by_hand_needs_no_run() -> None:
    fleet = ready(RULES, boxes(6))
    fleet.boxes["n000"].fate = "fails"
    fleet.declare("bad")
    assert fleet.settle() == "RolledBack"
    fleet.declare("old")
    fleet.step()
    fleet.hear()
    assert fleet.status.phase == "Succeeded"
    assert fleet.running("old") == set(fleet.boxes)
    fleet.boxes["n000"].fate = "good"
    fleet.declare("bad")  # the same again is a run again
    fleet.step()
    assert fleet.status.phase == "Running"
    assert fleet.settle() == "Succeeded"


def test_a_held_site_is_left_out_until_it_says_so() -> None:
    fleet = ready(RULES, boxes(6))
    for name in ("n001", "n004"):
        fleet.boxes[name].held = True
    fleet.declare("new")
    for _ in range(12):
        fleet.hear()
        fleet.step(40.0)
    group = fleet.status.groups[1]
    assert (group.phase, group.late, group.nodes) == ("Waiting", 2, [])
    fleet.boxes["n001"].held = False
    assert fleet.settle() == "Succeeded"  # one of the site has proven it
    assert fleet.running("old") == {"n004"}
    fleet.boxes["n004"].held = False
    fleet.hear()
    assert fleet.running("new") == set(fleet.boxes)


def test_outside_of_the_window_nobody_is_let_on_and_nobody_begins() -> None:
    def opens(now: float) -> tuple[bool, float]:
        hour = now % 1000.0
        return (hour < 100.0, now - hour + 100.0) if hour < 100.0 else (False, now - hour + 1000.0)

    fleet = ready(Rules((GroupRules("all", opens=opens),)), boxes(2))
    fleet.declare("new")
    fleet.now = 500.0
    fleet.step()
    assert (fleet.status.phase, fleet.status.groups[0].phase) == ("Pending", "Waiting")
    assert fleet.last.look == 500.0
    fleet.step(510.0)
    assert fleet.status.groups[0].until == 1100.0
    fleet.boxes["n000"].look(fleet.status, fleet.declared, fleet.now, MADE)
    fleet.now = 1200.0
    fleet.hear()
    assert fleet.running("new") == {"n000"}  # the other heard of it too late; who has it keeps it
    fleet.step()
    fleet.now = 1990.0
    fleet.step()
    assert not fleet.status.groups[0].failed  # waiting for a window is no failure
    fleet.now = 2001.0
    fleet.step()
    fleet.hear()
    assert fleet.running("new") == {"n000", "n001"}
    assert fleet.settle() == "Succeeded"


def test_an_older_release_is_named_and_not_waited_for() -> None:
    many = [Node("a"), Node("b", governed=False)]
    parts = {"v": 1}
    names = frozenset({"a", "b"})
    target = Target("App", "web", "u", 1, digest_of(parts), parts, LATER, names)
    status = step(RULES, Status(), [target], many, 0.0, MADE).status
    assert status.ungoverned == ["b"]
    assert [g.nodes for g in status.groups] == [[], [], ["a"]]


def test_only_a_report_on_the_generation_counts() -> None:
    handled = [Handled("App", "web", "u", 2, "new", Version(1, "old"))]

    def of(**report: object) -> str:
        t = Target("App", "web", "u", 2, "new", {}, MADE, frozenset({"n"}), {"n": report})
        return verdict("n", [t], handled)[0]

    assert of(observedGeneration=1, phase="Running") == "busy"
    assert of(observedGeneration=1, phase="Failed", takenBack="x") == "busy"
    assert of(observedGeneration=2, phase="Running") == "good"
    assert of(observedGeneration="much", phase=["Running"]) == "busy"  # whatever a node says
    assert of(observedGeneration=2, phase="Running", wanted="new") == "busy"
    assert of(observedGeneration=2, phase="Degraded") == "busy"
    assert of(observedGeneration=2, phase="Degraded", takenBack="new") == "bad"
    assert of(observedGeneration=2, phase="Failed") == "bad"
    # a function whose code cannot be had, or has another digest: the old one goes on, and the time runs out
    assert of(observedGeneration=1, phase="Degraded", refusedGeneration=2) == "busy"
    t = Target("App", "web", "u", 2, "new", {}, MADE, frozenset({"n"}), {"n": {"observedGeneration": 2}})
    assert not is_back("n", [t], handled)


def test_what_takes_effect_at_once_is_no_version() -> None:
    at_once = ("replicas",)
    assert with_parts({"a": 2, "replicas": 5}, {"a": 1}, at_once) == {"a": 1, "replicas": 5}
    assert with_parts({"a": 2, "b": 1, "replicas": 5}, {"a": 1}, at_once) == {"a": 1, "replicas": 5}


def test_a_status_that_is_not_understood_is_none() -> None:
    assert read_status({"groups": 3}) == Status()


def test_a_container_s_image_is_there_when_its_node_says_so() -> None:
    def target(here: frozenset[str], **parts: object) -> Target:
        said = {"b": {"observedGeneration": 2}}
        return Target("App", "web", "u", 2, "d", parts, MADE, frozenset("ab"), said, here)

    none, a = frozenset[str](), frozenset("a")
    assert has_all("a", [target(none, process={"command": ["x"]})]), "of a process there is nothing to fetch"
    image = {"image": "web:2"}
    assert not has_all("a", [target(none, container=image)])
    assert has_all("a", [target(a, container=image)])
    assert has_all("b", [target(none, container=image)]), "it runs it"
    assert has_all("c", [target(none, container=image)]), "it is not for it"
