"""The hub processes of one fleet: who is there, who leads, and what they tell one another.

Each says once a second on ``ew.peer.hello`` that it is there. The one that has been there longest leads; one that was
not heard of for :data:`GONE` seconds is not there. That is a lease in memory and not a lock: two that cannot hear one
another both lead for a while. What leaders do must bear that: write by revision what anybody would compute from the
same state. A process that is alone sends one small message a second to nobody.
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

log = logging.getLogger("edgeward.peers")

#: Seconds between two hellos, and of silence after which a process is gone.
HELLO = 1.0
GONE = 4.0


class Hello(msgspec.Struct):
    """``born``: seconds since 1970. A clock that is wrong makes another one lead, no more."""

    id: str
    born: float


class Told(msgspec.Struct):
    """Something that one process tells the others."""

    id: str
    data: bytes


def leader(members: dict[str, tuple[float, float]], now: float) -> str:
    """Of members (id to time of birth, time last heard of) the one that leads; "" when none is there."""
    there = [(born, id) for id, (born, heard) in members.items() if now - heard <= GONE]
    return min(there)[1] if there else ""


class Peers:
    """One process among its like. :meth:`open`, then :meth:`run`."""

    def __init__(self, bus: Bus, id: str) -> None:
        self._bus = bus
        self.id = id
        self._born = clock.now()
        self._members: dict[str, tuple[float, float]] = {}
        self._listeners: dict[str, Callable[[bytes], None]] = {}
        #: Called when another process leads, with nothing but the news.
        self.on_change: list[Callable[[], None]] = []
        self._leader = id

    @property
    def leader(self) -> str:
        """The id of the process that leads."""
        return self._leader

    @property
    def leads(self) -> bool:
        return self._leader == self.id

    @property
    def alone(self) -> bool:
        now = clock.monotonic()
        return not any(now - heard <= GONE for _, heard in self._members.values())

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
            with contextlib.suppress(EdgewardError):
                await self._hello()
            self._look()
            await asyncio.sleep(HELLO)  # the period

    async def _hello(self) -> None:
        await self._bus.publish("ew.peer.hello", msgspec.msgpack.encode(Hello(self.id, self._born)))

    async def _on_hello(self, msg: Msg) -> None:
        hello = msgspec.msgpack.decode(msg.data, type=Hello)
        if hello.id == self.id:
            return
        new = hello.id not in self._members
        self._members[hello.id] = (hello.born, clock.monotonic())
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
        now = clock.monotonic()
        for id in [i for i, (_, heard) in self._members.items() if now - heard > GONE]:
            del self._members[id]
            log.info("hub process %s is gone", id)
        leads = leader({**self._members, self.id: (self._born, now)}, now)
        if leads != self._leader:
            self._leader = leads
            log.info("%s leads", "this hub process" if self.leads else f"hub process {leads}")
            for changed in self.on_change:
                changed()
