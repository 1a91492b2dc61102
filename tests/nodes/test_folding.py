"""One node's nonsense hides nothing of what the others report."""

from __future__ import annotations

from typing import Any

import pytest
from tests.workloads.test_cloud import app, node, report

from edgeward.core.resource import decode
from edgeward.hub.kinds import load
from edgeward.nodes.folding import folded
from edgeward.workloads.cloud import fold, fold_service

load()

NONSENSE: list[dict[str, Any]] = [
    {"instances": 7},
    {"instances": [7]},
    {"instances": [{"phase": "Running", "ports": []}]},
    {"instances": [{"phase": [], "ports": {"http": "x"}}]},
    {"observedGeneration": []},
    {"observedGeneration": "many", "instances": []},
    {"instances": {"a": 1}},
]


@pytest.mark.parametrize("said", NONSENSE, ids=str)
def test_an_app_and_its_service_are_what_the_others_say(said: dict[str, Any]) -> None:
    nodes = [node("plant-1"), node("shop-1"), node("home-1")]
    good = {n: report() for n in ("plant-1", "home-1")}
    for one in good.values():
        one["instances"][0]["ports"] = {"http": 8080}
    status, odd = folded(lambda r: fold(app(), nodes, r), {**good, "shop-1": said})
    mine = [i for i in status["instances"] if i["node"] != "shop-1"]
    assert [i["node"] for i in mine] == ["home-1", "plant-1"] and odd in ([], ["shop-1"])
    doc = {"apiVersion": "edgeward/v1", "kind": "Service", "metadata": {"name": "web"}}
    service = decode({**doc, "spec": {"app": "web", "port": "http"}})
    found = fold_service(service, nodes, {"web": status}, {})["endpoints"]
    assert {(e["node"], e["port"]) for e in found} >= {("plant-1", 8080), ("home-1", 8080)}


def test_who_was_left_out_is_named_and_a_fold_that_is_wrong_by_itself_is_no_nodes_fault() -> None:
    def sums(reports: Any) -> dict[str, Any]:
        return {"sum": sum(r["n"] for r in reports.values())}

    assert folded(sums, {"a": {"n": 1}, "b": {"n": "x"}, "c": {}, "d": {"n": 2}}) == ({"sum": 3}, ["b", "c"])

    def broken(_: Any) -> dict[str, Any]:
        raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="of ours"):
        folded(broken, {"a": {}})
