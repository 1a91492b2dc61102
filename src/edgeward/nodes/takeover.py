"""What a site changed by itself while the hub was away is taken over, once, or refused with a reason.

In: a node's local changes in their order, with what each was based on. Out: a decision for each, a write of the hub's
store, and an entry in the journal with whatever lost. What the site may change is decided in ``reach.py``, who wins in
``merge.py``; here is what surrounds that: changes sent again after a lost answer, and stores that went silent.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from edgeward.core import clock
from edgeward.core.errors import Conflict, EdgewardError, Invalid
from edgeward.core.records import Records
from edgeward.core.registry import kinds, redact
from edgeward.core.resource import (
    CLUSTER,
    Key,
    Metadata,
    OwnerReference,
    Resource,
    check_key,
    check_stored,
    from_stored,
    make_patch,
    to_stored,
)
from edgeward.core.scope import check_reach, placed_sites
from edgeward.core.store import same_desired
from edgeward.core.store_nats import NatsStore
from edgeward.nodes.ancestry import base_now
from edgeward.nodes.hubtime import made_at
from edgeward.nodes.merge import Side, decide
from edgeward.nodes.older import put_back, trimmed
from edgeward.nodes.reach import check_known, check_refs, pinned
from edgeward.nodes.roster import Roster
from edgeward.nodes.wire import (
    LEVEL,
    Decided,
    HubObject,
    LocalChange,
    PushAnswer,
    PushAsk,
)

#: Changes of a node whose outcome is remembered, in case the answer is lost; a push has at most 50.
_REMEMBERED = 256


class _Doubt(NamedTuple):
    """A change that was being taken over when the store went silent, and what the journal is to say of it."""

    change: LocalChange
    wanted: Resource | None
    journal: dict[str, Any]


class _Past(msgspec.Struct):
    """What the hub's store remembers of the changes made in a node's replica ``store``."""

    #: The fact that it is: of the replica that the node has now, or of a former one that only others remember.
    name: str
    store: str
    revision: int
    #: The last number that the node itself sent; all before were decided.
    done: int = 0
    #: key -> (number, revision after, whether it was there then) of changes taken over: where the answer was lost the
    #: node's next change has the old base, and its own doing is nothing that it missed
    mine: dict[Key, tuple[int, int, bool]] = {}
    #: Those that other nodes had decided: number -> mark.
    ahead: dict[int, str] = {}

    @classmethod
    def of(cls, facts: NatsStore, node: str, store: str, *, own: bool = False) -> _Past:
        """``own``: the node itself speaks, so that this is the replica that it has now."""
        name = f"pushed.{node}"
        saved = facts.fact(name)
        last = msgspec.json.decode(saved) if saved else {}
        if not own and last and last.get("store") != store:
            name = f"pushed.{node}.former"
            saved = facts.fact(name)
            last = msgspec.json.decode(saved) if saved else {}
        known = last if last.get("store") == store else {}
        mine = {Key(*k): (seq, after, there) for *k, seq, after, there in known.get("mine", [])}
        ahead = {int(seq): mark for seq, mark in known.get("ahead", [])}
        return cls(name, store, facts.fact_revision(name), known.get("seq", 0), mine, ahead)

    async def keep(self, facts: NatsStore) -> None:
        self.ahead = {seq: mark for seq, mark in list(self.ahead.items())[-_REMEMBERED:] if seq > self.done}
        kept = [[k.kind, k.namespace, k.name, *v] for k, v in list(self.mine.items())[-_REMEMBERED:]]
        fact: dict[str, Any] = {"store": self.store, "seq": self.done, "mine": kept}
        if self.ahead:
            fact["ahead"] = list(self.ahead.items())
        await facts.set_fact(self.name, msgspec.json.encode(fact), expect=self.revision)
        self.revision = facts.fact_revision(self.name)


def _mark(change: LocalChange) -> str:
    """What a change is: a number alone could be taken by who sends it in another's name."""
    spec = change.stored.spec if change.stored is not None else None
    return hashlib.sha256(msgspec.json.encode([str(change.key), change.op, spec], order="sorted")).hexdigest()[:16]


