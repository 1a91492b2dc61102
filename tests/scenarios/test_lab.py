"""A lab on relays: what its commands do, and that its status says so."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def status(lab: Any) -> dict[str, Any]:
    doc: dict[str, Any] = json.loads(lab.run("lab", "status", "-o", "json"))
    return doc


def online(lab: Any, node: str) -> bool:
    return bool(lab.get("node", node)["status"]["online"])


def test_links_and_nodes_of_a_lab(lab: Callable[[str], Any]) -> None:
    system = lab("sites: [{name: plant, nodes: 2, link: lan}, {name: shop, nodes: 1, link: bad-dsl}]")
    assert [(s["name"], s["link"], s["cut"]) for s in status(system)["sites"]] == [
        ("plant", "lan", False),
        ("shop", "bad-dsl", False),
    ]

    # another profile does not heal a cut
    system.run("lab", "cut", "plant")
    system.run("lab", "profile", "plant", "4g")
    system.wait("offline", lambda: not online(system, "plant-1") and not online(system, "plant-2"), 60)
    assert online(system, "shop-1")
    (plant, _) = status(system)["sites"]
    assert (plant["link"], plant["cut"]) == ("4g", True)
    system.run("lab", "heal", "plant")
    system.wait("online", lambda: online(system, "plant-1") and online(system, "plant-2"), 60)

    # what cannot be is refused, and says what could be
    system.run("lab", "cut", "nowhere", code=5)
    assert "plant, shop" in system.stderr
    system.run("lab", "profile", "plant", "5g", code=3)
    assert "bad-dsl" in system.stderr
    system.run("lab", "partition", "plant", "plant-1/plant-2", code=3)
    assert "--backing namespaces" in system.stderr
    system.run("lab", "kill", "plant-9", code=5)
    assert "plant-1, plant-2, shop-1" in system.stderr

    # a running node that is started is left as it is
    before = system.context
    system.run("lab", "start", "plant-1")
    assert system.context == before

    # kill takes all that the node has, and it stays down until start
    sleep = {"process": {"command": ["sleep", "1000"]}, "placement": {"site": "shop"}}
    system.apply({"kind": "App", "metadata": {"name": "nap"}, "spec": sleep}, "--wait")
    shop = next(n for n in before["nodes"] if n["name"] == "shop-1")
    pids = [*shop["pids"].values(), system.get("app", "nap")["status"]["instances"][0]["pid"]]
    system.run("lab", "kill", "shop-1")
    assert not [p for p in pids if Path(f"/proc/{p}").exists() and state(p) != "Z"]
    system.wait("offline", lambda: not online(system, "shop-1"), 60)
    down = next(n for s in status(system)["sites"] for n in s["nodes"] if n["name"] == "shop-1")
    assert down == {"name": "shop-1", "agent": None, "nats": None, "ready": False}
    system.run("lab", "start", "shop-1")
    system.wait("the app again", lambda: system.get("app", "nap")["status"]["phase"] == "Running", 60)

    # deaths long ago are none of a start's
    for _ in range(4):
        pid = agent(system, "plant-2")
        os.kill(pid, signal.SIGKILL)
        system.wait("another agent", lambda pid=pid: agent(system, "plant-2") not in (None, pid))
    system.run("lab", "kill", "plant-2")
    system.run("lab", "start", "plant-2")
    system.wait("online", lambda: online(system, "plant-2"), 60)


def agent(system: Any, node: str) -> Any:
    return next(n["pids"]["agent"] for n in system.context["nodes"] if n["name"] == node)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
