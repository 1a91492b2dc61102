"""A hub with two sites on a real nats-server, and a way to speak as one of its nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core import clock
from edgeward.core.audit import Audit
from edgeward.core.bus import Bus
from edgeward.core.identity import HubIdentity
from edgeward.core.natsserver import HubSpec, NatsServer
from edgeward.core.peers import Peers
from edgeward.core.records import StreamRecords
from edgeward.core.resource import Key, Resource, decode, to_stored
from edgeward.core.resources import Resources
from edgeward.core.store_nats import NatsStore
from edgeward.hub.kinds import load
from edgeward.nodes.cloud import NodesCloud
from edgeward.nodes.wire import (
    LEVEL,
    Decided,
    LocalChange,
    PushAnswer,
    PushAsk,
    SyncAnswer,
    SyncAsk,
)

load()


def doc(kind: str, name: str, spec: dict[str, Any], **meta: Any) -> Resource:
    return decode({"apiVersion": "edgeward/v1", "kind": kind, "metadata": {"name": name, **meta}, "spec": spec})


def app(name: str, site: str = "", config: str = "", **more: Any) -> Resource:
    spec: dict[str, Any] = {"process": {"command": ["true"]}, "placement": {"site": site} if site else {}}
    if config:
        spec["envFrom"] = [{"config": config}]
    return doc("App", name, spec | more)


def config(name: str, value: str, **meta: Any) -> Resource:
    return doc("Config", name, {"data": {"k": value}}, **meta)


class Fleet:
    """A hub with the sites plant (plant-1, plant-2) and shop (shop-1), and a way to speak as one of its nodes."""

    def __init__(
        self,
        server: NatsServer,
        identity: HubIdentity,
        hub: Bus,
        resources: Resources,
        records: StreamRecords,
        nodes: NodesCloud,
        write: Any,
    ) -> None:
        self.server, self.identity, self.hub, self.resources = server, identity, hub, resources
        self.store, self.records, self.nodes, self.write = resources.store, records, nodes, write
        self._buses: dict[str, Bus] = {}
        self._seq = 0

    async def bus(self, node: str) -> Bus:
        if node not in self._buses:
            inbox = f"_INBOX_{node}"
            self._buses[node] = await Bus.connect(
                self.server.url, name=node, user=self.identity.user, inbox=inbox, timeout=60
            )
        return self._buses[node]

    async def ask(self, node: str, verb: str, what: Any, answer: Any) -> Any:
        data = what if isinstance(what, bytes) else msgspec.msgpack.encode(what)
        msg = await (await self.bus(node)).request(f"ew.hub.{verb}.{node}", data, timeout=30)
        return msgspec.msgpack.decode(msg.data, type=answer)

    async def sync(self, node: str, since: int = 0, epoch: str = "", level: int = LEVEL) -> SyncAnswer:
        """All pages as one."""
        ask = SyncAsk(since, epoch, level=level)
        got: SyncAnswer | None = None
        while True:
            page = await self.ask(node, "sync", ask, SyncAnswer)
            assert not page.error, page.error
            if got is not None:
                page.objects = got.objects + page.objects
            got = page
            if not page.more:
                return page
            last = page.objects[-1].key
            ask.after = (last.kind, last.namespace, last.name)

    async def push(self, node: str, local: Resource | Key, base: int = 0, at: float | None = None) -> Decided:
        self._seq += 1
        key, stored = (local, None) if isinstance(local, Key) else (local.key, to_stored(local))
        op = "put" if stored else "delete"
        at = clock.now() if at is None else at
        change = LocalChange(self._seq, key.kind, key.namespace, key.name, op, base, at, "ann", stored)
        answer = await self.ask(node, "push", PushAsk("replica", [change]), PushAnswer)
        assert not answer.error, answer.error
        (decided,) = answer.decided
        assert decided.seq == self._seq
        return decided  # type: ignore[no-any-return]

    def journal(self) -> list[tuple[str, str]]:
        return [(r["resource"], r["outcome"]) for r in self.records.items("journal")]

    async def close(self) -> None:
        for bus in self._buses.values():
            await bus.close()


@asynccontextmanager
async def another(f: Fleet, name: str) -> AsyncIterator[tuple[NodesCloud, Peers]]:
    """One more hub process beside the fleet's, as far as nodes are concerned."""
    bus = await Bus.connect(f.server.url, name=name, user=f.identity.user)
    tasks: list[asyncio.Task[None]] = []
    try:
        store = NatsStore(bus.client)
        await store.open()
        records = StreamRecords(bus.client)
        await records.open()
        peers = Peers(bus, name)
        await peers.open()
        nodes = NodesCloud(store, bus, records, f.write, peers)
        await nodes.open()
        for live in nodes._live.values():
            live.down_after = 3600.0
        tasks = [asyncio.create_task(work()) for work in (store.run, records.run, peers.run, nodes.run)]
        yield nodes, peers
        assert not any(t.done() for t in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await bus.close()


@asynccontextmanager
async def fleet(folder: Path, patience: float = 240, serve: bool = True) -> AsyncIterator[Fleet]:
    """``serve`` False: no hub process serves nodes yet; see :func:`another`."""
    identity = HubIdentity.open(folder / "identity")
    server = NatsServer(folder / "nats", HubSpec(identity.operator_jwt, identity.system_account, identity.accounts))
    await server.start()
    tasks: list[asyncio.Task[None]] = []
    try:
        bus = await Bus.connect(server.url, name="hub", user=identity.user, timeout=60)
        store = NatsStore(bus.client)
        await store.open()
        records = StreamRecords(bus.client)
        await records.open()
        resources = Resources(store, Audit())

        async def write(resource: Resource | None, key: Key, expect: int, actor: str) -> None:
            if resource is None:
                await resources.delete(key, expect=expect or None, actor=actor)
            elif expect:
                await resources.replace(resource, expect=expect, actor=actor)
            else:
                await resources.create(resource, actor=actor)

        for site in ("plant", "shop"):
            await store.put(doc("Site", site, {}))
        for node in ("plant-1", "plant-2", "shop-1"):
            await store.put(doc("Node", node, {"site": node.split("-")[0]}, labels={"n": node[-1]}))
        nodes = NodesCloud(store, bus, records, write)
        works = [store.run, records.run]
        if serve:
            await nodes.open()
            works.append(nodes.run)
            for live in nodes._live.values():
                live.down_after = 3600.0  # the silence of a slow machine is no node's end; test_liveness has the rule
        f = Fleet(server, identity, bus, resources, records, nodes, write)
        tasks = [asyncio.create_task(work()) for work in works]
        async with asyncio.timeout(patience):
            yield f
        assert not any(t.done() for t in tasks)
        await f.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await bus.close()
    finally:
        for task in tasks:
            task.cancel()
        await server.stop()
