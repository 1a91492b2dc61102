"""Reports of nodes folded into the status of an App and a Service."""

from __future__ import annotations

from typing import Any

import pytest

from edgeward.core.resource import Resource, decode
from edgeward.hub.kinds import load
from edgeward.workloads.cloud import fold, fold_service, phase_of

load()

UP, BAD = {"phase": "Running"}, {"phase": "Starting"}


def node(name: str, *, online: bool = True, **labels: str) -> Resource:
    meta = {"name": name, "labels": labels}
    spec = {"site": name.split("-")[0]}
    doc = {"apiVersion": "edgeward/v1", "kind": "Node", "metadata": meta, "spec": spec}
    return decode(doc | {"status": {"online": online}})


def app(replicas: int = 1, **placement: Any) -> Resource:
    spec = {"process": {"command": ["true"]}, "replicas": replicas, "placement": placement}
    return decode({"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": "web"}, "spec": spec})


def report(phase: str = "Running", count: int = 1, generation: int = 1, **more: Any) -> dict[str, Any]:
    instances = [{"phase": phase, "id": str(n)} for n in range(count)]
    return {"phase": phase, "instances": instances, "observedGeneration": generation, "version": "v1"} | more


@pytest.mark.parametrize(
    ("wanted", "instances", "phases", "phase"),
    [
        (0, [], [], "Stopped"),
        (0, [], ["Running"], "Stopped"),
        (0, [UP], ["Running"], "Running"),
        (1, [], [], "Pending"),
        (1, [], ["Starting"], "Starting"),
        (1, [BAD], ["Starting"], "Starting"),
        (2, [UP], ["Running"], "Degraded"),
        (2, [UP, UP], ["Running"], "Running"),
        (1, [UP, UP], ["Running"], "Running"),
        (2, [UP, UP], ["Running", "Degraded"], "Degraded"),
        (2, [BAD], ["Failed"], "Failed"),
        (2, [UP, BAD], ["Running", "Failed"], "Degraded"),
        (2, [], ["Stopped", "Stopped"], "Stopped"),
        (2, [], ["Stopped", "Starting"], "Starting"),
    ],
)
def test_one_phase_for_many(wanted: int, instances: list[dict[str, Any]], phases: list[str], phase: str) -> None:
    assert phase_of(wanted, instances, phases) == phase


def test_nodes_that_run_it_are_added_up() -> None:
    nodes = [node("a-1"), node("a-2"), node("b-1", online=False)]
    got = fold(
        app(2),
        nodes,
        {
            "b-1": report(count=2, generation=4, version="v1"),
            "a-2": report(generation=5, version="v2", message="disk full"),
            "a-1": report(generation=7, version="v2"),
        },
    )
    assert got["phase"] == "Running"
    assert [i.get("stale", False) for i in got["instances"]] == [False, False, True, True], "of a node that is away"
    assert got["version"] == "v1,v2"
    assert got["observedGeneration"] == 4, "what all of them have taken over"
    assert got["message"] == "a-2: disk full"
    assert list(got["nodes"]) == ["a-1", "a-2", "b-1"]
    assert "instances" not in got["nodes"]["a-1"]


def test_what_is_missing_is_told() -> None:
    nodes = [node("a-1"), node("b-1", zone="x")]
    one = fold(app(), nodes, {"a-1": report()})
    assert (one["phase"], one["message"]) == ("Degraded", "not heard from: b-1")
    assert fold(app(), nodes, {})["phase"] == "Pending"
    nobody = fold(app(1, site="a", nodeSelector={"zone": "x"}), nodes, {})
    assert (nobody["phase"], nobody["message"]) == ("Pending", "no node of site a matches the placement")
    assert fold(app(), [], {})["message"] == "no node of any site matches the placement"
    stopped = fold(app(0), nodes, {})
    assert stopped["phase"] == "Stopped"
    assert "message" not in stopped
    assert "observedGeneration" not in stopped
    # a node that still has instances of an app that left it does not hold the generation back
    moved = fold(app(1, site="a"), nodes, {"a-1": report(generation=9), "b-1": report(generation=2)})
    assert moved["observedGeneration"] == 9
    assert len(moved["instances"]) == 2


def test_a_service_has_the_running_instances_with_its_port() -> None:
    service = decode(
        {"apiVersion": "edgeward/v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"app": "web", "port": "h"}}
    )
    instances = [
        {"node": "a-1", "phase": "Running", "ports": {"h": 1, "other": 2}, "address": "10.0.0.1"},
        {"node": "a-1", "phase": "Starting", "ports": {"h": 3}},
        {"node": "a-1", "phase": "Running", "ports": {"other": 4}},
        {"node": "gone", "phase": "Running", "ports": {"h": 5}},
        {"phase": "Running"},
    ]
    assert fold_service(service, [node("a-1")], {"web": {"instances": instances}, "other": {}}, {})["endpoints"] == [
        {"node": "a-1", "site": "a", "address": "10.0.0.1", "port": 1},
        {"node": "gone", "site": "", "address": "", "port": 5},
    ]
    assert fold_service(service, [], {}, {}) == {"endpoints": []}


def test_who_may_ask_for_a_service_and_where() -> None:
    spec = {"app": "web", "port": "http", "allowFrom": ["b", "c"]}
    meta = {"apiVersion": "edgeward/v1", "kind": "Service", "metadata": {"name": "web"}}
    gone = node("c-1")
    gone.status["revoked"] = True
    nodes = [node("a-1"), node("b-1", online=False), node("b-2"), gone, node("d-1")]
    reports = {"a-1": {"enforced": True, "door": "10.0.0.1:7000"}, "x-1": {"enforced": True, "door": "10.0.0.9:1"}}
    got = fold_service(decode({**meta, "spec": spec}), nodes, {}, reports)
    assert got["guests"] == {"b-1": "b", "b-2": "b"}
    assert got["doors"] == {"a-1": {"site": "a", "address": "10.0.0.1:7000"}}


def test_a_service_is_closed_when_all_its_nodes_say_so() -> None:
    spec = {"app": "web", "port": "http"}
    meta = {"apiVersion": "edgeward/v1", "kind": "Service", "metadata": {"name": "web"}}
    service, free = decode({**meta, "spec": spec}), decode({**meta, "spec": {**spec, "scope": "any"}})
    held, not_held = {"enforced": True}, {"enforced": False, "why": "needs root (CAP_NET_ADMIN)"}
    assert fold_service(service, [], {}, {"a-1": held})["enforced"] is True
    got = fold_service(service, [], {}, {"a-1": held, "a-2": not_held})
    assert got == {"endpoints": [], "enforced": False, "notEnforced": {"a-2": "needs root (CAP_NET_ADMIN)"}}
    assert fold_service(free, [], {}, {"a-1": held}) == {"endpoints": []}
    many = fold_service(service, [], {}, {f"a-{n:02}": not_held for n in range(30)})
    assert len(many["notEnforced"]) == 21
    assert many["notEnforced"]["..."] == "and 10 more nodes"
