"""Durable, ordered, bounded delivery from a node to its hub, exactly once however long the link was cut.

``append`` puts a batch of readings into a queue, a JetStream stream of the node's own, and returns when it is there.
``run`` moves batches on to the hub's streams: strict priority among queues, one batch in flight, sized to the link. The
hub's last message of the queue's subject is the cursor (``core/delivery.py``); nothing about progress is kept here, so
nothing here can be wrong after a SIGKILL. What was delivered is taken away.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from edgeward.core import clock
from edgeward.core.bus import Bus, Stored
from edgeward.core.delivery import (
    AT,
    COUNT,
    LOST,
    RUN,
    SPAN,
    SRC,
    TO,
    TOTAL,
    Bucket,
    Cursor,
    Mark,
    ack_timeout,
    age,
    batch_size,
    is_later,
    parse_lost,
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
_RETRY = (0.1, 0.5)
_READ = 256
#: Seconds that a question to the hub may take.
_ASK = 2.0
_encode = msgspec.msgpack.Encoder().encode
_decode_raw = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


class QueueSpec(msgspec.Struct, frozen=True):
    """One queue. ``stream`` is the hub's; ``priority`` 9 goes first; what was delivered is taken away once it is
    ``trim_every`` readings (0: at once) or a quarter of ``max_bytes``."""

    name: str
    stream: str
    priority: int = 5
    max_bytes: int = 64 * 1024 * 1024
    max_age: float = 0.0
    on_full: OnFull = "dropOldest"
    rate: float = 0.0
    trim_every: int = 0


class Counters(msgspec.Struct):
    """``accepted``, ``forwarded`` and the drops for want of room or for age are of the queue's whole life (the last
    three as the hub's last message of it says); the others since the agent's start."""

    accepted: int = 0
    forwarded: int = 0
    pending: int = 0
    pending_bytes: int = 0
    dropped_full: int = 0
    dropped_age: int = 0
    dropped_duplicate: int = 0
    dropped_size: int = 0
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
    """One place, for the waiter of the highest priority; nobody gets it while somebody of a higher one wants it.

    Who has more to send reads and prepares it between two turns. Without a word of that the others would take every
    second turn, and a priority would be worth nothing just when all have much to send.
    """

    def __init__(self) -> None:
        self._busy = False
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._wanting: dict[object, int] = {}
        self._n = 0

    def want(self, who: object, priority: int) -> None:
        """``who`` has something to send, and will ask for turns until it says :meth:`leave`."""
        self._wanting[who] = priority

    def leave(self, who: object) -> None:
        if self._wanting.pop(who, None) is not None and not self._busy:
            self._pass_on()

    def _outranked(self, priority: int) -> bool:
        return any(other > priority for other in self._wanting.values())

    @contextlib.asynccontextmanager
    async def turn(self, priority: int) -> AsyncIterator[None]:
        if self._busy or self._outranked(priority):
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
        self._busy = False
        while self._waiters:
            rank, _, future = self._waiters[0]
            if not future.done():
                if self._outranked(-rank):
                    return
                self._busy = True
                future.set_result(None)
            heapq.heappop(self._waiters)
            if self._busy:
                return


class Queue:
    """One queue's stream at the node, and its way to the hub."""

    def __init__(
        self, spec: QueueSpec, bus: Bus, node: str, gate: Gate, recovered: Callable[[], None] = lambda: None
    ) -> None:
        """``recovered`` is called when this queue delivers again after it could not."""
        self.spec = spec
        self._recovered = recovered
        self._failing = False
        #: Ends a back-off.
        self.again = asyncio.Event()
        self.counters = Counters()
        self.stream = f"OUT_{spec.name}"
        self.subject = f"ew.out.{spec.name}"
        self.lineage = ""
        self.wake = asyncio.Event()
        #: Called before anything is taken away: keeps elsewhere what its owner still needs of the queue, and says up to
        #: which sequence it has done so.
        self.before_trim: Callable[[], Awaitable[int]] | None = None
        self._node, self._bus, self._gate = node, bus, gate
        self._js = bus.jetstream()
        self._bucket = Bucket(spec.rate)
        self._append_lock, self._trim_lock = asyncio.Lock(), asyncio.Lock()
        self._last_seq: int | None = None
        self._total = 0
        self._position: int | None = None
        # what the hub has: the stream looked at, its last message of ours, and what that says
        self._to = ""
        self._hub_seq = 0
        self._hub_cursor: Cursor | None = None
        self._hub_run = ""
        self._sent_total: int | None = None
        self._lost_full = self._lost_age = 0
        #: Dropped for age while it was not known what the hub has: part of the next gap.
        self._aged = 0
        self._refused = 0
        #: Delivered and still here: (sequence, readings, bytes).
        self._done: deque[tuple[int, int, int]] = deque()
        self._done_count = self._done_bytes = 0
        self._size = 64 * 1024
        self._took = 0.5
        #: Which run of the machine this is.
        self._boot = clock.boot()[:8] or clock.new_id(8)

    # -- the node's side ---------------------------------------------------------------------------------------------

    def hub_subject(self, stream: str) -> str:
        return f"ew.data.{stream}.{self._node}.{self.spec.name}"

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
            try:
                info = await self._js.stream_info(self.stream)
                self.lineage = (info.config.metadata or {}).get(_LINEAGE, "")
                config = self._config(self.lineage)
                if info.config.max_bytes != config.max_bytes or info.config.discard != config.discard:
                    await self._js.update_stream(config)
            except nats.js.errors.NotFoundError:
                self.lineage = clock.new_id(16)
                await self._js.add_stream(self._config(self.lineage))
        except nats.js.errors.ServiceUnavailableError as e:  # while nats-server reads its configuration anew
            raise Unreachable("the node's JetStream does not answer") from e
        except nats.js.errors.APIError as e:
            raise Refused(
                f"queue {self.spec.name} cannot have {self.spec.max_bytes} bytes: {e.description}",
                field="$.spec.bounds.bytes",
                remedy="lower it, or free disk space at the node",
            ) from e
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

    async def append(self, readings: Sequence[Reading], source: Cursor | None = None) -> int:
        """Keeps a batch durably and gives its sequence. ``Conflict``: somebody else appended, or an append in doubt did
        happen: read :meth:`source_cursor`. ``Refused``: full, and the queue drops the newest or refuses."""
        async with self._append_lock:
            if self._last_seq is None:
                await self.refresh()
            assert self._last_seq is not None  # noqa: S101 - refresh sets it
            total = self._total + len(readings)
            headers = {COUNT: str(len(readings)), TOTAL: str(total), TO: self.spec.stream, AT: str(self._here())}
            if source is not None:
                headers[SRC] = str(source)
            body = _encode(list(readings))
            try:
                try:
                    seq = await self._append(body, headers, self._last_seq)
                except Refused:
                    # what the hub has must not count against the bound
                    if not await self._trim(force=True):
                        raise
                    seq = await self._append(body, headers, self._last_seq)
            except (Conflict, Unreachable):
                self._last_seq = None
                raise
            self._last_seq, self._total = seq, total
        self.wake.set()
        return seq

    async def _append(self, body: bytes, headers: dict[str, str], last: int) -> int:
        ack = await self._bus.publish_acked(self.subject, body, headers=headers, expect_last=last, timeout=10.0)
        return ack.seq

    def count_refused(self, readings: int) -> None:
        """Counts readings that the owner gave up because the queue is full."""
        self._refused += readings

    async def batches(self, after: int) -> AsyncIterator[tuple[int, list[Any]]]:
        """(sequence, readings) of what is in the queue behind sequence ``after``, oldest first."""
        while True:
            got = await read_batch(self._bus.client, "$JS.API", self.stream, after + 1, self.subject, _READ)
            for after, _, _, data in got:
                yield after, msgspec.msgpack.decode(data)
            if not got:  # a short answer is no end: the server also cuts at max_bytes
                return

    # -- the way to the hub ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Moves batches to the hub until cancelled."""
        try:
            await self._run()
        finally:
            self._gate.leave(self)

    async def _run(self) -> None:
        delay = 0.0
        while True:
            try:
                await self._forward()
                delay = 0.0
            except (EdgewardError, nats.errors.Error, TimeoutError) as e:
                self._gate.leave(self)
                self._position, self._failing = None, True
                text = str(e) or type(e).__name__
                if text != self.counters.error and not isinstance(e, Unreachable | NotFound):
                    log.warning("queue %s: %s", self.spec.name, text)
                self.counters.error = text
                delay = min(_RETRY[1], delay * 2 or _RETRY[0]) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
                with contextlib.suppress(EdgewardError, nats.errors.Error, TimeoutError):
                    await self._expire()
                self.again.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):  # the back-off between two tries
                        await self.again.wait()
                if self.again.is_set():  # the hub is there: whoever is less urgent waits until it is known what is here
                    self._gate.want(self, self.spec.priority)

    async def _forward(self) -> None:
        self.wake.clear()
        if self._position is None:
            self._position = await self._find_position()
        got = await read_batch(self._bus.client, "$JS.API", self.stream, self._position, self.subject, _READ)
        if not got:
            self._gate.leave(self)
            await self._expire()
            self.counters.error = ""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10.0):  # the pace of looking for what is too old
                    await self.wake.wait()
            return
        self._gate.want(self, self.spec.priority)
        at = 0
        while at < len(got):
            at = await self._send(got, at)
        await self._trim()

    async def _find_position(self) -> int:
        """Where to go on: behind what the hub's stream has of this queue."""
        self._to = ""
        first = await read_batch(self._bus.client, "$JS.API", self.stream, 1, self.subject, 1)
        if not first:
            return 1
        cursor = await self._look(first[0][2].get(TO, self.spec.stream))
        try:
            state = (await self._js.stream_info(self.stream)).state
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable("the node's nats-server does not answer") from e
        stamp: int | None = None
        if cursor is not None and state.first_seq <= cursor.seq <= state.last_seq:
            found = await read_batch(self._bus.client, "$JS.API", self.stream, cursor.seq, self.subject, 1)
            if found and found[0][0] == cursor.seq:
                stamp = stamp_of(found[0][2])
        self._done.clear()
        self._done_count = self._done_bytes = 0
        return start_at(cursor, self.lineage, int(state.first_seq), int(state.last_seq), stamp)

    async def _look(self, to: str) -> Cursor | None:
        """Reads what the hub's stream ``to`` has of this queue. Batches keep the stream that was declared when they
        were taken in, so a changed Export delivers what waits where it belongs, and nothing twice."""
        last = await self._bus.last_message(f"DATA_{to}", self.hub_subject(to), domain="hub", timeout=_ASK)
        cursor = Cursor.parse(last.headers.get(SRC, "")) if last else None
        if last is not None and cursor is not None and cursor.lineage == self.lineage:
            self._sent_total = max(self._sent_total or 0, int(last.headers.get(TOTAL, 0)))
            full, age = parse_lost(last.headers.get(LOST, ""))
            self._lost_full, self._lost_age = max(self._lost_full, full), max(self._lost_age, age)
        self._to, self._hub_seq, self._hub_cursor = to, last.seq if last else 0, cursor
        self._hub_run = last.headers.get(RUN, "") if last else ""
        return cursor

    async def _send(self, got: list[Message], at: int) -> int:
        """One hub message of as many batches from ``got[at:]`` as fit. Returns where the next begins."""
        to = got[at][2].get(TO, self.spec.stream)
        if to != self._to:
            await self._look(to)
        parts: list[msgspec.Raw] = []
        size, end, cursor, run = 0, at, None, ""
        total = self._sent_total
        lost_full, lost_age = self._lost_full, self._lost_age
        while end < len(got):
            seq, _, headers, data = got[end]
            stamp = stamp_of(headers)
            count, running = int(headers.get(COUNT, 0)), int(headers.get(TOTAL, 0))
            if headers.get(TO, self.spec.stream) != to:
                break
            mark = Mark.parse(headers.get(AT, ""))
            known = taken_over(self._hub_cursor, self.lineage, seq, stamp)
            if not known or is_later(mark, self._hub_run, self._boot):
                aged = self._is_aged(headers, stamp)
                if parts and (aged or len(parts) + count > SPAN or size + len(data) > self._size):
                    break
                gap = running - count - (total or 0)
                if gap > 0:  # the bound or the age took away what was never sent
                    by_age = min(gap, self._aged)
                    self._aged -= by_age
                    lost_age, lost_full = lost_age + by_age, lost_full + gap - by_age
                total = running
                if aged:
                    lost_age += count
                else:
                    parts += _decode_raw(data)
                    size += len(data)
                    cursor, run = Cursor(self.lineage, seq, stamp), mark.boot if mark else ""
            end += 1
        if parts and cursor is not None:
            body = _encode(parts)
            wait = self._bucket.delay(clock.monotonic(), len(body))
            if wait:
                self._gate.leave(self)
                await asyncio.sleep(wait)  # the declared rate
                self._gate.want(self, self.spec.priority)
            headers = {SRC: str(cursor), COUNT: str(len(parts)), TOTAL: str(total), LOST: f"{lost_full},{lost_age}"}
            if run:
                headers[RUN] = run
            async with self._gate.turn(self.spec.priority):
                started = clock.monotonic()
                seq = await self._deliver(body, headers)
                self._took = clock.monotonic() - started
            self._size = batch_size(self._size, self._took, len(body))
            self._hub_seq, self._hub_cursor, self._hub_run = seq, cursor, run
            if self._failing:
                self._failing = False
                self._recovered()
            self.counters.last_ack_at = clock.now()
            self.counters.error = ""
        self._sent_total, self._lost_full, self._lost_age = total, lost_full, lost_age
        for seq, _, headers, data in got[at:end]:
            self._done.append((seq, int(headers.get(COUNT, 0)), len(data)))
            self._done_count += self._done[-1][1]
            self._done_bytes += len(data)
        self._position = got[end - 1][0] + 1
        self._count()
        return end

    async def _deliver(self, body: bytes, headers: dict[str, str]) -> int:
        """Publishes and gives the sequence at the hub, once it is certain that the message is there.

        A receipt that was lost in a cut never comes. So while one is out the hub is asked what it has: the question
        goes the way that the batch went and cannot overtake it, and with the link down the local server says at once
        that nobody answers. Giving up too early costs one more try, never a second delivery: ``expect_last``.
        """
        subject = self.hub_subject(self._to)
        limit = ack_timeout(len(body))
        sent = asyncio.create_task(
            self._bus.publish_acked(subject, body, headers=headers, expect_last=self._hub_seq, timeout=limit)
        )
        absent, patience = 0, min(5.0, max(0.5, 3 * self._took))
        try:
            while True:
                await asyncio.wait({sent}, timeout=patience)
                if sent.done():
                    return (await sent).seq
                patience = 0.25
                try:
                    last = await self._bus.last_message(f"DATA_{self._to}", subject, domain="hub", timeout=_ASK)
                except Unreachable as e:
                    if isinstance(e.__cause__, TimeoutError):
                        continue  # a slow link, or one that is just breaking: the batch's own limit decides
                    raise
                if last is not None and last.headers.get(SRC) == headers[SRC]:
                    return last.seq
                absent += 1
                if absent > 1:  # at the first question the hub may have been writing it
                    raise Unreachable("the batch did not arrive at the hub")
        finally:
            sent.cancel()
            await asyncio.gather(sent, return_exceptions=True)

    # -- taking away -------------------------------------------------------------------------------------------------

    async def _trim(self, *, force: bool = False) -> bool:
        """Takes away what was delivered, but for the queue's very last batch, which is the source's cursor."""
        async with self._trim_lock:
            due = self._done_count > self.spec.trim_every or self._done_bytes > self.spec.max_bytes // 4
            if not self._done or not (force or due) or self._last_seq is None:
                return False
            upto = await self._purge(min(self._done[-1][0], self._last_seq - 1))
            gone = False
            while self._done and self._done[0][0] <= upto:
                _, count, size = self._done.popleft()
                self._done_count -= count
                self._done_bytes -= size
                gone = True
            return gone

    async def _purge(self, upto: int) -> int:
        """Removes everything up to and with sequence ``upto``, as far as its owner has kept what it needs."""
        if self.before_trim is not None:
            upto = min(upto, await self.before_trim())
        if upto > 0:
            try:
                await self._js.purge_stream(self.stream, seq=upto + 1)
            except (nats.errors.Error, TimeoutError) as e:
                raise Unreachable("the node's nats-server does not answer") from e
        return upto

    async def _expire(self) -> None:
        """Drops what is too old while the link is down, and counts what waits."""
        await self.measure()
        if not self.spec.max_age or self._last_seq is None:
            return
        got = await read_batch(self._bus.client, "$JS.API", self.stream, 1, self.subject, _READ)
        upto, aged = 0, 0
        for number, _, headers, _ in got:
            if number >= self._last_seq or not self._is_aged(headers, stamp_of(headers)):
                break
            upto = number
            if int(headers.get(TOTAL, 0)) > (self._sent_total or 0):
                aged += int(headers.get(COUNT, 0))
        if upto and await self._purge(upto) == upto:
            self._aged += aged

    def _here(self) -> Mark:
        return Mark(self._boot, clock.boottime())

    def _is_aged(self, headers: dict[str, str], stamp: int) -> bool:
        if not self.spec.max_age:
            return False
        return age(stamp / 1e9, Mark.parse(headers.get(AT, "")), clock.now(), self._here()) > self.spec.max_age

    async def measure(self) -> None:
        """Brings :attr:`counters` up to date."""
        try:
            state = (await self._js.stream_info(self.stream)).state
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable("the node's nats-server does not answer") from e
        waiting = self._total - self._sent_total if self._sent_total is not None else self._total
        if self._sent_total is None and state.messages:
            first = await read_batch(self._bus.client, "$JS.API", self.stream, 1, self.subject, 1)
            if first:  # the hub was not asked yet: all that is here may still have to go
                waiting = self._total - int(first[0][2].get(TOTAL, 0)) + int(first[0][2].get(COUNT, 0))
        self.counters.pending = max(0, waiting)
        self.counters.pending_bytes = max(0, int(state.bytes) - self._done_bytes) if waiting > 0 else 0
        self._count()

    def _count(self) -> None:
        c = self.counters
        c.accepted = self._total
        c.dropped_full, c.dropped_age = self._lost_full + self._refused, self._lost_age + self._aged
        if self._sent_total is not None:
            c.forwarded = max(0, self._sent_total - self._lost_full - self._lost_age)


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
        for queue in self._queues.values():
            queue.again.set()

    async def open(self, spec: QueueSpec) -> Queue:
        """The queue of this spec; an existing one is fitted to it."""
        old = self._queues.get(spec.name)
        if old is not None and old.spec == spec:
            return old
        queue = Queue(spec, self._bus, self._node, self._gate, self.kick)
        if old is not None:
            queue.counters = old.counters
            await self._stop(spec.name)
        await queue.open()
        self._queues[spec.name] = queue
        if self._group is not None:
            self._tasks[spec.name] = self._group.create_task(queue.run())
        return queue

    def get(self, name: str) -> Queue | None:
        return self._queues.get(name)

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

    async def prune(self, prefix: str, keep: Collection[str]) -> list[str]:
        """Deletes the queues of ``prefix`` that are not in ``keep``: left by an earlier run. Gives their names."""
        gone = []
        try:
            js = self._bus.jetstream()
            found: list[str] = []
            while page := await js.streams_info(offset=len(found)):
                found += [info.config.name or "" for info in page]
            for stream in found:
                name = stream.removeprefix("OUT_")
                if name != stream and name.startswith(prefix) and name not in keep:
                    await js.delete_stream(stream)
                    gone.append(name)
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the node's nats-server does not answer ({type(e).__name__})") from e
        return gone

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
