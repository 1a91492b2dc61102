"""How fast the Exports of one namespace may take readings together: its quota of messages. Pure; the clock is given.

In come the rate and how many were taken, out come how many to fetch at once and how long to wait. Meanwhile the node's
broker keeps what comes, so nothing that it acknowledged is lost.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeward.core.delivery import Bucket


class Pace:
    """What the Exports of one namespace may take together, in readings a second; 0: as many as come."""

    def __init__(self, rate: Callable[[], float], now: Callable[[], float]) -> None:
        self._rate, self._now = rate, now
        self._bucket = Bucket(0.0)

    def most(self, batch: int) -> int:
        """Readings to fetch at once: no more than a second's worth."""
        rate = self._rate()
        return max(1, min(batch, int(rate))) if rate > 0 else batch

    def took(self, readings: int) -> float:
        """Seconds to wait after these were taken."""
        self._bucket.rate = self._rate()
        return self._bucket.book(self._now(), readings)
