"""What the hub's API has beside the resources, over HTTP, with nodes that answer over a real nats-server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.core.pair import until
from tests.nodes.fleet import Fleet, app, doc, fleet

from edgeward.core.api import build_app
from edgeward.core.authz import administrator
from edgeward.core.errors import NotFound
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.streaming import Piece
from edgeward.functions.keeping import CloudHistory
from edgeward.hub.routes import HubRoutes
from edgeward.nodes import calls
from edgeward.nodes.calls import CallServer
from edgeward.nodes.wire import BeatAnswer, BeatAsk
from edgeward.streams.cloud import StreamsCloud

LONG = "x" * 70_000


@asynccontextmanager
async def api(
    root: Path, logs_of_all: Callable[[dict[str, Any]], AsyncIterator[bytes]] | None = None
) -> AsyncIterator[tuple[httpx.AsyncClient, Fleet, list[dict[str, Any]]]]:
    """The API, its fleet, and with what arguments nodes were called; plant-1 and shop-1 are there, plant-2 is not."""
    async with fleet(root) as f:
        asked: list[dict[str, Any]] = []

        def handlers(node: str) -> dict[str, Any]:
            async def logs(args: dict[str, Any]) -> AsyncIterator[bytes]:
                asked.append(args)
                if args["tail"] == 7:
                    yield b"begun"
                    raise NotFound("wrote nothing", resource="App/web")
                yield b"one\ntw"  # pieces end anywhere
                yield b"o\n" + LONG.encode() + b"\n"
                yield b"no end"

            async def usage(_: dict[str, Any]) -> AsyncIterator[bytes]:
                yield msgspec.json.encode({"nodes": [{"name": node, "cpu": 0.5}], "apps": [{"name": f"on-{node}"}]})

            verbs = ("logs", "function-logs", "function-samples", "function-deadletters")
            return {"usage": usage, **dict.fromkeys(verbs, logs_of_all or logs)}

        routes = HubRoutes(
            store=f.store,
            client=f.hub.client,
            nodes=f.nodes,
            streams=StreamsCloud(f.hub.client),
            records=f.records,
            write=f.write,
            history=CloudHistory(f.store),
        )
        served = build_app(
            f.resources,
            f.store,
            auth=lambda token, client: administrator("admin"),
            extra_routes=routes.routes(),
            health=lambda: (True, {}),
            metrics=lambda: "",
            info={},
        )
        tasks: list[asyncio.Task[None]] = []
        try:
            for node in ("plant-1", "shop-1"):
                bus = await f.bus(node)
                before = len(bus.client._subs)
                tasks.append(asyncio.create_task(CallServer(node, handlers(node)).run(bus.client)))
                while len(bus.client._subs) == before:  # noqa: ASYNC110 - turn by turn
                    await asyncio.sleep(0)
                await bus.flush()
                await f.ask(node, "beat", BeatAsk(1, "run"), BeatAnswer)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://hub/api/v1") as client:
                yield client, f, asked
            assert not any(t.done() for t in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def refused(answer: httpx.Response, status: int, **members: Any) -> None:
    assert answer.status_code == status, answer.text
    got = answer.json()
    assert {k: got.get(k) for k in members} == members


async def run_on(f: Fleet, *nodes: str) -> None:
    await f.store.put(app("web"))
    await f.store.put_status(Key("App", "default", "web"), {"instances": [{"node": n} for n in nodes]})


LOGS = "/namespaces/default/apps/web/logs"


def test_logs_of_one_node_and_of_several(tmp_path: Path) -> None:
    async def body() -> None:
        async with api(tmp_path) as (client, f, asked):
            await run_on(f, "plant-1")
            answer = await client.get(f"{LOGS}?tail=5&since=1h&instance=i&follow=TRUE")
            assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
            assert answer.text == f"one\ntwo\n{LONG}\nno end", "of one node byte by byte as it wrote"
            assert asked == [
                {"namespace": "default", "name": "web", "tail": 5, "follow": True, "since": "1h", "instance": "i"}
            ]
            await run_on(f, "plant-1", "plant-2", "shop-1", "plant-1")
            lines = (await client.get(LOGS)).text.splitlines()
            assert len(asked) == 3, "each node once"
            assert (asked[-1]["tail"], asked[-1]["follow"]) == (200, False)
            for node in ("plant-1", "shop-1"):
                mine = [line for line in lines if line.startswith(f"[{node}] ")]
                assert mine == [f"[{node}] {x}" for x in ("one", "two", LONG, "no end")], "whole lines only"
            (other,) = [line for line in lines if not line.startswith("[")]
            assert other == "edgeward: node plant-2 is not connected; its logs are on it"
            one = await client.get(f"{LOGS}?node=shop-1")
            assert one.text.startswith("one\n")
            failed = await client.get(f"{LOGS}?node=shop-1&tail=7")
            assert failed.text == "begunedgeward: App/web: wrote nothing\n"

    asyncio.run(body())


def test_records_of_several_nodes_are_records(tmp_path: Path) -> None:
    async def said(args: dict[str, Any]) -> AsyncIterator[bytes]:
        for n in range(3):
            data = json.dumps({"node": "x", "message": f"{n} {LONG}"}).encode() + b"\n"
            yield data[:9]  # pieces end anywhere
            yield data[9:]
        raise NotFound("wrote no more", resource="Function/f")

    async def body() -> None:
        async with api(tmp_path, said) as (client, f, _):
            await f.store.put(doc("Function", "f", {"runtime": "python", "source": {"inline": "x = 1"}}))
            logs = "/namespaces/default/functions/f/logs"
            lines = [json.loads(line) for line in (await client.get(f"{logs}?json=true")).text.splitlines()]
            assert sorted(line["message"][0] for line in lines if "message" in line) == ["0", "0", "1", "1", "2", "2"]
            errors = {line["node"]: line["error"] for line in lines if "error" in line}
            assert set(errors) == {"plant-1", "plant-2", "shop-1"}
            assert "not connected" in errors["plant-2"]
            assert "wrote no more" in errors["shop-1"]
            assert "[shop-1] edgeward" not in (text := (await client.get(logs)).text)
            assert "[shop-1] {" in text
            for bad in ("regex=(", "since=soon"):
                refused(await client.get(f"{logs}?{bad}"), 422, field="?" + bad.partition("=")[0])
            refused(await client.post("/namespaces/default/functions/f/deadletters?do=list"), 422, field="?do")

    asyncio.run(body())


def test_a_node_that_breaks_off_leaves_no_half_a_record(tmp_path: Path) -> None:
    async def said(args: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b'{"node": "x", "n": 1}\n{"node": "x", '
        yield b'"n": 2}\n{"node": "x", "n'
        raise NotFound("has no more")

    async def body() -> None:
        async with api(tmp_path, said) as (client, f, _):
            await f.store.put(doc("Function", "f", {"runtime": "python", "source": {"inline": "x = 1"}}))
            for what, field in (("samples", "unreadable"), ("deadletters", "error")):
                text = (await client.get(f"/namespaces/default/functions/f/{what}")).text
                lines = [json.loads(line) for line in text.splitlines()]
                assert [line["n"] for line in lines if "n" in line] == [1, 2, 1, 2]
                told = {line["node"]: line[field] for line in lines if field in line}
                assert "not connected" in told.pop("plant-2")
                assert all("has no more" in why for why in told.values()) and len(told) == 2

    asyncio.run(body())


def test_logs_that_cannot_be_had(tmp_path: Path) -> None:
    async def body() -> None:
        async with api(tmp_path) as (client, f, asked):
            refused(await client.get(LOGS), 404, resource="App/web")
            await run_on(f)
            refused(await client.get(LOGS), 404, resource="App/web", detail="runs nowhere yet, so it has no logs")
            await run_on(f, "plant-1")
            refused(
                await client.get(f"{LOGS}?node=shop-1"), 404, resource="App/web", remedy="it runs on: plant-1",
            )  # fmt: skip
            for tail in ("-1", "100001", "x", "1e3"):
                refused(await client.get(LOGS, params={"tail": tail}), 422, field="?tail", remedy="0 to 100000")
            assert asked == []

    asyncio.run(body())


def test_top_tells_of_every_node_also_of_one_that_is_away(tmp_path: Path) -> None:
    async def body() -> None:
        async with api(tmp_path) as (client, _, _):
            assert (await client.get("/top")).json() == {
                "nodes": [
                    {"name": "plant-1", "cpu": 0.5},
                    {"name": "plant-2", "online": False},
                    {"name": "shop-1", "cpu": 0.5},
                ],
                "apps": [{"name": "on-plant-1"}, {"name": "on-shop-1"}],
            }

    asyncio.run(body())


def test_promoting_an_override_makes_it_everybodys(tmp_path: Path) -> None:
    async def body() -> None:
        async with api(tmp_path) as (client, f, _):
            target = {"kind": "App", "name": "web", "namespace": "default"}
            await f.store.put(app("web", replicas=1))

            async def promote(override: str, patch: dict[str, Any], **of: Any) -> httpx.Response:
                await f.store.put(doc("Override", override, {"target": target | of, "site": "plant", "patch": patch}))
                return await client.post(f"/namespaces/default/overrides/{override}/promote")

            answer = await promote("o", {"replicas": 3, "dependsOn": ["db"]})
            assert answer.status_code == 200, answer.text
            assert answer.json()["spec"]["replicas"] == 3
            assert f.store.get(Key("App", "default", "web")).spec.dependsOn == ["db"]
            assert f.store.find(Key("Override", "default", "o")) is None
            site = await promote("s", {"displayName": "P"}, kind="Site", name="plant", namespace="")
            assert site.json()["spec"] == {"displayName": "P"}
            for patch, field in (
                ({"replicas": -1}, "$.spec.replicas"),
                ({"dependsOn": ["web"]}, "$.spec.dependsOn"),
                ({"placement": {"site": "nowhere"}}, "$.spec.placement.site"),
            ):
                refused(await promote("bad", patch), 422, resource="App/web", field=field)
                assert f.store.find(Key("Override", "default", "bad")) is not None, "it stays, nothing was promoted"
            refused(await promote("gone", {}, name="none"), 404, resource="App/none")
            refused(await client.post("/namespaces/default/overrides/none/promote"), 404, resource="Override/none")

    asyncio.run(body())


def test_streams(tmp_path: Path) -> None:
    async def body() -> None:
        async with api(tmp_path) as (client, f, _):
            assert (await client.get("/streams")).json() == {"items": []}
            export = doc("Export", "e", {"from": {"mqtt": "s/#"}, "to": {"hub": {"stream": "line"}}})
            await StreamsCloud(f.hub.client).ensure(export)
            rows = [("s/a", b"%d" % n, 0) for n in range(5)]
            await f.hub.publish_acked("ew.data.line.plant-1.q", msgspec.msgpack.encode(rows))
            assert [s["name"] for s in (await client.get("/streams")).json()["items"]] == ["line"]

            async def payloads(query: str) -> list[int]:
                answer = await client.get(f"/streams/line{query}")
                assert answer.headers["content-type"] == "application/x-ndjson"
                return [json.loads(line)["payload"] for line in answer.text.splitlines()]

            assert await payloads("") == [0, 1, 2, 3, 4]
            assert await payloads("?limit=2") == [0, 1]
            assert await payloads("?from=4099") == [3, 4]
            assert await payloads("?from=4098&limit=3&follow=true") == [2, 3, 4], "enough is the end also of a follower"
            refused(await client.get("/streams/none"), 404, resource="stream/none")
            refused(await client.get("/streams/line?from=-1"), 422, field="?from")
            refused(await client.get("/streams/line?limit=many"), 422, field="?limit")
            refused(await client.get("/streams/LINE"), 422, field="stream")

    asyncio.run(body())


@pytest.mark.parametrize("name", ["events", "journal"])
def test_records(tmp_path: Path, name: str) -> None:
    async def body() -> None:
        async with api(tmp_path) as (client, f, _):
            for n in range(3):
                await f.records.append(name, {"mark": n})
            await f.records._follow()
            items = [r for r in (await client.get(f"/{name}")).json()["items"] if "mark" in r]
            assert [r["mark"] for r in items] == [0, 1, 2]
            later = (await client.get(f"/{name}?since={items[1]['seq']}")).json()["items"]
            assert [r["mark"] for r in later] == [2]
            refused(await client.get(f"/{name}?limit=0"), 422, field="?limit")
            assert f.store.find(Key("Node", CLUSTER, "plant-1")) is not None

    asyncio.run(body())


def test_followed_logs_go_on_when_the_nodes_agent_ends_and_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_SILENCE", 0.5)

    async def logs(args: dict[str, Any]) -> AsyncIterator[bytes]:
        done = int(args.get("after", {}).get("i", 0))
        if done < 3:
            yield Piece(b"%d\n" % (done + 1), {"i": str(done + 1)})
            await asyncio.Event().wait()  # the agent is gone without a word
        if done == 3:
            yield Piece(b"end\n", {"i": "4"})

    async def body() -> None:
        async with api(tmp_path, logs) as (client, f, _):
            await run_on(f, "plant-1")
            answer = await client.get(f"{LOGS}?follow=true")
            assert answer.text == "1\n2\n3\nend\n"
            await run_on(f, "plant-1")  # else it is not asked twice
            answer = await client.get(LOGS)
            assert answer.text.startswith("1\nedgeward: Node/plant-1: node plant-1 does not answer")

    asyncio.run(body())


def test_a_reader_that_goes_while_much_waits_for_it_leaves_nothing_behind(tmp_path: Path) -> None:
    said = 0

    async def logs(args: dict[str, Any]) -> AsyncIterator[bytes]:
        nonlocal said
        while True:
            said += 1
            yield b"line\n"

    async def body() -> None:
        async with api(tmp_path, logs) as (_, f, _asked):
            client = f.hub.client
            routes = HubRoutes(
                store=f.store,
                client=client,
                nodes=f.nodes,
                streams=StreamsCloud(client),
                records=f.records,
                write=f.write,
                history=CloudHistory(f.store),
            )
            pieces = routes._merge(["plant-1"], {"tail": 1})
            assert await anext(pieces) == b"line\n"
            # 64 wait in the queue: the node has to wait with the next
            await until(lambda: said >= 66)
            async with asyncio.timeout(60):
                await pieces.aclose()
            await until(lambda: not any(s.subject.startswith("ew.hub.reply.") for s in client._subs.values()))

    asyncio.run(body())
