"""What a trigger by topic, subject or event is, and what becomes of a message whose call failed. Pure.

A declared trigger becomes a :class:`Taking` for the plane: which subjects of the node's nats-server it takes, and what
must be kept for it. ``listener.py`` brings the messages, ``intake.py`` makes what the broker keeps for them. A message
is acknowledged when its call was answered; :func:`after` says what happens when it was not.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from edgeward.core.backoff import backoff
from edgeward.core.invocation import HOPS, CallFailed, Event
from edgeward.core.quantity import parse_duration
from edgeward.core.topics import filters, is_own, to_topic

#: nats-server's stream of MQTT messages of QoS 1 and 2, and its subjects.
MQTT_STREAM, MQTT_PREFIX = "$MQTT_msgs", "$MQTT.msgs."
#: What is kept for triggers by subject and by event until they took it; messages that no trigger could answer.
BUS_STREAM, DEAD_STREAM = "FN_bus", "FN_dead"
#: Where the agent says the platform's events, and where dead letters go: `ew.` is not a device's to use.
EVENTS, DEAD = "ew.event", "ew.fn.dead"
#: The header that carries :data:`~edgeward.core.invocation.HOPS` on the bus.
HOPS_HEADER = "Ew-Hops"
#: The header that says what an event of the platform is about: kind/namespace/name.
ABOUT_HEADER = "Ew-About"
#: Longest pause between two tries, seconds.
LONGEST = 300.0
#: What is not the message's fault: it waits, and the try does not count.
_WAITS = frozenset({"busy", "unavailable", "unknown", "refused"})

Kind = Literal["mqtt", "bus", "event"]


class Taking(msgspec.Struct, omit_defaults=True):
    """One trigger as the plane is told of it. Times in seconds."""

    kind: Kind
    #: As declared: a topic filter, a subject, or what events it takes.
    name: str
    #: Subjects of the node's nats-server, without the prefix under which it keeps MQTT messages.
    subjects: list[str]
    #: False: as it comes, at most once, nothing is kept for it.
    durable: bool = True
    concurrency: int = 1
    batch: int = 1
    wait: float = 0.0
    retries: int = 3
    backoff: float = 1.0
    dead: bool = True
    backlog: int = 100_000


class Reach(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the node's nats-server is reached, as the agent says it."""

    url: str
    password: str
    mqtt_host: str
    mqtt_port: int
    #: For triggers and their streams; for topics.
    user: str = "plane"
    speaker: str = "functions"
    #: Subjects that the broker takes nothing on, because an Export there is full.
    closed: tuple[str, ...] = ()


def takings_of(triggers: Iterable[Any]) -> list[Taking]:
    """The plans of ``spec.triggers`` (:class:`~edgeward.functions.spec.Trigger`); those by time are not among them."""
    found = []
    for trigger in triggers:
        if (mqtt := trigger.mqtt) is not None:
            found.append(_plan("mqtt", mqtt.topic, filters(mqtt.topic), mqtt, durable=mqtt.qos > 0))
        elif (bus := trigger.bus) is not None:
            found.append(_plan("bus", bus.subject, [bus.subject], bus))
        elif (event := trigger.event) is not None:
            parts = [event.types or ["*"], event.kinds or ["*"], event.reasons or ["*"]]
            subjects = [".".join((EVENTS, *tokens)) for tokens in itertools.product(*parts)]
            found.append(_plan("event", " ".join("|".join(p) for p in parts), subjects, event))
    return found


def _plan(kind: Kind, name: str, subjects: list[str], given: Any, *, durable: bool = True) -> Taking:
    batch = given.batch
    return Taking(
        kind,
        name,
        subjects,
        durable,
        given.concurrency,
        1 if batch is None else batch.max,
        0.0 if batch is None else parse_duration(batch.wait),
        given.retries,
        parse_duration(given.backoff),
        given.deadLetter == "keep",
        given.backlog,
    )


def owner(key: str) -> str:
    """What the names of all consumers of a function begin with."""
    return f"fn-{zlib.crc32(key.encode()):08x}-"


def consumer(key: str, plan: Taking) -> str:
    """The name of a trigger's durable consumer: the same as long as it takes the same messages."""
    said = msgspec.json.encode([key, plan.kind, plan.subjects])
    return owner(key) + hashlib.sha256(said).hexdigest()[:12]


# -- subjects ----------------------------------------------------------------------------------------------------------


def overlap(a: str, b: str) -> bool:
    """Whether there are subjects that both filters take."""
    ours, theirs = a.split("."), b.split(".")
    for x, y in itertools.zip_longest(ours, theirs):
        if x == ">" or y == ">":
            return x is not None and y is not None
        if x is None or y is None or (x != y and "*" not in (x, y)):
            return False
    return True


