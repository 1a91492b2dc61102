"""Who leads among hub processes, and who may no longer act as if it did."""

from __future__ import annotations

import random

from edgeward.core.lease import GONE, LEASE, QUIET, Lease, leader


def test_the_oldest_that_is_heard_leads() -> None:
    members = {"b": (10.0, 100.0), "a": (20.0, 100.0), "c": (5.0, 90.0)}
    assert leader(members, 100.0) == "b", "c is gone"
    assert leader(members, 100.0 + GONE) == "b"
    assert leader(members, 100.0 + GONE + 0.1) == ""
    assert leader({}, 1.0) == ""
    assert leader({"y": (10.0, 1.0), "x": (10.0, 1.0)}, 1.0) == "x", "of two of the same age one, the same for all"


def test_all_that_hear_the_same_agree() -> None:
    rng = random.Random(3)
    for _ in range(200):
        members = {str(n): (rng.choice((1.0, 2.0)), rng.uniform(0, 2 * GONE)) for n in range(5)}
        shuffled = dict(sorted(members.items(), key=lambda _: rng.random()))
        assert leader(members, 2 * GONE) == leader(shuffled, 2 * GONE)


def test_one_that_is_alone_leads_at_once_and_stands_still_at_its_pleasure() -> None:
    one = Lease("a", 1000.0, 0.0)
    assert one.leads(0.0) and one.leads(500.0)
    assert one.look(500.0, 1500.0) == []
    assert one.leads(500.0)


def test_one_of_several_listens_first() -> None:
    new = Lease("n", 1000.0, 0.0, several=True)
    new.look(0.1, 1000.0)
    assert new.leader == "" and not new.leads(0.1) and not new.away(0.1)
    assert new.heard("old", 500.0, 0.2)
    new.look(0.2, 1000.0)
    assert new.leader == "old"
    first = Lease("f", 1000.0, 0.0, several=True)
    first.look(QUIET, 1002.0)
    assert first.leads(QUIET), "nobody said a word"


def test_one_that_stood_still_does_nothing_as_leader_and_comes_back_as_the_youngest() -> None:
    old = Lease("a", 1000.0, 0.0)
    old.heard("b", 2000.0, 0.0)
    old.look(0.0, 3000.0)
    old.said(0.0)
    assert old.leads(LEASE)
    # before it has looked, at the first moment
    assert not old.leads(LEASE + 0.1)
    assert old.away(LEASE + 0.1) and not old.away(LEASE)
    # b's words of the meantime are still on their way: it does not take itself for the only one
    at = 60.0
    assert old.look(at, 3060.0) == ["b"]
    old.said(at)
    assert old.leader == "" and not old.leads(at)
    assert old.away(at + QUIET - 0.1) and not old.away(at + QUIET), "what waited for it is old"
    assert old.heard("b", 2000.0, at + 0.1)
    old.look(at + 0.1, 3060.1)
    assert old.leader == "b" and old.born == 3060.0
    # and b, which took over, stays the leader when it hears of it
    other = Lease("b", 2000.0, 0.0)
    other.said(at)
    other.heard("a", old.born, at)
    other.look(at, 3060.0)
    assert other.leads(at)
    # alone after all, it leads when it has listened
    last = Lease("c", 1000.0, 0.0, several=True)
    last.look(at, 3060.0)
    last.said(at)
    assert not last.leads(at)
    last.look(at + QUIET, 3062.0)
    last.said(at + QUIET)
    assert last.leads(at + QUIET)


def test_a_leader_steps_back_before_the_others_take_over() -> None:
    assert LEASE < GONE
