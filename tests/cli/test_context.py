"""The context file: where it is looked for, and what a broken one says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgeward.cli import context
from edgeward.cli.client import connect
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


def test_the_folder_of_a_hub_or_a_node_is_a_context_too(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no hub's and no node's"):
        context.load_context(str(tmp_path))
    hub = tmp_path / "hub"
    (hub / "identity").mkdir(parents=True)
    (hub / "hub.json").write_text("{}")
    with pytest.raises(Unreachable, match="cannot be read"):  # it never ran: there is no token yet
        context.load_context(str(hub))
    (hub / "identity" / "admin.token").write_text("secret\n")
    with pytest.raises(Unreachable, match="does not run"):
        connect(str(hub), None)
    (hub / "run.json").write_text('{"url": "https://hub:443"}')
    found = context.load_context(str(hub))
    assert (found.hub_url, found.token) == ("https://hub:443", "secret")
    assert found.ca_file == str(hub / "identity" / "ca.crt")
    assert "secret" not in repr(found)
    node = tmp_path / "node"
    node.mkdir()
    (node / "node.json").write_text('{"node": "plant-1", "site": "plant"}')
    (node / "run.json").write_text('{"api": "/x/api.sock"}')
    found = context.load_context(str(node))
    assert (found.node("local").name, found.node("plant-1").api, found.hub_url) == ("plant-1", "/x/api.sock", None)
    (tmp_path / "context.json").write_text('{"hub_url": "https://up"}')  # what `up --data` keeps
    assert context.load_context(str(tmp_path)).hub_url == "https://up"
