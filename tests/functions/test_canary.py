"""Shares, stickiness and verdicts: who gets the canary, and when it is taken back."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.functions.canary import PLACES, Plan, Tally, bad, deals_canary, forget, gets_canary, is_failure, place_of

WEIGHTS = st.integers(0, PLACES).map(lambda n: n / 100)
KEYS = st.text(max_size=40)


@given(KEYS, KEYS, WEIGHTS, WEIGHTS)
def test_a_key_always_goes_to_the_same_version_and_a_larger_weight_only_moves_keys_to_the_canary(
    key: str, salt: str, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    assert gets_canary(key, salt, low) == gets_canary(key, salt, low)
    assert gets_canary(key, salt, high) or not gets_canary(key, salt, low)
    assert gets_canary(key, salt, 100.0)
    assert not gets_canary(key, salt, 0.0)


@pytest.mark.parametrize("weight", [0.5, 1, 10, 33, 50, 90])
@pytest.mark.parametrize("keys", ["10.0.{0}.{1}", "user-{0}{1}", "{1:08x}{0:08x}"])
def test_the_share_of_keys_is_the_weight(weight: float, keys: str) -> None:
    """Fixed keys, such as callers have: within four standard deviations."""
    n = 20_000
    got = sum(gets_canary(keys.format(i // 250, i % 250), "default/hello", weight) for i in range(n))
    p = weight / 100
    assert abs(got - n * p) < 4 * (n * p * (1 - p)) ** 0.5


def test_a_place_is_the_same_on_every_node_and_release() -> None:
    assert [place_of(k, "default/hello") for k in ("", "10.0.0.1", "anna", "\udc80")] == [8903, 1018, 3992, 7685]


@given(WEIGHTS, st.integers(0, 10**9))
def test_calls_without_a_key_are_dealt_exactly(weight: float, start: int) -> None:
    dealt = [deals_canary(start + n, weight) for n in range(PLACES)]
    assert sum(dealt) == round(weight * 100)
    for n in (7, 100, 1234):
        assert abs(sum(dealt[:n]) - n * weight / 100) <= 1, "and evenly"


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 10_000), st.integers(1, 500))
def test_a_canary_that_fails_no_more_than_stable_stays(calls: int, failed: int, more: int, least: int) -> None:
    failed = min(failed, calls)
    plan = Plan(10, calls=least)
    assert not bad(Tally(calls * more, failed * more), Tally(calls, failed), plan)
    assert not bad(Tally(calls, failed), Tally(more, 0), plan)


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 500), st.integers(0, 500), st.integers(1, 200))
def test_one_failure_more_never_makes_a_verdict_better(n: int, k: int, m: int, j: int, least: int) -> None:
    stable, plan = Tally(m, min(m, j)), Plan(10, calls=least)
    k = min(k, n)
    if bad(stable, Tally(n, k), plan) and k < n:
        assert bad(stable, Tally(n, k + 1), plan)


@pytest.mark.parametrize(("stable", "within"), [((0, 0), 3), ((7, 0), 4), ((1000, 0), 3), ((1000, 100), 4)])
def test_one_that_fails_every_call_is_taken_back_after_a_few(stable: tuple[int, int], within: int) -> None:
    verdicts = [bad(Tally(*stable), Tally(n, n), Plan(10)) for n in range(1, 10)]
    assert [bool(v) for v in verdicts] == [n >= within for n in range(1, 10)]
    assert f"{within} of its {within} calls failed" in verdicts[within - 1]


def test_when_everything_fails_the_canary_is_not_to_blame() -> None:
    assert not bad(Tally(50, 50), Tally(500, 500), Plan(10))


def run(seed: int, stable: float, canary: float, calls: int) -> int:
    """So many of the canary's calls until it is taken back; 0: it is not."""
    rng, plan, tallies = random.Random(seed), Plan(20), (Tally(), Tally())
    for n in range(calls * 5):
        mine = deals_canary(n, 20)
        tallies[mine].calls += 1
        if rng.random() < (canary if mine else stable):
            tallies[mine].failed += 1
            if mine and bad(*tallies, plan):
                return n // 5 + 1
        forget(*tallies, plan)
    return 0


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.4])
def test_chance_takes_none_back_and_a_bad_one_goes_soon(share: float) -> None:
    assert [run(seed, share, share, 4000) for seed in range(5)] == [0] * 5
    for seed in range(5):
        assert 0 < run(seed, share, share + 0.3, 4000) <= 200


def test_what_was_long_ago_does_not_hide_what_is_now() -> None:
    plan, tallies = Plan(10), (Tally(), Tally())
    for _ in range(100_000):
        for tally in tallies:
            tally.calls += 1
        forget(*tallies, plan)
    late = 0
    while not bad(*tallies, plan):
        late += 1
        tallies[1].calls += 1
        tallies[1].failed += 1
        forget(*tallies, plan)
    assert late <= 60


def test_slow_is_failed_where_it_was_declared() -> None:
    assert is_failure("timeout", 0.1, Plan(10))
    assert not is_failure("", 9.0, Plan(10))
    assert is_failure("", 0.3, Plan(10, latency=0.2))
    assert "took longer than 0.2 s" in bad(Tally(100, 0), Tally(5, 5), Plan(10, latency=0.2))
