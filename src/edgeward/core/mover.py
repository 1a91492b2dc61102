"""From a node's queue to the hub's stream, in order, exactly once however long the link was cut.

In: what waits in a queue (``outqueue.py``). Out: messages in the hub's stream, one in flight, sized to the link
(``packing.py``), in turns with the other queues (``turns.py``). The hub's last message of the queue's subject is the
cursor (``delivery.py``); nothing about progress is kept here, so nothing here can be wrong after a SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable

import msgspec
import nats.errors
import nats.js.errors

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.delivery import (
    COUNT,
    LOST,
    RUN,
    SRC,
    TO,
    TOTAL,
    Bucket,
    Cursor,
    ack_timeout,
    batch_size,
    parse_lost,
    start_at,
)
from edgeward.core.errors import EdgewardError, NotFound, Unreachable
from edgeward.core.jsread import Message, stamp_of
from edgeward.core.outqueue import Queue
from edgeward.core.packing import Has, Parcel, Sent, pack
from edgeward.core.turns import Turns

log = logging.getLogger("edgeward.outbox")

_RETRY = (0.1, 0.5)
#: Seconds that a question to the hub may take.
_ASK = 2.0
_encode = msgspec.msgpack.Encoder().encode


class Mover:
    """The way of one queue to the hub."""

    def __init__(
        self, queue: Queue, bus: Bus, node: str, turns: Turns, recovered: Callable[[], None] = lambda: None
    ) -> None:
        """``recovered`` is called when this queue delivers again after it could not."""
        self.queue = queue
        #: Ends a back-off.
        self.again = asyncio.Event()
        self._node, self._bus, self._turns = node, bus, turns
        self._recovered = recovered
        self._failing = False
        self._bucket = Bucket(queue.spec.rate)
        self._position: int | None = None
        # the hub's stream that was looked at, and what it has of ours
        self._to = ""
        self._has = Has()
        self._size = 64 * 1024
        self._took = 0.5

    def hub_subject(self, stream: str) -> str:
        return f"ew.data.{stream}.{self._node}.{self.queue.spec.name}"

    async def run(self) -> None:
        """Moves batches to the hub until cancelled."""
        try:
            await self._run()
        finally:
            self._turns.leave(self)

    async def _run(self) -> None:
        queue = self.queue
        delay = 0.0
        while True:
            try:
                await self._forward()
                delay = 0.0
            except (EdgewardError, nats.errors.Error, TimeoutError) as e:
                self._turns.leave(self)
                self._position, self._failing = None, True
                text = str(e) or type(e).__name__
                if text != queue.counters.error and not isinstance(e, Unreachable | NotFound):
                    log.warning("queue %s: %s", queue.spec.name, text)
                queue.counters.error = text
                delay = min(_RETRY[1], delay * 2 or _RETRY[0]) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
                with contextlib.suppress(EdgewardError, nats.errors.Error, TimeoutError):
                    await queue.expire()
                self.again.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):  # the back-off between two tries
                        await self.again.wait()
                if self.again.is_set():  # the hub is there: whoever is less urgent waits until it is known what is here
                    self._turns.want(self, queue.spec.priority)

    async def _forward(self) -> None:
        queue = self.queue
        queue.wake.clear()
        if self._position is None:
            self._position = await self._find_position()
        got = await queue.read(self._position)
        if not got:
            self._turns.leave(self)
            await queue.expire()
            queue.counters.error = ""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10.0):  # the pace of looking for what is too old
                    await queue.wake.wait()
            return
        self._turns.want(self, queue.spec.priority)
        at = 0
        while at < len(got):
            at = await self._send(got, at)
        await queue.trim()

    async def _find_position(self) -> int:
        """Where to go on: behind what the hub's stream has of this queue."""
        self._to = ""
        first = await self.queue.read(1, 1)
        if not first:
            return 1
        cursor = await self._look(first[0][2].get(TO, self.queue.spec.stream))
        state = await self.queue.state()
        stamp: int | None = None
        if cursor is not None and state.first_seq <= cursor.seq <= state.last_seq:
            found = await self.queue.read(cursor.seq, 1)
            if found and found[0][0] == cursor.seq:
                stamp = stamp_of(found[0][2])
        self.queue.forget_delivered()
        return start_at(cursor, self.queue.lineage, int(state.first_seq), int(state.last_seq), stamp)

    async def _look(self, to: str) -> Cursor | None:
        """Reads what the hub's stream ``to`` has of this queue. Batches keep the stream that was declared when they
        were taken in, so a changed Export delivers what waits where it belongs, and nothing twice."""
        last = await self._bus.last_message(f"DATA_{to}", self.hub_subject(to), domain="hub", timeout=_ASK)
        cursor = Cursor.parse(last.headers.get(SRC, "")) if last else None
        if last is not None and cursor is not None and cursor.lineage == self.queue.lineage:
            sent, (full, age) = self.queue.sent, parse_lost(last.headers.get(LOST, ""))
            self.queue.sent = Sent(
                max(sent.total or 0, int(last.headers.get(TOTAL, 0))),
                max(sent.lost_full, full),
                max(sent.lost_age, age),
                sent.aged,
            )
        self._to = to
        self._has = Has(last.seq, cursor, last.headers.get(RUN, "")) if last else Has()
        return cursor

    async def _send(self, got: list[Message], at: int) -> int:
        """One hub message of as many batches from ``got[at:]`` as fit. Returns where the next begins."""
        queue = self.queue
        to = got[at][2].get(TO, queue.spec.stream)
        if to != self._to:
            await self._look(to)
        parcel = pack(
            got, at, stream=queue.spec.stream, lineage=queue.lineage, boot=queue.boot, has=self._has,
            sent=queue.sent, size=self._size, is_aged=queue.is_aged,
        )  # fmt: skip
        queue.sent = queue.sent._replace(aged=parcel.sent.aged)
        if parcel.parts and parcel.cursor is not None:
            await self._pass(parcel, parcel.cursor)
        queue.sent = parcel.sent
        queue.delivered(got[at : parcel.end])
        self._position = got[parcel.end - 1][0] + 1
        queue.count()
        return parcel.end

    async def _pass(self, parcel: Parcel, cursor: Cursor) -> None:
        """Brings a parcel to the hub, when it is this queue's turn."""
        queue, sent = self.queue, parcel.sent
        body = _encode(parcel.parts)
        wait = self._bucket.delay(clock.monotonic(), len(body))
        if wait:
            self._turns.leave(self)
            await asyncio.sleep(wait)  # the declared rate
            self._turns.want(self, queue.spec.priority)
        lost = f"{sent.lost_full},{sent.lost_age}"
        headers = {SRC: str(cursor), COUNT: str(len(parcel.parts)), TOTAL: str(sent.total), LOST: lost}
        if parcel.run:
            headers[RUN] = parcel.run
        async with self._turns.turn(queue.spec.priority):
            started = clock.monotonic()
            seq = await self._deliver(body, headers)
            self._took = clock.monotonic() - started
        self._size = batch_size(self._size, self._took, len(body))
        self._has = Has(seq, cursor, parcel.run)
        if self._failing:
            self._failing = False
            self._recovered()
        queue.counters.last_ack_at = clock.now()
        queue.counters.error = ""

    async def _deliver(self, body: bytes, headers: dict[str, str]) -> int:
        """Publishes and gives the sequence at the hub, once it is certain that the message is there.

        A receipt that was lost in a cut never comes. So while one is out the hub is asked what it has: the question
        goes the way that the batch went and cannot overtake it, and with the link down the local server says at once
        that nobody answers. Giving up too early costs one more try, never a second delivery: ``expect_last``.
        """
        subject = self.hub_subject(self._to)
        limit = ack_timeout(len(body))
        sent = asyncio.create_task(
            self._bus.publish_acked(subject, body, headers=headers, expect_last=self._has.seq, timeout=limit)
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
