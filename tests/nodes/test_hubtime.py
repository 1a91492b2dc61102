"""What is known of the hub's clock, whatever is done to the node's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgeward.nodes.hubtime import HubClock, made_at, untold

NOW, DAY = 1_790_000_000.0, 86400.0


def test_a_clock_that_is_ahead_or_behind_is_told_and_a_slow_link_makes_nobody_cry() -> None:
    hub = HubClock()
    assert hub.ahead(NOW, NOW) is None
    assert hub.status(NOW, NOW) == {}
    assert hub.best(NOW, NOW) == NOW
    assert hub.best(100.0, 100.0, least=NOW) == NOW, "an hour before the hub's last word it is certainly not"
    hub.heard(NOW, NOW - 0.1, NOW + 0.1)
    assert hub.status(NOW + 10, NOW + 10) == {"agrees": True}
    assert hub.status(NOW + 3610, NOW + 10) == {"agrees": False, "aheadSeconds": 3600}, "it was set: known at once"
    assert hub.status(100.0, NOW + 10)["aheadSeconds"] == round(100 - NOW - 10)
    assert hub.best(100.0, NOW + 10) == NOW + 10
    slow = HubClock()
    slow.heard(NOW + 10, NOW, NOW + 30)
    assert slow.status(NOW, NOW) == {"agrees": True}, "half of the round trip is not known"


def test_the_better_measure_is_kept_until_the_hubs_clock_is_set() -> None:
    hub = HubClock()
    hub.heard(NOW, NOW - 0.1, NOW + 0.1)
    hub.heard(NOW + 63.0, NOW + 60, NOW + 70)
    assert hub.best(0.0, NOW + 100) == NOW + 100, "a late answer knows no better"
    hub.heard(NOW + 60 - DAY, NOW + 60, NOW + 70)
    assert abs(hub.best(0.0, NOW + 100) - (NOW + 100 - DAY)) < 6
    hub.heard(NOW + 200 - DAY, NOW + 199.9, NOW + 200.1)
    assert abs(hub.best(0.0, NOW + 200) - (NOW + 200 - DAY)) < 0.1


@given(st.floats(-1e6, 1e6), st.floats(0, 30), st.floats(0, 1))
def test_it_is_never_more_wrong_than_half_of_the_round_trip(off: float, took: float, where: float) -> None:
    hub = HubClock()
    hub.heard(NOW + off + took * where, NOW, NOW + took)
    assert abs(hub.best(0.0, NOW + 50) - (NOW + off + 50)) <= took / 2 + 1e-3


def test_a_clock_that_was_never_set() -> None:
    assert untold(100.0, NOW)
    assert not untold(NOW - 3600, NOW)
    assert not untold(NOW + 400 * DAY, NOW)


def test_when_a_change_was_made_by_the_hubs_clock() -> None:
    hub = HubClock()
    assert hub.of(NOW, NOW, 60.0) == 0, "it is not known"
    hub.heard(NOW, 99.9, 100.1)
    up = 3600.0
    assert hub.of(95.0, 100.0, up) == NOW - 5, "however wrong the node's clock is"
    assert hub.of(90.0, 100.0, 5.0) == 0, "from before the machine's start"
    assert hub.of(NOW - 5, 100.0, up) == 0, "and the clock was set back then"
    assert made_at(NOW - 5, NOW) == NOW - 5
    for nonsense in (NOW + 1, float("nan"), float("inf")):
        assert made_at(nonsense, NOW) == NOW
