"""A node's conversation with the real hub, and with one that is away, refuses or talks nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.msg import Msg
from tests.core.pair import until
from tests.nodes.fleet import Fleet, app, config, fleet

from edgeward.agent.replica import Replica
from edgeward.core.bus import Bus
from edgeward.core.natsserver import AGENT_USER, NatsServer, NodeSpec
from edgeward.core.records import SqliteRecords
from edgeward.core.resource import CLUSTER, Key
from edgeward.hub.kinds import load
from edgeward.nodes.edge import NodeEdge
from edgeward.nodes.wire import BeatAnswer, Ok, PushAnswer, PushAsk, ReportAsk, SyncAnswer

load()

WEB = Key("App", "default", "web")


class Node:
    def __init__(self, root: Path) -> None:
        self.replica = Replica(root / "replica.db", site="plant")
        self.records = SqliteRecords()
        self.flips: list[bool] = []
        self.edge = NodeEdge("plant-1", self.replica, self.records, self.flips.append)

    @asynccontextmanager
    async def running(self, bus: Bus) -> AsyncIterator[None]:
        task = asyncio.create_task(self.edge.run(bus))
        try:
            async with asyncio.timeout(240):
                yield
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def holds(self, *names: str) -> bool:
        return {r.metadata.name for r in self.replica.items("App")} == set(names)

    def events(self) -> list[tuple[str, str]]:
        return [(r["reason"], r["resource"]) for r in self.records.items("events")]


def reported(f: Fleet) -> dict[str, Any]:
    return f.nodes._reports.get("plant-1", {})


def test_it_comes_up_follows_the_hub_and_its_own_changes_arrive(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            await f.store.put(app("web", "plant"))
            await f.store.put(app("there", "shop"))
            node = Node(tmp_path)
            assert not node.edge.synced.is_set()
            async with node.running(await f.bus("plant-1")):
                await until(lambda: node.holds("web"))
                assert node.edge.online and node.edge.synced.is_set()
                assert node.flips == [True]
                await until(lambda: f.nodes.is_online("plant-1"))
                syncs = node.edge.counters["full_syncs"]
                await f.store.put(app("more", "plant"))
                await until(lambda: node.holds("web", "more"))  # by a poke, sooner than by a beat
                await f.store.remove(WEB)
                await until(lambda: node.holds("more"))
                assert node.edge.counters["full_syncs"] == syncs, "changes only"
                await node.replica.put(config("mine", "1"))
                await node.replica.put(app("local", "plant"))
                node.edge.wake_push()
                await until(lambda: not node.replica.pending())
                assert f.store.get(Key("Config", "default", "mine")).spec.data == {"k": "1"}
                assert node.edge.counters["pushed"] == 2
                await until(lambda: len(node.records.items("journal")) == 2)
                assert ("LocalChangeTakenOver", "Config/mine") in node.events()
                # one that the hub decides otherwise
                other = await node.replica.put(app("mine", "plant"))
                other.spec.placement.site = "shop"
                await node.replica.put(other)
                node.edge.wake_push()
                await until(lambda: not node.replica.pending())
                await until(lambda: ("LocalChangeLost", "App/mine") in node.events())
                assert node.replica.find(Key("App", "default", "mine")) is None, "the hub's state stands"

    asyncio.run(body())


def test_reports_are_deltas_and_all_of_it_for_a_new_hub(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            await f.store.put(app("web", "plant"))
            node = Node(tmp_path)
            edge = node.edge
            edge.report(WEB, {"phase": "Starting"})  # before there is a link
            edge.report_node({"version": "1"})
            await node.records.append("events", {"reason": "Early", "resource": "App/web"})
            await edge.flush()
            assert edge.counters["reports"] == 0
            async with node.running(await f.bus("plant-1")):
                await until(lambda: reported(f) == {"App/default/web": {"phase": "Starting"}})
                await until(lambda: f.store.get(Key("Node", CLUSTER, "plant-1")).status.get("version") == "1")
                await until(lambda: [r for r in f.records.items("events") if r["reason"] == "Early"] != [])
                edge.report(WEB, {"phase": "Running"})
                await until(lambda: reported(f) == {"App/default/web": {"phase": "Running"}})
                sent = edge.counters["reports"]
                edge.report(WEB, {"phase": "Running"})
                edge.report(Key("App", "default", "never"), None)
                edge.report_node({"version": "1"})
                await edge.flush()
                assert edge.counters["reports"] == sent, "nothing new, nothing sent"
                f.nodes._reports.clear()  # a hub that starts anew and lost what it knew
                f.nodes.run_id = "another"
                edge._beat_now.set()
                await until(lambda: reported(f) == {"App/default/web": {"phase": "Running"}})
                edge.report(WEB, None)
                await until(lambda: reported(f) == {})
                assert edge.statuses() == {}
                early = [r for r in f.records.items("events") if r["reason"] == "Early"]
                assert len(early) == 1, "an event arrives once"

    asyncio.run(body())


@asynccontextmanager
async def alone(root: Path) -> AsyncIterator[Bus]:
    """The node's own nats-server, with no hub behind it."""
    server = NatsServer(root / "nats", NodeSpec("plant-1"))
    await server.start()
    try:
        bus = await Bus.connect(
            server.url, name="x", username=AGENT_USER, password=server.secret, inbox="_INBOX_plant-1", timeout=60
        )
        yield bus
        await bus.close()
    finally:
        await server.stop()


