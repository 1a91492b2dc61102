"""Durable, ordered, bounded delivery from a node to its hub, exactly once however long the link was cut.

``append`` puts a batch of readings into a queue, a JetStream stream of the node's own, and returns when it is there.
``run`` moves batches on to the hub's streams: strict priority among queues, one batch in flight, sized to the link. The
hub's last message of the queue's subject is the cursor (``core/delivery.py``); nothing about progress is kept here, so
nothing here can be wrong after a SIGKILL. What was delivered is trimmed, but for a declared tail.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from edgeward.core import clock
from edgeward.core.bus import Bus, Stored
from edgeward.core.delivery import (
    COUNT,
    SPAN,
    SRC,
    TOTAL,
    Bucket,
    Cursor,
    ack_timeout,
    batch_size,
    start_at,
    taken_over,
)
from edgeward.core.errors import Conflict, EdgewardError, NotFound, Refused, Unreachable
from edgeward.core.jsread import Message, read_batch

log = logging.getLogger("edgeward.outbox")

#: topic, payload, time in ms since 1970
Reading = tuple[str, bytes, int]
OnFull = Literal["dropOldest", "dropNewest", "refuse"]
_LINEAGE = "edgeward.lineage"
_RETRY = (0.1, 1.0)
_READ = 256
_encode = msgspec.msgpack.Encoder().encode
_decode_raw = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


class QueueSpec(msgspec.Struct, frozen=True):
    """One queue. ``stream`` is the hub's; ``priority`` 9 goes first; ``keep_tail`` readings stay when delivered."""

    name: str
    stream: str
    priority: int = 5
    max_bytes: int = 64 * 1024 * 1024
    max_age: float = 0.0
    on_full: OnFull = "dropOldest"
    rate: float = 0.0
    keep_tail: int = 0


class Counters(msgspec.Struct):
    accepted: int = 0
    forwarded: int = 0
    pending: int = 0
    pending_bytes: int = 0
    dropped_full: int = 0
    dropped_age: int = 0
    dropped_duplicate: int = 0
    no_identity: int = 0
    last_ack_at: float = 0.0
    error: str = ""


def stamp_of(headers: dict[str, str]) -> int:
    """Nanoseconds of a direct read's ``Nats-Time-Stamp`` (RFC 3339 with up to nine decimals)."""
    text = headers["Nats-Time-Stamp"].removesuffix("Z")
    whole, _, fraction = text.partition(".")
    seconds = int(datetime.fromisoformat(whole + "+00:00").timestamp())
    return seconds * 1_000_000_000 + int(fraction.ljust(9, "0")[:9] or 0)


class Gate:
    """One place, given to the waiter of the highest priority."""

    def __init__(self) -> None:
        self._busy = False
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._n = 0

    @contextlib.asynccontextmanager
    async def turn(self, priority: int) -> AsyncIterator[None]:
        if self._busy:
            self._n += 1
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiters, (-priority, self._n, future))
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self._pass_on()
                raise
        self._busy = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiters:
            _, _, future = heapq.heappop(self._waiters)
            if not future.done():
                future.set_result(None)
                return
        self._busy = False


