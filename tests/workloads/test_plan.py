"""The plan of an app, in a simulated world that is killed at every step."""

from __future__ import annotations

import random

import pytest

from edgeward.workloads.plan import (
    Adopt,
    Forget,
    Gone,
    MarkBad,
    Rules,
    Seen,
    Slot,
    Start,
    State,
    Stop,
    Switch,
    delay_after,
    plan,
    slot_key,
)


class World:
    """Processes and durable state; ``works`` says which versions become healthy."""

    def __init__(self, rules: Rules, works: dict[str, bool], rng: random.Random | None = None) -> None:
        self.rules, self.works = rules, works
        self.state = State()
        self.instances: dict[str, Seen] = {}
        self.now = 0.0
        self.n = 0
        self.rng = rng
        self.served: list[tuple[float, set[str]]] = []

    def step(self, wanted: str | None) -> bool:
        """One plan and its actions; a kill may come between any two of them. False when nothing was to do."""
        p = plan(wanted, self.rules, self.state, list(self.instances.values()), self.now)
        for action in p.actions:
            if self.rng is not None and self.rng.random() < 0.2:
                return True  # the agent is killed here; durable state and processes stay
            self.do(action, wanted)
        return bool(p.actions)

    def do(self, action: object, wanted: str | None) -> None:
        s = self.state
        match action:
            case Adopt(version):
                s.candidate = "" if version == s.current else version
                s.bad = {v: w for v, w in s.bad.items() if v == wanted}
            case Start(version, slot):
                taken = [i for i in self.instances.values() if i.version == version and i.slot == slot and i.alive]
                assert not taken, "a slot has one process"
                if self.rules.fixed_port:
                    assert not [i for i in self.instances.values() if i.alive], "a fixed port has one owner"
                self.n += 1
                self.instances[str(self.n)] = Seen(str(self.n), version, slot, True, started_at=self.now)
            case Stop(instance, _):
                self.instances[instance].stopping = True
                self.instances[instance].alive = False
                self.instances[instance].healthy = False
            case Forget(instance, failed):
                i = self.instances.pop(instance)
                slot = s.slots.setdefault(slot_key(i.version, i.slot), Slot())
                if failed:
                    slot.restarts += 1
                    slot.not_before = self.now + delay_after(slot.restarts, self.rules)
            case Switch(version):
                s.serve(version)
                s.switched_at = self.now
            case MarkBad(version, why):
                s.bad[version] = why
                s.candidate = ""
            case Gone():
                self.state = State()

    def tick(self, seconds: float = 0.1) -> None:
        self.now += seconds
        for i in self.instances.values():
            if i.alive and not i.healthy and self.works.get(i.version, True):
                i.healthy, i.healthy_since = True, self.now
        self.served.append((self.now, {i.version for i in self.instances.values() if i.alive and i.healthy}))

    def run(self, wanted: str | None, seconds: float = 20.0) -> None:
        end = self.now + seconds
        while self.now < end:
            for _ in range(30):
                if not self.step(wanted):
                    break
            self.tick()

    def versions(self) -> set[str]:
        return {i.version for i in self.instances.values() if i.alive}


RULES = Rules(2, startup=3.0, window=0.5, drain=0.2)


def test_the_first_version_starts_and_serves() -> None:
    w = World(RULES, {})
    w.run("a", 2)
    assert w.versions() == {"a"}
    assert w.state.current == "a"
    assert len(w.instances) == 2


def test_an_update_is_seamless_and_keeps_the_old_version_for_a_roll_back() -> None:
    w = World(RULES, {})
    w.run("a", 2)
    began = len(w.served)
    w.run("b", 5)
    assert w.versions() == {"b"}
    assert w.state.history == ["a"]
    assert all(served for _, served in w.served[began:]), "never none"


def test_a_bad_version_is_rolled_back_and_the_old_one_never_stopped() -> None:
    w = World(RULES, {"bad": False})
    w.run("a", 2)
    before = {i.id for i in w.instances.values()}
    w.run("bad", 8)
    assert w.versions() == {"a"}
    assert {i.id for i in w.instances.values()} == before
    assert "bad" in w.state.bad
    w.run("c", 5)
    assert w.versions() == {"c"}
    w.run("bad", 8)
    assert w.versions() == {"c"}, "tried again when it is asked for again, and fails again"


def test_a_fixed_port_stops_the_old_first_and_comes_back() -> None:
    w = World(Rules(1, startup=2.0, window=0.3, fixed_port=True), {"bad": False})
    w.run("a", 2)
    w.run("b", 4)
    assert w.versions() == {"b"}
    w.run("bad", 6)
    assert w.versions() == {"b"}, "the new one failed, the old one is back"


def test_going_leaves_no_orphan() -> None:
    w = World(RULES, {})
    w.run("a", 2)
    w.run("b", 0.4)
    w.run(None, 2)
    assert not w.instances
    assert w.state == State()


def test_back_off_grows_and_is_capped() -> None:
    assert [delay_after(n, Rules(1, backoff=0.2, backoff_max=1.0)) for n in (0, 1, 2, 3, 9)] == [0, 0.2, 0.4, 0.8, 1.0]


def test_more_and_fewer_replicas() -> None:
    w = World(RULES, {})
    w.run("a", 2)
    w.rules = Rules(5, startup=3.0, window=0.5)
    w.run("a", 2)
    assert len(w.instances) == 5
    w.rules = Rules(1, startup=3.0, window=0.5)
    w.run("a", 2)
    assert len(w.instances) == 1


def test_a_back_off_from_before_the_clock_was_set_back_holds_nothing_up() -> None:
    """The machine lost its power, and woke up in 1970: what the disk says of times is far in the future."""
    rules, now = Rules(1, backoff_max=30.0), 100.0
    for not_before, waits in ((now + 20, True), (now + 1e9, False)):
        state = State(current="a", slots={slot_key("a", 0): Slot(restarts=3, not_before=not_before)})
        p = plan("a", rules, state, [], now)
        assert bool(p.actions) is not waits
        assert (p.look_at == not_before) is waits
    old = Seen("1", "b", 0, True, healthy=True, healthy_since=1.0)
    mine = Seen("2", "a", 0, True, healthy=True, healthy_since=1.0)
    p = plan("a", rules, State(current="a", switched_at=1e9), [old, mine], now)
    assert p.look_at <= now + rules.drain, "nor does an older version stay for years"


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", range(150))
def test_killed_at_any_step_it_ends_with_one_whole_version_and_never_none(seed: int, fixed: bool) -> None:
    rng = random.Random(seed)
    rules = Rules(1 if fixed else 2, startup=2.0, window=0.3, drain=0.1, fixed_port=fixed)
    works = {v: rng.random() < 0.6 for v in "bcde"} | {"a": True}
    w = World(rules, works, rng)
    w.run("a", 4)
    assert w.versions() == {"a"}
    began = len(w.served)
    wanted = "a"
    for _ in range(4):
        wanted = rng.choice("abcde")
        w.run(wanted, rng.uniform(0.2, 3.0))
    w.rng = None
    w.run(wanted, 15)
    assert w.versions() == ({wanted} if works[wanted] else {w.state.current}), (wanted, w.state)
    assert works[w.state.current], "what serves works"
    assert len(w.instances) == rules.replicas
    if not fixed:
        assert all(served for _, served in w.served[began:]), "something whole served all the time"
