"""Exports on real servers with a real MQTT client: what PUBACK promised arrives once, whatever is killed or changed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from tests.core.pair import Pair, until

from edgeward.core.outbox import Outbox
from edgeward.core.resource import Resource, decode
from edgeward.streams.edge import ExportsEdge, queue_name
from edgeward.streams.turnstile import Turnstile


def export(
    name: str = "line1", ns: str = "default", topic: str = "sensors/#", stream: str = "s", **more: Any
) -> Resource:
    doc = {"apiVersion": "edgeward/v1", "kind": "Export", "metadata": {"name": name, "namespace": ns}}
    spec = {"from": {"mqtt": topic}, "to": {"hub": {"stream": stream}}, "identity": "$.id"} | more
    return decode(doc | {"spec": spec})


class Edge:
    """An agent's exports; ``die`` leaves everything as a SIGKILL does."""

    def __init__(self, pair: Pair, quota: Callable[[str], float] = lambda _: 0.0, closed: Sequence[str] = ()) -> None:
        self.pair = pair
        self.events: list[str] = []
        #: What the broker was last told to take nothing on, and how often it was told.
        self.closed = tuple(closed)
        self.reloads = 0
        self.reports: dict[str, dict[str, Any] | None] = {}
        self.outbox = Outbox(pair.edge, node="x")
        self.exports = ExportsEdge(
            pair.edge,
            self.outbox,
            data=pair.root / "exports",
            mqtt=("127.0.0.1", pair.mqtt, "u", "p"),
            report=lambda ns, name, status: self.reports.__setitem__(f"{ns}/{name}", status),
            quota=quota,
            turnstile=Turnstile(pair.edge, self._close, closed),
            event=lambda type, reason, *_: self.events.append(reason),
        )
        self._tasks = [asyncio.create_task(self.outbox.run()), asyncio.create_task(self.exports.run())]

    async def _close(self, subjects: tuple[str, ...]) -> None:
        if subjects != self.closed:
            await self.pair.close_topics(subjects)
            self.closed, self.reloads = subjects, self.reloads + 1

    async def die(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def publisher(pair: Pair) -> AsyncIterator[mqtt.Client]:
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", pair.mqtt)
    client.loop_start()
    await until(client.is_connected)
    try:
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


async def publish(client: mqtt.Client, topic: str, ids: range, size: int = 0) -> None:
    sent = [client.publish(topic, json.dumps({"id": i, "pad": "x" * size}), qos=1) for i in ids]
    await until(lambda: all(s.is_published() for s in sent))


async def arrived(pair: Pair, stream: str, count: int) -> list[dict[str, Any]]:
    async def all_there() -> bool:
        return len(await pair.ids(stream)) >= count

    await until(all_there)
    return [m async for m in await pair.cloud.reader(stream)]


def test_repeats_are_dropped_per_topic_also_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            edge = Edge(p)
            await edge.exports.apply([export(identityWindow=400)])
            async with publisher(p) as client:
                for topic in ("sensors/a", "sensors/b"):  # two devices with counters of their own
                    await publish(client, topic, range(300))
                await publish(client, "sensors/a", range(290, 310))
                got = await arrived(p, "s", 610)
                assert [m["payload"]["id"] for m in got if m["topic"] == "sensors/a"] == list(range(310))
                assert [m["payload"]["id"] for m in got if m["topic"] == "sensors/b"] == list(range(300))
                await edge.die()
                again = Edge(p)
                await again.exports.apply([export(identityWindow=400)])
                await publish(client, "sensors/a", range(300, 320))
                got = await arrived(p, "s", 620)
                assert [m["payload"]["id"] for m in got if m["topic"] == "sensors/a"] == list(range(320))
                await again.die()

    asyncio.run(main())


def test_a_wildcard_in_front_does_not_take_topics_with_a_dollar(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            edge = Edge(p)
            await edge.exports.apply([export(topic="+/t")])
            async with publisher(p) as client:
                await publish(client, "$line/t", range(5))
                await publish(client, "line/t", range(5, 10))
                got = await arrived(p, "s", 5)
                assert [(m["topic"], m["payload"]["id"]) for m in got] == [("line/t", n) for n in range(5, 10)]
            await edge.die()

    asyncio.run(main())


def test_an_export_removed_while_the_agent_was_down_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            for name in ("s", "t"):
                await p.stream(name)
            edge = Edge(p)
            await edge.exports.apply([export("gone"), export("kept", topic="other/#", stream="t")])
            await edge.die()
            again = Edge(p)
            await again.exports.prune([export("kept", topic="other/#", stream="t")])
            await again.exports.apply([export("kept", topic="other/#", stream="t")])
            js = p.edge.jetstream()
            assert [c.name for c in await js.consumers_info("$MQTT_msgs")] == [f"ew-{queue_name('default', 'kept')}"]
            names = {i.config.name for i in await js.streams_info()}
            assert {n for n in names if n and n.startswith("OUT_")} == {f"OUT_{queue_name('default', 'kept')}"}
            async with publisher(p) as client:
                await publish(client, "sensors/a", range(10))
            assert (await js.stream_info("$MQTT_msgs")).state.messages == 0
            await again.die()

    asyncio.run(main())


def test_no_two_exports_share_a_queue() -> None:
    assert queue_name("a-b", "c") != queue_name("a", "b-c")


def test_a_new_topic_filter_misses_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            edge = Edge(p)
            await edge.exports.apply([export(topic="sensors/a")])
            async with publisher(p) as client:
                await publish(client, "sensors/a", range(100))
                await edge.exports.apply([export(topic="sensors/+")])
                await publish(client, "sensors/b", range(100, 200))
                await publish(client, "sensors/a", range(200, 300))
                got = await arrived(p, "s", 300)
            assert [m["payload"]["id"] for m in got] == list(range(300))
            await edge.die()

    asyncio.run(main())


def test_a_second_export_begins_with_its_making(tmp_path: Path) -> None:
    """What the broker still holds for another Export is not the new one's."""

    async def main() -> None:
        async with Pair(tmp_path) as p:
            for name in ("s", "t"):
                await p.stream(name)
            edge = Edge(p)
            await edge.exports.apply([export("first")])
            await edge.die()  # from here on the broker keeps what comes for it
            async with publisher(p) as client:
                await publish(client, "sensors/a", range(50))
                again = Edge(p)
                await again.exports.apply([export("second", stream="t")])
                await publish(client, "sensors/a", range(50, 60))
                got = await arrived(p, "t", 10)
                assert [m["payload"]["id"] for m in got] == list(range(50, 60))
                await again.exports.apply([export("first"), export("second", stream="t")])
                got = await arrived(p, "s", 60)
                assert [m["payload"]["id"] for m in got] == list(range(60))
            await again.die()

    asyncio.run(main())


def test_a_reading_too_large_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            edge = Edge(p)
            await edge.exports.apply([export(bounds={"bytes": "256Ki"})])
            async with publisher(p) as client:
                await publish(client, "sensors/a", range(1))
                await publish(client, "sensors/a", range(1, 2), size=200_000)
                await publish(client, "sensors/a", range(2, 3))
                got = await arrived(p, "s", 2)
            assert [m["payload"]["id"] for m in got] == [0, 2]
            queue = edge.outbox.get(queue_name("default", "line1"))
            assert queue is not None
            assert queue.counters.dropped_size == 1
            await edge.die()

    asyncio.run(main())


def test_the_hub_keeps_what_is_declared_and_every_cursor(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            edge = Edge(p)
            await edge.exports.apply([export("a", topic="a/#"), export("b", topic="b/#")])
            async with publisher(p) as client:
                await publish(client, "b/1", range(1))
                await arrived(p, "s", 1)
                for at in range(0, 200, 10):
                    await publish(client, "a/1", range(at + 1, at + 11), size=4000)
                    await arrived(p, "s", at + 11)
                assert await p.cloud.trim("s", 200_000) > 0
                left = await p.ids("s")
                assert left[0] == 0, "b's only batch is its cursor"
                assert left[1:] == list(range(left[1], 201))
                assert left[1] > 2
                await edge.die()
                again = Edge(p)
                await again.exports.apply([export("a", topic="a/#"), export("b", topic="b/#")])
                await publish(client, "b/1", range(201, 202))
                got = await arrived(p, "s", len(left) + 1)
                assert [m["payload"]["id"] for m in got] == [*left, 201]
                await again.die()

    asyncio.run(main())


def test_a_quota_of_readings_holds_for_all_exports_of_a_namespace_and_loses_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            for name in ("s", "t", "free"):
                await p.stream(name)
            rates = {"line": 100.0}
            edge = Edge(p, lambda ns: rates.get(ns, 0.0))
            await edge.exports.apply(
                [
                    export("a", "line", "sensors/#", "s"),
                    export("b", "line", "meters/#", "t"),
                    export("c", "default", "sensors/#", "free"),
                ]
            )
            loop = asyncio.get_running_loop()
            async with publisher(p) as client:
                began = loop.time()
                await publish(client, "sensors/a", range(300))
                await publish(client, "meters/a", range(300))
                assert len(await arrived(p, "free", 300)) == 300, "another namespace is not slowed"
                await arrived(p, "s", 300)
                await arrived(p, "t", 300)
                # the first second's worth of each goes at once; the pace bounds from below only
                assert loop.time() - began >= 3.5
            for stream in ("s", "t"):
                got = [m async for m in await p.cloud.reader(stream)]
                assert [m["payload"]["id"] for m in got] == list(range(300)), "once, and in order"
            await edge.die()

    asyncio.run(main())


class Flood:
    """A device that has always one more to say, QoS 1 or 2, and keeps a list of what was acknowledged."""

    def __init__(self, pair: Pair, topic: str, qos: int = 1) -> None:
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=topic, clean_session=False)
        self.client.reconnect_delay_set(1, 1)
        self.topic, self.qos, self.sent, self.acked = topic, qos, 0, set[int]()
        self.cut_off = 0
        self._ids: dict[int, int] = {}
        self.client.on_publish = lambda _c, _u, mid, *_: self.acked.add(self._ids[mid])
        self.client.on_disconnect = self._gone
        self.client.connect("127.0.0.1", pair.mqtt)
        self.client.loop_start()

    def _gone(self, *_: Any) -> None:
        self.cut_off += 1

    def say(self, size: int = 4000) -> None:
        """One more, unless ten are still to be acknowledged."""
        if self.sent - len(self.acked) < 10:
            # the lock of on_publish is not ours: an answer may come before the id is known, so it is known first
            self._ids[self.client._last_mid + 1] = self.sent
            info = self.client.publish(self.topic, json.dumps({"id": self.sent, "pad": "x" * size}), qos=self.qos)
            assert self._ids[info.mid] == self.sent
            self.sent += 1

    def end(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def test_a_full_export_refuses_its_publishers_and_nobody_elses(tmp_path: Path) -> None:
    """Cut off: what was acknowledged is kept within the bounds, what is beyond is not acknowledged, and after the cut
    everything acknowledged arrives once. Another Export, a topic that nobody exports, and QoS 2 are not lied to."""
    bound = 512 * 1024

    async def main() -> None:
        async with Pair(tmp_path) as p:
            for name in ("s", "t"):
                await p.stream(name)
            wanted = [
                export("tight", topic="sensors/temp/#", bounds={"bytes": bound, "onFull": "refuse"}),
                export("other", topic="meters/#", stream="t", bounds={"bytes": bound, "onFull": "dropOldest"}),
            ]
            edge = Edge(p)
            await edge.exports.apply(wanted)
            p.kill("hub")
            tight, twice = Flood(p, "sensors/temp/1"), Flood(p, "sensors/temp/2", qos=2)
            other, free, near = Flood(p, "meters/1"), Flood(p, "free/1"), Flood(p, "sensors/hum")
            floods = [tight, twice, other, free, near]

            def state() -> Any:
                return (edge.reports.get("default/tight") or {}).get("state")

            def refusing() -> bool:
                tight.say()
                twice.say()
                return bool(state() == "refusing")

            await until(refusing)
            stuck = len(tight.acked), len(twice.acked)
            before = len(other.acked), len(free.acked), len(near.acked)

            def others_go_on() -> bool:
                for flood in floods:
                    flood.say()
                moved = len(other.acked), len(free.acked), len(near.acked)
                return all(m >= b + 50 for m, b in zip(moved, before, strict=True)) and tight.cut_off > 0

            await until(others_go_on)
            # what was on its way when the reload came may still have been taken, ten of each at most
            assert len(tight.acked) <= stuck[0] + 10
            assert len(twice.acked) <= stuck[1] + 10
            assert edge.closed == ("sensors.temp", "sensors.temp.>")
            assert (other.cut_off, free.cut_off, near.cut_off) == (0, 0, 0)
            queue = edge.outbox.get(queue_name("default", "tight"))
            assert queue is not None
            kept = (await p.edge.jetstream().stream_info(queue.stream)).state.bytes
            assert kept <= bound

            await edge.die()  # an agent that comes back goes on refusing
            again = Edge(p, closed=edge.closed)
            await again.exports.apply(wanted)
            await until(lambda: (again.reports.get("default/tight") or {}).get("state") == "refusing")
            assert again.reloads == 0
            p.start("hub")
            await until(lambda: (again.reports.get("default/tight") or {}).get("state") == "capturing")
            await until(lambda: tight.sent == len(tight.acked) and twice.sent == len(twice.acked))
            got = await arrived(p, "s", tight.sent + twice.sent)
            for flood in (tight, twice):
                ids = [m["payload"]["id"] for m in got if m["topic"] == flood.topic]
                assert sorted(ids) == list(range(flood.sent)), "each once"
            assert edge.events == ["ExportRefuses"]
            assert again.events == ["ExportTakes"]
            for flood in floods:
                flood.end()
            await again.die()

    asyncio.run(main())
