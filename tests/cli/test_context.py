"""The context file: where it is looked for, and what a broken one says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgeward.cli import context
from edgeward.core.errors import Invalid, NotFound, Unreachable


def write(tmp_path: Path, doc: object) -> str:
    path = tmp_path / "context.json"
    path.write_text(doc if isinstance(doc, str) else json.dumps(doc))
    return str(path)


def test_default_data_dir_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert context.default_data_dir() == Path("/var/state/edgeward")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert context.default_data_dir() == Path("/home/u/.local/state/edgeward")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert context.default_data_dir() == Path("/home/u/Library/Application Support/edgeward")


def test_given_wins_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(context.CONTEXT_ENV, "/from/env.json")
    assert context.context_path("/given.json") == Path("/given.json")
    assert context.context_path() == Path("/from/env.json")
    monkeypatch.delenv(context.CONTEXT_ENV)
    assert context.context_path() == context.default_data_dir() / "context.json"


def test_nulls_and_unknown_members_are_fine(tmp_path: Path) -> None:
    got = context.load_context(
        write(tmp_path, {"hub_url": None, "newer": 1, "pids": {"hub": None}, "nodes": [{"name": "a", "api": None}]})
    )
    assert got.hub_url is None
    assert got.node("local").name == "a"
    assert got.node("a").api is None


def test_the_token_is_in_no_repr(tmp_path: Path) -> None:
    got = context.load_context(
        write(tmp_path, {"token": "s3cret", "nodes": [{"name": "a", "mqtt_password": "s3cret"}]})
    )
    assert "s3cret" not in repr(got)


def test_missing_file_says_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="edgeward up") as e:
        context.load_context(str(tmp_path / "none.json"))
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("doc", ["{", "[]", {"nodes": {}}, {"nodes": [{}]}, {"hub_url": 3}, {"nodes": [3]}])
def test_broken_files_are_invalid_and_named(tmp_path: Path, doc: object) -> None:
    with pytest.raises(Invalid) as e:
        context.load_context(write(tmp_path, doc))
    assert e.value.file.endswith("context.json")


def test_which_node(tmp_path: Path) -> None:
    got = context.load_context(write(tmp_path, {"nodes": [{"name": "a"}, {"name": "b"}]}))
    with pytest.raises(NotFound, match="it has: a, b"):
        got.node("c")
    with pytest.raises(Invalid, match="2 nodes"):
        got.node("local")
