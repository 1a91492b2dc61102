"""What a site says of its nodes, at the hub."""

from __future__ import annotations

from typing import Any

from edgeward.nodes.siteword import SiteWord

NODES = ("a", "b", "c")


def said(state: str, **evidence: Any) -> dict[str, Any]:
    return {"verdict": state, "evidence": {"heard": "directly", "since": "t", **evidence}}


def test_one_node_speaks_for_those_without_a_link() -> None:
    online = {"a"}
    word = SiteWord(online.__contains__)
    new = word.take(
        "plant", "a", {"a": said("healthy"), "b": said("wan-cut"), "c": said("dead", lost=["a", "b"])}, NODES
    )
    assert new == ["a", "b", "c"]
    assert word.take(
        "plant", "a", {"a": said("healthy"), "b": said("dead"), "c": said("dead", lost=["a", "b"])}, NODES
    ) == ["b"]
    found = word.of("plant", "c", {}, NODES)
    assert found["verdict"] == "dead"
    assert found["evidence"] == {"heard": "directly", "since": "t", "lost": ["a", "b"], "by": "a"}


def test_a_site_of_which_nothing_is_heard_is_unknown() -> None:
    online = {"a"}
    word = SiteWord(online.__contains__)
    word.take("plant", "a", {n: said("healthy") for n in NODES}, NODES)
    online.clear()
    found = word.of("plant", "b", {}, NODES)
    assert (found["verdict"], found["evidence"]["before"]) == ("unknown", "healthy")
    # and a hub that was started anew goes on from what stands in the status
    again = SiteWord(online.__contains__)
    assert again.of("plant", "b", found, NODES) == found
    online.add("c")
    assert again.of("plant", "b", {**said("wan-cut"), "online": True}, NODES) == said("wan-cut")


def test_who_comes_and_goes_beside_others_is_no_news_of_them() -> None:
    online = {"a", "b"}
    word = SiteWord(online.__contains__)
    assert word.concerned("b", NODES) == []
    online.remove("b")
    assert word.concerned("b", NODES) == [], "a is heard, as it was"
    online.remove("a")
    assert word.concerned("a", NODES) == ["b", "c"], "now nobody is"
    online.add("c")
    assert word.concerned("c", NODES) == ["a", "b"], "and now somebody is"


def test_a_node_that_gets_a_gone_ones_name_is_another() -> None:
    word = SiteWord(lambda n: True)
    word.take("plant", "a", {"a": said("healthy"), "b": said("dead")}, NODES)
    word.forget("plant", "b")
    assert word.of("plant", "b", {}, NODES) == {}
    assert word.of("plant", "a", {}, NODES)["verdict"] == "healthy"
    word.forget("plant", "a")
    word.forget("elsewhere", "a")
    assert word.of("plant", "a", said("healthy"), NODES) == said("healthy"), "nobody has spoken for this site yet"


def test_what_a_node_says_is_bounded_and_of_its_own_site() -> None:
    word = SiteWord(lambda n: True)
    wild = {
        "a": {"verdict": "fine", "evidence": {}},
        "b": {"verdict": "dead", "evidence": {"why": "x" * 9999, "lost": ["n" * 99] * 999, "other": {"deep": 1}}},
        "elsewhere": said("dead"),
    }
    assert word.take("plant", "a", wild, NODES) == ["b"]
    assert word.of("plant", "a", {}, NODES) == {}
    assert word.of("plant", "elsewhere", {}, NODES) == {}
    evidence = word.of("plant", "b", {}, NODES)["evidence"]
    assert (len(evidence["why"]), len(evidence["lost"]), len(evidence["lost"][0])) == (300, 128, 64)
    assert "other" not in evidence
