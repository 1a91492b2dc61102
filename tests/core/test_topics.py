"""Topics to subjects and back, checked against what a real nats-server makes of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nats.aio.msg import Msg
from tests.core.pair import Pair, until

from edgeward.core.errors import Invalid
from edgeward.core.topics import check_filter, filters, to_subject, to_topic

_LEVELS = st.lists(st.text(alphabet="ab.$é-_", max_size=4), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("topic", "subject"),
    [
        ("a", "a"),
        ("a/b/c", "a.b.c"),
        ("a.b/c", "a//b.c"),
        ("a..b", "a////b"),
        ("/a", "/.a"),
        ("a/", "a./"),
        ("a//b", "a./.b"),
        ("/", "/./"),
        ("+/b/+", "*.b.*"),
        ("a/#", "a.>"),
        ("a/+/#", "a.*.>"),
    ],
)
def test_to_subject(topic: str, subject: str) -> None:
    assert to_subject(topic) == subject
    if "+" not in topic and "#" not in topic:
        assert to_topic(subject) == topic


def test_nats_server_maps_them_alike(tmp_path: Path) -> None:
    """Published by MQTT, taken by NATS under the subject that we say, and only by a filter that takes them in MQTT."""
    topics = ["a", "a/b", "/a", "a/", "a//b", "a.b/c", "x/..y/é", "//", "a/b/c"]

    async def main() -> None:
        async with Pair(tmp_path) as p:
            got: list[str] = []
            below: list[str] = []

            async def seen(msg: Msg) -> None:
                if not msg.subject.startswith(("$", "_")):
                    got.append(msg.subject)

            async def seen_below(msg: Msg) -> None:
                below.append(msg.subject)

            await p.edge.subscribe(">", seen)
            for subject in filters("a/#"):
                await p.edge.subscribe(subject, seen_below)
            await p.edge.flush()
            client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
            client.connect("127.0.0.1", p.mqtt)
            client.loop_start()
            try:
                for topic in topics:
                    client.publish(topic, b"x", qos=1)
                await until(lambda: len(got) >= len(topics), 20)
            finally:
                client.disconnect()
                client.loop_stop()
            assert got == [to_subject(t) for t in topics]
            assert [to_topic(s) for s in got] == topics
            assert [to_topic(s) for s in below] == [t for t in topics if mqtt.topic_matches_sub("a/#", t)]

    asyncio.run(main())


@settings(deadline=None)
@given(_LEVELS)
def test_every_topic_comes_back(levels: list[str]) -> None:
    topic = "/".join(levels)
    subject = to_subject(topic)
    assert to_topic(subject) == topic
    assert all(subject.split(".")), "no empty token, which NATS refuses"


@settings(deadline=None)
@given(_LEVELS, _LEVELS)
def test_two_topics_never_share_a_subject(a: list[str], b: list[str]) -> None:
    assume(a != b)
    assert to_subject("/".join(a)) != to_subject("/".join(b))


def test_a_filter_of_all_below_takes_the_parent_too() -> None:
    assert filters("a/b/#") == ["a.b.>", "a.b"]
    assert filters("a/+") == ["a.*"]
    assert filters("a") == ["a"]


@pytest.mark.parametrize(
    "topic", ["a", "a/b", "a/+/c", "+/b", "a/#", "a//b", "/a", "a$", "é/☃", "ewe/x", "a/$SYS", "a/ew"]
)
def test_filters_that_are_taken(topic: str) -> None:
    check_filter(topic, "$.f")


@pytest.mark.parametrize(
    ("topic", "why", "remedy"),
    [
        ("", "is no topic filter", "not empty"),
        ("a b", "is no topic filter", "no spaces"),
        ("a\tb", "is no topic filter", "no spaces"),
        ("a\0b", "is no topic filter", "no spaces"),
        ("#", "would be everything", "sensors/#"),
        ("a/#/b", "# stands alone", "sensors/#"),
        ("a/b#", "# stands alone", "sensors/#"),
        ("#/a", "# stands alone", "sensors/#"),
        ("a+/b", r"\+ stands alone", r"sensors/\+/temp"),
        ("a/+b", r"\+ stands alone", r"sensors/\+/temp"),
        ("$SYS/x", "the system's own", "topics of devices"),
        ("$share/g/a", "the system's own", "topics of devices"),
        ("ew", "the system's own", "topics of devices"),
        ("ew/hub", "the system's own", "topics of devices"),
        ("a" * 1000 + "+", r"a{59} ?.*stands alone", "temp"),
    ],
)
def test_filters_that_are_refused_name_field_and_remedy(topic: str, why: str, remedy: str) -> None:
    with pytest.raises(Invalid, match=rf"^\$\.spec\.from\.mqtt: .*{why}.*{remedy}") as caught:
        check_filter(topic, "$.spec.from.mqtt")
    assert len(str(caught.value)) < 200
