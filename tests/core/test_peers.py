"""Who leads among hub processes."""

from __future__ import annotations

import random

from edgeward.core.peers import GONE, leader


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
