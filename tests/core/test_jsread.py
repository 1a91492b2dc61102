"""Batched direct reads of a real stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.js.api import StreamConfig

from edgeward.core.bus import Bus
from edgeward.core.errors import Unreachable
from edgeward.core.identity import HubIdentity
from edgeward.core.jsread import read_batch
from edgeward.core.natsserver import HubSpec, NatsServer


@asynccontextmanager
async def hub(folder: Path) -> AsyncIterator[Bus]:
    identity = HubIdentity.open(folder / "identity")
    server = NatsServer(folder / "nats", HubSpec(identity.operator_jwt, identity.system_account, identity.accounts))
    await server.start()
    bus = await Bus.connect(server.url, name="test", user=identity.user, timeout=60)
    try:
        async with asyncio.timeout(240):
            yield bus
    finally:
        await bus.close()
        await server.stop()


async def read(bus: Bus, seq: int, subject: str = "t.>", batch: int = 100) -> list[int]:
    got = await read_batch(bus.client, "$JS.API", "T", seq, subject, batch)
    assert all(headers["Nats-Subject"] == name for _, name, headers, _ in got)
    assert [data for *_, data in got] == [b"%d" % at for at, *_ in got]
    return [at for at, *_ in got]


def test_from_a_sequence_on_by_subject_up_to_a_batch(tmp_path: Path) -> None:
    async def body() -> None:
        async with hub(tmp_path) as bus:
            js = bus.client.jetstream()
            await js.add_stream(StreamConfig(name="T", subjects=["t.>"], allow_direct=True))
            assert await read(bus, 1) == [], "an empty stream"
            for n in range(1, 11):
                await js.publish(f"t.{'odd' if n % 2 else 'even'}.{n}", b"%d" % n)
            assert await read(bus, 0) == await read(bus, 1) == await read(bus, -5) == list(range(1, 11))
            assert await read(bus, 4, batch=3) == [4, 5, 6]
            assert await read(bus, 10) == [10]
            assert await read(bus, 11) == []
            assert await read(bus, 3, "t.even.*", 2) == [4, 6]
            assert await read(bus, 1, "t.none.*") == []
            await js.delete_msg("T", 4)
            await js.purge_stream("T", seq=3)
            assert await read(bus, 1) == [3, 5, 6, 7, 8, 9, 10]
            await js.publish("t.odd.11", b"11")
            assert await read(bus, 11) == [11]

    asyncio.run(body())


def test_a_short_answer_is_not_the_end_an_empty_one_is(tmp_path: Path) -> None:
    async def body() -> None:
        async with hub(tmp_path) as bus:
            js = bus.client.jetstream()
            await js.add_stream(StreamConfig(name="T", subjects=["t.>"], allow_direct=True))
            sizes = [3_000_000, 3_000_000, 10, 3_000_000, 10]
            for size in sizes:
                await js.publish("t.x", b"x" * size, timeout=30)
            at, found, answers = 1, [], 0
            while got := await read_batch(bus.client, "$JS.API", "T", at, "t.>", 100):
                found += [len(data) for *_, data in got]
                at, answers = got[-1][0] + 1, answers + 1
            assert found == sizes
            assert answers > 1

    asyncio.run(body())


def test_who_does_not_answer_is_unreachable(tmp_path: Path) -> None:
    async def body() -> None:
        async with hub(tmp_path) as bus:
            js = bus.client.jetstream()
            with pytest.raises(Unreachable, match="stream GONE"):
                await read_batch(bus.client, "$JS.API", "GONE", 1, ">", 10)
            with pytest.raises(Unreachable, match="stream T"):
                await read_batch(bus.client, "$JS.elsewhere.API", "T", 1, ">", 10)
            await bus.client.subscribe("$JS.mute.API.>")  # it hears, and says nothing
            with pytest.raises(Unreachable) as caught:
                await read_batch(bus.client, "$JS.mute.API", "T", 1, ">", 10, timeout=0.05)
            assert caught.value.remedy
            await js.add_stream(StreamConfig(name="SHUT", subjects=["s.>"], allow_direct=False))
            with pytest.raises(Unreachable, match="stream SHUT"):
                await read_batch(bus.client, "$JS.API", "SHUT", 1, "s.>", 10, timeout=1.0)

    asyncio.run(body())
