"""Records: in order, bounded per name, the same from SQLite and from a real JetStream stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from edgeward.core import records as records_module
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError
from edgeward.core.identity import HubIdentity
from edgeward.core.natsserver import HubSpec, NatsServer
from edgeward.core.records import Record, Records, SqliteRecords, StreamRecords


@asynccontextmanager
async def hub(folder: Path) -> AsyncIterator[tuple[NatsServer, Bus]]:
    identity = HubIdentity.open(folder / "identity")
    server = NatsServer(folder / "nats", HubSpec(identity.operator_jwt, identity.system_account, identity.accounts))
    await server.start()
    keeper = asyncio.create_task(server.run())
    bus = await Bus.connect(server.url, name="test", user=identity.user, timeout=60)
    try:
        async with asyncio.timeout(240):
            yield server, bus
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await bus.close()
        await server.stop()


@asynccontextmanager
async def stream_records(bus: Bus) -> AsyncIterator[StreamRecords]:
    records = StreamRecords(bus.client)
    await records.open()
    follower = asyncio.create_task(records.run())
    try:
        yield records
    finally:
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)


async def take(following: AsyncIterator[Record], n: int) -> list[int]:
    return [(await anext(following))["n"] for _ in range(n)]


async def contract(records: Records) -> None:
    """What both promise."""
    async with aclosing(records.follow("events")) as new:  # type: ignore[type-var]
        for n in range(5):
            await records.append("events", {"n": n}, unique=f"u{n}")
        await records.append("journal", {"n": 50, "time": "2020-01-01T00:00:00.000Z", "seq": 7_000})
        await records.append("events", {"n": 5})
        assert await take(new, 6) == [0, 1, 2, 3, 4, 5]
    events = records.items("events")
    assert [r["n"] for r in events] == [0, 1, 2, 3, 4, 5]
    assert all(r["time"].endswith("Z") for r in events)
    seqs = [r["seq"] for r in events]
    assert seqs == sorted(set(seqs))
    assert [r["n"] for r in records.items("events", since=seqs[1], limit=2)] == [4, 5], "the last ones"
    assert records.items("events", since=seqs[-1]) == []
    assert records.items("gone") == []
    (decided,) = records.items("journal")
    assert decided["time"] == "2020-01-01T00:00:00.000Z"
    assert seqs[4] < decided["seq"] < seqs[5], "a record that says its own seq does not get it"
    async with aclosing(records.follow("events", since=seqs[2], limit=2)) as late:  # type: ignore[type-var]
        assert await take(late, 2) == [4, 5]
        await records.append("events", {"n": 6})
        assert await take(late, 1) == [6]


def test_sqlite_keeps_the_contract_and_its_records(tmp_path: Path) -> None:
    async def body() -> None:
        records = SqliteRecords(tmp_path / "r.db")
        await contract(records)
        before = records.items("events")
        records.close()
        again = SqliteRecords(tmp_path / "r.db")
        assert again.items("events") == before
        await again.append("events", {"n": 7})
        assert [r["n"] for r in again.first_after("events", before[0]["seq"], 3)] == [1, 2, 3], "the oldest ones"
        again.close()

    asyncio.run(body())


def test_the_stream_keeps_the_contract(tmp_path: Path) -> None:
    async def body() -> None:
        async with hub(tmp_path) as (_, bus), stream_records(bus) as records:
            await contract(records)
            async with aclosing(records.follow("events", limit=1)) as new:  # type: ignore[type-var]
                for n, unique in ((98, "u3"), (99, "u3"), (7, "u7")):
                    await records.append("events", {"n": n}, unique=unique)
                assert await take(new, 2) == [6, 7], "a repeated one is dropped"

    asyncio.run(body())


def test_each_name_keeps_its_last_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rare record is not pushed out by a busy name, and a process that restarts often prunes too."""
    monkeypatch.setattr(records_module, "KEEP", 20)

    async def body() -> None:
        records = SqliteRecords(tmp_path / "r.db")
        await records.append("journal", {"n": -1})
        for n in range(1100):
            await records.append("events", {"n": n})
            if n % 300 == 0:
                records.close()
                records = SqliteRecords(tmp_path / "r.db")
                await records.append("journal", {"n": n})
        kept = [r["n"] for r in records.items("events", limit=10_000)]
        assert kept == list(range(1100 - len(kept), 1100))
        assert 20 <= len(kept) <= 20 + 500
        assert [r["n"] for r in records.items("journal")] == [-1, 0, 300, 600, 900]
        records.close()

    asyncio.run(body())


def test_a_follower_that_sleeps_loses_the_oldest_only() -> None:
    async def body() -> None:
        records = SqliteRecords()
        async with aclosing(records.follow("events")) as slow:  # type: ignore[type-var]
            await records.append("events", {"n": 0})
            assert await take(slow, 1) == [0]
            for n in range(1, 1501):
                await records.append("events", {"n": n})
            got = await take(slow, 1000)
            assert got == list(range(501, 1501))
        records.close()

    asyncio.run(body())


def test_a_second_hub_sees_all_however_large(tmp_path: Path) -> None:
    """More than one answer of the server holds, both in number and in bytes."""

    async def body() -> None:
        async with hub(tmp_path) as (_, bus), stream_records(bus) as one:
            for n in range(12):
                await one.append("journal", {"n": n, "text": "x" * 900_000})
            await asyncio.gather(*(one.append("events", {"n": n}) for n in range(700)))
            two = StreamRecords(bus.client)
            await two.open()
            assert [r["n"] for r in two.items("journal")] == list(range(12))
            assert sorted(r["n"] for r in two.items("events", limit=1000)) == list(range(700))

    asyncio.run(body())


def test_a_killed_server_is_followed_on_and_a_stopped_one_is_an_error(tmp_path: Path) -> None:
    async def body() -> None:
        import os
        import signal

        async with hub(tmp_path) as (server, bus), stream_records(bus) as records:
            async with aclosing(records.follow("events")) as new:  # type: ignore[type-var]
                await records.append("events", {"n": 0}, unique="a")
                assert server.pid
                os.kill(server.pid, signal.SIGKILL)
                while True:
                    try:
                        await records.append("events", {"n": 1}, unique="b")
                        break
                    except EdgewardError as e:
                        assert "cannot keep the record" in str(e)
                assert await take(new, 2) == [0, 1]
            assert [r["n"] for r in records.items("events")] == [0, 1]

    asyncio.run(body())