def answering(answers: list[Any]) -> Callable[[Msg], Awaitable[bytes]]:
    """Gives one answer after the other, the last one for ever."""

    async def answer(_: Msg) -> bytes:
        now = answers.pop(0) if len(answers) > 1 else answers[0]
        return now if isinstance(now, bytes) else msgspec.msgpack.encode(now)

    return answer


def test_without_a_hub_it_waits_and_what_it_owes_is_paid_later(tmp_path: Path) -> None:
    async def body() -> None:
        async with alone(tmp_path) as bus:
            node = Node(tmp_path)
            await node.replica.put(config("mine", "1"))
            node.edge.report(WEB, {"phase": "Running"})
            pushes: list[PushAsk] = []
            reports: list[ReportAsk] = []

            async def push(msg: Msg) -> bytes:
                pushes.append(msgspec.msgpack.decode(msg.data, type=PushAsk))
                return msgspec.msgpack.encode(PushAnswer())  # decides nothing

            async def report(msg: Msg) -> bytes:
                reports.append(msgspec.msgpack.decode(msg.data, type=ReportAsk))
                return msgspec.msgpack.encode(Ok() if len(reports) > 1 else Ok("not now"))

            async with node.running(bus):
                while not bus.client.stats["out_msgs"]:  # noqa: ASYNC110 - turn by turn
                    await asyncio.sleep(0)
                await bus.flush()
                assert not node.edge.online
                assert not node.edge.synced.is_set()
                assert node.flips == []
                sync = [b"\xc1", SyncAnswer(error="busy"), SyncAnswer("e", 5, True, [], False, "")]
                beat = [b"nonsense", Ok("who are you"), BeatAnswer(5, "hub", "e")]
                await bus.serve("ew.hub.push.*", push)
                await bus.serve("ew.hub.report.*", report)
                await bus.serve("ew.hub.sync.*", answering(sync))
                await bus.serve("ew.hub.beat.*", answering(beat))
                await until(node.edge.synced.is_set)
                assert node.replica.hub_revision == 5
                await until(lambda: len(reports) >= 2 and len(pushes) >= 2)
                assert reports[0] == reports[1], "what was refused is sent again, whole"
                assert reports[1].full
                assert [s.status for s in reports[1].statuses] == [{"phase": "Running"}]
                assert [c.name for c in pushes[0].changes] == ["mine"]
                assert pushes[0].store == node.replica.store_id
                assert len(node.replica.pending()) == 1, "undecided, so it stays"
                assert node.flips == [True]

    asyncio.run(body())


def test_a_replica_that_differs_is_asked_for_anew(tmp_path: Path) -> None:
    async def body() -> None:
        async with alone(tmp_path) as bus:
            node = Node(tmp_path)
            since: list[int] = []
            good = node.replica.hub_view()

            async def sync(msg: Msg) -> bytes:
                since.append(msgspec.msgpack.decode(msg.data)["since"])
                right = len(since) > 2
                return msgspec.msgpack.encode(SyncAnswer("e", 5, False, [], False, good if right else "another"))

            await bus.serve("ew.hub.sync.*", sync)
            await bus.serve("ew.hub.beat.*", answering([BeatAnswer(5, "hub", "e")]))
            await bus.serve("ew.hub.report.*", answering([Ok()]))
            async with node.running(bus):
                await until(lambda: len(since) >= 3)
                assert since[1:] == [0] * (len(since) - 1), "all of it"
                await until(lambda: node.edge.online)

    asyncio.run(body())


