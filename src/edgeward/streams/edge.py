"""The agent's side of Exports: for each one a queue of the outbox and a capture that fills it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError
from edgeward.core.outbox import Outbox, QueueSpec
from edgeward.core.quantity import parse_bytes, parse_duration
from edgeward.core.resource import Resource
from edgeward.streams.capture import Capture, wake_broker
from edgeward.streams.spec import ExportSpec

log = logging.getLogger("edgeward.streams")

Report = Callable[[str, str, dict[str, Any] | None], None]
_REPORT_EVERY = 5.0


def queue_spec(export: Resource) -> QueueSpec:
    """The queue that an Export needs."""
    spec: ExportSpec = export.spec
    return QueueSpec(
        name=f"{export.metadata.namespace}-{export.metadata.name}",
        stream=spec.to.hub.stream,
        priority=spec.priority,
        max_bytes=parse_bytes(spec.bounds.bytes),
        max_age=parse_duration(spec.bounds.age),
        on_full=spec.bounds.onFull,
        rate=float(parse_bytes(spec.rate)),
        keep_tail=spec.identityWindow if spec.identity else 0,
    )


class _Running(msgspec.Struct):
    spec: ExportSpec
    capture: Capture
    task: asyncio.Task[None] | None = None


class ExportsEdge:
    def __init__(self, bus: Bus, outbox: Outbox, *, mqtt: tuple[str, int, str, str], report: Report) -> None:
        self._bus, self._outbox, self._mqtt, self._report = bus, outbox, mqtt, report
        self._running: dict[tuple[str, str], _Running] = {}
        self._lock = asyncio.Lock()
        self._group: asyncio.TaskGroup | None = None
        self._broker_awake = False

    async def apply(self, exports: list[Resource]) -> None:
        """Makes captures and queues be what is desired. A removed Export's waiting readings go with it."""
        async with self._lock:
            wanted = {(e.metadata.namespace, e.metadata.name): e for e in exports}
            for key in [k for k in self._running if k not in wanted]:
                await self._end(key, forget=True)
                await self._outbox.drop(f"{key[0]}-{key[1]}")
                self._report(*key, None)
            for key, export in wanted.items():
                old = self._running.get(key)
                if old is not None and old.spec == export.spec:
                    continue
                try:
                    await self._begin(key, export)
                except EdgewardError as e:
                    log.warning("export %s/%s: %s", *key, e)
                    self._report(*key, {"state": "failed", "message": str(e)})

    async def _begin(self, key: tuple[str, str], export: Resource) -> None:
        if not self._broker_awake:
            await wake_broker(*self._mqtt)
            self._broker_awake = True
        await self._end(key, forget=False)
        spec: ExportSpec = export.spec
        queue = await self._outbox.open(queue_spec(export))
        capture = Capture(self._bus, queue, spec.source.mqtt, spec.identity, spec.identityWindow)
        await capture.open()
        running = _Running(spec, capture)
        self._running[key] = running
        if self._group is not None:
            running.task = self._group.create_task(capture.run())
        self._tell(key)

    async def _end(self, key: tuple[str, str], *, forget: bool) -> None:
        running = self._running.pop(key, None)
        if running is None:
            return
        if running.task is not None:
            running.task.cancel()
            await asyncio.gather(running.task, return_exceptions=True)
        await running.capture.close(forget=forget)

    async def run(self) -> None:
        """Captures until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for running in self._running.values():
                running.task = group.create_task(running.capture.run())
            try:
                while True:
                    await asyncio.sleep(_REPORT_EVERY)  # the period of reporting counters
                    for key in self._running:
                        self._tell(key)
            finally:
                self._group = None

    def _tell(self, key: tuple[str, str]) -> None:
        spec = self._running[key].spec
        counters = self._outbox.counters().get(f"{key[0]}-{key[1]}", {})
        exact = "exactly-once" if spec.identity else "at-least-once: no identity is declared"
        status = {
            "state": "capturing",
            "publisherToBroker": exact,
            "brokerToHub": "exactly-once",
            "accepted": counters.get("accepted", 0),
            "forwarded": counters.get("forwarded", 0),
            "pending": counters.get("pending", 0),
            "dropped": {
                "full": counters.get("dropped_full", 0),
                "age": counters.get("dropped_age", 0),
                "duplicate": counters.get("dropped_duplicate", 0),
            },
            "withoutIdentity": counters.get("no_identity", 0),
        }
        if counters.get("error"):
            status["message"] = counters["error"]
        self._report(*key, status)
