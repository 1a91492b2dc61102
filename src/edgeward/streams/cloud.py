"""The hub's side of Exports: the streams that nodes deliver into, and reading them.

A stream keeps the last batch of every node and queue whatever its bounds, because that batch is the cursor of exactly
once (``core/delivery.py``); so its size is bounded by purges here, not by the server's limits, and a hard cap refuses
new batches (they wait at the nodes) rather than lose a cursor.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from edgeward.core import clock
from edgeward.core.delivery import SPAN
from edgeward.core.errors import Invalid, NotFound, Unreachable
from edgeward.core.jsread import read_batch
from edgeward.core.quantity import parse_bytes
from edgeward.core.resource import Resource, check_name
from edgeward.core.scope import NodeView, matches
from edgeward.streams.spec import HARD_CAP

log = logging.getLogger("edgeward.streams")

#: Seconds between two looks at what the streams hold.
TRIM_EVERY = 60.0
_BATCH = 64


def fold_export(export: Resource, nodes: list[Resource], reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """An Export's status: what each node says of its capture, and one phase: ``Pending`` (somebody is still to take it
    up), ``Flowing``, ``Refusing`` (full somewhere, and declared to refuse) or ``Failed``."""
    placed = []
    for n in nodes:
        if matches(export.spec.placement, NodeView(n.metadata.name, n.spec.site, (n.metadata.labels,))):
            placed.append(n)
    offline = {n.metadata.name for n in placed if not n.status.get("online")}
    silent = [n.metadata.name for n in placed if n.metadata.name not in reports]
    states = {n: str(r.get("state", "")) for n, r in reports.items()}
    messages = [f"{n}: {r['message']}" for n, r in sorted(reports.items()) if r.get("message")]
    phase = "Flowing"
    if "failed" in states.values():
        phase = "Failed"
    elif silent or not placed:
        phase = "Pending"
        messages.append(f"not heard from: {', '.join(sorted(silent))}" if silent else "no node matches the placement")
    elif "refusing" in states.values():
        phase = "Refusing"
    status: dict[str, Any] = {
        "phase": phase,
        "nodes": {n: {**r, "stale": True} if n in offline else dict(r) for n, r in sorted(reports.items())},
    }
    seen = [reports[n.metadata.name].get("observedGeneration") for n in placed if n.metadata.name in reports]
    if seen and all(isinstance(g, int) for g in seen):  # a node of the release before does not say it
        status["observedGeneration"] = min(int(g or 0) for g in seen)
    if messages:
        status["message"] = "; ".join(messages)
    return status


def _payload(data: bytes) -> Any:
    """JSON where it is JSON, else text, else base64."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


