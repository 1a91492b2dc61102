"""What people declare of a Rollout, and what it refers to."""

from __future__ import annotations

from typing import Any

import pytest

from edgeward.core.errors import Invalid
from edgeward.core.registry import kinds
from edgeward.core.resource import Resource, decode
from edgeward.hub.kinds import load
from edgeward.workloads.outcome import Node
from edgeward.workloads.rollout import Amount
from edgeward.workloads.rollout_spec import rules_of

load()
TARGETS = [{"kind": "App", "name": "web"}]


def rollout(status: dict[str, Any] | None = None, **spec: Any) -> Resource:
    doc = {
        "apiVersion": "edgeward/v1",
        "kind": "Rollout",
        "metadata": {"name": "r"},
        "spec": {"targets": TARGETS, **spec},
    }
    return decode({**doc, "status": status or {}})


def test_in_numbers() -> None:
    groups = [
        {"name": "one", "size": 1, "healthWindow": "5s"},
        {
            "name": "two",
            "sites": ["a"],
            "nodeSelector": {"gpu": "yes"},
            "batch": "10%",
            "success": "50%",
            "approval": True,
        },
    ]
    rules = rules_of(rollout(groups=groups, failures="5%", healthWindow="1m", timeout="2m", silentAfter=30).spec)
    one, two = rules.groups
    assert (one.size, one.window, two.window, two.batch) == (Amount(1), 5.0, 60.0, Amount(10, percent=True))
    assert (two.success, two.approval, rules.failures) == (Amount(50, percent=True), True, Amount(5, percent=True))
    assert (rules.timeout, rules.silent_after, rules.rest.window) == (120.0, 30.0, 60.0)
    nodes = [Node("x", "a", {"gpu": "yes"}), Node("y", "a", {}), Node("z", "b", {"gpu": "yes"})]
    assert [two.takes(n) for n in nodes] == [True, False, False]
    assert all(one.takes(n) for n in nodes)
    assert Amount(10, percent=True).of(5, least=1) == 1
    assert Amount(10, percent=True).of(29) == 2


def test_a_window_of_a_group_is_in_place_of_the_rollouts() -> None:
    night = {"begin": "22:00", "end": "04:00"}
    rules = rules_of(
        rollout(
            groups=[{"name": "a"}, {"name": "b", "maintenance": [night]}],
            maintenance=[{"begin": "00:00", "end": "00:00"}],
        ).spec
    )
    noon = 12 * 3600.0
    assert rules.groups[0].opens(noon)[0]
    assert rules.groups[1].opens(noon) == (False, 22 * 3600.0)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"targets": []}, "$.spec.targets"),
        ({"targets": [*TARGETS, *TARGETS]}, "$.spec.targets"),
        ({"targets": [{"kind": "Route", "name": "x"}]}, "$.spec.targets[0].kind"),
        ({"groups": [{"name": "rest"}]}, "$.spec.groups[0].name"),
        ({"groups": [{"name": "a"}, {"name": "a"}]}, "$.spec.groups[1].name"),
        ({"groups": [{"name": "A!"}]}, "$.spec.groups[0].name"),
        ({"groups": [{"name": "a", "batch": 0}]}, "$.spec.groups[0].batch"),
        ({"groups": [{"name": "a", "size": "0%"}]}, "$.spec.groups[0].size"),
        ({"groups": [{"name": "a", "size": "101%"}]}, "$.spec.groups[0].size"),
        ({"maintenance": [{"begin": "25:00", "end": "01:00"}]}, "$.spec.maintenance[0].begin"),
        ({"maintenance": [{"begin": "05:00", "end": "01:00", "zone": "Mars/North"}]}, "$.spec.maintenance[0].zone"),
        ({"healthWindow": "soon"}, "$.spec.healthWindow"),
        ({"timeout": 1e300}, "$.spec.timeout"),
    ],
)
def test_what_is_refused_says_where(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as e:
        rollout(**spec)
    assert e.value.field == field


def test_what_a_baseline_uses_stays_at_the_nodes_and_a_target_may_come_later() -> None:
    parts = {"process": {"command": ["true"]}, "envFrom": [{"config": "old"}, {"secret": "key"}]}
    baseline = {"generation": 1, "digest": "d", "parts": parts}
    target = {"kind": "App", "name": "web", "uid": "u", "generation": 2, "digest": "e", "baseline": baseline}
    refs = kinds.get("Rollout").refs(rollout({"targets": [target]}))
    assert [(r.kind, r.name, r.must) for r in refs] == [
        ("App", "web", False),
        ("Config", "old", False),
        ("Secret", "key", False),
    ]
    target["baseline"] = {**baseline, "parts": {"of": "another release"}}
    assert len(kinds.get("Rollout").refs(rollout({"targets": [target]}))) == 1


def test_a_site_has_a_word_on_hold_alone() -> None:
    fields = set(kinds.get("Rollout").hub_fields)
    assert "hold" not in fields
    assert {"targets", "groups", "paused", "approved", "cancelled", "maintenance", "failures"} <= fields
