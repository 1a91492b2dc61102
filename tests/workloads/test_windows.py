"""Maintenance windows: over midnight, in their zone, through clock changes."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from edgeward.workloads.windows import Window, minutes, opens

BERLIN = ZoneInfo("Europe/Berlin")
DAILY = frozenset(range(7))


def at(text: str, zone: ZoneInfo | None = None) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone or UTC).timestamp()


def test_no_window_is_always_open() -> None:
    assert opens([], 5.0) == (True, 0.0)


def test_over_midnight_it_belongs_to_the_day_on_which_it_begins() -> None:
    friday = Window(frozenset({4}), minutes("22:00"), minutes("04:00"), "Europe/Berlin")
    end = at("2026-07-04T04:00", BERLIN)
    assert opens([friday], at("2026-07-03T22:00", BERLIN)) == (True, end)
    assert opens([friday], at("2026-07-04T03:59", BERLIN)) == (True, end)
    begin = at("2026-07-10T22:00", BERLIN)
    assert opens([friday], end) == (False, begin)
    assert opens([friday], at("2026-07-03T03:00", BERLIN)) == (False, at("2026-07-03T22:00", BERLIN))


def test_of_several_the_one_that_is_open_longest_and_the_one_that_opens_first() -> None:
    windows = [Window(DAILY, minutes("08:00"), minutes("09:00")), Window(DAILY, minutes("08:30"), minutes("10:00"))]
    assert opens(windows, at("2026-01-05T08:45")) == (True, at("2026-01-05T10:00"))
    assert opens(windows, at("2026-01-05T11:00")) == (False, at("2026-01-06T08:00"))


def test_the_wall_clock_counts_through_a_clock_change() -> None:
    night = Window(DAILY, minutes("01:00"), minutes("05:00"), "Europe/Berlin")
    begin, end = at("2026-03-29T01:00", BERLIN), at("2026-03-29T05:00", BERLIN)
    assert end - begin == 3 * 3600  # an hour is left out
    assert opens([night], begin) == (True, end)


def test_a_whole_day() -> None:
    assert opens([Window(DAILY, 0, 0)], at("2026-01-05T12:00"))[0]


@pytest.mark.parametrize("text", ["", "22", "2:30", "24:00", "12:60", "aa:bb", "１2:00", "12:3"])
def test_what_is_no_time_of_day(text: str) -> None:
    with pytest.raises(ValueError, match="no time of day"):
        minutes(text)
