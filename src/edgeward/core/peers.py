"""The hub processes of one fleet: who is there, who leads, and what they tell one another.

Each says once a second on ``ew.peer.hello`` that it is there; ``core/lease.py`` decides who leads. A process that is
alone sends one small message a second to nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec
from nats.aio.msg import Msg

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError
from edgeward.core.lease import Lease

log = logging.getLogger("edgeward.peers")

#: Seconds between two hellos.
HELLO = 1.0


class Hello(msgspec.Struct):
    """``born``: seconds since 1970. A clock that is wrong makes another one lead, no more."""

    id: str
    born: float


class Told(msgspec.Struct):
    """Something that one process tells the others."""

    id: str
    data: bytes


class Peers:
    """One process among its like. :meth:`open`, then :meth:`run`."""

    def __init__(self, bus: Bus, id: str, *, several: bool = False) -> None:
        self._bus = bus
        self.id = id
        self.lease = Lease(id, clock.now(), clock.monotonic(), several=several)
        self._listeners: dict[str, Callable[[bytes], None]] = {}
        #: Called when another process leads, with nothing but the news.
        self.on_change: list[Callable[[], None]] = []
        self._known = self.lease.leader

    @property
    def leader(self) -> str:
        """The id of the process that leads; of the last one while that is not known."""
        return self.lease.leader or self._known or self.id

    @property
    def leads(self) -> bool:
        """Whether this process may act as leader now."""
        return self.lease.leads(clock.monotonic())

    @property
    def away(self) -> bool:
        """Whether this process stood still until now: what is asked of it may be long past."""
        return self.lease.away(clock.monotonic())

    @property
    def alone(self) -> bool:
        return self.lease.alone(clock.monotonic())

    def listen(self, topic: str, listener: Callable[[bytes], None]) -> None:
        """Call ``listener`` with what the others tell under ``topic``."""
        self._listeners[topic] = listener

    async def tell(self, topic: str, data: bytes) -> None:
        """Tell the others, if there are any; once, without a receipt."""
        if not self.alone:
            await self._bus.publish(f"ew.peer.told.{topic}", msgspec.msgpack.encode(Told(self.id, data)))

    async def open(self) -> None:
        await self._bus.subscribe("ew.peer.hello", self._on_hello)
        await self._bus.subscribe("ew.peer.told.*", self._on_told)

    async def run(self) -> None:
        while True:
            self._look()  # before it says that it is there: it may have been away
            with contextlib.suppress(EdgewardError):
                await self._hello()
            await asyncio.sleep(HELLO)  # the period

    async def _hello(self) -> None:
        await self._bus.publish("ew.peer.hello", msgspec.msgpack.encode(Hello(self.id, self.lease.born)))
        self.lease.said(clock.monotonic())

    async def _on_hello(self, msg: Msg) -> None:
        hello = msgspec.msgpack.decode(msg.data, type=Hello)
        if hello.id == self.id:
            return
        self._look()
        new = self.lease.heard(hello.id, hello.born, clock.monotonic())
        self._look()
        if new:
            log.info("hub process %s is there", hello.id)
            await self._hello()  # it shall not take itself for the only one for a second

    async def _on_told(self, msg: Msg) -> None:
        told = msgspec.msgpack.decode(msg.data, type=Told)
        listener = self._listeners.get(msg.subject.rsplit(".", 1)[1])
        if told.id != self.id and listener is not None:
            listener(told.data)

    def _look(self) -> None:
        before = self.lease.leader
        for id in self.lease.look(clock.monotonic(), clock.now()):
            log.info("hub process %s is gone", id)
        leads = self.lease.leader
        if leads == before:
            return
        log.info("%s leads", "this hub process" if leads == self.id else f"hub process {leads}" if leads else "nobody")
        if leads:
            self._known = leads
        for changed in self.on_change:
            changed()
