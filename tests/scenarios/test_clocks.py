"""Clocks that are wrong, and that are set while everything runs: for real, in the running processes (lab/skew.py)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from tests.skewing import skew

from edgeward.lab.publisher import Publisher
from edgeward.nodes.wan import redial

DAY = 86400
EXPORT = {
    "kind": "Export",
    "metadata": {"name": "line1"},
    "spec": {
        "from": {"mqtt": "sensors/#"},
        "to": {"hub": {"stream": "line1"}},
        "identity": "$.id",
        "bounds": {"age": "12h"},
    },
}


def app(value: str, window: str = "1s") -> dict[str, Any]:
    return {
        "kind": "App",
        "metadata": {"name": "a"},
        "spec": {
            "placement": {"site": "plant"},
            "process": {"command": ["python3", "-c", "import time; time.sleep(600)"], "env": {"VALUE": value}},
            "health": {"window": window},
        },
    }


class Clocks:
    """The processes of one side of a running system, and what their wall clock is ahead by."""

    def __init__(self, up: Any, side: str) -> None:
        self._up, self._side = up, side

    def set(self, seconds: int) -> None:
        pids = self._up.context["pids"] if self._side == "hub" else self._up.context["nodes"][0]["pids"]
        for pid in pids.values():
            skew(pid, seconds)


def start(systems: Callable[..., Any]) -> tuple[Any, Publisher]:
    up = systems("a", "up")
    up.apply([EXPORT, app("0")], "--wait")
    up.wait("the capture", lambda: "plant-1" in up.get("export", "line1")["status"].get("nodes", {}))
    node = up.context["nodes"][0]
    publisher = Publisher(node["mqtt_url"], node["mqtt_user"], node["mqtt_password"], rate=50)
    publisher.start()
    more(up, publisher)
    return up, publisher


def more(up: Any, publisher: Publisher, readings: int = 20) -> None:
    """The broker goes on acknowledging."""
    wanted = publisher.acked_count() + readings
    up.wait("readings are acknowledged", lambda: publisher.acked_count() >= wanted)


def all_there(up: Any, publisher: Publisher) -> None:
    """Every acknowledged reading once, in order; none was dropped for its age."""
    publisher.end()
    sent = publisher.acked()

    def got() -> list[int]:
        lines = up.run("stream", "read", "line1", "--from", "0", "-o", "json").splitlines()
        return [json.loads(line)["payload"]["id"] for line in lines]

    up.wait("every acknowledged reading", lambda: sent <= set(got()))
    assert got() == sorted(set(got()))
    dropped = up.get("export", "line1")["status"]["nodes"]["plant-1"].get("dropped", {})
    assert not any(dropped.values()), dropped


def node(up: Any) -> dict[str, Any]:
    status: dict[str, Any] = up.get("node", "plant-1")["status"]
    return status


def reasons(up: Any) -> list[str]:
    return [e["reason"] for e in json.loads(up.run("events", "-o", "json"))["items"]]


def dial_anew(up: Any) -> None:
    """Ends the leaf connection, as a proxy or a short cut does: the next one is made by the clocks as they are."""
    log = up.data / "nodes" / "plant-1" / "nats" / "nats.log"
    before = log.read_text().count("Leafnode connection created")
    folder = up.data / "nodes" / "plant-1" / "nats"
    port = json.loads((folder / "ports.json").read_text())["client"]
    asyncio.run(redial(f"nats://127.0.0.1:{port}", (folder / "secret").read_text().strip()))
    up.wait("dialled", lambda: log.read_text().count("Leafnode connection created") > before)


def test_a_node_at_1970_works_until_it_hears_the_time_and_then(systems: Callable[..., Any]) -> None:
    up, publisher = start(systems)
    pid = up.get("app", "a")["status"]["instances"][0]["pid"]
    box = Clocks(up, "node")
    box.set(100 - int(time.time()))
    dial_anew(up)
    up.wait("it says so", lambda: node(up).get("clock", {}).get("agrees") is False)
    assert node(up)["clock"]["aheadSeconds"] < -50 * 365 * DAY
    assert node(up)["online"]
    more(up, publisher)
    up.apply(app("1"), "--wait")
    up.run("get", "app", "a", "--at", "plant-1")
    assert up.get("app", "a")["status"]["instances"][0]["pid"] != pid
    pid = up.get("app", "a")["status"]["instances"][0]["pid"]
    log = (up.data / "nodes" / "plant-1" / "nats" / "nats.log").read_text()
    assert "1970/01/01" in log, "nats-server's clock too"
    box.set(0)
    up.wait("it is right", lambda: node(up).get("clock") == {"agrees": True})
    up.wait("it is dialled anew", lambda: "the link is dialled anew" in agent_log(up))
    up.wait("and is there", lambda: node(up)["online"])
    more(up, publisher)
    all_there(up, publisher)
    assert up.get("app", "a")["status"]["instances"][0]["pid"] == pid, "nothing was started anew"
    up.wait("it is told", lambda: {"ClockSet", "ClockDiffers"} <= set(reasons(up)))
    assert agent_log(up).count("credentials renewed") < 5


def agent_log(up: Any) -> str:
    return str((up.data / "nodes" / "plant-1" / "agent.log").read_text())


def test_clocks_that_are_set_a_day_both_ways_at_hub_and_node(systems: Callable[..., Any]) -> None:
    up, publisher = start(systems)
    value = 0
    for side in ("node", "hub"):
        clocks = Clocks(up, side)
        for seconds in (DAY, -DAY, 0):
            value += 1
            clocks.set(seconds)
            ahead = seconds if side == "node" else -seconds
            want = {"agrees": False, "aheadSeconds": ahead} if seconds else {"agrees": True}

            def known(want: dict[str, Any] = want) -> bool:
                said = node(up).get("clock", {})
                about = said.get("aheadSeconds", 0) - want.get("aheadSeconds", 0)
                return bool(said) and said["agrees"] == want["agrees"] and abs(about) < 60

            more(up, publisher)
            up.apply(app(str(value)), "--wait")
            up.wait(f"{side} {seconds}: it says so", known)
            assert node(up)["online"]
    all_there(up, publisher)
    assert up.get("app", "a")["status"]["phase"] == "Running"
