"""What the plane says of each Route: whether requests have somewhere to go, and what becomes of them if not. Pure."""

from __future__ import annotations

from typing import Any

from edgeward.gateway.match import Table
from edgeward.gateway.rules import Rule


def statuses(table: Table[Rule]) -> dict[str, dict[str, Any]]:
    """The status of every Route of the table, by its key."""
    shadowed = table.shadowed()
    return {rule.key: _status(rule, shadowed.get(rule.key, "")) for rule in table.rules}


def _status(rule: Rule, before: str) -> dict[str, Any]:
    """``before``: the Route that matches the same and comes first, if there is one."""
    status = _reach(rule) if rule.site is None else {"phase": "Ready", "target": rule.config.target}
    if rule.site is not None and rule.site.problem:
        status |= {"phase": "NoFiles", "message": f"{rule.site.problem}: requests get 503"}
    if rule.guard is not None and rule.guard.broken:
        status |= {"phase": "Closed", "message": f"nobody is let in (503): {rule.guard.broken}"}
    if before:
        status |= {"phase": "Shadowed", "message": f"Route/{before} matches the same and comes first"}
    return status


def _reach(rule: Rule) -> dict[str, Any]:
    """Of a Route with targets: whether its own is here, and what stands in for it."""
    config = rule.config
    function = config.to == "function"
    ready = not config.missing if function else bool(config.endpoints)
    others = [str(p) for p in rule.places if p is not rule.home]
    phase = "Ready" if ready else "Fallback" if others else "NoEndpoints"
    status: dict[str, Any] = {"phase": phase, "target": config.target}
    if not function:
        status["endpoints"] = len(config.endpoints)
    if len(rule.places) > 1:
        status["places"] = [p.kind if p is rule.home else str(p) for p in rule.places]
    if not ready:
        what = "is not on this node" if config.missing else "has no running endpoint at this site"
        becomes = f"go to {', then '.join(others)}" if others else f"get {404 if config.missing else 503}"
        status["message"] = f"{config.target} {what}: requests {becomes}"
    if config.lacking:
        status["message"] = "; ".join(filter(None, [status.get("message", ""), config.lacking]))
    return status
