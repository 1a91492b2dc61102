"""Triggers by topic, subject and event against a real nats-server, with real MQTT clients and real workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import nats.errors
import paho.mqtt.client as mqtt
import pytest
from nats.js.errors import NotFoundError
from tests.core.pair import until
from tests.functions.broker import Broker, Plane, plane, resource
from tests.functions.node import looped

from edgeward.core.errors import Unreachable
from edgeward.core.invocation import Call, Event

ROOT = Path(__file__).parents[2]
#: Remembers how often it was called with what; fails as long as the message says so.
COUNTS = """
def handler(event, context):
    for one in event.batch():
        key = one.text()
        n = int(context.state.get(key, b"0")) + 1
        context.state.set(key, str(n))
        context.state.set("last", one.subject)
        if key.startswith("poison") or (key.startswith("twice") and n < 3):
            raise ValueError(key)
"""


@looped
async def test_each_message_is_a_call_and_poison_becomes_a_dead_letter_that_can_be_tried_again(tmp_path: Path) -> None:
    async with Broker(tmp_path) as broker, plane(tmp_path) as p:
        trigger = {"mqtt": {"topic": "sensors/+/t", "backoff": "50ms", "retries": 2}}
        await p.take(broker.section(resource("f", COUNTS, trigger)))
        await p.listens("f")
        device = broker.client()
        await broker.send(device, "sensors/a/t", b"one", b"poison", b"twice", b"two")
        await broker.send(device, "sensors/b/t", b"soft", qos=0)
        await broker.send(device, "sensors/b/other", b"no")
        await until(lambda: {"one", "two", "soft", "twice"} <= p.state("f").keys(), 60)
        await until(lambda: int(p.state("f").get("twice", "0")) >= 3, 60)
        await until(lambda: p.part._inlets.adorn("default/f", {}).get("deadLetters") == 1, 60)
        seen = p.state("f")
        assert int(seen["poison"]) >= 3  # a process that stands still for seconds is given a message once more
        assert "no" not in seen
        (letter,) = await p.letters("f")
        assert letter["tries"] >= 3
        assert letter["subject"] == "sensors/a/t"
        assert letter["data"] == "poison"
        assert letter["reason"].startswith("error: ")
        assert "ValueError" in letter["reason"]
        assert [e for e in p.voice.events if e.startswith("DeadLetter f: mqtt sensors/a/t, tried ")]
        (again,) = await p.letters("f", "replay")
        assert again["outcome"] == "kept"
        assert "data" not in again, "whoever may call it may perhaps not read it"
        good = COUNTS.replace("raise ValueError(key)", "return")
        await p.take(broker.section(resource("f", good, trigger)))
        await p.listens("f")
        (again,) = await p.letters("f", "replay")
        assert again["outcome"] == "answered"
        assert "data" not in again
        assert await p.letters("f") == []


@looped
async def test_a_wildcard_in_front_does_not_take_topics_with_a_dollar(tmp_path: Path) -> None:
    async with Broker(tmp_path) as broker, plane(tmp_path) as p:
        await p.take(broker.section(resource("f", COUNTS, {"mqtt": {"topic": "+/t", "backoff": "50ms"}})))
        await p.listens("f")
        device = broker.client()
        for qos in (0, 1):
            await broker.send(device, "$line/t", b"own%d" % qos, qos=qos)
            await broker.send(device, "line/t", b"one%d" % qos, qos=qos)
        # in order: what came before these was looked at before them
        await until(lambda: {"one0", "one1"} <= p.state("f").keys(), 60)
        assert set(p.state("f")) == {"one0", "one1", "last"}


@looped
async def test_what_is_published_while_no_plane_runs_waits_for_it(tmp_path: Path) -> None:
    async with Broker(tmp_path) as broker:
        section = broker.section(
            resource("f", COUNTS, {"mqtt": {"topic": "a/#"}}), resource("g", COUNTS, {"bus": {"subject": "a.*.c"}})
        )
        async with plane(tmp_path) as p:
            await p.take(section)
            await p.listens("f")
            await p.listens("g")
        await broker.send(broker.client(), "a/b/c", *(b"m%d" % n for n in range(20)))
        async with plane(tmp_path) as p:
            await p.take(section)
            for name in ("f", "g"):
                await until(lambda name=name: len(p.state(name)) == 21, 60)  # type: ignore[misc]
            assert p.state("f")["last"] == "a/b/c"
            assert p.state("g")["last"] == "a.b.c"


@looped
async def test_an_update_under_messages_fails_none_of_them(tmp_path: Path) -> None:
    async with Broker(tmp_path) as broker, plane(tmp_path) as p:
        trigger = {"mqtt": {"topic": "a", "concurrency": 4, "retries": 0}}

        def version(n: int) -> dict[str, Any]:
            return broker.section(resource("f", COUNTS, trigger, env={"N": str(n)}, scale={"max": 2}))

        await p.take(version(0))
        await p.listens("f")
        device = broker.client()
        for n in range(1, 4):
            sending = asyncio.create_task(
                broker.send(device, "a", *(b"m%d" % i for i in range(n * 100, n * 100 + 100)))
            )
            await p.take(version(n))
            await sending
            await p.listens("f")
        await until(lambda: len(p.state("f")) == 301, 60)
        assert await p.letters("f") == []


@looped
async def test_messages_come_together_and_one_that_spoils_a_batch_goes_alone(tmp_path: Path) -> None:
    code = COUNTS + (
        "\n_one = handler\n"
        "def handler(event, context):\n"
        "    context.state.set('batch', max(str(len(event.batch())), context.state.get('batch', b'0').decode()))\n"
        "    _one(event, context)\n"
    )
    async with Broker(tmp_path) as broker, plane(tmp_path) as p:
        taken = {"batch": {"max": 5, "wait": "500ms"}, "backoff": "20ms", "retries": 1}
        await p.take(broker.section(resource("f", code, {"mqtt": {"topic": "a", **taken}})))
        await p.listens("f")
        await broker.send(broker.client(), "a", b"m0", b"m1", b"poison", b"m3", b"m4")
        await until(lambda: {"m0", "m1", "m3", "m4"} <= p.state("f").keys(), 60)
        await until(lambda: p.part._inlets.adorn("default/f", {}).get("deadLetters") == 1, 60)
        assert p.state("f")["batch"] == "5"
        (letter,) = await p.letters("f")
        assert letter["data"] == "poison"
        assert letter["type"] == "edgeward.mqtt"


PASSES = """
def handler(event, context):
    n = int(event.text())
    context.state.set(f"n{n}", event.extensions.get("edgewardhops", "0"))
    context.publish("ring/" + context.name, str(n + 1))
