"""The node's replica: the hub's desired state for this node, and beside it what people changed here.

Each object is one row with two sides: ``hub`` (last known from the cloud) and ``local`` (a change not yet taken over by
the hub, with the hub revision it was based on). What everybody on the node sees is the *effective* object: the local
side if there is one, else the hub's side with this site's Override applied. A sync only ever touches the hub side, a
person only the local one; they meet when the hub decides a change (see ``nodes/merge.py``), and the loser goes to the
journal. Every write is one transaction of a WAL database with synchronous=FULL: a SIGKILL or a torn last write leaves
the state before it or after it.

What a newer hub (or a newer agent that ran here before) wrote and this release cannot read stops nothing: the object
stays as it was last understood, :meth:`Replica.strange` says so, and an agent of another release asks for all anew.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgeward.agent.shared import SCHEMA as SHARED
from edgeward.agent.shared import Row, SharedRows
from edgeward.core import clock
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.registry import kinds
from edgeward.core.resource import (
    CLUSTER,
    Key,
    Resource,
    Stored,
    from_stored,
    merge_patch,
    to_stored,
)
from edgeward.core.scope import check_reach, fingerprint
from edgeward.core.store import Entry, same_desired
from edgeward.core.store_sqlite import open_database
from edgeward.core.vault import Plain, Vault
from edgeward.nodes.ancestry import Ancestor, newer_than
from edgeward.nodes.wire import LEVEL, HubObject, LocalChange

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replica(
  kind TEXT, namespace TEXT, name TEXT,
  revision INTEGER, seen INTEGER,
  hub_revision INTEGER NOT NULL DEFAULT 0, hub BLOB, hub_status BLOB,
  op TEXT, local BLOB, seq INTEGER, base INTEGER, changed_at REAL, actor TEXT,
  status BLOB, first INTEGER,
  PRIMARY KEY (kind, namespace, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta(k TEXT PRIMARY KEY, v TEXT) WITHOUT ROWID;
"""


class Kept(NamedTuple):
    """What a site had of a restored hub's lost time: what stays as its own change, and what only the hub may write."""

    stayed: list[Key]
    lost: list[Key]


