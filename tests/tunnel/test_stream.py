"""The pair of ends that services are tested on keeps the promises of a stream."""

from __future__ import annotations

import asyncio

import pytest

from edgeward.tunnel.stream import Reset, pair


async def test_a_writer_waits_for_its_reader() -> None:
    a, b = pair(window=10)
    writing = asyncio.create_task(a.write(b"x" * 25))
    got = b""
    while len(got) < 25:
        got += await b.read(4)
    await writing
    assert got == b"x" * 25


async def test_a_stalled_reader_stops_the_writer_alone() -> None:
    a, b = pair(window=10)
    writing = asyncio.create_task(a.write(b"x" * 11))
    await b.write(b"goes on")
    assert await a.read() == b"goes on"
    assert not writing.done()
    assert await b.read(1) == b"x"
    await asyncio.wait_for(writing, 30)


async def test_either_direction_ends_by_itself() -> None:
    a, b = pair()
    await a.write(b"all")
    await a.end()
    assert [await b.read(), await b.read(), await b.read()] == [b"all", b"", b""]
    await b.write(b"answer")
    assert await a.read() == b"answer"
    with pytest.raises(Reset):
        await a.write(b"more")


async def test_a_reset_ends_both_and_says_why() -> None:
    a, b = pair(window=1)
    waiting = asyncio.create_task(a.write(b"xy"))
    reading = asyncio.create_task(a.read())
    b.reset("revoked", "the role does not allow it any more")
    for task in (waiting, reading):
        with pytest.raises(Reset, match="does not allow") as caught:
            await asyncio.wait_for(task, 30)
        assert caught.value.code == "revoked"
