"""The pace that a namespace's quota of messages sets."""

from __future__ import annotations

from edgeward.streams.pace import Pace


def test_a_pace_is_kept_over_any_batches_and_follows_its_rate() -> None:
    now, rate = 0.0, 100.0
    pace = Pace(lambda: rate, lambda: now)
    taken = 0
    while now < 10:
        batch = pace.most(500)
        assert batch == 100
        taken += batch
        now += pace.took(batch)
    assert taken == 1000
    rate = 10.0
    assert (pace.most(500), pace.took(20)) == (10, 2.0)
    rate = 0.0
    assert (pace.most(500), pace.took(500)) == (500, 2.0), "what was booked is paid, then there is no limit"
