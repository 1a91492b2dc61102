"""What a handler asks of its node: answered, bounded, and refused with a word that it can catch."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.core.pair import until
from tests.functions.node import Node, function, looped

from edgeward.core import invocation as wire
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.invocation import HOPS, Event, batch_of
from edgeward.core.resource import decode
from edgeward.functions.asks import Tally, hops_of
from edgeward.functions.versions import Config, Version, config_of

#: Does what the event says with the state, and tells what came of it.
STATE = """
import json
from edgeward.functions.sdk import Conflict, Refused

def handler(event, context):
    verb, *args = event.json()
    try:
        got = getattr(context.state, verb)(*args)
    except Conflict as e:
        return {"conflict": str(e)}
    except Refused as e:
        return {e.kind: str(e)}
    return {"got": got.decode() if isinstance(got, bytes) else got}
"""


async def _does(node: Node, *what: Any) -> dict[str, Any]:
    reply = await node.call("f", json.dumps(what).encode())
    return dict(json.loads(reply.body))


@looped
async def test_what_a_function_keeps_is_there_for_its_next_version_and_for_no_other(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", STATE), function("g", STATE)])
        assert await _does(node, "get", "a") == {"got": None}
        first = (await _does(node, "set", "a", "one"))["got"]
        assert await _does(node, "get", "a") == {"got": "one"}
        assert (await _does(node, "set", "b", {"x": 1}))["got"] > first
        assert await _does(node, "keys") == {"got": ["a", "b"]}
        other = await node.call("g", b'["keys"]')
        assert json.loads(other.body) == {"got": []}
        node.d.configure([function("f", STATE, env={"NEW": "1"}), function("g", STATE)])
        await node.phase("f", "Running")
        assert await _does(node, "get", "b") == {"got": '{"x":1}'}
    async with Node(tmp_path) as node:  # and after a restart
        node.d.configure([function("f", STATE)])
        assert await _does(node, "get", "a") == {"got": "one"}
        assert await _does(node, "delete", "a") == {"got": True}
        assert await _does(node, "delete", "a") == {"got": False}
        assert await _does(node, "get", "a") == {"got": None}


@looped
async def test_of_two_that_change_the_same_value_one_is_told(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", STATE)])
        first = (await _does(node, "set", "a", "1", 0))["got"]
        assert "is at revision" in (await _does(node, "set", "a", "2", 0))["conflict"]
        second = (await _does(node, "set", "a", "2", first))["got"]
        assert "conflict" in await _does(node, "set", "a", "3", first)
        assert "conflict" in await _does(node, "delete", "a", first)
        assert await _does(node, "delete", "a", second) == {"got": True}
        # a key that was made anew is not the old one
        assert (await _does(node, "set", "a", "4", 0))["got"] > second


@looped
async def test_a_state_is_bounded(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", STATE, state={"bytes": 1000})])
        assert "got" in await _does(node, "set", "a", "x" * 800)
        assert "at most 1000" in (await _does(node, "set", "b", "x" * 800))["too-large"]
        assert "got" in await _does(node, "set", "a", "x" * 10)  # smaller is always allowed
        assert "got" in await _does(node, "set", "b", "x" * 800)
        assert "262144" in (await _does(node, "set", "c", "x" * 300_000))["too-large"]
        for bad in ("", "a b", "ü", "k" * 257):
            assert "visible characters" in (await _does(node, "set", bad, "1"))["refused"]
        assert await _does(node, "keys") == {"got": ["a", "b"]}


COUNT = """
def handler(event, context):
    while True:
        found = context.state.entry("n") or (b"0", 0)
        try:
            context.state.set("n", str(int(found[0]) + 1), found[1])
            return
        except Exception as e:
            if getattr(e, "kind", "") != "conflict":
                raise
"""


@looped
async def test_many_instances_count_right(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", COUNT, scale={"max": 4}, limits={"timeout": "60s"})])
        await asyncio.gather(*(node.call("f") for _ in range(60)))
        found = node.d.asks.memory.get("default/f", "n")
        assert found is not None
        assert found[0] == b"60"


PUBLISH = """
from edgeward.functions.sdk import Refused

def handler(event, context):
    try:
        context.publish(event.text(), {"a": 1})
    except Refused as e:
        return {e.kind: str(e)}
