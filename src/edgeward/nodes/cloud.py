"""The hub's side of the nodes: sync, local changes, reports, beats.

Requests of nodes come in on ``ew.hub.*.<node>``, answered from the store; changes of the store go out as pokes to the
nodes that they concern. A node only ever gets its own view (``core/scope.py``) and only ever speaks for itself: its
name is the subject's last part, which NATS lets no other node use. Nothing here knows what an App is: each kind
registers how reports become its status (``fold/<Kind>`` in the registry).

What sites changed by themselves is taken over in ``nodes/takeover.py``.

Several hub processes may serve one fleet (``core/peers.py``): each answers what comes to it, all hear of it, and one
writes statuses and pokes.

What a change costs grows with the nodes that it concerns, not with the fleet (``nodes/views.py``), and what a thousand
nodes set off at once becomes a bounded number of writes, one node or object at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec
from nats.aio.msg import Msg

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import Conflict, EdgewardError, Refused, Unreachable
from edgeward.core.peers import Peers
from edgeward.core.reconcile import Loop
from edgeward.core.records import Records
from edgeward.core.registry import extensions
from edgeward.core.resource import (
    CLUSTER,
    Key,
    Resource,
)
from edgeward.core.scope import placed_sites
from edgeward.core.store import Change
from edgeward.core.store_nats import NatsStore
from edgeward.nodes.ancestry import Ancestor
from edgeward.nodes.folding import folded
from edgeward.nodes.liveness import LOOK, Liveness
from edgeward.nodes.older import left_out
from edgeward.nodes.reach import own_status, went_back
from edgeward.nodes.roster import Roster
from edgeward.nodes.shares import plain, to_sign
from edgeward.nodes.siteword import SiteWord, ask_nodes
from edgeward.nodes.takeover import Takeover
from edgeward.nodes.views import STATUS_DOWN, SiteView
from edgeward.nodes.wire import (
    LEVEL,
    BeatAnswer,
    BeatAsk,
    HubObject,
    Ok,
    PushAnswer,
    PushAsk,
    ReachAnswer,
    ReachAsk,
    ReportAsk,
    SyncAnswer,
    SyncAsk,
)

log = logging.getLogger("edgeward.nodes")

T = TypeVar("T")
#: One page of a sync, in bytes of encoded objects.
PAGE = 512 * 1024
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
#: Nodes that get the news from one other.
_SHARED = 64
#: Nodes that a peer may tell of before they are in this process's copy of the state, and words about each.
_EARLY = 64

#: (resource, nodes, reports by node); a Service's has its namespace's Apps' statuses before the reports.
Fold = Callable[..., dict[str, Any]]


class NodesCloud:
    """Serves the fleet of one hub process."""

    def __init__(
        self, store: NatsStore, bus: Bus, records: Records, write: Callable[..., Any], peers: Peers | None = None
    ) -> None:
        self._store = store
        self._bus = bus
        self._records = records
        #: Where each node is and what it sees; and what the sites have changed by themselves.
        self.roster = Roster(store)
        self.takeover = Takeover(store, records, write, self.roster)
        self.takeover.revoked = lambda node: bool(self.identity(node)["revoked"])
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
        #: node -> its site, and whether it is revoked, as the Services that name other sites know it.
        self._stands: dict[str, tuple[str, bool]] = {}
        #: What sites say of their own nodes.
        self._words = SiteWord(self.is_online)
        #: What other processes told of nodes that this one's copy of the state does not have yet.
        self._early: dict[str, deque[Callable[[], None]]] = {}
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
        #: "Kind/ns/name" -> nodes that report of it
        self._reporters: dict[str, set[str]] = {}
        #: Kinds whose status another controller makes of what nodes say; it is told of which object.
        self.on_report: dict[str, Callable[[Key], None]] = {}
        #: Nodes that get the news from another one of their site, and from whom.
        self._carried: dict[str, str] = {}
        #: Signs what nodes pass on to one another; None: nothing is signed, so each asks for itself.
        self.sign: Callable[[bytes], bytes] | None = None
        #: What the enrolment says of a node's identity: members of its status, ``revoked`` always among them.
        self.identity: Callable[[str], dict[str, Any]] = lambda node: {"revoked": False}

    # -- life ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        self.roster.line = msgspec.json.decode(self._store.fact("line") or b"[]", type=list[Ancestor])
        self.roster.views.load(self._store.all())
        self._store.listen(self._changed)
        if self._peers is not None:
            self._peers.listen("heard", self._heard_by_peer)
            self._peers.listen("report", self._reported_to_peer)
            self._peers.listen("level", self._level_of_peer)
            self._peers.on_change.append(self._lead)
        for node in self._store.items("Node"):
            name = node.metadata.name
            self.roster.place(name, node.spec.site)
            saved = self._store.fact(f"report.{name}")
            if saved:
                doc = msgspec.json.decode(saved)
                for what, status in doc.get("statuses", {}).items():
                    self._reported(name, what, status)
                self._node_reports[name] = doc.get("node", {})
                self._event_seq[name] = tuple(doc.get("events") or ("", 0))
                if "level" in doc:
                    self.roster.levels[name], self.roster.untold[name] = doc["level"], doc.get("untold", [])
            # the last state known stands until the node is heard of, or stays silent for long enough
            live = self._live[name] = Liveness()
            live.online = bool(node.status.get("online"))
            live.heard = live.since = clock.monotonic()
        handlers: list[tuple[str, Callable[[str, bytes], Any]]] = [
            ("sync", self._on_sync),
            ("push", self._on_push),
            ("report", self._on_report),
            ("beat", self._on_beat),
            ("reach", self._on_reach),
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
        if self._too_early(node, lambda: self._reported_to_peer(data)):
            return
        ask = msgspec.msgpack.decode(report, type=ReportAsk)
        self._take_report(node, ask)
        for event in ask.events:  # the process that was asked keeps them
            self._event_seq[node] = (event.get("store", ""), event.get("seq", 0))

    def _too_early(self, node: str, again: Callable[[], None]) -> bool:
        """Whether the node is not in our copy of the state: a peer's word may be faster. It is taken when it is there.

        A node says what is new once; a word that is dropped here would be missing until it changes again.
        """
        if self._store.find(Key("Node", CLUSTER, node)) is not None:
            return False
        if node not in self._early:
            while len(self._early) >= _EARLY:  # of nodes that were deleted meanwhile, say
                del self._early[next(iter(self._early))]
            self._early[node] = deque(maxlen=_EARLY)
        self._early[node].append(again)
        return True

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

    async def _caught_up(self, revision: int) -> None:
        """Waits a while for what another hub process has told this node already."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BEHIND):
                while self._store.revision < revision:  # noqa: ASYNC110 - the store has no event for a number
                    await asyncio.sleep(0.02)  # the pace of looking at a cache that follows

    def _carries(self, node: str, others: list[str]) -> None:
        """A node asked for itself, and for ``others`` of its site: those are not poked while it is there.

        One that carries names itself; one that is carried and asks all the same, because it is in doubt, does not.
        """
        if node not in others:
            return
        self._carried.pop(node, None)
        site = self.roster.site_of.get(node)
        self._carried |= {n: node for n in others[:_SHARED] if n != node and self.roster.site_of.get(n) == site}

    async def _on_sync(self, node: str, data: bytes) -> SyncAnswer:
        ask = msgspec.msgpack.decode(data, type=SyncAsk)
        site = self.roster.node(node).spec.site
        self._heard(node)
        answer = await self._news(node, ask)
        self._carries(node, ask.share)
        if ask.share in ([], [node]) or self.sign is None:
            return answer
        packed = msgspec.msgpack.encode(answer)
        return SyncAnswer(signed=packed, proof=self.sign(to_sign(site, plain(ask), packed)))

    async def _news(self, node: str, ask: SyncAsk) -> SyncAnswer:
        ahead = ask.epoch == self._store.epoch and ask.since > self._store.revision
        if ahead and self._peers is not None and not self._peers.alone:
            await self._caught_up(ask.since)
        now = self._store.revision
        site = self.roster.node(node).spec.site
        mine = self.roster.view(node)
        full = ask.epoch != self._store.epoch or ask.since < self._store.compacted or ask.since > now or ask.since == 0
        names: list[Key] | None = None
        gone: dict[Key, int] = {}
        # a release that does not know a kind cannot read it; it does not get it
        level = min(ask.level, LEVEL)
        newer = self.roster.newer(level)
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
                self.roster.packed(key, entry, site, level)
                if entry is not None
                else msgspec.msgpack.encode(self.roster.object(key, None, gone.get(key, now), site))
            )
            size += len(packed)
            if page and size > PAGE:
                break
            page.append(msgspec.Raw(packed))
        more = len(page) < len(wanted)
        if not more and self._speaks(node, level, mine) and self._peers is not None:
            await self._peers.tell("level", msgspec.msgpack.encode((node, level, self.roster.untold.get(node, []))))
        line = self.roster.line if ask.epoch != self._store.epoch else []
        return SyncAnswer(
            self._store.epoch,
            now,
            full,
            cast(list[HubObject], page),  # encoded before
            more,
            "" if more else self.roster.print(mine, newer),
            line=line,
            names=None if more or names is None else [(k.kind, k.namespace, k.name) for k in names],
            level=LEVEL,
        )

    def _speaks(self, node: str, level: int, mine: SiteView) -> bool:
        """A node's level, as it said it just now; what an older one is not told stands in its status. True: news."""
        found = (self._store.entry(k) for k in mine.entries) if level < LEVEL else ()
        untold = left_out((e.resource for e in found if e is not None), level)
        if self.roster.levels.get(node, LEVEL) == level and self.roster.untold.get(node, []) == untold:
            return False
        self._take_level(node, level, untold)
        return True

    def _level_of_peer(self, data: bytes) -> None:
        node, level, untold = msgspec.msgpack.decode(data, type=tuple[str, int, list[str]])
        if not self._too_early(node, lambda: self._level_of_peer(data)):
            self._take_level(node, level, untold)

    def _take_level(self, node: str, level: int, untold: list[str]) -> None:
        if untold != self.roster.untold.get(node, []):
            self._node_status.add(node)
        if level < LEVEL:
            self.roster.levels[node], self.roster.untold[node] = level, untold
        else:
            self.roster.levels.pop(node, None)
            self.roster.untold.pop(node, None)
        if untold:
            log.info("node %s is of an earlier release and is not told of: %s", node, ", ".join(untold))
        self._persist.add(node)

    def _changed(self, change: Change) -> None:
        """Within a change of the store: keeps the views and pokes the nodes that it concerns."""
        key = change.key
        if change.status_only and key.kind not in STATUS_DOWN:
            return
        if key.kind == "Node" and change.resource is not None:
            self.roster.place(key.name, change.resource.spec.site)
            if key.name not in self._live:
                self._live[key.name] = Liveness(heard=clock.monotonic(), since=clock.monotonic())
        if key.kind == "Node" and not self.roster.news(key.name, change.resource) and change.status_only:
            return
        if key.kind == "Node":
            self._let_in(key.name, change.resource)
        touched = self.roster.views.change(key, change.resource, status_only=change.status_only)
        if key.kind == "Node" and change.resource is None:
            self._forget(key.name)
        elif key.kind == "Node":
            for again in self._early.pop(key.name, ()):
                again()
        if change.resource is not None and not change.status_only and self._folds(key.kind):
            self._fold.add(key)
        for site in self.roster.nodes_at if touched is None else touched:
            if not change.status_only:
                self._poke.add(site)
            else:
                self._gather("poke", self._poke, site, _SERVICE_GATHER if key.kind == "Service" else _GATHER)

    def _let_in(self, name: str, node: Resource | None) -> None:
        """Which nodes may ask for what other sites have follows from where they stand, and whether they are revoked."""
        stands = (node.spec.site, bool(node.status.get("revoked"))) if node is not None else None
        if self._stands.get(name) == stands:
            return
        if stands is None:
            self._stands.pop(name, None)
        else:
            self._stands[name] = stands
        for key in self.roster.views.reaching():
            self._fold.add(key)

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
        for node in sorted(self.roster.nodes_at.get(site, ())):
            carrier = self._carried.get(node, "")
            if carrier and carrier not in self._carried and self.is_online(carrier):
                continue
            if self.is_online(node):
                with contextlib.suppress(EdgewardError):
                    await self._bus.publish(f"ew.node.{node}.poke", revision)
        return None

    def _forget(self, node: str) -> None:
        site = self.roster.site_of.get(node, "")
        self.roster.place(node, None)
        for what in self._reports.get(node, {}):
            self._reporters.get(what, set()).discard(node)
        heard = (self._live, self._reports, self._node_reports, self._event_seq, self._runs, self.roster.told)
        for known in (*heard, self.roster.levels, self.roster.untold, self._carried):
            known.pop(node, None)
        self.takeover.forget(node)
        self._words.forget(site, node)
        for key in self.roster.views.of(site, self._store.revision).entries:
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

    def reported(self, key: Key) -> dict[str, dict[str, Any]]:
        """node -> what it said last of an object."""
        what = f"{key.kind}/{key.namespace}/{key.name}"
        return {n: self._reports[n][what] for n in sorted(self._reporters.get(what, ()))}

    async def _on_push(self, node: str, data: bytes) -> PushAnswer:
        ask = msgspec.msgpack.decode(data, type=PushAsk)
        site = self.roster.node(node).spec.site
        self._heard(node)
        return await self.takeover.push(node, site, ask)

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
        if ask.site is not None:
            site = self.roster.site_of.get(node, "")
            for about in self._words.take(site, node, ask.site, self.roster.nodes_at.get(site, ())):
                self._node_status.add(about)
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
        self.roster.node(node)
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

    async def _on_reach(self, node: str, data: bytes) -> ReachAnswer:
        """What nodes say that their site does not hear: to it the hub is one more way."""
        ask = msgspec.msgpack.decode(data, type=ReachAsk)
        self._heard(node)
        there = self.roster.nodes_at.get(self.roster.node(node).spec.site, set()) - {node}
        return ReachAnswer(await ask_nodes(self._bus.client, [n for n in ask.nodes if n in there]))

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
        mine = self.roster.view(node)
        if not data:
            self._heard(node)
            if self.roster.told.get(node, -1) >= mine.changed:
                return b""
            ask = None
        else:
            ask = msgspec.msgpack.decode(data, type=BeatAsk)
            # the first beat of a run of the agent is certain: it just came up and asked for its state
            self._heard(node, certain=self._runs.get(node) != ask.start)
            self._runs[node] = ask.start
            self._live[node].rtt = min(30.0, max(0.0, ask.rtt))
        self.roster.told[node] = mine.changed
        # the process that leads is who wants a full report when it is a new one
        leader = self._peers.leader if self._peers is not None else self.run_id
        answer = BeatAnswer(mine.changed, leader, self._store.epoch, short=True, now=clock.now())
        if ask is not None and ask.view:
            answer.sync = ask.view != self.roster.print(mine, self.roster.newer(self.roster.levels.get(node, LEVEL)))
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
                self.roster.told.clear()
            for node, live in list(self._live.items()):
                if slept > LOOK:
                    live.forgive(slept, now)
                if live.tick(now):
                    self._flipped(node)

    def _flipped(self, node: str) -> None:
        online = self.is_online(node)
        self._node_status.add(node)
        if not online and node in self._carried.values():
            self._carried = {n: by for n, by in self._carried.items() if by != node}
            self._poke.add(self.roster.site_of.get(node, ""))
        for other in self._words.concerned(node, self.roster.nodes_at.get(self.roster.site_of.get(node, ""), ())):
            self._node_status.add(other)
        self._refold(node)
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

    def _refold(self, node: str) -> None:
        """What a node reports of counts otherwise now."""
        for what in self._reports.get(node, {}):
            self._fold.add(Key(*what.split("/")))

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
            verdict, online = self._shown_of(node)
            try:
                await self._store.put_status(Key("Node", CLUSTER, node), status, checked=True)
                # what was folded before this was written went by the old one
                if verdict != status.get("verdict"):
                    for other in self.roster.nodes_at.get(self.roster.site_of.get(node, ""), ()):
                        self._refold(other)
                elif online != status["online"]:
                    self._refold(node)
                return None
            except Conflict:  # made of what was there before somebody else wrote: once more, if we still lead
                continue
        return _LATER

    def _shown_of(self, node: str) -> tuple[Any, Any]:
        """The verdict on a node, and whether it is online, by its status as it stands."""
        found = self._store.find(Key("Node", CLUSTER, node))
        return (found.status.get("verdict"), found.status.get("online")) if found is not None else (None, None)

    def _status_of(self, node: str) -> dict[str, Any] | None:
        """What a node's status should be; None where it is not for this process to say."""
        found = self._store.find(Key("Node", CLUSTER, node))
        if found is None or not self._leads:
            return None
        live = self._live.setdefault(node, Liveness())
        identity = self.identity(node)
        online = live.online and not identity["revoked"]  # by whichever hub process
        status = {**self._node_reports.get(node, {}), "online": online, **identity}
        if untold := self.roster.untold.get(node):
            status["notTold"] = untold
        old = found.status
        site = self.roster.site_of.get(node, "")
        status |= self._words.of(site, node, old, self.roster.nodes_at.get(site, ()))
        status["since"] = old.get("since", "") if old.get("online") == online else clock.timestamp()
        return status

    def _nodes_for(self, resource: Resource) -> list[Resource]:
        """The nodes that may have to do with a placed resource: those of its site, if it names one."""
        site = placed_sites(resource)
        if not site:
            return self._store.items("Node")
        found = (self._store.find(Key("Node", CLUSTER, n)) for n in sorted(self.roster.nodes_at.get(site, ())))
        return [n for n in found if n is not None]

    async def _fold_status(self, key: Key) -> float | None:
        try:
            return await self._folded(key)
        except Conflict:  # another process wrote meanwhile
            return _LATER

    async def _folded(self, key: Key) -> float | None:
        resource = self._store.find(key)
        if key.kind in self.on_report:
            self.on_report[key.kind](key)
        if resource is None or not self._folds(key.kind) or not self._leads:
            return None
        fold: Fold = extensions.get("fold", key.kind)
        name = f"{key.kind}/{key.namespace}/{key.name}"
        # a node that does not have the object has no say in what becomes of it
        told = [
            n
            for n in sorted(self._reporters.get(name, ()))
            if n in self.roster.site_of and key in self.roster.view(n).entries
        ]
        reports = {n: self._reports[n][name] for n in told}
        if key.kind == "Service":
            apps = {a.metadata.name: a.status for a in self._store.items("App", key.namespace)}
            every = self._store.items("Node")
            status, odd = folded(lambda r: fold(resource, every, apps, r), reports)
        else:
            nodes = self._nodes_for(resource)
            status, odd = folded(lambda r: fold(resource, nodes, r), reports)
        if odd:
            log.warning("%s: what %s reports is not understood and left out", key, ", ".join(odd[:10]))
        await self._store.put_status(key, status, checked=True)
        if key.kind == "App" and self._folds("Service"):
            for service in self.roster.views.followers(key):
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
        if node in self.roster.levels:
            known |= {"level": self.roster.levels[node], "untold": self.roster.untold.get(node, [])}
        doc = msgspec.json.encode(known)
        if doc != self._store.fact(f"report.{node}"):
            try:
                await self._store.set_fact(f"report.{node}", doc, expect=self._store.fact_revision(f"report.{node}"))
            except Conflict:  # another process leads, or did until now
                return _LATER
        return None
