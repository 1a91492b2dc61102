"""The hub's view of apps and services: nodes' reports folded into one status. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeward.core.resource import Resource
from edgeward.workloads.disconnect import gone as lost
from edgeward.workloads.persite import effective, replicas_at
from edgeward.workloads.placement import share


def phase_of(wanted: int, instances: list[dict[str, Any]], phases: list[str]) -> str:
    """One phase for many instances: what a person would say of the whole."""
    running = sum(i.get("phase") == "Running" for i in instances)
    if wanted == 0 and not instances:
        return "Stopped"
    if "Failed" in phases and not running:
        return "Failed"
    if running and running >= wanted:
        return "Degraded" if "Degraded" in phases else "Running"
    if running:
        return "Degraded"
    if phases and all(p == "Stopped" for p in phases):
        return "Stopped"
    return "Starting" if instances or phases else "Pending"


def _dead(nodes: list[Resource]) -> set[str]:
    return {n.metadata.name for n in nodes if n.status.get("verdict") == "dead"}


def shares(app: Resource, nodes: list[Resource]) -> dict[str, int]:
    """node -> instances that it is to run, without those that are dead."""
    by_site: dict[str, list[Resource]] = {}
    for node in nodes:
        by_site.setdefault(node.spec.site, []).append(node)
    dead = _dead(nodes)
    gone = {site: lost(effective(app, site).spec, dict.fromkeys(dead, math.inf)) for site in by_site}
    return {n.metadata.name: share(app, by_site[n.spec.site], n.metadata.name, gone[n.spec.site]) for n in nodes}


def fold(app: Resource, nodes: list[Resource], reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """An App's status from what its nodes report."""
    sites = {node.spec.site for node in nodes}
    dead = _dead(nodes)
    expected = shares(app, nodes)
    wanted = sum(expected.values())
    instances: list[dict[str, Any]] = []
    online = {n.metadata.name: bool(n.status.get("online")) for n in nodes}
    messages: list[str] = []
    for name in sorted(reports.keys() - dead):  # what ran on a dead node runs elsewhere, or nowhere
        for reported in reports[name].get("instances", []):
            if not isinstance(reported.get("ports", {}), dict):
                raise TypeError("an instance's ports are no mapping")
            i = {**reported, "node": name}  # whatever it says: a node speaks of its own
            instances.append(i if online.get(name) else {**i, "stale": True})
        if reports[name].get("message"):
            messages.append(f"{name}: {reports[name]['message']}")
    status: dict[str, Any] = {
        "phase": phase_of(wanted, instances, [str(r.get("phase", "")) for n, r in reports.items() if n not in dead]),
        "instances": instances,
        "version": ",".join(sorted({str(r.get("version", "")) for r in reports.values()} - {""})),
        "nodes": {n: {k: v for k, v in r.items() if k != "instances"} for n, r in sorted(reports.items())},
    }
    seen = [int(reports[n].get("observedGeneration", 0)) for n, count in expected.items() if count and n in reports]
    if seen:
        # the least: what every node that runs it has taken over
        status["observedGeneration"] = min(seen)
    if app.spec.perSite:
        status["sites"] = _by_site(expected, {n.metadata.name: n.spec.site for n in nodes}, reports)
        if empty := sorted(s for s in app.spec.perSite if s not in sites and replicas_at(app, s)):
            messages.append(f"no node at {', '.join(empty)} (named in perSite)")
    if not wanted and (app.spec.replicas or any(replicas_at(app, s) for s in app.spec.perSite)):
        status["phase"] = "Pending"
        where = f"site {app.spec.placement.site}" if app.spec.placement.site else "any site"
        messages.insert(0, f"no node of {where} matches the placement")
    silent = [n for n, count in expected.items() if count and n not in reports]
    if silent and wanted:
        messages.append(f"not heard from: {', '.join(silent)}")
    if messages:
        status["message"] = "; ".join(messages)
    return status


def _by_site(
    expected: Mapping[str, int], sites: Mapping[str, str], reports: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """``{site: {wanted, running, version}}`` of an App that is not the same at all sites."""
    found: dict[str, dict[str, Any]] = {}
    for node, count in sorted(expected.items()):
        one = found.setdefault(sites[node], {"wanted": 0, "running": 0, "version": ""})
        said = reports.get(node, {})
        one["wanted"] += count
        one["running"] += sum(i.get("phase") == "Running" for i in said.get("instances", []))
        versions = {*one["version"].split(","), str(said.get("version", ""))} - {""}
        one["version"] = ",".join(sorted(versions))
    return found


#: Nodes that a status names of those that do not enforce something; nodes of other sites that may ask for a Service.
_NAMED, GUESTS = 20, 2000


def fold_service(
    service: Resource,
    nodes: list[Resource],
    apps: Mapping[str, dict[str, Any]],
    reports: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """A Service's endpoints: running instances of its app, by site; whether all its nodes keep it closed; who of other
    sites may ask for it (node to site), and at which doors of its own nodes (node to ``{site, address}``)."""
    sites = {n.metadata.name: n.spec.site for n in nodes}
    endpoints = []
    for i in apps.get(service.spec.app, {}).get("instances", []):
        port = i.get("ports", {}).get(service.spec.port)
        if port and i.get("phase") == "Running":
            node = i.get("node", "")
            endpoints.append({"node": node, "site": sites.get(node, ""), "address": i.get("address", ""), "port": port})
    status: dict[str, Any] = {"endpoints": endpoints}
    if reports and service.spec.scope != "any":
        why = {n: str(r.get("why", "")) for n, r in reports.items() if not r.get("enforced")}
        status["enforced"] = not why
        if why:
            status["notEnforced"] = dict(sorted(why.items())[:_NAMED])
        if len(why) > _NAMED:
            status["notEnforced"]["..."] = f"and {len(why) - _NAMED} more nodes"
    if service.spec.allowFrom:
        allowed = [n for n in nodes if n.spec.site in service.spec.allowFrom and not n.status.get("revoked")]
        status["guests"] = {n.metadata.name: n.spec.site for n in allowed[:GUESTS]}
        if len(allowed) > GUESTS:
            status["message"] = f"{len(allowed)} nodes of other sites may ask, the first {GUESTS} are let in"
        doors = {n: str(r["door"]) for n, r in sorted(reports.items()) if r.get("door") and n in sites}
        status["doors"] = {n: {"site": sites[n], "address": door} for n, door in doors.items()}
    return status
