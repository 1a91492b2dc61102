"""When an App that has a schedule runs: pure; time is an argument.

Such an App starts at its times, ends by itself, and is not there in between. What the plan knows as slots of one
version is one *run*: it is due until every slot has ended. A run that is due while the one before it still goes on is
left out. A version that is declared anew is taken by the next run; there is nothing beside which it could prove itself.
"""

from __future__ import annotations

from typing import Annotated, Literal
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Meta

from edgeward.core.cron import Schedule, Timer, check_zone
from edgeward.core.declared import Declared
from edgeward.core.errors import Invalid
from edgeward.workloads.plan import State, slot_key

#: Longest time between two looks at the wall clock, seconds: it may have been set.
LOOK = 20.0


class Times(Declared):
    """When an App runs that is no service: it starts at these times and ends by itself."""

    cron: Annotated[str, Meta(description="minute hour day month weekday, or six fields with seconds first")]
    zone: Annotated[str, Meta(description="Time zone, e.g. Europe/Berlin", max_length=64)] = "UTC"
    missed: Annotated[
        Literal["skip", "once"], Meta(description="What was due while the node was off: nothing, or one run")
    ] = "skip"


def check_times(times: Times, policy: str) -> None:
    """Raises ``Invalid``. ``policy``: of the App's restart."""
    try:
        Schedule.parse(times.cron)
    except ValueError as e:
        raise Invalid(str(e), field="$.spec.schedule.cron", remedy="e.g. */5 * * * *") from None
    check_zone(times.zone, "$.spec.schedule.zone")
    if policy == "always":
        raise Invalid(
            "an app with a schedule ends by itself",
            field="$.spec.restart.policy",
            remedy="write restart: {policy: on-failure}, or never",
        )


class Look(msgspec.Struct, frozen=True):
    """``version``: what this run is of. ``began``, ``left_out``: a run is due now, or would be. ``next``: Unix time."""

    version: str
    began: bool
    left_out: bool
    next: float
    again: float


def look(times: Times, state: State, wanted: str, replicas: int, living: bool, now: float) -> Look:
    """What is due now; changes ``state``, which the caller keeps. ``living``: are there instances? ``now``: Unix."""
    zone = ZoneInfo(times.zone)
    timer = Timer(Schedule.parse(times.cron), zone, once=times.missed == "once", last=state.ran)
    if not living and state.current != wanted:
        state.serve(wanted)
        state.bad = {}
    version = state.current or wanted
    if state.due and not living and _ended(state, version, replicas):
        state.due = False
    run, wait = timer.look(now)
    state.ran = timer.last
    began, left_out = bool(run) and not state.due, bool(run) and state.due
    if began:
        state.due = True
        for n in range(replicas):
            slot = state.slots.get(slot_key(version, n))
            if slot is not None:
                slot.done, slot.restarts, slot.not_before = False, 0, 0.0
    return Look(version, began, left_out, now + wait, min(wait, LOOK))


def _ended(state: State, version: str, replicas: int) -> bool:
    slots = [state.slots.get(slot_key(version, n)) for n in range(replicas)]
    return all(s is not None and s.done for s in slots)
