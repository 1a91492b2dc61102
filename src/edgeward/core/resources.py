"""The write path that hub and agent share: what a person asks for becomes a checked, audited write of the store.

In: a typed resource, who asks, on which revision. Out: the stored resource, or an error that names resource, field and
remedy. Here are the rules that span resources: references must exist, owners take their dependents along, a Namespace
takes everything in it along, a Site with nodes stays. Storing is the store's business, authorisation the API's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable

import msgspec

from edgeward.core import clock, quota
from edgeward.core.audit import Audit
from edgeward.core.context import correlation
from edgeward.core.errors import Conflict, EdgewardError, Forbidden, Invalid, NotFound
from edgeward.core.kinds import quota_of
from edgeward.core.registry import kinds
from edgeward.core.resource import CLUSTER, Key, Resource, encode_stored, parse_revision
from edgeward.core.scope import refs_at
from edgeward.core.store import Store

log = logging.getLogger("edgeward.resources")

#: Fields of the spec that never change after creation.
_FIXED = {"Node": ("site",), "Override": ("target", "site"), "JoinToken": ("node", "site", "hash", "replace")}
_SYSTEM = ("uid", "creationTimestamp", "updateTimestamp", "deletionTimestamp", "generation")


def dependents(everything: Iterable[Resource], gone: Resource | Key) -> list[Resource]:
    """What may go with ``gone``: all that it owns (or others too), all in it when it is a Namespace. Pure."""
    key = gone if isinstance(gone, Key) else gone.key
    found = []
    for r in everything:
        if key.kind == "Namespace" and r.metadata.namespace == key.name:
            found.append(r)
            continue
        for owner in r.metadata.ownerReferences:
            if owner.kind == key.kind and owner.name == key.name and (owner.namespace or CLUSTER) == key.namespace:
                found.append(r)
                break
    return found


Guard = Callable[[Resource | None, Resource | None], None]


class Resources:
    def __init__(self, store: Store, audit: Audit, guard: Guard | None = None, *, site: str = "") -> None:
        """``guard`` gets (new or None, old or None) of every write and raises what may not be done here. ``site``:
        whose store it is; what a resource refers to at other sites is not there, and not its business."""
        self._guard = guard
        self._site = site
        self.store = store
        self.audit = audit
        #: Of two writes that would each fit a quota alone, the second is checked with the first in place.
        self._admission = asyncio.Lock()
        self._cascade = asyncio.Lock()
        self._cascading: asyncio.Task[object] | None = None

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """One cascade at a time: a person's and the controllers' would delete the same dependents under each other."""
        me = asyncio.current_task()
        if self._cascading is me:
            yield
            return
        async with self._cascade:
            self._cascading = me
            try:
                yield
            finally:
                self._cascading = None

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check(self, resource: Resource, old: Resource | None) -> None:
        kind = kinds.get(resource.kind)
        what = str(resource.key)
        namespace = resource.metadata.namespace
        # what is there already may still be changed in a namespace that is going: its finalizers have to come off
        if old is None:
            self._check_home(resource.key)
        # what goes may lose its finalizers, whatever it names or counts
        going = old is not None and bool(old.metadata.deletionTimestamp)
        limits = quota_of(self.store.find(Key("Namespace", CLUSTER, namespace))) if kind.namespaced else None
        if limits and not going:
            inside = [r for k in kinds for r in self.store.items(k.name, namespace) if k.namespaced]
            quota.check(namespace, limits, inside, resource)
        for ref in () if going else refs_at(resource, self._site) if self._site else kind.refs(resource):
            if ref.must and self.store.find(Key(ref.kind, ref.namespace, ref.name)) is None:
                raise Invalid(
                    f"there is no {ref.kind} {ref.name!r}",
                    resource=what,
                    field=ref.path,
                    remedy=f"create the {ref.kind} first, or correct the name",
                )
        if old is None:
            return
        before, after = msgspec.to_builtins(old.spec), msgspec.to_builtins(resource.spec)
        for field in _FIXED.get(resource.kind, ()):
            if before.get(field) != after.get(field):
                raise Invalid(
                    "cannot be changed", resource=what, field=f"$.spec.{field}", remedy="delete it and create it anew"
                )
        for name in _SYSTEM:
            given, is_ = getattr(resource.metadata, name), getattr(old.metadata, name)
            if given and given != is_:
                raise Invalid(
                    "is written by the system", resource=what, field=f"$.metadata.{name}", remedy="leave it out"
                )

    def _check_home(self, key: Key) -> None:
        """The namespace must be there, and not be going."""
        if not kinds.get(key.kind).namespaced or key.namespace == "default":
            return
        home = self.store.find(Key("Namespace", CLUSTER, key.namespace))
        if home is None or home.metadata.deletionTimestamp:
            raise Invalid(
                f"namespace {key.namespace!r} " + ("does not exist" if home is None else "is going"),
                resource=str(key),
                field="$.metadata.namespace",
                remedy=f"create it first: kind Namespace, name {key.namespace}"
                if home is None
                else "wait until it is gone, then create it anew",
            )

    async def _settle(self, stored: Resource) -> None:
        """A namespace may have begun to go, or be gone, while something new was written into it: then that goes again.

        All writes have one order. What was written before the namespace's mark is there when its deletion looks at what
        is in it; of what was written behind the mark the writer sees the mark here.
        """
        try:
            self._check_home(stored.key)
        except Invalid:
            # what its deletion took away or marked meanwhile is its business
            with contextlib.suppress(NotFound, Conflict):
                await self.store.remove(stored.key, expect=parse_revision(stored.metadata.resourceVersion))
            raise

    @staticmethod
    def _expected(resource: Resource, expect: int | None) -> int | None:
        text = resource.metadata.resourceVersion
        if not text:
            return expect
        revision = parse_revision(text)
        if revision is None:
            raise Invalid(
                f"{text[:40]!r} is no revision",
                resource=str(resource.key),
                field="$.metadata.resourceVersion",
                remedy="send back what you read, or leave it out",
            )
        if expect is not None and expect != revision:
            raise Invalid(
                "If-Match and the document name different revisions",
                resource=str(resource.key),
                field="$.metadata.resourceVersion",
                remedy="send one of them",
            )
        return revision

    async def _audited(
        self, verb: str, key: Key, actor: str, source: str, before: Resource | None, after: Resource | None, why: str
    ) -> None:
        # who did what to what, never what is in it; the request's id comes with the line
        log.info("%s %s by %s: %s", verb, key, actor, why)
        await self.audit.write(
            verb, key, actor=actor, source=source, request=correlation.get(), before=before, after=after, outcome=why
        )

    # -- writes ----------------------------------------------------------------------------------------------------

    async def create(self, resource: Resource, *, actor: str, source: str = "", dry_run: bool = False) -> Resource:
        """Raises ``Conflict`` when it exists."""
        return await self._write("create", resource, 0, actor, source, dry_run)

    async def replace(
        self, resource: Resource, *, expect: int | None = None, actor: str, source: str = "", dry_run: bool = False
    ) -> Resource:
        """Raises ``NotFound``, and ``Conflict`` on a stale revision."""
        return await self._write("replace", resource, expect, actor, source, dry_run)

    def _admitted(self, resource: Resource) -> contextlib.AbstractAsyncContextManager[object]:
        """One write at a time where a quota counts, all at once elsewhere."""
        home = self.store.find(Key("Namespace", CLUSTER, resource.metadata.namespace))
        return self._admission if quota_of(home) else contextlib.nullcontext()

    async def _write(
        self, verb: str, resource: Resource, expect: int | None, actor: str, source: str, dry_run: bool
    ) -> Resource:
        key = resource.key
        old = self.store.find(key)
        try:
            if verb != "create":
                if old is None:
                    raise NotFound("not found", resource=str(key), remedy="create it with POST, or by `edgeward apply`")
                expect = self._expected(resource, expect)
                if old.metadata.deletionTimestamp and set(resource.metadata.finalizers) - set(old.metadata.finalizers):
                    raise Conflict("is being deleted", resource=str(key), remedy="wait, then create it anew")
            async with self._admitted(resource):
                # before the other checks: a stale document is a conflict, whatever else of it is stale with it
                self.store.check_expected(key, self.store.entry(key), expect)
                self._check(resource, old if verb != "create" else None)
                if self._guard is not None:
                    self._guard(resource, old)
                encode_stored(resource)
                if dry_run:
                    return resource
                stored = await self.store.put(resource, expect=expect)
                if old is None:
                    await self._settle(stored)
        except EdgewardError as e:
            e.resource = e.resource or str(key)
            if not dry_run:
                await self._audited(verb, key, actor, source, old, None, f"{e.reason}: {e.message}")
            raise
        await self._audited(verb, key, actor, source, old, stored, "done")
        if stored.metadata.deletionTimestamp and not stored.metadata.finalizers:
            if key.kind == "Namespace":
                await self.collect()  # it goes when what is in it is gone
            else:
                async with self._alone():
                    await self._remove(key, actor, source)
        return stored

    async def delete(
        self, key: Key, *, expect: int | None = None, actor: str, source: str = "", dry_run: bool = False
    ) -> Resource:
        """Marks it for deletion; it goes at once unless it has finalizers. Dependents go with it.

        What comes back has a ``deletionTimestamp`` when it is not gone yet.
        """
        async with self._alone():
            return await self._delete_asked(key, expect, actor, source, dry_run)

    async def _delete_asked(self, key: Key, expect: int | None, actor: str, source: str, dry_run: bool) -> Resource:
        old = self.store.get(key)
        if self._guard is not None:
            try:
                self._guard(None, old)
            except EdgewardError as e:
                if not dry_run:
                    await self._audited("delete", key, actor, source, old, None, f"{e.reason}: {e.message}")
                raise
        return await self._delete(old, expect, actor, source, dry_run)

    async def _delete(self, old: Resource, expect: int | None, actor: str, source: str, dry_run: bool) -> Resource:
        key = old.key
        try:
            self.store.check_expected(key, self.store.entry(key), expect)
            if key == Key("Namespace", CLUSTER, "default"):
                raise Conflict("the namespace default stays", resource=str(key))
            if key.kind == "Site":
                nodes = [n.metadata.name for n in self.store.items("Node") if n.spec.site == key.name]
                if nodes:
                    raise Conflict(
                        f"has nodes: {', '.join(nodes[:10])}", resource=str(key), remedy="delete its nodes first"
                    )
            if dry_run:
                return old
            if old.metadata.finalizers or key.kind == "Namespace":
                if not old.metadata.deletionTimestamp:
                    meta = msgspec.structs.replace(old.metadata, deletionTimestamp=clock.timestamp())
                    old = await self.store.put(msgspec.structs.replace(old, metadata=meta), expect=expect)
                await self._audited("delete", key, actor, source, old, None, "done")
                await self.collect()
                if self.store.find(key) is None:
                    return msgspec.structs.replace(
                        old, metadata=msgspec.structs.replace(old.metadata, deletionTimestamp="")
                    )
                return old
            await self._remove(key, actor, source, expect=expect)
        except EdgewardError as e:
            if not dry_run:
                await self._audited("delete", key, actor, source, old, None, f"{e.reason}: {e.message}")
            raise
        await self._audited("delete", key, actor, source, old, None, "done")
        return old

    async def _remove(self, key: Key, actor: str, source: str, *, expect: int | None = None) -> None:
        await self.store.remove(key, expect=expect)
        for r in dependents(self.store.all(), key):
            if key.kind != "Namespace" and not self._orphan(r):
                continue  # another owner keeps it
            await self._delete_too(r.key, f"{actor} (with {key})", source)

    async def _delete_too(self, key: Key, actor: str, source: str = "") -> None:
        r = self.store.find(key)
        if r is None or r.metadata.deletionTimestamp:
            return  # it went, or goes, with another of its owners
        with contextlib.suppress(NotFound):
            await self._delete(r, None, actor, source, False)

    def _orphan(self, r: Resource) -> bool:
        """It has owners, and none of them is there any more (another one of the same name is not it)."""
        for o in r.metadata.ownerReferences:
            owner = self.store.find(Key(o.kind, o.namespace or CLUSTER, o.name))
            if owner is not None and (not o.uid or o.uid == owner.metadata.uid):
                return False
        return bool(r.metadata.ownerReferences)

    async def collect(self, *, strays: bool = False) -> None:
        """Finishes what a killed process left half done: namespaces that are going, dependents without their owner.
        ``strays``: also what is in no namespace; for the hub, which has all of them."""
        async with self._alone():
            await self._collect()
            if strays:
                homes = {n.metadata.name for n in self.store.items("Namespace")} | {"default"}
                for r in self.store.all():
                    if kinds.get(r.kind).namespaced and r.metadata.namespace not in homes:
                        await self._delete_too(r.key, "system (its namespace is gone)")

    async def _collect(self) -> None:
        for namespace in self.store.items("Namespace"):
            if not namespace.metadata.deletionTimestamp:
                continue
            for r in dependents(self.store.all(), namespace):
                if not r.metadata.deletionTimestamp:
                    await self._delete_too(r.key, f"system (with {namespace.key})")
            if not dependents(self.store.all(), namespace) and not namespace.metadata.finalizers:
                await self.store.remove(namespace.key)
        for r in self.store.all():
            if self._orphan(r) and not r.metadata.deletionTimestamp:
                await self._delete_too(r.key, "system (its owner is gone)")

    async def status(
        self, key: Key, status: dict[str, object], *, actor: str, source: str = "", dry_run: bool = False
    ) -> Resource:
        """Replaces the status: for controllers, not for people; ``Forbidden`` where it is made of nodes' reports."""
        now = self.store.get(key)
        if kinds.get(key.kind).reported:
            e = Forbidden(
                "is made of what nodes report", resource=str(key), field="$.status", remedy="change the spec instead"
            )
            if not dry_run:
                await self._audited("status", key, actor, source, None, None, f"{e.reason}: {e.message}")
            raise e
        if dry_run:
            return msgspec.structs.replace(now, status=status)
        await self.store.put_status(key, status)
        await self._audited("status", key, actor, source, None, None, "done")
        return self.store.get(key)