class Replica(SharedRows):
    """A :class:`Store` for the node's API and loops, with the sync's own side door."""

    def __init__(self, path: Path | str, *, site: str, vault: Vault | None = None, node: str = "") -> None:
        super().__init__()
        self._open_shared()
        self.node = node
        self._vault = vault or Plain()
        self.site = site
        #: Who makes the change being written, for the journal.
        self.actor = "local"
        self._rows: dict[Key, Row] = {}
        self._db = open_database(path)
        self._db.executescript(_SCHEMA + SHARED)
        if "first" not in {column[1] for column in self._db.execute("PRAGMA table_info(replica)")}:
            self._db.execute("ALTER TABLE replica ADD COLUMN first INTEGER")
        meta = dict(self._db.execute("SELECT k, v FROM meta"))
        self.hub_revision = int(meta.get("hub_revision", 0))
        self.epoch = meta.get("epoch", "")
        #: The epochs that the hub's present store was restored from.
        self.line: list[Ancestor] = msgspec.json.decode(meta.get("line") or "[]", type=list[Ancestor])
        self._seq = int(meta.get("seq", 0))
        #: The hub's level; None of one that was never heard.
        self.hub_level: int | None = int(meta["hub_level"]) if "hub_level" in meta else None
        #: What this node's own verdicts say of objects beside their status: of this run only.
        self._beside: dict[Key, dict[str, Any]] = {}
        #: What the hub holds and this release cannot read: the hub's revision, and why.
        self._strange: dict[Key, tuple[int, str]] = {}
        self._strange_kept = meta.get("strange") or "[]"
        for *at, known, why in msgspec.json.decode(self._strange_kept):
            self._strange[Key(*at)] = (known, why)
        #: Rows on the disk that this release cannot read and leaves as they are.
        self._unread: set[Key] = set()
        #: Random id of this file, so that a wiped node's numbers are not taken for the old one's.
        self.store_id = meta.get("store") or self.set_meta("store", clock.new_id(12))
        self.revision = int(meta.get("revision", 0))
        plain = [key for row in self._db.execute("SELECT * FROM replica") if (key := self._load(row)) is not None]
        self._load_shared()
        if plain:
            self._save(plain)  # from a release that kept secrets in plain
        if self._strange or self._unread or meta.get("level") != str(LEVEL):
            self.hub_revision = 0  # another release reads more, or less: it asks for all
        for key in self._rows:
            resource = self._effective(key)
            row = self._rows[key]
            if resource is not None:
                resource.metadata.resourceVersion = str(row.revision)
                entry = Entry(resource, row.revision, row.seen)
                self._entries[key] = entry
                self._by_kind.setdefault(key.kind, {})[key] = entry
            else:
                self._tombs[key] = row.seen
            self.revision = max(self.revision, row.seen)

    def _load(self, row: tuple[Any, ...]) -> Key | None:
        """Takes a row; its key when it holds secrets that are not sealed."""
        kind, ns, name, revision, seen, hub_rev, hub, hub_status, op, local, seq, base, at, actor, status, first = row
        try:
            theirs, mine = (self._vault.decode(side) if side else None for side in (hub, local))
        except (
            Invalid,
            msgspec.ValidationError,
        ) as e:  # a newer release's: an agent of that release finds it here again
            self._unread.add(Key(kind, ns, name))
            if hub:
                self._strange[Key(kind, ns, name)] = (hub_rev, str(e))
            return None
        self._rows[Key(kind, ns, name)] = Row(
            revision,
            seen,
            hub_rev,
            theirs,
            msgspec.json.decode(hub_status) if hub_status else {},
            op or "",
            mine,
            seq or 0,
            base or 0,
            at or 0.0,
            actor or "",
            msgspec.json.decode(status) if status else {},
            first or 0,
        )
        plain = any(side and self._vault.is_plain(side) for side in (hub, local))
        return Key(kind, ns, name) if plain else None

    def close(self) -> None:
        self._db.close()

    def meta(self, name: str) -> str:
        """A small durable value of the agent's own."""
        row = self._db.execute("SELECT v FROM meta WHERE k=?", (name,)).fetchone()
        return row[0] if row else ""

    def set_meta(self, name: str, value: str) -> str:
        if value:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES(?,?)", (name, value))
        else:
            self._db.execute("DELETE FROM meta WHERE k=?", (name,))
        return value

    # -- the effective object -------------------------------------------------------------------------------------

    def override_of(self, key: Key) -> Resource | None:
        """This site's Override of an object, if it has one."""
        for r in self._by_kind.get("Override", {}).values():
            target = r.resource.spec.target
            if (
                r.resource.spec.site == self.site
                and target.kind == key.kind
                and target.name == key.name
                and (target.namespace or CLUSTER) == key.namespace
            ):
                return r.resource
        return None

    def _effective(self, key: Key) -> Resource | None:
        row = self._rows[key]
        status = row.status or row.hub_status
        if key in self._beside:
            status = {**status, **self._beside[key]}
        if row.op == "delete":
            return None
        if row.op == "put" and row.local is not None:
            return _with_status(row.local, status)
        if row.hub is None:
            return None
        override = self.override_of(key) if key.kind != "Override" else None
        # where the base moved so far that the override no longer fits, the base stands; describe shows both
        patched = _patched(row.hub, override) if override is not None else None
        return _with_status(patched or row.hub, status)

    # -- rows and transactions ----------------------------------------------------------------------------------------

    def _save(self, keys: Collection[Key], **meta: str) -> None:
        """Writes the rows and meta values in one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for key in keys:
                row = self._rows.get(key)
                at = (key.kind, key.namespace, key.name)
                if row is None:
                    if key not in self._unread:
                        self._db.execute("DELETE FROM replica WHERE kind=? AND namespace=? AND name=?", at)
                    continue
                self._unread.discard(key)
                self._db.execute(
                    "INSERT OR REPLACE INTO replica VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                    (
                        *at,
                        row.revision,
                        row.seen,
                        row.hub_revision,
                        self._vault.encode(row.hub) if row.hub else None,
                        msgspec.json.encode(row.hub_status) if row.hub_status else None,
                        row.op or None,
                        self._vault.encode(row.local) if row.local else None,
                        row.seq,
                        row.base,
                        row.changed_at,
                        row.actor,
                        msgspec.json.encode(row.status) if row.status else None,
                        row.first,
                    ),
                )
            self._save_shared(keys)
            for k, v in meta.items():
                self._db.execute("INSERT OR REPLACE INTO meta VALUES(?,?)", (k, v))
            self._db.execute("COMMIT")
        except BaseException:
            self._db.rollback()  # also when SQLite has done so itself, as on a full disk
            raise

    def _commit(self, before: dict[Key, Row | None], **meta: str) -> None:
        """Makes the touched rows durable, then tells the watchers what changed in effect; undoes them on failure."""
        touched = list(before)
        revision = self.revision
        moved: list[tuple[int, Key, Resource | None, bool]] = []
        # an Override moves its target too
        for key in list(touched):
            if key.kind == "Override":
                row, was = self._rows.get(key), before[key]
                sides = [r.local or r.hub for r in (row, was) if r is not None]
                for side in sides:
                    if side is not None:
                        t = side.spec.target
                        target = Key(t.kind, t.namespace or CLUSTER, t.name)
                        if target in self._rows and target not in before:
                            before[target] = msgspec.structs.replace(self._rows[target])
                            touched.append(target)
        touched.sort(key=lambda k: k.kind != "Override")
        staged_overrides: list[Key] = []
        for key in touched:
            row = self._rows.get(key)
            if key.kind == "Override":
                # the target's effective object is computed below from the override's new state
                resource = self._effective(key) if row else None
                if resource is None:
                    self._by_kind.get("Override", {}).pop(key, None)
                else:
                    self._by_kind.setdefault("Override", {})[key] = Entry(resource, 0, 0)
                staged_overrides.append(key)
            else:
                resource = self._effective(key) if row else None
            old = self._entries.get(key)
            if resource is None and old is None:
                continue
            if resource is not None and old is not None and same_desired(resource, old.resource):
                if resource.status == old.resource.status and not self._under(key, row, before[key]):
                    continue
                revision += 1
                if row:
                    row.seen = revision
                moved.append((revision, key, resource, True))
                continue
            revision += 1
            if row:
                row.revision = row.seen = revision
            moved.append((revision, key, resource, False))
        try:
            strange = [(k.kind, k.namespace, k.name, *what) for k, what in self._strange.items()]
            if (text := msgspec.json.encode(strange).decode()) != self._strange_kept:
                meta["strange"] = text
            self._save(touched, revision=str(revision), seq=str(self._seq), **meta)
        except BaseException:
            self._new_finished = []
            for key, was in before.items():
                if was is None:
                    self._rows.pop(key, None)
                else:
                    self._rows[key] = was
            for key in staged_overrides:
                entry = self._entries.get(key)
                if entry is None:
                    self._by_kind.get("Override", {}).pop(key, None)
                else:
                    self._by_kind.setdefault("Override", {})[key] = entry
            raise
        self._strange_kept = meta.get("strange", self._strange_kept)
        self._saved_shared()
        for rev, key, resource, status_only in moved:
            self._changed(rev, key, resource, status_only=status_only)

    def _under(self, key: Key, row: Row | None, was: Row | None) -> bool:
        """Whether the hub says something new where something else stands over it: who put that there must hear it."""
        if key not in self._beside or row is None or was is None:
            return False
        return row.hub_status != was.hub_status

    def _touch(self, before: dict[Key, Row | None], key: Key) -> Row:
        row = self._rows.get(key)
        if key not in before:
            before[key] = msgspec.structs.replace(row) if row else None
        if row is None:
            row = self._rows[key] = Row()
        return row

    # -- local writes ----------------------------------------------------------------------------------------------

    def _local(self, row: Row, op: str) -> None:
        if not row.op:
            row.base = row.hub_revision if row.hub is not None else 0
        self._stamp_local(row)
        self._seq += 1
        row.first = (row.first if row.op else 0) or self._seq
        row.op, row.seq, row.changed_at, row.actor = op, self._seq, clock.steady(), self.actor

    async def _put(self, resource: Resource, old: Entry | None) -> Resource:
        before: dict[Key, Row | None] = {}
        row = self._touch(before, resource.key)
        self._local(row, "put")
        row.local = resource
        if row.hub is None:
            self._behind(before, resource.key)
        self._commit(before)
        return self.get(resource.key)

    async def remove(self, key: Key, *, expect: int | None = None) -> None:
        self.get(key)
        self.check_expected(key, self._entries.get(key), expect)
        before: dict[Key, Row | None] = {}
        row = self._touch(before, key)
        self._local(row, "delete")
        # also of what the hub never told of: it may have taken it over, and only the answer was lost
        row.local, row.status = None, {}
        self._commit(before)

    async def put_status(self, key: Key, status: dict[str, Any]) -> None:
        row = self._rows.get(key)
        if row is None or row.status == status:
            return
        before: dict[Key, Row | None] = {}
        self._touch(before, key).status = status
        self._commit(before)

    def put_beside(self, key: Key, said: dict[str, Any]) -> None:
        """Fields that stand over an object's status for as long as this process runs, whoever wrote the status."""
        if self._beside.get(key, {}) == said:
            return
        if said:
            self._beside[key] = said
        else:
            del self._beside[key]
        if key in self._rows:
            before: dict[Key, Row | None] = {}
            self._touch(before, key)
            self._commit(before)

    # -- the sync ----------------------------------------------------------------------------------------------------

    def pending(self) -> list[LocalChange]:
        """Undecided changes made here, oldest first."""
        got = [self._local_change(k, r) for k, r in self._rows.items() if r.op and not r.foreign]
        return sorted(got, key=lambda c: c.seq)

    def hub_side(self, key: Key) -> Resource | None:
        """The object as the hub has it, whatever this site has otherwise."""
        row = self._rows.get(key)
        return row.hub if row is not None else None

    def local_change(self, key: Key) -> bool:
        row = self._rows.get(key)
        return bool(row and row.op)

    def strange(self) -> dict[Key, str]:
        """What the hub holds for this node and this release cannot read, and why."""
        return {key: why for key, (_, why) in self._strange.items()}

    def hub_view(self) -> str:
        """The fingerprint of the hub's side, to be compared with the hub's own."""
        held = {k: r.hub_revision for k, r in self._rows.items() if r.hub is not None}
        return fingerprint((held | {k: revision for k, (revision, _) in self._strange.items()}).items())

    def from_hub(self, kind: str) -> list[tuple[Resource, dict[str, Any]]]:
        """The hub's own word of each object of a kind, and its status there: whatever was changed here meanwhile."""
        return [(r.hub, r.hub_status) for k, r in self._rows.items() if k.kind == kind and r.hub is not None]

    def hub_keys(self) -> list[Key]:
        """All that the hub's side holds."""
        return [*(k for k, r in self._rows.items() if r.hub is not None and k not in self._strange), *self._strange]

    def apply_sync(
        self,
        objects: list[HubObject],
        *,
        revision: int,
        epoch: str,
        full: bool,
        line: Sequence[Ancestor] = (),
        level: int = LEVEL,
    ) -> Kept:
        """Takes the hub's state; ``full`` says that what is not among ``objects`` is gone.

        From a hub that was restored from a backup (``line``) only what it knows is taken: what is newer here stays, as
        a change of this site's that the hub has yet to decide. Gives what stayed so, and what could not.
        """
        limit = newer_than(self.epoch, self.line, epoch, line) if full else None
        ahead = self._ahead(limit) if limit is not None else {}
        before: dict[Key, Row | None] = {}
        strange = dict(self._strange)
        for o in objects:
            row = self._touch(before, o.key)
            self._set_hub(o.key, row, o)
        if full:
            named = {o.key for o in objects}
            for key in [k for k in self.hub_keys() if k not in named]:
                self._set_hub(key, self._touch(before, key), None)
        kept = self._keep(ahead, before)
        if epoch != self.epoch:
            self.line = list(line)
        try:
            self._commit(
                before,
                hub_revision=str(revision),
                epoch=epoch,
                line=msgspec.json.encode(self.line).decode(),
                level=str(LEVEL),
                hub_level=str(level),
            )
        except BaseException:
            self._strange = strange
            raise
        self.hub_revision, self.epoch, self.hub_level = revision, epoch, level
        return kept

    def apply_passing(self, objects: list[HubObject]) -> None:
        """Takes some of the hub's state out of turn; what was synced last stays what is said to be known."""
        before: dict[Key, Row | None] = {}
        for o in objects:
            self._set_hub(o.key, self._touch(before, o.key), o)
        self._commit(before)

    def hub_revision_of(self, key: Key) -> int:
        """The hub's revision of its side of an object; 0 where that is not there."""
        row = self._rows.get(key)
        return row.hub_revision if row is not None and row.hub is not None else 0

    def hub_status(self, key: Key) -> dict[str, Any]:
        """An object's status as the hub said last."""
        row = self._rows.get(key)
        return row.hub_status if row is not None else {}

    def _ahead(self, limit: int) -> dict[Key, tuple[Resource, int]]:
        """What the site has and a hub that ends at revision ``limit`` has not, and on which revision; Overrides as the
        targets that they change. What a person changed here and the hub has not decided is the site's own anyway."""
        found: dict[Key, tuple[Resource, int]] = {}
        for key, row in list(self._rows.items()):
            if row.hub is None or row.hub_revision <= limit:
                continue
            at = key
            if key.kind == "Override":
                t = row.hub.spec.target
                at = Key(t.kind, t.namespace or CLUSTER, t.name)
            held = self._rows.get(at)
            mine = self._effective(at) if held is not None and held.hub is not None and not held.op else None
            if held is not None and mine is not None and not mine.metadata.deletionTimestamp:
                found[at] = (mine, held.hub_revision)
        return found

    def _keep(self, ahead: dict[Key, tuple[Resource, int]], before: dict[Key, Row | None]) -> Kept:
        kept = Kept([], [])
        overrides = {k: r.hub for k, r in self._rows.items() if k.kind == "Override" and r.hub is not None}
        for key, (mine, base) in sorted(ahead.items(), key=lambda item: (_sending(item[0]), item[0])):
            row = self._rows.get(key)
            if row is not None and row.hub is not None and same_desired(self._over(key, row.hub, overrides), mine):
                continue
            try:
                check_reach(mine, self.site)
            except EdgewardError:
                kept.lost.append(key)  # only the hub writes it
                continue
            row = self._touch(before, key)
            self._local(row, "put")
            row.local, row.base, row.actor = _with_status(mine, {}), base, "the restored hub's site"
            stamp = mine.metadata.updateTimestamp
            row.changed_at = clock.parse_timestamp(stamp) if stamp else row.changed_at
            kept.stayed.append(key)
        return kept

    def _over(self, key: Key, base: Resource, overrides: dict[Key, Resource]) -> Resource:
        """``base`` with this site's one of ``overrides``, as far as it fits."""
        for o in overrides.values():
            t = o.spec.target
            if o.spec.site == self.site and Key(t.kind, t.namespace or CLUSTER, t.name) == key:
                return _patched(base, o) or base
        return base

    def _set_hub(self, key: Key, row: Row, o: HubObject | None) -> None:
        self._strange.pop(key, None)
        if o is None or o.stored is None:
            row.hub, row.hub_status = None, {}
            row.hub_revision = o.revision if o else row.hub_revision
            if not row.op:
                del self._rows[key]
        else:
            try:
                row.hub = from_stored(o.stored)
            except EdgewardError as e:
                # it stays as it was last understood, and a change made here is one of what was understood
                self._strange[key] = (o.revision, str(e))
                if row.hub is None and not row.op:
                    del self._rows[key]
                return
            row.hub_revision = o.revision
            row.hub_status = o.status or {}

    def resolve(self, seq: int, now: HubObject) -> None:
        """The hub decided change ``seq``; ``now`` is what it holds after that. A newer local change stays, rebased."""
        key = now.key
        row = self._rows.get(key)
        if row is None:
            return
        before: dict[Key, Row | None] = {}
        self._touch(before, key)
        self._finish_own(seq, now)
        if row.seq == seq and not row.foreign:
            row.settle()
        elif row.foreign:
            row.first = 0  # a sibling's is on top of it, and says so to the hub itself
        else:
            row.base = now.revision if now.stored is not None else 0
            row.first = row.seq
        self._set_hub(key, row, now)
        self._commit(before)


def _sending(key: Key) -> int:
    """What others name goes up before them: the hub takes nothing that names what it does not know."""
    return {"used": 0, "follows": 2}.get(kinds.get(key.kind).scope, 1)


def _patched(base: Resource, override: Resource) -> Resource | None:
    """The base as the override has it; None where it does not fit."""
    stored = to_stored(base)
    spec = merge_patch(stored.spec, override.spec.patch)
    try:
        return from_stored(Stored(stored.kind, stored.metadata, spec, stored.schema))
    except EdgewardError:
        return None


def _with_status(resource: Resource, status: dict[str, Any]) -> Resource:
    return Resource(
        kind=resource.kind, metadata=msgspec.structs.replace(resource.metadata), spec=resource.spec, status=status
    )
