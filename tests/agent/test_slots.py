"""Which release runs: every way to stop in the middle leaves the old one or the new one, whole."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from edgeward.agent.slots import (
    TRIES,
    Order,
    State,
    ended,
    give_up,
    judge,
    next_start,
    order_of,
    plain,
    proven,
    state_of,
    stopped,
)

OLD, NEW = "a" * 64, "b" * 64


class Disk:
    """What a power cut leaves: files that are replaced whole. ``writes`` is the number of writes until the cut."""

    def __init__(self, state: State, writes: int) -> None:
        self.state, self.order, self.writes = json.dumps(plain(state)), "", writes

    def write(self, name: str, doc: Any) -> None:
        if self.writes == 0:
            raise PowerCut
        self.writes -= 1
        setattr(self, name, json.dumps(doc))


class PowerCut(Exception):
    pass


def run(disk: Disk, good: bool, whole: set[str], cut_in_trial: int, starts: list[str]) -> str:
    """A machine's life from its boot on: what proves itself and runs in the end. ``cut_in_trial``: so many trials end
    with the power."""
    order = order_of(json.loads(disk.order or "null"))
    while True:
        state, release = next_start(state_of(json.loads(disk.state)), order, lambda r: not r or r in whole)
        if plain(state) != json.loads(disk.state):
            disk.write("state", plain(state))
        starts.append(release)
        if state.trying is None:
            return release
        if cut_in_trial:
            raise PowerCut
        state = proven(state) if good else ended(state, "it ended with status 3")
        disk.write("state", plain(state))
        if good:
            return release


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("old", ["", OLD])
@pytest.mark.parametrize("is_whole", [True, False])
def test_power_cuts_at_every_write_and_in_every_trial(good: bool, old: str, is_whole: bool) -> None:
    order = Order("1", NEW)
    whole = {old, NEW} if is_whole else {old}
    for first, second, trials in itertools.product(range(6), range(6), range(5)):
        disk = Disk(State(current=old), first)
        starts: list[str] = []
        try:
            disk.write("order", asdict(order))
        except PowerCut:
            pass
        ordered = bool(disk.order)
        runs, cuts = None, trials
        for boot in range(12):
            # the second boot may have another cut between two writes, later ones only within trials
            disk.writes = first if boot == 0 else second if boot == 1 else 100
            try:
                runs = run(disk, good, whole, cuts, starts)
                break
            except PowerCut:
                cuts = max(0, cuts - 1)
        assert set(starts) <= whole | {""}, "nothing is started that is not whole"
        tried = starts.count(NEW)
        assert tried <= TRIES
        state = state_of(json.loads(disk.state))
        if not ordered:
            assert (runs, tried) == (old, 0)
        elif good and is_whole and tried and runs == NEW:
            assert (state.current, state.previous, state.failed) == (NEW, old, "")
        else:
            # back, and it says so
            assert runs == old
            assert (state.current, state.failed, state.trying) == (old, "1", None)
            assert state.failedWhy
        if good and is_whole and first >= 3 and not trials:
            assert runs == NEW, "the order, the start and the proof are on the disk: there was no cut at all"


def test_one_order_is_obeyed_once() -> None:
    everything = lambda release: True  # noqa: E731
    state, release = next_start(State(), Order("1", NEW), everything)
    assert (release, state.starts) == (NEW, 1)
    state = give_up(state, "bad")
    state, release = next_start(state, Order("1", NEW), everything)
    assert (release, state.failed, state.failedWhy) == ("", "1", "bad")
    state, release = next_start(state, Order("2", NEW), everything)
    assert release == NEW
    state = proven(state)
    assert (state.current, state.previous, state.failed) == (NEW, "", "")
    # to the installed one, which proves itself as any other
    state, release = next_start(state, Order("3", ""), everything)
    assert (release, state.trying) == ("", Order("3", ""))
    assert proven(state).current == ""
    # to what runs there is nothing to go
    state, release = next_start(give_up(state, "no"), Order("4", NEW), everything)
    assert (release, state.trying, state.obeyed) == (NEW, None, "4")
    # a newer order in the middle of a trial
    state, release = next_start(State(current=OLD, trying=Order("5", NEW), obeyed="5"), Order("6", OLD), everything)
    assert (release, state.trying) == (OLD, None)


def test_a_release_that_is_lost() -> None:
    state, release = next_start(State(current=NEW, previous=OLD), None, lambda r: r in ("", OLD))
    assert (release, state.current) == (OLD, OLD)
    assert next_start(State(current=NEW, previous=OLD), None, lambda r: not r)[1] == ""


def test_stopped_by_hand_is_no_try() -> None:
    state = State(trying=Order("1", NEW), obeyed="1")
    for _ in range(TRIES * 2):
        state, release = next_start(state, None, lambda r: True)
        assert release == NEW
        state = stopped(state)
    assert state.starts == 0


@pytest.mark.parametrize(
    ("since", "ready", "linked", "link", "said"),
    [
        (1, None, False, 0, "wait"),
        (181, None, False, 0, "failed"),
        (200, 59, False, 0, "wait"),
        (200, 60, False, 0, "proven"),
        (200, 60, False, 600, "wait"),
        (200, 60, True, 600, "proven"),
        (601, 60, False, 600, "failed"),
    ],
)
def test_what_proves_itself(since: float, ready: float | None, linked: bool, link: float, said: str) -> None:
    assert judge(Order("1", NEW, link=link), since, ready, linked)[0] == said


def test_files_of_any_content() -> None:
    for doc in (None, 3, [], {}, {"trying": 3, "current": 4, "starts": "x"}):
        assert state_of(doc) in (State(), replace(State(), starts=TRIES))
        assert order_of(doc) is None
    assert order_of({"id": "1", "release": NEW, "window": "long"}) is None
    state = State(current=OLD, trying=Order("1", NEW, link=5.0), starts=2, why="w", more={"later": 1})
    assert state_of(json.loads(json.dumps(plain(state)))) == state
