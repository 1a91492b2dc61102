"""What this node runs of what a Rollout governs: what is declared, the version before, or nothing of it yet.

In: an App or Function of the replica and the Rollout that names it. Out: the same object, perhaps with the parts of
another version; its generation is then that version's, and the node reports it. What decides is pure
(``workloads/release.py``); here is what must be remembered on this node: which version it took, so that a site that
holds stays where it is, and what people changed here themselves, which waits for nobody.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from edgeward.agent.replica import Replica
from edgeward.core import clock
from edgeward.core.errors import EdgewardError
from edgeward.core.registry import kinds
from edgeward.core.resource import Key, Resource, Stored, from_stored, merge_patch, to_stored
from edgeward.workloads.release import (
    BACK,
    Declared,
    Status,
    Version,
    choose,
    digest_of,
    handled,
    parts_of,
    prefetched,
    read_status,
    with_parts,
)

log = logging.getLogger("edgeward.agent")


class Taken(msgspec.Struct, omit_defaults=True):
    """What a node remembers of a target. ``version``: what it took last; ``own``: the digest of what was changed
    here."""

    uid: str
    version: Version | None = None
    own: str = ""


class Rolling:
    """``now``: the hub's time, as far as it is known here."""

    def __init__(self, replica: Replica, node: str, now: Callable[[], float] = clock.now) -> None:
        self._replica, self._node, self._now = replica, node, now
        self._taken: dict[Key, Taken] = {}
        #: What the disk had no room for.
        self._unsaved: set[Key] = set()
        #: Statuses as they were read last, and versions as they were named last: the replica is asked very often, and
        #: what changes there is another object.
        self._read: dict[Key, tuple[dict[str, Any], Status]] = {}
        self._named: dict[Key, tuple[Resource, Version]] = {}
        #: What was made last of a target, and of what.
        self._made: dict[Key, tuple[tuple[Any, ...], Resource]] = {}

    def of(self, declared: Resource) -> Resource | None:
        """What runs here of ``declared``; None: nothing yet."""
        key = declared.key
        rollout = self._governor(key)
        if rollout is None:
            self._forget(key)
            return declared
        if declared.metadata.deletionTimestamp:
            return declared
        taken = self._known(key, declared.metadata.uid)
        hub = self._replica.hub_side(key)
        now = self._version(hub or declared)
        if self._replica.local_change(key) and (hub is None or _version(declared).digest != now.digest):
            # a version that was made here takes effect at once, and goes on to when the hub has it
            self._keep(key, msgspec.structs.replace(taken, own=_version(declared).digest))
            return declared
        if hub is None:
            return declared
        status = self._status(rollout)
        if taken.own == now.digest and not _given_up(status, key, now.generation):
            return declared
        target = Declared(
            key.kind, key.name, hub.metadata.uid, now.generation, now.digest, hub.metadata.creationTimestamp
        )
        has = taken.version is not None and taken.version.digest == now.digest
        which = choose(status, rollout.metadata.creationTimestamp, target, self._node, self._now(), has=has)
        base = next((t.baseline for t in status.targets if (t.kind, t.name) == (key.kind, key.name)), None)
        version = now if which == "declared" else base if which == "baseline" else None
        if rollout.spec.hold and taken.version is not None:
            version = now if has else taken.version  # its site says when
        if version is None:
            return None
        if taken.version != version or taken.own or key in self._unsaved:
            self._keep(key, Taken(taken.uid, version))
        return declared if version.digest == now.digest else self._with(declared, version)

    def deleted(self, key: Key) -> None:
        """The object is no more: nor is what is remembered of it."""
        self._read.pop(key, None)
        self._known(key, "")  # of an earlier run, perhaps
        self._forget(key)

    def waits(self, declared: Resource) -> dict[str, Any]:
        """What is said of something that runs nowhere here because its Rollout has not come so far; {}: it has."""
        rollout = self._governor(declared.key)
        if rollout is None or self.of(declared) is not None:
            return {}
        none: dict[str, Any] = {"instances": [] if declared.kind == "App" else 0}  # a Function's are counted
        return {"phase": "Pending", **none, "message": f"waits for {rollout.key}"}

    def coming(self, declared: Resource) -> Resource | None:
        """What is declared, while something else runs here and it may still come: what it needs is fetched before."""
        rollout = self._governor(declared.key)
        if rollout is None or not rollout.spec.prefetch or declared.metadata.deletionTimestamp:
            return None
        status = self._status(rollout)
        given_up = _given_up(status, declared.key, declared.metadata.generation)
        runs = self.of(declared)
        same = runs is not None and runs.metadata.generation == declared.metadata.generation
        return None if given_up or same else declared

    def told(self, fetched: Mapping[Key, bool]) -> dict[Key, dict[str, Any]]:
        """What the hub is told of each Rollout: the targets' versions (``Kind/name@generation``) that are here."""
        said: dict[Key, dict[str, Any]] = {}
        for key, here in sorted(fetched.items()):
            rollout, declared = self._governor(key), self._replica.find(key)
            if here and rollout is not None and declared is not None:
                words = said.setdefault(rollout.key, {"prefetched": []})["prefetched"]
                words.append(prefetched(key.kind, key.name, declared.metadata.generation))
        return said

    def _governor(self, key: Key) -> Resource | None:
        """The Rollout that names it; of several the first by name."""
        for rollout in self._replica.items("Rollout", key.namespace):
            going = rollout.metadata.deletionTimestamp
            if not going and any(t.kind == key.kind and t.name == key.name for t in rollout.spec.targets):
                return rollout
        return None

    def _with(self, declared: Resource, version: Version) -> Resource:
        """The object with another version's parts, as this site has it (its Override)."""
        key = declared.key
        override = self._replica.override_of(key)
        patch = override.spec.patch if override is not None else {}
        made_of = (declared.revision, version.digest, version.generation, override.revision if override else 0)
        known = self._made.get(key)
        if known is not None and known[0] == made_of:
            return known[1]
        stored, at_once = to_stored(declared), kinds.get(key.kind).at_once
        spec = with_parts(stored.spec, parts_of(merge_patch(version.parts, patch), at_once), at_once)
        meta = msgspec.structs.replace(declared.metadata, generation=version.generation)
        try:
            made = from_stored(Stored(key.kind, meta, spec, stored.schema))
        except EdgewardError as e:
            log.error("the version before of %s is not understood here, what is declared runs: %s", key, e)
            return declared
        made.status = declared.status
        self._made[key] = (made_of, made)
        return made

    def _status(self, rollout: Resource) -> Status:
        known = self._read.get(rollout.key)
        if known is None or known[0] is not rollout.status:
            known = self._read[rollout.key] = (rollout.status, read_status(rollout.status))
        return known[1]

    def _version(self, resource: Resource) -> Version:
        known = self._named.get(resource.key)
        if known is None or known[0] is not resource:
            known = self._named[resource.key] = (resource, _version(resource))
        return known[1]

    # -- what is remembered ----------------------------------------------------------------------------------------

    @staticmethod
    def _meta(key: Key) -> str:
        return f"rolling.{key.kind}.{key.namespace}.{key.name}"

    def _known(self, key: Key, uid: str) -> Taken:
        """Of this very object: one of the same name that was made anew is another one."""
        found = self._taken.get(key)
        if found is None:
            text = self._replica.meta(self._meta(key))
            try:
                found = msgspec.json.decode(text, type=Taken) if text else Taken(uid)
            except msgspec.MsgspecError:
                found = Taken(uid)
            self._taken[key] = found
        return found if found.uid == uid else Taken(uid)

    def _keep(self, key: Key, taken: Taken) -> None:
        """On a full disk it is known until the agent ends, and written when there is room: what runs goes on."""
        if self._taken.get(key) == taken and key not in self._unsaved:
            return
        self._taken[key] = taken
        try:
            self._replica.set_meta(self._meta(key), msgspec.json.encode(taken).decode())
            self._unsaved.discard(key)
        except sqlite3.Error as e:
            if key not in self._unsaved:
                log.error("which version of %s was taken is not kept: %s", key, e)
            self._unsaved.add(key)

    def _forget(self, key: Key) -> None:
        if self._taken.pop(key, None) is not None:
            with contextlib.suppress(sqlite3.Error):  # of what nothing governs nothing is asked
                self._replica.set_meta(self._meta(key), "")
        self._made.pop(key, None)
        self._named.pop(key, None)
        self._unsaved.discard(key)


def _given_up(status: Status, key: Key, generation: int) -> bool:
    """Whether the run that moved this generation has failed."""
    target = handled(status, key.kind, key.name)
    return status.phase in BACK and target is not None and target.generation == generation


def _version(resource: Resource) -> Version:
    parts = parts_of(msgspec.to_builtins(resource.spec), kinds.get(resource.kind).at_once)
    return Version(resource.metadata.generation, digest_of(parts), parts)


__all__ = ["Rolling"]
