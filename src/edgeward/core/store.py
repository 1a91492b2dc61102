"""The revisioned store with watch: one interface, NATS KV at the hub, a SQLite replica at the edge.

A write comes in with the revision it was based on and is refused when that is stale; a change goes out to every watcher
with the store's new revision. Reads are answered from a cache that the store keeps current, so a read never waits for
the network. What is durable, and when, is the subclass's business; the rules of the house (uid, generation, time
stamps, revision checks, watch, tombstones) are here, once.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import msgspec

from edgeward.core import clock
from edgeward.core.errors import Conflict, Gone, NotFound
from edgeward.core.resource import CLUSTER, Key, Resource, to_stored

log = logging.getLogger("edgeward.store")

#: Changes a watcher may lag behind before it is told to list again.
WATCH_QUEUE = 4096


class Change(msgspec.Struct):
    """One step of the store. ``resource`` is None for a deletion."""

    revision: int
    key: Key
    resource: Resource | None
    #: True when only the status changed.
    status_only: bool = False


class Entry(msgspec.Struct):
    """What the cache holds of a key: ``revision`` of the desired state, ``seen`` of the last change of any sort."""

    resource: Resource
    revision: int
    seen: int


class Subscription:
    """A watcher's bounded queue. Iterate it; it raises ``Gone`` when it was overrun."""

    def __init__(self, store: Store, backlog: Iterable[Change]) -> None:
        self._store = store
        self._backlog = list(backlog)
        self._queue: asyncio.Queue[Change | None] = asyncio.Queue(WATCH_QUEUE)
        self._overrun = False

    def backlog(self) -> list[Change]:
        """What had changed when the watch began, oldest first."""
        return list(self._backlog)

    def push(self, change: Change) -> None:
        try:
            self._queue.put_nowait(change)
        except asyncio.QueueFull:
            self._overrun = True
            self._store.unsubscribe(self)

    def close(self) -> None:
        self._store.unsubscribe(self)
        if not self._queue.full():
            self._queue.put_nowait(None)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.unsubscribe(self)

    async def __aiter__(self) -> AsyncIterator[Change]:
        for change in self._backlog:
            yield change
        self._backlog = []
        while True:
            if self._overrun and self._queue.empty():
                raise Gone("the watcher fell behind", remedy="list again and watch from the list's revision")
            following = await self._queue.get()
            if following is None:
                return
            yield following


