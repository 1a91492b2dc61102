"""The side of the replica that the nodes of a site have in common: changes of others, beside one's own.

A row's local side may be another node's change. Its origin, its stamp and what it was made on top of lie in tables of
their own (an earlier release finds such a row as a change made here, and sends it as one). What comes from a sibling is
checked as the hub would check it, is on the disk with what it replaces before anybody sees it, and whoever lost is in
the journal before that. The decisions are ``nodes/siblings.py``'s.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from edgeward.core import clock
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.registry import kinds
from edgeward.core.resource import MAX_DOCUMENT, Key, Resource, check_key, check_stored, from_stored, to_stored
from edgeward.core.scope import check_reach, hub_fields
from edgeward.core.store import Store, same_desired
from edgeward.core.vault import Vault
from edgeward.nodes.siblings import (
    HIGHEST,
    LATEST,
    LONGEST,
    MOST,
    SEEN_MOST,
    TICK,
    Answer,
    Digest,
    Dot,
    Finished,
    Horizon,
    Lost,
    SiteChange,
    answer,
    meet,
    together,
)
from edgeward.nodes.wire import HubObject, LocalChange

log = logging.getLogger("edgeward.agent")

#: Finished changes of which is remembered what the hub said.
_REMEMBERED = 2000
#: Changes that were not taken and are not asked for again.
_REFUSED = 500
#: Replicas of which is remembered how far their changes are finished.
_HORIZONS = 1024
SCHEMA = """
CREATE TABLE IF NOT EXISTS site_changes(
  kind TEXT, namespace TEXT, name TEXT, at INTEGER, node TEXT, store TEXT, seq INTEGER, stamp REAL, seen TEXT,
  PRIMARY KEY (kind, namespace, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS site_finished(
  n INTEGER PRIMARY KEY AUTOINCREMENT, node TEXT, store TEXT, seq INTEGER, doc BLOB);
CREATE TABLE IF NOT EXISTS site_horizons(origin TEXT PRIMARY KEY, doc TEXT) WITHOUT ROWID;
"""


def _place(node: str, store: str, seq: int) -> str:
    return f"finished/{node}/{store}/{seq}"


class Row(msgspec.Struct):
    """One object's two sides. ``node``, ``store``, ``number``: of a local side that is another node's change."""

    revision: int = 0
    seen: int = 0
    hub_revision: int = 0
    hub: Resource | None = None
    hub_status: dict[str, Any] = {}
    op: str = ""
    local: Resource | None = None
    seq: int = 0
    base: int = 0
    changed_at: float = 0.0
    actor: str = ""
    status: dict[str, Any] = {}
    #: The first change of one's own since the hub's last answer; ``seq`` is the last one.
    first: int = 0
    node: str = ""
    store: str = ""
    number: int = 0
    stamp: float = 0.0
    #: What the local side replaces: origin -> number.
    over: dict[str, int] = {}

    @property
    def foreign(self) -> bool:
        return bool(self.store)

    def settle(self) -> None:
        """There is no local side any more."""
        self.op, self.local, self.base, self.seq, self.first = "", None, 0, 0, 0
        self.node, self.store, self.number, self.stamp, self.over = "", "", 0, 0.0, {}


class SharedRows(Store):
    """What :class:`~edgeward.agent.replica.Replica` has of this."""

    site: str
    node: str
    store_id: str
    epoch: str
    hub_revision: int
    _rows: dict[Key, Row]
    _vault: Vault
    _db: Any
    _seq: int
    _last_stamp: float

    def _open_shared(self) -> None:
        #: The time by the hub's clock, as far as it is known.
        self.hub_time: Callable[[], float] = clock.now
        #: Called with each loss before it is made durable: writes the journal.
        self.on_lost: Callable[[Lost, Resource | None], None] = lambda lost, resource: None
        self._finished: dict[Dot, Finished] = {}
        self._horizons: dict[str, Horizon] = {}
        self._new_finished: list[Finished] = []
        #: Changes of siblings that cannot be taken here: of a newer release, or what no site may write.
        self.refused: dict[Dot, Key] = {}
        #: One more whenever what is open is another.
        self.open_version = 0

    def _load_shared(self) -> None:
        self._last_stamp = float(self.meta("stamp") or 0.0)
        for kind, ns, name, at, node, store, seq, stamp, seen in self._db.execute("SELECT * FROM site_changes"):
            row = self._rows.get(Key(kind, ns, name))
            if row is None or not row.op:
                continue
            row.stamp, row.over = stamp, msgspec.json.decode(seen, type=dict[str, int])
            if at == row.seq:
                row.node, row.store, row.number = node, store, seq
            else:  # an earlier release wrote on top of it
                row.stamp += TICK
                row.over = together(row.over, {f"{node}/{store}": seq} if store else {})
        for row in self._rows.values():
            row.stamp = row.stamp or row.changed_at
        for node, store, seq, doc in self._db.execute("SELECT node, store, seq, doc FROM site_finished ORDER BY n"):
            known = msgspec.msgpack.decode(self._vault.unseal(doc, _place(node, store, seq)), type=Finished)
            self._finished[known.dot] = known
        for origin, text in self._db.execute("SELECT * FROM site_horizons"):
            self._horizons[origin] = msgspec.json.decode(text, type=Horizon)

    # -- in the replica's transaction ------------------------------------------------------------------------------

    def _save_shared(self, keys: Iterable[Key]) -> None:
        for key in keys:
            at, row = (key.kind, key.namespace, key.name), self._rows.get(key)
            if row is None or not row.op:
                self._db.execute("DELETE FROM site_changes WHERE kind=? AND namespace=? AND name=?", at)
                continue
            seen = msgspec.json.encode(row.over).decode()
            mine = (row.seq, row.node, row.store, row.number, row.stamp, seen)
            self._db.execute("INSERT OR REPLACE INTO site_changes VALUES(?,?,?,?,?,?,?,?,?)", (*at, *mine))
        self._db.execute("INSERT OR REPLACE INTO meta VALUES('stamp', ?)", (repr(self._last_stamp),))
        for known in self._new_finished:
            self._db.execute(
                "INSERT INTO site_finished(node, store, seq, doc) VALUES(?,?,?,?)",
                # what the hub holds since may be a Secret
                (*known.dot, self._vault.seal(msgspec.msgpack.encode(known), _place(*known.dot))),
            )
        if self._new_finished:
            self._db.execute(
                "DELETE FROM site_finished WHERE n <= (SELECT max(n) FROM site_finished) - ?", (_REMEMBERED,)
            )

    def _saved_shared(self) -> None:
        """What was to be remembered is on the disk."""
        for known in self._new_finished:
            self._finished[known.dot] = known
        self._new_finished = []
        while len(self._finished) > _REMEMBERED:
            del self._finished[next(iter(self._finished))]
        self.open_version += 1

    # -- a change made here --------------------------------------------------------------------------------------------

    def _stamp_local(self, row: Row) -> None:
        """A change made here is on top of what the row had as its local side, whoever's it was. Called before it is."""
        # later than all that was made here: what a change is said to replace is always of an earlier stamp
        stamp = max(self.hub_time(), self._last_stamp + TICK, row.stamp + TICK if row.op else 0.0)
        if row.hub is not None and row.hub.metadata.updateTimestamp:
            stamp = max(stamp, clock.parse_timestamp(row.hub.metadata.updateTimestamp) + TICK)
        if row.op:
            row.over = together(row.over, {self._dot(row).origin: self._dot(row).seq})
        stamp = min(stamp, LATEST)  # what is later than any true clock is believed by nobody
        row.node, row.store, row.number, row.stamp = "", "", 0, stamp
        self._last_stamp = stamp

    def _dot(self, row: Row) -> Dot:
        return Dot(row.node, row.store, row.number) if row.foreign else Dot(self.node, self.store_id, row.seq)

    def _finish_own(self, seq: int, now: HubObject) -> None:
        """The hub decided a change of this node: the others will ask."""
        self._new_finished.append(
            Finished(self.node, self.store_id, seq, now.kind, now.namespace, now.name, now, self.epoch)
        )

    # -- what the others ask -------------------------------------------------------------------------------------------

    def open_changes(self) -> dict[Key, SiteChange]:
        """Every change that the hub did not decide yet, of whichever node."""
        return {k: self._change(k, r) for k, r in self._rows.items() if r.op}

    def _change(self, key: Key, row: Row) -> SiteChange:
        stored = to_stored(row.local) if row.local else None
        at = (key.kind, key.namespace, key.name)
        return SiteChange(*self._dot(row), *at, row.op, row.base, row.stamp, row.actor, stored, row.over)

    def digest(self) -> Digest:
        """What this node asks another with: what it holds, and what it does not want again."""
        held = {k: self._dot(r) for k, r in self._rows.items() if r.op}
        known = {k: dot for dot, k in self.refused.items()} | held
        return Digest(
            self.node, self.store_id, [(k.kind, k.namespace, k.name, *dot) for k, dot in known.items()][:MOST]
        )

    def answer(self, ask: Digest) -> Answer:
        """What another node lacks."""
        return answer(ask, self._seq, self.open_changes(), self._gone, (self.node, self.store_id))

    def _gone(self, dot: Dot, key: Key) -> Finished | None:
        now = self._now(key)
        if (known := self._finished.get(dot)) is not None:
            newer = known.now is None or known.epoch != self.epoch or now.revision > known.now.revision
            return msgspec.structs.replace(known, now=now, epoch=self.epoch) if newer else known
        if dot.origin == Dot(self.node, self.store_id, 0).origin:
            row = self._rows.get(key)
            if dot.seq > self._seq or (row is not None and row.op and not row.foreign and row.seq == dot.seq):
                return None
        elif (horizon := self._horizons.get(dot.origin)) is None or not horizon.finished(dot.seq):
            return None
        return Finished(*dot, key.kind, key.namespace, key.name, now, self.epoch)

    def _now(self, key: Key) -> HubObject:
        row = self._rows.get(key)
        if row is None or row.hub is None:
            return HubObject(key.kind, key.namespace, key.name, self.hub_revision)
        return HubObject(
            key.kind, key.namespace, key.name, row.hub_revision, to_stored(row.hub), row.hub_status or None
        )

    # -- what they answer ------------------------------------------------------------------------------------------

    def take(self, got: Answer) -> list[Finished]:
        """Takes what another node answered: changes it has, and which are open no more. In one transaction.

        Gives the changes of *this* node that another one had the hub decide. Raises ``Refused`` when the disk is full.
        """
        before: dict[Key, Row | None] = {}
        mine = [f for f in got.finished if self._finish(before, f)]
        for change in got.changes:
            try:
                self._small(change)
                self._take(before, change)
            except EdgewardError as e:
                if change.dot in self.refused:
                    continue
                log.warning("a change of %s that came from node %s is not taken: %s", change.key, got.node, e)
                while len(self.refused) >= _REFUSED:
                    del self.refused[next(iter(self.refused))]
                self.refused[change.dot] = change.key
                self.open_version += 1
        self._learn(got)
        if before or self._new_finished:
            self._commit(before)
        return mine

    @staticmethod
    def _small(change: SiteChange) -> None:
        """A change is passed on whole, in one answer."""
        if change.stored is not None and len(msgspec.msgpack.encode(change.stored)) > 2 * MAX_DOCUMENT:
            raise Invalid("the change is too large", resource=str(change.key))

    def finish(self, known: Finished) -> None:
        """The hub decided a change of another node, asked by this one."""
        before: dict[Key, Row | None] = {}
        self._finish(before, known)
        self._commit(before)

    def _learn(self, got: Answer) -> None:
        origin = Dot(got.node, got.store, 0).origin
        horizon = Horizon(got.upto, got.mine)
        if got.more or horizon == self._horizons.get(origin) or len(origin) > LONGEST:
            return
        while len(self._horizons) >= _HORIZONS and origin not in self._horizons:  # replicas of boxes long wiped
            gone = next(iter(self._horizons))
            del self._horizons[gone]
            self._db.execute("DELETE FROM site_horizons WHERE origin=?", (gone,))
        text = msgspec.json.encode(horizon).decode()
        self._db.execute("INSERT OR REPLACE INTO site_horizons VALUES(?,?)", (origin, text))
        self._horizons[origin] = horizon

    def _finish(self, before: dict[Key, Row | None], known: Finished) -> bool:
        """True where it is this node's own change, and was open."""
        self.refused.pop(known.dot, None)
        row = self._rows.get(known.key)
        open_here = row is not None and bool(row.op) and self._dot(row) == known.dot
        if known.dot not in self._finished and (known.outcome or open_here):
            self._new_finished.append(known)
        if row is None or not open_here:
            return False
        own = not row.foreign
        if own and not known.outcome:
            return False  # what became of it here nobody knows better, but for what the hub said
        row = self._touch(before, known.key)
        row.settle()
        now = known.now
        fresh = now is not None and now.key == known.key and known.epoch == self.epoch
        newer = now is not None and now.revision > max(row.hub_revision, self.hub_revision)
        if now is not None and fresh and newer and self._credible(now, row):
            self._set_hub(known.key, row, now)
        elif row.hub is None:
            del self._rows[known.key]
        return own

    def _credible(self, now: HubObject, row: Row) -> bool:
        """Whether a sibling's word of what the hub holds is shown until the hub's own comes: not of what only the hub
        may write, for that could be the sibling's own."""
        if not 0 <= now.revision <= HIGHEST:
            return False
        if now.stored is None:
            return True
        try:
            check_stored(now.stored)
            said = from_stored(now.stored)
            check_reach(said, self.site)
        except EdgewardError:
            return False
        kept = hub_fields(said, row.hub)
        return said.key == now.key and all(getattr(said.spec, k) == v for k, v in kept.items())

    def _take(self, before: dict[Key, Row | None], change: SiteChange) -> None:
        key, dot = change.key, change.dot
        if dot.origin == Dot(self.node, self.store_id, 0).origin:
            if dot.seq <= HIGHEST // 2:  # a file put back from a copy must not count again from there
                self._seq = max(self._seq, dot.seq)
            return
        row = self._rows.get(key)
        held = self._change(key, row) if row is not None and row.op else None
        if (held is None or held.dot != dot) and self._gone(dot, key) is not None:
            return
        wanted = self._checked(change)
        meeting = meet(held, change)
        if meeting.lost is not None:
            self._say_lost(meeting.lost, row)
        if not meeting.take and held is not None and meeting.seen == held.seen:
            return
        row = self._touch(before, key)
        row.over = meeting.seen
        if not meeting.take:
            return
        row.first = row.first if held is not None else 0
        self._seq += 1
        row.op, row.local, row.base, row.seq = change.op, wanted, change.base, self._seq
        row.node, row.store, row.number, row.stamp = change.node, change.store, change.seq, change.stamp
        row.changed_at, row.actor = clock.steady(), change.actor
        if change.op == "delete":
            row.status = {}

    def _say_lost(self, lost: Lost, row: Row | None) -> None:
        change, winner = lost
        wanted = from_stored(change.stored) if change.stored is not None else None
        won = from_stored(winner.stored) if winner.stored is not None else None
        if (wanted is None and won is None) or (wanted and won and same_desired(wanted, won)):
            return
        hub = row.hub if row is not None else None
        if wanted is not None and hub is not None and same_desired(wanted, hub):
            return  # the hub took it over long ago
        self.on_lost(lost, wanted)

    def _checked(self, change: SiteChange) -> Resource | None:
        """The document of a sibling's change; raises what the hub would refuse of it, as far as this node can tell."""
        key = change.key
        if change.op not in ("put", "delete") or (change.op == "put") != (change.stored is not None):
            raise Invalid("a change is a put with a document or a delete", resource=str(key))
        if len(change.seen) > SEEN_MOST or not change.node or not change.store:
            raise Invalid("the change does not say where it comes from", resource=str(key))
        # one node's lie must not be what the others cannot keep, or cannot pass on
        numbers = (change.seq, *change.seen.values())
        if not all(1 <= n <= HIGHEST for n in numbers) or not (0 <= change.base <= HIGHEST):
            raise Invalid("the change has numbers that no node gives", resource=str(key))
        if not 0 <= change.stamp <= LATEST:
            raise Invalid("the change was made at no time", resource=str(key))
        if max(map(len, (change.node, change.store, change.actor, *change.seen))) > LONGEST:
            raise Invalid("the change has names that are too long", resource=str(key))
        check_key(key)
        if change.stored is None:
            row = self._rows.get(key)
            there = (row.local or row.hub) if row is not None else None
            if there is not None:
                check_reach(there, self.site, delete=True)
            return None
        check_stored(change.stored)
        wanted = from_stored(change.stored)
        if wanted.key != key:
            raise Invalid("the change and its document name different objects", resource=str(key))
        check_reach(wanted, self.site)
        row = self._rows.get(key)
        if kept := hub_fields(wanted, row.hub if row is not None else None):  # as the hub would
            wanted = msgspec.structs.replace(wanted, spec=msgspec.structs.replace(wanted.spec, **kept))
        kinds.get(key.kind).check(wanted)
        return wanted

    # -- towards the hub -------------------------------------------------------------------------------------------

    def names_open(self, key: Key, *, foreign: bool = False) -> list[Key]:
        """What an open change names, and the hub has not been told of yet: it would refuse the one before the other.
        ``foreign``: of what other nodes made."""
        row = self._rows.get(key)
        if row is None or row.op != "put" or row.local is None:
            return []
        found = []
        for ref in kinds.get(key.kind).refs(row.local):
            other = self._rows.get(Key(ref.kind, ref.namespace, ref.name))
            if other is not None and other.op == "put" and other.hub is None and (other.foreign or not foreign):
                found.append(Key(ref.kind, ref.namespace, ref.name))
        return found

    def _behind(self, before: dict[Key, Row | None], key: Key, passed: frozenset[Key] = frozenset()) -> None:
        """Has what names an object that the hub does not know sent behind it: changes go in the order of their numbers.
        ``passed``: those that were, of objects that name one another."""
        passed |= {key}
        for other, row in list(self._rows.items()):
            behind = row.foreign or not row.op or row.seq > self._rows[key].seq or other in passed
            if not behind and key in self.names_open(other):
                self._seq += 1
                self._touch(before, other).seq = self._seq
                self._behind(before, other, passed)

    def foreign(self) -> set[str]:
        """The nodes whose changes are open here."""
        return {r.node for r in self._rows.values() if r.op and r.foreign}

    def pending_of(self, nodes: Iterable[str]) -> dict[tuple[str, str], list[LocalChange]]:
        """Undecided changes of other nodes, to be sent in their names: (node, store) -> changes, oldest first."""
        found: dict[tuple[str, str], list[LocalChange]] = {}
        wanted = set(nodes)
        for key, row in self._rows.items():
            if row.op and row.foreign and row.node in wanted:
                found.setdefault((row.node, row.store), []).append(self._local_change(key, row))
        return {k: sorted(v, key=lambda c: c.seq) for k, v in found.items()}

    def _local_change(self, key: Key, row: Row) -> LocalChange:
        at = (key.kind, key.namespace, key.name)
        stored = to_stored(row.local) if row.local else None
        over = [(*_parted(origin), seq) for origin, seq in sorted(row.over.items())]
        seq, first = (row.number, 0) if row.foreign else (row.seq, row.first)
        made = row.stamp if row.foreign else 0.0
        return LocalChange(seq, *at, row.op, row.base, row.changed_at, row.actor, stored, first, made, over)

    # -- of the replica ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def meta(self, name: str) -> str:
        """What is kept under a name; empty: nothing."""

    @abc.abstractmethod
    def _touch(self, before: dict[Key, Row | None], key: Key) -> Row:
        """The row, made where there is none; what it was goes into ``before``."""

    @abc.abstractmethod
    def _commit(self, before: dict[Key, Row | None], **meta: str) -> None:
        """Makes the touched rows durable, then tells the watchers."""

    @abc.abstractmethod
    def _set_hub(self, key: Key, row: Row, o: HubObject | None) -> None:
        """Takes what the hub holds of it."""


def _parted(origin: str) -> tuple[str, str]:
    node, _, store = origin.partition("/")
    return node, store
