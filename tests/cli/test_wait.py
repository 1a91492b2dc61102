"""When `apply --wait` may say that an app runs: never on the word of the version before."""

from __future__ import annotations

from typing import Any

import pytest

from edgeward.cli.wait import app_state, export_state, function_state


def instance(phase: str = "Running", version: str = "v2", **more: Any) -> dict[str, Any]:
    return {"node": "plant-1", "phase": phase, "version": version, **more}


@pytest.mark.parametrize(
    ("status", "fresh", "state"),
    [
        ({}, True, "waiting"),
        ({"phase": "Starting"}, True, "waiting"),
        ({"phase": "Running", "instances": [instance()]}, True, "done"),
        ({"phase": "Running", "instances": [instance()]}, False, "waiting"),
        ({"phase": "Running", "observedGeneration": 1}, True, "waiting"),
        ({"phase": "Running", "observedGeneration": 2}, False, "done"),
        ({"phase": "Failed", "observedGeneration": 1}, True, "waiting"),
        ({"phase": "Failed"}, True, "failed"),
        ({"phase": "Running", "instances": [instance(stale=True)]}, True, "waiting"),
        ({"phase": "Running", "instances": [instance(version="v1"), instance("Starting")]}, True, "waiting"),
        ({"phase": "Running", "instances": [instance("Stopping", "v1"), instance()]}, True, "done"),
        # two sites may have different versions by an override
        ({"phase": "Running", "instances": [instance(), instance(version="v1", node="shop-1")]}, True, "done"),
        # the older version serves while the image of the new one comes
        ({"phase": "Running", "instances": [instance()], "nodes": {"plant-1": {"wanted": "v2"}}}, True, "waiting"),
        # rolled back: all is well but for the phase
        ({"phase": "Degraded", "instances": [instance()], "nodes": {"plant-1": {"phase": "Degraded"}}}, True, "failed"),
        # a node's own API, of what another node runs
        ({"phase": "Elsewhere", "elsewhere": ["plant-2"], "message": "runs on plant-2"}, True, "failed"),
        # another node is not heard from yet
        ({"phase": "Degraded", "instances": [instance()], "nodes": {"plant-1": {"phase": "Running"}}}, True, "waiting"),
    ],
)
def test_verdicts(status: dict[str, Any], fresh: bool, state: str) -> None:
    assert app_state({"status": status}, 2, fresh=fresh)[0] == state


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, "waiting"),
        ({"phase": "Running", "observedGeneration": 1}, "waiting"),
        ({"phase": "Starting", "observedGeneration": 2}, "waiting"),
        ({"phase": "Updating", "observedGeneration": 2}, "waiting"),
        ({"phase": "Running", "observedGeneration": 2, "instances": 0}, "done"),
        ({"phase": "Degraded", "observedGeneration": 2, "message": "why"}, "failed"),
        ({"phase": "Failed", "observedGeneration": 2}, "failed"),
        ({"phase": "Refused", "observedGeneration": 2}, "failed"),
        # an old one goes on where the new one cannot be had
        ({"phase": "Degraded", "observedGeneration": 1, "refusedGeneration": 2}, "failed"),
        ({"phase": "Degraded", "observedGeneration": 1, "nodes": {"n": {"refusedGeneration": 2}}}, "failed"),
        ({"phase": "Degraded", "observedGeneration": 1, "nodes": {"n": {"refusedGeneration": 1}}}, "waiting"),
    ],
)
def test_a_function_is_waited_for_until_its_nodes_answer_with_it(status: dict[str, object], state: str) -> None:
    assert function_state({"status": status}, 2)[0] == state


@pytest.mark.parametrize(
    ("status", "fresh", "state"),
    [
        ({}, True, "waiting"),
        ({"phase": "Pending", "message": "not heard from: plant-2"}, True, "waiting"),
        ({"phase": "Flowing"}, True, "done"),
        ({"phase": "Flowing"}, False, "waiting"),
        ({"phase": "Flowing", "observedGeneration": 1}, True, "waiting"),
        ({"phase": "Flowing", "observedGeneration": 2}, False, "done"),
        ({"phase": "Refusing", "observedGeneration": 2, "message": "plant-1: full"}, True, "done"),
        ({"phase": "Failed", "observedGeneration": 2, "message": "plant-1: no room"}, True, "failed"),
        ({"phase": "Flowing", "observedGeneration": 2, "nodes": {"plant-1": {"stale": True}}}, True, "waiting"),
        # a node's own
        ({"state": "capturing", "observedGeneration": 2}, True, "done"),
        ({"state": "failed", "observedGeneration": 2, "message": "no room"}, True, "failed"),
    ],
)
def test_verdicts_on_an_export(status: dict[str, Any], fresh: bool, state: str) -> None:
    got, shown = export_state({"status": status}, 2, fresh=fresh)
    assert got == state
    if state == "failed":
        assert "no room" in shown
