"""A new version goes from site to site, and a bad one stops at the first of them and goes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "08-rollout"
SOURCE = "def handler(event, context):\n    return {'total': %d}\n"
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
    assert "Succeeded" in system.run("rollout", "status", "web", "--wait")
    assert running("south-1") == two

    system.apply(web("bad", "exit 3"))
    assert "RolledBack" in system.run("rollout", "status", "web", "--wait", code=1)
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


def test_a_function_its_example_and_what_it_fetches_before(lab: Callable[[str], Any], tmp_path: Path) -> None:
    system = lab(LAB)

    def status() -> dict[str, Any]:
        found: dict[str, Any] = system.get("rollout", "price")["status"]
        return found

    def total(node: str) -> int:
        return int(json.loads(system.run("invoke", "price", "--at", node, "-d", '{"pieces": 10}'))["total"])

    def totals() -> tuple[int, int]:
        return total("north-1"), total("south-1")

    system.run("apply", "-f", str(EXAMPLE / "1-price.yaml"), "--wait")
    system.run("apply", "-f", str(EXAMPLE / "rollout.yaml"))
    system.wait("the baseline", lambda: status()["phase"] == "Succeeded")
    assert totals() == (50, 50)
    system.run("apply", "-f", str(EXAMPLE / "2-price.yaml"))
    system.wait("the first node", lambda: status()["phase"] == "Paused")
    assert totals() == (40, 50)
    system.run("rollout", "approve", "price")
    system.wait("all", lambda: status()["phase"] == "Succeeded")
    assert totals() == (40, 40)
    system.run("apply", "-f", str(EXAMPLE / "3-price.yaml"))
    system.wait("the way back", lambda: status()["phase"] == "RolledBack")
    assert totals() == (40, 40)
    assert "check" in status()["groups"][0]["failed"]["north-1"]

    # code that has to be fetched is there before the run comes; a site that is cut off then does not step back
    code = tmp_path / "code"
    code.mkdir()
    (code / "main.py").write_text(SOURCE % 7)
    spec = {"runtime": "python", "source": {"folder": "./code"}}
    file = tmp_path / "price.yaml"
    file.write_text(
        json.dumps({"apiVersion": "edgeward/v1", "kind": "Function", "metadata": {"name": "price"}, "spec": spec})
    )
    system.run("apply", "-f", str(file))
    system.wait("the first node", lambda: status()["phase"] == "Paused")
    system.wait("the code at both", lambda: status()["prefetched"] == 2)
    assert totals() == (7, 40)
    system.run("lab", "cut", "south", "--data", str(system.data))
    system.run("lab", "kill", "south-1", "--data", str(system.data))  # and its agent begins anew, cut off
    system.run("lab", "start", "south-1", "--data", str(system.data))
    system.run("rollout", "approve", "price")
    assert totals() == (7, 40)
    system.run("lab", "heal", "south", "--data", str(system.data))
    system.wait("all", lambda: status()["phase"] == "Succeeded")
    assert totals() == (7, 7)