"""


@looped
async def test_only_declared_topics_are_published_on(tmp_path: Path) -> None:
    sent: list[tuple[Any, ...]] = []

    async def publisher(key: str, topic: str, data: bytes, qos: int, hops: int) -> None:
        if topic == "alarms/down":
            raise Unreachable("the broker is away")
        sent.append((key, topic, data, qos, hops))

    async with Node(tmp_path) as node:
        node.d.configure([function("f", PUBLISH, publish=["alarms/#", "state/+/on"])])
        assert "not there yet" in json.loads((await node.call("f", b"alarms/a")).body)["unavailable"]
        node.d.asks.publisher = publisher
        for topic in (b"alarms/a", b"alarms", b"state/x/on"):
            assert (await node.call("f", topic)).body == b""
        assert sent[0] == ("default/f", "alarms/a", b'{"a":1}', 1, 1)
        assert len(sent) == 3
        for topic in (b"alarm", b"state/x/off", b"state/on", b"$SYS/x", b"ew/hub", b"x/alarms/a"):
            assert "is not declared" in json.loads((await node.call("f", topic)).body)["refused"]
        for topic in (b"", b"alarms/+", b"alarms/#", b"alarms/>", b"alarms/a b", b"alarms/" + b"x" * 2000):
            assert "no topic" in json.loads((await node.call("f", topic)).body)["refused"]
        assert "is away" in json.loads((await node.call("f", b"alarms/down")).body)["unavailable"]
        assert len(sent) == 3


@looped
async def test_a_message_that_goes_round_in_a_circle_is_stopped(tmp_path: Path) -> None:
    hops: list[int] = []

    async def publisher(key: str, topic: str, data: bytes, qos: int, count: int) -> None:
        hops.append(count)

    async with Node(tmp_path) as node:
        node.d.configure([function("f", PUBLISH, publish=["a"])])
        node.d.asks.publisher = publisher
        for n in (0, 3, 7):
            event = Event("1", "/t", "t", b"a", extensions={HOPS: str(n)} if n else {})
            assert (await node.d.invoke(wire.Call("default/f", event))).body == b""
        assert hops == [1, 4, 8]
        event = Event("1", "/t", "t", b"a", extensions={HOPS: "8"})
        refused = await node.d.invoke(wire.Call("default/f", event))
        assert "circle" in json.loads(refused.body)["refused"]
        assert len(hops) == 3


def test_hops_are_a_small_number_whatever_is_said() -> None:
    for text, n in (("", 0), ("3", 3), ("900", 8), ("-1", 0), ("x", 0), ("³", 0), ("9" * 5000, 0)):
        assert hops_of(Event("1", "s", "t", extensions={HOPS: text})) == n


@looped
async def test_secrets_reach_the_handler_that_lists_them_and_not_its_environment(tmp_path: Path) -> None:
    code = """
import os
def handler(event, context):
    return {"secrets": context.secrets, "env": [k for k, v in os.environ.items() if "swordfish" in v]}
"""
    doc = {
        "apiVersion": "edgeward/v1",
        "kind": "Function",
        "metadata": {"name": "f"},
        "spec": {"runtime": "python", "source": {"inline": code}, "secrets": ["db"]},
    }
    config = config_of(decode(doc), {}, {}, ["db@1@"], {"db": {"password": "swordfish"}})
    async with Node(tmp_path) as node:
        node.d.configure([config, function("g", code)])
        mine, others = await node.call("f"), await node.call("g")
        assert json.loads(mine.body) == {"secrets": {"db": {"password": "swordfish"}}, "env": []}
        assert json.loads(others.body) == {"secrets": {}, "env": []}


@looped
async def test_samples_go_to_whoever_keeps_them(tmp_path: Path) -> None:
    kept: list[tuple[str, wire.Sample]] = []

    async def sampler(version: Version, call: str, sample: wire.Sample) -> bool:
        kept.append((version.key, sample))
        return len(kept) < 2

    code = """
from edgeward.functions.sdk import Refused
def handler(event, context):
    try:
        return {"kept": context.sample(event.data, {"label": "cat"}, score=0.4, tags={"camera": 3})}
    except Refused as e:
        return {e.kind: str(e)}
"""
    async with Node(tmp_path) as node:
        node.d.configure([function("f", code, limits={"body": 1000})])
        assert json.loads((await node.call("f", b"in")).body) == {"kept": False}, "it declares none"
        node.d.asks.sampler = sampler
        assert json.loads((await node.call("f", b"in")).body) == {"kept": True}
        assert json.loads((await node.call("f", b"in")).body) == {"kept": False}
        key, sample = kept[0]
        assert (key, sample.input, sample.output, sample.score) == ("default/f", b"in", b'{"label":"cat"}', 0.4)
        assert sample.tags == {"camera": "3"}
        assert "1000" in json.loads((await node.call("f", b"x" * 990)).body)["too-large"]


@looped
async def test_threads_of_a_handler_may_ask_and_one_that_outlives_its_call_is_refused(tmp_path: Path) -> None:
    code = """
