"""Who leads: one holder of a name among hub processes, without trusting anybody's clock.

Pure part (:class:`Lease`): what was seen of the record and when goes in, *wait*, *take* or *renew* comes out. A holder
writes the record again every ``renew`` seconds; whoever has not seen it change for ``ttl`` seconds *of its own clock*
may take it, by a write that names the revision it saw, so of two takers one is refused. A holder leads only until
``ttl - margin`` after the *start* of its last successful write, so it has stopped before another may begin. Shell part
(:class:`Leadership`): the record lies in a JetStream stream in memory, with the replicas of the hub's other streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import StorageType, StreamConfig

from edgeward.core import clock
from edgeward.core.bus import EXPECT_LAST, cancellable

log = logging.getLogger("edgeward.lease")

TTL, RENEW, MARGIN = 4.0, 1.0, 1.0
_STREAM = "HUB_LEASES"
_CALL = 1.5

Step = Literal["wait", "take", "renew"]


class Record(msgspec.Struct, array_like=True):
    """``turn`` changes with every write, so that a renewal is seen."""

    holder: str
    turn: int


class Lease(msgspec.Struct):
    """What one process knows of the lease."""

    me: str
    ttl: float = TTL
    renew: float = RENEW
    margin: float = MARGIN
    holder: str = ""
    revision: int = 0
    #: When the record was last seen to have changed (monotonic seconds).
    changed: float = float("-inf")
    #: When our last successful write was begun.
    held: float = float("-inf")

    def saw(self, now: float, record: Record | None, revision: int) -> None:
        """The record was read: it is at ``revision`` (0: there is none)."""
        if revision != self.revision or self.changed == float("-inf"):
            self.revision, self.changed = revision, now
        self.holder = record.holder if record is not None else ""
        if self.holder != self.me:
            self.held = float("-inf")

    def wrote(self, begun: float, revision: int) -> None:
        """Our write, begun at ``begun``, was taken."""
        self.holder, self.revision, self.changed, self.held = self.me, revision, begun, begun

    def failed(self) -> None:
        """Our write was refused: somebody else wrote."""
        self.held = float("-inf")

    def step(self, now: float) -> Step:
        if self.holder == self.me:
            # also after a restart of this very process: nobody else may have it
            return "renew" if now - self.held >= self.renew else "wait"
        if not self.holder or now - self.changed >= self.ttl:
            return "take"
        return "wait"

    def leads(self, now: float) -> bool:
        return self.holder == self.me and now - self.held < self.ttl - self.margin


class Leadership:
    """Runs work in the one process that leads."""

    def __init__(self, client: Client, name: str, me: str, *, replicas: int = 1, ttl: float = TTL) -> None:
        """``me``: the same again after a restart of this process, and nobody else's."""
        self._nc, self._js = client, client.jetstream(timeout=_CALL)
        self._subject = f"hub.lease.{name}"
        self._replicas = replicas
        self.lease = Lease(me, ttl=ttl, renew=ttl / 4, margin=ttl / 4)
        self._turn = 0

    @property
    def leads(self) -> bool:
        return self.lease.leads(clock.monotonic())

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """``work`` runs while this process leads, is cancelled when that ends and begun again when it comes back."""
        task: asyncio.Task[None] | None = None
        try:
            while True:
                with contextlib.suppress(nats.errors.Error, TimeoutError):
                    await self._turn_over()
                if self.leads and task is None:
                    log.info("%s leads", self.lease.me)
                    task = asyncio.ensure_future(work())
                elif not self.leads and task is not None:
                    log.warning("%s leads no more", self.lease.me)
                    await _end(task)
                    task = None
                if task is not None and task.done():
                    await task  # its failure is ours
                    task = None
                await asyncio.sleep(self.lease.renew / 4)  # the period of looking
        finally:
            if task is not None:
                await _end(task)

    async def resign(self) -> None:
        """Lets another take it at once: at an orderly end."""
        if self.lease.holder != self.lease.me:
            return
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await self._write("")
        self.lease.failed()

    async def _turn_over(self) -> None:
        if self.lease.step(clock.monotonic()) == "renew":
            await self._write(self.lease.me)
            return
        await self._look()
        if self.lease.step(clock.monotonic()) == "take":
            await self._write(self.lease.me)

    async def _look(self) -> None:
        try:
            msg = await cancellable(self._js.get_last_msg(_STREAM, self._subject))
        except nats.js.errors.NotFoundError as e:
            if e.err_code == 10059:  # JSStreamNotFoundErr
                await self._make()
            self.lease.saw(clock.monotonic(), None, 0)
            return
        record = msgspec.msgpack.decode(msg.data or b"", type=Record)
        self.lease.saw(clock.monotonic(), record, int(msg.seq or 0))

    async def _make(self) -> None:
        config = StreamConfig(
            name=_STREAM,
            subjects=["hub.lease.*"],
            max_msgs_per_subject=1,
            storage=StorageType.MEMORY,
            num_replicas=self._replicas,
            allow_direct=False,  # the leader's word, not a replica's memory of it
        )
        await cancellable(self._js.add_stream(config))

    async def _write(self, holder: str) -> None:
        begun = clock.monotonic()
        self._turn += 1
        data = msgspec.msgpack.encode(Record(holder, self._turn))
        headers = {EXPECT_LAST: str(self.lease.revision)}
        try:
            ack = await cancellable(self._js.publish(self._subject, data, timeout=_CALL, headers=headers))
        except nats.js.errors.APIError:
            self.lease.failed()
            await self._look()
            return
        self.lease.wrote(begun, ack.seq)
        if not holder:
            self.lease.holder = ""


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
