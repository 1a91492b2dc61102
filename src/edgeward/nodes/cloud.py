"""The hub's side of the nodes: sync, local changes, reports, beats.

Requests of nodes come in on ``ew.hub.*.<node>``, answered from the store; changes of the store go out as pokes to the
nodes that they concern. A node only ever gets its own view (``core/scope.py``) and only ever speaks for itself: its
name is the subject's last part, which NATS lets no other node use. Nothing here knows what an App is: each kind
registers how reports become its status (``fold/<Kind>`` in the registry).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
from nats.aio.msg import Msg

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import Conflict, EdgewardError, Invalid
from edgeward.core.reconcile import Loop
from edgeward.core.records import Records
from edgeward.core.registry import extensions, kinds, redact
from edgeward.core.resource import (
    CLUSTER,
    Key,
    Metadata,
    OwnerReference,
    Resource,
    from_stored,
    make_patch,
    to_stored,
)
from edgeward.core.scope import NodeView, check_reach, fingerprint, placed_sites, view
from edgeward.core.store import same_desired
from edgeward.core.store_nats import NatsStore
from edgeward.nodes.ancestry import Ancestor, base_now
from edgeward.nodes.liveness import BEAT, Liveness
from edgeward.nodes.merge import Side, decide
from edgeward.nodes.wire import (
    BeatAnswer,
    BeatAsk,
    Decided,
    HubObject,
    LocalChange,
    Ok,
    PushAnswer,
    PushAsk,
    ReportAsk,
    SyncAnswer,
    SyncAsk,
)

log = logging.getLogger("edgeward.nodes")

T = TypeVar("T")
#: One page of a sync, in bytes of encoded objects.
PAGE = 512 * 1024
#: Changes of a node whose outcome is remembered, in case the answer is lost; a push has at most 50.
_REMEMBERED = 256
#: Kinds whose status is made at the hub and needed at the nodes.
_STATUS_DOWN = ("Service", "Site", "Node")

Fold = Callable[[Resource, list[Resource], Mapping[str, dict[str, Any]]], dict[str, Any]]


class NodesCloud:
    """Serves the fleet of one hub process."""

    def __init__(self, store: NatsStore, bus: Bus, records: Records, write: Callable[..., Any]) -> None:
        self._store = store
        self._bus = bus
        self._records = records
        #: ``await write(resource | None, key, expect, actor)``: a validated write (the hub's Resources).
        self._write = write
        self.run_id = clock.new_id(12)
        self._live: dict[str, Liveness] = {}
        self._runs: dict[str, str] = {}
        #: node -> "Kind/ns/name" -> reported status
        self._reports: dict[str, dict[str, dict[str, Any]]] = {}
        self._node_reports: dict[str, dict[str, Any]] = {}
        #: node -> [store id, last seq] of its events that were taken over
        self._event_seq: dict[str, tuple[str, int]] = {}
        self._fold: Loop[Key] = Loop("fold", self._fold_status)
        self._persist: Loop[str] = Loop("persist", self._persist_report)
        self._node_status: Loop[str] = Loop("node-status", self._write_node_status)
        self._pushing: dict[str, asyncio.Lock] = {}
        #: The stores that this one was restored from.
        self._line: list[Ancestor] = []

    # -- life ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        self._line = msgspec.json.decode(self._store.fact("line") or b"[]", type=list[Ancestor])
        for node in self._store.items("Node"):
            saved = self._store.fact(f"report.{node.metadata.name}")
            if saved:
                doc = msgspec.json.decode(saved)
                self._reports[node.metadata.name] = doc.get("statuses", {})
                self._node_reports[node.metadata.name] = doc.get("node", {})
                self._event_seq[node.metadata.name] = tuple(doc.get("events") or ("", 0))
            # the last state known stands until the node is heard of, or stays silent for long enough
            live = self._live[node.metadata.name] = Liveness()
            live.online = bool(node.status.get("online"))
            live.heard = live.since = clock.monotonic()
        handlers: list[tuple[str, Callable[[str, bytes], Any]]] = [
            ("sync", self._on_sync),
            ("push", self._on_push),
            ("report", self._on_report),
            ("beat", self._on_beat),
        ]
        for verb, handler in handlers:
            # the node's name is token 3; the answer goes to that node's inbox and nowhere else
            await self._bus.serve(f"ew.hub.{verb}.*", self._answer(handler), node_token=3, queue="hub")

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._fold.run())
            group.create_task(self._persist.run())
            group.create_task(self._node_status.run())
            group.create_task(self._watch())
            group.create_task(self._tick())

    def _answer(self, handler: Callable[[str, bytes], Any]) -> Callable[[Msg], Any]:
        async def answer(msg: Msg) -> bytes:
            node = msg.subject.rsplit(".", 1)[1]
            try:
                async with asyncio.timeout(30):
                    reply = await handler(node, msg.data)
            except (EdgewardError, msgspec.DecodeError, TimeoutError) as e:
                log.warning("%s of node %s failed: %s", msg.subject, node, e or type(e).__name__)
                reply = Ok(error=str(e) or type(e).__name__)
            return msgspec.msgpack.encode(reply)

        return answer

    def _node(self, name: str) -> Resource:
        node = self._store.find(Key("Node", CLUSTER, name))
        if node is None:
            raise Invalid("the hub knows no such node", resource=f"Node/{name}", remedy="enrol it again")
        return node

    def node_view(self, name: str) -> NodeView:
        site = self._node(name).spec.site
        labels = tuple(n.metadata.labels for n in self._store.items("Node") if n.spec.site == site)
        return NodeView(name, site, labels)

    def is_online(self, node: str) -> bool:
        live = self._live.get(node)
        return bool(live and live.online)

    # -- sync ---------------------------------------------------------------------------------------------------------

    def _object(self, key: Key, resource: Resource | None, revision: int) -> HubObject:
        if resource is None:
            return HubObject(key.kind, key.namespace, key.name, revision)
        status = resource.status if key.kind in _STATUS_DOWN and resource.status else None
        return HubObject(key.kind, key.namespace, key.name, revision, to_stored(resource), status)

    async def _on_sync(self, node: str, data: bytes) -> SyncAnswer:
        ask = msgspec.msgpack.decode(data, type=SyncAsk)
        now = self._store.revision
        mine = view(self.node_view(node), self._store.all())
        full = ask.epoch != self._store.epoch or ask.since < self._store.compacted or ask.since > now or ask.since == 0
        objects: list[HubObject] = []
        with self._store.watch(0 if full else ask.since) as subscription:
            changed = subscription.backlog()
        for change in changed:
            if change.key in mine:
                if full or not change.status_only or change.key.kind in _STATUS_DOWN:
                    entry = self._store.entry(change.key)
                    objects.append(self._object(change.key, change.resource, entry.revision if entry else 0))
            elif not full and not change.status_only:
                # it may have been in this view before; a status moves nothing out of it
                objects.append(self._object(change.key, None, change.revision))
        if not full:
            named = {o.key for o in objects}
            for o in list(objects):  # what a new App uses may be older than the App
                if o.stored is None:
                    continue
                for ref in kinds.get(o.kind).refs(mine[o.key]):
                    key = Key(ref.kind, ref.namespace, ref.name)
                    if key in mine and key not in named:
                        named.add(key)
                        objects.append(self._object(key, mine[key], mine[key].revision))
        objects.sort(key=lambda o: o.key)
        if ask.after is not None:
            behind = Key(*ask.after)
            objects = [o for o in objects if o.key > behind]
        page: list[HubObject] = []
        size = 0
        for o in objects:
            size += len(msgspec.msgpack.encode(o))
            if page and size > PAGE:
                break
            page.append(o)
        more = len(page) < len(objects)
        print_ = "" if more else fingerprint((k, r.revision) for k, r in mine.items())
        line = self._line if ask.epoch != self._store.epoch else []
        return SyncAnswer(self._store.epoch, now, full, page, more, print_, line=line)

    async def _watch(self) -> None:
        """Pokes the nodes that a change concerns."""
        while True:
            try:
                with self._store.watch() as changes:
                    async for change in changes:
                        key = change.key
                        if change.status_only and key.kind not in _STATUS_DOWN:
                            continue
                        if key.kind == "Node" and change.resource is not None and key.name not in self._live:
                            self._live[key.name] = Liveness(heard=clock.monotonic(), since=clock.monotonic())
                        if key.kind == "Node" and change.resource is None:
                            self._forget(key.name)
                        if change.resource is not None and not change.status_only and self._folds(key.kind):
                            self._fold.add(key)
                        await self._poke(change.resource, key)
            except EdgewardError as e:
                log.info("watch starts anew: %s", e)
                for node in self._live:
                    await self._poke_node(node)

    @staticmethod
    def _folds(kind: str) -> bool:
        return kind in extensions.names("fold")

    async def _poke(self, resource: Resource | None, key: Key) -> None:
        site = ""
        if resource is not None:
            site = str(getattr(resource.spec, "site", "") or "") or placed_sites(resource)
            if kinds.get(key.kind).scope == "hub":
                return
        for node in self._live:
            if site:
                known = self._store.find(Key("Node", CLUSTER, node))
                if known is not None and known.spec.site != site:
                    # it may have left that other site; the next beat's revision tells that node, without hurry
                    continue
            await self._poke_node(node)

    async def _poke_node(self, node: str) -> None:
        if self.is_online(node):
            with contextlib.suppress(EdgewardError):
                await self._bus.publish(f"ew.node.{node}.poke", str(self._store.revision).encode())

    def _forget(self, node: str) -> None:
        for known in (self._live, self._reports, self._node_reports, self._event_seq, self._runs):
            known.pop(node, None)
        for kind in extensions.names("fold"):
            for r in self._store.items(kind):
                self._fold.add(r.key)

    # -- local changes of a site -----------------------------------------------------------------------------------

    async def _on_push(self, node: str, data: bytes) -> PushAnswer:
        ask = msgspec.msgpack.decode(data, type=PushAsk)
        site = self._node(node).spec.site
        async with self._pushing.setdefault(node, asyncio.Lock()):
            saved = self._store.fact(f"pushed.{node}")
            last = msgspec.json.decode(saved) if saved else {}
            known = last if last.get("store") == ask.store else {}
            done = known.get("seq", 0)
            # key -> (base, revision after) of changes taken over from this node: where the answer was lost, the node's
            # next change has the old base, and what happened since is its own doing
            mine = {Key(*k): (base, after) for *k, base, after in known.get("mine", [])}
            decided: list[Decided] = []
            for change in ask.changes:
                if change.seq <= done:
                    # decided before, only the answer was lost
                    decided.append(Decided(change.seq, "same", "taken over before", self._now(change.key)))
                    continue
                base, after = mine.pop(change.key, (0, -1))
                own = base == change.base and after in (self._revision(change.key), self._store.was.get(change.key))
                entry = self._store.entry(change.key) if own else None
                seen = (entry.revision if entry else 0) if own else change.base
                decided.append(await self._decide(node, site, msgspec.structs.replace(change, base=seen)))
                done = change.seq
                if decided[-1].outcome == "accept":
                    mine[change.key] = change.base, self._revision(change.key)
                kept = [[k.kind, k.namespace, k.name, *v] for k, v in list(mine.items())[-_REMEMBERED:]]
                fact = {"store": ask.store, "seq": done, "mine": kept}
                await self._store.set_fact(f"pushed.{node}", msgspec.json.encode(fact))
            return PushAnswer(decided)

    def _revision(self, key: Key) -> int:
        """Of the object, or of its deletion."""
        entry = self._store.entry(key)
        return entry.revision if entry else self._store.deleted(key)[0]

    def _now(self, key: Key) -> HubObject:
        entry = self._store.entry(key)
        return self._object(key, entry.resource if entry else None, entry.revision if entry else self._store.revision)

    def _shared(self, key: Key, site: str, resource: Resource) -> bool:
        """Whether other sites have the object too."""
        kind = kinds.get(key.kind)
        if kind.scope == "placed" and placed_sites(resource) == site:
            return False
        if kind.scope in ("hub", "site"):
            return False
        everything = self._store.all()
        sites = {n.spec.site: n.metadata.name for n in self._store.items("Node")}
        return any(key in view(self.node_view(n), everything) for s, n in sites.items() if s != site)

    async def _decide(self, node: str, site: str, change: LocalChange) -> Decided:
        key = change.key
        entry = self._store.entry(key)
        hub = entry.resource if entry else None
        journal: dict[str, Any] = {
            "resource": str(key), "kind": key.kind, "namespace": key.namespace, "name": key.name,
            "site": site, "node": node, "actor": change.actor, "op": change.op, "madeAt": clock.timestamp(change.time),
        }  # fmt: skip
        try:
            local = from_stored(change.stored) if change.stored is not None else None
            if local is not None:
                check_reach(local, site)
                kinds.get(local.kind).check(local)
                _as_new(local, hub)
            elif hub is not None:
                check_reach(hub, site, delete=True)
            base = base_now(
                change.base,
                self._line,
                revision=entry.revision if entry else 0,
                was=self._store.was.get(key, 0),
                deleted=self._store.deleted(key)[0],
            )
            merged = decide(
                rule=(hub or local).metadata.conflict if (hub or local) else "cloud",  # type: ignore[union-attr]
                base=base,
                hub=Side(hub is not None, entry.revision if entry else 0, _updated(hub) or self._store.deleted(key)[1]),
                edge=Side(local is not None, base, change.time),
                same=hub is not None and local is not None and same_desired(hub, local),
                shared=hub is not None and self._shared(key, site, hub),
                hub_tombstone=self._store.deleted(key)[0],
            )
            lost: Resource | None = local if merged.loser == "edge" else hub if merged.loser == "cloud" else None
            journal |= {"outcome": merged.outcome, "loser": merged.loser, "why": merged.why,
                        "rule": (hub or local).metadata.conflict if (hub or local) else "cloud"}  # type: ignore[union-attr]  # fmt: skip
            if lost is not None:
                journal["lost"] = lost.document(show_secrets=False)
            if merged.outcome == "accept":
                await self._write(local, key, entry.revision if entry else 0, f"site:{site}/{change.actor}")
            elif merged.outcome == "override" and hub is not None and local is not None:
                await self._override(key, site, hub, local, change)
        except Conflict:
            raise  # the hub's object moved under our hands: the node sends the change again
        except EdgewardError as e:
            merged_why = f"refused by the hub: {e}"
            journal |= {"outcome": "invalid", "loser": "edge", "why": merged_why}
            if change.stored is not None:
                lost_doc = {"kind": key.kind, "metadata": {"name": key.name}, "spec": change.stored.spec}
                journal["lost"] = redact(lost_doc)
            await self._journal(journal, node, change)
            return Decided(change.seq, "invalid", merged_why, self._now(key), journal)
        if merged.outcome != "same":
            await self._journal(journal, node, change)
        return Decided(change.seq, merged.outcome, merged.why, self._now(key), journal)

    async def _journal(self, journal: dict[str, Any], node: str, change: LocalChange) -> None:
        await self._records.append("journal", journal, unique=f"j-{node}-{change.seq}-{int(change.time * 1000)}")

    async def _override(self, key: Key, site: str, hub: Resource, local: Resource, change: LocalChange) -> None:
        patch = make_patch(msgspec.to_builtins(hub.spec), msgspec.to_builtins(local.spec))
        name = f"{key.kind.lower()}-{key.name}-{site}"[:63].rstrip("-")
        override_key = Key("Override", key.namespace if key.namespace != CLUSTER else "default", name)
        spec_type = kinds.get("Override").spec
        target = {"kind": key.kind, "name": key.name, "namespace": "" if key.namespace == CLUSTER else key.namespace}
        spec = msgspec.convert(
            {"target": target, "site": site, "patch": patch, "base": hub.revision,
             "reason": f"changed at the site by {change.actor}"},
            spec_type,
        )  # fmt: skip
        old = self._store.entry(override_key)
        meta = Metadata(
            name=name,
            namespace=override_key.namespace,
            labels={"site": site},
            ownerReferences=[
                OwnerReference(kind=key.kind, name=key.name, uid=hub.metadata.uid, namespace=target["namespace"])
            ],
        )
        resource = Resource(kind="Override", metadata=meta, spec=spec)
        await self._write(resource, override_key, old.revision if old else 0, f"site:{site}/{change.actor}")

    # -- reports and beats --------------------------------------------------------------------------------------------

    async def _on_report(self, node: str, data: bytes) -> Ok:
        ask = msgspec.msgpack.decode(data, type=ReportAsk)
        self._node(node)
        known = self._reports.setdefault(node, {})
        touched: set[str] = set()
        if ask.full:
            touched |= set(known)
            known.clear()
        for s in ask.statuses:
            name = f"{s.kind}/{s.namespace}/{s.name}"
            touched.add(name)
            if s.status is None:
                known.pop(name, None)
            else:
                known[name] = s.status
        for name in touched:
            self._fold.add(Key(*name.split("/")))
        if ask.node is not None:
            self._node_reports[node] = ask.node
            self._node_status.add(node)
        for event in ask.events:
            seq, store = event.pop("seq", 0), event.pop("store", "")
            had, done = self._event_seq.get(node, ("", 0))
            if had == store and seq <= done:
                continue  # taken over before, only the answer was lost
            await self._records.append("events", {**event, "node": node}, unique=f"e-{node}-{store}-{seq}")
            self._event_seq[node] = (store, seq)
            self._persist.add(node)
        if touched or ask.node is not None:
            self._persist.add(node)
        return Ok()

    async def _on_beat(self, node: str, data: bytes) -> BeatAnswer:
        ask = msgspec.msgpack.decode(data, type=BeatAsk)
        self._node(node)
        live = self._live.setdefault(node, Liveness())
        # the first beat of a run of the agent is certain: it just came up and asked for its state
        if live.beat(clock.monotonic(), certain=self._runs.get(node) != ask.start):
            await self._flipped(node)
        self._runs[node] = ask.start
        return BeatAnswer(self._store.revision, self.run_id, self._store.epoch)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(BEAT / 4)  # the period of looking at silence
            for node, live in list(self._live.items()):
                if live.tick(clock.monotonic()):
                    await self._flipped(node)

    async def _flipped(self, node: str) -> None:
        online = self.is_online(node)
        self._node_status.add(node)
        for name in self._reports.get(node, {}):
            self._fold.add(Key(*name.split("/")))
        try:
            await self._records.append(
                "events",
                {
                    "type": "Normal" if online else "Warning",
                    "reason": "NodeOnline" if online else "NodeOffline",
                    "resource": f"Node/{node}",
                    "message": "the hub hears the node"
                    if online
                    else "nothing heard of the node; its site goes on by itself",
                    "node": node,
                },
            )
        except EdgewardError as e:
            log.warning("event not kept: %s", e)

    async def _write_node_status(self, node: str) -> float | None:
        key = Key("Node", CLUSTER, node)
        if self._store.find(key) is None:
            return None
        live = self._live.setdefault(node, Liveness())
        status = {**self._node_reports.get(node, {}), "online": live.online}
        old = self._store.get(key).status
        if old.get("online") == live.online:
            status["since"] = old.get("since", "")
        else:
            status["since"] = clock.timestamp()
        await self._store.put_status(key, status)
        return None

    async def _fold_status(self, key: Key) -> float | None:
        resource = self._store.find(key)
        if resource is None or not self._folds(key.kind):
            return None
        fold: Fold = extensions.get("fold", key.kind)
        name = f"{key.kind}/{key.namespace}/{key.name}"
        reports = {n: r[name] for n, r in self._reports.items() if name in r}
        await self._store.put_status(key, fold(resource, self._store.items("Node"), reports))
        for service in self._store.items("Service", key.namespace):
            if key.kind == "App" and self._folds("Service"):
                fold_service: Fold = extensions.get("fold", "Service")
                apps = {a.metadata.name: a.status for a in self._store.items("App", key.namespace)}
                await self._store.put_status(service.key, fold_service(service, self._store.items("Node"), apps))
        return None

    async def _persist_report(self, node: str) -> float | None:
        await asyncio.sleep(1.0)  # folds a burst of reports into one write
        doc = {
            "statuses": self._reports.get(node, {}),
            "node": self._node_reports.get(node, {}),
            "events": self._event_seq.get(node, ("", 0)),
        }
        await self._store.set_fact(f"report.{node}", msgspec.json.encode(doc))
        return None


def _as_new(local: Resource, hub: Resource | None) -> None:
    """Takes the site's bookkeeping off its document: the hub stamps its own."""
    meta = local.metadata
    meta.resourceVersion = meta.updateTimestamp = meta.deletionTimestamp = ""
    meta.generation = 0
    if hub is not None:
        meta.uid, meta.creationTimestamp = hub.metadata.uid, hub.metadata.creationTimestamp


def _updated(resource: Resource | None) -> float:
    if resource is None or not resource.metadata.updateTimestamp:
        return 0.0
    return clock.parse_timestamp(resource.metadata.updateTimestamp)
