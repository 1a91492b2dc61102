"""One queue at the node: a JetStream stream of its own, in which readings wait for the hub.

``append`` puts a batch of readings in and returns when it is there; what is delivered (``mover.py`` says so) or too old
is taken away; :class:`Counters` say what became of all that ever came in. It never asks the hub anything.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig, StreamState

from edgeward.core import clock
from edgeward.core.bus import Bus, Stored
from edgeward.core.delivery import AT, COUNT, SRC, TO, TOTAL, Cursor, Mark, age
from edgeward.core.errors import Conflict, Refused, Unreachable
from edgeward.core.jsread import Message, read_batch, stamp_of
from edgeward.core.packing import Sent

#: topic, payload, time in ms since 1970
Reading = tuple[str, bytes, int]
OnFull = Literal["dropOldest", "dropNewest", "refuse"]
_LINEAGE = "edgeward.lineage"
_READ = 256
_encode = msgspec.msgpack.Encoder().encode


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


class Queue:
    """One queue's stream at the node."""

    def __init__(self, spec: QueueSpec, bus: Bus) -> None:
        self.spec = spec
        self.counters = Counters()
        self.stream = f"OUT_{spec.name}"
        self.subject = f"ew.out.{spec.name}"
        self.lineage = ""
        self.wake = asyncio.Event()
        #: Called before anything is taken away: keeps elsewhere what its owner still needs of the queue, and says up to
        #: which sequence it has done so.
        self.before_trim: Callable[[], Awaitable[int]] | None = None
        #: What the hub has of it and what was lost: the mover keeps it.
        self.sent = Sent()
        #: Which run of the machine this is.
        self.boot = clock.boot()[:8] or clock.new_id(8)
        self._bus = bus
        self._js = bus.jetstream()
        self._append_lock, self._trim_lock = asyncio.Lock(), asyncio.Lock()
        self._last_seq: int | None = None
        self._total = 0
        self._refused = 0
        #: Delivered and still here: (sequence, readings, bytes).
        self._done: deque[tuple[int, int, int]] = deque()
        self._done_count = self._done_bytes = 0

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
                    if not await self.trim(force=True):
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
            got = await self.read(after + 1)
            for after, _, _, data in got:
                yield after, msgspec.msgpack.decode(data)
            if not got:  # a short answer is no end: the server also cuts at max_bytes
                return

    async def read(self, start: int, count: int = _READ) -> list[Message]:
        """Up to ``count`` messages from sequence ``start`` on."""
        return await read_batch(self._bus.client, "$JS.API", self.stream, start, self.subject, count)

    async def state(self) -> StreamState:
        """The stream's state, as the node's nats-server says it."""
        try:
            return (await self._js.stream_info(self.stream)).state
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable("the node's nats-server does not answer") from e

    def delivered(self, messages: Sequence[Message]) -> None:
        """These are at the hub: they may be taken away."""
        for seq, _, headers, data in messages:
            self._done.append((seq, int(headers.get(COUNT, 0)), len(data)))
            self._done_count += self._done[-1][1]
            self._done_bytes += len(data)

    def forget_delivered(self) -> None:
        """It is not known any more what of this is at the hub."""
        self._done.clear()
        self._done_count = self._done_bytes = 0

    # -- taking away -------------------------------------------------------------------------------------------------

    async def trim(self, *, force: bool = False) -> bool:
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

    async def expire(self) -> None:
        """Drops what is too old while the link is down, and counts what waits."""
        await self.measure()
        if not self.spec.max_age or self._last_seq is None:
            return
        got = await self.read(1)
        upto, aged = 0, 0
        for number, _, headers, _ in got:
            if number >= self._last_seq or not self.is_aged(headers, stamp_of(headers)):
                break
            upto = number
            if int(headers.get(TOTAL, 0)) > (self.sent.total or 0):
                aged += int(headers.get(COUNT, 0))
        if upto and await self._purge(upto) == upto:
            self.sent = self.sent._replace(aged=self.sent.aged + aged)

    def _here(self) -> Mark:
        return Mark(self.boot, clock.boottime())

    def is_aged(self, headers: dict[str, str], stamp: int) -> bool:
        """Whether a message of these headers, taken in at ``stamp`` (ns), is older than the queue keeps."""
        if not self.spec.max_age:
            return False
        return age(stamp / 1e9, Mark.parse(headers.get(AT, "")), clock.now(), self._here()) > self.spec.max_age

    async def measure(self) -> None:
        """Brings :attr:`counters` up to date."""
        state = await self.state()
        waiting = self._total - self.sent.total if self.sent.total is not None else self._total
        if self.sent.total is None and state.messages:
            first = await self.read(1, 1)
            if first:  # the hub was not asked yet: all that is here may still have to go
                waiting = self._total - int(first[0][2].get(TOTAL, 0)) + int(first[0][2].get(COUNT, 0))
        self.counters.pending = max(0, waiting)
        self.counters.pending_bytes = max(0, int(state.bytes) - self._done_bytes) if waiting > 0 else 0
        self.count()

    def count(self) -> None:
        """Puts what is known here into :attr:`counters`."""
        c = self.counters
        c.accepted = self._total
        c.dropped_full, c.dropped_age = self.sent.lost_full + self._refused, self.sent.lost_age + self.sent.aged
        if self.sent.total is not None:
            c.forwarded = max(0, self.sent.total - self.sent.lost_full - self.sent.lost_age)
