"""Hub processes of one fleet find one another's nodes, and pass their streams on by NATS.

A process that holds a node's tunnel answers on ``ew.peer.tunnel.<node>``; who needs the node asks there, and gets a
session whose link is a pair of subjects. Nobody answers when nobody holds the node, or when who held it is gone: NATS
says so at once. A message carries its place in the stream of bytes; one that is missing (a server that was lost) ends
the session, and its streams, rather than mixing them up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable
from typing import Protocol

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, NotFound, Unreachable
from edgeward.core.peers import Peers
from edgeward.tunnel.session import Session, Stream

log = logging.getLogger("edgeward.tunnel")

#: Bytes of one message, and that wait to be published before the session is held.
_MESSAGE, _HIGH, _LOW = 256 * 1024, 512 * 1024, 128 * 1024
#: Seconds of silence after which the other process is asked whether it still has the session; for its answer.
_QUIET, _ANSWER = 1.0, 2.0
#: Seconds without a stream after which a session is given back.
_UNUSED = 60.0


class Ask(msgspec.Struct, omit_defaults=True):
    """``id``: the session that is wanted, or asked about (``again``)."""

    id: str
    again: bool = False


class Links(Protocol):
    """What a hub process does with streams (``cloud.Tunnels``)."""

    def back(self, node: str, stream: Stream) -> None: ...

    def passed_on(self, node: str, stream: Stream, origin: Session) -> None: ...

    def held_elsewhere(self, node: str) -> None: ...


class BusLink:
    """A session's link over two subjects."""

    def __init__(self, bus: Bus, session: Session, ours: str, theirs: str) -> None:
        self.paused = False
        self._bus, self._session, self._ours, self._theirs = bus, session, ours, theirs
        self._queue: deque[bytes] = deque()
        self._waiting = self._sent = self._got = 0
        self._more = asyncio.Event()
        self._sub: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self.heard = clock.monotonic()

    async def open(self) -> None:
        self._sub = await self._bus.subscribe(self._ours, self._came)
        await self._bus.flush()
        self._task = asyncio.get_running_loop().create_task(self._publish())

    async def _came(self, msg: Msg) -> None:
        data = msg.data
        self.heard = clock.monotonic()
        if int.from_bytes(data[:8], "big") != self._got:
            self._session.close(Unreachable("bytes between hub processes were lost", remedy="open it again"))
            return
        self._got += len(data) - 8
        self._session.received(self, data[8:])

    def send(self, pieces: list[bytes]) -> None:
        data = b"".join(pieces)
        for at in range(0, len(data), _MESSAGE):
            piece = data[at : at + _MESSAGE]
            self._queue.append(self._sent.to_bytes(8, "big") + piece)
            self._sent += len(piece)
            self._waiting += len(piece)
        self.paused = self._waiting > _HIGH
        self._more.set()

    async def _publish(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            while self._queue:
                message = self._queue.popleft()
                try:
                    await self._bus.publish(self._theirs, message)
                except EdgewardError as e:
                    self._session.close(Unreachable(f"the way to another hub process is lost: {e.message}"))
                    return
                self._waiting -= len(message) - 8
                if self.paused and self._waiting < _LOW:
                    self.paused = False
                    self._session.resume(self)
            if self._sub is None:
                return

    def close(self) -> None:
        sub, self._sub = self._sub, None
        self._more.set()  # what waits is still sent: it says why the session ends
        if sub is not None:
            loop = asyncio.get_running_loop()
            self._ending = loop.create_task(_end(sub))


async def _end(sub: Subscription) -> None:
    with contextlib.suppress(nats.errors.Error):
        await sub.unsubscribe()


class PeerTunnels:
    """The way between this process and its peers."""

    def __init__(self, bus: Bus, links: Links, peers: Peers) -> None:
        self._bus, self._links, self._peers = bus, links, peers
        peers.listen("tunnel", lambda data: links.held_elsewhere(data.decode("utf-8", "replace")))
        #: Sessions that lead to other processes, by node; and those that others have with us, by their name.
        self._out: dict[str, tuple[str, Session, BusLink]] = {}
        self._in: dict[str, tuple[str, Session]] = {}
        self._held: dict[str, Subscription] = {}
        self._wanted: set[str] = set()
        self._used: dict[str, float] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -- nodes that are held here --------------------------------------------------------------------------------------

    def hold(self, node: str, held: bool) -> None:
        if held:
            self._wanted.add(node)
        else:
            self._wanted.discard(node)
            for name, session in tuple(self._in.values()):
                if name == node:
                    session.close(Unreachable(f"the tunnel of node {node} has ended"))
        self._spawn(self._serve(node))

    async def _serve(self, node: str) -> None:
        async with self._locks.setdefault(node, asyncio.Lock()):
            if node in self._wanted and node not in self._held:

                async def asked(msg: Msg) -> None:
                    await self._asked(node, msg)

                self._held[node] = await self._bus.subscribe(f"ew.peer.tunnel.{node}", asked)
                await self._bus.flush()
                await self._peers.tell("tunnel", node.encode())
            elif node not in self._wanted and (sub := self._held.pop(node, None)) is not None:
                await _end(sub)

    async def _asked(self, node: str, msg: Msg) -> None:
        """Another process wants a session to a node of ours, or asks whether it still has one."""
        ask = msgspec.msgpack.decode(msg.data, type=Ask)
        if ask.again:
            await msg.respond(b"1" if ask.id in self._in else b"")
            return
        session = Session(
            f"{node} for another hub process",
            dials=False,
            serve=lambda stream: self._links.passed_on(node, stream, session),
            on_end=lambda _: self._gone(ask.id),
            patience=2.0,
        )
        self._in[ask.id] = (node, session)
        link = BusLink(self._bus, session, f"ew.peer.link.{ask.id}.a", f"ew.peer.link.{ask.id}.b")
        await link.open()
        session.attach(link, 0)
        await msg.respond(b"1")

    def _gone(self, id: str) -> None:
        self._in.pop(id, None)

    def used(self, node: str) -> bool:
        """Whether another process has a session to the node."""
        return any(name == node for name, _ in self._in.values())

    # -- nodes that others hold ----------------------------------------------------------------------------------------

    async def reach(self, node: str) -> Session | None:
        """A session to the node by the process that holds it; None: nobody does."""
        if self._peers.alone:
            return None
        async with self._locks.setdefault(f"to {node}", asyncio.Lock()):
            known = self._out.get(node)
            if known is not None and known[1].error is None and await self._lives(node, *known):
                self._used[node] = clock.monotonic()
                return known[1]
            return await self._new(node)

    async def _new(self, node: str) -> Session | None:
        id = clock.new_id(24)
        session = Session(
            f"{node} by another hub process",
            dials=True,
            serve=lambda stream: self._links.back(node, stream),
            on_end=lambda _: self._lost(node, id),
            patience=2.0,
        )
        link = BusLink(self._bus, session, f"ew.peer.link.{id}.b", f"ew.peer.link.{id}.a")
        await link.open()
        try:
            await self._bus.request(f"ew.peer.tunnel.{node}", msgspec.msgpack.encode(Ask(id)), timeout=_ANSWER)
        except (NotFound, Unreachable):
            session.close(Unreachable("no hub process holds the node"), tell=False)
            link.close()
            return None
        session.attach(link, 0)
        self._out[node] = (id, session, link)
        self._used[node] = clock.monotonic()
        return session

    async def _lives(self, node: str, id: str, session: Session, link: BusLink) -> bool:
        """Whether the other process is there: one that was killed says nothing, and NATS knows at once."""
        if clock.monotonic() - link.heard < _QUIET:
            return True
        try:
            ask = msgspec.msgpack.encode(Ask(id, again=True))
            answer = await self._bus.request(f"ew.peer.tunnel.{node}", ask, timeout=_ANSWER)
            if answer.data:
                return True
        except EdgewardError:
            pass
        session.close(Unreachable(f"the hub process that held node {node} is gone"), tell=False)
        return False

    def _lost(self, node: str, id: str) -> None:
        known = self._out.get(node)
        if known is not None and known[0] == id:
            del self._out[node]
            self._used.pop(node, None)

    async def run(self) -> None:
        """Ends sessions whose other end is gone, so that their streams end too, and those that nobody uses."""
        try:
            while True:
                await asyncio.sleep(_QUIET)  # the period
                for node, (id, session, link) in tuple(self._out.items()):
                    if session.streams:
                        self._used[node] = clock.monotonic()
                        await self._lives(node, id, session, link)
                    elif clock.monotonic() - self._used.get(node, 0.0) > _UNUSED:
                        session.close(Unreachable("nobody uses the way to the other hub process"))
        finally:
            gone = Unreachable("this hub process stops", remedy="open it again")
            for _, session, _link in tuple(self._out.values()):
                session.close(gone)
            for _, session in tuple(self._in.values()):
                session.close(gone)
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
