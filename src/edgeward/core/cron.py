"""When a schedule is due: cron's five fields (or six, seconds first), in a time zone, through clock changes. Pure.

In comes the text of a schedule and an instant, out goes the next instant; :class:`Timer` says what to run now, whatever
the clock did meanwhile. Times are seconds since 1970. Where day of month and day of week are both given, either is
enough, as in Vixie's cron. In the hour that a change to winter time repeats, a schedule with fixed hours runs once and
one with every hour runs on; in the hour that is left out it runs right behind it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from edgeward.core.errors import Invalid

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...], int], ...] = (
    ("second", 0, 59, (), 0),
    ("minute", 0, 59, (), 0),
    ("hour", 0, 23, (), 0),
    ("day of month", 1, 31, (), 0),
    ("month", 1, 12, _MONTHS, 1),
    ("day of week", 0, 7, _DAYS, 0),
)
#: The 29th of February comes within eight years.
_HORIZON = 366 * 9
#: Longest that a clock change moves the clock, with room.
_CHANGE = 3 * 3600.0
#: A run that is later than this is a missed one. Seconds.
LATE = 60.0
#: A clock that was set back further than this begins anew; less is waited for, so that nothing runs twice.
_BACK = 3600.0
_LOOK_BACK = 3600.0


def check_zone(name: str, field: str) -> None:
    """Raises ``Invalid`` for what is no time zone of this machine."""
    try:
        ZoneInfo(name)
    except (ValueError, OSError, ZoneInfoNotFoundError):
        raise Invalid(
            f"{name[:64]!r} is no time zone", field=field, remedy="write it as Europe/Berlin, or leave it out for UTC"
        ) from None


def _number(text: str, names: tuple[str, ...], first: int, field: str) -> int:
    if text.lower() in names:
        return names.index(text.lower()) + first
    if not text.isdecimal() or len(text) > 2:
        raise ValueError(f"{text[:20]!r} is no {field}")
    return int(text)


def _values(text: str, field: tuple[str, int, int, tuple[str, ...], int]) -> tuple[int, ...]:
    name, low, high, names, first = field
    found: set[int] = set()
    for part in text.split(","):
        span, slash, step_text = part.partition("/")
        step = _number(step_text, (), 0, f"step of {name}") if slash else 1
        if step < 1:
            raise ValueError(f"a step of 0 in {name}")
        if span == "*":
            begin, end = low, high
        else:
            left, dash, right = span.partition("-")
            begin = _number(left, names, first, name)
            end = _number(right, names, first, name) if dash else (high if slash else begin)
        if not low <= begin <= end <= high:
            raise ValueError(f"{part[:20]!r} is not within {low}-{high} of {name}")
        found |= set(range(begin, end + 1, step))
    return tuple(sorted({v % 7 for v in found} if name == "day of week" else found))


@dataclass(frozen=True, slots=True)
class Schedule:
    seconds: tuple[int, ...]
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: tuple[int, ...]
    months: tuple[int, ...]
    weekdays: tuple[int, ...]
    #: Either of the two days is enough, since both are given.
    either: bool
    every_hour: bool

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Raises ``ValueError`` that names the field, or when it is never due."""
        parts = text.split()
        if len(parts) == 5:
            parts.insert(0, "0")
        if len(parts) != 6 or len(text) > 256:
            raise ValueError("write five fields (minute hour day month weekday), or six with seconds first")
        values = [_values(part, field) for part, field in zip(parts, _FIELDS, strict=True)]
        either = not parts[3].startswith("*") and not parts[5].startswith("*")
        seconds, minutes, hours, days, months, weekdays = values
        made = cls(seconds, minutes, hours, days, months, weekdays, either, parts[2].startswith("*"))
        if next(made._walls(datetime(2000, 1, 1)), None) is None:
            raise ValueError("there is no such day")
        return made

    def _on(self, day: date) -> bool:
        if day.month not in self.months:
            return False
        dom, dow = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return dom or dow if self.either else dom and dow

    def _walls(self, start: datetime) -> Iterator[datetime]:
        """The wall clock's times from ``start`` on, in order."""
        day = start.date()
        for n in range(_HORIZON):
            if self._on(day):
                for hour in self.hours[bisect.bisect_left(self.hours, start.hour) if n == 0 else 0 :]:
                    begun = n == 0 and hour == start.hour
                    for minute in self.minutes[bisect.bisect_left(self.minutes, start.minute) if begun else 0 :]:
                        for second in self.seconds:
                            wall = datetime(day.year, day.month, day.day, hour, minute, second)
                            if wall >= start:
                                yield wall
            day += timedelta(days=1)

    def after(self, at: float, zone: tzinfo = UTC) -> float:
        """The first instant behind ``at``."""
        local = datetime.fromtimestamp(at, zone)
        wall = local.replace(tzinfo=None, microsecond=0, fold=0)
        offsets = {datetime.fromtimestamp(at + d, zone).utcoffset() for d in (-_CHANGE, 0.0, _CHANGE)}
        if len(offsets) == 1:
            found = next(self._walls(wall + timedelta(seconds=1))).replace(tzinfo=zone).timestamp()
            if found - at <= _CHANGE:
                return found
        # near a clock change, or beyond one: each wall time stands for one instant or two
        best = float("inf")
        for one in self._walls(wall - timedelta(seconds=_CHANGE)):
            for instant in self._instants(one, zone):
                if at < instant < best:
                    best = instant
            if best < float("inf") and one > datetime.fromtimestamp(best, zone).replace(tzinfo=None) + timedelta(
                hours=3
            ):
                break
            if best < float("inf") and not self.every_hour:
                break
        return best

    def _instants(self, wall: datetime, zone: tzinfo) -> list[float]:
        first = wall.replace(tzinfo=zone).timestamp()
        if not self.every_hour:
            return [first]
        return sorted({first, wall.replace(tzinfo=zone, fold=1).timestamp()})


@dataclass(slots=True)
class Timer:
    """One trigger's clock. ``last``: the instant that was last run (or passed over); 0: it has just been declared."""

    schedule: Schedule
    zone: tzinfo
    jitter: float = 0.0
    once: bool = False  #: what was missed is run once, late; else it is passed over
    last: float = 0.0

    def look(self, now: float) -> tuple[float, float]:
        """(the instant that is to be run now, or 0; seconds until the next look)"""
        if not self.last or now < self.last - _BACK:
            self.last = now
        due, run = self.schedule.after(self.last, self.zone), 0.0
        if due + self.jitter <= now:
            newest = self._newest(due, now)
            in_time = now - newest - self.jitter <= LATE
            run = newest if in_time or self.once else 0.0
            # what was missed is over, however much it was
            self.last = newest if in_time else now - self.jitter
            due = self.schedule.after(self.last, self.zone)
        return run, max(0.0, due + self.jitter - now)

    def _newest(self, due: float, now: float) -> float:
        """The last instant that is not behind ``now``; it looks back an hour at most, so that absence costs little."""
        at, newest = max(due, now - _LOOK_BACK - self.jitter), due
        while True:
            following = self.schedule.after(at, self.zone)
            if following + self.jitter > now:
                return newest
            newest = at = following
