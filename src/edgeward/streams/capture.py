"""From the node's broker into the outbox: what MQTT acknowledged is durable, in order, and taken over exactly once.

QoS 1 and 2: the broker keeps a message in ``$MQTT_msgs`` before it acknowledges it, as long as our durable consumer has
not acknowledged it in turn; so a PUBACK means that it will be exported. Batches are appended with the broker's sequence
as cursor; a batch whose fate is in doubt after a kill is recognised by it. QoS 0 and plain NATS publishes come by a
subscription and are best effort, as their publishers chose.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from edgeward.core.bus import Bus
from edgeward.core.delivery import Cursor, taken_over
from edgeward.core.errors import Conflict, EdgewardError, Refused, Unreachable
from edgeward.core.outbox import Queue, Reading
from edgeward.streams.dedupe import Window, identity_of
from edgeward.streams.topics import filters, to_topic

log = logging.getLogger("edgeward.capture")

STREAM = "$MQTT_msgs"
_PREFIX = "$MQTT.msgs."
_BATCH = 500
#: After a kill, what was given out and not acknowledged comes again after this long; before it, nothing newer is asked.
_ACK_WAIT = 2.0
_SOFT = 5000


async def wake_broker(host: str, port: int, user: str, password: str, timeout: float = 10.0) -> None:
    """Connects once by MQTT 3.1.1, so that the broker makes its streams; then leaves."""

    def text(s: str) -> bytes:
        data = s.encode()
        return len(data).to_bytes(2, "big") + data

    body = (
        text("MQTT") + bytes([4, 0xC2]) + (30).to_bytes(2, "big") + text("edgeward-agent") + text(user) + text(password)
    )
    packet = bytes([0x10, len(body)]) + body
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(packet)
                answer = await reader.readexactly(4)
                writer.write(bytes([0xE0, 0]))
                await writer.drain()
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as e:
        raise Unreachable(f"the node's MQTT listener does not answer: {e or type(e).__name__}") from e
    if answer[3] != 0:
        raise EdgewardError(f"the node's MQTT listener refused the agent (code {answer[3]})")


class Capture:
    """One Export's way from the broker into its queue."""

    def __init__(self, bus: Bus, queue: Queue, topic: str, identity: str, window: int) -> None:
        self.topic = topic
        self._bus, self._queue = bus, queue
        self._js = bus.jetstream()
        self._subjects = filters(topic)
        self._path = tuple(identity.removeprefix("$.").split(".")) if identity else ()
        self._window = Window(window)
        self._lineage = ""
        self._soft: list[Reading] = []
        self._subscriptions: list[Any] = []
        self.durable = f"ew-{queue.spec.name}"

    async def open(self) -> None:
        """Makes the durable consumer: from here on nothing that is acknowledged is missed."""
        try:
            info = await self._js.stream_info(STREAM)
            created = getattr(info, "created", None)
            self._lineage = f"mqtt{created}".translate(str.maketrans("", "", " :.+")) if created else "mqtt"
            config = ConsumerConfig(
                durable_name=self.durable,
                deliver_policy=DeliverPolicy.NEW,
                ack_policy=AckPolicy.ALL,
                ack_wait=_ACK_WAIT,
                max_ack_pending=4 * _BATCH,
                filter_subjects=[_PREFIX + s for s in self._subjects] if len(self._subjects) > 1 else None,
                filter_subject=_PREFIX + self._subjects[0] if len(self._subjects) == 1 else None,
            )
            try:
                found = await self._js.consumer_info(STREAM, self.durable)
                old = set(found.config.filter_subjects or [found.config.filter_subject])
                if old != {_PREFIX + s for s in self._subjects}:
                    await self._js.delete_consumer(STREAM, self.durable)
                    raise nats.js.errors.NotFoundError
            except nats.js.errors.NotFoundError:
                await self._js.add_consumer(STREAM, config)
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the broker's messages cannot be read: {e or type(e).__name__}") from e
        self._subscriptions = [await self._bus.subscribe(s, self._soft_message) for s in self._subjects]

    async def close(self, *, forget: bool) -> None:
        for subscription in self._subscriptions:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()
        if forget:
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await self._js.delete_consumer(STREAM, self.durable)

    async def run(self) -> None:
        """Moves messages until cancelled."""
        while True:
            try:
                await self._restore()
                await self._pump()
            except (EdgewardError, nats.errors.Error, TimeoutError) as e:
                if not isinstance(e, Conflict):
                    self._queue.counters.error = str(e) or type(e).__name__
                await asyncio.sleep(0.2)  # the back-off between two tries

    async def _restore(self) -> None:
        """The window from the queue's tail, the cursor from its end, and the wait for what was given out before."""
        self._cursor = await self._queue.source_cursor()
        if self._path:
            fresh = Window(self._window.size)
            async for batch in self._queue.tail(self._window.size):
                for _, payload, _ in batch:
                    identity = identity_of(payload, self._path)
                    if identity is not None:
                        fresh.add(identity)
            self._window = fresh
        info = await self._js.consumer_info(STREAM, self.durable)
        if info.num_ack_pending:
            await asyncio.sleep(_ACK_WAIT + 0.1)  # until the broker gives it out again, first and in order

    async def _pump(self) -> None:
        subscription = await self._js.pull_subscribe_bind(consumer=self.durable, stream=STREAM)
        try:
            while True:
                try:
                    msgs = await subscription.fetch(_BATCH, timeout=0.5)
                except (nats.errors.TimeoutError, TimeoutError):
                    msgs = []
                    if not self._bus.connected:
                        raise Unreachable("the node's nats-server is away") from None
                if self._soft:
                    await self._take_soft()
                if msgs:
                    await self._take(msgs)
        finally:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()

    async def _take(self, msgs: list[Msg]) -> None:
        readings: list[Reading] = []
        cursor = self._cursor
        fresh: list[str] = []
        last = msgs[-1]
        size = 0
        for msg in msgs:
            meta = msg.metadata
            seq = meta.sequence.stream
            stamp = _stamp(meta.timestamp)
            if taken_over(self._cursor, self._lineage, seq, stamp):
                continue
            cursor = Cursor(self._lineage, seq, stamp)
            identity = self._accept(msg.data, fresh)
            if identity is None:
                continue
            if size + len(msg.data) > 512 * 1024 and readings:
                await self._append(readings, Cursor(self._lineage, seq - 1, stamp - 1))
                readings, size = [], 0
            readings.append((to_topic(msg.subject.removeprefix(_PREFIX)), msg.data, stamp // 1_000_000))
            size += len(msg.data)
        if readings:
            await self._append(readings, cursor)
        for identity in fresh:
            self._window.add(identity)
        try:
            await last.ack_sync(timeout=2.0)
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable("the broker did not take the acknowledgement") from e

    def _accept(self, payload: bytes, fresh: list[str]) -> str | None:
        """The reading's identity ("" for none), or None for a repeat; new ones are noted in ``fresh``."""
        if not self._path:
            return ""
        identity = identity_of(payload, self._path)
        if identity is None:
            self._queue.counters.no_identity += 1
            return ""
        if self._window.known(identity) or identity in fresh:
            self._queue.counters.dropped_duplicate += 1
            return None
        fresh.append(identity)
        return identity

    async def _append(self, readings: list[Reading], cursor: Cursor | None) -> None:
        while True:
            try:
                await self._queue.append(readings, cursor)
                self._cursor = cursor
                return
            except Refused as e:
                if self._queue.spec.on_full == "dropNewest":
                    self._queue.counters.dropped_full += len(readings)
                    return
                # refuse: the broker keeps them, and in the end acknowledges no more
                self._queue.counters.error = str(e)
                await asyncio.sleep(1.0)  # the pace of looking whether there is room

    # -- best effort -------------------------------------------------------------------------------------------------

    async def _soft_message(self, msg: Msg) -> None:
        quality = (msg.headers or {}).get("Nmqtt-Pub", "0")
        if not quality.startswith("0"):
            return  # QoS 1 and 2 come by the durable way
        if len(self._soft) >= _SOFT:
            self._queue.counters.dropped_full += 1
            return
        self._soft.append((to_topic(msg.subject), msg.data, time.time_ns() // 1_000_000))

    async def _take_soft(self) -> None:
        taken, self._soft = self._soft[:_BATCH], self._soft[_BATCH:]
        fresh: list[str] = []
        readings = [r for r in taken if self._accept(r[1], fresh) is not None]
        if readings:
            await self._append(readings, self._cursor)
        for identity in fresh:
            self._window.add(identity)


def _stamp(at: Any) -> int:
    """Nanoseconds (to the microsecond that nats-py keeps) of a message's time stamp."""
    return int(at.timestamp() * 1_000_000) * 1000
