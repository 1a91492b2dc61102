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

from edgeward.core.bus import Bus, cancellable
from edgeward.core.delivery import Cursor, taken_over
from edgeward.core.errors import Conflict, EdgewardError, Refused, Unreachable
from edgeward.core.jsread import Message, read_batch
from edgeward.core.outbox import Queue, Reading, stamp_of
from edgeward.streams.dedupe import Window, identity_of
from edgeward.streams.topics import filters, to_topic

log = logging.getLogger("edgeward.capture")

STREAM = "$MQTT_msgs"
_PREFIX = "$MQTT.msgs."
_BATCH = 500
#: What was given out and not acknowledged is given out again after this long.
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
        self._doubt = False
        bus.on_reconnect(self._reconnected)
        self._subscriptions: list[Any] = []
        self.durable = f"ew-{queue.spec.name}"

    def _reconnected(self) -> None:
        self._doubt = True

    async def open(self) -> None:
        """Makes the durable consumer: from here on nothing that is acknowledged is missed."""
        try:
            info = await self._js.stream_info(STREAM)
            if not info.config.allow_direct:
                info.config.allow_direct = True  # the ordered catch-up after a kill reads it directly
                await self._js.update_stream(info.config)
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
        await self._catch_up()

    async def _catch_up(self) -> None:
        """Takes over all that waits, in the stream's order.

        After a kill the broker gives out again what was not acknowledged, but maybe after newer messages. So what is
        there now is read from the stream itself; when the consumer gives it out again it is known by the cursor.
        """
        self._doubt = False
        state = (await self._js.stream_info(STREAM)).state
        at = self._cursor.seq + 1 if self._cursor and self._cursor.lineage == self._lineage else 1
        if self._cursor and self._cursor.seq > state.last_seq:
            at = 1  # the broker's store lost its tail or was made anew
        while at <= state.last_seq:
            found: list[Message] = []
            end = int(state.last_seq)
            for subject in self._subjects:
                got = await read_batch(self._bus.client, "$JS.API", STREAM, at, _PREFIX + subject, _BATCH)
                found += got
                if len(got) == _BATCH:
                    end = min(end, got[-1][0])
            found = sorted(m for m in found if m[0] <= end)
            await self._take([(m[0], stamp_of(m[2]), m[1], m[3]) for m in found])
            at = end + 1

    async def _pump(self) -> None:
        subscription = await self._js.pull_subscribe_bind(consumer=self.durable, stream=STREAM)
        try:
            while True:
                try:
                    msgs = await cancellable(subscription.fetch(_BATCH, timeout=0.5))
                except (nats.errors.TimeoutError, TimeoutError):
                    msgs = []
                    if not self._bus.connected:
                        raise Unreachable("the node's nats-server is away") from None
                if self._soft:
                    await self._take_soft()
                if self._doubt:
                    raise Unreachable("the node's nats-server was away")
                if msgs:
                    await self._take([_consumed(m) for m in msgs])
                    await self._acknowledge(msgs[-1])
        finally:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()

    async def _take(self, msgs: list[tuple[int, int, str, bytes]]) -> None:
        """Appends what is new of (sequence, time stamp, subject, payload)."""
        readings: list[Reading] = []
        cursor = self._cursor
        fresh: list[str] = []
        size = 0
        previous = cursor
        for seq, stamp, subject, payload in msgs:
            if taken_over(self._cursor, self._lineage, seq, stamp):
                continue
            previous, cursor = cursor, Cursor(self._lineage, seq, stamp)
            identity = self._accept(payload, fresh)
            if identity is None:
                continue
            if size + len(payload) > 512 * 1024 and readings:
                await self._append(readings, previous)
                readings, size = [], 0
            readings.append((to_topic(subject.removeprefix(_PREFIX)), payload, stamp // 1_000_000))
            size += len(payload)
        if readings:
            await self._append(readings, cursor)
        for identity in fresh:
            self._window.add(identity)

    @staticmethod
    async def _acknowledge(last: Msg) -> None:
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


def _consumed(msg: Msg) -> tuple[int, int, str, bytes]:
    """(sequence, time stamp in ns, subject, payload) of a message that the consumer gave out."""
    # $JS.ACK.<domain>.<hash>.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<ns>.<pending>.<token>, or
    # the older form without domain, hash and token; nats-py's own parser keeps microseconds only
    parts = msg.reply.split(".")
    seq, stamp = (parts[7], parts[9]) if len(parts) >= 11 else (parts[5], parts[7])
    return int(seq), int(stamp), msg.subject, msg.data
