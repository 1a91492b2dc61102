"""The hub's side of nodes, asked over a real nats-server as a node asks: what it gives, takes, refuses and folds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from nats.aio.msg import Msg
from tests.core.pair import until
from tests.nodes.fleet import app, config, doc, fleet

from edgeward.core import clock
from edgeward.core.resource import CLUSTER, Key
from edgeward.hub.kinds import load
from edgeward.nodes import cloud as module
from edgeward.nodes.liveness import Liveness
from edgeward.nodes.views import Views
from edgeward.nodes.wire import (
    BeatAnswer,
    BeatAsk,
    Ok,
    PushAnswer,
    PushAsk,
    ReportAsk,
    Status,
    SyncAnswer,
    SyncAsk,
)
from edgeward.workloads.release import read_status

load()


def names(answer: SyncAnswer) -> set[str]:
    return {f"{o.kind}/{o.name}" + ("" if o.stored else " gone") for o in answer.objects}


def test_a_node_gets_its_own_view_and_then_what_changed(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            await f.store.put(config("used", "1"))
            await f.store.put(config("unused", "1"))
            await f.store.put(app("everywhere"))
            await f.store.put(app("here", "plant", "used"))
            await f.store.put(app("there", "shop"))
            own = {"Site/plant", "Node/plant-1", "Node/plant-2", "App/everywhere", "App/here", "Config/used"}
            first = await f.sync("plant-1")
            assert names(first) == own
            assert first.full and first.view and first.epoch == f.store.epoch
            assert names(await f.sync("shop-1")) == {"Site/shop", "Node/shop-1", "App/everywhere", "App/there"}
            await f.store.put_status(Key("App", "default", "there"), {"phase": "Running"})
            await f.store.put_status(Key("App", "default", "here"), {"phase": "Running"})
            none = await f.sync("plant-1", first.revision, first.epoch)
            assert (none.objects, none.full, none.view) == ([], False, first.view)
            # what an App begins to use is older than the change that makes it needed
            await f.store.put(app("everywhere", "", "unused"))
            await f.store.put(app("there", "shop", replicas=2))
            await f.store.put(app("here", "shop"))
            then = await f.sync("plant-1", first.revision, first.epoch)
            assert {"App/everywhere", "Config/unused", "App/here gone"} <= names(then)
            assert {o.name for o in then.objects if o.stored is None} == {"here", "used"}, "nothing of another site"
            for since, epoch in ((then.revision + 1000, first.epoch), (first.revision, "another epoch")):
                assert (await f.sync("plant-1", since, epoch)).full, "what the node has cannot be trusted"

    asyncio.run(body())


def test_a_site_is_told_of_its_own_nodes_in_a_rollout(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            await f.store.put(app("web"))
            rollout = await f.store.put(doc("Rollout", "web", {"targets": [{"kind": "App", "name": "web"}]}))
            fleet_wide = ["plant-1", "plant-2", "shop-1"]
            group = {"name": "rest", "phase": "Running", "total": 3, "done": 1, "nodes": fleet_wide}
            trying = {n: {"released": 1.0} for n in fleet_wide}
            whole = {"phase": "Running", "groups": [group], "updating": trying, "ungoverned": ["shop-1"]}
            await f.store.put_status(rollout.key, whole)
            for node, own in (("plant-1", ["plant-1", "plant-2"]), ("shop-1", ["shop-1"]), ("plant-2", fleet_wide[:2])):
                answer = await f.sync(node)
                (status,) = [o.status for o in answer.objects if o.kind == "Rollout"]
                assert status is not None
                assert status["groups"] == [{**group, "nodes": own, "failed": {}}]
                assert status["updating"] == {n: trying[n] for n in own}
                assert status["ungoverned"] == [n for n in own if n == "shop-1"]
                assert read_status(status).phase == "Running"

    asyncio.run(body())


def test_a_large_view_comes_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 2000)

    async def body() -> None:
        async with fleet(tmp_path) as f:
            for n in range(20):
                await f.store.put(app(f"a{n:02}", "plant"))
            page = await f.ask("plant-1", "sync", SyncAsk(0, ""), SyncAnswer)
            assert page.more and not page.view
            assert len(msgspec.msgpack.encode(page)) < 4000
            whole = await f.sync("plant-1")
            keys = [o.key for o in whole.objects]
            assert keys == sorted(set(keys))
            assert len(keys) == 23
            assert whole.view

    asyncio.run(body())


def test_what_is_not_understood_is_answered(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            for verb, answer in (("sync", SyncAnswer), ("push", PushAnswer), ("report", Ok), ("beat", BeatAnswer)):
                assert (await f.ask("plant-1", verb, b"\xc1", answer)).error
                asks = {"sync": SyncAsk(0, ""), "push": PushAsk("r", []), "report": ReportAsk([]), "beat": BeatAsk(1)}
                error = (await f.ask("stranger", verb, asks[verb], answer)).error
                assert error == "Node/stranger: the hub knows no such node (enrol it again)"
            wrong = app("x", "plant")
            wrong.spec.replicas = -1
            decided = await f.push("plant-1", wrong)
            assert decided.outcome == "invalid"
            assert "$.spec.replicas" in decided.why
            wrong = app("x", "plant")
            wrong.spec.dependsOn = ["x"]
            assert "cannot wait for itself" in (await f.push("plant-1", wrong)).why, "what spans fields is checked too"

    asyncio.run(body())


def test_reports_become_the_status_of_app_service_and_node(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            a = await f.store.put(app("web", "plant", ports=[{"name": "http", "env": "PORT"}], replicas=1))
            await f.store.put(doc("Service", "web", {"app": "web", "port": "http"}))
            beat = await f.ask("plant-1", "beat", BeatAsk(1, "run"), BeatAnswer)
            assert (beat.hub, beat.epoch, beat.error) == (f.nodes.run_id, f.store.epoch, "")
            assert f.nodes.is_online("plant-1"), "the first beat of a run is certain"
            instance = {"node": "plant-1", "phase": "Running", "ports": {"http": 20001}, "address": "10.0.0.1"}
            status = {"phase": "Running", "instances": [instance], "version": "v1", "observedGeneration": 1}
            report = ReportAsk([Status("App", "default", "web", status)], True, {"version": "9"},
                               [{"seq": 4, "store": "r", "reason": "Started"}])  # fmt: skip
            for _ in range(2):  # the second time only the answer was lost
                assert (await f.ask("plant-1", "report", msgspec.msgpack.encode(report), Ok)).error == ""
            service, node = Key("Service", "default", "web"), Key("Node", CLUSTER, "plant-1")
            await until(lambda: bool(f.store.get(service).status.get("endpoints")))
            assert f.store.get(service).status["endpoints"] == [
                {"node": "plant-1", "site": "plant", "address": "10.0.0.1", "port": 20001}
            ]
            assert f.store.get(a.key).status["version"] == "v1"
            await until(lambda: f.store.get(node).status.get("version") == "9")
            assert f.store.get(node).status["online"] is True
            await until(lambda: bool(f.records.items("events")))
            await f.ask("plant-1", "report", ReportAsk([], False, None, [{"seq": 5, "store": "r", "reason": "B"}]), Ok)
            await until(lambda: f.records.items("events")[-1]["reason"] == "B")
            reasons = [r["reason"] for r in f.records.items("events") if r.get("node") == "plant-1"]
            assert sorted(reasons) == ["B", "NodeOnline", "Started"]
            # a full report that does not name it any more takes it away
            await f.ask("plant-1", "report", ReportAsk([], True), Ok)
            await until(lambda: not f.store.get(service).status.get("endpoints"))

    asyncio.run(body())


def test_what_was_folded_while_its_node_was_not_shown_online_yet_is_folded_again(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            a = await f.store.put(app("web", "plant"))
            await f.ask("plant-1", "beat", BeatAsk(1, "run"), BeatAnswer)
            status = {"phase": "Running", "instances": [{"phase": "Running"}], "version": "v1"}
            await f.ask("plant-1", "report", ReportAsk([Status("App", "default", "web", status)], True), Ok)

            def stale() -> list[bool]:
                return ["stale" in i for i in f.store.get(a.key).status.get("instances", [])]

            await until(lambda: stale() == [False])
            await f.nodes._node_status.settled()
            node = Key("Node", CLUSTER, "plant-1")
            await f.store.put_status(node, {**f.store.get(node).status, "online": False})
            f.nodes._fold.add(a.key)  # its link came up, and this was quicker than the node's own status
            await until(lambda: stale() == [True])
            f.nodes._node_status.add("plant-1")
            await until(lambda: stale() == [False])

    asyncio.run(body())


def test_a_change_pokes_the_nodes_it_concerns(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            poked: list[tuple[str, int]] = []

            async def seen(msg: Msg) -> None:
                poked.append((msg.subject.split(".")[2], int(msg.data)))

            bus = await f.bus("plant-1")
            await bus.subscribe("ew.node.*.poke", seen)
            await bus.flush()
            for node in ("plant-1", "shop-1"):  # plant-2 is not there
                await f.ask(node, "beat", BeatAsk(1, "run"), BeatAnswer)
            online = lambda n: f.store.get(Key("Node", CLUSTER, n)).status.get("online")  # noqa: E731
            await until(lambda: bool(online("plant-1") and online("shop-1")))
            mark = await f.store.put(app("mark", "plant"))
            await until(lambda: any(revision >= mark.revision for _, revision in poked))
            poked.clear()
            await f.store.put(app("there", "shop"))
            await f.store.put(app("everywhere"))
            await until(lambda: len(poked) >= 3)
            assert poked[0][0] == "shop-1"
            assert {node for node, _ in poked[1:]} == {"plant-1", "shop-1"}

    asyncio.run(body())


def test_a_site_is_not_told_what_it_says_of_its_nodes(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            status = lambda n: f.store.get(Key("Node", CLUSTER, n)).status  # noqa: E731
            await f.ask("plant-1", "beat", BeatAsk(1, "run"), BeatAnswer)
            await until(lambda: bool(status("plant-1").get("online")))
            first = await f.sync("plant-1")
            word = {"plant-1": {"verdict": "healthy", "evidence": {}}, "plant-2": {"verdict": "dead", "evidence": {}}}
            await f.ask("plant-1", "report", ReportAsk([], site=word), Ok)
            await until(lambda: [status(n).get("verdict") for n in word] == ["healthy", "dead"])
            assert names(await f.sync("plant-1", first.revision, first.epoch)) == set()
            await f.ask("plant-1", "report", ReportAsk([], node={"version": "9"}), Ok)
            await until(lambda: status("plant-1").get("version") == "9")
            assert names(await f.sync("plant-1", first.revision, first.epoch)) == {"Node/plant-1", "Node/plant-2"}

    asyncio.run(body())


def test_a_service_knows_which_nodes_of_other_sites_may_ask(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            await f.store.put(app("web", "plant", ports=[{"name": "http", "env": "PORT"}]))
            service = await f.store.put(doc("Service", "web", {"app": "web", "port": "http", "allowFrom": ["shop"]}))
            guests = lambda: f.store.get(service.key).status.get("guests")  # noqa: E731
            await until(lambda: guests() == {"shop-1": "shop"})
            two = await f.store.put(doc("Node", "shop-2", {"site": "shop"}))
            await until(lambda: guests() == {"shop-1": "shop", "shop-2": "shop"})
            await f.store.put_status(Key("Node", CLUSTER, "shop-1"), {"revoked": True})
            await until(lambda: guests() == {"shop-2": "shop"})
            await f.store.remove(two.key)
            await until(lambda: guests() == {})

    asyncio.run(body())


def test_a_beat_says_only_what_is_new(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            bus = await f.bus("plant-1")

            answers: asyncio.Queue[bytes] = asyncio.Queue()

            async def answered(msg: Msg) -> None:
                answers.put_nowait(msg.data)

            await bus.subscribe("ew.node.plant-1.b", answered)

            async def empty() -> bytes:
                await bus.publish("ew.hub.beat.plant-1", b"")  # no reply subject: to be short
                return await answers.get()

            async def full(view: str = "", start: str = "run") -> BeatAnswer:
                answer: BeatAnswer = await f.ask("plant-1", "beat", BeatAsk(1, start, view, 1.5), BeatAnswer)
                return answer

            await f.store.put(app("here", "plant"))
            told = msgspec.msgpack.decode(await empty(), type=BeatAnswer)
            assert (told.hub, told.epoch, told.short) == (f.nodes.run_id, f.store.epoch, True)
            assert told.revision > 0, "a hub that knows nothing of the node says all"
            await f.sync("plant-1")
            assert f.nodes.is_online("plant-1"), "two signs of life"
            await f.nodes._node_status.settled()  # its site's nodes are told that it is there
            assert await empty() != b""
            first = await f.sync("plant-1")
            assert await empty() == b""
            # another site's changes, statuses made of reports, the hub's own facts: nothing of it concerns this node
            await f.store.put(app("there", "shop"))
            await f.store.put_status(Key("App", "default", "here"), {"phase": "Running"})
            await f.store.set_fact("x", b"1")
            assert await empty() == b""
            answer = await full(first.view)
            assert (answer.sync, answer.revision) == (False, 0)
            assert f.nodes._live["plant-1"].rtt == 1.5
            assert (await full()).revision <= first.revision, "an agent of the release before compares revisions"
            changed = await f.store.put(app("here", "plant", replicas=2))
            news = msgspec.msgpack.decode(await empty(), type=BeatAnswer)
            assert news.revision >= changed.revision
            assert (await full(first.view)).sync
            assert (await full()).revision >= changed.revision
            # a node that moves has another view
            await f.store.put(doc("Node", "plant-1", {"site": "shop"}))
            assert msgspec.msgpack.decode(await empty(), type=BeatAnswer).revision >= changed.revision
            assert (
                "App/there" in names(await f.sync("plant-1", first.revision, first.epoch))
                or (await full(first.view)).sync
            )
            stranger = await f.bus("stranger")
            assert b"no such node" in (await stranger.request("ew.hub.beat.stranger", b"")).data

    asyncio.run(body())


def test_a_new_hub_names_what_a_node_may_keep(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            await f.store.put(app("kept", "plant"))
            await f.store.put(app("doomed", "plant"))
            first = await f.sync("plant-1")
            assert first.names is None
            await f.store.remove(Key("App", "default", "doomed"))
            await f.store.put(app("there", "shop"))
            await f.store.remove(Key("App", "default", "there"))
            known = await f.sync("plant-1", first.revision, first.epoch)
            assert (known.names, names(known)) == (None, {"App/doomed gone"})
            # the hub process is another one: what left a view is not known any more, what is in it is
            f.nodes.roster.views = Views(f.store.entry)
            f.nodes.roster.views.load(f.store.all())
            then = await f.sync("plant-1", first.revision, first.epoch)
            assert not then.full and then.names is not None
            assert {n for _, _, n in then.names} == {"plant", "plant-1", "plant-2", "kept"}
            assert then.view == known.view
            assert "there" not in str(then), "nothing of another site, not even that it is gone"
            # what a fleet of any size is asked for at once is spread
            assert (await f.ask("plant-1", "beat", BeatAsk(1, "r"), BeatAnswer)).spread == 0
            for n in range(100):
                f.nodes._live[f"x{n}"] = Liveness(heard=clock.monotonic())
            assert (await f.ask("plant-1", "beat", BeatAsk(1, "r"), BeatAnswer)).spread > 0.4

    asyncio.run(body())


def test_what_a_node_repeats_is_not_written_again(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            await f.store.put(app("web", "plant", ports=[{"name": "http", "env": "PORT"}], replicas=1))
            service = await f.store.put(doc("Service", "web", {"app": "web", "port": "http"}))
            instance = {"node": "plant-1", "phase": "Running", "ports": {"http": 20001}, "address": "10.0.0.1"}
            status = {"phase": "Running", "instances": [instance]}
            report = ReportAsk([Status("App", "default", "web", status)], True, {"version": "9"}, [])
            await f.ask("plant-1", "beat", BeatAsk(1, "run"), BeatAnswer)
            await f.ask("plant-1", "report", report, Ok)
            await until(lambda: bool(f.store.get(service.key).status.get("endpoints")), 20)
            await until(lambda: f.store.get(Key("Node", CLUSTER, "plant-1")).status.get("version") == "9", 20)
            await until(lambda: b"Running" in (f.store.fact("report.plant-1") or b""), 20)
            for loop in (f.nodes._fold, f.nodes._persist, f.nodes._node_status):
                await loop.settled()
            revision = f.store.revision
            for _ in range(3):
                await f.ask("plant-1", "report", report, Ok)
            for loop in (f.nodes._fold, f.nodes._persist, f.nodes._node_status):
                await loop.settled()
            assert f.store.revision == revision
            # a Service that is edited keeps its endpoints
            await f.store.put(doc("Service", "web", {"app": "web", "port": "http"}, labels={"a": "b"}))
            await f.nodes._fold.settled()
            assert f.store.get(service.key).status["endpoints"]
            # a node that is gone leaves nothing behind
            await f.store.remove(Key("Node", CLUSTER, "plant-1"))
            await f.nodes._fold.settled()
            assert f.nodes._reporters.get("App/default/web") == set()
            assert "plant-1" not in f.nodes.roster.nodes_at["plant"]
            assert f.store.get(service.key).status["endpoints"] == []

    asyncio.run(body())


def test_what_a_peer_tells_of_a_node_before_it_is_in_the_copy_of_the_state_is_taken_then(tmp_path: Path) -> None:
    """A node that enrolled at another process reports at once, and says what is new only once."""

    async def body() -> None:
        async with fleet(tmp_path) as f:
            await f.store.put(app("web", "plant"))
            status = {"phase": "Running", "instances": [{"node": "plant-3", "phase": "Running"}]}
            ask = ReportAsk([Status("App", "default", "web", status)], False, {"memory": 1}, [])
            f.nodes._reported_to_peer(msgspec.msgpack.encode(("plant-3", msgspec.msgpack.encode(ask))))
            for n in range(1000):  # who never comes takes no room
                f.nodes._level_of_peer(msgspec.msgpack.encode((f"ghost-{n}" if n % 20 else "plant-3", 1, ["x"])))
            assert len(f.nodes._early) <= 64
            f.nodes._reported_to_peer(msgspec.msgpack.encode(("plant-3", msgspec.msgpack.encode(ask))))
            await f.store.put(doc("Node", "plant-3", {"site": "plant"}))

            async def shown() -> bool:
                found = f.store.get(Key("App", "default", "web")).status.get("instances", [])
                return [i["node"] for i in found] == ["plant-3"]

            await until(shown)
            node = Key("Node", CLUSTER, "plant-3")
            await until(lambda: f.store.get(node).status.get("notTold") == ["x"])
            assert f.store.get(node).status["memory"] == 1
            assert "plant-3" not in f.nodes._early

    asyncio.run(body())
