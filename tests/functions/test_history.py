"""What is kept of a function's versions, and where a rollback leads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core import kinds as _core_kinds  # noqa: F401
from edgeward.core.errors import NotFound
from edgeward.core.resource import Resource, decode
from edgeward.functions.history import KEPT, Past, before, code_of, declared, put_back, reported, state_of, told_by
from edgeward.functions.keeping import EdgeHistory
from edgeward.functions.spec import POLICY, FunctionSpec


def spec(code: str, **more: Any) -> dict[str, Any]:
    return {"runtime": "python", "source": {"inline": code}, **more}


def follow(*steps: dict[str, Any]) -> list[Past]:
    known: list[Past] = []
    for n, step in enumerate(steps, 1):
        known = declared(known, step, n, f"t{n}")
        known = reported(known, [(n, f"digest-{step['source']['inline']}")])
    return known


def codes(known: list[Past]) -> str:
    return "".join(p.spec["source"]["inline"] for p in known)


CANARY = {"canary": {"weight": 5}}


def test_the_last_three_are_kept_the_present_one_last() -> None:
    known = follow(*(spec(c) for c in "abcd"))
    assert codes(known) == "bcd"
    assert [p.digests for p in known] == [["digest-b"], ["digest-c"], ["digest-d"]]
    assert codes(follow(*(spec(c) for c in "abcb"))) == "acb", "what is declared again is the present one"
    again = follow(spec("a"), spec("a", concurrency=7), spec("a", scale={"max": 2}))
    assert (codes(again), again[0].first, again[0].last, again[0].at) == ("a", 1, 3, "t1")


def test_a_row_of_canaries_leaves_the_version_that_they_were_tried_beside() -> None:
    known = follow(spec("s"), *(spec(c, **CANARY) for c in "abcdef"))
    assert codes(known) == "sef"
    items = [p.shown() for p in known]
    assert before(items, "", "f")["version"] == "digest-s"
    assert codes(follow(spec("s"), spec("a", **CANARY), spec("a"), spec("b", **CANARY))) == "sab", "a was promoted"
    assert (
        before([p.shown() for p in follow(spec("s"), spec("a", **CANARY), spec("a"), spec("b"))], "", "f")["version"]
        == "digest-a"
    )


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), min_size=1, max_size=30))
def test_never_more_than_three_and_always_a_way_back(steps: list[tuple[str, bool]]) -> None:
    known = follow(*(spec(c, **(CANARY if trial else {})) for c, trial in steps))
    assert len(known) <= KEPT
    assert known[-1].spec == code_of(spec(steps[-1][0]))
    assert len({codes([p]) for p in known}) == len(known)
    whole = [c for c, trial in steps if not trial]
    others = [c for c in whole if c != steps[-1][0]]
    if others:
        assert before([p.shown() for p in known], "", "f")["spec"]["source"]["inline"] == others[-1]


def test_a_digest_is_of_the_generation_that_a_node_speaks_of() -> None:
    known = follow(spec("a"), spec("b"))
    told = told_by(
        {
            "n1": {"observedGeneration": 1, "version": "old"},
            "n2": {"observedGeneration": 2, "version": "old", "canary": {"version": "new"}},
            "n3": {"observedGeneration": 2, "version": "old", "wanted": "newer"},
            "n4": {},
        }
    )
    assert reported(known, told)[-1].digests == ["digest-b", "new", "newer"]
    assert reported(known, told)[:-1] == known[:-1]
    assert reported([], told) == []


def test_going_back_changes_the_code_and_nothing_else() -> None:
    known = follow(spec("a", env={"A": "1"}, scale={"max": 2}), spec("b", concurrency=7, canary={"weight": 5}))
    items = [p.shown() for p in known]
    now = spec("b", concurrency=7, canary={"weight": 5}, placement={"site": "plant"})
    back = put_back(now, before(items, "", "f"))
    assert back == {**spec("a", env={"A": "1"}), "concurrency": 7, "placement": {"site": "plant"}}
    assert before(items, "digest-b", "f") is items[1]
    assert [state_of(i, {}, last=i is items[-1]) for i in items] == ["kept", "declared"]
    status = {"version": "digest-a,x", "canary": {"version": "digest-b"}}
    assert [state_of(i, status, last=False) for i in items] == ["stable", "canary"]
    assert state_of(items[1], {"takenBack": "digest-b"}, last=True) == "taken back"


@pytest.mark.parametrize(
    ("to", "words"), [("digest", "several"), ("nothing", "no version that is kept"), ("", "before")]
)
def test_where_there_is_no_way_back_it_says_so(to: str, words: str) -> None:
    items = [p.shown() for p in (follow(spec("a"), spec("b")) if to else follow(spec("a")))]
    with pytest.raises(NotFound) as e:
        before(items, to, "f")
    assert words in str(e.value)


def test_what_is_called_policy_is_in_the_spec_or_to_come() -> None:
    assert POLICY - set(FunctionSpec.__struct_fields__) <= {"samples"}
    assert {"runtime", "source", "handler", "env", "limits"}.isdisjoint(POLICY)


def function(code: str, generation: int, **more: Any) -> Resource:
    doc = {"apiVersion": "edgeward/v1", "kind": "Function", "metadata": {"name": "f"}, "spec": spec(code, **more)}
    found = decode(doc)
    found.metadata.generation, found.metadata.resourceVersion = generation, str(generation)
    return found


def test_a_node_keeps_them_in_a_file_and_forgets_them_with_the_function(tmp_path: Path) -> None:
    history = EdgeHistory(tmp_path)
    for n, code in enumerate("abcd", 1):
        history.note([function(code, n)], [{"key": "default/f", "digest": f"d{code}"}])
    assert [i["version"] for i in EdgeHistory(tmp_path).of("default", "f")] == ["db", "dc", "dd"]
    file = tmp_path / "default" / "f.json"
    assert file.stat().st_mode & 0o777 == 0o600
    before_ = file.stat().st_mtime_ns
    history.note([function("d", 4)], [{"key": "default/f", "digest": "dd"}])
    EdgeHistory(tmp_path).note([function("d", 4)], [{"key": "default/f", "digest": "dd"}])
    assert file.stat().st_mtime_ns == before_, "nothing new is not written"
    file.write_text("{")
    assert history.of("default", "f") == [], "what is damaged is no way back, and no reason to stop"
    history.note([function("e", 5)], [{"key": "default/f", "digest": "de"}])
    assert [i["version"] for i in history.of("default", "f")] == ["de"]
    history.note([], [])
    assert not file.exists()
