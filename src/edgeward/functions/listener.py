"""One trigger at work: messages of the node's broker in, calls out, each acknowledged when it was answered.

Messages that are kept come from a durable consumer, no more at once than can soon be called; what is not kept (MQTT
QoS 0) comes by a subscription. While a message waits or is worked on, the broker is told so again and again: when this
process is killed it gives it out anew a few seconds later. What cannot be answered becomes a dead letter first and is
acknowledged then. Whatever is decided is in ``triggers.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import nats.errors
from nats.aio.msg import Msg

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.invocation import Call, CallFailed, Event, Reply, batch_of
from edgeward.functions.asks import hops_of
from edgeward.functions.triggers import (
    ABOUT_HEADER,
    BUS_STREAM,
    HOPS_HEADER,
    MQTT_STREAM,
    Item,
    Taking,
    after,
    consumer,
    cut,
    event_of,
    is_meant,
    item_of,
    pause,
    waits,
)

log = logging.getLogger("edgeward.functions")

#: What was given out and not acknowledged is given out again after so long; the broker hears of it so often. Seconds.
ACK_WAIT, _ALIVE = 6.0, 1.5
#: Messages that may be out without an acknowledgement, those that wait for their next try among them.
MAX_PENDING = 1000
#: Seconds and bytes of one request for messages.
_EXPIRES, _BYTES = 20.0, 16 << 20
#: Messages of QoS 0 that wait here.
SOFT = 1000
#: Pauses while nothing can be called, seconds.
_HOLD, _HOLD_MOST = 0.05, 5.0

#: (key, taking, event, tries, why): done when it is kept. Raises ``EdgewardError``.
Bury = Callable[[str, Taking, Event, int, CallFailed], Awaitable[None]]


class Listener:
    """``bus`` may use the consumer, ``ears`` hear topics."""

    def __init__(
        self, key: str, taking: Taking, *, node: str, invoke: Callable[[Call], Awaitable[Reply]], bury: Bury
    ) -> None:
        self.key, self.taking = key, taking
        self.name = consumer(key, taking)
        self.stream = MQTT_STREAM if taking.kind == "mqtt" else BUS_STREAM
        self._node, self._invoke, self._bury = node, invoke, bury
        self._ready: deque[Item] = deque()
        #: What the broker waits for an acknowledgement of, by its sequence.
        self._held: dict[int, Item] = {}
        self._soft = self._came = 0
        self._lost = asyncio.Event()
        self._running = 0
        #: Asked for and not come yet, and when that was asked.
        self._credit, self._asked = 0, 0.0
        self._inbox = ""
        self._bus: Bus | None = None
        self._group: asyncio.TaskGroup | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.connected = False
        self.problem = ""
        #: Messages that the consumer gave out.
        self.given = 0
        #: At the broker, as it last said. To be passed over, because the backlog is full.
        self.pending = self._skip = 0
        self.done = self.failed = self.dead = self.dropped = 0
        self._loop = asyncio.get_running_loop()

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(self, bus: Bus, ears: Bus) -> None:
        """Until cancelled. The consumer is there. Raises ``Unreachable`` when it cannot be begun."""
        self._bus = bus
        self._inbox = f"ew.local.plane.{self.name}"
        subscriptions: list[Any] = []
        forget = bus.on_reconnect(self._again)
        try:
            if self.taking.durable:
                subscriptions.append(await bus.subscribe(self._inbox, self._given))
            if self.taking.kind == "mqtt":
                subscriptions += [await ears.subscribe(s, self._heard, max_messages=SOFT) for s in self.taking.subjects]
            async with asyncio.TaskGroup() as group:
                self._group = group
                self.connected = True
                self._pump()
                while not self._lost.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_ALIVE):  # the pace of telling the broker what is in hand
                            await self._lost.wait()
                    await self._tell_alive()
                raise Unreachable("the broker does not know the trigger any more")
        finally:
            self.connected, self._group = False, None
            forget()
            if self._timer is not None:
                self._timer.cancel()
            for subscription in subscriptions:
                with contextlib.suppress(nats.errors.Error, OSError):
                    await subscription.unsubscribe()
            for item in self._ready:  # not begun: whoever comes next has them at once
                await self._say(item, b"-NAK")
            self._ready.clear()
            self._held.clear()
            self._soft = self._credit = 0

    def _again(self) -> None:
        """After a reconnection: what was asked for is not known to the server any more."""
        self._credit = 0
        self._pump()

    async def _tell_alive(self) -> None:
        now = self._loop.time()
        for item in tuple(self._held.values()):
            if now - item.since > _ALIVE:
                await self._say(item, b"+WPI")
        if self._credit and now - self._asked > _EXPIRES + 5:
            self._credit = 0  # the answer that says so did not come
        self._pump()

    def adjust(self, taking: Taking) -> None:
        """The same messages, called otherwise."""
        self.taking = taking
        if self._group is not None and self.connected:
            self._pump()

    # -- what comes in -----------------------------------------------------------------------------------------------

    async def _given(self, msg: Msg) -> None:
        """From the consumer: a message, or that there is none."""
        if not msg.reply.startswith("$JS.ACK"):
            self._told(msg.headers or {})
            return
        self._credit = max(0, self._credit - 1)
        self.given += 1
        item = item_of(msg.subject, msg.data, msg.reply, msg.headers)
        item.since = self._loop.time()
        if self.taking.kind == "event" and (msg.headers or {}).get(ABOUT_HEADER) == f"Function/{self.key}":
            await self._say(item, b"+ACK")  # what it causes itself would call it for ever
        elif not is_meant(self.taking, item.subject):
            await self._say(item, b"+ACK")
        elif self._skip and item.tries == 1:
            self._skip -= 1
            self.dropped += 1
            await self._say(item, b"+ACK")
        elif (same := self._held.get(item.seq)) is not None:
            same.reply = item.reply  # we stood still: given out anew, and still in hand
        else:
            self._held[item.seq] = item
            self._ready.append(item)
        self._pump()

    def _told(self, headers: dict[str, str]) -> None:
        """A request came to its end without all that was asked for."""
        left = headers.get("Nats-Pending-Messages", "")
        if left.isdigit():
            self._credit = max(0, self._credit - int(left))
            self._pump()
            return
        self._credit = 0  # asked again at the pace of _ALIVE
        if headers.get("Status") == "503" or "Deleted" in headers.get("Description", ""):
            self._lost.set()

    async def _heard(self, msg: Msg) -> None:
        """From the subscription: what is not kept."""
        headers = msg.headers or {}
        if self.taking.durable and not headers.get("Nmqtt-Pub", "0").startswith("0"):
            return  # QoS 1 and 2 come by the consumer
        if not is_meant(self.taking, msg.subject):
            return
        if self._soft >= SOFT:
            self.dropped += 1
            return
        self._soft += 1
        stamp, hops = int(clock.now() * 1e9), headers.get(HOPS_HEADER, "")
        self._came += 1
        item = Item(msg.subject, msg.data, "", self._came, 1, stamp, hops, self._loop.time())
        self._ready.append(item)
        self._pump()

    def _ask(self) -> None:
        """Asks for as many messages as there is work for."""
        taking = self.taking
        window = min(MAX_PENDING // 2, max(16, 2 * taking.concurrency * taking.batch))
        free = window - len(self._held) - self._credit + min(self._skip, MAX_PENDING)
        if free <= 0 or (self._credit and free < window // 4):
            return
        if self._bus is None or not self._bus.connected:
            return
        self._credit += free
        self._asked = self._loop.time()
        ask = {"batch": free, "expires": int(_EXPIRES * 1e9), "max_bytes": _BYTES}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{self.name}"
        if self._group is not None:
            self._group.create_task(self._send(subject, msgspec.json.encode(ask), self._inbox))

    async def _send(self, subject: str, data: bytes, reply: str = "") -> None:
        # without the server: what is not acknowledged is given out again, what was asked for is asked again
        with contextlib.suppress(Unreachable):
            if self._bus is not None:
                await self._bus.publish(subject, data, reply=reply)

    async def _say(self, item: Item, word: bytes) -> None:
        """Tells the broker what is with a message."""
        if item.reply:
            await self._send(item.reply, word)

    async def _let_go(self, item: Item, word: bytes) -> None:
        """The last word on a message: should it come again, it is another try."""
        if item.reply:
            self._held.pop(item.seq, None)
        await self._say(item, word)

    # -- calls -----------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Calls what can be called now, and asks for more."""
        group = self._group
        if group is None or not self.connected:
            return
        while self._running < self.taking.concurrency:
            n, again = cut(self._ready, self.taking, self._loop.time())
            if not n:
                if again and self._timer is None:
                    self._timer = self._loop.call_later(again, self._timed)
                break
            items = [self._ready.popleft() for _ in range(n)]
            self._running += 1
            group.create_task(self._handle(items))
        if self.taking.durable:
            self._ask()

    def _timed(self) -> None:
        self._timer = None
        self._pump()

    async def _handle(self, items: list[Item]) -> None:
        try:
            try:
                await self._call(items)
            except CallFailed as e:
                self.failed += len(items)
                self.problem = e.message
                for item in items:
                    await self._failed(item, e, len(items))
            else:
                self.done += len(items)
                self.problem = ""
                for item in items:
                    await self._let_go(item, b"+ACK")
        except asyncio.CancelledError:
            self.connected = False  # it ends: nothing more is begun
            raise
        finally:
            self._running -= 1
            for item in items:
                if not item.reply:
                    self._soft -= 1
                elif self._held.get(item.seq) is item:
                    del self._held[item.seq]
            self._pump()

    async def _call(self, items: list[Item]) -> None:
        """Raises ``CallFailed`` that is the messages' own; what is not is waited out."""
        event = self._event(items)
        held = 0
        while True:
            try:
                reply = await self._invoke(Call(self.key, event))
                if reply.chunks is not None:
                    async for _ in reply.chunks:
                        pass
                if reply.status >= 400:
                    raise CallFailed(
                        "error", f"answered with status {reply.status}", function=self.key,
                        invocation=reply.invocation, version=reply.version,
                    )  # fmt: skip
                return
            except CallFailed as e:
                if not waits(e):
                    raise
                self.problem = e.message
            held += 1
            await asyncio.sleep(min(_HOLD_MOST, pause(_HOLD, held, event.id)))  # the back-off between two looks

    def _event(self, items: list[Item]) -> Event:
        made = [self._one(item) for item in items]
        first = made[0]
        if self.taking.batch <= 1:
            return first
        type, hops = f"{first.type}.batch", max(made, key=hops_of).extensions
        event = batch_of(made, id=first.id, source=first.source, type=type, subject=self.taking.name)
        event.extensions = dict(hops)
        return event

    def _one(self, item: Item) -> Event:
        time = clock.timestamp(item.stamp / 1e9)
        return event_of(self.taking, item, node=self._node, name=self.name, time=time)

    async def _failed(self, item: Item, error: CallFailed, together: int) -> None:
        if after(self.taking, item, error, together) == "again":
            delay = pause(self.taking.backoff, item.tries, f"{self.name} {item.seq}")
            await self._let_go(item, b"-NAK " + msgspec.json.encode({"delay": int(delay * 1e9)}))
            return
        try:
            if self.taking.dead:
                await self._bury(self.key, self.taking, self._one(item), item.tries, error)
            self.dead += 1
        except EdgewardError as e:  # it stays with the broker, which gives it out again
            log.warning("%s: a dead letter is not kept: %s", self.key, e)
            self.problem = f"a dead letter is not kept: {e.message}"
            self.dropped += not item.reply
            return
        await self._let_go(item, b"+ACK")

    # -- what it is told of itself -----------------------------------------------------------------------------------

    def looked(self, pending: int, given: int) -> int:
        """The broker said how much waits. What is over the bound is passed over, oldest first; how much that is.

        ``given``: what :attr:`given` was when it was asked: what came meanwhile does not wait any more.
        """
        self.pending = pending
        over = max(0, pending - self.taking.backlog - (self.given - given))
        fresh = max(0, over - self._skip)
        self._skip = over
        if fresh:
            self._pump()
        return fresh

    def status(self) -> dict[str, Any]:
        doc: dict[str, Any] = {self.taking.kind: self.taking.name, "connected": self.connected, "pending": self.pending}
        doc |= {n: v for n, v in (("failed", self.failed), ("dropped", self.dropped)) if v}
        if self.problem:
            doc["message"] = self.problem[:300]
        return doc
