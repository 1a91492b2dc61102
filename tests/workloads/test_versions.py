"""The versions of an App that a node keeps: how they are told, and the way back."""

from __future__ import annotations

import pytest

from edgeward.core.errors import NotFound
from edgeward.workloads.plan import State
from edgeward.workloads.state import Snapshot
from edgeward.workloads.versions import before, kept, put_back

A, B, C, BAD = (letter * 64 for letter in "abce")
FOUND = {d: Snapshot({"process": {"command": [d[0]]}}, env={"SECRET": "x"}) for d in (A, B, C, BAD)}


def test_the_present_one_is_last_and_what_is_not_kept_any_more_is_left_out() -> None:
    items = kept(State(current=C, history=[B, A, "f" * 64], bad={BAD: "it ended"}), FOUND.get)
    assert [(i["version"], i["state"]) for i in items] == [
        ("e" * 12, "failed"), ("a" * 12, "kept"), ("b" * 12, "kept"), ("c" * 12, "serves")
    ]  # fmt: skip
    assert items[0]["message"] == "it ended" and "SECRET" not in str(items)


def test_a_version_that_serves_again_is_the_present_one_and_none_of_the_past() -> None:
    state = State(current=C, history=[B, A])
    state.serve(B)
    items = kept(state, FOUND.get)
    assert [i["version"] for i in items] == ["a" * 12, "c" * 12, "b" * 12], "and none is forgotten for it"
    assert items[-1]["state"] == "serves" and before(items, "", "web")["version"] == "c" * 12


def test_the_way_back() -> None:
    items = kept(State(current=C, candidate=BAD, history=[B, A]), FOUND.get)
    assert before(items, "", "web")["version"] == "b" * 12
    assert before(items, "aaaa", "web")["version"] == "a" * 12
    assert before(items, A, "web")["version"] == "a" * 12
    for to, words in (("ffff", "no version to go back to"), ("cccc", "no version to go back to")):
        with pytest.raises(NotFound, match=words):
            before(items, to, "web")
    with pytest.raises(NotFound, match="no version before"):
        before(kept(State(current=C), FOUND.get), "", "web")
    with pytest.raises(NotFound, match="not kept here"):
        before([], "", "web")


def test_what_is_no_part_of_a_version_stays() -> None:
    now = {"replicas": 3, "placement": {"site": "s"}, "process": {"command": ["c"]}, "ports": [{"name": "http"}]}
    past = {"spec": {"process": {"command": ["a"]}}}
    assert put_back(now, past) == {"process": {"command": ["a"]}, "replicas": 3, "placement": {"site": "s"}}
