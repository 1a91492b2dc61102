from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgeward.gateway import pace
from edgeward.gateway.pace import Pace


def test_a_burst_and_then_the_rate() -> None:
    p = Pace(2.0, 3)
    assert [p.take("a", 0.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 0.5]
    assert p.take("b", 0.0) == 0.0  # each has its own
    assert [p.take("a", 0.5), p.take("a", 0.5)] == [0.0, 0.5]
    assert [p.take("a", 100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert p.take("a", 50.0) == 0.5  # a clock that steps back gives nothing


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 3)), max_size=80))
def test_nobody_gets_more_than_is_allowed(asks: list[tuple[int, float]]) -> None:
    p, now, first = Pace(2.0, 3), 0.0, {}
    taken: dict[int, int] = {}
    for client, later in asks:
        now += later
        first.setdefault(client, now)
        if p.take(str(client), now) == 0.0:
            taken[client] = taken.get(client, 0) + 1
    for client, n in taken.items():
        assert n <= 3 + 2.0 * (now - first[client]) + 1e-6


def test_the_memory_is_bounded() -> None:
    p = Pace(1.0, 1)
    for n in range(pace.CLIENTS * 2):
        p.take(str(n), 0.0)
    assert len(p) == pace.CLIENTS
