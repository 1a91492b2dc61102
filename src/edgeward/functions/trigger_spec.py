"""What calls a function by itself, as it is declared: times, topics, subjects, events of the platform. Pure.

``spec.py`` has it as ``spec.triggers``; ``cron.py`` and ``triggers.py`` say what it means.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta

from edgeward.core.cron import Schedule, check_zone
from edgeward.core.declared import Declared
from edgeward.core.errors import Invalid
from edgeward.core.quantity import DURATION_PATTERN, parse_duration
from edgeward.core.topics import check_filter, check_subject
from edgeward.functions.triggers import takings_of

Duration = Annotated[str, Meta(pattern=DURATION_PATTERN)] | float | int
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]{0,62}")


class Cron(Declared):
    """A call at times of the node's own clock, with and without the link."""

    schedule: Annotated[str, Meta(description="minute hour day month weekday, or six fields with seconds first")]
    zone: Annotated[str, Meta(description="Time zone, e.g. Europe/Berlin", max_length=64)] = "UTC"
    jitter: Annotated[Duration, Meta(description="Each node calls later, by a time of its own up to this")] = "0s"
    missed: Annotated[
        Literal["skip", "once"], Meta(description="What was due while the node was off: nothing, or one call")
    ] = "skip"
    overlap: Annotated[
        Literal["forbid", "allow"], Meta(description="Whether it is called while the last such call still runs")
    ] = "forbid"
    data: Annotated[str, Meta(description="The event's data")] = ""


class Batch(Declared):
    """Several messages in one call."""

    max: Annotated[int, Meta(description="Messages in one event", ge=1, le=1000)]
    wait: Annotated[Duration, Meta(description="How long the first of them waits for the others")] = "0s"


class Taken(Declared):
    """How messages become calls: each is acknowledged when its call was answered."""

    concurrency: Annotated[int, Meta(description="Calls of this trigger at once on one node", ge=1, le=256)] = 1
    batch: Annotated[Batch | None, Meta(description="Several messages in one call")] = None
    retries: Annotated[int, Meta(description="Calls after the first one that failed", ge=0, le=1000)] = 3
    backoff: Annotated[Duration, Meta(description="Until the first of them; then twice as long each, up to 5m")] = "1s"
    deadLetter: Annotated[
        Literal["keep", "drop"],
        Meta(description="What no call answered: kept on the node with the reason, or only counted"),
    ] = "keep"
    backlog: Annotated[
        int, Meta(description="Messages that may wait; what is more is passed over, oldest first", ge=1, le=10_000_000)
    ] = 100_000


class MqttTrigger(Taken):
    """A call for each message on topics of the node's broker."""

    topic: Annotated[str, Meta(description="Topic filter (`+` and `#`)")] = ""
    qos: Annotated[
        Literal[0, 1],
        Meta(description="1: what was published with QoS 1 or 2 is kept until it is answered; 0: nothing is kept"),
    ] = 1


class BusTrigger(Taken):
    """A call for each message on subjects of the node's nats-server; a topic a/b is the subject a.b."""

    subject: Annotated[str, Meta(description="Subject (`*` and `>`)")] = ""


class EventTrigger(Taken):
    """A call for each event of the platform on this node."""

    types: Annotated[list[Literal["Normal", "Warning"]], Meta(description="All, where left out")] = []
    kinds: Annotated[list[str], Meta(description="Of what, e.g. App; all, where left out", max_length=16)] = []
    reasons: Annotated[list[str], Meta(description="E.g. RolledBack; all, where left out", max_length=16)] = []


class Trigger(Declared):
    """What calls the function by itself, on every node that has it: one of these."""

    cron: Annotated[Cron | None, Meta(description="At times")] = None
    mqtt: Annotated[MqttTrigger | None, Meta(description="By messages on topics")] = None
    bus: Annotated[BusTrigger | None, Meta(description="By messages on subjects")] = None
    event: Annotated[EventTrigger | None, Meta(description="By events of the platform")] = None


def _check_cron(cron: Cron, at: str) -> None:
    try:
        Schedule.parse(cron.schedule)
    except ValueError as e:
        raise Invalid(str(e), field=f"{at}.schedule", remedy="e.g. 0 6 * * mon-fri") from None
    check_zone(cron.zone, f"{at}.zone")
    try:
        parse_duration(cron.jitter)
    except ValueError as e:
        raise Invalid(str(e), field=f"{at}.jitter") from None


def _check_taken(given: Taken, at: str) -> None:
    for name, duration, most in (
        ("backoff", given.backoff, 300.0),
        ("batch.wait", given.batch.wait if given.batch else 0, 60.0),
    ):
        try:
            seconds = parse_duration(duration)
        except ValueError as e:
            raise Invalid(str(e), field=f"{at}.{name}") from None
        if not 0 <= seconds <= most:
            raise Invalid("is out of range", field=f"{at}.{name}", remedy=f"at most {most:g}s")
    if isinstance(given, MqttTrigger):
        check_filter(given.topic, f"{at}.topic")
    elif isinstance(given, BusTrigger):
        check_subject(given.subject, f"{at}.subject")
    elif isinstance(given, EventTrigger):
        for name, words in (("kinds", given.kinds), ("reasons", given.reasons)):
            for n, word in enumerate(words):
                if not _WORD.fullmatch(word):
                    remedy = "e.g. App" if name == "kinds" else "e.g. RolledBack"
                    raise Invalid(f"{word[:60]!r} is no word", field=f"{at}.{name}[{n}]", remedy=remedy)
        if len(given.kinds or "1") * len(given.reasons or "1") * len(given.types or "1") > 64:
            raise Invalid("are too many combinations", field=at, remedy="at most 64; write another trigger")


def check_triggers(triggers: Sequence[Trigger]) -> None:
    """Raises ``Invalid``."""
    seen: set[str] = set()
    for n, trigger in enumerate(triggers):
        at = f"$.spec.triggers[{n}]"
        named = [name for name in ("cron", "mqtt", "bus", "event") if getattr(trigger, name) is not None]
        if len(named) != 1:
            raise Invalid(
                "says nothing" if not named else f"is {' and '.join(named)} at once",
                field=at,
                remedy="write one of cron: {schedule: ...}, mqtt: {topic: ...}, bus: {subject: ...}, event: {}",
            )
        at = f"{at}.{named[0]}"
        if trigger.cron is not None:
            _check_cron(trigger.cron, at)
            continue
        given = trigger.mqtt or trigger.bus or trigger.event
        if given is not None:
            _check_taken(given, at)
        for plan in takings_of([trigger]):
            if (same := f"{plan.kind} {plan.name}") in seen:
                raise Invalid(f"is there twice: {same}", field=at, remedy="leave one out")
            seen.add(same)
