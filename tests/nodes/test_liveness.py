"""Separate thresholds up and down: a bad link does not flap, a cut is seen in time."""

from __future__ import annotations

import random

from edgeward.nodes.liveness import BEAT, Liveness


def test_one_lost_beat_never_flips() -> None:
    live = Liveness()
    live.beat(0.0)
    assert live.beat(BEAT) and live.online
    assert not live.tick(BEAT + 2 * BEAT + 0.1)
    live.beat(BEAT + 2.9 * BEAT)
    assert live.online


def test_a_cut_is_seen_within_fifteen_seconds_and_the_return_needs_two_beats() -> None:
    live = Liveness()
    live.beat(0.0, certain=True)
    t = 0.0
    while not live.tick(t):
        t += 0.25
        assert t < 15
    assert not live.beat(100.0), "one beat after a long silence is not enough"
    assert live.beat(100.0 + BEAT)


def test_thirty_percent_loss_never_flaps_with_beats_that_are_retransmitted() -> None:
    rng = random.Random(7)
    flips = 0
    live = Liveness()
    t = 0.0
    live.beat(t, certain=True)
    for _ in range(2000):
        t += BEAT
        # TCP under 30 % loss delivers late, by one or more retransmission times of a 1.2 s link
        late = 0.0
        while rng.random() < 0.3 and late < 6:
            late += 1.5
        flips += live.tick(t)
        live.beat(t + late)
        t += max(0.0, late - BEAT)
    assert flips == 0