"""


@looped
async def test_what_a_function_publishes_comes_once_to_who_listens_and_a_circle_ends(tmp_path: Path) -> None:
    got: list[tuple[str, bytes]] = []

    def on_message(client: mqtt.Client, data: Any, message: mqtt.MQTTMessage) -> None:
        got.append((message.topic, message.payload))

    async with Broker(tmp_path) as broker, plane(tmp_path) as p:
        trigger = {"mqtt": {"topic": "ring/#", "retries": 0}}
        await p.take(broker.section(resource("f", PASSES, trigger, publish=["ring/f"])))
        await p.listens("f")
        listens = asyncio.Event()
        loop = asyncio.get_running_loop()
        device = broker.client()
        device.on_message = on_message
        device.on_subscribe = lambda *_: loop.call_soon_threadsafe(listens.set)
        device.subscribe([("ring/f", 1)])
        await asyncio.wait_for(listens.wait(), 60)
        await broker.send(device, "ring/start", b"0")
        # eight functions may have it: the ninth may not go on, and its message becomes a dead letter
        await until(lambda: p.part._inlets.adorn("default/f", {}).get("deadLetters") == 1, 60)
        await until(lambda: len(set(got)) == 8, 60)
        assert sorted(set(got)) == [("ring/f", b"%d" % n) for n in range(1, 9)]
        assert p.state("f") == {f"n{n}": str(n) for n in range(9)}
        (letter,) = await p.letters("f", "drop")
        assert "data" not in letter
        assert letter["outcome"] == "dropped"
        assert await p.letters("f") == []


@looped
async def test_events_of_the_platform_call_but_not_about_the_function_itself(tmp_path: Path) -> None:
    async with Broker(tmp_path) as broker, plane(tmp_path) as p:
        code = (
            "def handler(event, context):\n"
            "    doc = event.json()\n"
            "    context.state.set(doc['id'], event.subject + ' ' + event.datacontenttype)\n"
        )
        trigger = {"event": {"types": ["Warning"], "kinds": ["App", "Function"], "reasons": []}}
        await p.take(broker.section(resource("f", code, trigger)))
        await p.listens("f")

        async def happens(id: str, subject: str, about: str) -> None:
            await broker.bus.publish(f"ew.event.{subject}", b'{"id":"%b"}' % id.encode(), headers={"Ew-About": about})

        await happens("no", "Normal.App.Started", "App/default/a")
        await happens("no", "Warning.Node.LinkDown", "Node/_/n1")
        await happens("no", "Warning.Function.TriggerFailed", "Function/default/f")
        await happens("other", "Warning.Function.TriggerFailed", "Function/default/g")
        await happens("yes", "Warning.App.RolledBack", "App/default/a")
        await until(lambda: {"other", "yes"} <= p.state("f").keys(), 60)
        assert p.state("f")["yes"] == "ew.event.Warning.App.RolledBack application/json"
        assert "no" not in p.state("f")


@looped
async def test_nothing_is_kept_for_a_trigger_that_is_gone(tmp_path: Path) -> None:
    async def consumers(broker: Broker, stream: str) -> list[str]:
        try:
            return [c.name for c in await broker.bus.jetstream().consumers_info(stream)]
        except NotFoundError:
            return []

    async with Broker(tmp_path) as broker:
        both = resource("f", COUNTS, {"mqtt": {"topic": "a"}}, {"bus": {"subject": "b.c"}})
        async with plane(tmp_path) as p:
            await p.take(broker.section(both))
            await p.listens("f")
            assert len(await consumers(broker, "$MQTT_msgs")) == len(await consumers(broker, "FN_bus")) == 1
            await p.take(broker.section(resource("f", COUNTS, {"mqtt": {"topic": "a"}})))

            async def narrowed() -> bool:
                left = len(await consumers(broker, "$MQTT_msgs"))
                return left == 1 and not await consumers(broker, "FN_bus")

            await until(narrowed, 60)
        async with plane(tmp_path) as p:  # and what went while no plane ran
            await p.take(broker.section())

            async def clean() -> bool:
                return not await consumers(broker, "$MQTT_msgs")

            await until(clean, 60)
            await until(lambda: not (tmp_path / "functions" / "listening").exists(), 60)


@looped
async def test_what_is_over_the_backlog_is_passed_over_oldest_first(tmp_path: Path) -> None:
    async with Broker(tmp_path) as broker:
        section = broker.section(resource("f", COUNTS, {"mqtt": {"topic": "a", "backlog": 10}}))
        async with plane(tmp_path) as p:
            await p.take(section)
            await p.listens("f")
        await broker.send(broker.client(), "a", *(b"m%d" % n for n in range(300)))
        async with plane(tmp_path) as p:
            intake = p.part._inlets
            await p.take(section)
            await until(lambda: "m299" in p.state("f"), 60)
            # whatever was begun before the backlog was looked at is called; the newest ten always are
            assert {f"m{n}" for n in range(290, 300)} <= p.state("f").keys()
            values = intake.metrics()
            dropped = next(v for k, v in values.items() if k.startswith("edgeward_function_trigger_dropped_total"))
            assert dropped + len(p.state("f")) - 1 == 300


@looped
async def test_the_planes_users_may_do_what_triggers_need_and_no_more(tmp_path: Path) -> None:
    async with Broker(tmp_path) as broker:
        heard: list[str] = []

        async def hear(msg: Any) -> None:
            heard.append(msg.subject)

        for subject in ("ew.hub.>", "ew.out.>", "ew.event.>", "a.b", "ew.fn.>"):
            await broker.bus.subscribe(subject, hear)
        js = broker.bus.jetstream()
        await js.add_stream(name="OUT_q", subjects=["ew.out.q"])
        await broker.bus.flush()
        for user in ("plane", "functions"):
            bus = await broker.connect(user, inbox="ew.local.plane")
            for subject in ("ew.hub.beat.n1", "ew.out.q", "ew.event.Warning.App.X", "$JS.API.STREAM.DELETE.OUT_q"):
                await bus.publish(subject, b"x")
            await bus.publish("a.b" if user == "functions" else "ew.fn.dead.default.f", b"x")
            if user == "plane":
                with pytest.raises((Unreachable, nats.errors.Error)):
                    await bus.jetstream(timeout=2).stream_info("OUT_q")
                await bus.publish("a.b", b"x")
            await bus.flush()
            await bus.close()
        await broker.bus.flush()
        await until(lambda: len(heard) >= 2, 60)
        assert sorted(heard) == ["a.b", "ew.fn.dead.default.f"]
        assert (await js.stream_info("OUT_q")).state.messages == 0


def _status(p: Plane) -> Any:
    return (p.voice.statuses.get("f") or {}).get("triggers")


@looped
async def test_a_status_says_how_triggers_are(tmp_path: Path) -> None:
    async with Broker(tmp_path) as broker, plane(tmp_path) as p:
        section = broker.section(resource("f", COUNTS, {"mqtt": {"topic": "a"}}, {"bus": {"subject": "b.>"}}))
        without = {**section, "broker": None}
        await p.take(json.loads(json.dumps(without)))
        await until(lambda: bool(_status(p)), 60)
        assert [t["connected"] for t in _status(p)] == [False, False]
        await until(lambda: "not there yet" in _status(p)[0]["message"], 60)
        await p.take(section)
        await until(lambda: [t["connected"] for t in _status(p)] == [True, True], 60)
        assert _status(p) == [
            {"bus": "b.>", "connected": True, "pending": 0},
            {"mqtt": "a", "connected": True, "pending": 0},
        ]


@looped
async def test_a_plane_that_is_killed_again_and_again_loses_no_message_and_repeats_only_what_was_in_hand(
    tmp_path: Path,
) -> None:
    messages, at_once, rng = 240, 4, random.Random(6)
    code = COUNTS.replace("    for one", "    time.sleep(0.004)\n    for one").replace("\ndef", "import time\n\ndef", 1)
    async with Broker(tmp_path) as broker:
        section = broker.section(
            resource("f", code, {"mqtt": {"topic": "a", "concurrency": at_once}}, scale={"max": at_once})
        )
        (tmp_path / "section.json").write_text(json.dumps(section))
        device = broker.client()

        def seen() -> dict[str, int]:
            if not (tmp_path / "functions" / "state.db").exists():
                return {}
            with contextlib.closing(sqlite3.connect(tmp_path / "functions" / "state.db", timeout=30)) as db:
                try:
                    rows = db.execute("SELECT key, value FROM state WHERE key != 'last'").fetchall()
                except sqlite3.OperationalError:
                    return {}  # it is just being made
            return {str(k): int(v) for k, v in rows}

        first = start(tmp_path)  # has the consumer be there
        await until((tmp_path / "listens").exists, 60)
        kill(first)
        await broker.send(device, "a", *(b"m%d" % n for n in range(messages)))
        kills = [rng.randint(5, 60), rng.randint(80, 140)]
        for most in kills:
            process = start(tmp_path)
            await until(lambda most=most: len(seen()) >= most, 60)  # type: ignore[misc]
            kill(process)
        process = start(tmp_path)
        try:
            await until(lambda: len(seen()) == messages, 60)
        finally:
            kill(process)
        counts = seen()
        assert set(counts) == {f"m{n}" for n in range(messages)}
        # only what was in hand at a kill is called again, not what was answered: of the first 55 and the 116 in all
        assert sum(n - 1 for n in counts.values()) < sum(kills) / 2


def start(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "planes.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "tests.functions.broker", str(folder)], cwd=ROOT, stderr=log)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@looped
async def test_a_broker_that_is_killed_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    async with Broker(tmp_path) as broker, plane(tmp_path) as p:
        code = COUNTS.replace("    for one", "    time.sleep(0.004)\n    for one").replace(
            "\ndef", "import time\n\ndef", 1
        )
        await p.take(broker.section(resource("f", code, {"mqtt": {"topic": "a"}}, {"bus": {"subject": "a"}})))
        await p.listens("f")
        await broker.send(broker.client(), "a", *(b"m%d" % n for n in range(100)))
        await until(lambda: len(p.state("f")) > 20, 60)
        assert broker.server.pid is not None
        os.kill(broker.server.pid, signal.SIGKILL)
        await until(lambda: broker.server.pid is None, 60)
        await broker.server.start()
        await until(lambda: len(p.state("f")) == 101, 60)
        await p.listens("f")


@looped
async def test_nothing_is_published_where_the_broker_takes_nothing_and_nobody_publishes_without_end(
    tmp_path: Path,
) -> None:
    code = """
