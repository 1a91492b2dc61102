"""Rules: what they allow, what nobody can give away, and that the built-in roles mean what they say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.core.authz import (
    ANY,
    BUILT_IN,
    SENSITIVE,
    VERBS,
    WORK,
    Ask,
    Principal,
    Rule,
    administrator,
    allows,
    beyond,
    decide,
    perhaps,
)
from edgeward.core.errors import Forbidden
from edgeward.core.registry import kinds
from edgeward.hub.kinds import load

load()

verbs = st.sampled_from(["get", "list", "update", "logs", "reveal"])
names = st.sampled_from(["App", "Config", "Secret", "Role", "Node"])
namespaces = st.sampled_from(["_", "default", "a", "b"])
labels = st.dictionaries(st.sampled_from(["team", "tier"]), st.sampled_from(["x", "y"]), max_size=2)
selectors = st.sampled_from(
    ["", " ", "team=x", "team==x", "tier=y", "team=x,tier=y", "tier=y, team=x", "team!=x", "!team", "team in (x,y)",
     "team in (x, y),tier=y", "((", "tier"]
)  # fmt: skip


def few(values: st.SearchStrategy[str], *more: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.one_of(values, st.sampled_from(more)) if more else values, max_size=3)


rules = st.builds(
    Rule,
    verbs=few(verbs, ANY),
    kinds=few(names, ANY, WORK),
    namespaces=few(namespaces, ANY),
    labelSelector=selectors,
)
asks = st.builds(
    Ask,
    verb=verbs,
    kind=names,
    namespace=st.one_of(st.none(), namespaces),
    labels=st.one_of(st.none(), labels),
)
roles = st.lists(rules, max_size=4)


@given(roles, roles, asks)
@settings(max_examples=700, deadline=None)
def test_what_is_given_is_never_more_than_the_giver_has(have: list[Rule], want: list[Rule], ask: Ask) -> None:
    if beyond(have, want) is None and decide(want, ask):
        assert decide(have, ask)


@given(roles, rules)
@settings(max_examples=250, deadline=None)
def test_one_can_give_what_one_has_and_any_part_of_it(have: list[Rule], rule: Rule) -> None:
    assert beyond(have, have) is None
    assert beyond([*have, rule], [rule]) is None
    for verb in rule.verbs:
        assert beyond([rule], [Rule(verbs=[verb], kinds=rule.kinds, namespaces=["a"] if ANY in rule.namespaces else [],
                                    labelSelector=rule.labelSelector)]) is None  # fmt: skip
    assert beyond(BUILT_IN["admin"], [rule]) is None


@given(roles, rules, asks)
@settings(max_examples=250, deadline=None)
def test_a_further_rule_takes_nothing_away(have: list[Rule], rule: Rule, ask: Ask) -> None:
    assert decide([*have, rule], ask) == (decide(have, ask) or allows(rule, ask))
    assert not decide([], ask)


@given(roles, asks)
@settings(max_examples=250, deadline=None)
def test_who_may_touch_one_may_perhaps(have: list[Rule], ask: Ask) -> None:
    if decide(have, ask):
        assert perhaps(have, ask.verb, ask.kind, ask.namespace)
    # not knowing the labels, or asking for all namespaces, never allows more
    if decide(have, Ask(ask.verb, ask.kind, ask.namespace, labels=None)):
        assert decide(have, Ask(ask.verb, ask.kind, ask.namespace, labels={"team": "x"}))
    if decide(have, Ask(ask.verb, ask.kind, None, labels=ask.labels)):
        assert decide(have, Ask(ask.verb, ask.kind, "somewhere", labels=ask.labels))


@pytest.mark.parametrize(
    ("rule", "ask", "allowed"),
    [
        (Rule(verbs=["get"], kinds=["*"]), Ask("get", "App", "a"), True),
        (Rule(verbs=["get"], kinds=["*"]), Ask("list", "App", "a"), False),
        (Rule(verbs=["*"], kinds=["App"]), Ask("reveal", "App", "a"), True),
        (Rule(verbs=["*"], kinds=["App"]), Ask("get", "Secret", "a"), False),
        (Rule(verbs=["*"], kinds=["*"], namespaces=["a"]), Ask("get", "App", "a"), True),
        (Rule(verbs=["*"], kinds=["*"], namespaces=["a"]), Ask("get", "App", "b"), False),
        (Rule(verbs=["*"], kinds=["*"], namespaces=["a"]), Ask("get", "App", None), False),
        (Rule(verbs=["*"], kinds=["*"], namespaces=["a"]), Ask("get", "Node", "_"), False),
        (Rule(verbs=["*"], kinds=["*"], namespaces=["_"]), Ask("get", "Node", "_"), True),
        (Rule(verbs=["*"], kinds=["@work"]), Ask("get", "Role", "_"), False),
        (Rule(verbs=["*"], kinds=["@work"]), Ask("get", "Site", "_"), True),
        (Rule(verbs=["*"], kinds=["*"], labelSelector="team=a"), Ask("get", "App", "a", labels={"team": "a"}), True),
        (Rule(verbs=["*"], kinds=["*"], labelSelector="team=a"), Ask("get", "App", "a", labels={"team": "b"}), False),
        (Rule(verbs=["*"], kinds=["*"], labelSelector="team!=a"), Ask("get", "App", "a", labels={}), True),
        (Rule(verbs=["*"], kinds=["*"], labelSelector="team!=a"), Ask("get", "App", "a", labels=None), False),
        (Rule(verbs=["*"], kinds=["*"], labelSelector="((nonsense"), Ask("get", "App", "a", labels={}), False),
        (Rule(verbs=[], kinds=["*"]), Ask("get", "App"), False),
        (Rule(verbs=["*"], kinds=[]), Ask("get", "App"), False),
        (Rule(verbs=["*"], kinds=["*"], namespaces=[]), Ask("get", "App", "a"), False),
    ],
)
def test_a_rule_allows_what_it_says(rule: Rule, ask: Ask, allowed: bool) -> None:
    assert allows(rule, ask) is allowed


def test_the_built_in_roles() -> None:
    every = [*kinds.names(), "Hub"]
    for verb in VERBS:
        for kind in every:
            assert decide(BUILT_IN["admin"], Ask(verb, kind))
    writes = (
        "create",
        "update",
        "patch",
        "delete",
        "status",
        "reveal",
        "promote",
        "issue",
        "revoke",
        "rotate",
        "exec",
    )
    for kind in every:
        for verb in writes:
            assert not decide(BUILT_IN["viewer"], Ask(verb, kind)), (verb, kind)
        if kind in SENSITIVE - {"Node"}:
            for verb in ("create", "update", "patch", "delete", "issue", "revoke", "reveal"):
                assert not decide(BUILT_IN["operator"], Ask(verb, kind)), (verb, kind)
        assert not decide(BUILT_IN["operator"], Ask("reveal", kind)), kind
        assert not decide(BUILT_IN["viewer"], Ask("audit", kind)), kind
    for kind in ("AccessToken", "JoinToken"):
        for role in ("operator", "viewer"):
            assert not decide(BUILT_IN[role], Ask("get", kind))
    for kind in ("App", "Config", "Secret", "Site", "Export"):
        assert decide(BUILT_IN["viewer"], Ask("list", kind))
        assert decide(BUILT_IN["operator"], Ask("create", kind))
    assert beyond(BUILT_IN["admin"], BUILT_IN["operator"]) is None
    assert beyond(BUILT_IN["operator"], BUILT_IN["viewer"]) is None
    assert beyond(BUILT_IN["viewer"], BUILT_IN["operator"]) is not None


def test_giving_more_than_one_has_is_named() -> None:
    mine = [Rule(verbs=["get", "list"], kinds=["App"], namespaces=["a"])]
    found = beyond(mine, [Rule(verbs=["get"], kinds=["App"], namespaces=["a"]), Rule(verbs=["get"], kinds=["Config"])])
    assert found == Ask("get", "Config", "*")
    # two rules together cover a third that neither covers alone
    both = [Rule(verbs=["get"], kinds=["App"]), Rule(verbs=["list"], kinds=["App"])]
    assert beyond(both, [Rule(verbs=["get", "list"], kinds=["App"])]) is None
    narrow = [Rule(verbs=["get"], kinds=["*"], labelSelector="team=a")]
    assert beyond(narrow, [Rule(verbs=["get"], kinds=["*"], labelSelector="tier=x,team=a")]) is None
    assert beyond(narrow, [Rule(verbs=["get"], kinds=["*"])]) is not None
    assert beyond(narrow, [Rule(verbs=["get"], kinds=["*"], labelSelector="team in (a,b)")]) is not None


def test_a_refusal_names_verb_kind_and_name() -> None:
    with pytest.raises(Forbidden) as caught:
        Principal("ci", role="viewer", rules=BUILT_IN["viewer"]).require(Ask("delete", "App", "shop", "web"))
    problem = caught.value.problem()
    assert problem["status"] == 403
    assert problem["detail"] == "ci (role viewer) may not delete App web in namespace shop"
    assert (problem["verb"], problem["kind"], problem["name"], problem["namespace"]) == ("delete", "App", "web", "shop")
    administrator("root").require(Ask("delete", "App", "shop", "web"))
