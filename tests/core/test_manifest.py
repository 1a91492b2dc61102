"""Documents from people, and from people who mean harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core.errors import EdgewardError, Invalid, TooLarge
from edgeward.core.manifest import MAX_FILE, decode_manifest, dump_yaml, load, read_files
from edgeward.core.resource import make_patch, merge_patch
from edgeward.hub.kinds import load as load_kinds

load_kinds()

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n" for p, c in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "twice"),
        ("a: !!python/object:os.system x\n", 1, "tag"),
        ("a: !custom {}\n", 1, "tag"),
        ("1: x\n", 1, "key"),
        ("a: [1, 2\n", 2, "YAML"),
        ("a:\n\tb: 1\n", 2, "YAML"),
        ("base: &b {x: 1}\nc:\n  <<: *b\n", 3, "merge"),
        (BOMB, 0, "aliases"),
        ("[" * 100 + "]" * 100, 1, "nested"),
    ],
)
def test_what_a_parser_should_not_do_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(Invalid) as caught:
        load(text, "bad.yaml")
    assert words in str(caught.value)
    assert caught.value.file == "bad.yaml"
    if line:
        assert caught.value.line == line


def test_no_is_a_string_and_numbers_are_numbers() -> None:
    (m,) = load("a: no\nb: on\nc: 12:30\nd: 3\ne: 1.5\nf: true\ng: ~\nh: '3'\ni: 0x10\nj: 1e3\n")
    assert m.doc == {
        "a": "no", "b": "on", "c": "12:30", "d": 3, "e": 1.5, "f": True, "g": None, "h": "3", "i": 16, "j": 1000.0,
    }  # fmt: skip


def test_sizes_and_encodings() -> None:
    with pytest.raises(TooLarge):
        load("a: " + "x" * 1_100_000)
    with pytest.raises(TooLarge):
        load("x" * (MAX_FILE + 1))
    with pytest.raises(Invalid):
        load(b"a: \xff\xfe\n", "x")
    assert load("") == []
    assert [m.doc for m in load("---\n---\na: 1\n---\n")] == [{"a": 1}]


def test_an_error_names_file_line_field_and_remedy(tmp_path: Path) -> None:
    file = tmp_path / "app.yaml"
    file.write_text("apiVersion: edgeward/v1\nkind: App\nmetadata: {name: web}\nspec:\n  process:\n    comand: [a]\n")
    (manifest,) = read_files([file])
    with pytest.raises(EdgewardError) as caught:
        decode_manifest(manifest)
    e = caught.value
    assert (e.file, e.resource) == (str(file), "App/web")
    assert e.line in (5, 6)
    assert e.field.startswith("$.spec.process")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=4),
        max_leaves=12,
    ).filter(lambda d: isinstance(d, dict) and d)
)
def test_what_is_dumped_is_what_was_meant(doc: dict[str, object]) -> None:
    try:
        text = dump_yaml(doc)
        got = load(text)
    except Invalid:
        # characters that YAML cannot carry are refused, not changed
        return
    assert got[0].doc == doc


_PLAIN = st.dictionaries(
    st.sampled_from("abcd"),
    st.integers(0, 3) | st.dictionaries(st.sampled_from("xy"), st.integers(0, 3), max_size=2),
    max_size=4,
)


@given(_PLAIN, _PLAIN)
def test_a_patch_turns_the_old_into_the_new(old: dict[str, object], new: dict[str, object]) -> None:
    assert merge_patch(old, make_patch(old, new)) == new