class Queue:
    """One queue's stream at the node, and its way to the hub."""

    def __init__(self, spec: QueueSpec, bus: Bus, node: str, gate: Gate) -> None:
        self.spec = spec
        self.counters = Counters()
        self.stream = f"OUT_{spec.name}"
        self.subject = f"ew.out.{spec.name}"
        self.hub_subject = f"ew.data.{spec.stream}.{node}.{spec.name}"
        self.lineage = ""
        self.wake = asyncio.Event()
        self._bus, self._gate = bus, gate
        self._js = bus.jetstream()
        self._bucket = Bucket(spec.rate)
        self._append_lock = asyncio.Lock()
        self._last_seq: int | None = None
        self._total = 0
        self._position: int | None = None
        self._hub_seq = 0
        self._hub_cursor: Cursor | None = None
        self._sent_total: int | None = None
        self._done: deque[tuple[int, int]] = deque()
        self._size = 64 * 1024
        #: How long an answer of the hub may take beyond its size: follows the link, doubles with each silence. Giving
        #: up too early is safe (the cursor tells), waiting too long delays the backlog after a hub's restart.
        self._patience = 2.0

    # -- the node's side ---------------------------------------------------------------------------------------------

    def _config(self, lineage: str) -> StreamConfig:
        return StreamConfig(
            name=self.stream,
            subjects=[self.subject],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            max_bytes=self.spec.max_bytes,
            discard=DiscardPolicy.OLD if self.spec.on_full == "dropOldest" else DiscardPolicy.NEW,
            allow_direct=True,
            duplicate_window=0.1,
            metadata={_LINEAGE: lineage},
        )

    async def open(self) -> None:
        """Makes the stream, or fits an existing one to the spec; what is in it stays."""
        try:
            info = await self._js.stream_info(self.stream)
            self.lineage = (info.config.metadata or {}).get(_LINEAGE, "")
            changed = info.config.max_bytes != self.spec.max_bytes or info.config.discard != self._config("").discard
            if changed:
                await self._js.update_stream(self._config(self.lineage))
        except nats.js.errors.NotFoundError:
            self.lineage = clock.new_id(16)
            await self._js.add_stream(self._config(self.lineage))
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the node's nats-server does not answer ({type(e).__name__})") from e
        await self.refresh()

    async def refresh(self) -> Stored | None:
        """Reads the queue's own end: after a start, a reconnect, a doubt about an append."""
        last = await self._bus.last_message(self.stream, self.subject)
        if last is None:
            self._last_seq = 0
        else:
            self._last_seq = last.seq
            self._total = int(last.headers.get(TOTAL, 0))
        return last

    async def source_cursor(self) -> Cursor | None:
        """What this queue took over from *its* source, for a capture that appends to it."""
        last = await self.refresh()
        return Cursor.parse(last.headers.get(SRC, "")) if last else None

    async def append(self, readings: Sequence[Reading], source: Cursor | None = None) -> None:
        """Keeps a batch durably. ``Conflict``: somebody else appended, or an append in doubt did happen: read
        :meth:`source_cursor`. ``Refused``: full, and the queue drops the newest or refuses."""
        if not readings:
            return
        async with self._append_lock:
            if self._last_seq is None:
                await self.refresh()
            total = self._total + len(readings)
            headers = {COUNT: str(len(readings)), TOTAL: str(total)}
            if source is not None:
                headers[SRC] = str(source)
            try:
                ack = await self._bus.publish_acked(
                    self.subject, _encode(list(readings)), headers=headers, expect_last=self._last_seq, timeout=10.0
                )
            except Conflict:
                self._last_seq = None
                raise
            except Unreachable:
                self._last_seq = None
                raise
            except EdgewardError as e:
                if "maximum" in e.message or "insufficient" in e.message or "resource" in e.message:
                    raise Refused(f"queue {self.spec.name} is full: {e.message}", remedy="raise bounds.bytes") from e
                raise
            self._last_seq, self._total = ack.seq, total
        self.counters.accepted += len(readings)
        self.wake.set()

    async def tail(self, readings: int) -> AsyncIterator[list[Any]]:
        """The last ``readings`` readings and a little more, batch by batch, oldest first."""
        try:
            state = (await self._js.stream_info(self.stream)).state
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable("the node's nats-server does not answer") from e
        seq = int(state.first_seq)
        while True:
            got = await read_batch(self._bus.client, "$JS.API", self.stream, seq, self.subject, _READ)
            for number, _, headers, data in got:
                seq = number + 1
                if self._total - int(headers.get(TOTAL, 0)) <= readings:
                    yield msgspec.msgpack.decode(data)
            if len(got) < _READ:
                return

    # -- the way to the hub ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Moves batches to the hub until cancelled."""
        delay = 0.0
        while True:
            try:
                await self._forward()
                delay = 0.0
            except (EdgewardError, nats.errors.Error, TimeoutError) as e:
                self._position = None
                self._patience = min(30.0, self._patience * 2)
                text = str(e) or type(e).__name__
                if text != self.counters.error and not isinstance(e, Unreachable | NotFound):
                    log.warning("queue %s: %s", self.spec.name, text)
                self.counters.error = text
                delay = min(_RETRY[1], delay * 2 or _RETRY[0]) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
                with contextlib.suppress(EdgewardError, nats.errors.Error, TimeoutError):
                    await self._expire()
                await asyncio.sleep(delay)  # the back-off between two tries

    async def _forward(self) -> None:
        if self._position is None:
            await self._find_position()
        position = self._position or 1
        self.wake.clear()
        got = await read_batch(self._bus.client, "$JS.API", self.stream, position, self.subject, _READ)
        if not got:
            await self._expire()
            self.counters.error = ""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10.0):  # the pace of looking for what is too old
                    await self.wake.wait()
            return
        at = 0
        while at < len(got):
            at = await self._send(got, at)
        await self._trim()

    async def _find_position(self) -> None:
        """Where to go on: behind what the hub's stream has of this queue."""
        last = await self._bus.last_message(
            f"DATA_{self.spec.stream}", self.hub_subject, domain="hub", timeout=min(5.0, self._patience)
        )
        self._hub_seq = last.seq if last else 0
        cursor = Cursor.parse(last.headers.get(SRC, "")) if last else None
        try:
            state = (await self._js.stream_info(self.stream)).state
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable("the node's nats-server does not answer") from e
        stamp: int | None = None
        if cursor is not None and state.first_seq <= cursor.seq <= state.last_seq:
            found = await read_batch(self._bus.client, "$JS.API", self.stream, cursor.seq, self.subject, 1)
            if found and found[0][0] == cursor.seq:
                stamp = stamp_of(found[0][2])
                self._sent_total = int(found[0][2].get(TOTAL, 0))
        self._hub_cursor = cursor
        self._position = start_at(cursor, self.lineage, int(state.first_seq), int(state.last_seq), stamp)

    async def _send(self, got: list[Message], at: int) -> int:
        """One hub message of as many batches from ``got[at:]`` as fit. Returns where the next begins."""
        parts: list[msgspec.Raw] = []
        size, end, cursor = 0, at, None
        total = self._sent_total
        oldest_allowed = (clock.now() - self.spec.max_age) * 1e9 if self.spec.max_age else 0
        dropped_age = 0
        while end < len(got):
            seq, _, headers, data = got[end]
            stamp = stamp_of(headers)
            count, running = int(headers.get(COUNT, 0)), int(headers.get(TOTAL, 0))
            old = taken_over(self._hub_cursor, self.lineage, seq, stamp)
            if parts and (len(parts) + count > SPAN or size + len(data) > self._size):
                break
            if not old:
                if total is not None and running - count > total:
                    # the stream's bound took away what was never sent
                    self.counters.dropped_full += running - count - total
                if stamp < oldest_allowed:
                    dropped_age += count
                else:
                    parts += _decode_raw(data)
                    size += len(data)
                    cursor = Cursor(self.lineage, seq, stamp)
                total = running
            end += 1
        if parts and cursor is not None:
            body = _encode(parts)
            wait = self._bucket.delay(clock.monotonic(), len(body))
            if wait:
                await asyncio.sleep(wait)  # the declared rate
            headers = {SRC: str(cursor), COUNT: str(len(parts))}
            async with self._gate.turn(self.spec.priority):
                started = clock.monotonic()
                ack = await self._bus.publish_acked(
                    self.hub_subject,
                    body,
                    headers=headers,
                    expect_last=self._hub_seq,
                    timeout=ack_timeout(len(body), self._patience),
                )
                took = clock.monotonic() - started
                self._patience = max(1.0, 6 * took)
            self._size = batch_size(self._size, took, len(body))
            self._hub_seq, self._hub_cursor = ack.seq, cursor
            self.counters.forwarded += len(parts)
            self.counters.last_ack_at = clock.now()
            self.counters.error = ""
        self.counters.dropped_age += dropped_age
        for seq, _, headers, _ in got[at:end]:
            self._done.append((seq, int(headers.get(TOTAL, 0))))
        self._sent_total = total
        self._position = got[end - 1][0] + 1
        return end

    async def _trim(self, upto: int | None = None) -> None:
        """Takes away what was delivered, but the tail and the very last (which is the source's cursor)."""
        last = 0
        while len(self._done) > 1 and self._total - self._done[1][1] >= self.spec.keep_tail:
            last, _ = self._done.popleft()
        if last and last < (self._last_seq or 0):
            await self._purge(last)

    async def _purge(self, upto: int) -> None:
        """Removes everything up to and with sequence ``upto``."""
        try:
            await self._js.purge_stream(self.stream, seq=upto + 1)
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable("the node's nats-server does not answer") from e

    async def _expire(self) -> None:
        """Drops what is too old while the link is down, and counts what waits."""
        try:
            state = (await self._js.stream_info(self.stream)).state
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable("the node's nats-server does not answer") from e
        waiting = self._total - (self._sent_total or 0)
        self.counters.pending = max(0, waiting) if state.messages else 0
        self.counters.pending_bytes = int(state.bytes) if self.counters.pending else 0
        if not self.spec.max_age or not state.messages:
            return
        oldest_allowed = (clock.now() - self.spec.max_age) * 1e9
        seq, upto, dropped = int(state.first_seq), 0, 0
        got = await read_batch(self._bus.client, "$JS.API", self.stream, seq, self.subject, _READ)
        for number, _, headers, _ in got:
            if stamp_of(headers) >= oldest_allowed or number >= (self._last_seq or 0):
                break
            upto = number
            running = int(headers.get(TOTAL, 0))
            if running > (self._sent_total or 0):
                dropped += min(int(headers.get(COUNT, 0)), running - (self._sent_total or 0))
                self._sent_total = running
        if upto:
            await self._purge(upto)
            self.counters.dropped_age += dropped


