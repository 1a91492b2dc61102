"""Buckets by source: a storm fills its own, and there is room for so many only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core.throttle import Throttle, source_of


def test_a_storm_hurts_its_own_source_only() -> None:
    t = Throttle(burst=3, rate=1)
    assert [t.take("a", 0.0) for _ in range(3)] == [0.0] * 3
    assert t.take("a", 0.0) == 1.0
    for _ in range(10_000):
        assert t.take("a", 0.5) > 0
    assert t.take("b", 0.5) == 0.0
    assert t.take("a", 1.01) == 0.0
    assert t.take("a", 1.01) > 0
    assert t.take("a", 100.0) == 0.0


def test_a_burst_and_then_the_rate() -> None:
    t = Throttle(rate=2.0, burst=3)
    assert [t.take("a", 0.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 0.5]
    assert t.take("b", 0.0) == 0.0  # each has its own
    assert [t.take("a", 0.5), t.take("a", 0.5)] == [0.0, 0.5]
    assert [t.take("a", 100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert t.take("a", 50.0) == 0.5  # a clock that steps back gives nothing


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 3)), max_size=80))
def test_nobody_gets_more_than_is_allowed(asks: list[tuple[int, float]]) -> None:
    t, now, first = Throttle(rate=2.0, burst=3), 0.0, {}
    taken: dict[int, int] = {}
    for source, later in asks:
        now += later
        first.setdefault(source, now)
        if t.take(str(source), now) == 0.0:
            taken[source] = taken.get(source, 0) + 1
    for source, n in taken.items():
        assert n <= 3 + 2.0 * (now - first[source]) + 1e-6


def test_sources_are_bounded() -> None:
    t = Throttle(burst=1, rate=0.001)
    for n in range(10_000):
        t.take(str(n), 0.0)
    assert len(t) == 4096, "where nothing else is said"
    t = Throttle(burst=1, rate=0.001, sources=10)
    for n in range(100):
        assert t.take(f"s{n}", 0.0) == 0.0
    assert len(t) == 10
    assert t.take("s99", 0.0) > 0, "the last ones are known"


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=80))
def test_never_more_than_burst_and_rate(steps: list[tuple[float, bool]]) -> None:
    t, now, taken = Throttle(burst=5, rate=2), 0.0, 0
    for step, back in steps:
        now_seen = now - step if back else now  # a clock that steps back gives nothing
        now = now if back else now + step
        taken += t.take("a", now_seen if back else now) == 0.0
    assert taken <= 5 + 2 * (now + 5 * len([1 for _, b in steps if b])) + 1e-6


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("10.0.0.1", "10.0.0.1"), ("", "local"), ("testclient", "testclient"), ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"), ("::1", "::/64"),
    ],
)  # fmt: skip
def test_what_one_source_is(host: str, source: str) -> None:
    assert source_of(host) == source
