"""The bus on one real server: what it maps, what it refuses, and that it always comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.msg import Msg
from nats.js.api import StreamConfig
from tests.core.pair import until

from edgeward.core.bus import Bus, cancellable
from edgeward.core.errors import Conflict, Invalid, NotFound, TooLarge, Unreachable
from edgeward.core.natsserver import AGENT_USER, NatsServer, NodeSpec


@contextlib.asynccontextmanager
async def one(root: Path) -> AsyncIterator[tuple[NatsServer, Bus]]:
    server = NatsServer(root, NodeSpec("solo"))
    await server.start()
    try:
        bus = await connect(server)
        yield server, bus
        await bus.close()
    finally:
        await server.stop()


async def connect(server: NatsServer, timeout: float = 60) -> Bus:
    return await Bus.connect(
        server.url, name="test", username=AGENT_USER, password=server.secret, inbox="_INBOX_solo", timeout=timeout
    )


async def lost(bus: Bus) -> None:
    await until(lambda: not bus.connected)  # nobody tells


def test_requests_and_services(tmp_path: Path) -> None:
    async def main() -> None:
        async with one(tmp_path) as (_, bus):
            running = 0
            most = 0
            go_on = asyncio.Event()

            async def slow(msg: Msg) -> bytes | None:
                nonlocal running, most
                running += 1
                most = max(most, running)
                await go_on.wait()
                running -= 1
                if msg.data == b"invalid":
                    raise Invalid("no", field="$.x")
                if msg.data == b"bug":
                    raise RuntimeError("bug")
                return None if msg.data == b"silent" else msg.data + (msg.headers or {}).get("X", "").encode()

            await bus.serve("svc.solo", slow, concurrency=3, node_token=1)
            asks = [bus.request("svc.solo", b"%d" % i, headers={"X": "!"}, timeout=60) for i in range(6)]
            asking = asyncio.gather(*asks)
            await until(lambda: running == 3)
            await bus.flush()  # the other three are here too by now, and wait
            assert not asking.done()
            go_on.set()
            assert [m.data for m in await asking] == [b"%d!" % i for i in range(6)]
            assert most == 3
            assert (await bus.request("svc.solo", b"invalid")).headers["Ew-Error"] == "Invalid"
            bug = await bus.request("svc.solo", b"bug")
            assert bug.headers["Ew-Error"] == "Failed"
            assert b"RuntimeError" not in bug.data
            with pytest.raises(Unreachable, match=r"no answer within 0\.3 s"):
                await bus.request("svc.solo", b"silent", timeout=0.3)
            with pytest.raises(Unreachable, match="nobody answers"):
                await bus.request("svc.nobody")
            with pytest.raises(Unreachable, match="nobody answers"):
                await bus.request_via("svc.nobody", b"", "back.1")
            with pytest.raises(Unreachable, match="no answer"):
                await bus.request_via("svc.solo", b"x", "back.2", timeout=0.3)  # not solo's inbox
            assert (await bus.request_via("svc.solo", b"x", "_INBOX_solo.v")).data == b"x"
            with pytest.raises(TooLarge):
                await bus.publish("x", bytes(9 << 20))
            assert len(bus.client._subs) == 2  # the service and the inbox: request_via leaves none

    asyncio.run(main())


def test_a_failing_handler_does_not_end_the_subscription(tmp_path: Path) -> None:
    async def main() -> None:
        async with one(tmp_path) as (_, bus):
            got: list[bytes] = []

            async def handler(msg: Msg) -> None:
                if msg.data == b"bad":
                    raise ValueError("bad")
                got.append(msg.data)

            await bus.subscribe("s", handler)
            for data in (b"1", b"bad", b"2"):
                await bus.publish("s", data)
            await until(lambda: b"2" in got)
            assert got == [b"1", b"2"]

    asyncio.run(main())


def test_after_a_flush_the_server_knows_what_was_subscribed_in_the_same_turn(tmp_path: Path) -> None:
    async def main() -> None:
        async with one(tmp_path) as (server, bus):
            other = await connect(server)
            writes: list[bytes] = []
            transport = bus.client._transport
            write, writelines = transport.write, transport.writelines

            def noted(data: bytes) -> None:
                writes.append(bytes(data))
                write(data)

            def all_noted(lines: list[bytes]) -> None:
                writes.append(b"".join(lines))
                writelines(lines)

            transport.write, transport.writelines = noted, all_noted

            async def here(msg: Msg) -> None:
                await msg.respond(b"here")

            subscribing = asyncio.create_task(bus.client.subscribe("asked", cb=here))
            async with asyncio.timeout(60):
                while not bus.client._subs:  # noqa: ASYNC110 - turn by turn: its command is buffered, not yet sent
                    await asyncio.sleep(0)
                await bus.flush()
            sent = b"".join(writes)
            assert b"SUB asked" in sent
            assert sent.index(b"SUB asked") < sent.index(b"PING"), "its PONG speaks of the subscription too"
            assert (await other.request("asked")).data == b"here"
            await subscribing
            await other.close()

    asyncio.run(main())


def test_streams(tmp_path: Path) -> None:
    async def main() -> None:
        async with one(tmp_path) as (_, bus):
            js = bus.jetstream()
            await js.add_stream(StreamConfig(name="S", subjects=["s.>"], allow_direct=True))
            await js.add_stream(StreamConfig(name="CLOSED", subjects=["c.>"], allow_direct=False))
            assert await bus.last_message("S", "s.a") is None
            ack = await bus.publish_acked("s.a", b"1", expect_last=0, headers={"K": "ä: b"})
            assert (ack.stream, ack.seq, ack.duplicate) == ("S", 1, False)
            with pytest.raises(Conflict, match="wrong last sequence: 1"):
                await bus.publish_acked("s.a", b"2", expect_last=0)
            await bus.publish_acked("s.b", b"other", expect_last=0)
            last = await bus.last_message("S", "s.a")
            assert last is not None
            assert (last.seq, last.data, last.headers["K"]) == (1, b"1", "ä: b")
            assert (await bus.publish_acked("s.a", b"", headers={"Nats-Msg-Id": "i"})).seq == 3
            assert (await bus.publish_acked("s.a", b"", headers={"Nats-Msg-Id": "i"})).duplicate
            last = await bus.last_message("S", "s.a")
            assert last is not None and last.data == b"" and last.seq == 3
            with pytest.raises((NotFound, Unreachable)):
                await bus.last_message("CLOSED", "c.a")
            with pytest.raises(Unreachable, match="nobody"):
                await bus.publish_acked("nowhere", b"")

    asyncio.run(main())


def test_it_comes_back_and_sends_nothing_late(tmp_path: Path) -> None:
    async def main() -> None:
        async with one(tmp_path) as (server, bus):
            got: list[bytes] = []
            back: list[int] = []

            async def handler(msg: Msg) -> None:
                got.append(msg.data)

            await bus.subscribe("s", handler)
            await bus.flush()
            bus.on_reconnect(lambda: back.append(1))
            assert server.pid
            os.kill(server.pid, signal.SIGKILL)
            await lost(bus)
            for call in (bus.publish("s", b"late"), bus.request("s", b"late"), bus.flush()):
                with pytest.raises(Unreachable, match="not connected"):
                    await call
            await bus.client.publish("s", b"late")  # past our guard: still not sent later
            with pytest.raises(Unreachable):
                await bus.wait_connected(0.1)
            await server.start()
            await bus.wait_connected(60)
            await bus.publish("s", b"now")
            await until(lambda: b"now" in got)
            assert got == [b"now"]
            assert back == [1]

    asyncio.run(main())


def test_it_survives_what_ends_nats_py(tmp_path: Path) -> None:
    """An -ERR closes nats-py's client for good; a password that is refused for a while, too."""

    async def main() -> None:
        async with one(tmp_path) as (server, bus):
            await bus.client._process_err("'Authorization Violation'")
            await asyncio.sleep(0)
            await bus.wait_connected(60)
            secret = server.secret
            (tmp_path / "secret").write_text("something else")
            assert await server.apply(server.spec) == "reloaded"
            await lost(bus)
            refused: list[str] = []
            told = bus.client._error_cb

            async def noted(exc: Exception) -> None:
                refused.append(str(exc))
                await told(exc)

            bus.client._error_cb = noted
            await until(lambda: sum("Authorization" in text for text in refused) >= 2)
            assert not bus.connected
            (tmp_path / "secret").write_text(secret)
            assert await server.apply(server.spec) == "reloaded"
            await bus.wait_connected(60)
            await bus.flush()

    asyncio.run(main())