class Store(abc.ABC):
    """Desired state and status by key, with one growing revision for all of it."""

    def __init__(self) -> None:
        self._entries: dict[Key, Entry] = {}
        self._by_kind: dict[str, dict[Key, Entry]] = {}
        self._tombs: dict[Key, int] = {}
        #: When it was deleted, seconds since 1970, where that is known.
        self._buried: dict[Key, float] = {}
        self._watchers: set[Subscription] = set()
        self._listeners: list[Callable[[Change], None]] = []
        #: The revision of the last change that the cache holds.
        self.revision = 0
        #: Watches from below this revision are refused: deletions up to it were forgotten.
        self.compacted = 0

    # -- reads ---------------------------------------------------------------------------------------------------

    def find(self, key: Key) -> Resource | None:
        entry = self._entries.get(key)
        return entry.resource if entry else None

    def get(self, key: Key) -> Resource:
        entry = self._entries.get(key)
        if entry is None:
            raise NotFound("not found", resource=str(key), remedy=f"see: edgeward get {key.kind.lower()}")
        return entry.resource

    def entry(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def deleted(self, key: Key) -> tuple[int, float]:
        """Revision and time (seconds since 1970) of a deletion; zeros where there was none or nobody remembers."""
        return self._tombs.get(key, 0), self._buried.get(key, 0.0)

    def items(self, kind: str, namespace: str | None = None) -> list[Resource]:
        """All of a kind, by namespace and name."""
        entries = self._by_kind.get(kind, {})
        keys = sorted(k for k in entries if namespace is None or k.namespace == namespace)
        return [entries[k].resource for k in keys]

    def all(self) -> list[Resource]:
        return [self._entries[k].resource for k in sorted(self._entries)]

    def watch(self, since: int | None = None) -> Subscription:
        """Everything that changed after revision ``since`` (None: from now on), then what changes from here on."""
        if since and since < self.compacted:  # from 0 nothing is missed: who begins there knows of nothing deleted
            raise Gone(
                f"revision {since} was compacted (the oldest is {self.compacted})",
                remedy="list again and watch from the list's revision",
            )
        backlog: list[Change] = []
        if since is not None:
            backlog = [
                Change(e.seen, k, e.resource, status_only=e.revision <= since)
                for k, e in self._entries.items()
                if e.seen > since
            ]
            backlog += [Change(rev, k, None) for k, rev in self._tombs.items() if rev > since]
            backlog.sort(key=lambda c: c.revision)
        subscription = Subscription(self, backlog)
        self._watchers.add(subscription)
        return subscription

    def listen(self, listener: Callable[[Change], None]) -> None:
        """Call ``listener`` within each change, so that what it keeps is never behind what this store answers.

        It must be quick and may not write.
        """
        self._listeners.append(listener)

    def unsubscribe(self, subscription: Subscription) -> None:
        self._watchers.discard(subscription)

    # -- writes ----------------------------------------------------------------------------------------------------

    async def put(self, resource: Resource, *, expect: int | None = None) -> Resource:
        """Writes desired state (metadata and spec; the status given is ignored).

        ``expect``: the revision it must have now; 0 means that it must not exist, None that the writer does not care.
        Raises ``Conflict``. Returns what is stored, with its new resourceVersion.
        """
        key = resource.key
        for attempt in range(8):
            old = self._entries.get(key)
            self.check_expected(key, old, expect)
            try:
                return await self._put(self._stamped(resource, old), old)
            except Conflict:
                # a writer that does not care which revision it replaces tries again on the new one
                if expect is not None or attempt == 7:
                    raise
        raise AssertionError("unreachable")

    @staticmethod
    def check_expected(key: Key, old: Entry | None, expect: int | None) -> None:
        if expect is None:
            return
        if expect == 0 and old is not None:
            raise Conflict("exists already", resource=str(key), remedy="replace or patch it instead")
        if expect != 0 and old is None:
            raise Conflict(
                "was deleted meanwhile", resource=str(key), field="$.metadata.resourceVersion", remedy="create it anew"
            )
        if expect != 0 and old is not None and old.revision != expect:
            raise Conflict(
                f"changed meanwhile: you had revision {expect}, it is at {old.revision}",
                resource=str(key),
                field="$.metadata.resourceVersion",
                remedy="read it again, repeat your change on what you read",
            )

    @staticmethod
    def _stamped(resource: Resource, old: Entry | None) -> Resource:
        meta = msgspec.structs.replace(resource.metadata)
        now = clock.timestamp()
        if old is None:
            meta.uid = meta.uid or str(uuid.uuid4())
            meta.creationTimestamp = meta.creationTimestamp or now
            meta.generation = 1
        else:
            was = old.resource.metadata
            meta.uid = was.uid
            meta.creationTimestamp = was.creationTimestamp
            meta.deletionTimestamp = meta.deletionTimestamp or was.deletionTimestamp
            same = msgspec.to_builtins(old.resource.spec) == msgspec.to_builtins(resource.spec)
            meta.generation = was.generation + (0 if same else 1)
        meta.updateTimestamp = now
        return Resource(kind=resource.kind, metadata=meta, spec=resource.spec, status={})

    @abc.abstractmethod
    async def _put(self, resource: Resource, old: Entry | None) -> Resource:
        """Makes the write durable on top of ``old`` (``Conflict`` if that is no longer so), then :meth:`_changed`."""

    @abc.abstractmethod
    async def put_status(self, key: Key, status: dict[str, Any]) -> None:
        """Replaces the status; the desired state and its revision stay."""

    @abc.abstractmethod
    async def remove(self, key: Key, *, expect: int | None = None) -> None:
        """Deletes for good (finalizers are the caller's business). Raises ``NotFound``, ``Conflict``."""

    # -- the cache, for subclasses -----------------------------------------------------------------------------------

    def _changed(self, revision: int, key: Key, resource: Resource | None, *, status_only: bool = False) -> None:
        """Takes a durable change into the cache and tells the watchers."""
        self.revision = max(self.revision, revision)
        if resource is None:
            self._entries.pop(key, None)
            self._by_kind.get(key.kind, {}).pop(key, None)
            self._tombs[key] = revision
        else:
            old = self._entries.get(key)
            entry = Entry(resource, old.revision if status_only and old else revision, revision)
            resource.metadata.resourceVersion = str(entry.revision)
            self._entries[key] = entry
            self._by_kind.setdefault(key.kind, {})[key] = entry
            self._tombs.pop(key, None)
            self._buried.pop(key, None)
        change = Change(revision, key, resource, status_only)
        for listener in self._listeners:
            try:
                listener(change)
            except Exception:  # the change is durable, and others must hear of it
                log.exception("a listener failed at %s", key)
        for watcher in tuple(self._watchers):
            watcher.push(change)

    def stats(self) -> dict[str, int]:
        return {
            "resources": len(self._entries),
            "tombstones": len(self._tombs),
            "watchers": len(self._watchers),
            "revision": self.revision,
        }


def same_desired(a: Resource, b: Resource) -> bool:
    """Whether two resources want the same: spec, labels, annotations, conflict rule, finalizers, owners, deletion."""
    x, y = to_stored(a), to_stored(b)
    strip = {"uid": "", "resourceVersion": "", "generation": 0, "creationTimestamp": "", "updateTimestamp": ""}
    return x.spec == y.spec and (
        msgspec.structs.replace(x.metadata, **strip) == msgspec.structs.replace(y.metadata, **strip)
    )


__all__ = ["CLUSTER", "Change", "Entry", "Key", "Store", "Subscription", "same_desired"]