def test_an_idle_link_carries_empty_messages_and_news_are_heeded(tmp_path: Path) -> None:
    async def body() -> None:
        async with alone(tmp_path) as bus:
            node = Node(tmp_path)
            asks: list[bytes] = []
            news: list[BeatAnswer] = []
            hub = ["one", True]

            async def beat(msg: Msg) -> bytes | None:
                asks.append(msg.data)
                if not msg.data:
                    assert not msg.reply, "short"
                    answer = msgspec.msgpack.encode(news.pop(0)) if news else b""
                    await bus.publish("ew.node.plant-1.b", answer)
                    return None
                if news:
                    return msgspec.msgpack.encode(news.pop(0))
                return msgspec.msgpack.encode(BeatAnswer(0, str(hub[0]), "e", short=bool(hub[1]), spread=0.01))

            reports: list[ReportAsk] = []

            async def report(msg: Msg) -> bytes:
                reports.append(msgspec.msgpack.decode(msg.data, type=ReportAsk))
                return msgspec.msgpack.encode(Ok())

            syncs: list[dict[str, Any]] = []

            async def sync(msg: Msg) -> bytes:
                syncs.append(msgspec.msgpack.decode(msg.data))
                return msgspec.msgpack.encode(SyncAnswer("e", 5, not syncs[:-1], [], False, ""))

            await bus.serve("ew.hub.beat.*", beat)
            await bus.serve("ew.hub.report.*", report)
            await bus.serve("ew.hub.sync.*", sync)

            async def again(change: Callable[[], None] | None = None) -> None:
                """One more beat, now."""
                n = len(asks)
                if change is not None:
                    change()
                else:
                    node.edge._beat_now.set()
                await until(lambda: len(asks) > n and node.edge._pace.answered, 20)

            async with node.running(bus):
                await until(lambda: node.edge.online and node.edge.synced.is_set() and bool(reports), 20)
                assert asks[0], "the first says who asks"
                await again()
                await again()
                assert asks[-1] == b""
                done = len(syncs)
                await again(node.edge.link_changed)
                assert asks[-1] != b"", "in doubt it says all again"
                assert msgspec.msgpack.decode(asks[-1])["view"] == node.replica.hub_view()
                assert len(syncs) == done, "nothing new, nothing asked"
                news.append(BeatAnswer(9, "one", "e", short=True))
                await again()
                await until(lambda: len(syncs) > done, 20)
                done, told = len(syncs), len(reports)
                hub[0] = "two"
                news.append(BeatAnswer(0, "two", "e", sync=True, short=True, spread=0.01))
                await again()
                await until(lambda: len(reports) > told and len(syncs) > done, 20)
                assert reports[-1].full, "another hub process wants all of it"
                hub[1] = False
                await again(node.edge.link_changed)
                await again()
                await again()
                assert asks[-1] != b"", "a hub of the release before knows no empty beats"

    asyncio.run(body())


def test_what_the_hub_does_not_name_is_dropped(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            await f.store.put(app("web", "plant"))
            await f.store.put(app("doomed", "plant"))
            node = Node(tmp_path)
            async with node.running(await f.bus("plant-1")):
                await until(lambda: node.holds("web", "doomed"), 20)
            await f.store.remove(Key("App", "default", "doomed"))
            f.nodes.roster.views = type(f.nodes.roster.views)(
                f.store.entry
            )  # a hub process that does not know what there was
            f.nodes.roster.views.load(f.store.all())
            f.nodes.roster.told.clear()
            f.nodes.run_id = "another"
            fulls = node.edge.counters["full_syncs"]
            async with node.running(await f.bus("plant-1")):
                await until(lambda: node.holds("web"), 20)
                assert node.edge.counters["full_syncs"] == fulls, "by their names, not by all of them again"

    asyncio.run(body())