from edgeward.functions.sdk import Refused

def handler(event, context):
    try:
        context.publish(event.text(), b"x", qos=0)
    except Refused as e:
        return f"{e.kind}: {e}"
"""
    async with Broker(tmp_path) as broker, plane(tmp_path) as p:
        section = broker.section(resource("f", code, publish=["full/#", "free/#"]))
        section["broker"]["closed"] = ["full.a.>"]
        await p.take(section)

        async def says(topic: bytes) -> str:
            call = Call("default/f", Event("1", "/t", "t", topic))
            return (await p.part.dispatcher.invoke(call)).body.decode()

        async def takes() -> bool:
            return await says(b"free/a") == ""

        await until(takes, 60)
        assert await says(b"full/b") == ""
        assert "an Export there is full" in await says(b"full/a/x")
        intake = p.part._inlets._intake
        assert intake is not None
        later = asyncio.get_running_loop().time() + 3600
        while not intake._pace.take("default/f", later):
            pass  # it has used up an hour
        assert (await says(b"free/a")).startswith("refused: more than 5000 messages a second")


@looped
async def test_letters_of_a_function_go_with_it_and_others_stay(tmp_path: Path) -> None:
    async with Broker(tmp_path) as broker, plane(tmp_path) as p:
        f, g = (resource(n, COUNTS, {"mqtt": {"topic": "a", "retries": 0}}) for n in ("f", "g"))
        await p.take(broker.section(f, g))
        await p.listens("f")
        await p.listens("g")
        await broker.send(broker.client(), "a", b"poison")
        for name in ("f", "g"):
            await until(lambda name=name: name_has(p, name), 60)  # type: ignore[misc]
        await p.take(broker.section(g))

        async def gone() -> bool:
            return not await p.letters("f")

        await until(gone, 60)
        assert [x["data"] for x in await p.letters("g")] == ["poison"]


def name_has(p: Plane, name: str) -> bool:
    return bool(p.part._inlets.adorn(f"default/{name}", {}).get("deadLetters"))
