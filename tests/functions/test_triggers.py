"""What a trigger takes, and what becomes of a message whose call failed: decided without a broker."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.functions.broker import resource

from edgeward.core.errors import EdgewardError
from edgeward.core.invocation import CallFailed
from edgeward.core.topics import covers
from edgeward.functions.triggers import (
    Item,
    Taking,
    after,
    consumer,
    cover,
    cut,
    event_of,
    is_meant,
    item_of,
    overlap,
    pause,
    takings_of,
    waits,
)

_SUBJECTS = st.lists(st.sampled_from("abc*"), min_size=1, max_size=4).flatmap(
    lambda words: st.sampled_from([".".join(["x", *words]), ".".join(["x", *words, ">"])])
)
_PLAIN = st.lists(st.sampled_from("abc"), min_size=1, max_size=5).map(lambda words: ".".join(["x", *words]))


def takes(pattern: str, subject: str) -> bool:
    """As NATS does it: ``>`` wants at least one word."""
    ours, theirs = pattern.split("."), subject.split(".")
    for n, word in enumerate(ours):
        if word == ">":
            return len(theirs) > n
        if n >= len(theirs) or word not in ("*", theirs[n]):
            return False
    return len(ours) == len(theirs)


@given(st.lists(_SUBJECTS, max_size=6), _PLAIN)
def test_a_cover_takes_all_and_nothing_twice(subjects: list[str], plain: str) -> None:
    made = cover(subjects)
    assert sum(takes(m, plain) for m in made) <= 1
    if any(takes(s, plain) for s in subjects):
        assert any(takes(m, plain) for m in made)
    assert not [(a, b) for a in made for b in made if a < b and overlap(a, b)]
    assert cover(made) == made


@given(_SUBJECTS, _SUBJECTS, _PLAIN)
def test_what_both_take_overlaps(a: str, b: str, plain: str) -> None:
    assert overlap(a, b) == overlap(b, a)
    if takes(a, plain) and takes(b, plain):
        assert overlap(a, b)


def test_covers_of_what_people_write() -> None:
    assert cover(["a.b", "c.>", "c.d", "c.*.e"]) == ["a.b", "c.>"]
    assert cover(["a.*.c", "a.b.*"]) == ["a.*.*"]
    assert cover([]) == []


@pytest.mark.parametrize(
    ("pattern", "topic", "held"),
    [
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/b/c", False),
        ("+/x", "$SYS/x", False),
        ("+/x", "ew/x", False),
        ("+/x", "b/x", True),
        ("a", "a/b", False),
    ],
)
def test_which_topics_a_filter_takes(pattern: str, topic: str, held: bool) -> None:
    assert covers(pattern, topic) is held


def test_a_wildcard_in_front_is_not_meant_for_the_systems_own() -> None:
    wide, own, bus = Taking("mqtt", "+/x", ["*.x"]), Taking("mqtt", "a/#", ["a.>", "a"]), Taking("bus", "a.*", ["a.*"])
    assert [s for s in ("b.x", "$b.x", "ew.x", "_INBOX.x", "ewe.x", "ew//.x") if is_meant(wide, s)] == [
        "b.x", "ewe.x", "ew//.x",
    ]  # fmt: skip
    assert is_meant(own, "a.$x")
    assert is_meant(bus, "a.$x")


def takings(*triggers: dict[str, Any]) -> list[Taking]:
    return takings_of(resource("f", "def handler(e, c): ...", *triggers).spec.triggers)


def test_what_is_declared_becomes_what_is_taken() -> None:
    mqtt, bus, event = takings(
        {"mqtt": {"topic": "a/+/#", "qos": 0, "concurrency": 4, "batch": {"max": 10, "wait": "2s"}, "retries": 0}},
        {"bus": {"subject": "m.*.>", "backoff": "5s", "deadLetter": "drop"}},
        {"event": {"types": ["Warning"], "reasons": ["RolledBack", "DeadLetter"]}},
    )
    assert mqtt == Taking("mqtt", "a/+/#", ["a.*.>", "a.*"], False, 4, 10, 2.0, 0)
    assert bus == Taking("bus", "m.*.>", ["m.*.>"], backoff=5.0, dead=False)
    assert event.subjects == ["ew.event.Warning.*.RolledBack", "ew.event.Warning.*.DeadLetter"]
    # a consumer is the same as long as it takes the same messages, and another function's is another
    (slower,) = takings({"bus": {"subject": "m.*.>", "concurrency": 9}})
    assert consumer("default/f", slower) == consumer("default/f", bus) != consumer("default/g", bus)


@pytest.mark.parametrize(
    ("trigger", "says"),
    [
        ({}, r"triggers\[0\]: says nothing"),
        ({"mqtt": {"topic": "a"}, "bus": {"subject": "a"}}, r"triggers\[0\]: is mqtt and bus at once"),
        ({"mqtt": {"topic": "#"}}, r"triggers\[0\].mqtt.topic"),
        ({"mqtt": {"topic": "a/#/b"}}, r"mqtt.topic: .*# stands alone"),
        ({"mqtt": {"topic": "ew/x"}}, "the system's own"),
        ({"mqtt": {}}, "no topic filter"),
        ({"mqtt": {"topic": "a", "qos": 2}}, "qos"),
        ({"mqtt": {"topic": "a", "backoff": "10m"}}, r"mqtt.backoff: is out of range \(at most 300s"),
        ({"mqtt": {"topic": "a", "batch": {"max": 2, "wait": "2m"}}}, "batch.wait"),
        ({"mqtt": {"topic": "a", "concurrency": 0}}, "concurrency"),
        ({"bus": {"subject": ">"}}, "bus.subject: .*the system's own"),
        ({"bus": {"subject": "*.a"}}, "name a first word"),
        ({"bus": {"subject": "$JS.API"}}, "the system's own"),
        ({"bus": {"subject": "ew.hub.x"}}, "the system's own"),
        ({"bus": {"subject": "a..b"}}, "no subject"),
        ({"bus": {"subject": "a.b*"}}, r"\* is a whole word"),
        ({"bus": {"subject": "a.>.b"}}, "> the last one"),
        ({"event": {"types": ["Bad"]}}, "types"),
        ({"event": {"kinds": ["a.b"]}}, r"event.kinds\[0\]: 'a.b' is no word"),
        ({"event": {"kinds": [f"K{n}" for n in range(9)], "reasons": [f"R{n}" for n in range(9)]}}, "at most 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_declared(trigger: dict[str, Any], says: str) -> None:
    with pytest.raises(EdgewardError, match=says):
        takings(trigger)


def test_the_same_messages_twice_are_refused() -> None:
    with pytest.raises(EdgewardError, match=r"triggers\[1\].mqtt: is there twice: mqtt a"):
        takings({"mqtt": {"topic": "a"}}, {"mqtt": {"topic": "a", "qos": 0}})


def failure(kind: Any = "error", status: int = 0) -> CallFailed:
    return CallFailed(kind, "no", function="default/f", status=status)


def test_what_becomes_of_a_message_whose_call_failed() -> None:
    taking = Taking("mqtt", "a", ["a"], retries=2)
    kept = [Item("a", b"", "$JS.ACK.x", tries=n) for n in (1, 2, 3, 4)]
    assert [after(taking, item, failure(), 1) for item in kept] == ["again", "again", "dead", "dead"]
    assert after(taking, kept[3], failure(), 2) == "again"  # alone first: it may be another's fault
    assert after(taking, Item("a", b""), failure(), 1) == "dead"  # nobody can give it out again
    assert after(taking, Item("a", b""), failure(), 5) == "dead"
    assert after(taking, kept[0], failure("too-large", 413), 1) == "dead"  # it will not become smaller
    assert after(taking, kept[0], failure("too-large"), 1) == "again"
    assert {k for k in ("busy", "unavailable", "unknown", "refused") if waits(failure(k))} == {
        "busy", "unavailable", "unknown", "refused",
    }  # fmt: skip
    assert not [k for k in ("error", "timeout", "memory", "crashed", "too-large") if waits(failure(k))]


def test_pauses_grow_are_bounded_and_the_same_for_the_same_message() -> None:
    for tries in range(1, 60):
        base = min(300.0, 2.0 ** (tries - 1))
        assert 0.75 * base <= pause(1.0, tries, "m") <= 1.25 * base
        assert pause(1.0, tries, "m") == pause(1.0, tries, "m")
    assert len({pause(1.0, 1, f"m{n}") for n in range(50)}) > 40


def test_how_many_are_called_together() -> None:
    def items(*tries: int) -> list[Item]:
        return [Item("a", b"", "r", tries=n, since=10.0) for n in tries]

    one, many = Taking("mqtt", "a", ["a"]), Taking("mqtt", "a", ["a"], batch=3, wait=2.0)
    assert cut([], many, 10.0) == (0, 0.0)
    assert cut(items(1, 1), one, 10.0) == (1, 0.0)
    assert cut(items(1, 1), many, 11.5) == (0, 0.5)
    assert cut(items(1, 1), many, 12.0) == (2, 0.0)
    assert cut(items(1, 1, 1, 1), many, 10.0) == (3, 0.0)
    assert cut(items(2, 1, 1), many, 10.0) == (1, 0.0)
    assert cut(items(1, 1, 2), many, 10.0) == (2, 0.0)


def test_what_a_consumer_gives_out_is_read_from_its_reply() -> None:
    short = "$JS.ACK.$MQTT_msgs.fn-1.3.17.20.1700000000000000001.5"
    long = "$JS.ACK.n-1.ABC.$MQTT_msgs.fn-1.3.17.20.1700000000000000001.5.tok"
    for reply in (short, long):
        item = item_of("$MQTT.msgs.a.b", b"x", reply, {"Ew-Hops": "2"})
        assert (item.subject, item.tries, item.seq, item.stamp, item.hops) == ("a.b", 3, 17, 1700000000000000001, "2")
    taking = Taking("mqtt", "a/#", ["a.>"])
    event = event_of(taking, item, node="n1", name="fn-1", time="2026-01-01T00:00:00Z")
    assert (event.type, event.subject, event.source) == ("edgeward.mqtt", "a/b", "/nodes/n1/mqtt")
    assert event.id == "n1/fn-1/17-17979cfe362a0001"
    assert event.extensions == {"edgewardhops": "2"}
