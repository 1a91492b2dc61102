"""How many workers a version should have. Pure."""

from __future__ import annotations

from edgeward.functions.versions import Policy

#: First and longest pause after a worker that could not be started.
_FIRST, _LONGEST = 0.1, 30.0


def missing(waiting: int, there: int, starting: int, policy: Policy) -> int:
    """Workers to start now. One for each call that waits and has none on its way, never more than the maximum.

    ``there``: workers that have loaded; those on their way are ``starting``.
    """
    have = there + starting
    wanted = max(policy.minimum - have, waiting - starting)
    return max(0, min(wanted, policy.maximum - have))


def pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(_LONGEST, _FIRST * 2.0 ** min(20, max(0, failures - 1)))
