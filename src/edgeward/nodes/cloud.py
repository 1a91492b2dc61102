"""The hub's side of the nodes: sync, local changes, reports, beats.

Requests of nodes come in on ``ew.hub.*.<node>``, answered from the store; changes of the store go out as pokes to the
nodes that they concern. A node only ever gets its own view (``core/scope.py``) and only ever speaks for itself: its
name is the subject's last part, which NATS lets no other node use. Nothing here knows what an App is: each kind
registers how reports become its status (``fold/<Kind>`` in the registry).

Several hub processes may serve one fleet (``core/peers.py``): each answers what comes to it, all hear of it, and one
writes statuses and pokes.

What a change costs grows with the nodes that it concerns, not with the fleet (``nodes/views.py``), and what a thousand
nodes set off at once becomes a bounded number of writes, one node or object at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import msgspec
from nats.aio.msg import Msg

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import Conflict, EdgewardError, Invalid, Refused, Unreachable
from edgeward.core.peers import Peers
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
from edgeward.core.scope import check_reach, fingerprint, placed_sites
from edgeward.core.store import Change, Entry, same_desired
from edgeward.core.store_nats import NatsStore
from edgeward.nodes.ancestry import Ancestor, base_now
from edgeward.nodes.hubtime import made_at
from edgeward.nodes.liveness import LOOK, Liveness
from edgeward.nodes.merge import Side, decide
from edgeward.nodes.older import left_out, put_back, trimmed
from edgeward.nodes.reach import check_known, check_refs, own_status, pinned, went_back
from edgeward.nodes.views import STATUS_DOWN, SiteView, Views
from edgeward.nodes.wire import (
    LEVEL,
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
#: Bytes of encoded objects kept for the next node that needs the same ones.
_ENCODED = 16 << 20
#: Seconds that reports, and statuses on their way to nodes, are gathered for.
_GATHER = 1.0
_SERVICE_GATHER = 0.05
#: Seconds by which our clock must be set for the nodes to be told.
_STEP = 1.0
#: Nodes a second that the hub wants to hear of after it came back; the nodes spread their reports to it.
_WELCOME = 200
#: Flips of one node whose events wait to be written.
_FLIPS = 16
#: Seconds within which a change may have been missed by a process that led and died.
_UNPOKED = 30.0
#: Seconds until a controller looks anew at what another process wrote under its hands.
_LATER = 0.1
#: Seconds that this process's cache may be behind another's.
_BEHIND = 2.0

Fold = Callable[[Resource, list[Resource], Mapping[str, dict[str, Any]]], dict[str, Any]]


class _Doubt(NamedTuple):
    """A change that was being taken over when the store went silent, and what the journal is to say of it."""

    change: LocalChange
    wanted: Resource | None
    journal: dict[str, Any]


class NodesCloud:
    """Serves the fleet of one hub process."""

    def __init__(
        self, store: NatsStore, bus: Bus, records: Records, write: Callable[..., Any], peers: Peers | None = None
    ) -> None:
        self._store = store
        self._bus = bus
        self._records = records
        #: ``await write(resource | None, key, expect, actor)``: a validated write (the hub's Resources).
        self._write = write
        self.run_id = peers.id if peers else clock.new_id(12)
        self._peers = peers
        #: Nodes heard of that the other hub processes were not told of yet.
        self._heard_of: set[str] = set()
        #: Sites that the process which led when they changed may not have poked: site -> when.
        self._unpoked: dict[str, float] = {}
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
        self._flips: Loop[str] = Loop("flips", self._write_flips)
        self._poke: Loop[str] = Loop("poke", self._poke_site)
        #: What is in one of the loops' timers: to be gathered, not to be put off again.
        self._gathered: set[tuple[str, str]] = set()
        self._flipped_events: dict[str, list[dict[str, Any]]] = {}
        self._pushing: dict[str, asyncio.Lock] = {}
        #: Changes whose write or record may have happened; the nodes send them again.
        self._in_doubt: dict[tuple[str, Key], _Doubt] = {}
        #: The stores that this one was restored from.
        self._line: list[Ancestor] = []
        self._views = Views(store.entry)
        self._site_of: dict[str, str] = {}
        self._nodes_at: dict[str, set[str]] = {}
        #: "Kind/ns/name" -> nodes that report of it
        self._reporters: dict[str, set[str]] = {}
        #: node -> the revision of its view that an answer to a beat named last
        self._told: dict[str, int] = {}
        self._encoded: dict[tuple[Key, int, int, int], bytes] = {}
        #: node -> the level of its release, where it is older than this one's (``nodes/older.py``)
        self._levels: dict[str, int] = {}
        #: node -> what it is not told for that
        self._untold: dict[str, list[str]] = {}
        self._encoded_size = 0
        #: What the enrolment says of a node's identity: members of its status, ``revoked`` always among them.
        self.identity: Callable[[str], dict[str, Any]] = lambda node: {"revoked": False}

    # -- life ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        self._line = msgspec.json.decode(self._store.fact("line") or b"[]", type=list[Ancestor])
        self._views.load(self._store.all())
        self._store.listen(self._changed)
        if self._peers is not None:
            self._peers.listen("heard", self._heard_by_peer)
            self._peers.listen("report", self._reported_to_peer)
            self._peers.listen("level", self._level_of_peer)
            self._peers.on_change.append(self._lead)
        for node in self._store.items("Node"):
            name = node.metadata.name
            self._place(name, node.spec.site)
            saved = self._store.fact(f"report.{name}")
            if saved:
                doc = msgspec.json.decode(saved)
                for what, status in doc.get("statuses", {}).items():
                    self._reported(name, what, status)
                self._node_reports[name] = doc.get("node", {})
                self._event_seq[name] = tuple(doc.get("events") or ("", 0))
                if "level" in doc:
                    self._levels[name], self._untold[name] = doc["level"], doc.get("untold", [])
            # the last state known stands until the node is heard of, or stays silent for long enough
            live = self._live[name] = Liveness()
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
        await self._bus.flush()  # a node that asks from now on finds somebody

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._fold.run())
            group.create_task(self._persist.run())
            group.create_task(self._node_status.run())
            group.create_task(self._flips.run())
            group.create_task(self._poke.run())
            group.create_task(self._tick())
            if self._peers is not None:
                group.create_task(self._tell_peers(self._peers))

    def _answer(self, handler: Callable[[str, bytes], Any]) -> Callable[[Msg], Any]:
        async def answer(msg: Msg) -> bytes | None:
            node = msg.subject.rsplit(".", 1)[1]
            try:
                if self.identity(node)["revoked"]:
                    # what was on its way when its connection was cut
                    raise Refused("is revoked", resource=f"Node/{node}")
                async with asyncio.timeout(30):
                    reply = await handler(node, msg.data)
            except (EdgewardError, msgspec.DecodeError, TimeoutError) as e:
                log.warning("%s of node %s failed: %s", msg.subject, node, e or type(e).__name__)
                reply = Ok(error=str(e) or type(e).__name__)
            packed = reply if isinstance(reply, bytes) else msgspec.msgpack.encode(reply)
            if msg.reply:
                return packed
            # an empty beat names no reply subject, to be short: its answer has one of its own
            await self._bus.publish(f"ew.node.{node}.b", packed)
            return None

        return answer

    def _node(self, name: str) -> Resource:
        node = self._store.find(Key("Node", CLUSTER, name))
        if node is None:
            raise Invalid("the hub knows no such node", resource=f"Node/{name}", remedy="enrol it again")
        return node

    def _place(self, node: str, site: str | None) -> None:
        """Which site a node stands in; None: it is gone."""
        old = self._site_of.pop(node, None)
        if old is not None and old != site:
            self._told.pop(node, None)
        if old is not None:
            self._nodes_at.get(old, set()).discard(node)
        if site is not None:
            self._site_of[node] = site
            self._nodes_at.setdefault(site, set()).add(node)

    def _view(self, node: str) -> SiteView:
        return self._views.of(self._node(node).spec.site, self._store.revision)

    def _heard(self, node: str, *, certain: bool = False) -> None:
        """Any request of a node says that it is there."""
        live = self._live.setdefault(node, Liveness())
        if self._peers is not None and not self._peers.alone:
            self._heard_of.add(node)
        if live.beat(clock.monotonic(), certain=certain):
            self._flipped(node)

    # -- other hub processes -----------------------------------------------------------------------------------------

    @property
    def _leads(self) -> bool:
        return self._peers is None or self._peers.leads

    def _lead(self) -> None:
        """Another process leads now. If it is this one: whatever the one before left undone is due."""
        if not self._leads:
            return
        now = clock.monotonic()
        for site, at in self._unpoked.items():
            if now - at < _UNPOKED:
                self._poke.add(site)
        self._unpoked.clear()
        for node in self._live:
            self._node_status.add(node)
            self._persist.add(node)
        for kind in extensions.names("fold"):
            for r in self._store.items(kind):
                self._fold.add(r.key)

    async def _tell_peers(self, peers: Peers) -> None:
        """The others hear of the nodes that this process hears: a node's requests reach one of them only."""
        while True:
            await asyncio.sleep(LOOK)  # gathers what was heard
            nodes, self._heard_of = self._heard_of, set()
            if nodes:
                with contextlib.suppress(EdgewardError):
                    heard = [(n, self.is_online(n), self._live[n].rtt) for n in sorted(nodes) if n in self._live]
                    await peers.tell("heard", msgspec.msgpack.encode(heard))

    def _heard_by_peer(self, data: bytes) -> None:
        for node, online, rtt in msgspec.msgpack.decode(data, type=list[tuple[str, bool, float]]):
            if self._store.find(Key("Node", CLUSTER, node)) is None:
                continue
            live = self._live.setdefault(node, Liveness())
            live.rtt = rtt
            if live.beat(clock.monotonic(), certain=online):
                self._flipped(node)

    def _reported_to_peer(self, data: bytes) -> None:
        node, report = msgspec.msgpack.decode(data, type=tuple[str, bytes])
        if self._store.find(Key("Node", CLUSTER, node)) is not None:
            ask = msgspec.msgpack.decode(report, type=ReportAsk)
            self._take_report(node, ask)
            for event in ask.events:  # the process that was asked keeps them
                self._event_seq[node] = (event.get("store", ""), event.get("seq", 0))

    async def identity_changed(self, node: str) -> None:
        """A node joined or renewed; or it lost its identity, and is offline at once, whatever was heard of it."""
        live = self._live.get(node)
        if live is not None and live.online and self.identity(node)["revoked"]:
            live.online, live.since, live.streak = False, clock.monotonic(), 0
            self._flipped(node)
        await self._write_node_status(node)

    def is_online(self, node: str) -> bool:
        live = self._live.get(node)
        return bool(live and live.online)

    # -- sync ---------------------------------------------------------------------------------------------------------

    def _object(self, key: Key, resource: Resource | None, revision: int, level: int = LEVEL) -> HubObject:
        if resource is None:
            return HubObject(key.kind, key.namespace, key.name, revision)
        status = resource.status if key.kind in STATUS_DOWN and resource.status else None
        stored = trimmed(to_stored(resource), level)
        return HubObject(key.kind, key.namespace, key.name, revision, stored, status)

    def _packed(self, key: Key, entry: Entry, level: int) -> bytes:
        """A present object as it goes over the link; nodes of one site, and all for what is everywhere, share it."""
        which = (key, entry.revision, entry.seen if key.kind in STATUS_DOWN else 0, level)
        data = self._encoded.get(which)
        if data is None:
            data = msgspec.msgpack.encode(self._object(key, entry.resource, entry.revision, level))
            if self._encoded_size > _ENCODED:
                self._encoded.clear()
                self._encoded_size = 0
            self._encoded[which] = data
            self._encoded_size += len(data)
        return data

    async def _caught_up(self, revision: int) -> None:
        """Waits a while for what another hub process has told this node already."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BEHIND):
                while self._store.revision < revision:  # noqa: ASYNC110 - the store has no event for a number
                    await asyncio.sleep(0.02)  # the pace of looking at a cache that follows

    async def _on_sync(self, node: str, data: bytes) -> SyncAnswer:
        ask = msgspec.msgpack.decode(data, type=SyncAsk)
        self._node(node)
        self._heard(node)
        ahead = ask.epoch == self._store.epoch and ask.since > self._store.revision
        if ahead and self._peers is not None and not self._peers.alone:
            await self._caught_up(ask.since)
        now = self._store.revision
        mine = self._view(node)
        full = ask.epoch != self._store.epoch or ask.since < self._store.compacted or ask.since > now or ask.since == 0
        names: list[Key] | None = None
        gone: dict[Key, int] = {}
        # a release that does not know a kind cannot read it; it does not get it
        level = min(ask.level, LEVEL)
        newer = self._newer(level)
        if full:
            keys = list(mine.entries)
        else:
            difference = mine.since(ask.since)
            keys, names = difference.changed, difference.names
            gone = {k: self._store.deleted(k)[0] or at for k, at in difference.gone.items()}
        behind = Key(*ask.after) if ask.after is not None else None
        wanted = sorted(k for k in (*keys, *gone) if k.kind not in newer and (behind is None or k > behind))
        page: list[msgspec.Raw] = []
        size = 0
        for key in wanted:
            entry = self._store.entry(key) if key not in gone else None
            packed = (
                self._packed(key, entry, level)
                if entry is not None
                else msgspec.msgpack.encode(self._object(key, None, gone.get(key, now)))
            )
            size += len(packed)
            if page and size > PAGE:
                break
            page.append(msgspec.Raw(packed))
        more = len(page) < len(wanted)
        if not more and self._speaks(node, level, mine) and self._peers is not None:
            await self._peers.tell("level", msgspec.msgpack.encode((node, level, self._untold.get(node, []))))
        line = self._line if ask.epoch != self._store.epoch else []
        return SyncAnswer(
            self._store.epoch,
            now,
            full,
            cast(list[HubObject], page),  # encoded before
            more,
            "" if more else self._print(mine, newer),
            line=line,
            names=None if more or names is None else [(k.kind, k.namespace, k.name) for k in names],
            level=LEVEL,
        )

    @staticmethod
    def _newer(level: int) -> set[str]:
        return {k.name for k in kinds if k.level > level}

    def _speaks(self, node: str, level: int, mine: SiteView) -> bool:
        """A node's level, as it said it just now; what an older one is not told stands in its status. True: news."""
        found = (self._store.entry(k) for k in mine.entries) if level < LEVEL else ()
        untold = left_out((e.resource for e in found if e is not None), level)
        if self._levels.get(node, LEVEL) == level and self._untold.get(node, []) == untold:
            return False
        self._take_level(node, level, untold)
        return True

    def _level_of_peer(self, data: bytes) -> None:
        node, level, untold = msgspec.msgpack.decode(data, type=tuple[str, int, list[str]])
        if self._store.find(Key("Node", CLUSTER, node)) is not None:
            self._take_level(node, level, untold)

    def _take_level(self, node: str, level: int, untold: list[str]) -> None:
        if untold != self._untold.get(node, []):
            self._node_status.add(node)
        if level < LEVEL:
            self._levels[node], self._untold[node] = level, untold
        else:
            self._levels.pop(node, None)
            self._untold.pop(node, None)
        if untold:
            log.info("node %s is of an earlier release and is not told of: %s", node, ", ".join(untold))
        self._persist.add(node)

    @staticmethod
    def _print(view: SiteView, newer: set[str]) -> str:
        if not any(k.kind in newer for k in view.entries):
            return view.print
        return fingerprint((k, desired) for k, (desired, _) in view.entries.items() if k.kind not in newer)

    def _changed(self, change: Change) -> None:
        """Within a change of the store: keeps the views and pokes the nodes that it concerns."""
        key = change.key
        if change.status_only and key.kind not in STATUS_DOWN:
            return
        if key.kind == "Node" and change.resource is not None:
            self._place(key.name, change.resource.spec.site)
            if key.name not in self._live:
                self._live[key.name] = Liveness(heard=clock.monotonic(), since=clock.monotonic())
        touched = self._views.change(key, change.resource, status_only=change.status_only)
        if key.kind == "Node" and change.resource is None:
            self._forget(key.name)
        if change.resource is not None and not change.status_only and self._folds(key.kind):
            self._fold.add(key)
        for site in self._nodes_at if touched is None else touched:
            if not change.status_only:
                self._poke.add(site)
            else:
                self._gather("poke", self._poke, site, _SERVICE_GATHER if key.kind == "Service" else _GATHER)

    def _gather(self, what: str, loop: Loop[str], key: str, seconds: float) -> None:
        """Has ``key`` handled after a while, once for all that happens until then."""
        if (what, key) not in self._gathered:
            self._gathered.add((what, key))
            loop.add_after(key, seconds)

    @staticmethod
    def _folds(kind: str) -> bool:
        return kind in extensions.names("fold")

    async def _poke_site(self, site: str) -> float | None:
        self._gathered.discard(("poke", site))
        if not self._leads:
            self._unpoked[site] = clock.monotonic()
            return None
        revision = str(self._store.revision).encode()
        for node in sorted(self._nodes_at.get(site, ())):
            if self.is_online(node):
                with contextlib.suppress(EdgewardError):
                    await self._bus.publish(f"ew.node.{node}.poke", revision)
        return None

    def _forget(self, node: str) -> None:
        site = self._site_of.get(node, "")
        self._place(node, None)
        for what in self._reports.get(node, {}):
            self._reporters.get(what, set()).discard(node)
        heard = (self._live, self._reports, self._node_reports, self._event_seq, self._runs, self._told)
        for known in (*heard, self._levels, self._untold):
            known.pop(node, None)
        self._in_doubt = {k: doubt for k, doubt in self._in_doubt.items() if k[0] != node}
        for key in self._views.of(site, self._store.revision).entries:
            if self._folds(key.kind):
                self._fold.add(key)

    def _reported(self, node: str, what: str, status: dict[str, Any] | None) -> None:
        """Takes a node's report of ``what``; None: it is not there any more."""
        if status is None:
            self._reports.get(node, {}).pop(what, None)
            self._reporters.get(what, set()).discard(node)
        else:
            self._reports.setdefault(node, {})[what] = status
            self._reporters.setdefault(what, set()).add(node)

    # -- local changes of a site -----------------------------------------------------------------------------------

    async def _on_push(self, node: str, data: bytes) -> PushAnswer:
        ask = msgspec.msgpack.decode(data, type=PushAsk)
        site = self._node(node).spec.site
        self._heard(node)
        async with self._pushing.setdefault(node, asyncio.Lock()):
            saved = self._store.fact(f"pushed.{node}")
            last = msgspec.json.decode(saved) if saved else {}
            revision = self._store.fact_revision(f"pushed.{node}")
            known = last if last.get("store") == ask.store else {}
            done = known.get("seq", 0)
            # key -> (seq, revision after, whether it was there then) of changes taken over from this node: where the
            # answer was lost the node's next change has the old base, and its own doing is nothing that it missed
            mine = {Key(*k): (seq, after, there) for *k, seq, after, there in known.get("mine", [])}
            decided: list[Decided] = []
            for change in ask.changes:
                if change.seq <= done:
                    # decided before, only the answer was lost
                    decided.append(Decided(change.seq, "same", "taken over before", self._now(node, change)))
                    continue
                if (before := await self._settled(node, change)) is not None:
                    mine[change.key] = before, self._revision(change.key), self._store.find(change.key) is not None
                theirs = {k for k, (_, at, _) in mine.items() if at == self._revision(k)}
                seq, after, there = mine.pop(change.key, (0, 0, False))
                seen = change.base
                if 0 < change.first <= seq:
                    now = after in (self._revision(change.key), self._store.was.get(change.key))
                    seen = self._base_of(change.key) if now else after if there else 0
                decided.append(await self._decide(node, site, msgspec.structs.replace(change, base=seen), theirs))
                done = change.seq
                if decided[-1].outcome == "accept" or (before is not None and decided[-1].outcome == "same"):
                    is_there = self._store.find(change.key) is not None
                    mine[change.key] = change.seq, self._revision(change.key), is_there
                kept = [[k.kind, k.namespace, k.name, *v] for k, v in list(mine.items())[-_REMEMBERED:]]
                fact = {"store": ask.store, "seq": done, "mine": kept}
                # another process may have been asked the same meanwhile: then the node asks again
                await self._store.set_fact(f"pushed.{node}", msgspec.json.encode(fact), expect=revision)
                revision = self._store.fact_revision(f"pushed.{node}")
            return PushAnswer(decided)

    def _revision(self, key: Key) -> int:
        """Of the object, or of its deletion."""
        entry = self._store.entry(key)
        return entry.revision if entry else self._store.deleted(key)[0]

    def _base_of(self, key: Key) -> int:
        """What a node that knows the present state would give as base."""
        entry = self._store.entry(key)
        return entry.revision if entry else 0

    def _now(self, node: str, change: LocalChange) -> HubObject:
        """What the hub holds now, as far as it concerns the node: what is in its view, or what it has just sent."""
        key = change.key
        entry = self._store.entry(key)
        if entry is None:
            return self._object(key, None, self._store.revision)
        level = self._levels.get(node, LEVEL)
        seen = key in self._view(node).entries
        if not seen and change.stored is not None:
            seen = trimmed(to_stored(entry.resource), level).spec == change.stored.spec
        return self._object(key, entry.resource if seen else None, entry.revision, level)

    def _shared(self, key: Key, site: str, resource: Resource) -> bool:
        """Whether other sites have the object too."""
        kind = kinds.get(key.kind)
        if kind.scope == "placed" and placed_sites(resource) == site:
            return False
        if kind.scope in ("hub", "site"):
            return False
        return self._elsewhere(key, site)

    def _elsewhere(self, key: Key, site: str) -> bool:
        sites = [s for s, nodes in self._nodes_at.items() if nodes]
        return self._views.elsewhere(key, site, sites, self._store.revision)

    async def _decide(self, node: str, site: str, change: LocalChange, theirs: set[Key]) -> Decided:
        """``theirs``: objects that are as this node wrote them, though they may not be in its view yet."""
        key = change.key
        made = made_at(change.made, clock.now()) if change.made else change.time

        def known(k: Key) -> bool:
            return k in theirs or k in self._view(node).entries

        entry = self._store.entry(key)
        hub = entry.resource if entry else None
        journal: dict[str, Any] = {
            "resource": str(key), "kind": key.kind, "namespace": key.namespace, "name": key.name,
            "site": site, "node": node, "actor": change.actor, "op": change.op, "madeAt": clock.timestamp(made),
        }  # fmt: skip
        try:
            level = self._levels.get(node, LEVEL)
            local = from_stored(put_back(change.stored, hub, level)) if change.stored is not None else None
            check_known(key, site, there=hub is not None, known=known(key))
            if local is not None:
                if local.key != key:
                    raise Invalid("the change and its document name different objects", resource=str(key))
                check_reach(local, site)
                kinds.get(local.kind).check(local)
                check_refs(local, site, known, lambda k: self._elsewhere(k, site))
                local = pinned(local, hub, site)
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
                edge=Side(local is not None, base, made),
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
                while len(self._in_doubt) >= _REMEMBERED:
                    del self._in_doubt[next(iter(self._in_doubt))]
                self._in_doubt[node, key] = _Doubt(change, local, journal)
                await self._write(local, key, entry.revision if entry else 0, f"site:{site}/{change.actor}")
            elif merged.outcome == "override" and hub is not None and local is not None:
                await self._override(key, site, hub, local, change)
        except Conflict:
            raise  # the hub's object moved under our hands: the node sends the change again
        except EdgewardError as e:
            if e.status >= 500:
                raise  # no word on the change, and the write may have happened: the node sends it again
            self._in_doubt.pop((node, key), None)
            merged_why = f"refused by the hub: {e}"
            journal |= {"outcome": "invalid", "loser": "edge", "why": merged_why}
            if change.stored is not None:
                lost_doc = {"kind": key.kind, "metadata": {"name": key.name}, "spec": change.stored.spec}
                journal["lost"] = redact(lost_doc)
            await self._journal(journal, node, change)
            return Decided(change.seq, "invalid", merged_why, self._now(node, change), journal)
        if merged.outcome != "same":
            await self._journal(journal, node, change)
        self._in_doubt.pop((node, key), None)
        return Decided(change.seq, merged.outcome, merged.why, self._now(node, change), journal)

    async def _settled(self, node: str, change: LocalChange) -> int | None:
        """The number of this change, or of one that it replaces, if what nobody confirmed of it did happen."""
        doubt = self._in_doubt.get((node, change.key))
        if doubt is None or not (change.first or change.seq) <= doubt.change.seq <= change.seq:
            return None
        hub = self._store.find(change.key)
        if not (same_desired(hub, doubt.wanted) if hub and doubt.wanted else hub is doubt.wanted):
            return (
                None  # not, or not in this cache yet: then a write on top of it is refused, and it is looked at again
            )
        await self._journal(doubt.journal, node, doubt.change)
        del self._in_doubt[node, change.key]
        return doubt.change.seq

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

    def _take_report(self, node: str, ask: ReportAsk) -> bool:
        """Takes what a node says of its objects and itself. True when any of it is new."""
        known = self._reports.setdefault(node, {})
        named = {f"{s.kind}/{s.namespace}/{s.name}": s.status for s in ask.statuses}
        if ask.full:
            named = {**dict.fromkeys(known), **named}
        touched = {what for what, status in named.items() if known.get(what) != status}
        for what in touched:
            self._reported(node, what, named[what])
            self._fold.add(Key(*what.split("/")))
        news = ask.node is not None and self._node_reports.get(node) != own_status(ask.node)
        if ask.node is not None:
            self._node_reports[node] = own_status(ask.node)
            if news:
                self._node_status.add(node)
        if touched or news or ask.events:
            self._gather("persist", self._persist, node, _GATHER)
        return bool(touched) or news

    async def _on_report(self, node: str, data: bytes) -> Ok:
        if self._peers is not None and self._peers.away:
            # the node may have told another process since what is newer, and this one would spread the old
            raise Unreachable("this hub process stood still", resource=f"Node/{node}", remedy="say it again")
        ask = msgspec.msgpack.decode(data, type=ReportAsk)
        self._node(node)
        self._heard(node)
        if ask.node is not None and (back := went_back(self._node_reports.get(node, {}), ask.node)):
            await self._audit_cut(node, *back)
        self._take_report(node, ask)
        if self._peers is not None:
            await self._peers.tell("report", msgspec.msgpack.encode((node, data)))
        for event in ask.events:
            seq, store = event.pop("seq", 0), event.pop("store", "")
            had, done = self._event_seq.get(node, ("", 0))
            if had == store and seq <= done:
                continue  # taken over before, only the answer was lost
            await self._records.append("events", {**event, "node": node}, unique=f"e-{node}-{store}-{seq}")
            self._event_seq[node] = (store, seq)
        return Ok(now=clock.now())

    async def _audit_cut(self, node: str, before: int, now: int) -> None:
        await self._records.append(
            "events",
            {
                "type": "Warning",
                "reason": "AuditCut",
                "resource": f"Node/{node}",
                "message": f"the node's audit had {before} records, now {now}: its end was cut off, or its disk wiped",
                "node": node,
            },
        )

    async def _on_beat(self, node: str, data: bytes) -> BeatAnswer | bytes:
        mine = self._view(node)
        if not data:
            self._heard(node)
            if self._told.get(node, -1) >= mine.changed:
                return b""
            ask = None
        else:
            ask = msgspec.msgpack.decode(data, type=BeatAsk)
            # the first beat of a run of the agent is certain: it just came up and asked for its state
            self._heard(node, certain=self._runs.get(node) != ask.start)
            self._runs[node] = ask.start
            self._live[node].rtt = min(30.0, max(0.0, ask.rtt))
        self._told[node] = mine.changed
        # the process that leads is who wants a full report when it is a new one
        leader = self._peers.leader if self._peers is not None else self.run_id
        answer = BeatAnswer(mine.changed, leader, self._store.epoch, short=True, now=clock.now())
        if ask is not None and ask.view:
            answer.sync = ask.view != self._print(mine, self._newer(self._levels.get(node, LEVEL)))
            answer.revision = 0  # the fingerprint says it better
        # a few nodes need no order; of many each takes its turn
        if len(self._live) > _WELCOME // 10:
            answer.spread = round(len(self._live) / _WELCOME, 1)
        return answer

    async def _tick(self) -> None:
        last = clock.monotonic()
        wall = clock.now() - last
        while True:
            await asyncio.sleep(LOOK)  # the period of looking at silence
            now = clock.monotonic()
            slept, last = now - last - LOOK, now
            if abs(clock.now() - now - wall) > _STEP:
                # our clock was set: each node is told the time with its next beat
                wall = clock.now() - now
                self._told.clear()
            for node, live in list(self._live.items()):
                if slept > LOOK:
                    live.forgive(slept, now)
                if live.tick(now):
                    self._flipped(node)

    def _flipped(self, node: str) -> None:
        online = self.is_online(node)
        self._node_status.add(node)
        for what in self._reports.get(node, {}):
            self._fold.add(Key(*what.split("/")))
        waiting = self._flipped_events.setdefault(node, [])
        waiting.append(
            {
                "type": "Normal" if online else "Warning",
                "reason": "NodeOnline" if online else "NodeOffline",
                "resource": f"Node/{node}",
                "message": "the hub hears the node"
                if online
                else "nothing heard of the node; its site goes on by itself",
                "node": node,
                "time": clock.timestamp(),
            }
        )
        del waiting[:-_FLIPS]
        self._flips.add(node)

    async def _write_flips(self, node: str) -> float | None:
        if not self._leads:
            self._flipped_events.pop(node, None)
        while waiting := self._flipped_events.get(node):
            await self._records.append("events", waiting[0])
            waiting.pop(0)
        self._flipped_events.pop(node, None)
        return None

    async def _write_node_status(self, node: str) -> float | None:
        for _ in range(8):
            status = self._status_of(node)
            if status is None:
                return None
            try:
                await self._store.put_status(Key("Node", CLUSTER, node), status, checked=True)
                return None
            except Conflict:  # made of what was there before somebody else wrote: once more, if we still lead
                continue
        return _LATER

    def _status_of(self, node: str) -> dict[str, Any] | None:
        """What a node's status should be; None where it is not for this process to say."""
        found = self._store.find(Key("Node", CLUSTER, node))
        if found is None or not self._leads:
            return None
        live = self._live.setdefault(node, Liveness())
        identity = self.identity(node)
        online = live.online and not identity["revoked"]  # by whichever hub process
        status = {**self._node_reports.get(node, {}), "online": online, **identity}
        if untold := self._untold.get(node):
            status["notTold"] = untold
        old = found.status
        status["since"] = old.get("since", "") if old.get("online") == online else clock.timestamp()
        return status

    def _nodes_for(self, resource: Resource) -> list[Resource]:
        """The nodes that may have to do with a placed resource: those of its site, if it names one."""
        site = placed_sites(resource)
        if not site:
            return self._store.items("Node")
        found = (self._store.find(Key("Node", CLUSTER, n)) for n in sorted(self._nodes_at.get(site, ())))
        return [n for n in found if n is not None]

    async def _fold_status(self, key: Key) -> float | None:
        try:
            return await self._folded(key)
        except Conflict:  # another process wrote meanwhile
            return _LATER

    async def _folded(self, key: Key) -> float | None:
        resource = self._store.find(key)
        if resource is None or not self._folds(key.kind) or not self._leads:
            return None
        fold: Fold = extensions.get("fold", key.kind)
        name = f"{key.kind}/{key.namespace}/{key.name}"
        if key.kind == "Service":
            apps = {a.metadata.name: a.status for a in self._store.items("App", key.namespace)}
            await self._store.put_status(key, fold(resource, self._store.items("Node"), apps), checked=True)
            return None
        nodes = self._nodes_for(resource)
        # a node that does not have the object has no say in what becomes of it
        told = [n for n in sorted(self._reporters.get(name, ())) if n in self._site_of and key in self._view(n).entries]
        reports = {n: self._reports[n][name] for n in told}
        await self._store.put_status(key, fold(resource, nodes, reports), checked=True)
        if key.kind == "App" and self._folds("Service"):
            for service in self._views.followers(key):
                self._fold.add(service)
        return None

    async def _persist_report(self, node: str) -> float | None:
        self._gathered.discard(("persist", node))
        if self._store.find(Key("Node", CLUSTER, node)) is None or not self._leads:
            return None
        known: dict[str, Any] = {
            "statuses": self._reports.get(node, {}),
            "node": self._node_reports.get(node, {}),
            "events": self._event_seq.get(node, ("", 0)),
        }
        if node in self._levels:
            known |= {"level": self._levels[node], "untold": self._untold.get(node, [])}
        doc = msgspec.json.encode(known)
        if doc != self._store.fact(f"report.{node}"):
            try:
                await self._store.set_fact(f"report.{node}", doc, expect=self._store.fact_revision(f"report.{node}"))
            except Conflict:  # another process leads, or did until now
                return _LATER
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
