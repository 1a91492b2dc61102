"""The hub's view of functions: nodes' reports folded into one status. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeward.core.resource import Resource
from edgeward.core.scope import takes

#: From bad to good: a function is as well as its worst node.
_WORST = ("Failed", "Refused", "Degraded", "Pending", "Starting", "Updating", "Running")


def fold(function: Resource, nodes: list[Resource], reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A Function's status from what its nodes report."""
    placed = [n for n in nodes if takes(function, n)]
    told = {n.metadata.name: reports[n.metadata.name] for n in placed if n.metadata.name in reports}
    phases = [str(r.get("phase", "Pending")) for r in told.values()]
    phase = next((p for p in _WORST if p in phases), "Pending")
    silent = sorted(n.metadata.name for n in placed if n.metadata.name not in told)
    status: dict[str, Any] = {
        "phase": phase,
        "version": ",".join(sorted({str(r.get("version", "")) for r in told.values()} - {""})),
        "instances": sum(int(r.get("instances", 0)) for r in told.values()),
        "nodes": {
            n.metadata.name: {**told[n.metadata.name], **({} if n.status.get("online") else {"stale": True})}
            for n in placed
            if n.metadata.name in told
        },
    }
    trying = {str((r.get("canary") or {}).get("version", "")) for r in told.values()} - {""}
    if trying:
        status["canary"] = {"version": ",".join(sorted(trying)), "nodes": sum("canary" in r for r in told.values())}
    if back := sorted({str(r["takenBack"]) for r in told.values() if r.get("takenBack")}):
        status["takenBack"] = ",".join(back)
    if told:
        # the least: what every node has taken over
        status["observedGeneration"] = min(int(r.get("observedGeneration", 0)) for r in told.values())
    # a promise counts when every node keeps it
    kept = [set(r["enforced"]) for r in told.values() if "enforced" in r]
    if kept:
        status["enforced"] = sorted(set.intersection(*kept))
    messages = [f"{name}: {r['message']}" for name, r in sorted(told.items()) if r.get("message")]
    if not placed:
        where = f"site {function.spec.placement.site}" if function.spec.placement.site else "any site"
        messages.insert(0, f"no node of {where} matches the placement")
    if silent:
        messages.append(f"not heard from: {', '.join(silent)}")
    if messages:
        status["message"] = "; ".join(messages)
    return status