def _both(a: str, b: str) -> str:
    """The narrowest filter that takes what either takes."""
    out: list[str] = []
    for x, y in itertools.zip_longest(a.split("."), b.split(".")):
        if x is None or y is None or ">" in (x, y):
            return ".".join([*out, ">"])
        out.append(x if x == y else "*")
    return ".".join(out)


def cover(subjects: Iterable[str]) -> list[str]:
    """Filters that take all of these and do not overlap: a stream may not have two that do."""
    found: list[str] = []
    for subject in sorted(set(subjects)):
        while (other := next((f for f in found if overlap(f, subject)), None)) is not None:
            found.remove(other)
            subject = _both(other, subject)  # noqa: PLW2901 - it grows until it stands alone
        found.append(subject)
    return sorted(found)


# -- messages ----------------------------------------------------------------------------------------------------------


class Item(msgspec.Struct, eq=False):
    """One message on its way to a call. ``reply``: where it is acknowledged; empty: nowhere."""

    subject: str
    data: bytes
    reply: str = ""
    seq: int = 0
    #: How often it was given out, this time included.
    tries: int = 1
    #: When the broker took it, nanoseconds of Unix time.
    stamp: int = 0
    hops: str = ""
    #: When it came here, on the loop's clock.
    since: float = 0.0


def item_of(subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> Item:
    """From what a consumer gave out; ``reply`` tells the rest.

    ``$JS.ACK.<stream>.<consumer>.<tries>.<sequence>.<consumer's sequence>.<ns>.<pending>``, or with the domain and the
    account's hash behind ``ACK``.
    """
    parts = reply.split(".")
    tries, seq, stamp = (parts[6], parts[7], parts[9]) if len(parts) >= 11 else (parts[4], parts[5], parts[7])
    hops = (headers or {}).get(HOPS_HEADER, "")
    return Item(subject.removeprefix(MQTT_PREFIX), data, reply, int(seq), int(tries), int(stamp), hops)


def is_meant(plan: Taking, subject: str) -> bool:
    """Whether a message that the plan's subjects let through is for it: NATS' wildcards take the system's own too."""
    return plan.kind != "mqtt" or not plan.name.startswith("+") or not is_own(subject.split(".", 1)[0])


def event_of(plan: Taking, item: Item, *, node: str, name: str, time: str) -> Event:
    """The CloudEvents event of a message. Its ``id`` is the same whenever the broker gives it out again."""
    topic = to_topic(item.subject) if plan.kind == "mqtt" else item.subject
    kind = "edgeward.mqtt" if plan.kind == "mqtt" else "edgeward.bus" if plan.kind == "bus" else "edgeward.event"
    return Event(
        id=f"{node}/{name}/{item.seq}-{item.stamp:x}",
        source=f"/nodes/{node}/{plan.kind}",
        type=kind,
        data=item.data,
        datacontenttype="application/json" if plan.kind == "event" else "",
        subject=topic,
        time=time,
        extensions={HOPS: item.hops} if item.hops else {},
    )


# -- what failed -------------------------------------------------------------------------------------------------------


def waits(error: CallFailed) -> bool:
    """Whether it can only wait: no instance is free, or none can be started. Its message is not to blame."""
    return error.kind in _WAITS


def after(plan: Taking, item: Item, error: CallFailed, together: int) -> Literal["again", "dead"]:
    """What becomes of a message whose call failed; ``together``: how many were in that call."""
    if not item.reply:
        return "dead"  # nobody has it any more
    if together > 1:
        return "again"  # alone, so that the others do not share its fate
    return "dead" if error.status == 413 or item.tries > plan.retries else "again"


def pause(first: float, tries: int, mark: str) -> float:
    """Seconds until the next try: twice as long each time, by a share that belongs to the message (``mark``)."""
    share = zlib.crc32(f"{mark} {tries}".encode()) / 2**32
    return backoff(tries, first, LONGEST) * (0.75 + share / 2)


def cut(ready: Sequence[Item], plan: Taking, now: float) -> tuple[int, float]:
    """How many of ``ready`` are called now, and if none, after how many seconds to look again.

    What was tried before goes alone: it may be what made a batch fail.
    """
    if not ready:
        return 0, 0.0
    if plan.batch <= 1 or ready[0].tries > 1:
        return 1, 0.0
    n = 0
    for item in ready:
        if item.tries > 1 or n == plan.batch:
            return n, 0.0
        n += 1
    left = ready[0].since + plan.wait - now
    return (n, 0.0) if n == plan.batch or left <= 0 else (0, left)
