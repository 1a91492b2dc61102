"""A new version goes from site to site, and a bad one stops at the first of them and goes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LAB = "sites: [{name: north, nodes: 1, link: lan}, {name: south, nodes: 1, link: lan}]"
ROLLOUT = {
    "kind": "Rollout",
    "metadata": {"name": "web"},
    "spec": {
        "targets": [{"kind": "App", "name": "web"}],
        "groups": [{"name": "first", "sites": ["north"]}, {"name": "second", "sites": ["south"], "approval": True}],
        "healthWindow": "500ms",
        "timeout": "60s",
        "silentAfter": "60s",
    },
}


def web(version: str, command: str = "exec sleep 1000") -> dict[str, Any]:
    process = {"command": ["/bin/sh", "-c", command], "env": {"WEB": version}}
    return {"kind": "App", "metadata": {"name": "web"}, "spec": {"process": process, "health": {"window": "200ms"}}}


def test_group_by_group_and_back(lab: Callable[[str], Any]) -> None:
    system = lab(LAB)

    def running(node: str) -> str:
        """The version that runs there, as that node says it."""
        doc = system.get("app", "web", "--at", node)
        return str(doc["status"]["version"]) if doc["status"].get("phase") in ("Running", "Degraded") else ""

    def status() -> dict[str, Any]:
        found: dict[str, Any] = system.get("rollout", "web")["status"]
        return found

    def groups() -> dict[str, str]:
        return {g["name"]: g["phase"] for g in status()["groups"]}

    system.apply(web("1"), "--wait")
    system.apply(ROLLOUT)
    system.wait("the baseline", lambda: status()["phase"] == "Succeeded")
    one = running("north-1")
    assert running("south-1") == one

    system.apply(web("2"))
    system.wait("the first group", lambda: groups()["second"] == "Waiting")
    assert (status()["phase"], groups()["first"]) == ("Paused", "Succeeded")
    two = running("north-1")
    assert two != one
    assert running("south-1") == one
    system.run("rollout", "approve", "web")
    system.wait("the second group", lambda: status()["phase"] == "Succeeded")
    assert running("south-1") == two

    system.apply(web("bad", "exit 3"))
    system.wait("the way back", lambda: status()["phase"] == "RolledBack")
    assert running("north-1") == running("south-1") == two
    first, second = status()["groups"][:2]
    assert "north-1" in first["failed"]
    assert not second.get("nodes")
    out = system.run("rollout", "status", "web")
    assert "RolledBack" in out
    assert "north-1" in out

    # a site says for itself that changes wait; it is cut off when it says so, and learns of the change later
    system.run("lab", "cut", "south", "--data", str(system.data))
    system.run("--at", "south-1", "rollout", "hold", "web")
    system.run("lab", "heal", "south", "--data", str(system.data))
    system.wait("the word of the site", lambda: system.get("overrides")["items"])
    system.apply(web("3"))
    system.wait("the second group", lambda: groups()["second"] == "Waiting")
    system.run("rollout", "approve", "web")
    system.wait("it is held", lambda: "held" in status()["message"])
    assert status()["groups"][1]["late"] == 1
    three = running("north-1")
    assert (three != two, running("south-1")) == (True, two)
    system.run("--at", "south-1", "rollout", "release", "web")
    system.wait("the end", lambda: status()["phase"] == "Succeeded")
    assert running("south-1") == three

    # cancelled in the middle, everything goes back
    system.apply(web("4"))
    system.wait("the first group", lambda: groups()["second"] == "Waiting")
    assert running("north-1") != three
    system.run("rollout", "cancel", "web")
    system.wait("the way back", lambda: status()["phase"] == "RolledBack")
    assert running("north-1") == running("south-1") == three
    system.run("rollout", "approve", "web", "nobody", code=3)