class StreamsCloud:
    def __init__(self, client: Client, *, replicas: int = 1) -> None:
        self._nc, self._replicas = client, replicas
        self._js = client.jetstream()

    async def ensure(self, export: Resource) -> None:
        """Makes the stream that an Export delivers into. Deleting the Export leaves it."""
        name = export.spec.to.hub.stream
        config = StreamConfig(
            name=f"DATA_{name}",
            subjects=[f"ew.data.{name}.>"],
            storage=StorageType.FILE,
            num_replicas=self._replicas,
            discard=DiscardPolicy.NEW,
            max_bytes=HARD_CAP,
            allow_direct=True,
            duplicate_window=0.1,
        )
        try:
            try:
                await self._js.stream_info(f"DATA_{name}")
            except nats.js.errors.NotFoundError:
                await self._js.add_stream(config)
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"stream {name} cannot be made: {e or type(e).__name__}") from e

    async def list(self) -> list[dict[str, Any]]:
        found = []
        try:
            for info in await self._js.streams_info():
                full = info.config.name or ""
                if not full.startswith("DATA_"):
                    continue
                name = full.removeprefix("DATA_")
                found.append({"name": name, "batches": info.state.messages, "bytes": info.state.bytes})
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the hub's nats-server does not answer ({type(e).__name__})") from e
        return sorted(found, key=lambda s: str(s["name"]))

    async def reader(self, name: str, start: int = 0, *, follow: bool = False) -> AsyncIterator[dict[str, Any]]:
        """The stream's messages from number ``start`` on. Raises ``NotFound`` before the first one is asked for."""
        check_name(name, "stream")
        try:
            await self._js.stream_info(f"DATA_{name}")
        except nats.js.errors.NotFoundError:
            raise NotFound(
                "there is no such stream",
                resource=f"stream/{name}",
                remedy="an Export makes it; see: edgeward stream list",
            ) from None
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the hub's nats-server does not answer ({type(e).__name__})") from e
        if start < 0:
            raise Invalid("is negative", field="?from", remedy="0 reads all")
        return self._read(name, start, follow)

    async def _read(self, name: str, start: int, follow: bool) -> AsyncIterator[dict[str, Any]]:
        at = max(1, start // SPAN)
        news = asyncio.Event()
        sub = None
        if follow:

            async def woken(_: object) -> None:
                news.set()

            sub = await self._nc.subscribe(f"ew.data.{name}.>", cb=woken)
        try:
            while True:
                news.clear()
                got = await read_batch(self._nc, "$JS.API", f"DATA_{name}", at, f"ew.data.{name}.>", _BATCH)
                for seq, subject, _, data in got:
                    node = subject.split(".")[3]
                    for index, (topic, payload, ms) in enumerate(msgspec.msgpack.decode(data)):
                        number = seq * SPAN + index
                        if number < start:
                            continue
                        yield {
                            "seq": number,
                            "node": node,
                            "topic": topic,
                            "payload": _payload(payload),
                            "time": clock.timestamp(ms / 1000),
                        }
                    at = seq + 1
                if got:  # a short answer is no end: the server also cuts at max_bytes
                    continue
                if not follow:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5.0):  # a lost wake-up costs at most this
                        await news.wait()
        finally:
            if sub is not None:
                with contextlib.suppress(nats.errors.Error):
                    await sub.unsubscribe()

    async def keep(self, exports: Callable[[], Iterable[Resource]]) -> None:
        """Holds every stream that Exports name to the most that one of them declares; until cancelled."""
        while True:
            wanted: dict[str, int] = {}
            for export in exports():
                target = export.spec.to.hub
                wanted[target.stream] = max(wanted.get(target.stream, 0), parse_bytes(target.keep))
            for name, size in wanted.items():
                try:
                    gone = await self.trim(name, size)
                    if gone:
                        log.info("stream %s: the oldest %d batches went, it keeps %d bytes", name, gone, size)
                except nats.js.errors.NotFoundError:
                    continue
                except (nats.errors.Error, TimeoutError) as e:
                    log.warning("stream %s could not be trimmed: %s", name, e or type(e).__name__)
            await asyncio.sleep(TRIM_EVERY)  # the period of looking

    async def trim(self, name: str, keep_bytes: int) -> int:
        """Takes the oldest away until about ``keep_bytes`` are left; each queue's last batch stays. Gives how many."""
        info = await self._js.stream_info(f"DATA_{name}", subjects_filter=f"ew.data.{name}.>")
        if info.state.bytes <= keep_bytes or not info.state.messages:
            return 0
        share = 1 - keep_bytes / info.state.bytes
        upto = info.state.first_seq + int((info.state.last_seq - info.state.first_seq) * share)
        before = info.state.messages
        for subject in info.state.subjects or {}:
            last = await self._js.get_last_msg(f"DATA_{name}", subject)
            # up to, not with: the last one is the queue's cursor
            await self._js.purge_stream(f"DATA_{name}", subject=subject, seq=min(upto, int(last.seq or 0)))
        after = (await self._js.stream_info(f"DATA_{name}")).state.messages
        return int(before - after)
