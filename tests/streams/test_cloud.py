"""The hub's streams on a real server: read by number, followed, and trimmed without losing a cursor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.core.pair import until

from edgeward.core.bus import Bus
from edgeward.core.delivery import SPAN
from edgeward.core.errors import Invalid, NotFound, Unreachable
from edgeward.core.identity import HubIdentity
from edgeward.core.natsserver import HubSpec, NatsServer
from edgeward.core.resource import Resource, decode
from edgeward.hub.kinds import load
from edgeward.streams.cloud import StreamsCloud, fold_export

load()


def export(stream: str, keep: str | int = "4Gi", **more: Any) -> Resource:
    doc = {"apiVersion": "edgeward/v1", "kind": "Export", "metadata": {"name": "e"}}
    spec = {"from": {"mqtt": "s/#"}, "to": {"hub": {"stream": stream, "keep": keep}}, **more}
    return decode(doc | {"spec": spec})


@asynccontextmanager
async def hub(folder: Path) -> AsyncIterator[tuple[StreamsCloud, Bus, NatsServer]]:
    identity = HubIdentity.open(folder / "identity")
    server = NatsServer(folder / "nats", HubSpec(identity.operator_jwt, identity.system_account, identity.accounts))
    await server.start()
    try:
        bus = await Bus.connect(server.url, name="test", user=identity.user, timeout=60)
        try:
            async with asyncio.timeout(240):
                yield StreamsCloud(bus.client), bus, server
        finally:
            await bus.close()
    finally:
        await server.stop()


async def batch(bus: Bus, stream: str, node: str, rows: list[tuple[str, bytes, int]], queue: str = "q") -> int:
    return (await bus.publish_acked(f"ew.data.{stream}.{node}.{queue}", msgspec.msgpack.encode(rows))).seq


async def read(cloud: StreamsCloud, name: str, start: int = 0) -> list[dict[str, Any]]:
    return [m async for m in await cloud.reader(name, start)]


def test_readings_have_a_number_and_are_read_from_any_of_them(tmp_path: Path) -> None:
    async def body() -> None:
        async with hub(tmp_path) as (cloud, bus, _):
            await cloud.ensure(export("line"))
            first = [("s/a", b'{"id":1}', 1_500), ("s/b", b"21.5 C", 0), ("s/b", b"\xff\x00", 0)]
            assert await batch(bus, "line", "n1", first) == 1
            for n in range(150):  # more than one batch of reads
                await batch(bus, "line", "n2", [("s", b"%d" % n, 0)] * 2)
            got = await read(cloud, "line")
            assert got[0] == {
                "seq": SPAN, "node": "n1", "topic": "s/a", "payload": {"id": 1}, "time": got[0]["time"],
            }  # fmt: skip
            assert got[0]["time"].startswith("1970-01-01T00:00:01")
            assert [m["payload"] for m in got[1:3]] == ["21.5 C", {"base64": "/wA="}]
            assert [m["payload"] for m in got[3:]] == [n for n in range(150) for _ in range(2)]
            numbers = [m["seq"] for m in got]
            assert numbers == sorted(set(numbers))
            for at in (0, 1, 2, 3, 4, 150, len(got) - 1):
                assert await read(cloud, "line", numbers[at]) == got[at:]
                assert await read(cloud, "line", numbers[at] + 1) == got[at + 1 :]
            assert await read(cloud, "line", numbers[-1] + 10 * SPAN) == []
            await cloud.ensure(export("line"))
            await cloud.ensure(export("another"))
            assert [(s["name"], s["batches"]) for s in await cloud.list()] == [("another", 0), ("line", 151)]
            assert await read(cloud, "line") == got, "a stream that is there already is left as it is"

    asyncio.run(body())


def test_a_reader_that_follows_gets_what_comes_and_leaves_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with hub(tmp_path) as (cloud, bus, _):
            await cloud.ensure(export("line"))
            await batch(bus, "line", "n", [("s", b"1", 0)])
            before = set(bus.client._subs)
            async with aclosing(await cloud.reader("line", follow=True)) as following:  # type: ignore[type-var]
                assert (await anext(following))["payload"] == 1
                waiting = asyncio.ensure_future(anext(following))
                await bus.flush()
                assert not waiting.done()
                await batch(bus, "line", "n", [("s", b"2", 0), ("s", b"3", 0)])
                assert (await waiting)["payload"] == 2
                assert (await anext(following))["payload"] == 3
            assert set(bus.client._subs) - before <= {1}, "but the inbox of requests"

    asyncio.run(body())


def test_what_cannot_be_read(tmp_path: Path) -> None:
    async def body() -> None:
        async with hub(tmp_path) as (cloud, _, server):
            await cloud.ensure(export("line"))
            with pytest.raises(NotFound, match=r"^stream/none: there is no such stream \(an Export makes it"):
                await cloud.reader("none")
            for name in ("line.>", "*", "", "a b", "LINE"):
                with pytest.raises(Invalid, match=r"^stream: .*is no valid name"):
                    await cloud.reader(name)
            with pytest.raises(Invalid, match=r"\?from: is negative \(0 reads all\)"):
                await cloud.reader("line", -1)
            await server.stop()
            calls = (cloud.list(), cloud.reader("line"), cloud.ensure(export("other")))
            for error in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(error, Unreachable)
                assert "does not answer" in str(error) or "cannot be made" in str(error)

    asyncio.run(body())


def test_a_trim_takes_the_oldest_and_leaves_every_cursor(tmp_path: Path) -> None:
    async def body() -> None:
        async with hub(tmp_path) as (cloud, bus, _):
            await cloud.ensure(export("line"))
            row = [("s", b"x" * 1000, 0)]
            await batch(bus, "line", "quiet", row)
            for n in range(100):
                await batch(bus, "line", f"busy{n % 2}", row)
            size = (await cloud.list())[0]["bytes"]
            assert await cloud.trim("line", size) == 0, "it fits"
            assert 45 <= await cloud.trim("line", size // 2) <= 55
            left = await read(cloud, "line")
            assert left[0]["node"] == "quiet", "the only batch of its queue is its cursor, however old"
            assert [m["seq"] // SPAN for m in left[1:]] == list(range(101 - len(left) + 2, 102)), "the newest, no gap"
            await cloud.trim("line", 0)
            assert [m["node"] for m in await read(cloud, "line")] == ["quiet", "busy0", "busy1"]
            assert await cloud.trim("line", 0) == 0
            assert await batch(bus, "line", "quiet", row) == 102, "numbers are never given out again"

    asyncio.run(body())


def test_streams_are_kept_to_the_most_that_an_export_declares(tmp_path: Path) -> None:
    async def body() -> None:
        async with hub(tmp_path) as (cloud, bus, _):
            for name in ("big", "small"):
                await cloud.ensure(export(name))
                for _ in range(30):
                    await batch(bus, name, "n", [("s", b"x" * 100_000, 0)])
            exports = [export("gone", "1Mi"), export("big", "1Mi"), export("big", "1Gi"), export("small", "1Mi")]
            keeping = asyncio.create_task(cloud.keep(lambda: exports))

            async def trimmed() -> bool:
                sizes = {s["name"]: s["bytes"] for s in await cloud.list()}
                assert sizes["big"] > 3_000_000
                return bool(sizes["small"] < 1_500_000)

            await until(trimmed)
            assert not keeping.done()
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    asyncio.run(body())


def node(name: str, site: str = "plant", online: bool = True) -> Resource:
    doc = {"apiVersion": "edgeward/v1", "kind": "Node", "metadata": {"name": name}, "spec": {"site": site}}
    return msgspec.structs.replace(decode(doc), status={"online": online})


def test_an_exports_status_is_what_its_nodes_say() -> None:
    one = {"state": "capturing", "observedGeneration": 2, "pending": 1}
    reports = {"b": one, "a": one | {"pending": 2}}
    folded = fold_export(export("line"), [node("a"), node("b")], reports)
    assert list(folded["nodes"]) == ["a", "b"]
    assert folded == {"phase": "Flowing", "nodes": reports, "observedGeneration": 2}
    folded["nodes"]["a"]["pending"] = 9
    assert reports["a"]["pending"] == 2


def test_an_exports_phase_is_the_worst_that_a_node_says() -> None:
    one = {"state": "capturing", "observedGeneration": 2}
    nodes = [node("a"), node("b", online=False), node("c", "elsewhere")]

    def folded(placement: dict[str, Any] | None = None, **reports: dict[str, Any]) -> dict[str, Any]:
        e = export("line", placement=placement or {"site": "plant"})
        return fold_export(e, nodes, reports)

    assert folded(a=one)["phase"] == "Pending"
    assert folded(a=one)["message"] == "not heard from: b"
    both = folded(a=one | {"state": "refusing", "message": "full"}, b=one | {"observedGeneration": 1})
    assert (both["phase"], both["message"], both["observedGeneration"]) == ("Refusing", "a: full", 1)
    assert both["nodes"]["b"]["stale"], "an offline node's word is its last"
    assert "stale" not in both["nodes"]["a"]
    assert folded(a=one | {"state": "failed", "message": "no room"}, b=one)["message"] == "a: no room"
    assert folded(a=one | {"state": "failed"}, b=one)["phase"] == "Failed"
    assert folded({"site": "none"})["message"] == "no node matches the placement"
    assert "observedGeneration" not in folded(a={"state": "capturing"}, b=one), "an older release does not say it"
