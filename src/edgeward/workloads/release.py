"""What one node runs of an object that a Rollout governs: pure, and the same answer with and without a link.

In: the Rollout's status as the hub wrote it last, the object as it is declared now, the node. Out: whether the node
takes what is declared, stays at the *baseline* (the last version that was rolled out whole), or runs nothing of it. A
declaration that the status does not speak of yet is not taken: a change may reach a node before the hub has begun its
run. The hub's side of the same status is in ``rollout.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec

Which = Literal["declared", "baseline", "none"]
#: Phases in which nobody keeps what the run brought.
BACK = ("Failed", "RolledBack")


class Version(msgspec.Struct, omit_defaults=True):
    """A version of a target. ``parts``: its spec without what takes effect at once (``Kind.at_once``)."""

    generation: int
    digest: str
    parts: dict[str, Any] = {}


class Handled(msgspec.Struct, omit_defaults=True):
    """A target as the run knows it: ``generation`` and ``digest`` of what it moves, and where it goes back to."""

    kind: str
    name: str
    uid: str = ""
    generation: int = 0
    digest: str = ""
    baseline: Version | None = None

    @property
    def moves(self) -> bool:
        """Whether what is declared is another version than the baseline."""
        return self.baseline is None or self.baseline.digest != self.digest


class GroupStatus(msgspec.Struct):
    """A group of a run. ``nodes``: those that may take the new version; ``failed``: those of them that did badly, and
    why; ``late``: how many were left for later, for they were silent or held; ``until``: when those that have not taken
    it yet may not any more (seconds since 1970; 0: always)."""

    name: str
    phase: str = "Pending"
    total: int = 0
    done: int = 0
    late: int = 0
    nodes: list[str] = []
    failed: dict[str, str] = {}
    since: float = 0.0
    until: float = 0.0
    message: str = ""


class Trying(msgspec.Struct, omit_defaults=True):
    """A node that has to prove the new version. Times in seconds since 1970; 0: not so now."""

    released: float
    good: float = 0.0
    silent: float = 0.0


class Status(msgspec.Struct):
    """A Rollout's status. Phases: Pending, Running, Paused, Succeeded, Failed, RolledBack."""

    phase: str = "Pending"
    run: str = ""
    message: str = ""
    groups: list[GroupStatus] = []
    targets: list[Handled] = []
    #: node -> how far it is, of those that are at it.
    updating: dict[str, Trying] = {}
    started: float = 0.0
    cancelled: bool = False
    #: Nodes of an earlier release, which know no Rollouts: they take what is declared at once.
    ungoverned: list[str] = []
    prefetched: int = 0


class Declared(msgspec.Struct, frozen=True):
    """A target as it is declared now. ``created``: RFC 3339, of the target; ``digest``: see :func:`digest_of`."""

    kind: str
    name: str
    uid: str
    generation: int
    digest: str
    created: str = ""


def parts_of(spec: Mapping[str, Any], at_once: Sequence[str]) -> dict[str, Any]:
    """The fields of a plain spec that make a version."""
    return {k: v for k, v in spec.items() if k not in at_once}


def digest_of(parts: Mapping[str, Any]) -> str:
    """16 hex digits that name a version."""
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()[:16]


def read_status(plain: Mapping[str, Any]) -> Status:
    """The status of a stored Rollout; an empty one where there is none, or none that this release understands."""
    try:
        return msgspec.convert(plain, Status)
    except msgspec.ValidationError:
        return Status()


def for_site(status: dict[str, Any], nodes: Collection[str]) -> dict[str, Any]:
    """A stored status as a site is told of it: how far each group is, and by name only the site's own nodes.

    Every change of it goes to every site: with the whole fleet's names in it, a run would cost as much as its square.
    """
    groups = [
        {**g, "nodes": [n for n in g.get("nodes", ()) if n in nodes], "failed": _only(g.get("failed", {}), nodes)}
        for g in status.get("groups", ())
    ]
    ungoverned = [n for n in status.get("ungoverned", ()) if n in nodes]
    return {**status, "groups": groups, "updating": _only(status.get("updating", {}), nodes), "ungoverned": ungoverned}


def _only(said: Mapping[str, Any], nodes: Collection[str]) -> dict[str, Any]:
    return {n: v for n, v in said.items() if n in nodes}


def handled(status: Status, kind: str, name: str) -> Handled | None:
    return next((t for t in status.targets if t.kind == kind and t.name == name), None)


def choose(status: Status, made: str, declared: Declared, node: str, now: float, *, has: bool = False) -> Which:
    """What ``node`` runs. ``made``: when the Rollout was created; ``has``: the node runs what is declared already, so a
    window that has closed takes nothing from it.

    What was there before its Rollout goes on; what came after waits for the hub to begin.
    """
    target = handled(status, declared.kind, declared.name)
    if target is None or target.uid != declared.uid:
        return "declared" if declared.created <= made else "none"
    if target.baseline is not None and target.baseline.digest == declared.digest:
        return "declared"
    known = declared.generation == target.generation or declared.digest == target.digest
    if known and (status.phase == "Succeeded" or (status.phase not in BACK and released(status, node, now, has))):
        return "declared"
    return "baseline" if target.baseline is not None else "none"


def prefetched(kind: str, name: str, generation: int) -> str:
    """How a node says that it has all of a version that it does not run yet."""
    return f"{kind}/{name}@{generation}"


def released(status: Status, node: str, now: float, has: bool) -> bool:
    """Whether the run has come to this node."""
    return any(node in g.nodes and (has or not g.until or now <= g.until) for g in status.groups)


def with_parts(spec: Mapping[str, Any], parts: Mapping[str, Any], at_once: Sequence[str]) -> dict[str, Any]:
    """A plain spec with another version's parts; what takes effect at once stays."""
    return {**parts, **{k: v for k, v in spec.items() if k in at_once}}
