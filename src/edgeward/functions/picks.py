"""Which calls and which offered pairs become samples, and how many bytes of them a day may have. Pure.

What is done with them is in ``samples.py``.
"""

from __future__ import annotations

import msgspec

from edgeward.functions.canary import PLACES, place_of


class SamplePlan(msgspec.Struct, omit_defaults=True):
    """What was declared. ``rate``: the share of calls; ``per_day``, ``keep``: bytes."""

    rate: float = 0.0
    errors: bool = False
    below: float | None = None
    above: float | None = None
    per_day: int = 1 << 20
    keep: int = 8 << 20


def why_kept(plan: SamplePlan, invocation: str, error: str, status: int) -> str:
    """Why a call that ended is kept: ``error``, ``rate``; empty: it is not. The same call is always decided alike."""
    if plan.errors and (error or status >= 500):
        return "error"
    return "rate" if plan.rate > 0 and place_of(invocation, "samples") < plan.rate * PLACES else ""


def is_wanted(plan: SamplePlan, score: float | None) -> bool:
    """Whether a pair that a handler offers is kept: by its score; without one, or without a rule, as it offers it."""
    if score is None or (plan.below is None and plan.above is None):
        return True
    return (plan.below is not None and score < plan.below) or (plan.above is not None and score > plan.above)


class Budget:
    """Bytes of a day (UTC)."""

    def __init__(self, day: str = "", used: int = 0) -> None:
        self.day, self.used = day, used

    def take(self, day: str, size: int, most: int) -> bool:
        """Whether ``size`` bytes are still in it; then they are taken."""
        if day != self.day:
            self.day, self.used = day, 0
        if self.used + size > most:
            return False
        self.used += size
        return True
