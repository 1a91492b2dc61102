"""Changes that meet at nodes of a site: the same one stands in whatever order they come."""

from __future__ import annotations

import itertools

import msgspec

from edgeward.core.resource import Key
from edgeward.nodes.siblings import (
    Digest,
    Dot,
    Finished,
    Horizon,
    SiteChange,
    answer,
    covers,
    meet,
    rank,
    record,
)


def change(node: str, seq: int, stamp: float, **seen: int) -> SiteChange:
    over = {f"{n}/s": s for n, s in seen.items()}
    return SiteChange(node, "s", seq, "App", "default", "web", "delete", 0, stamp, f"who-{node}", None, over)


A1 = change("a", 1, 10.0)
B1 = change("b", 1, 20.0, a=1)  # on top of A1
C1 = change("c", 1, 15.0)  # knows of nothing
A2 = change("a", 2, 15.0, c=1)  # on top of A1 and C1, the stamp of C1 (the clock stood still)


def test_one_stands_whatever_the_order() -> None:
    for order in itertools.permutations([A1, B1, C1, A2]):
        held, lost = None, set()
        for theirs in order:
            met = meet(held, theirs)
            lost |= {met.lost.change.dot} if met.lost else set()
            held = msgspec.structs.replace(theirs if met.take else held or theirs, seen=met.seen)
        assert held is not None and held.dot == B1.dot
        assert covers(held, A1) and covers(held, C1) and covers(held, A2), "whatever comes late is known"
        assert meet(held, C1).lost is None
        assert A2.dot in lost or C1.dot in lost


def test_who_was_on_top_stands_whatever_the_clocks_say() -> None:
    early = change("b", 1, 1.0, a=1)
    assert meet(A1, early).take and meet(A1, early).lost is None
    assert not meet(early, A1).take and meet(early, A1).lost is None
    assert meet(A1, A1) == meet(A1, msgspec.structs.replace(A1)), "the same one is nothing new"
    assert not meet(A1, A1).take


def test_those_who_did_not_know_of_each_other_are_ranked_and_one_is_lost() -> None:
    for mine, theirs in ((A1, C1), (C1, A1)):
        met = meet(mine, theirs)
        assert met.lost is not None and (met.lost.change, met.lost.winner) == (A1, C1)
        assert met.take == (theirs is C1)
    tie = change("d", 1, 15.0)
    assert rank(tie) > rank(C1), "by name where the times are the same"
    assert meet(C1, tie).take and not meet(tie, C1).take
    entry = record(meet(C1, tie).lost or (C1, tie), "plant", None, "2026-01-01T00:00:00Z")  # type: ignore[arg-type]
    assert (entry["node"], entry["actor"], entry["loser"], entry["outcome"]) == ("c", "who-c", "edge", "replaced")
    assert "who-d changed it at d too" in entry["why"]


def test_an_answer_is_what_the_other_one_lacks() -> None:
    web, api = Key("App", "default", "web"), Key("App", "default", "api")
    other = msgspec.structs.replace(C1, name="api")
    mine = {web: B1, api: other}

    def gone(dot: Dot, key: Key) -> Finished | None:
        return Finished(*dot, key.kind, key.namespace, key.name) if dot == A1.dot else None

    def ask(*held: SiteChange) -> list[str]:
        digest = Digest("x", "s", [(c.kind, c.namespace, c.name, *c.dot) for c in held])
        got = answer(digest, 7, mine, gone, ("b", "s"))
        assert (got.node, got.upto, got.mine) == ("b", 7, [1])
        return [c.name for c in got.changes] + [f"gone {f.seq}" for f in got.finished]

    assert ask() == ["api", "web"]
    assert ask(B1) == ["api"]
    assert ask(B1, other) == []
    assert ask(A1, other) == ["web", "gone 1"]
    assert ask(change("b", 2, 30.0), other) == [], "a later one of the same node is on top of it"


def test_what_a_node_says_of_its_own_is_finished_or_not() -> None:
    said = Horizon(5, [3])
    assert [said.finished(n) for n in (1, 3, 5, 6)] == [True, False, True, False]
