"""Durable, ordered, bounded delivery from a node to its hub, exactly once however long the link was cut.

All queues of a node: each is a stream of the node's own (``outqueue.py``), from which a mover (``mover.py``) brings
batches to the hub's streams, in strict priority among queues (``turns.py``). Here they are opened, run and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from typing import Any

import msgspec
import nats.errors
import nats.js.errors

from edgeward.core.bus import Bus
from edgeward.core.errors import Unreachable
from edgeward.core.mover import Mover
from edgeward.core.outqueue import Queue, QueueSpec
from edgeward.core.turns import Turns


class Outbox:
    """All queues of a node."""

    def __init__(self, bus: Bus, *, node: str) -> None:
        self._bus, self._node = bus, node
        self._turns = Turns()
        self._movers: dict[str, Mover] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        bus.on_reconnect(self._doubt)

    def _doubt(self) -> None:
        for mover in self._movers.values():
            mover.queue.wake.set()

    def kick(self) -> None:
        """The link is back: do not wait out a back-off's rest."""
        self._doubt()
        for mover in self._movers.values():
            mover.again.set()

    async def open(self, spec: QueueSpec) -> Queue:
        """The queue of this spec; an existing one is fitted to it."""
        old = self.get(spec.name)
        if old is not None and old.spec == spec:
            return old
        queue = Queue(spec, self._bus)
        mover = Mover(queue, self._bus, self._node, self._turns, self.kick)
        if old is not None:
            queue.counters = old.counters
            await self._stop(spec.name)
        await queue.open()
        self._movers[spec.name] = mover
        if self._group is not None:
            self._tasks[spec.name] = self._group.create_task(mover.run())
        return queue

    def get(self, name: str) -> Queue | None:
        mover = self._movers.get(name)
        return mover.queue if mover is not None else None

    async def _stop(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def drop(self, name: str) -> None:
        """Deletes a queue and what still waits in it."""
        await self._stop(name)
        if self._movers.pop(name, None) is not None:
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
            for name, mover in self._movers.items():
                self._tasks[name] = group.create_task(mover.run())
            try:
                await asyncio.Event().wait()
            finally:
                self._group = None

    def counters(self) -> dict[str, dict[str, Any]]:
        return {name: msgspec.structs.asdict(m.queue.counters) for name, m in self._movers.items()}
