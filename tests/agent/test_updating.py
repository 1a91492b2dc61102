"""What a node does with a Release, short of becoming it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from edgeward.agent.installing import this_platform
from edgeward.agent.launcher import RELEASE
from edgeward.agent.slots import Order, State, plain
from edgeward.agent.updating import Updating
from edgeward.core.errors import Invalid
from edgeward.core.registry import kinds
from edgeward.core.resource import Key, Metadata, Resource
from edgeward.hub.kinds import load
from edgeward.nodes.release_spec import HOME, ReleaseSpec, order_id

load()
HERE, ELSE = "a" * 64, "b" * 64


def release(hex: str = HERE, machine: str = "", generation: int = 2) -> Resource:
    spec = ReleaseSpec(version="9", archives={machine or this_platform(): f"sha256:{hex}"})
    return Resource(
        kind="Release", metadata=Metadata(name="agent", namespace=HOME, uid="u", generation=generation), spec=spec
    )


class Node:
    """The rooms around it. ``wanted``: what its Rollout lets it have."""

    def __init__(self, data: Path, monkeypatch: pytest.MonkeyPatch, running: str | None = "") -> None:
        self.data, self.ended = data, 0
        self.said: list[tuple[Key, dict[str, Any] | None]] = []
        self.declared: Resource | None = release()
        self.wanted: Resource | None = self.declared
        if running is not None:
            monkeypatch.setenv(RELEASE, running)
        (data / "releases").mkdir()
        self.updating = Updating(
            data, self, self,  # type: ignore[arg-type]
            report=lambda key, status: self.said.append((key, status)),
            event=lambda *_: None, online=lambda: True, end=self.end,
        )  # fmt: skip

    def release(self) -> Resource | None:
        return self.declared

    def governed(self, declared: Resource) -> Resource | None:
        return self.wanted

    def end(self) -> None:
        self.ended += 1

    def state(self, state: State) -> None:
        (self.data / "releases" / "state.json").write_text(json.dumps(plain(state)))

    def look(self) -> dict[str, Any] | None:
        asyncio.run(self.updating._look())
        return self.said[-1][1] if self.said else None

    @property
    def order(self) -> dict[str, Any]:
        path = self.data / "releases" / "order.json"
        doc: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return doc


def phase(said: dict[str, Any] | None) -> str:
    return str((said or {}).get("phase"))


def test_without_a_launcher_or_an_archive_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    node = Node(tmp_path / "a", monkeypatch, None)
    said = node.look()
    assert phase(said) == "Refused"
    assert "launcher" in str(said)
    assert node.updating.about() == {}
    (tmp_path / "b").mkdir()
    node = Node(tmp_path / "b", monkeypatch)
    node.wanted = release(machine="plan9-vax-cp311")
    said = node.look()
    assert phase(said) == "Refused"
    assert this_platform() in str(said)
    assert (node.ended, node.order) == (0, {})


def test_what_the_launcher_did_is_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(tmp_path, monkeypatch, HERE)
    wish = order_id("u", HERE, 2)
    node.state(State(trying=Order(wish, HERE), obeyed=wish, starts=1))
    assert phase(node.look()) == "Updating"
    node.state(State(current=HERE, obeyed=wish))
    assert phase(node.look()) == "Running"
    node.wanted = release(ELSE, generation=3)
    node.state(State(current=HERE, obeyed="x", failed=order_id("u", ELSE, 3), failedWhy="it was late"))
    said = node.look()
    assert phase(said) == "Failed"
    assert said is not None
    assert (said["observedGeneration"], said["message"]) == (3, "went back: it was late")
    assert node.updating.about() == {"release": HERE[:12], "releaseFailed": "it was late"}
    assert (node.ended, node.order) == (0, {})


def test_taken_back_without_a_release_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Rollout failed elsewhere: the node that had proven it goes back to what ran before, once."""
    node = Node(tmp_path, monkeypatch, HERE)
    node.wanted = None
    node.state(State(current=HERE, previous="", obeyed=order_id("u", HERE, 2)))
    assert node.look() is None
    assert (node.ended, node.order["release"]) == (1, "")
    assert node.order["link"] == 600.0
    node.state(State(current=HERE, obeyed=node.order["id"], failed=node.order["id"], failedWhy="w"))
    node.look()
    assert node.ended == 1
    # a Release that is gone changes nothing
    node.declared = None
    node.look()
    assert node.ended == 1


def test_the_namespace_is_fixed() -> None:
    kind = kinds.get("Release")
    kind.check(release())
    with pytest.raises(Invalid, match="namespace"):
        kind.check(Resource(kind="Release", metadata=Metadata(name="agent", namespace="default"), spec=release().spec))
    with pytest.raises(Invalid):
        kind.check(
            Resource(
                kind="Release", metadata=Metadata(name="a", namespace=HOME), spec=ReleaseSpec(version="1", archives={})
            )
        )
