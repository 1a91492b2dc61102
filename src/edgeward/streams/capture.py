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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from edgeward.core.bus import Bus, cancellable
from edgeward.core.delivery import Cursor, taken_over
from edgeward.core.errors import Conflict, EdgewardError, Refused, Unreachable
from edgeward.core.files import remove, write_atomic
from edgeward.core.jsread import Message, read_batch, stamp_of
from edgeward.core.outqueue import Queue, Reading
from edgeward.core.topics import filters, is_own, to_topic
from edgeward.streams.dedupe import Window, identity_of
from edgeward.streams.pace import Pace

log = logging.getLogger("edgeward.capture")

STREAM = "$MQTT_msgs"
_PREFIX = "$MQTT.msgs."
_BATCH = 500
#: What was given out and not acknowledged is given out again after this long.
_ACK_WAIT = 2.0
_SOFT = 5000
_BATCH_BYTES = 512 * 1024
#: A reading's bytes at most: with its topic and the headers it must fit into one NATS message (8 MiB).
_LARGEST = 8 * 1024 * 1024 - 64 * 1024


class _State(msgspec.Struct, array_like=True):
    """The saved window: all identities up to the queue's sequence ``covered``."""

    lineage: str
    covered: int
    identities: bytes


def _read_state(path: Path) -> _State | None:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=_State)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as e:
        log.warning("%s cannot be read (%s): repeats of older readings are not known", path, e)
        return None


