"""Whose share moves when nodes are lost, who stops when it is alone, and that both never run at once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edgeward.core.errors import Invalid
from edgeward.core.registry import kinds
from edgeward.core.resource import Resource, decode
from edgeward.hub.kinds import load
from edgeward.workloads import disconnect
from edgeward.workloads.cloud import fold
from edgeward.workloads.placement import share

load()


def app(replicas: int = 1, grace: str = "10s", **policy: Any) -> Resource:
    spec = {"process": {"command": ["true"]}, "replicas": replicas, "stop": {"grace": grace}, "disconnect": policy}
    return decode({"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": "web"}, "spec": spec})


def node(name: str, verdict: str = "healthy") -> Resource:
    doc = {"apiVersion": "edgeward/v1", "kind": "Node", "metadata": {"name": name}, "spec": {"site": "plant"}}
    return decode(doc | {"status": {"online": True, "verdict": verdict}})


NAMES = ("a", "b", "c", "d", "e")
NODES = [node(n) for n in NAMES]


def shares(a: Resource, gone: Any = ()) -> dict[str, int]:
    return {n: share(a, NODES, n, gone) for n in NAMES}


def test_a_dead_nodes_share_moves_and_nothing_else_does() -> None:
    for replicas in (1, 3, 5, 8):
        a = app(replicas)
        before = shares(a)
        for lost in NAMES:
            after = shares(a, {lost})
            assert sum(after.values()) == replicas
            assert after[lost] == 0
            assert all(after[n] >= before[n] for n in NAMES if n != lost), "who lives keeps what it has"


def test_where_all_are_lost_nobody_is_left_to_move_to() -> None:
    assert shares(app(3), set(NAMES)) == shares(app(3))


def test_share_moves_when_its_time_has_come() -> None:
    dead = {"a": 0.0, "b": 40.0}
    assert disconnect.gone(app().spec, dead) == {"a", "b"}
    assert disconnect.gone(app(lostAfter="30s").spec, dead) == {"b"}
    assert disconnect.gone(app(stopAfter="15s").spec, dead) == {"b"}, "15 s, 10 s to stop, and a margin"
    assert disconnect.gone(app(stopAfter="25s").spec, dead) == set()


@pytest.mark.parametrize(
    ("rule", "original", "replacement", "stays"),
    [
        ("keep-original", 0, 99, False),
        ("best-score", 0, 99, False),
        ("keep-replacement", 99, 1, True),
        ("longest-running", 0, 20, True),
        ("longest-running", 300, 20, False),
    ],
)
def test_who_goes_on_when_a_node_is_back(rule: str, original: int, replacement: int, stays: bool) -> None:
    """``b`` took ``a``'s share, says so, and ``a`` is heard again: all go by what both say."""
    spec = app(reconcile=rule).spec
    ran = {("a", 7): original, ("b", 7): replacement}
    holds = {"b": [(7, 1), (8, 3), (7, 99)]}
    found = disconnect.kept(spec, 7, holds, {1: "a", 2: "b", 3: "c"}, lambda node, what: ran.get((node, what), 0))
    assert found == ({"a"} if stays else set())


def test_whoever_takes_a_share_over_knows_it() -> None:
    a = app()
    home = next(n for n, count in shares(a).items() if count)
    heir = next(n for n, count in shares(a, {home}).items() if count)
    for name in NAMES:
        took = disconnect.takes_over(lambda gone, name=name: share(a, NODES, name, gone), {home})  # type: ignore[misc]
        assert took == ([home] if name == heir else [])
    other = next(n for n in NAMES if n not in (home, heir))
    both = disconnect.takes_over(lambda gone: share(a, NODES, heir, gone), {home, other})
    assert both == [home], "the other one had nothing of it"


def test_who_is_alone_stops_what_must_not_run_twice() -> None:
    assert not disconnect.stops(app().spec, math.inf)
    careful = app(stopAfter="20s").spec
    assert not disconnect.stops(careful, 0.0)
    assert not disconnect.stops(careful, 19.0)
    assert disconnect.stops(careful, 20.0)
    assert disconnect.stops(careful, math.inf)
    assert not disconnect.stops(app(stopAfter="0s").spec, 0.0), "whoever has a majority goes on"


@pytest.mark.parametrize("lost", ["0s", "44s"])
def test_a_policy_that_would_run_it_twice_is_refused(lost: str) -> None:
    with pytest.raises(Invalid) as e:
        kinds.get("App").check(app(stopAfter="20s", grace="15s", lostAfter=lost))
    assert e.value.field == "$.spec.disconnect.lostAfter"
    assert "45s" in str(e.value.remedy)
    kinds.get("App").check(app(stopAfter="20s", grace="15s", lostAfter="45s"))


def test_the_hub_counts_an_app_where_it_runs_now() -> None:
    a = app()
    home = next(n for n, count in shares(a).items() if count)
    heir = next(n for n, count in shares(a, {home}).items() if count)
    reports = {
        home: {"phase": "Running", "instances": [{"id": "1", "phase": "Running"}], "observedGeneration": 1},
        heir: {"phase": "Running", "instances": [{"id": "2", "phase": "Running"}], "observedGeneration": 1},
    }
    nodes = [node(n, "dead" if n == home else "wan-cut") for n in NAMES]
    status = fold(a, nodes, reports)
    assert [(i["id"], i["node"]) for i in status["instances"]] == [("2", heir)]
    assert status["phase"] == "Running"
    del reports[heir]
    assert fold(a, nodes, reports)["phase"] == "Pending"
