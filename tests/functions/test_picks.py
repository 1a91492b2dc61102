"""Which calls become samples, and how a day's budget is kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.functions.picks import Budget, SamplePlan, is_wanted, why_kept


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.5])
def test_the_rate_is_the_share_of_calls_that_are_kept(rate: float) -> None:
    n = 20_000
    got = sum(why_kept(SamplePlan(rate=rate), f"{i:016x}", "", 200) == "rate" for i in range(n))
    assert abs(got - n * rate) < 4 * (n * rate * (1 - rate)) ** 0.5


def test_errors_are_kept_where_they_are_asked_for_and_nothing_is_without_being_declared() -> None:
    assert why_kept(SamplePlan(), "a", "timeout", 504) == ""
    plan = SamplePlan(errors=True)
    assert [why_kept(plan, "a", *end) for end in (("timeout", 504), ("", 500), ("", 404), ("", 200))] == [
        "error", "error", "", "",
    ]  # fmt: skip
    assert why_kept(SamplePlan(rate=1.0, errors=True), "a", "", 200) == "rate"


@given(st.one_of(st.none(), st.floats(-1, 1)), st.one_of(st.none(), st.floats(-1, 1)), st.floats(-1, 1))
def test_a_score_is_kept_where_it_lies_outside(below: float | None, above: float | None, score: float) -> None:
    plan = SamplePlan(below=below, above=above)
    outside = (below is not None and score < below) or (above is not None and score > above)
    assert is_wanted(plan, score) == (outside or (below is None and above is None))
    assert is_wanted(plan, None)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 60)), max_size=40))
def test_a_day_has_no_more_than_its_budget(offers: list[tuple[int, int]]) -> None:
    budget, kept = Budget(), dict[int, int]()
    for day, size in sorted(offers, key=lambda o: o[0]):
        if budget.take(str(day), size, 100):
            kept[day] = kept.get(day, 0) + size
        else:
            assert kept.get(day, 0) + size > 100
    assert all(size <= 100 for size in kept.values())
