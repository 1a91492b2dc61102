"""Event files become cases; what does not hold is said in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeward.core.errors import EdgewardError, Invalid
from edgeward.lab.cases import Expect, Outcome, judge, read_cases


def cases(tmp_path: Path, text: str, name: str = "one.yaml") -> Any:
    (tmp_path / name).write_text(text)
    return read_cases([tmp_path])


def test_a_document_is_a_case_with_everything_filled_in(tmp_path: Path) -> None:
    (tmp_path / "picture.bin").write_bytes(b"\x00\x01")
    made = cases(
        tmp_path,
        "event: {data: {a: 1}, http: {method: GET, path: /x, headers: {Accept: text/plain}}}\n"
        "---\nname: second\nfunction: f\nevent: {data: plain}\nexpect: {status: 404}\n"
        "---\nevent: {file: picture.bin, type: picture, datacontenttype: image/x}\n",
    )
    assert [(c.name, c.function) for c in made] == [("one", ""), ("second", "f"), ("one", "")]
    first, second, third = (c.event for c in made)
    assert (first.json(), first.datacontenttype, first.id) == ({"a": 1}, "application/json", "case-1")
    assert first.http is not None and first.http.headers == [("accept", "text/plain")]
    assert (second.data, second.datacontenttype) == (b"plain", "text/plain; charset=utf-8")
    assert (third.data, third.type, third.datacontenttype) == (b"\x00\x01", "picture", "image/x")
    assert made[1].expect.status == 404


def test_a_recorded_cloud_event_is_a_case_as_it_stands(tmp_path: Path) -> None:
    made = cases(
        tmp_path,
        '{"specversion": "1.0", "id": "7", "source": "/s", "type": "t", "data_base64": "AAE=", "edgewardhops": 1}',
        "seen.json",
    )
    (event,) = (c.event for c in made)
    assert (made[0].name, event.data, event.extensions) == ("seen 7", b"\x00\x01", {"edgewardhops": "1"})
    text = '{"specversion": "1.0", "id": "7", "source": "/s", "type": "t", "data": "x"}'
    (event,) = (c.event for c in cases(tmp_path, text, "seen.json"))
    assert event.json() == "x"


@pytest.mark.parametrize(
    ("text", "field", "line"),
    [
        ("name: a\nevent: {dta: 1}\n", "$.event.dta", 2),
        ("name: a\nexpect:\n  error: timout\n", "$.expect.error", 3),
        ("expect: {matches: '('}\n", "$.expect.matches", 1),
        ("event: {file: gone.bin}\n", "$.event.file", 1),
        ("event: {file: one.yaml, data: x}\n", "$.event.file", 1),
        ('specversion: "1.0"\nid: a\nsource: s\n', "$.type", 1),
        ('specversion: "0.3"\nid: a\nsource: s\ntype: t\n', "$.specversion", 1),
        ('specversion: "1.0"\nid: a\nsource: s\ntype: t\ndata_base64: "?"\n', "$.data_base64", 5),
        ("expect: {status: 42}\n", "$.expect.status", 1),
    ],
)
def test_what_is_no_case_is_refused_with_file_line_and_field(tmp_path: Path, text: str, field: str, line: int) -> None:
    with pytest.raises(EdgewardError) as e:
        cases(tmp_path, text)
    assert (e.value.field, e.value.line) == (field, line)
    assert e.value.file.endswith("one.yaml")


OK = Outcome(200, [("content-type", "application/json")], b'{"a": 1, "b": {"c": true}}', log=["INFO said hello"])


@pytest.mark.parametrize(
    ("expect", "got", "wrong"),
    [
        (Expect(), OK, []),
        (Expect(status=200, json={"b": {"c": True}, "a": 1.0}), OK, []),
        (Expect(json={"a": 1}), OK, ["json: "]),
        (Expect(json={"a": True, "b": {"c": True}}), OK, ["json: "]),
        (Expect(has={"b": {"c": True}}), OK, []),
        (Expect(has={"b": {"c": 1}, "d": 2}), OK, ["$.b.c: true", "$.d: is not there"]),
        (Expect(has={"a": {"x": 1}}), OK, ["$.a: 1 has no fields"]),
        (Expect(contains=['"a"', "zebra"]), OK, ["zebra"]),
        (Expect(matches=r'"a": \d', headers={"Content-Type": "application/json"}), OK, []),
        (Expect(matches="^x", headers={"x-y": "1"}), OK, ["does not match '^x'", "header x-y: None"]),
        (Expect(log=["hello", "bye"]), OK, ["log: no line has 'bye'"]),
        (Expect(status=201), OK, ["status: 200, expected 201"]),
        (Expect(body="x"), OK, ["body: "]),
        (Expect(), Outcome(404), ["status: 404"]),
        (Expect(status=404), Outcome(404), []),
        (Expect(), Outcome(504, error="timeout", message="did not answer"), ["timeout: did not answer"]),
        (Expect(error="timeout"), Outcome(504, error="timeout"), []),
        (Expect(status=504), Outcome(504, error="timeout"), []),
        (Expect(status=200, body="x"), Outcome(504, error="timeout", message="late"), ["timeout: late"]),
        (Expect(error="memory"), Outcome(504, error="timeout"), ["timeout, expected the error memory"]),
        (Expect(error="timeout"), OK, ["answered with status 200, expected the error timeout"]),
        (Expect(json=1), Outcome(200, [], b"\xff"), ["is no JSON"]),
        (Expect(json=None), Outcome(200, [], b"null"), []),
    ],
)
def test_what_did_not_hold_is_said(expect: Expect, got: Outcome, wrong: list[str]) -> None:
    said = judge(expect, got)
    assert len(said) == len(wrong)
    for sentence, part in zip(said, wrong, strict=True):
        assert part in sentence


def test_a_folder_without_events_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgewardError, match=r"has no \.yaml"):
        read_cases([tmp_path])
    with pytest.raises(Invalid):
        cases(tmp_path, "- a list\n")
