"""The hub's view of routes and listeners: what their nodes report, folded into one status. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeward.core.resource import Resource


def fold_route(route: Resource, nodes: list[Resource], reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A Route's or Listener's status: each node's word, and one for the whole."""
    phases = [str(r.get("phase", "")) for r in reports.values()]
    phase = "Pending"
    if phases:
        phase = phases[0] if len(set(phases)) == 1 else "Degraded"
    status: dict[str, Any] = {"phase": phase, "nodes": {n: dict(r) for n, r in sorted(reports.items())}}
    messages = [f"{n}: {r['message']}" for n, r in sorted(reports.items()) if r.get("message")]
    if messages:
        status["message"] = "; ".join(messages)
    return status
