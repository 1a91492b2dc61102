"""What makes a version, what does not, and how many workers it should have."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.functions.node import HELLO, function

from edgeward.core.errors import EdgewardError
from edgeward.core.resource import decode
from edgeward.functions import scale
from edgeward.functions.versions import Policy, config_of


def doc(spec: dict[str, Any]) -> dict[str, Any]:
    base = {"runtime": "python", "source": {"inline": HELLO}}
    return {"apiVersion": "edgeward/v1", "kind": "Function", "metadata": {"name": "f"}, "spec": base | spec}


def test_a_version_is_what_workers_are_made_from_and_nothing_else() -> None:
    one = function("f", HELLO)
    same = function("f", HELLO, scale={"max": 9}, concurrency=7, logs={"level": "error"})
    assert one.version == same.version
    assert one.policy != same.policy
    others = [
        function("f", HELLO + "\n"),
        function("f", HELLO, env={"A": "1"}),
        function("f", HELLO, limits={"memory": "65Mi"}),
        function("f", HELLO, limits={"timeout": "1s"}),
    ]
    assert len({c.version.digest for c in (one, *others)}) == 5


def test_a_secret_makes_a_version_by_its_revision_and_never_by_its_value() -> None:
    resource = decode(doc({}))
    a = config_of(resource, {}, {"P": "abc"}, ["db@1"])
    assert config_of(resource, {}, {"P": "xyz"}, ["db@1"]).version.digest == a.version.digest
    assert config_of(resource, {}, {"P": "abc"}, ["db@2"]).version.digest != a.version.digest
    assert a.version.secret == ["P"]


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"runtime": "wasm", "handler": "a:b"}, "$.spec.handler", "names no export"),
        ({"source": {}}, "$.spec.source", "one way"),
        ({"source": {"inline": "x", "files": {"main.py": "x"}}}, "$.spec.source", "one way"),
        ({"source": {"files": {"../main.py": "x"}}}, "$.spec.source.files", "no relative path"),
        ({"source": {"files": {"a.py": "x"}}}, "$.spec.handler", "no file main.py"),
        ({"handler": "os;system"}, "$.spec.handler", "names no function"),
        ({"handler": "other:handler"}, "$.spec.handler", "module main"),
        ({"limits": {"memory": "1Mi"}}, "$.spec.limits.memory", "too few"),
        ({"limits": {"timeout": "2h"}}, "$.spec.limits.timeout", "15m"),
        ({"limits": {"body": "7Mi"}}, "$.spec.limits.body", "6Mi"),
        ({"scale": {"min": 5}}, "$.spec.scale.min", "more than max"),
        ({"env": {"A-B": "1"}}, "$.spec.env", "variable name"),
        ({"envFrom": [{}]}, "$.spec.envFrom[0]", "config or a secret"),
        ({"require": ["cpu"]}, "$.spec.require", "limits.cpu"),
        ({"require": ["network"], "limits": {"network": "all"}}, "$.spec.require", "open"),
        ({"triggers": [{}]}, "$.spec.triggers[0]", "cron"),
        ({"triggers": [{"mqtt": {}}]}, "$.spec.triggers[0]", "mqtt"),
        ({"triggers": [{"cron": {"schedule": "* * *"}}]}, "$.spec.triggers[0].cron.schedule", "five fields"),
        (
            {"triggers": [{"cron": {"schedule": "* * * * *", "zone": "Mars/Base"}}]},
            "$.spec.triggers[0].cron.zone",
            "zone",
        ),
        ({"aliases": {}}, "$.spec", "aliases"),
        ({"samples": {"rate": 2}}, "$.spec.samples.rate", "1"),
        ({"samples": {"perDay": 10}}, "$.spec.samples.perDay", "too few"),
        ({"samples": {"keep": "1Gi"}}, "$.spec.samples.keep", "256Mi"),
        ({"canary": {}}, "$.spec.canary", "weight"),
        ({"canary": {"weight": 101}}, "$.spec.canary.weight", "100"),
        ({"canary": {"weight": 1, "latency": "soon"}}, "$.spec.canary.latency", "soon"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_field(spec: dict[str, Any], field: str, words: str) -> None:
    from edgeward.core.registry import kinds

    with pytest.raises(EdgewardError) as caught:
        resource = decode(doc(spec))
        kinds.get("Function").check(resource)
    assert caught.value.field.startswith(field)
    assert words in str(caught.value)


@given(st.integers(0, 50), st.integers(0, 20), st.integers(0, 20), st.integers(0, 5), st.integers(1, 20))
def test_workers_are_never_too_many_and_every_call_that_waits_has_one_on_its_way(
    waiting: int, there: int, starting: int, minimum: int, maximum: int
) -> None:
    policy = Policy(10, min(minimum, maximum), maximum, 60, 1, "info")
    more = scale.missing(waiting, there, starting, policy)
    assert more >= 0
    assert there + starting + more <= max(maximum, there + starting)
    if there + starting + more < maximum:
        assert starting + more >= min(waiting, maximum)
        assert there + starting + more >= policy.minimum


def test_pauses_grow_and_have_an_end() -> None:
    pauses = [scale.pause(n) for n in range(1, 40)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.1, 30.0)
