"""What a hub does with operators' sessions by itself: what idles is cut, and what was done is recorded at any end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request
from tests.nodes.fleet import doc
from tests.tunnel.test_session import Served, echo, run

from edgeward.core.audit import Audit
from edgeward.core.authz import Principal, Rule, administrator
from edgeward.core.errors import Forbidden, Gone, Unreachable
from edgeward.core.passage import Passage
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.store_sqlite import SqliteStore
from edgeward.hub.kinds import load
from edgeward.tunnel import cloud
from edgeward.tunnel.cloud import Desk, Tunnels
from edgeward.tunnel.framing import Open
from edgeward.tunnel.session import Session, Stream, pair

load()


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

    def records_of(self, who: str) -> list[str]:
        return [r["outcome"] for r in self.audit.items() if r["actor"] == who]


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


def test_a_stream_on_which_only_the_node_speaks_is_not_idle() -> None:
    async def body() -> None:
        one, two = pair(Served(echo))
        stream = one.open("tcp")
        stream.moved -= 1000
        before = stream.moved
        await stream.write(b"x")  # as a hub does it with what a node says
        assert await stream.read() == b"x"
        moved = [s.moved for s in two.streams.values()]
        stream.moved = before
        stream.send(b"y")
        one._flush()
        assert stream.moved > before and moved
        one.close()

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


def test_a_session_that_is_asked_for_twice_at_once_is_one_that_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        hub, dialled = Hub(idle=1000.0), asyncio.Event()

        async def prepare(node: str) -> None:
            await dialled.wait()

        monkeypatch.setattr(hub, "prepare", prepare)
        who = administrator("ann")
        request = Request({"type": "http", "headers": [], "client": ("192.0.2.1", 1)})
        asked = [asyncio.ensure_future(hub._new_desk(request, who, "d" * 32, "n")) for _ in range(3)]
        many = [asyncio.ensure_future(hub._new_desk(request, who, f"{n:032}", "n")) for n in range(cloud._MOST_OF_ONE)]
        await asyncio.sleep(0)
        dialled.set()
        made = await asyncio.gather(*asked, *many, return_exceptions=True)
        desks = [d for d in made if isinstance(d, Desk)]
        assert set(map(id, desks)) == set(map(id, hub.desks.values())), "whoever is in none is never looked at again"
        assert len(desks) == cloud._MOST_OF_ONE
        for desk in desks:
            desk.session.close()

    run(body)


def test_who_is_refused_again_and_again_does_not_push_others_out_of_the_audit() -> None:
    async def body() -> None:
        hub = Hub(idle=1000.0)
        rules = (Rule(verbs=["tunnel:tcp:22"], kinds=["Node"]),)
        who = Principal("eve", "token", rules=rules)
        for port in range(1000, 1200):
            with pytest.raises(Forbidden):
                await hub.permit(who, "n", Passage("tcp", "", port), "192.0.2.1")
        assert 10 <= len(hub.records_of("eve")) <= 31
        with pytest.raises(Forbidden):  # another one's are kept
            await hub.permit(Principal("bob", "token", rules=rules), "n", Passage("tcp", "", 1), "192.0.2.1")
        assert len(hub.records_of("bob")) == 1

    run(body)


def test_a_session_ends_when_its_node_is_no_more_of_those_that_the_role_is_for() -> None:
    async def body() -> None:
        hub = Hub(idle=1000.0)
        key = Key("Node", CLUSTER, "n")
        await hub._store.put(doc("Node", "n", {"site": "plant"}, labels={"line": "press"}))
        rules = (Rule(verbs=["tunnel:tcp:22"], kinds=["Node"], labelSelector="line=press"),)
        desk = Desk(hub, "d" * 32, "n", lambda: Principal("ann", "token", rules=rules), "192.0.2.1")
        hub.desks[desk.id] = desk
        stream = await _opened(hub, desk)
        desk.look(stream.moved, hub._idle)
        assert stream.error is None
        known = hub._store.get(key)
        known.metadata.labels = {"line": "paint"}
        await hub._store.put(known)
        desk.look(stream.moved, hub._idle)
        assert isinstance(stream.error, Forbidden)
        assert isinstance(desk.session.error, Forbidden)

    run(body)
