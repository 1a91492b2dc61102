"""A link that goes silent without being closed is replaced by a new one, and streams go on over it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any, cast

import pytest
from tests.tunnel.test_session import Served, echo, run

from edgeward.core.errors import Forbidden, Unreachable
from edgeward.tunnel import session as sessions
from edgeward.tunnel.framing import accept_key
from edgeward.tunnel.link import Redial, Way, WebLink, dial
from edgeward.tunnel.session import Session, Stream


class Hub(asyncio.Protocol):
    """Upgrades whoever comes to one session."""

    def __init__(self, session: Session, status: str = "101 Switching Protocols", body: bytes = b"") -> None:
        self.session, self.status, self.body = session, status, body
        self.got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.got += data
        if b"\r\n\r\n" not in self.got:
            return
        lines = self.got.decode().split("\r\n")[1:]
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        answer = [f"HTTP/1.1 {self.status}"]
        if self.body:
            answer += [f"content-length: {len(self.body)}"]
            self.transport.write("\r\n".join([*answer, "", ""]).encode() + self.body)
            return
        answer += [f"Sec-WebSocket-Accept: {accept_key(headers['sec-websocket-key'].encode()).decode()}"]
        answer += [f"Edgeward-Received: {self.session.received_bytes}", "", ""]
        link = WebLink(self.session, client=False)
        link.connection_made(self.transport)
        self.transport.set_protocol(link)
        self.transport.write("\r\n".join(answer).encode())
        self.session.attach(link, int(headers["edgeward-received"]))


class Middle:
    """Passes connections on until it is told to forget those that are there: they stay open, and silent."""

    def __init__(self, to: int) -> None:
        self.to = to
        self.generation = self.count = 0
        self.tasks: set[asyncio.Task[Any]] = set()

    async def accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count += 1
        mine = self.generation
        far, other = await asyncio.open_connection("127.0.0.1", self.to)

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    if mine == self.generation:
                        sink.write(data)
                        await sink.drain()

        for pair in ((reader, other), (far, writer)):
            task = asyncio.ensure_future(pass_on(*pair))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)


def test_a_silent_link_is_replaced_and_nothing_is_lost_or_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_LOOK", 0.05)
    monkeypatch.setattr(sessions, "_SUSPECT", 0.3)
    monkeypatch.setattr(sessions, "_BUSY_PING", 0.1)
    monkeypatch.setattr(sessions, "_IDLE_PING", 0.5)

    async def body() -> None:
        loop = asyncio.get_running_loop()
        two = Session("two", dials=False, serve=Served(echo))
        hub = await loop.create_server(lambda: Hub(two), "127.0.0.1", 0)
        middle = Middle(hub.sockets[0].getsockname()[1])
        front = await asyncio.start_server(middle.accepted, "127.0.0.1", 0)
        way = Way("127.0.0.1", front.sockets[0].getsockname()[1])

        async def connect(session: Session, attempt: int) -> None:
            said = session.received_bytes
            upgraded = await dial(way, "/x", {"Edgeward-Received": str(said), "Edgeward-Attempt": str(attempt)})
            upgraded.take(session, int(upgraded.headers["edgeward-received"]), said)

        one = Session("one", dials=True, serve=lambda s: None, on_suspect=lambda: redial.poke())  # noqa: PLW0108
        redial = Redial(one, connect)
        await redial.first()
        rng = random.Random(7)

        async def talk(stream: Stream) -> None:
            for _ in range(4):
                data = rng.randbytes(150_000)
                for at in range(0, len(data), 50_000):
                    await stream.write(data[at : at + 50_000])
                    assert await stream.readexactly(50_000) == data[at : at + 50_000]
                middle.generation += 1  # what is there goes silent, in the middle of what others say

        await asyncio.gather(*(talk(one.open("echo")) for _ in range(3)))
        assert middle.count > 1
        redial.close()
        one.close()
        two.close()
        front.close()
        hub.close()
        for task in tuple(middle.tasks):
            task.cancel()
        await asyncio.gather(*middle.tasks, return_exceptions=True)

    run(body)


def test_a_refusal_and_what_is_no_hub_are_told() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        two = Session("two", dials=False, serve=lambda s: None)
        problem = b'{"title":"Forbidden","status":403,"detail":"not you"}'
        refusing = await loop.create_server(lambda: Hub(two, "403 Forbidden", problem), "127.0.0.1", 0)
        with pytest.raises(Forbidden, match="not you"):
            await dial(Way("127.0.0.1", refusing.sockets[0].getsockname()[1]), "/x", {})
        other = await loop.create_server(lambda: Hub(two, "200 OK", b"hello"), "127.0.0.1", 0)
        with pytest.raises(Unreachable, match="does not open the tunnel"):
            await dial(Way("127.0.0.1", other.sockets[0].getsockname()[1]), "/x", {})
        port = refusing.sockets[0].getsockname()[1]
        refusing.close()
        await refusing.wait_closed()
        other.close()
        with pytest.raises(Unreachable, match="cannot be reached"):
            await dial(Way("127.0.0.1", port), "/x", {})
        two.close()

    run(body)
