"""What becomes of a local change: every combination of rule, who changed, and whether the object is shared."""

from __future__ import annotations

import itertools

import pytest

from edgeward.nodes.merge import Decision, Side, decide

HUB, EDGE = Side(True, 5, 100.0), Side(True, 5, 200.0)
RULES = ("cloud", "edge", "newest")


def ask(
    rule: str = "cloud",
    *,
    base: int = 5,
    hub: Side = HUB,
    edge: Side = EDGE,
    same: bool = False,
    shared: bool = False,
) -> Decision:
    return decide(rule=rule, base=base, hub=hub, edge=edge, same=same, shared=shared)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
def test_a_change_on_one_side_only_travels(rule: str) -> None:
    assert ask(rule) == Decision("accept", "", "changed at the site only")


@pytest.mark.parametrize("rule", RULES)
def test_a_new_object_of_the_site_is_accepted(rule: str) -> None:
    assert ask(rule, base=0, hub=Side(False)).outcome == "accept"


@pytest.mark.parametrize(
    ("rule", "edge_time", "outcome", "loser"),
    [
        ("cloud", 900.0, "reject", "edge"),
        ("edge", 1.0, "accept", "cloud"),
        ("newest", 900.0, "accept", "cloud"),
        ("newest", 1.0, "reject", "edge"),
    ],
)
def test_changed_on_both_sides_the_rule_decides(rule: str, edge_time: float, outcome: str, loser: str) -> None:
    got = ask(rule, hub=Side(True, 9, 500.0), edge=Side(True, 5, edge_time))
    assert (got.outcome, got.loser) == (outcome, loser)
    assert "rule is" in got.why or "newer" in got.why


def test_deleted_at_the_hub_stays_deleted_unless_the_rule_says_otherwise() -> None:
    gone = Side(False)
    assert ask("cloud", hub=gone).outcome == "reject"
    assert ask("edge", hub=gone).outcome == "accept"


def test_a_shared_object_becomes_an_override_and_is_never_deleted_by_a_site() -> None:
    assert ask(shared=True).outcome == "override"
    got = ask(shared=True, edge=Side(False, 5, 200.0))
    assert (got.outcome, got.loser) == ("reject", "edge")


def test_every_combination_has_one_answer_and_a_loser_only_when_both_changed() -> None:
    sides = [Side(False), Side(True, 5, 100.0), Side(True, 9, 500.0)]
    for rule, base, hub, edge, same, shared in itertools.product(
        RULES, (0, 5), sides, [Side(False), Side(True, 5, 50.0), Side(True, 5, 900.0)], (False, True), (False, True)
    ):
        got = decide(rule=rule, base=base, hub=hub, edge=edge, same=same, shared=shared)  # type: ignore[arg-type]
        assert got.outcome in ("accept", "override", "same", "reject")
        if got.loser == "cloud":
            assert got.outcome == "accept"
        if got.loser == "edge":
            assert got.outcome == "reject"
        if got.outcome == "reject":
            assert got.loser == "edge", "what is rejected is in the journal"
        if hub.exists and hub.revision == base and not same and not (shared and not edge.exists):
            assert got.loser == "", "nobody loses when one side only changed"
