"""Schedules, compared with a search that looks at every minute; clock changes and clocks that are set."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.core.cron import Schedule, Timer

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: object = UTC) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()  # type: ignore[arg-type]


def shown(instant: float, zone: object = UTC) -> str:
    return datetime.fromtimestamp(instant, zone).strftime("%Y-%m-%dT%H:%M:%S%z")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("* * * *", "five fields"),
        ("60 * * * *", "0-59 of minute"),
        ("* 24 * * *", "0-23 of hour"),
        ("* * 0 * *", "1-31 of day of month"),
        ("* * * foo *", "no month"),
        ("*/0 * * * *", "step of 0"),
        ("5-2 * * * *", "not within"),
        ("0 0 30 feb *", "no such day"),
        ("0 0 * * 1.5", "day of week"),
        ("", "five fields"),
    ],
)
def test_what_is_no_schedule_is_refused_with_its_field(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule.parse(text)


@pytest.mark.parametrize(
    ("text", "from_", "next_"),
    [
        ("*/15 * * * *", "2026-01-01T00:00:00", "2026-01-01T00:15:00+0000"),
        ("0 9-17/4 * * mon-fri", "2026-01-02T17:00:00", "2026-01-05T09:00:00+0000"),
        ("0 0 29 feb *", "2026-01-01T00:00:00", "2028-02-29T00:00:00+0000"),
        ("0 0 13 * fri", "2026-01-01T00:00:00", "2026-01-02T00:00:00+0000"),
        ("0 0 * * 7", "2026-01-01T00:00:00", "2026-01-04T00:00:00+0000"),
        ("*/10 * * * * *", "2026-01-01T00:00:05", "2026-01-01T00:00:10+0000"),
        ("30 59 23 31 12 *", "2026-12-31T23:59:30", "2027-12-31T23:59:30+0000"),
    ],
)
def test_the_next_time(text: str, from_: str, next_: str) -> None:
    assert shown(Schedule.parse(text).after(at(from_))) == next_


def test_clock_changes_neither_lose_nor_repeat() -> None:
    daily = Schedule.parse("30 2 * * *")
    # 2026-03-29: 02:00 becomes 03:00, so half past two is not there: it runs behind the gap
    assert shown(daily.after(at("2026-03-28T12:00:00", BERLIN), BERLIN), BERLIN) == "2026-03-29T03:30:00+0200"
    # 2026-10-25: 03:00 becomes 02:00, so half past two is there twice: it runs at the first
    first = daily.after(at("2026-10-24T12:00:00", BERLIN), BERLIN)
    assert shown(first, BERLIN) == "2026-10-25T02:30:00+0200"
    assert shown(daily.after(first, BERLIN), BERLIN) == "2026-10-26T02:30:00+0100"
    # every twenty minutes goes on every twenty minutes
    often, instants = Schedule.parse("*/20 * * * *"), [at("2026-10-24T23:50:00")]
    for _ in range(12):
        instants.append(often.after(instants[-1], BERLIN))
    assert [b - a for a, b in pairwise(instants[1:])] == [1200.0] * 11
    instants = [at("2026-03-29T00:00:00")]
    for _ in range(12):
        instants.append(often.after(instants[-1], BERLIN))
    assert [b - a for a, b in pairwise(instants)] == [1200.0] * 12


_field = st.one_of(
    st.just("*"), st.integers(1, 12).map(str), st.integers(2, 9).map(lambda n: f"*/{n}"), st.just("2-5,7")
)


@settings(max_examples=40)
@given(_field, _field, _field, st.just("*"), _field, st.integers(0, 300_000))
def test_it_is_what_a_look_at_every_minute_finds(m: str, h: str, dom: str, mon: str, dow: str, minutes: int) -> None:
    dow = dow if dow in ("*", "2-5,7") or dow.startswith("*/") else str(int(dow) % 7)
    schedule = Schedule.parse(f"{m} {h} {dom} {mon} {dow}")
    moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
    found = datetime.fromtimestamp(schedule.after(moment.timestamp()), UTC)
    look = moment + timedelta(minutes=1)

    def due(t: datetime) -> bool:
        day, weekday = t.day in schedule.days, t.isoweekday() % 7 in schedule.weekdays
        days = day or weekday if dom[0] != "*" and dow[0] != "*" else day and weekday
        return days and t.hour in schedule.hours and t.minute in schedule.minutes and t.month in schedule.months

    while not due(look):
        look += timedelta(minutes=1) if look.hour in schedule.hours else timedelta(minutes=60 - look.minute)
    assert found == look


def timer(**more: object) -> Timer:
    made = Timer(Schedule.parse("0 * * * *"), UTC, **more)  # type: ignore[arg-type]
    made.look(at("2026-01-01T00:30:00"))
    return made


def test_a_timer_runs_each_instant_once() -> None:
    t = timer()
    assert t.look(at("2026-01-01T00:59:59")) == (0.0, 1.0)
    assert t.look(at("2026-01-01T01:00:00")) == (at("2026-01-01T01:00:00"), 3600.0)
    assert t.look(at("2026-01-01T01:00:00"))[0] == 0.0
    assert t.look(at("2026-01-01T02:00:30"))[0] == at("2026-01-01T02:00:00"), "half a minute late is in time"


def test_what_was_missed_is_passed_over_or_run_once() -> None:
    late = at("2026-01-01T05:30:00")
    assert timer().look(late) == (0.0, 1800.0)
    t = timer(once=True)
    assert t.look(late) == (at("2026-01-01T05:00:00"), 1800.0)
    assert t.look(late)[0] == 0.0
    t = timer()
    assert t.look(at("2026-01-01T05:00:10"))[0] == at("2026-01-01T05:00:00"), "the last of them is in time"
    t = timer(once=True)
    assert t.look(at("2036-01-01T05:30:00"))[0] == at("2036-01-01T05:00:00"), "ten years cost no more than an hour"
    weekly = Timer(Schedule.parse("0 0 * * mon"), UTC, once=True, last=at("2026-01-01T00:00:00"))
    assert weekly.look(at("2026-03-01T12:00:00"))[0], "two months of Mondays: one run"
    assert weekly.look(at("2026-03-01T12:00:01"))[0] == 0.0


def test_a_clock_that_is_set_back_repeats_nothing_and_waits_for_ever_for_nothing() -> None:
    t = timer()
    assert t.look(at("2026-01-01T01:00:00"))[0]
    assert t.look(at("2026-01-01T00:59:00")) == (0.0, 3660.0), "a little back: what was run is not run again"
    assert t.look(at("2025-01-01T00:30:00")) == (0.0, 1800.0), "a year back: it begins anew"
    assert t.look(at("2025-01-01T01:00:00"))[0]


def test_jitter_moves_all_runs_by_the_same() -> None:
    t = timer(jitter=90.0)
    assert t.look(at("2026-01-01T01:00:00")) == (0.0, 90.0)
    assert t.look(at("2026-01-01T01:01:30"))[0] == at("2026-01-01T01:00:00")