class Takeover:
    """Takes over the local changes of all sites, one node's after the other."""

    def __init__(self, store: NatsStore, records: Records, write: Callable[..., Any], roster: Roster) -> None:
        self._store, self._records, self._roster = store, records, roster
        #: ``await write(resource | None, key, expect, actor)``: a validated write (the hub's Resources).
        self._write = write
        #: Whether a node's identity was taken from it.
        self.revoked: Callable[[str], bool] = lambda node: False
        self._pushing: dict[str, asyncio.Lock] = {}
        #: Changes whose write or record may have happened; the nodes send them again.
        self._in_doubt: dict[tuple[str, Key], _Doubt] = {}

    async def push(self, node: str, site: str, ask: PushAsk) -> PushAnswer:
        """What became of each change that a node of ``site`` sends, its own or, ``ask.of``, those of another node of
        the site. ``Conflict``, or an error of the store: no word on the rest, the node sends it again."""
        origin = ask.of or node
        if ask.of and (why := self._silenced(origin, site)):
            return PushAnswer([await self._refused(node, site, origin, change, why) for change in ask.changes])
        async with self._pushing.setdefault(origin, asyncio.Lock()):
            past = _Past.of(self._store, origin, ask.store, own=not ask.of)
            decided: list[Decided] = []
            for change in ask.changes:
                mark = _mark(change)
                if change.seq <= past.done or past.ahead.get(change.seq) == mark:
                    # decided before, only the answer was lost
                    decided.append(Decided(change.seq, "same", "taken over before", self._now(node, change)))
                    continue
                key = change.key
                if (before := await self._settled(origin, change)) is not None:
                    past.mine[key] = before, self._revision(key), self._store.find(key) is not None
                theirs = {k for k, (_, at, _) in past.mine.items() if at == self._revision(k)}
                seq, after, there = past.mine.pop(key, (0, 0, False))
                known = [(after, there)] if 0 < change.first <= seq else []
                seen = self._seen(change, known + self._of_siblings(change, origin, theirs))
                decision = await self._decide(origin, site, msgspec.structs.replace(change, base=seen), theirs, node)
                decided.append(decision)
                if ask.of:  # what its origin made before may be still to come
                    past.ahead[change.seq] = mark
                else:
                    past.done = change.seq
                if decision.outcome == "accept" or (before is not None and decision.outcome == "same"):
                    past.mine[key] = change.seq, self._revision(key), self._store.find(key) is not None
                elif decision.outcome in ("same", "reject") and 0 < change.first <= seq:
                    # nothing was done: what the hub did meanwhile is still missed by whatever replaces this change
                    past.mine[key] = change.seq, after, there
                # another process may have been asked the same meanwhile: then the node asks again
                await past.keep(self._store)
            return PushAnswer(decided)

    def _silenced(self, origin: str, site: str) -> str:
        """Why nobody may send changes in this node's name; empty where the nodes of its site may."""
        if self._roster.site_of.get(origin) != site:
            return f"there is no node {origin} at site {site}"
        return f"node {origin} is revoked" if self.revoked(origin) else ""

    async def _refused(self, by: str, site: str, node: str, change: LocalChange, why: str) -> Decided:
        key = change.key
        journal: dict[str, Any] = {
            "resource": str(key), "kind": key.kind, "namespace": key.namespace, "name": key.name,
            "site": site, "node": node, "sentBy": by, "actor": change.actor, "op": change.op,
            "madeAt": clock.timestamp(made_at(change.made or change.time, clock.now())),
            "outcome": "invalid", "loser": "edge", "why": f"refused by the hub: {why}",
        }  # fmt: skip
        if change.stored is not None:
            lost = {"kind": key.kind, "metadata": {"name": key.name}, "spec": change.stored.spec}
            journal["lost"] = redact(lost)
        await self._journal(journal, node, change)
        return Decided(change.seq, "invalid", journal["why"], self._now(by, change), journal)

    def _seen(self, change: LocalChange, known: list[tuple[int, bool]]) -> int:
        """The base of a change, where it was made on top of others that were taken over since: the site's own doing is
        nothing that it missed. ``known``: the revision after each of those, and whether the object was there then."""
        if not known:
            return change.base
        after, there = max(known)
        if after in (self._revision(change.key), self._store.was.get(change.key)):
            return self._base_of(change.key)
        return after if there else 0

    def _of_siblings(self, change: LocalChange, origin: str, theirs: set[Key]) -> list[tuple[int, bool]]:
        """What was taken over of the changes of other nodes that this one was made on top of."""
        found = []
        for node, store, last in change.over:
            if node == origin or self._roster.site_of.get(node) != self._roster.site_of.get(origin):
                continue
            seq, after, there = _Past.of(self._store, node, store).mine.get(change.key, (0, 0, False))
            if 0 < seq <= last:
                found.append((after, there))
                if after == self._revision(change.key):
                    theirs.add(change.key)
        return found

    def forget(self, node: str) -> None:
        if (lock := self._pushing.get(node)) is not None and not lock.locked():
            del self._pushing[node]
        self._in_doubt = {k: doubt for k, doubt in self._in_doubt.items() if k[0] != node}

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
        site = self._roster.site_of.get(node, "")
        if entry is None:
            return self._roster.object(key, None, self._store.revision, site)
        level = self._roster.levels.get(node, LEVEL)
        seen = key in self._roster.view(node).entries
        if not seen and change.stored is not None:
            seen = trimmed(to_stored(entry.resource), level).spec == change.stored.spec
        return self._roster.object(key, entry.resource if seen else None, entry.revision, site, level)

    def _shared(self, key: Key, site: str, resource: Resource) -> bool:
        """Whether other sites have the object too."""
        kind = kinds.get(key.kind)
        if kind.scope == "placed" and placed_sites(resource) == site:
            return False
        if kind.scope in ("hub", "site"):
            return False
        return self._elsewhere(key, site)

    def _elsewhere(self, key: Key, site: str) -> bool:
        sites = [s for s, nodes in self._roster.nodes_at.items() if nodes]
        return self._roster.views.elsewhere(key, site, sites, self._store.revision)

    async def _decide(self, node: str, site: str, change: LocalChange, theirs: set[Key], by: str) -> Decided:
        """``theirs``: objects that are as this node wrote them, though they may not be in its view yet.
        ``by``: the node that sends it."""
        key = change.key
        made = made_at(change.made, clock.now()) if change.made else change.time

        def known(k: Key) -> bool:
            return k in theirs or k in self._roster.view(node).entries

        entry = self._store.entry(key)
        hub = entry.resource if entry else None
        journal: dict[str, Any] = {
            "resource": str(key), "kind": key.kind, "namespace": key.namespace, "name": key.name,
            "site": site, "node": node, "actor": change.actor, "op": change.op, "madeAt": clock.timestamp(made),
        }  # fmt: skip
        if by != node:
            journal["sentBy"] = by
        try:
            level = self._roster.levels.get(node, LEVEL)
            check_key(key)
            if change.stored is not None:
                check_stored(change.stored)
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
                self._roster.line,
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
            return Decided(change.seq, "invalid", merged_why, self._now(by, change), journal)
        if merged.outcome != "same":
            await self._journal(journal, node, change)
        self._in_doubt.pop((node, key), None)
        return Decided(change.seq, merged.outcome, merged.why, self._now(by, change), journal)

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
