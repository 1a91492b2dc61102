"""Selectors answer as kubectl's do, at hub and edge alike."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core.errors import Invalid
from edgeward.core.selectors import lookup, parse_fields, parse_labels

WEB = {"app": "web", "tier": "front", "example.com/zone": "a", "empty": ""}
WORD = st.from_regex(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,8}[A-Za-z0-9])?", fullmatch=True)
LABELS = st.dictionaries(WORD, WORD, max_size=4)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("", True), ("  ", True),
        ("app=web", True), ("app==web", True), (" app = web ", True), ("app=db", False), ("app=", False),
        ("empty=", True), ("other=", False), ("example.com/zone=a", True),
        ("app!=db", True), ("app!=web", False), ("other!=x", True),
        ("app", True), ("other", False), ("!app", False), ("! other", True),
        ("app in (web, db)", True), ("app in (db)", False), ("other in (x)", False), ("empty in ()", True),
        ("app notin (db)", True), ("app notin (web,db)", False), ("other notin (x)", True),
        ("app in (web,db),tier!=back,!gone", True), ("app in (web,db),tier=back", False),
    ],
)  # fmt: skip
def test_labels(text: str, taken: bool) -> None:
    assert parse_labels(text)(WEB) is taken


@pytest.mark.parametrize(
    "bad", ["a=b=c", "a=b,", ",", "a in (b", "a in b", "a b", "a in (b),(", "a)=b,c=d", "=b", "!a=b", "a!b", "a in(b)"]
)
def test_no_label_selector(bad: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_labels(bad)
    assert caught.value.field == "selector"
    assert "key in (a,b)" in caught.value.remedy


@given(LABELS, WORD, st.lists(WORD, min_size=1, max_size=3))
def test_every_operator_has_its_opposite(labels: dict[str, str], key: str, values: list[str]) -> None:
    among = f"({','.join(values)})"
    pairs = [(f"{key}={values[0]}", f"{key}!={values[0]}"), (key, f"!{key}")]
    pairs.append((f"{key} in {among}", f"{key} notin {among}"))
    for yes, no in pairs:
        assert parse_labels(yes)(labels) is not parse_labels(no)(labels)
        assert not parse_labels(f"{yes},{no}")(labels)
    assert parse_labels(f"{key} in {among}")(labels) is (labels.get(key) in values)


@given(LABELS)
def test_a_set_of_labels_selects_itself(labels: dict[str, str]) -> None:
    assert parse_labels(",".join(f"{k}={v}" for k, v in labels.items()))(labels)


DOC: dict[str, Any] = {
    "metadata": {"name": "a", "generation": 3},
    "status": {"phase": "Running", "ready": True, "none": None, "nodes": [{"name": "n1"}, {"name": "n2"}]},
}


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("", True), ("status.phase=Running", True), ("status.phase==Running", True), ("status.phase!=Running", False),
        ("metadata.generation=3", True), ("status.ready=true", True), ("status.ready=True", False),
        ("status.none=", True), ("status.gone=", True), ("status.gone!=x", True), ("status.phase.deeper=", True),
        ("status.nodes.1.name=n2", True), ("status.nodes.2.name=", True), ("status.nodes.-1.name=n2", False),
        ("status.nodes.².name=", True), ("status.nodes." + "9" * 5000 + ".name=", True),
        ("status.phase=Running,metadata.name=b", False),
    ],
)  # fmt: skip
def test_fields(text: str, taken: bool) -> None:
    assert parse_fields(text)(DOC) is taken


@pytest.mark.parametrize("bad", ["status.phase", "!status", "a in (b)", "a=b=c", "a=b,", "a<b"])
def test_no_field_selector(bad: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_fields(bad)
    assert caught.value.field == "fieldSelector"
    assert "status.phase=Running" in caught.value.remedy


@given(st.text(max_size=20))
def test_any_text_is_a_selector_or_refused(text: str) -> None:
    for parse, subject in ((parse_labels, WEB), (parse_fields, DOC)):
        try:
            test = parse(text)
        except Invalid as e:
            assert e.remedy
        else:
            assert test(subject) in (True, False)  # type: ignore[arg-type]


@given(st.recursive(st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=6), st.text())
def test_lookup_finds_or_gives_none(doc: Any, path: str) -> None:
    found = lookup({"a": [doc]}, f"a.0.{path}")
    assert found == lookup(doc, path)
    assert lookup({"a": [doc]}, "a.0") == doc
