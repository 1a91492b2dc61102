"""When a maintenance window is open: pure. Times are seconds since 1970, windows are in a time zone's wall clock.

A window that ends before it begins goes over midnight and belongs to the day on which it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, time, timedelta
from zoneinfo import ZoneInfo

import msgspec

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
#: Days that are looked at for the next opening: every window opens within a week.
_AHEAD = 8


class Window(msgspec.Struct, frozen=True):
    """``days``: numbers of weekdays, Monday 0, on which it begins; ``begin`` and ``end``: minutes since midnight."""

    days: frozenset[int]
    begin: int
    end: int
    zone: str = "UTC"

    def spans(self, now: float) -> list[tuple[float, float]]:
        """Begin and end of the openings around ``now``, in their order."""
        zone = ZoneInfo(self.zone)
        today = datetime.fromtimestamp(now, zone).date()
        found = []
        for n in range(-1, _AHEAD):
            day = today + timedelta(days=n)
            if day.weekday() not in self.days:
                continue
            last = day + timedelta(days=1) if self.end <= self.begin else day
            ends = [
                datetime.combine(d, time(m // 60, m % 60), zone).timestamp()
                for d, m in ((day, self.begin), (last, self.end))
            ]
            found.append((ends[0], ends[1]))
        return found


def minutes(text: str) -> int:
    """Minutes since midnight of ``22:30``. Raises ValueError."""
    hours, _, rest = text.partition(":")
    if not (len(hours) == len(rest) == 2 and text.replace(":", "", 1).isdecimal() and hours < "24" and rest < "60"):
        raise ValueError(f"{text[:20]!r} is no time of day: write 22:30")
    return int(hours) * 60 + int(rest)


def opens(windows: Sequence[Window], now: float) -> tuple[bool, float]:
    """Whether one of them is open and until when, else when the next one opens. No windows: always (0)."""
    if not windows:
        return True, 0.0
    spans = [s for w in windows for s in w.spans(now)]
    if ends := [end for begin, end in spans if begin <= now < end]:
        return True, max(ends)
    return False, min((begin for begin, _ in spans if begin > now), default=0.0)