class Outbox:
    """All queues of a node."""

    def __init__(self, bus: Bus, *, node: str) -> None:
        self._bus, self._node = bus, node
        self._gate = Gate()
        self._queues: dict[str, Queue] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        bus.on_reconnect(self._doubt)

    def _doubt(self) -> None:
        for queue in self._queues.values():
            queue.wake.set()

    def kick(self) -> None:
        """The link is back: do not wait out a back-off's rest."""
        self._doubt()

    async def open(self, spec: QueueSpec) -> Queue:
        """The queue of this spec; an existing one is fitted to it."""
        old = self._queues.get(spec.name)
        if old is not None and old.spec == spec:
            return old
        queue = Queue(spec, self._bus, self._node, self._gate)
        await queue.open()
        if old is not None:
            queue.counters = old.counters
            await self._stop(spec.name)
        self._queues[spec.name] = queue
        if self._group is not None:
            self._tasks[spec.name] = self._group.create_task(queue.run())
        return queue

    async def _stop(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def drop(self, name: str) -> None:
        """Deletes a queue and what still waits in it."""
        await self._stop(name)
        if self._queues.pop(name, None) is not None:
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await self._bus.jetstream().delete_stream(f"OUT_{name}")

    async def run(self) -> None:
        """Delivers until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for name, queue in self._queues.items():
                self._tasks[name] = group.create_task(queue.run())
            try:
                await asyncio.Event().wait()
            finally:
                self._group = None

    def counters(self) -> dict[str, dict[str, Any]]:
        return {name: msgspec.structs.asdict(q.counters) for name, q in self._queues.items()}
