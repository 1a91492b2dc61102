"""The agent's side of Exports: for each one a queue of the outbox and a capture that fills it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
import nats.js.errors

from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.files import ensure_dir
from edgeward.core.mqtt import wake_broker
from edgeward.core.outbox import Outbox
from edgeward.core.outqueue import QueueSpec
from edgeward.core.quantity import parse_bytes, parse_duration
from edgeward.core.resource import Resource
from edgeward.core.topics import filters
from edgeward.streams.capture import STREAM, Capture
from edgeward.streams.pace import Pace
from edgeward.streams.refusal import closable, is_full
from edgeward.streams.spec import ExportSpec
from edgeward.streams.turnstile import Turnstile

log = logging.getLogger("edgeward.streams")

Report = Callable[[str, str, dict[str, Any] | None], None]
Event = Callable[[str, str, str, str, str, str], None]
_REPORT_EVERY = 5.0
#: While publishers are refused it is looked this often whether there is room again.
_LOOK_EVERY = 1.0
_PREFIX = "export_"


def queue_name(namespace: str, name: str) -> str:
    """Names have no underscore, so no two Exports share a queue."""
    return f"{_PREFIX}{namespace}_{name}"


def queue_spec(export: Resource) -> QueueSpec:
    """The queue that an Export needs."""
    spec: ExportSpec = export.spec
    return QueueSpec(
        name=queue_name(export.metadata.namespace, export.metadata.name),
        stream=spec.to.hub.stream,
        priority=spec.priority,
        max_bytes=parse_bytes(spec.bounds.bytes),
        max_age=parse_duration(spec.bounds.age),
        on_full=spec.bounds.onFull,
        rate=float(parse_bytes(spec.rate)),
        trim_every=spec.identityWindow // 4 if spec.identity else 0,
    )


class _Running(msgspec.Struct):
    spec: ExportSpec
    capture: Capture
    #: Of the Export that is in force.
    generation: int = 0
    task: asyncio.Task[None] | None = None
    #: Its bounds are reached and it is to refuse.
    full: bool = False

    @property
    def subjects(self) -> list[str]:
        return filters(self.spec.source.mqtt)


class ExportsEdge:
    def __init__(
        self,
        bus: Bus,
        outbox: Outbox,
        *,
        data: Path,
        mqtt: tuple[str, int, str, str],
        report: Report,
        quota: Callable[[str], float] = lambda _: 0.0,
        turnstile: Turnstile | None = None,
        event: Event = lambda *_: None,
    ) -> None:
        """``data``: a directory of its own, for what must survive a kill. ``quota``: readings a second by namespace.
        ``event`` gets type, reason, message, namespace, name, kind."""
        self._turnstile, self._event = turnstile or Turnstile(bus), event
        self._look = asyncio.Event()
        #: What is desired was said once: before, nobody knows what may be opened again.
        self._told = False
        self._quota = quota
        self._paces: dict[str, Pace] = {}
        self._data = ensure_dir(data)
        self._bus, self._outbox, self._mqtt, self._report = bus, outbox, mqtt, report
        self._running: dict[tuple[str, str], _Running] = {}
        self._lock = asyncio.Lock()
        self._group: asyncio.TaskGroup | None = None
        self._broker_awake = False
        self._failed: dict[tuple[str, str], Resource] = {}

    async def apply(self, exports: list[Resource]) -> None:
        """Makes captures and queues be what is desired. A removed Export's waiting readings go with it."""
        async with self._lock:
            wanted = {(e.metadata.namespace, e.metadata.name): e for e in exports}
            for key in [k for k in self._running if k not in wanted]:
                await self._end(key, forget=True)
                await self._outbox.drop(queue_name(*key))
                self._report(*key, None)
            self._failed.clear()
            for key, export in wanted.items():
                old = self._running.get(key)
                if old is not None and old.spec == export.spec:
                    old.generation = export.metadata.generation
                    continue
                await self._try(key, export)
            self._told = True
            self._look.set()  # a refusal may have gone with its Export

    async def _try(self, key: tuple[str, str], export: Resource) -> None:
        """Begins; what fails is tried again with the next report."""
        try:
            await self._begin(key, export)
        except EdgewardError as e:
            log.warning("export %s/%s: %s", *key, e)
            self._report(*key, {"state": "failed", "observedGeneration": export.metadata.generation, "message": str(e)})
            self._failed[key] = export

    async def prune(self, exports: list[Resource]) -> None:
        """Takes away what Exports left that were removed while the agent was down: a consumer that nobody reads would
        make the broker keep every message. To be called when ``exports`` is what the hub really wants."""
        keep = {queue_name(e.metadata.namespace, e.metadata.name) for e in exports}
        for name in await self._outbox.prune(_PREFIX, keep):
            log.info("queue %s: its Export is gone, it was removed", name)
        for path in self._data.glob(f"{_PREFIX}*.window"):
            if path.stem not in keep:
                path.unlink(missing_ok=True)
        js = self._bus.jetstream()
        try:
            found = [c.name for c in await js.consumers_info(STREAM)]
            for consumer in found:
                if consumer.startswith(f"ew-{_PREFIX}") and consumer.removeprefix("ew-") not in keep:
                    await js.delete_consumer(STREAM, consumer)
        except nats.js.errors.NotFoundError:
            return  # no MQTT client ever came
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the node's nats-server does not answer ({type(e).__name__})") from e

    async def _begin(self, key: tuple[str, str], export: Resource) -> None:
        if not self._broker_awake:
            await wake_broker(*self._mqtt)
            self._broker_awake = True
        await self._end(key, forget=False)
        spec: ExportSpec = export.spec
        queue = await self._outbox.open(queue_spec(export))
        capture = Capture(self._bus, queue, spec.source.mqtt, spec.identity, spec.identityWindow,
                          self._data / f"{queue.spec.name}.window", self._pace(key[0]))  # fmt: skip
        capture.on_blocked = self._look.set
        try:
            await capture.open()
        except EdgewardError:
            await capture.close(forget=False)
            raise
        # what an earlier run closed stays so until it is known that there is room
        running = _Running(
            spec, capture, export.metadata.generation, full=self._turnstile.closed.issuperset(filters(spec.source.mqtt))
        )
        self._running[key] = running
        if self._group is not None:
            running.task = self._group.create_task(capture.run())
        self._tell(key)

    def _pace(self, namespace: str) -> Pace:
        """All Exports of a namespace share one."""
        if namespace not in self._paces:
            self._paces[namespace] = Pace(lambda: self._quota(namespace), asyncio.get_running_loop().time)
        return self._paces[namespace]

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
            self._look.set()
            try:
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK_EVERY if self._turnstile.closed else _REPORT_EVERY):
                            await self._look.wait()
                    self._look.clear()
                    await self._round()
            finally:
                self._group = None

    async def _round(self) -> None:
        """Tries again what failed, measures, refuses and reports."""
        if self._failed:
            async with self._lock:
                failed, self._failed = self._failed, {}
                for key, export in failed.items():
                    await self._try(key, export)
        measured = set()
        for key in tuple(self._running):
            queue = self._outbox.get(queue_name(*key))
            if queue is not None:
                with contextlib.suppress(EdgewardError):  # it says what it knew last
                    await queue.measure()
                    measured.add(key)
        if self._told:
            await self._refuse(measured)
        for key in tuple(self._running):
            self._tell(key)

    async def _refuse(self, measured: set[tuple[str, str]]) -> None:
        """Has the broker take no more for the Exports that are full, and take more again for those of which it was just
        ``measured`` that they are not."""
        # of one that cannot be begun just now nobody knows whether it is full
        unknown = {subject for export in self._failed.values() for subject in filters(export.spec.source.mqtt)}
        wanted = unknown & self._turnstile.closed
        for key, running in self._running.items():
            queue = self._outbox.get(queue_name(*key))
            if running.spec.bounds.onFull != "refuse" or queue is None:
                running.full = False
                continue
            waiting = queue.counters.pending_bytes
            full = is_full(running.full, running.capture.blocked, waiting, queue.spec.max_bytes)
            full |= running.full and key not in measured
            if full != running.full and closable(running.subjects):
                topic = running.spec.source.mqtt
                if full:
                    said = f"its bounds are full: the broker of this node takes no more on {topic}"
                    self._event("Warning", "ExportRefuses", said, *key, "Export")
                else:
                    self._event("Normal", "ExportTakes", f"the broker takes {topic} again", *key, "Export")
            running.full = full
            if full and closable(running.subjects):
                wanted |= set(running.subjects)
        try:
            if await self._turnstile.set(wanted):
                log.info("the broker takes nothing on: %s", ", ".join(sorted(wanted)) or "(all open)")
        except EdgewardError as e:
            log.warning("the broker cannot be told what to refuse: %s", e)

    def _tell(self, key: tuple[str, str]) -> None:
        running = self._running.get(key)
        if running is None:
            return
        spec = running.spec
        counters = self._outbox.counters().get(queue_name(*key), {})
        exact = "exactly-once" if spec.identity else "at-least-once: no identity is declared"
        status = {
            "state": "capturing",
            "observedGeneration": running.generation,
            "publisherToBroker": exact,
            "brokerToHub": "exactly-once",
            "accepted": counters.get("accepted", 0),
            "forwarded": counters.get("forwarded", 0),
            "pending": counters.get("pending", 0),
            "dropped": {
                "full": counters.get("dropped_full", 0),
                "age": counters.get("dropped_age", 0),
                "duplicate": counters.get("dropped_duplicate", 0),
                "size": counters.get("dropped_size", 0),
            },
            "withoutIdentity": counters.get("no_identity", 0),
        }
        if counters.get("error"):
            status["message"] = counters["error"]
        if running.full:
            if self._turnstile.closed.issuperset(running.subjects):
                status["state"] = "refusing"
                said = "full: QoS 1 is not acknowledged, QoS 0 dropped, and QoS 2 refused on all topics of this node"
            elif closable(running.subjects):
                said = "full: the broker is being told to take no more"
            else:
                said = "full, and the broker keeps more up to its own 4 GiB: it cannot refuse such a filter"
            status["message"] = said
        self._report(*key, status)