class Capture:
    """One Export's way from the broker into its queue."""

    def __init__(
        self, bus: Bus, queue: Queue, topic: str, identity: str, window: int, state: Path, pace: Pace | None = None
    ) -> None:
        """``state``: the file that keeps the window of identities."""
        self._pace = pace or Pace(lambda: 0.0, time.monotonic)
        #: Seconds that the quota wants before more is taken.
        self._owed = 0.0
        self.topic = topic
        self._bus, self._queue = bus, queue
        self._js = bus.jetstream()
        self._subjects = filters(topic)
        self._path = tuple(identity.removeprefix("$.").split(".")) if identity else ()
        self._window = Window(window)
        self._state = state
        #: The queue's sequence up to which the window knows all, and that of the saved window.
        self._covered = self._saved = 0
        self._unsaved = 0
        self._save_lock = asyncio.Lock()
        self._batch_bytes = min(_BATCH_BYTES, queue.spec.max_bytes // 4)
        self._largest = min(_LARGEST, queue.spec.max_bytes // 2)
        self._lineage = ""
        self._soft: list[Reading] = []
        self._doubt = False
        self._appended = self._floor = 0
        #: The broker's sequence up to which this run has looked at everything.
        self._looked = 0
        self._cursor: Cursor | None = None
        #: The queue has no room for the batch that is next, and is to refuse rather than drop.
        self.blocked = False
        #: Called when that begins and when it ends.
        self.on_blocked: Callable[[], None] = lambda: None
        self._forget_doubt = bus.on_reconnect(self._reconnected)
        if self._path:
            queue.before_trim = self._keep_window
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
            # makes it, or gives an existing one the present filters without losing its place
            consumer = await self._js.add_consumer(STREAM, config)
            self._floor = int(consumer.ack_floor.stream_seq) if consumer.ack_floor else 0
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the broker's messages cannot be read: {e or type(e).__name__}") from e
        self._subscriptions = [await self._bus.subscribe(s, self._soft_message) for s in self._subjects]

    async def close(self, *, forget: bool) -> None:
        self._forget_doubt()
        for subscription in self._subscriptions:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()
        if forget:
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await self._js.delete_consumer(STREAM, self.durable)
            await asyncio.to_thread(remove, self._state)
        elif self._path:
            with contextlib.suppress(OSError):
                await self._save()

    async def run(self) -> None:
        """Moves messages until cancelled."""
        while True:
            try:
                self._block(False)
                await self._restore()
                await self._pump()
            except (EdgewardError, nats.errors.Error, TimeoutError) as e:
                if not isinstance(e, Conflict):
                    self._queue.counters.error = str(e) or type(e).__name__
                await asyncio.sleep(0.2)  # the back-off between two tries

    async def _restore(self) -> None:
        """The window of what was saved and of the queue behind it, the cursor from the queue's end, and what waits."""
        self._cursor = await self._queue.source_cursor()
        if self._path:
            fresh, self._saved = Window(self._window.size), 0
            saved = await asyncio.to_thread(_read_state, self._state)
            if saved is not None and saved.lineage == self._queue.lineage:
                fresh.load(saved.identities)
                self._saved = saved.covered
            self._covered = self._saved
            async for seq, batch in self._queue.batches(self._saved):
                for topic, payload, _ in batch:
                    identity = identity_of(topic, payload, self._path)
                    if identity is not None:
                        fresh.add(identity)
                self._covered = seq
            self._window = fresh
        await self._catch_up()

    async def _keep_window(self) -> int:
        """Before the queue takes anything away: the identities must be on disk. Gives up to which sequence they are."""
        await self._save()
        return self._saved

    async def _save(self) -> None:
        async with self._save_lock:
            if self._covered == self._saved:
                return
            covered = self._covered
            state = _State(self._queue.lineage, covered, self._window.dump())
            self._unsaved = 0
            try:
                await asyncio.to_thread(write_atomic, self._state, msgspec.msgpack.encode(state))
            except OSError as e:
                raise Refused(f"the window of identities cannot be saved: {e}", remedy="free disk space") from e
            self._saved = covered

    async def _catch_up(self) -> None:
        """Takes over all that waits, in the stream's order.

        After a kill the broker gives out again what was not acknowledged, but maybe after newer messages. So what is
        there now is read from the stream itself; when the consumer gives it out again it is known by the cursor.
        """
        self._doubt = False
        state = (await self._js.stream_info(STREAM)).state
        ours = self._cursor is not None and self._cursor.lineage == self._lineage
        at = self._cursor.seq + 1 if ours and self._cursor else 1
        if at > state.last_seq + 1:
            at = 1  # the broker's store lost its tail or was made anew
        # what was there before the Export, for others, is not its own: the consumer began behind it
        at = max(at, min(self._floor, int(state.last_seq)) + 1)
        while at <= state.last_seq:
            found: list[Message] = []
            end = int(state.last_seq)
            for subject in self._subjects:
                got = await read_batch(self._bus.client, "$JS.API", STREAM, at, _PREFIX + subject, _BATCH)
                found += got
                if got:  # a short answer is no end: the server also cuts at max_bytes
                    end = min(end, got[-1][0])
            found = sorted(m for m in found if m[0] <= end)
            await self._take([(m[0], stamp_of(m[2]), m[1], m[3]) for m in found])
            await self._pay()
            at = end + 1
        self._looked = int(state.last_seq)

    async def _pump(self) -> None:
        subscription = await self._js.pull_subscribe_bind(consumer=self.durable, stream=STREAM)
        try:
            while True:
                try:
                    msgs = await cancellable(subscription.fetch(self._pace.most(_BATCH), timeout=0.5))
                except (nats.errors.TimeoutError, TimeoutError):
                    msgs = []
                    if not self._bus.connected:
                        raise Unreachable("the node's nats-server is away") from None
                if self._soft:
                    await self._take_soft()
                if self._doubt:
                    raise Unreachable("the node's nats-server was away")
                if msgs:
                    # what is given out again: by its number, for the clock may have been set back since
                    found = [m for m in map(_consumed, msgs) if m[0] > self._looked]
                    await self._take(found)
                    self._looked = max(self._looked, *(m[0] for m in found), 0)
                    await self._acknowledge(msgs[-1])
                await self._pay()
        finally:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()

    async def _pay(self) -> None:
        """Waits as the namespace's quota wants it; meanwhile the broker keeps what comes."""
        owed, self._owed = self._owed, 0.0
        if owed:
            await asyncio.sleep(owed)  # the declared pace

    async def _take(self, msgs: list[tuple[int, int, str, bytes]]) -> None:
        """Appends what is new of (sequence, time stamp, subject, payload)."""
        readings: list[Reading] = []
        cursor = previous = self._cursor
        fresh: dict[bytes, None] = {}
        size = 0
        for seq, stamp, subject, payload in msgs:
            if taken_over(self._cursor, self._lineage, seq, stamp):
                continue
            previous, cursor = cursor, Cursor(self._lineage, seq, stamp)
            topic = to_topic(subject.removeprefix(_PREFIX))
            if not self._accept(topic, payload, fresh):
                continue
            if size + len(payload) > self._batch_bytes and readings:
                await self._append(readings, previous, fresh)
                readings, size = [], 0
            readings.append((topic, payload, stamp // 1_000_000))
            size += len(payload)
        if readings:
            await self._append(readings, cursor, fresh)
        self._note(fresh)

    def _note(self, fresh: dict[bytes, None]) -> None:
        """The identities of appended readings enter the window."""
        for identity in fresh:
            self._window.add(identity)
        self._covered = max(self._covered, self._appended)

    @staticmethod
    async def _acknowledge(last: Msg) -> None:
        try:
            await last.ack_sync(timeout=2.0)
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable("the broker did not take the acknowledgement") from e

    def _accept(self, topic: str, payload: bytes, fresh: dict[bytes, None]) -> bool:
        """Whether the reading is to be taken in; a new identity is noted in ``fresh``."""
        if self.topic.startswith("+") and is_own(topic.split("/", 1)[0]):
            return False  # NATS' wildcards take it, MQTT's do not
        counters = self._queue.counters
        if len(payload) > self._largest:
            counters.dropped_size += 1
            log.warning("a reading of %d bytes on %s is larger than the Export takes (%d)",
                        len(payload), topic, self._largest)  # fmt: skip
            return False
        if not self._path:
            return True
        identity = identity_of(topic, payload, self._path)
        if identity is None:
            counters.no_identity += 1
            return True
        if self._window.known(identity) or identity in fresh:
            counters.dropped_duplicate += 1
            return False
        fresh[identity] = None
        return True

    async def _append(self, readings: list[Reading], cursor: Cursor | None, fresh: dict[bytes, None]) -> None:
        while True:
            try:
                self._appended = await self._queue.append(readings, cursor)
                self._cursor = cursor
                self._owed = max(self._owed, self._pace.took(len(readings)))
                self._block(False)
                break
            except Refused as e:
                if self._queue.spec.on_full == "dropNewest":
                    self._queue.count_refused(len(readings))
                    self._cursor = cursor
                    for topic, payload, _ in readings:  # what was not kept may come again
                        fresh.pop(identity_of(topic, payload, self._path) or b"", None)
                    return
                # refuse: the broker keeps what it acknowledged, and is told to take no more
                self._queue.counters.error = str(e)
                self._block(True)
                await asyncio.sleep(0.5)  # the pace of looking whether there is room
        self._unsaved += len(readings)
        if self._path and self._unsaved > max(256, self._window.size // 4):
            await self._save()

    def _block(self, blocked: bool) -> None:
        if blocked != self.blocked:
            self.blocked = blocked
            self.on_blocked()

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
        fresh: dict[bytes, None] = {}
        readings: list[Reading] = []
        size = 0
        for reading in taken:
            if not self._accept(reading[0], reading[1], fresh):
                continue
            if size + len(reading[1]) > self._batch_bytes and readings:
                await self._append(readings, self._cursor, fresh)
                readings, size = [], 0
            readings.append(reading)
            size += len(reading[1])
        if readings:
            await self._append(readings, self._cursor, fresh)
        self._note(fresh)


def _consumed(msg: Msg) -> tuple[int, int, str, bytes]:
    """(sequence, time stamp in ns, subject, payload) of a message that the consumer gave out."""
    # $JS.ACK.<domain>.<hash>.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<ns>.<pending>.<token>, or
    # the older form without domain, hash and token; nats-py's own parser keeps microseconds only
    parts = msg.reply.split(".")
    seq, stamp = (parts[7], parts[9]) if len(parts) >= 11 else (parts[5], parts[7])
    return int(seq), int(stamp), msg.subject, msg.data