def test_no_server_or_wrong_password(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 "):
            await Bus.connect("nats://127.0.0.1:1", name="x", timeout=0.5)
        async with one(tmp_path) as (server, _):
            for patience in (0.7, 5.0, 60.0):  # a slow machine's server may need longer to refuse
                with pytest.raises(Unreachable) as caught:
                    await Bus.connect(server.url, name="x", username=AGENT_USER, password="wrong", timeout=patience)
                if "Authorization" in str(caught.value):
                    return
            raise AssertionError(f"it does not say why: {caught.value}")

    asyncio.run(main())


@pytest.mark.parametrize("verb", ["request", "flush"])
def test_a_cancellation_in_the_turn_of_the_answer_is_not_lost(tmp_path: Path, verb: str) -> None:
    """asyncio.wait_for of Python 3.11 returns the answer in that case, and a loop around it would never end."""

    async def echo(msg: Msg) -> bytes:
        return msg.data

    async def main() -> None:
        async with one(tmp_path) as (_, bus):
            if verb == "request":
                await bus.serve("svc", echo)
                await bus.flush()
            rounds = 0

            async def ask_for_ever() -> None:
                nonlocal rounds
                while True:
                    await (bus.request("svc", b"x") if verb == "request" else bus.flush())
                    rounds += 1

            task = asyncio.create_task(ask_for_ever())
            while rounds < 3:  # noqa: ASYNC110 - turn by turn
                await asyncio.sleep(0)
            pending = lambda: [*bus.client._resp_map.values()] if verb == "request" else [*bus.client._pongs]  # noqa: E731
            while not pending():  # noqa: ASYNC110 - turn by turn
                await asyncio.sleep(0)
            pending()[0].add_done_callback(lambda _: task.cancel())
            async with asyncio.timeout(60):
                await asyncio.wait({task})
            assert task.cancelled()

    asyncio.run(main())


def test_a_cancellation_in_the_turn_of_an_error_is_not_lost() -> None:
    async def main() -> None:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        rounds = 0

        async def ask_for_ever() -> None:
            nonlocal rounds
            while rounds < 5:
                rounds += 1
                try:
                    await cancellable(asyncio.wait_for(answer, 30))
                except ValueError:
                    await asyncio.sleep(0)

        task = asyncio.create_task(ask_for_ever())
        while not rounds:  # noqa: ASYNC110 - turn by turn
            await asyncio.sleep(0)
        answer.set_exception(ValueError("no responders"))
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert rounds == 1

    asyncio.run(main())
