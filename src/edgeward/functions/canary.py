"""Which of two versions answers a call, and when the new one of the two is taken back. Pure.

A *canary* is a version that gets a share of the calls while the *stable* one goes on. A call with a key always goes to
the same of the two, on every node: the key's place between 0 and 10,000 is a hash, and the canary has the places below
its weight, so a larger weight only moves callers to it. Calls without a key are dealt out evenly.

The judge compares shares of failed calls. It says *bad* when the canary's is higher than the stable one's by more than
was allowed and that is no accident: a coin with the allowed share would show so many failures less than once in a
thousand times (the Chernoff bound of the binomial tail: n * KL(k/n || p) >= ln 1000; Hoeffding 1963, theorem 1).
"""

from __future__ import annotations

import hashlib
from math import log

import msgspec

#: Places that callers are spread over: a hundredth of a percent is the smallest share.
PLACES = 10_000
#: ln 1000: how sure the judge must be.
_SURE = log(1000.0)
#: Tallies of so many times the least number of calls are halved: what was long ago does not hide what is now.
_MEMORY = 8


class Plan(msgspec.Struct, omit_defaults=True):
    """What was declared. ``weight`` in percent, ``latency`` in seconds (0: slowness is no failure)."""

    weight: float
    calls: int = 20
    errors: float = 0.05
    latency: float = 0.0


class Tally(msgspec.Struct):
    """Calls that came to an end, and those of them that failed."""

    calls: int = 0
    failed: int = 0

    @property
    def share(self) -> float:
        return min(1.0, self.failed / self.calls) if self.calls else 0.0


def place_of(key: str, salt: str) -> int:
    """Where the caller with this key stands, 0 to 9,999. ``salt``: the function, so that not the same callers are the
    first everywhere."""
    digest = hashlib.blake2b(f"{salt}\0{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % PLACES


def gets_canary(key: str, salt: str, weight: float) -> bool:
    """Whether calls with this key go to the canary."""
    return place_of(key, salt) < weight * (PLACES / 100)


def deals_canary(nth: int, weight: float) -> bool:
    """Whether the ``nth`` call without a key (from 0) goes to the canary: evenly, the share exact over any 10,000."""
    places = round(weight * (PLACES / 100))
    return (nth + 1) * places // PLACES > nth * places // PLACES


def is_failure(kind: str, seconds: float, plan: Plan) -> bool:
    """Whether a call counts against the version that answered it. ``kind``: what went wrong; empty: nothing."""
    return bool(kind) or (plan.latency > 0 and seconds > plan.latency)


def bad(stable: Tally, canary: Tally, plan: Plan) -> str:
    """Why the canary is to be taken back; empty while it is not.

    It is judged from ``plan.calls`` calls on, or as soon as it failed more of them than so many calls may.
    """
    n, k = canary.calls, min(canary.failed, canary.calls)
    if not k:
        return ""
    # half a failure in one call more: three good calls of the stable one do not mean that it never fails
    known = (stable.failed + 0.5) / (stable.calls + 1) if stable.calls else 0.0
    allowed = min(1.0, known + plan.errors)
    if (n < plan.calls and k <= allowed * plan.calls) or k <= allowed * n or n * _distance(k / n, allowed) < _SURE:
        return ""
    beside = f"{stable.failed} of {stable.calls}" if stable.calls else "none"
    slow = f" or took longer than {plan.latency:g} s" if plan.latency else ""
    return f"{k} of its {n} calls failed{slow}; of the stable version's {beside}"


def _distance(q: float, p: float) -> float:
    """Kullback-Leibler divergence of two coins, in nats; ``q`` > ``p``."""
    if p <= 0.0:
        return float("inf")
    return q * log(q / p) + ((1.0 - q) * log((1.0 - q) / (1.0 - p)) if q < 1.0 else 0.0)


def forget(stable: Tally, canary: Tally, plan: Plan) -> None:
    """Halves both tallies when the canary's is long enough."""
    if canary.calls >= _MEMORY * max(plan.calls, 50):
        for tally in (stable, canary):
            tally.calls //= 2
            tally.failed //= 2
