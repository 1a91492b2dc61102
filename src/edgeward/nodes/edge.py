"""The node's side of the link: beats, sync, local changes up, reports up.

Everything is a request over the local nats-server, whose leaf connection carries it when the link is there; without it
the server answers "no responders" at once, so trying costs nothing. The four tasks are level-triggered: each knows what
it still owes (a revision, undecided changes, unreported state) and pays when the hub answers again, at once.

An idle link carries one empty message each way every :data:`~edgeward.nodes.liveness.BEAT` seconds. All else that is
asked and answered stands in for a beat. In doubt a beat says all, and names a reply subject, so that the node's own
server says at once when there is no link.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from nats.aio.msg import Msg

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.identity import inbox_prefix
from edgeward.core.records import SqliteRecords
from edgeward.core.resource import Key
from edgeward.nodes.ancestry import Ancestor
from edgeward.nodes.hubtime import HubClock
from edgeward.nodes.liveness import DOWN, LOOK, Liveness, Pace
from edgeward.nodes.older import UNSAID, trimmed
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
    Status,
    SyncAnswer,
    SyncAsk,
)

log = logging.getLogger("edgeward.nodes")

T = TypeVar("T")
#: Seconds for an answer, and more for each second of the link's round trip.
_TIMEOUT, _PER_ROUND_TRIP = 10.0, 20.0
_PUSH = 50
_EVENTS = 200
#: Beats that may be on their way at once; each answer comes on a subject that says which it is for.
_SLOTS = 4


class ReplicaLike(Protocol):
    """What the link needs of the replica."""

    hub_revision: int
    hub_level: int | None
    epoch: str
    store_id: str

    def pending(self) -> list[LocalChange]: ...
    def hub_view(self) -> str: ...
    def hub_keys(self) -> list[Key]: ...
    def strange(self) -> dict[Key, str]: ...
    def apply_sync(
        self,
        objects: list[HubObject],
        *,
        revision: int,
        epoch: str,
        full: bool,
        line: Sequence[Ancestor] = (),
        level: int = ...,
    ) -> tuple[list[Key], list[Key]]: ...
    def resolve(self, seq: int, now: HubObject) -> None: ...
    def meta(self, name: str) -> str: ...
    def set_meta(self, name: str, value: str) -> str: ...


class SiteLike(Protocol):
    """What the link needs of the other nodes of the site (``sharing.py``)."""

    def shared(self) -> list[str]:
        """Those that get from this node what the hub says."""

    def passes_on(self, ask: SyncAsk, answer: SyncAnswer) -> SyncAnswer:
        """The answer that is in a signed one; it is kept for the others."""

    async def news(self, epoch: str, since: int, wanted: int) -> list[list[SyncAnswer]]:
        """What another node has that is newer than ``since``: syncs, each with its pages."""

    def carried(self) -> bool:
        """Whether another node asks the hub for this one."""

    def moved(self) -> None:
        """The replica has something new."""


class NodeEdge:
    """One node's conversation with its hub."""

    def __init__(
        self, node: str, replica: ReplicaLike, records: SqliteRecords, on_flip: Callable[[bool], None] | None = None
    ) -> None:
        self.node = node
        self._replica = replica
        self._records = records
        self._on_flip = on_flip
        self._bus: Bus | None = None
        self._live = Liveness()
        self._pace = Pace()
        self._asked = [0.0] * _SLOTS
        self._asked_last = 0.0
        self._beat = 0
        #: The hub takes empty beats, and any request for a sign of life.
        self._short = False
        self._told_rtt = -1.0
        self._timers: set[asyncio.TimerHandle] = set()
        self._run = clock.new_id(12)
        self.hub = ""
        #: What is known of the hub's clock.
        self.hub_clock = HubClock()
        self._sync_wanted = asyncio.Event()
        self._push_wanted = asyncio.Event()
        self._report_wanted = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._look_again = asyncio.Event()
        #: True once a sync succeeded in this run, or there was one in an earlier run.
        self.synced = asyncio.Event()
        if replica.epoch:
            self.synced.set()
        self._statuses: dict[Key, dict[str, Any]] = {}
        self._dirty: set[Key] = set()
        self._full = True
        self._node_status: dict[str, Any] = {}
        self._node_dirty = False
        self._site_said: dict[str, dict[str, Any]] | None = None
        self._site_dirty = False
        #: What was said to be not understood.
        self._strange = replica.strange()
        self.on_strange: Callable[[], None] | None = None
        #: Gets what the hub sent, and whether it is all; True: it is not to be taken now.
        self.held_back: Callable[[list[HubObject], bool], bool] = lambda objects, full: False
        #: Those of this node's changes that may be sent now, from the first one on.
        self.sendable: Callable[[list[LocalChange]], list[LocalChange]] = lambda changes: changes
        #: Called when what is said of an object is something else.
        self.on_report: Callable[[Key], None] = lambda key: None
        #: What is had from, and passed on to, other nodes of the site; None: each asks the hub.
        self.site: SiteLike | None = None
        #: The hub's newest revision, as far as it said; and: it said that what is held here is not right.
        self._told, self._doubt = 0, False
        #: What came last is held back.
        self._waits = False
        self.counters = {"beats": 0, "syncs": 0, "full_syncs": 0, "shared": 0, "pushed": 0, "reports": 0}

    @property
    def online(self) -> bool:
        return self._live.online

    @property
    def unanswered(self) -> float:
        """Seconds that a beat has waited for its answer; 0: none does."""
        return max(0.0, clock.monotonic() - self._pace.waiting)

    @property
    def good(self) -> bool:
        """The link is not known to be slow or to be late: what is not answered soon is not answered."""
        return self._live.patience <= DOWN

    @property
    def next_beat(self) -> float:
        """Seconds until the next beat, as far as is known now."""
        return max(0.0, self._pace.due(online=self.online, jitter=0.0) - clock.monotonic())

    def beat_within(self, seconds: float) -> None:
        """Has the next beat come earlier than its turn."""
        self._pace.pulled = min(self._pace.pulled, clock.monotonic() + seconds)
        self._look_again.set()

    def excuse(self) -> None:
        """The present silence is a cut's, by what the site's nodes see together: it says nothing of how late answers
        are on this link."""
        self._live.excused = True

    @property
    def silence(self) -> float:
        """Seconds since the hub was last heard."""
        return clock.monotonic() - self._live.heard

    # -- what the rooms say -------------------------------------------------------------------------------------------

    def report(self, key: Key, status: dict[str, Any] | None) -> None:
        """The present status of an object on this node; None when it is gone from here."""
        if status is None:
            if self._statuses.pop(key, None) is None:
                return
        elif self._statuses.get(key) == status:
            return
        else:
            self._statuses[key] = status
        self._dirty.add(key)
        self._report_wanted.set()
        self.on_report(key)

    def report_node(self, status: dict[str, Any]) -> None:
        if status != self._node_status:
            self._node_status, self._node_dirty = status, True
            self._report_wanted.set()

    def report_site(self, said: dict[str, dict[str, Any]] | None) -> None:
        """The verdicts of this node's site, if it is this node that tells the hub of them; None: it is another."""
        if said != self._site_said:
            self._site_said, self._site_dirty = said, said is not None
            if said is not None:
                self._report_wanted.set()

    def statuses(self) -> dict[Key, dict[str, Any]]:
        return dict(self._statuses)

    def wake_push(self) -> None:
        """There is a local change to send."""
        self._push_wanted.set()

    def resume(self) -> None:
        """What waited here goes both ways again."""
        self._sync_wanted.set()
        self._push_wanted.set()

    def wake_events(self) -> None:
        self._report_wanted.set()

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(self, bus: Bus) -> None:
        """Runs until cancelled. ``bus``: the connection to the local server."""
        self._bus = bus

        async def poked(msg: Msg) -> None:
            self._told = max(self._told, int(msg.data)) if msg.data.isdigit() and len(msg.data) < 19 else self._told
            self._sync_wanted.set()

        await bus.subscribe(f"ew.node.{self.node}.poke", poked)
        await bus.subscribe(f"ew.node.{self.node}.b", self._answered)
        for slot in range(_SLOTS):
            await bus.subscribe(f"{inbox_prefix(self.node)}.{slot}", self._answered)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beats())
            group.create_task(self._owed(self._sync_wanted, self._sync, "sync"))
            group.create_task(self._owed(self._push_wanted, self._push, "push"))
            group.create_task(self._owed(self._report_wanted, self._send_reports, "report"))

    def link_changed(self) -> None:
        """There is a new connection to the hub, or none any more: find out now, not at the next beat."""
        self._pace.doubt()
        self._live.excused = True
        self._beat_now.set()

    async def _request(self, verb: str, ask: Any, answer: type[T], timeout: float = _TIMEOUT) -> T:
        if self._bus is None:
            raise Unreachable("the link is not started")
        # a slow link may lose a packet too; asking again would only put the same behind what waits already
        timeout += _PER_ROUND_TRIP * self._pace.rtt
        subject = f"ew.hub.{verb}.{self.node}"
        began = clock.monotonic()
        try:
            msg = await self._bus.request(subject, msgspec.msgpack.encode(ask), timeout=timeout)
        except Unreachable:
            self._pace.doubt()
            self._look_again.set()
            raise
        try:
            got = msgspec.msgpack.decode(msg.data, type=answer)
        except msgspec.DecodeError as e:
            raise EdgewardError(f"the hub's answer to {verb} is not understood: {e}") from e
        error = getattr(got, "error", "")
        if error:
            raise EdgewardError(f"the hub refused {verb}: {error}")
        self._heard_time(getattr(got, "now", 0.0), began)
        if self._short:
            self._exchanged(began)
        return got

    def _heard_time(self, hub: float, asked: float) -> None:
        """``hub``: its time as it answered what was asked at ``asked`` (monotonic); 0: it did not say."""
        if hub:
            answered = clock.steady()
            self.hub_clock.heard(hub, answered - (clock.monotonic() - asked), answered)

    def _exchanged(self, asked: float, *, certain: bool = False) -> None:
        now = clock.monotonic()
        self._pace.answer(now, asked)
        self._live.rtt = self._pace.rtt
        if self._live.beat(now, certain=certain):
            self._flipped()
        self._look_again.set()

    async def _beats(self) -> None:
        """One small question each period tells both sides that the other is there, and what is new."""
        while True:
            now = clock.monotonic()
            if self._live.tick(now):
                self._flipped()
            due = self._pace.due(online=self.online, jitter=random.random())  # noqa: S311 - jitter
            if now >= due or self._beat_now.is_set():
                self._beat_now.clear()
                await self._send_beat()
                continue
            if self.online:
                due = min(due, self._live.heard + self._live.patience + 0.01)
            self._look_again.clear()
            waits = [asyncio.ensure_future(e.wait()) for e in (self._beat_now, self._look_again)]
            try:
                await asyncio.wait(waits, timeout=due - now, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for w in waits:
                    w.cancel()
            if (slept := clock.monotonic() - due) > LOOK:
                self._live.forgive(slept, clock.monotonic())

    async def _send_beat(self) -> None:
        self._beat += 1
        slot = self._beat % _SLOTS
        data, reply = b"", ""
        rtt = round(self._pace.rtt * 2) / 2
        if not (self._pace.sure and self._short) or rtt != self._told_rtt:
            view = self._replica.hub_view() if self._replica.epoch else ""
            data = msgspec.msgpack.encode(BeatAsk(self._beat, self._run, view, rtt))
            reply = f"{inbox_prefix(self.node)}.{slot}"
            self._told_rtt = rtt
        now = self._asked[slot] = self._asked_last = clock.monotonic()
        self._pace.ask(now)
        if self._bus is None:
            return
        try:
            await self._bus.publish(f"ew.hub.beat.{self.node}", data, reply=reply)
        except EdgewardError:
            self._pace.refuse(clock.monotonic())

    async def _answered(self, msg: Msg) -> None:
        # an answer to an empty beat does not say which one: one that was late is taken for the last one, no harm done
        slot = msg.subject[-1]
        asked = self._asked[int(slot)] if slot.isdigit() else self._asked_last
        if msg.headers and msg.headers.get("Status") == "503" and not msg.data:
            self._pace.refuse(clock.monotonic())
            self._look_again.set()
            return
        if msg.data:
            try:
                answer = msgspec.msgpack.decode(msg.data, type=BeatAnswer)
            except msgspec.DecodeError as e:
                log.warning("the hub's answer to beat is not understood: %s", e)
                return
            if answer.error:
                log.warning("the hub refused beat: %s", answer.error)
                return
            self._heed(answer)
            self._heard_time(answer.now, asked)
        self.counters["beats"] += 1
        self._exchanged(asked, certain=not self.synced.is_set() or self.counters["beats"] <= 2)
        if self._replica.pending():
            self._push_wanted.set()

    def _heed(self, answer: BeatAnswer) -> None:
        """What an answer says that is not empty."""
        self._short = answer.short
        wait = 0.0
        if answer.hub != self.hub:
            # it asks the whole fleet for this: each node takes its turn
            wait = random.uniform(0, answer.spread) if self.hub else 0.0  # noqa: S311 - jitter
            self.hub, self._full = answer.hub, True
            self._later(wait, self._report_wanted)
        known = self._replica
        if answer.sync or answer.epoch != known.epoch or answer.revision > known.hub_revision:
            self._doubt |= answer.sync or answer.epoch != known.epoch
            self._told = max(answer.revision, self._told) if answer.epoch == known.epoch else 0
            self._later(wait, self._sync_wanted)

    def _later(self, seconds: float, event: asyncio.Event) -> None:
        if seconds <= 0:
            event.set()
            return

        def now() -> None:
            self._timers.discard(handle)
            event.set()

        handle = asyncio.get_running_loop().call_later(seconds, now)
        self._timers.add(handle)

    def _flipped(self) -> None:
        log.info("link %s", "up" if self.online else "down")
        if self.online:
            self._push_wanted.set()
            if not self._full:  # a full report has its own time
                self._report_wanted.set()
            if not self._short:  # a hub that does not compare what we hold
                self._sync_wanted.set()
                self._report_wanted.set()
        if self._on_flip is not None:
            self._on_flip(self.online)

    async def _owed(self, wanted: asyncio.Event, pay: Callable[[], Any], what: str) -> None:
        """Pays a debt whenever it is due; what failed stays due."""
        delay = 0.0
        while True:
            await wanted.wait()
            if delay:
                await asyncio.sleep(delay)  # the back-off between two tries
            wanted.clear()
            try:
                await pay()
                delay = 0.0
            except (EdgewardError, OSError) as e:
                delay = min(5.0, delay * 2 or 0.25) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
                if not isinstance(e, Unreachable):
                    log.warning("%s: %s", what, e)
                wanted.set()
                if isinstance(e, Unreachable):
                    delay = min(delay, 1.0)

    # -- sync ----------------------------------------------------------------------------------------------------

    def there_is(self, revision: int) -> None:
        """Another node of the site has news of the hub's."""
        if revision > self._replica.hub_revision:
            self._sync_wanted.set()

    async def _sync(self) -> None:
        if await self._from_the_site():
            return
        self._doubt = False
        for attempt in range(3):
            since = self._replica.hub_revision if attempt == 0 else 0
            share = self.site.shared() if self.site is not None else []
            ask = SyncAsk(since, self._replica.epoch, level=LEVEL, share=share)
            answers: list[SyncAnswer] = []
            while not answers or answers[-1].more:
                if answers:
                    last = answers[-1].objects[-1].key
                    ask.after = (last.kind, last.namespace, last.name)
                answer = await self._request("sync", ask, SyncAnswer)
                if answer.signed and self.site is not None:
                    answer = self.site.passes_on(ask, answer)
                answers.append(answer)
            if await self._take(answers):
                return
            log.info("the replica differs from the hub's view, asking for all of it")
        if len(answers) == 1:
            raise EdgewardError("the replica differs from the hub's view after a full sync")

    def look(self) -> None:
        """The hub is to be asked, though nothing is known to be new."""
        self._sync_wanted.set()

    async def _from_the_site(self) -> bool:
        """Whether another node of the site had all that the hub is known to have."""
        if self.site is None or self._doubt or not self._replica.epoch:
            return False
        waits = False
        for answers in await self.site.news(self._replica.epoch, self._replica.hub_revision, self._told):
            if answers[-1].revision > self._replica.hub_revision and not await self._take(answers):
                self._doubt = True
                return False
            self.counters["shared"] += 1
            waits = self._waits
        # with no link there is nobody else to ask; and what waits here waits whoever sent it
        return waits or (self._replica.hub_revision >= self._told and (self.site.carried() or not self.online))

    async def _take(self, answers: list[SyncAnswer]) -> bool:
        """Has the replica take one sync, all its pages; False where it does not hold what it should hold then."""
        objects = [o for page in answers for o in page.objects]
        answer = answers[-1]
        if answer.names is not None:
            keep = {Key(*n) for n in answer.names}
            gone = [k for k in self._replica.hub_keys() if k not in keep]
            objects += [HubObject(k.kind, k.namespace, k.name, answer.revision) for k in gone]
        self._waits = self.held_back(objects, answer.full)
        if self._waits:
            return True
        stayed, lost = self._replica.apply_sync(
            objects,
            revision=answer.revision,
            epoch=answer.epoch,
            full=answer.full,
            line=answer.line,
            level=answer.level or UNSAID,
        )
        await self._restored(stayed, lost)
        await self._say_strange()
        self.counters["syncs"] += 1
        self.counters["full_syncs"] += answer.full
        self.synced.set()
        if self.site is not None:
            self.site.moved()
        return not answer.view or answer.view == self._replica.hub_view()

    async def _say_strange(self) -> None:
        """What the hub holds for this node and this release cannot read: it stays as it was, and that is said."""
        strange = self._replica.strange()
        for key, why in strange.items():
            if self._strange.get(key) == why:
                continue
            message = f"this node's release does not understand it; it stays as it was here: {why} (upgrade the node)"
            record = {"type": "Warning", "reason": "NotUnderstood", "resource": str(key), "message": message}
            log.warning("%s: %s", key, message)
            await self._records.append("events", record)
            self.wake_events()
        if strange != self._strange and self.on_strange is not None:
            self.on_strange()
        self._strange = strange

    async def _restored(self, stayed: list[Key], lost: list[Key]) -> None:
        """Says what the site has that its hub lost by a restore, and has it sent."""
        if stayed:
            self._push_wanted.set()
            await self._say_restored(
                "NewerThanHub",
                f"the hub was restored from a backup that is older than {_names(stayed)} here: the site keeps what it "
                "has, and sends it to the hub",
            )
        if lost:
            await self._say_restored(
                "OlderFromHub",
                f"the hub was restored from a backup that is older than {_names(lost)} here: only the hub may write "
                "that, so the hub's stands",
            )

    async def _say_restored(self, reason: str, message: str) -> None:
        record = {"type": "Warning", "reason": reason, "resource": f"Node/{self.node}", "message": message}
        await self._records.append("events", record)
        self.wake_events()

    # -- local changes up ------------------------------------------------------------------------------------------

    async def _push(self) -> None:
        while changes := self.sendable(self._replica.pending())[:_PUSH]:
            if not self.online:
                return
            answer = await self._request(
                "push", PushAsk(self._replica.store_id, self._dated(changes)), PushAnswer, timeout=30
            )
            by_seq = {c.seq: c for c in changes}
            for decided in answer.decided:
                change = by_seq.pop(decided.seq, None)
                if change is None:
                    continue
                if decided.journal is not None and decided.outcome != "same":
                    await self._records.append("journal", decided.journal)
                    lost = decided.journal.get("loser") == "edge"
                    await self._records.append(
                        "events",
                        {
                            "type": "Warning" if lost else "Normal",
                            "reason": "LocalChangeLost" if lost else "LocalChangeTakenOver",
                            "resource": str(change.key),
                            "message": f"{decided.outcome}: {decided.why}",
                        },
                    )
                    self.wake_events()
                self._replica.resolve(decided.seq, decided.now)
                self.counters["pushed"] += 1
            if by_seq:
                raise EdgewardError(f"the hub left {len(by_seq)} local changes undecided")

    async def push_for(self, node: str, store: str, changes: list[LocalChange]) -> list[Decided]:
        """What the hub decides of changes that another node of this site made. Raises ``Unreachable``."""
        answer = await self._request(
            "push", PushAsk(store, [self._readable(c) for c in changes], node), PushAnswer, timeout=30
        )
        return answer.decided

    def _dated(self, changes: list[LocalChange]) -> list[LocalChange]:
        """With the times by the hub's clock, for the rule ``newest``."""
        now, up = clock.steady(), clock.boottime()
        return [msgspec.structs.replace(self._readable(c), made=self.hub_clock.of(c.time, now, up)) for c in changes]

    def _readable(self, change: LocalChange) -> LocalChange:
        """As the hub's release can read it: parts that say nothing are written too, and it may not know all."""
        level = self._replica.hub_level
        if change.stored is None or level is None or level >= LEVEL:
            return change
        return msgspec.structs.replace(change, stored=trimmed(change.stored, level))

    # -- reports up ---------------------------------------------------------------------------------------------------

    async def flush(self, timeout: float = 2.0) -> None:
        """Sends what is unreported, once, if the link is there: before an orderly end."""
        with contextlib.suppress(EdgewardError, TimeoutError):
            async with asyncio.timeout(timeout):
                await self._send_reports()

    async def _send_reports(self) -> None:
        if not self.online:
            return
        full, self._full = self._full, False
        dirty = set(self._statuses) if full else set(self._dirty)
        self._dirty -= dirty
        node_status = self._node_status if self._node_dirty or full else None
        self._node_dirty = False
        site = self._site_said if self._site_dirty or full else None
        self._site_dirty = False
        sent = int(self._replica.meta("events_sent") or 0)
        events = self._records.first_after("events", sent, _EVENTS)
        if not dirty and not full and node_status is None and site is None and not events:
            return
        ask = ReportAsk(
            [Status(k.kind, k.namespace, k.name, self._statuses.get(k)) for k in sorted(dirty)],
            full,
            node_status,
            [{**e, "store": self._replica.store_id} for e in events],
            site,
        )
        try:
            await self._request("report", ask, Ok)
        except EdgewardError:
            self._dirty |= dirty
            self._full |= full
            self._node_dirty = self._node_dirty or node_status is not None
            self._site_dirty = self._site_dirty or (site is not None and site == self._site_said)
            raise
        self.counters["reports"] += 1
        if events:
            self._replica.set_meta("events_sent", str(events[-1]["seq"]))
        if len(events) == _EVENTS:
            self._report_wanted.set()


def _names(keys: list[Key]) -> str:
    """A few of them by name, the others by number."""
    more = len(keys) - 10
    return ", ".join(str(k) for k in keys[:10]) + (f" and {more} more" if more > 0 else "")
