"""One instance as the agent knows it, what the plan sees of it, and what the node tells of an app's instances. Pure.

``edge.py`` keeps a :class:`Live` for each instance and lets ``watch.py`` bring it up to date; :func:`seen` makes of it
what ``plan.py`` decides on, :func:`told` the status that the hub and the node's API show.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from edgeward.core import clock, proc
from edgeward.workloads.plan import Plan, Seen, Slot, State, slot_key
from edgeward.workloads.spec import AppSpec
from edgeward.workloads.state import InstanceRow

AppKey = tuple[str, str]


class Live(msgspec.Struct):
    """One instance in memory: its row, and what was observed since this agent started."""

    row: InstanceRow
    spec: AppSpec
    process: proc.ProcId | None = None
    alive: bool = False
    healthy: bool = False
    healthy_since: float = 0.0
    ever_healthy: bool = False
    failures: int = 0
    why: str = ""
    stopping: bool = False
    exit_code: int | None = None
    adopted: bool = False
    #: It was dead when this agent started.
    lost: bool = False


def seen(i: Live) -> Seen:
    """What the plan needs to know of it."""
    limit = i.spec.health.failureThreshold
    return Seen(
        i.row.id, i.row.version, i.row.slot, i.alive, i.healthy, i.healthy_since if i.ever_healthy else 0.0,
        i.row.started_at, i.stopping, i.ever_healthy and i.failures >= limit, i.exit_code,
        i.lost,
    )  # fmt: skip


def told(
    node: str,
    address: str,
    all_: Iterable[Live],
    state: State,
    p: Plan,
    generation: int,
    message: str,
    wall: float,
    wanted: str = "",
) -> dict[str, Any]:
    """An app's status on this node. ``wall``: seconds to add to the steady clock's readings to have Unix time;
    ``wanted``: the version that is asked for, said while another one serves (or none)."""
    instances = []
    enforced: set[str] = set()
    refused: dict[str, str] = {}
    for live in sorted(all_, key=lambda i: (i.row.version, i.row.slot, i.row.id)):
        slot = state.slots.get(slot_key(live.row.version, live.row.slot), Slot())
        if live.stopping:
            phase = "Stopped" if not live.alive else "Stopping"
        elif not live.alive:
            phase = "Failed"
        else:
            phase = "Running" if live.healthy else "Degraded" if live.ever_healthy else "Starting"
        enforced |= set(live.row.enforced)
        refused |= {n["what"]: n["why"] for n in live.row.not_enforced}
        one: dict[str, Any] = {
            "id": live.row.id,
            "node": node,
            "phase": phase,
            "version": live.row.version[:12],
            "ports": live.row.ports,
            "address": address,
            "pid": live.process.pid if live.process else 0,
            "restarts": slot.restarts,
            "startedAt": clock.timestamp(live.row.started_at + wall),
            "healthy": live.healthy,
        }
        if live.row.image:
            one["image"] = live.row.image
        if live.why:
            one["message"] = live.why
        instances.append(one)
    status: dict[str, Any] = {
        "phase": p.phase,
        "observedGeneration": generation,
        "instances": instances,
        "version": (state.current or state.candidate)[:12],
        "history": [h[:12] for h in state.history],
        "enforced": sorted(enforced),
        "notEnforced": [{"what": k, "why": v} for k, v in sorted(refused.items())],
    }
    if wanted and wanted != state.current:
        status["wanted"] = wanted[:12]
    if wanted in state.bad:
        status["takenBack"] = wanted[:12]
    if message:
        status["message"] = message
    return status
