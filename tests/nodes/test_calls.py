"""Calls over a real nats-server: pieces with back-pressure, errors as they were raised, and no caller left alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, NotFound, Unreachable
from edgeward.core.natsserver import AGENT_USER, NatsServer, NodeSpec
from edgeward.nodes import calls
from edgeward.nodes.calls import CallServer, Handler, call


@asynccontextmanager
async def served(root: Path, handlers: dict[str, Handler]) -> AsyncIterator[tuple[Bus, asyncio.Task[None]]]:
    """A hub's connection, and the node ``x`` that serves on another one."""
    server = NatsServer(root, NodeSpec("x"))
    await server.start()

    async def connect(name: str) -> Bus:
        return await Bus.connect(
            server.url, name=name, username=AGENT_USER, password=server.secret, inbox="_INBOX_x", timeout=60
        )

    try:
        hub, node = await connect("hub"), await connect("node")
        serving = asyncio.create_task(CallServer("x", handlers).run(node.client))
        async with asyncio.timeout(180):
            while not node.client._subs:  # noqa: ASYNC110 - turn by turn
                await asyncio.sleep(0)
            await node.flush()
            yield hub, serving
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await hub.close()
        await node.close()
    finally:
        await server.stop()


async def collected(bus: Bus, verb: str, args: dict[str, Any] | None = None) -> list[bytes]:
    return [piece async for piece in call(bus.client, "x", verb, args or {})]


def test_pieces_come_whole_in_order_and_both_at_once(tmp_path: Path) -> None:
    async def count(args: dict[str, Any]) -> AsyncIterator[bytes]:
        for n in range(args["n"]):
            yield b"%s%d" % (args["mark"], n)

    async def big(args: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b"a" * 65536
        yield b"b" * 65537
        yield b""  # an empty piece is the end
        yield b"never"

    async def nothing(args: dict[str, Any]) -> AsyncIterator[bytes]:
        return
        yield b""

    async def body() -> None:
        async with served(tmp_path, {"count": count, "big": big, "nothing": nothing}) as (hub, _):
            both = await asyncio.gather(*(collected(hub, "count", {"n": 50, "mark": m}) for m in (b"a", b"b")))
            assert both == [[b"%s%d" % (m, n) for n in range(50)] for m in (b"a", b"b")]
            assert await collected(hub, "big") == [b"a" * 65536, b"b" * 65536, b"b"]
            assert await collected(hub, "nothing") == []
            assert not hub.client._subs, "nothing stays behind"

    asyncio.run(body())


def test_what_the_node_raises_is_raised_here(tmp_path: Path) -> None:
    async def refuse(args: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b"first"
        raise NotFound("wrote nothing", resource="App/a", field="?since", remedy="see: x")

    async def bug(args: dict[str, Any]) -> AsyncIterator[bytes]:
        yield str(1 // args["zero"]).encode()

    async def fine(args: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b"fine"

    async def body() -> None:
        async with served(tmp_path, {"refuse": refuse, "bug": bug, "fine": fine}) as (hub, serving):
            got = []
            with pytest.raises(NotFound) as caught:
                async for piece in call(hub.client, "x", "refuse", {}):
                    got.append(piece)
            assert got == [b"first"]
            assert (
                caught.value.problem()
                == NotFound("wrote nothing", resource="App/a", field="?since", remedy="see: x").problem()
            )
            with pytest.raises(EdgewardError, match=r"no call 'sing' \(upgrade the node's agent\)"):
                await collected(hub, "sing")
            with pytest.raises(EdgewardError) as failed:
                await collected(hub, "bug", {"zero": 0})
            assert "division" not in str(failed.value), "a fault's details stay in the node's log"
            assert "the agent's log says why" in str(failed.value)
            await hub.publish("ew.node.x.call.fine", b"\xc1 no msgpack", reply="nobody")
            await hub.publish("ew.node.x.call.fine", b"\x80")  # without a reply subject
            assert await collected(hub, "fine") == [b"fine"], "one bad call does not end the serving"
            assert not serving.done()

    asyncio.run(body())


def test_a_node_that_is_not_there_or_does_not_answer(tmp_path: Path) -> None:
    async def silent(args: dict[str, Any]) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def body() -> None:
        async with served(tmp_path, {"silent": silent}) as (hub, _):
            with pytest.raises(Unreachable, match="Node/gone: node gone is not connected"):
                [p async for p in call(hub.client, "gone", "logs", {})]
            with pytest.raises(
                Unreachable, match=r"Node/x: node x does not answer \(is its link up\? see: edgeward get"
            ):
                [p async for p in call(hub.client, "x", "silent", {}, timeout=0.1)]
            assert not hub.client._subs

    asyncio.run(body())


def test_a_slow_reader_slows_the_sender_and_one_that_left_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_TAKEN", 5.0)  # what a piece that nobody took is waited for
    made: list[int] = []
    ended = asyncio.Event()

    async def endless(args: dict[str, Any]) -> AsyncIterator[bytes]:
        try:
            for n in range(1_000_000):
                made.append(n)
                yield b"%d" % n
        finally:
            ended.set()

    async def body() -> None:
        async with served(tmp_path, {"endless": endless}) as (hub, _):
            async with aclosing(call(hub.client, "x", "endless", {})) as pieces:  # type: ignore[type-var]
                for n in range(10):
                    assert await anext(pieces) == b"%d" % n
                for _ in range(20):
                    await hub.flush()  # time enough for a sender that does not wait
                assert len(made) <= 12
            await ended.wait()
            assert len(made) <= 14

    asyncio.run(body())


def test_idle_marks_find_out_that_the_caller_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_IDLE", 0.05)
    monkeypatch.setattr(calls, "_SILENCE", 3.0)
    monkeypatch.setattr(calls, "_TAKEN", 5.0)
    released = asyncio.Event()
    ended = asyncio.Event()

    async def quiet(args: dict[str, Any]) -> AsyncIterator[bytes]:
        try:
            yield b"one"
            await released.wait()
            yield b"two"
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def body() -> None:
        async with served(tmp_path, {"quiet": quiet}) as (hub, _):
            marks: list[float] = []

            async def mark(msg: Any) -> None:
                if "Ew-Idle" in (msg.headers or {}):
                    marks.append(asyncio.get_running_loop().time())
                    if marks[-1] - marks[0] > 3.0:  # longer than the caller would wait without marks
                        released.set()

            overhearing = await hub.subscribe("ew.hub.reply.x.>", mark)
            async with aclosing(call(hub.client, "x", "quiet", {})) as pieces:  # type: ignore[type-var]
                assert [await anext(pieces), await anext(pieces)] == [b"one", b"two"]
                await overhearing.unsubscribe()  # now the caller alone listens
            assert len(marks) >= 2
            await ended.wait()

    asyncio.run(body())


def test_the_number_of_calls_at_once_is_bounded_and_the_others_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_AT_ONCE", 2)
    go_on = asyncio.Event()

    async def hold(args: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b"in"
        await go_on.wait()
        yield b"out"

    async def body() -> None:
        async with served(tmp_path, {"hold": hold}) as (hub, _):
            held = [call(hub.client, "x", "hold", {}) for _ in range(2)]
            for pieces in held:
                assert await anext(pieces) == b"in"
            with pytest.raises(EdgewardError, match="too many calls"):
                await collected(hub, "hold")
            go_on.set()
            assert [[p async for p in pieces] for pieces in held] == [[b"out"], [b"out"]]
            assert await collected(hub, "hold") == [b"in", b"out"], "the places are free again"

    asyncio.run(body())
