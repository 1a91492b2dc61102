"""Rollouts at the hub: what is declared and reported goes into a step of each run, and what follows is written.

A loop per Rollout; changes of the store only say that it is time to look. What a step decides is pure
(``workloads/rollout.py``); nodes follow the status by themselves. Of several hub processes the one that leads writes;
everything a run is stands in the status, so another one goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from edgeward.core import clock
from edgeward.core.errors import Conflict, EdgewardError, NotFound
from edgeward.core.reconcile import Loop
from edgeward.core.records import Records
from edgeward.core.registry import kinds
from edgeward.core.resource import CLUSTER, Key, Resource
from edgeward.core.scope import takes
from edgeward.core.store import Change
from edgeward.core.store_nats import NatsStore
from edgeward.workloads.cloud import shares
from edgeward.workloads.outcome import Node, Target
from edgeward.workloads.release import Status, digest_of, parts_of, prefetched, read_status
from edgeward.workloads.rollout import Step, follow, run_of, step
from edgeward.workloads.rollout_spec import rules_of

log = logging.getLogger("edgeward.rollouts")

#: Seconds that news is gathered for; between two writes that only say how far it is: each goes to every site;
#: until a status that another process wrote is looked at; between two looks at who
#: leads.
_GATHER, _PROGRESS, _LATER, _AGAIN = 0.3, 2.0, 0.1, 5.0
#: From this level on a node knows Rollouts.
_LEVEL = 2


class Rollouts:
    """``leads``: whether this process is the one that writes; ``level``: of a node's release; ``said``: node -> what it
    says of a Rollout."""

    def __init__(
        self,
        store: NatsStore,
        records: Records,
        leads: Callable[[], bool],
        level: Callable[[str], int],
        said: Callable[[Key], Mapping[str, Mapping[str, Any]]] = lambda _: {},
    ) -> None:
        self._store, self._records, self._leads, self._level, self._said = store, records, leads, level, said
        self._loop: Loop[Key] = Loop("rollouts", self._look, workers=1)
        #: What is in the loop's timers: to be gathered, not to be put off again.
        self._gathered: set[Key] = set()
        #: What was written last of each, and how far it is since: that alone is not written at once.
        self._ahead: dict[Key, tuple[dict[str, Any], Status]] = {}
        #: When the status of each was written last.
        self._wrote: dict[Key, float] = {}
        self._led = False

    async def run(self) -> None:
        """Until cancelled."""
        self._store.listen(self._changed)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._loop.run())
            group.create_task(self._lead())

    async def _lead(self) -> None:
        """Whoever begins to lead looks at every Rollout once."""
        while True:
            led, self._led = self._led, self._leads()
            if self._led and not led:
                self._all()
            await asyncio.sleep(_AGAIN)  # the pace of looking who leads

    def _all(self, *, done: bool = True) -> None:
        """``done``: those as well that have nothing to move, to which no node matters."""
        for rollout in self._store.items("Rollout"):
            if done or rollout.status.get("phase") != "Succeeded":
                self.soon(rollout.key)

    def soon(self, key: Key) -> None:
        """Something about this Rollout may have changed."""
        if key not in self._gathered:
            self._gathered.add(key)
            self._loop.add_after(key, _GATHER)

    def _changed(self, change: Change) -> None:
        """Within a change of the store."""
        key = change.key
        if key.kind == "Rollout":
            if not change.status_only:
                # its targets may have had another one, or have one no more
                for rollout in self._store.items("Rollout", key.namespace):
                    self.soon(rollout.key)
        elif key.kind in ("Node", "Override"):
            self._all(done=key.kind != "Node")
        elif kinds.get(key.kind).at_once:
            for rollout in self._store.items("Rollout", key.namespace):
                if any(t.kind == key.kind and t.name == key.name for t in rollout.spec.targets):
                    self.soon(rollout.key)

    # -- a look ------------------------------------------------------------------------------------------------------

    async def _look(self, key: Key) -> float | None:
        self._gathered.discard(key)
        rollout = self._store.find(key)
        if rollout is None or rollout.metadata.deletionTimestamp or not self._leads():
            self._wrote.pop(key, None)
            self._ahead.pop(key, None)
            return None
        done = self._step(rollout)
        status = msgspec.to_builtins(done.status)
        wait = self._wrote.get(key, 0.0) + _PROGRESS - clock.monotonic()
        if wait > 0 and not done.events and _for_nodes(status) == _for_nodes(rollout.status):
            self._ahead[key] = (rollout.status, done.status)
            return wait if done.look is None else min(wait, max(done.look, _GATHER))
        try:
            if status != rollout.status:
                self._wrote[key] = clock.monotonic()
                await self._store.put_status(key, status, checked=True)
        except Conflict:
            return _LATER
        except NotFound:
            return None
        for kind, reason, message in done.events:
            with contextlib.suppress(EdgewardError):
                record = {"type": kind, "reason": reason, "resource": str(key), "message": message}
                await self._records.append("events", record)
        return done.look if done.look is None else max(done.look, _GATHER)

    def _step(self, rollout: Resource) -> Step:
        made, ahead = rollout.metadata.creationTimestamp, self._ahead.get(rollout.key)
        status = ahead[1] if ahead is not None and ahead[0] == rollout.status else read_status(rollout.status)
        found, elsewhere = self._targets(rollout)
        nodes: list[Resource] = []
        targets = [_target(t, nodes, {}) for t in found]
        if run_of(follow(status.targets, targets, made)):
            # who runs what is only asked while there is something to move: of a large fleet it is some work
            nodes = self._store.items("Node")
            said = self._said(rollout.key)
            targets = [_target(t, nodes, said) for t in found]
        done = step(rules_of(rollout.spec), status, targets, self._nodes(rollout, nodes), clock.now(), made)
        for text in elsewhere:
            if text not in done.status.message:
                done.status.message = "; ".join(filter(None, (done.status.message, text)))
        return done

    def _targets(self, rollout: Resource) -> tuple[list[Resource], list[str]]:
        """Those that are there and that no other Rollout has, and a word on those that one has: the first by name."""
        namespace = rollout.metadata.namespace
        others = [r for r in self._store.items("Rollout", namespace) if r.metadata.name < rollout.metadata.name]
        taken = {
            (t.kind, t.name): r.metadata.name
            for r in reversed(others)
            if not r.metadata.deletionTimestamp
            for t in r.spec.targets
        }
        found, elsewhere = [], []
        for t in rollout.spec.targets:
            target = self._store.find(Key(t.kind, namespace, t.name))
            if by := taken.get((t.kind, t.name)):
                elsewhere.append(f"{t.kind}/{t.name} is moved by Rollout/{by}")
            elif target is not None and not target.metadata.deletionTimestamp:
                found.append(target)
        return found, elsewhere

    def _nodes(self, rollout: Resource, nodes: list[Resource]) -> list[Node]:
        held = {o.spec.site: o.spec.patch["hold"] for o in self._store.items("Override") if _holds(o, rollout.key)}
        return [
            Node(
                n.metadata.name,
                n.spec.site,
                n.metadata.labels,
                online=bool(n.status.get("online")),
                held=bool(held.get(n.spec.site, rollout.spec.hold)),
                governed=self._level(n.metadata.name) >= _LEVEL,
            )
            for n in nodes
        ]


def baselines(store: NatsStore) -> Iterator[tuple[str, dict[str, Any]]]:
    """(namespace, parts of the spec) of every version that a Rollout may go back to: what these use is kept."""
    for rollout in store.items("Rollout"):
        for target in read_status(rollout.status).targets:
            if target.baseline is not None:
                yield rollout.metadata.namespace, target.baseline.parts


def _for_nodes(status: Mapping[str, Any]) -> list[Any]:
    """What of a status nodes and people act on; the rest says how far it is."""
    groups = [(g.get("name"), g.get("phase"), g.get("nodes"), g.get("until")) for g in status.get("groups", [])]
    return [status.get("phase"), status.get("run"), status.get("targets"), groups]


def _holds(override: Resource, key: Key) -> bool:
    """Whether a site's Override says something of its own of whether changes wait."""
    t = override.spec.target
    return (t.kind, t.namespace or CLUSTER, t.name) == (key.kind, key.namespace, key.name) and (
        "hold" in override.spec.patch
    )


def _target(resource: Resource, nodes: list[Resource], said: Mapping[str, Mapping[str, Any]]) -> Target:
    meta = resource.metadata
    parts = parts_of(msgspec.to_builtins(resource.spec), kinds.get(resource.kind).at_once)
    word = prefetched(resource.kind, meta.name, meta.generation)
    reports: dict[str, Any] = resource.status.get("nodes") or {}
    return Target(
        resource.kind,
        meta.name,
        meta.uid,
        meta.generation,
        digest_of(parts),
        parts,
        meta.creationTimestamp,
        frozenset(_expected(resource, nodes)),
        reports,
        frozenset(n for n, s in said.items() if word in _words(s)),
    )


def _words(said: Mapping[str, Any]) -> list[Any]:
    words = said.get("prefetched")
    return words if isinstance(words, list) else []


def _expected(resource: Resource, nodes: list[Resource]) -> list[str]:
    """The nodes that run it."""
    if resource.kind != "App":
        return [n.metadata.name for n in nodes if takes(resource, n)]
    return [n for n, count in shares(resource, nodes).items() if count]