import threading
late = []
go = threading.Event()

def work(context, n):
    context.state.set(f"k{n}", str(n))

def outlives(context):
    go.wait(60)
    try:
        context.state.set("late", "1")
    except Exception as e:
        late.append(str(e))

def handler(event, context):
    if event.data == b"late?":
        go.set()
        for t in threading.enumerate():
            if t.name == "outlives":
                t.join()
        return {"late": late}
    threads = [threading.Thread(target=work, args=(context, n)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    threading.Thread(target=outlives, args=(context,), name="outlives", daemon=True).start()
    return context.state.keys()
"""
    async with Node(tmp_path) as node:
        node.d.configure([function("f", code, scale={"max": 1}, limits={"timeout": "60s"})])
        assert json.loads((await node.call("f")).body) == [f"k{n}" for n in range(8)]
        answer = json.loads((await node.call("f", b"late?")).body)
        assert len(answer["late"]) <= 1  # it asked in the second call (allowed) or between the two (refused)
        assert (await node.call("f", b"late?")).status == 200


FLOOD = """
import socket, msgspec
from edgeward.functions import sdk

def handler(event, context):
    worker = context._ask.__self__
    if event.data == b"open":  # never reads an answer
        n = 0
        while True:
            n += 1
            worker.send(sdk.wire.StateGet(context.invocation, n, "k"))
    for n in range(100):
        worker.send(sdk.wire.Publish(context.invocation, n, "a", b"x"))
    told = []
    while len(told) < 100:
        got = []
        got.extend(worker._frames.feed(worker._sock.recv(65536)))
        told += [sdk.wire.decode_to_worker(p) for p in got]
    return [a.error[0] if a.error else "" for a in sorted(told, key=lambda a: a.ask)]
"""


@looped
async def test_a_worker_that_asks_without_end_is_ended_and_one_that_asks_too_much_at_once_is_told(
    tmp_path: Path,
) -> None:
    gate = asyncio.Event()

    async def publisher(key: str, topic: str, data: bytes, qos: int, count: int) -> None:
        await gate.wait()

    async with Node(tmp_path) as node:
        node.d.asks.publisher = publisher
        node.d.configure([function("f", FLOOD, publish=["a"], limits={"timeout": "60s"})])
        call = asyncio.create_task(node.call("f"))
        asks = lambda: [link._tally for p in node.d._functions["default/f"].pools() for link in p.links]  # noqa: E731
        await until(lambda: any(t.asked == 100 for t in asks()), 60)
        gate.set()
        assert json.loads((await call).body) == [""] * 64 + ["too-many"] * 36
        flood = await node.fails("f", b"open")
        assert (flood.kind, flood.status) == ("crashed", 502)
        assert "does not heed" in flood.message
        assert len(json.loads((await node.call("f")).body)) == 100  # another instance, well


def test_a_call_is_counted_anew() -> None:
    tally = Tally()
    tally.asked = wire.MAX_ASKS + 1
    assert "ask 10000 times" in tally.over(1)
    assert not tally.wild
    tally.begin()
    assert tally.over(1) == ""
    assert "bytes wait" in tally.over(wire.MAX_OPEN_BYTES + 1)


def test_a_batch_is_cloudevents_and_comes_apart_again() -> None:
    events = [Event(str(n), "/s", "t", bytes([n, 255]), "x/y", "a/b", "2026-01-01T00:00:00Z") for n in range(3)]
    events[1].extensions = {HOPS: "2"}
    made = batch_of(events, id="b", source="/s", type="t.batch", subject="a/+")
    assert made.datacontenttype == "application/cloudevents-batch+json"
    docs = msgspec.json.decode(made.data)
    assert docs[0]["specversion"] == "1.0"
    assert docs[0]["data_base64"] == "AP8="
    assert made.batch() == events
    assert events[0].batch() == [events[0]]


def test_what_may_be_declared() -> None:
    def config(**spec: Any) -> Config:
        return function("f", STATE, **spec)

    assert config(publish=["a/#"], state={"bytes": "2Mi"}).policy.state == 2 << 20
    for spec, field in (
        ({"publish": ["#"]}, r"\$.spec.publish\[0\]"),
        ({"publish": ["ok", "ew/x"]}, r"\$.spec.publish\[1\]"),
        ({"state": {"bytes": "65Mi"}}, r"\$.spec.state.bytes"),
    ):
        with pytest.raises(EdgewardError, match=field):
            config(**spec)
