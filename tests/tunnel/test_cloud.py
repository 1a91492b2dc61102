"""What a hub does with operators' sessions by itself: what idles is cut, and what was done is recorded at any end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.tunnel.test_session import Served, echo, run

from edgeward.core.audit import Audit
from edgeward.core.authz import administrator
from edgeward.core.errors import Gone, Unreachable
from edgeward.core.store_sqlite import SqliteStore
from edgeward.tunnel import cloud
from edgeward.tunnel.cloud import Desk, Tunnels
from edgeward.tunnel.framing import Open
from edgeward.tunnel.session import Session, Stream, pair


class Hub(Tunnels):
    """Whose one node is in memory."""

    def __init__(self, idle: float) -> None:
        self.audit = Audit()

        async def no_call(node: str, args: dict[str, Any]) -> None:
            raise Unreachable("there is no other node")

        super().__init__(
            SqliteStore(":memory:"),
            self.audit,
            key_of=lambda _: "",
            verify=lambda *_: False,
            prove=lambda _: b"",
            nonce=lambda: "",
            use_nonce=lambda _: None,
            call=no_call,
            online=lambda _: True,
            idle=idle,
        )
        self.node, self._end = pair(Served(echo))

    async def reach(self, node: str) -> Session:
        return self.node

    def records(self) -> list[tuple[str, dict[str, Any]]]:
        return [(r["outcome"], r["detail"]) for r in self.audit.items()]


def desk_of(hub: Hub) -> Desk:
    desk = Desk(hub, "d" * 32, "n", lambda: administrator("ann"), "192.0.2.1")
    hub.desks[desk.id] = desk
    return desk


async def _opened(hub: Hub, desk: Desk) -> Stream:
    """A stream as an operator's link brings it."""
    stream = Stream(desk.session, 1, Open("tcp", {"port": 22}), asyncio.get_running_loop().time())
    desk.session.streams[1] = stream
    await desk.serve(stream)
    assert stream.error is None
    return stream


def test_a_stream_on_which_nothing_moves_is_cut_and_one_that_moves_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "_AGAIN", 0.01)

    async def body() -> None:
        hub = Hub(idle=1000.0)
        task = asyncio.ensure_future(hub.run())
        desk = desk_of(hub)
        stream = await _opened(hub, desk)
        desk.look(stream.moved + 999, hub._idle)
        assert stream.error is None
        desk.look(stream.moved + 1001, hub._idle)
        assert isinstance(stream.error, Gone) and "nothing moved for 1000 s" in str(stream.error)
        desk.session.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(body)


def test_a_process_that_stops_records_what_its_sessions_did(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        hub = Hub(idle=1000.0)
        task = asyncio.ensure_future(hub.run())
        await asyncio.sleep(0)
        desk = desk_of(hub)
        stream = await _opened(hub, desk)
        stream.window.received(5)
        stream.received(b"hello")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        (began, first), (ended, last) = hub.records()
        assert (began, first["use"]) == ("opened", "tcp:22")
        assert (ended, last["use"], last["streams"], last["bytesToNode"]) == ("ended", "tcp:22", 1, 5)
        assert not hub.desks

    run(body)
