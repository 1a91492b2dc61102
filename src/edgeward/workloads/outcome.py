"""How a node does with what a run moves, by what it reports: pure.

Only a report on the very generation that the run moves counts: what a node said of an earlier one is no word on this. A
node *takes back* a version that failed there; *wanted* in a report says that something else still serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from edgeward.workloads.release import Handled


class Target(msgspec.Struct, frozen=True):
    """A target as it is declared at the hub. ``expected``: nodes that run it; ``reports``: node -> what it says."""

    kind: str
    name: str
    uid: str
    generation: int
    digest: str
    parts: dict[str, Any]
    created: str
    expected: frozenset[str] = frozenset()
    reports: Mapping[str, Mapping[str, Any]] = {}
    #: Nodes that have what it needs and do not run it yet.
    fetched: frozenset[str] = frozenset()


class Node(msgspec.Struct, frozen=True):
    """``held``: its site has said that changes wait; ``governed``: its release knows Rollouts."""

    name: str
    site: str = ""
    labels: Mapping[str, str] = {}
    online: bool = True
    held: bool = False
    governed: bool = True


def _generation(report: Mapping[str, Any]) -> int:
    """The generation that a report is on; whatever else a node says there is none."""
    found = report.get("observedGeneration")
    return found if isinstance(found, int) else 0


def verdict(node: str, targets: list[Target], handled: list[Handled]) -> tuple[str, str]:
    """How a node does with what the run moves: ``good``, ``bad`` or ``busy``, and why."""
    moving = {(t.kind, t.name): t for t in handled if t.moves}
    said = "good"
    for t in targets:
        h = moving.get((t.kind, t.name))
        if h is None or node not in t.expected:
            continue
        report = t.reports.get(node) or {}
        if _generation(report) != h.generation:
            said = "busy"
            continue
        phase = str(report.get("phase", ""))
        gave_up = phase in ("Failed", "Refused") or (t.kind == "Function" and phase == "Degraded")
        if report.get("takenBack") or gave_up:
            return "bad", f"{t.kind}/{t.name}: {report.get('message') or phase}"[:300]
        if phase not in ("Running", "Stopped") or report.get("wanted"):
            said = "busy"
    return said, ""


def has_all(node: str, targets: list[Target]) -> bool:
    """Whether a node has fetched what it needs of everything; of an App that is a process there is nothing to fetch,
    and a release of the agent is fetched when it may run."""
    return all(
        t.kind == "Release"
        or (t.kind == "App" and not t.parts.get("container"))
        or node not in t.expected
        or node in t.fetched
        or _generation(t.reports.get(node) or {}) == t.generation
        for t in targets
    )


def is_back(node: str, targets: list[Target], handled: list[Handled]) -> bool:
    """Whether a node that was touched says that it is at the baseline of everything again."""
    moving = {(t.kind, t.name): t for t in handled if t.moves}
    for t in targets:
        h = moving.get((t.kind, t.name))
        if h is None or node not in t.expected:
            continue
        report = t.reports.get(node)
        if h.baseline is None:
            if _generation(report or {}):
                return False
        elif report is None or _generation(report) != h.baseline.generation or bool(report.get("wanted")):
            return False
    return True
