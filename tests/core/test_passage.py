"""Words for what passes a tunnel: what each takes, and which word covers which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core.authz import Ask, Rule, allows, beyond, perhaps
from edgeward.core.errors import Invalid
from edgeward.core.passage import Passage, allowed, covered, parse


@pytest.mark.parametrize(
    ("word", "use", "takes"),
    [
        ("tcp", Passage("tcp", "", 22), True),
        ("tcp", Passage("tcp", "localhost", 22), True),
        ("tcp", Passage("tcp", "10.0.0.5", 22), False),
        ("tcp", Passage("http", "", 80), False),
        ("tcp:22", Passage("tcp", "127.0.0.1", 22), True),
        ("tcp:22", Passage("tcp", "::1", 23), False),
        ("tcp:*", Passage("tcp", "", 65535), True),
        ("tcp:8000-8100", Passage("tcp", "", 8100), True),
        ("tcp:8000-8100", Passage("tcp", "", 8101), False),
        ("tcp:10.0.0.0/8:502", Passage("tcp", "10.200.3.4", 502), True),
        ("tcp:10.0.0.0/8:502", Passage("tcp", "11.0.0.1", 502), False),
        ("tcp:10.0.0.0/8:502", Passage("tcp", "", 502), False),
        ("tcp:10.0.0.0/8:502", Passage("tcp", "plc.local", 502), False),
        ("http:[fd00::1]:80", Passage("http", "fd00::1", 80), True),
        ("http:[fd00::/16]:80", Passage("http", "fd00:1::2", 80), True),
        ("tcp:plc.local:502", Passage("tcp", "PLC.local", 502), True),
        ("tcp:*:*", Passage("tcp", "1.2.3.4", 1), True),
        ("tcp:*:*", Passage("tcp", "", 1), True),
        ("exec", Passage("exec"), True),
        ("exec", Passage("shell"), False),
        ("*", Passage("shell"), True),
        ("*", Passage("tcp", "10.0.0.1", 1), False),
    ],
)
def test_a_word_takes_what_it_says(word: str, use: Passage, takes: bool) -> None:
    assert allowed([word], use) is takes


@pytest.mark.parametrize(
    "text", ["", ":", "tcp:", "tcp:0", "tcp:9-1", "tcp:70000", "tcp:[::1", "tcp:1/2:3", "a b", "tcp:²"]
)
def test_what_is_no_word_is_refused_and_takes_nothing(text: str) -> None:
    with pytest.raises(Invalid):
        parse(text)
    assert not allowed([text], Passage("tcp", "", 22))
    assert not covered(["*:*:*"], text)


_words = st.builds(
    lambda p, h, n: f"{p}:{h}{n}",
    st.sampled_from(["tcp", "http", "*"]),
    st.sampled_from(["", "*:", "10.0.0.0/8:", "10.0.0.1:", "localhost:"]),
    st.sampled_from(["*", "22", "20-30", "8000-8100"]),
)
_uses = st.builds(
    Passage,
    st.sampled_from(["tcp", "http", "exec"]),
    st.sampled_from(["", "::1", "10.0.0.1", "10.9.9.9", "name"]),
    st.sampled_from([22, 25, 8050]),
)


@given(_words, _words, _uses)
def test_who_covers_a_word_takes_all_that_it_takes(have: str, want: str, use: Passage) -> None:
    if covered([have], want) and allowed([want], use):
        assert allowed([have], use)


def test_a_rule_with_parts_of_the_verb_allows_those_and_nothing_more() -> None:
    rule = Rule(verbs=["tunnel:tcp:22", "tunnel:exec", "get"], kinds=["Node"])
    assert allows(rule, Ask("tunnel", "Node", "_", "n", {}))
    assert allows(rule, Ask("tunnel", "Node", "_", "n", {}, Passage("tcp", "", 22)))
    assert not allows(rule, Ask("tunnel", "Node", "_", "n", {}, Passage("tcp", "", 23)))
    assert not allows(rule, Ask("tunnel", "Node", "_", "n", {}, Passage("shell")))
    assert not allows(rule, Ask("delete", "Node", "_", "n", {}))
    assert not allows(Rule(verbs=["get"], kinds=["Node"]), Ask("tunnel", "Node", "_", "n", {}))
    assert perhaps([rule], "tunnel", "Node") and not perhaps([rule], "tunnel", "App")


def test_nobody_gives_away_more_of_a_tunnel_than_they_have() -> None:
    def rule(*verbs: str) -> Rule:
        return Rule(verbs=list(verbs), kinds=["Node"])

    mine = [rule("tunnel:tcp:20-30", "tunnel:exec")]
    assert beyond(mine, [rule("tunnel:tcp:22")]) is None
    assert beyond(mine, [rule("tunnel:exec")]) is None
    for more in ("tunnel", "tunnel:tcp", "tunnel:tcp:31", "tunnel:shell", "tunnel:tcp:*:22", "*"):
        assert beyond(mine, [rule(more)]) is not None, more
    assert beyond([rule("tunnel")], [rule("tunnel:tcp:*:*")]) is None
    assert beyond([rule("*")], [rule("tunnel", "tunnel:shell")]) is None
    assert beyond([rule("tunnel")], [rule("tunnel:shell")]) is not None
    assert beyond([rule("tunnel")], [rule("tunnel:*")]) is not None
    assert beyond([rule("exec")], [rule("tunnel:shell", "tunnel:copy")]) is None


def test_the_verb_tunnel_leads_to_ports_and_the_verb_exec_to_programs() -> None:
    def may(verb: str, protocol: str) -> bool:
        return allows(Rule(verbs=[verb], kinds=["Node"]), Ask("tunnel", "Node", "_", "n", {}, Passage(protocol)))

    for protocol in ("tcp", "http", "reverse", "exec", "shell", "copy"):
        program = protocol in ("exec", "shell", "copy")
        assert may("tunnel", protocol) is not program
        assert may("exec", protocol) is program
        assert may(f"tunnel:{protocol}", protocol)
        assert may("tunnel:*", protocol) and may("*", protocol)
