"""What a person reads when a value does not fit: the exact field, what was found, what to write instead."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from edgeward.core.errors import Invalid
from edgeward.core.misfit import invalid_from
from edgeward.core.quantity import BYTES_PATTERN, DURATION_PATTERN
from edgeward.core.resource import NAME_PATTERN


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    mode: Literal["always", "never"] = "always"
    every: Annotated[str, Meta(pattern=DURATION_PATTERN)] | int = 1


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=NAME_PATTERN)] = "a"
    code: Annotated[str, Meta(pattern=r"^/.*$")] = "/"
    size: Annotated[str, Meta(pattern=BYTES_PATTERN)] | int | None = None
    n: Annotated[int, Meta(ge=0, lt=9)] = 0
    on: bool = False
    words: Annotated[list[str], Meta(min_length=1, max_length=2)] = []
    env: dict[str, str] = {}
    parts: dict[str, Inner] = {}
    rows: list[Inner] = []
    deep: list[dict[str, dict[str, int]]] = []
    inner: Inner | None = None


def refusal(doc: Any) -> Invalid:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(doc, Outer)
    return invalid_from(caught.value, Outer, prefix="$.spec", resource="X/x", doc=doc)


@pytest.mark.parametrize(
    ("doc", "text"),
    [
        ({"nam": "x"}, "$.spec.nam: unknown field (did you mean 'name'?)"),
        ({"rows": [{}, {"mod": 1}]}, "$.spec.rows[1].mod: unknown field (did you mean 'mode'?)"),
        ({"inner": {"zzz": 1}}, "$.spec.inner.zzz: unknown field (known fields: mode, every)"),
        ({"env": {"A": "1", "B.c": 2}}, "$.spec.env.B.c: expected a string, got a whole number (put it in quotes)"),
        ({"env": {"A": True}}, "$.spec.env.A: expected a string, got a boolean (put it in quotes)"),
        ({"env": {"A": None}},
         "$.spec.env.A: expected a string, got nothing (give it a value, or leave the field out)"),
        ({"parts": {"a": {}, "b": {"mode": "Never"}}},
         "$.spec.parts.b.mode: 'Never' is not taken (did you mean 'never'? one of: always, never)"),
        ({"deep": [{}, {"a": {"b": 1}, "c": {"d": 1, "e": "x"}}]},
         "$.spec.deep[1].c.e: expected a whole number, got a string"),
        ({"words": "x"}, "$.spec.words: expected a list, got a string (write it as a list: [...])"),
        ({"words": []}, "$.spec.words: is empty (at least 1)"),
        ({"words": ["a", "b", "c"]}, "$.spec.words: has 3 entries (at most 2)"),
        ({"n": "5"}, "$.spec.n: expected a whole number, got a string (write it without quotes)"),
        ({"n": -1}, "$.spec.n: -1 is too small (at least 0)"),
        ({"n": 9}, "$.spec.n: 9 is too large (at most 8)"),
        ({"on": "yes"}, "$.spec.on: expected true or false, got a string"),
        ({"size": "5 MB"}, "$.spec.size: '5 MB' is no size (write e.g. 64Mi, 1.5G or a number of bytes)"),
        ({"rows": [{"every": "soon"}]},
         "$.spec.rows[0].every: 'soon' is no duration (write e.g. 500ms, 30s, 24h or a number of seconds)"),
        ({"name": "A"}, "$.spec.name: 'A' is not taken (use lower-case letters, digits and '-', "
         "starting with a letter or digit, at most 63)"),
        ({"code": "x"}, "$.spec.code: 'x' is not taken (must match ^/.*$)"),
        ([], "$.spec: expected a mapping, got a list"),
    ],
)  # fmt: skip
def test_a_refusal_says_where_what_and_what_instead(doc: Any, text: str) -> None:
    assert str(refusal(doc)) == f"X/x: {text}"


def test_a_value_of_the_wrong_type_is_not_shown() -> None:
    for doc in ({"env": {"A": 12345678}}, {"env": {"A": ["hunter2"]}}, {"words": "hunter2"}):
        assert not {"12345678", "hunter2"} & set(str(refusal(doc)).replace("'", " ").split())


def test_a_large_map_is_not_searched_for_ever() -> None:
    doc = {"env": {**{f"k{n}": "v" for n in range(5000)}, "late": 1}}
    assert refusal(doc).field == "$.spec.env[...]"


def test_without_the_document_it_says_what_it_can() -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert({"env": {"A": 1}}, Outer)
    assert (
        str(invalid_from(caught.value, Outer)) == "$.env[...]: expected a string, got a whole number (put it in quotes)"
    )
