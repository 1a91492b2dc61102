"""The window follows what a stream carries, is never left behind by a reader, and kept bytes are the right ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgeward.tunnel.credit import LARGEST, SMALLEST, UNCONFIRMED, Kept, Window
from edgeward.tunnel.framing import FIRST


def _carry(rate: float, rtt: float, seconds: float) -> Window:
    """A sender that always has data, on a link of that rate (bytes per second) with a queue without end."""
    now, window, budget = 0.0, Window(0.0), FIRST
    while now < seconds:
        n = min(budget, max(1, int(rate * 0.005)))
        now += 0.005
        budget -= n
        assert window.received(n)
        budget += window.consumed(n, now, rtt)
    return window


def test_a_slow_link_gets_a_few_round_trips_and_a_fast_one_the_whole_window() -> None:
    slow = _carry(1.25e6, 0.05, 10)
    assert 1.25e6 * 0.05 < slow.size < 1.25e6 * 0.05 * 5
    assert _carry(50e6, 0.05, 10).size == LARGEST
    assert _carry(20e3, 0.05, 10).size == SMALLEST


@given(st.lists(st.tuples(st.integers(0, 200_000), st.floats(0.0, 0.3)), max_size=60))
def test_what_may_come_and_what_came_is_never_more_than_the_largest_window(
    steps: list[tuple[int, float]],
) -> None:
    window, now = Window(0.0), 0.0
    for n, pause in steps:
        now += pause
        came = min(n, window.allowed)
        assert window.received(came)
        window.consumed(min(window.held, n // 2), now, 0.02)
        assert window.allowed >= 0 and window.allowed + window.held <= LARGEST
    assert not window.received(window.allowed + 1)


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=30), st.data())
def test_what_is_sent_again_is_what_did_not_arrive(pieces: list[bytes], data: st.DataObject) -> None:
    kept, all = Kept(), b"".join(pieces)
    for piece in pieces:
        kept.add(piece)
    confirmed = data.draw(st.integers(0, len(all)))
    assert kept.confirm(confirmed)
    received = data.draw(st.integers(confirmed, len(all)))
    assert b"".join(kept.behind(received) or []) == all[received:]
    assert kept.behind(len(all) + 1) is None
    assert not kept.confirm(len(all) + 1)


def test_a_peer_that_confirms_nothing_stops_the_sender() -> None:
    kept = Kept()
    kept.add(bytes(UNCONFIRMED))
    assert kept.full
    kept.confirm(UNCONFIRMED)
    assert not kept.full and kept.behind(0) is None
