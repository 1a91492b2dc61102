"""What the hub changes waits while the site holds, on the disk as well, but for who may come in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tests.agent.test_shared import config, doc, value

from edgeward.agent.holding import Holding
from edgeward.agent.replica import Replica
from edgeward.core.audit import Audit
from edgeward.core.resource import Key, to_stored
from edgeward.nodes.holding import said
from edgeward.nodes.siblings import LATEST, Hold
from edgeward.nodes.wire import HubObject


def hub(r: Any, revision: int) -> HubObject:
    return HubObject(*(r.kind, r.key.namespace, r.key.name), revision, to_stored(r))


def test_held_changes_wait_and_are_counted(tmp_path: Path) -> None:
    told: list[str] = []

    def holding(r: Replica) -> Holding:
        return Holding(
            "one",
            "plant",
            r,
            Audit(),
            changed=lambda: told.append("changed"),
            event=lambda _, why, __: told.append(why),
        )

    r = Replica(tmp_path / "r.db", site="plant", node="one")
    role = doc("Role", "here", {"rules": [{"verbs": ["get"], "kinds": ["App"]}]})
    first = [hub(config("1"), 5), hub(role, 6)]
    h = holding(r)
    assert not h.held_back(first, True), "who does not hold takes it"
    r.apply_sync(first, revision=7, epoch="e", full=True)
    assert h.take(said(True, h.hold, 1e9, "two", "ann")) and told == ["SiteHeld", "changed"]
    assert not h.take(Hold(False, 1.0, "three", "bob")), "an earlier word counts for nothing"

    gone_role = HubObject("Role", "_", "here", 9)
    assert h.held_back([hub(config("2"), 8), hub(config("n", "new"), 10), gone_role], False)
    assert value(r) == "1" and r.hub_revision == 7
    assert r.find(Key("Role", "_", "here")) is None, "a role that was taken away is gone at once"
    assert h.status()["changes"] == ["Config/a", "Config/new"] and h.status()["by"] == "ann"
    assert h.held_back([hub(config("x", "more"), 11)], False)
    assert h.status()["waiting"] == 3, "what came before waits still"
    assert h.held_back([HubObject("Config", "default", "more", 12)], False) and h.status()["waiting"] == 2
    assert h.held_back([hub(config("1"), 5), hub(config("n", "new"), 10)], True), "what is as before does not wait"
    assert h.status()["changes"] == ["Config/new"]
    assert h.held_back([], True)
    assert h.status()["changes"] == ["Config/a"] and value(r) == "1", "nor does a deletion come in"
    r.close()

    r = Replica(tmp_path / "r.db", site="plant", node="one")
    h = holding(r)
    assert h.held_back([hub(config("2"), 8)], False), "after a restart as well"
    told.clear()
    assert h.take(said(False, h.hold, 0.0, "one", "bob")) and told == ["SiteReleased", "changed"]
    assert h.status() == {} and not h.held_back([hub(config("2"), 8)], False)


@pytest.mark.parametrize("stamp", [math.inf, math.nan, 1e300, -1.0, LATEST * 2, LATEST])
def test_a_word_of_no_time_holds_no_site_for_ever(tmp_path: Path, stamp: float) -> None:
    r = Replica(tmp_path / "r.db", site="plant", node="one")
    h = Holding("one", "plant", r, Audit(), changed=lambda: None, event=lambda *_: None)
    lie = Hold(True, stamp, "zzz", "eve")
    assert h.take(lie) is (stamp == LATEST)
    h.take(said(True, h.hold, 1e9, "one", "ann"))
    released = said(False, h.hold, 1e9, "one", "ann")
    assert h.take(released) and not h.hold.held
    assert not h.take(lie), "nor again by the same word"
    r.close()
