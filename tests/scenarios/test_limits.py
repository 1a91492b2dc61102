"""A limit that is said to be enforced is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from edgeward.core import cgroup
from edgeward.lab.publisher import Publisher

HOG = "import time\nx = []\nwhile True:\n    x.append(b'x' * 1_000_000)\n    time.sleep(0.005)\n"


def test_memory_limit_ends_the_app_or_status_says_that_it_does_not(systems: Callable[..., Any]) -> None:
    up = systems("a", "up")
    spec = {"process": {"command": ["python3", "-c", HOG]}, "limits": {"memory": "48Mi"}, "restart": {"max": "1s"}}
    up.apply({"kind": "App", "metadata": {"name": "hog"}, "spec": spec})
    if "memory" not in cgroup.available():
        status = up.wait("its status", lambda: up.get("app", "hog")["status"].get("nodes", {}).get("plant-1"))
        assert status["enforced"] == []
        assert [n["what"] for n in status["notEnforced"]] == ["memory"]
        pytest.skip("this machine gives no memory cgroup; status says so")

    def enforced() -> list[str]:
        found: list[str] = up.get("app", "hog")["status"].get("nodes", {}).get("plant-1", {}).get("enforced", [])
        return found

    up.wait("the limit is reported", lambda: enforced() == ["memory"])
    up.wait(
        "it is ended again and again",
        lambda: any(i["restarts"] >= 2 for i in up.get("app", "hog")["status"]["instances"]),
    )
    up.wait("the event", lambda: "was ended by SIGKILL" in up.run("events"))


def test_an_export_that_refuses_does_so_on_a_cut_site_and_over_a_kill_of_the_agent(lab: Callable[[str], Any]) -> None:
    system = lab("sites: [{name: plant, nodes: 1}]")
    spec = {
        "from": {"mqtt": "sensors/#"},
        "to": {"hub": {"stream": "line1"}},
        "identity": "$.id",
        "bounds": {"bytes": "64Ki", "onFull": "refuse"},
    }
    system.apply({"kind": "Export", "metadata": {"name": "line1"}, "spec": spec}, "--wait")
    assert system.get("export", "line1")["status"]["phase"] == "Flowing"
    node = system.context["nodes"][0]
    publisher = Publisher(node["mqtt_url"], node["mqtt_user"], node["mqtt_password"], rate=500)

    def at_node() -> dict[str, Any]:
        doc: dict[str, Any] = json.loads(system.run("get", "export", "line1", "--at", "plant-1", "-o", "json"))
        status: dict[str, Any] = doc["status"]
        return status

    def state() -> str:
        with contextlib.suppress(AssertionError):  # the agent was killed and does not answer yet
            return str(at_node()["state"])
        return ""

    system.run("lab", "cut", "plant")
    publisher.start()
    try:
        system.wait("it refuses", lambda: state() == "refusing")
        taken = publisher.acked_count()
        agent = system.context["nodes"][0]["pids"]["agent"]
        os.kill(agent, signal.SIGKILL)
        system.wait("another agent", lambda: system.context["nodes"][0]["pids"]["agent"] not in (agent, None))
        system.wait("it still refuses", lambda: state() == "refusing")
        assert publisher.acked_count() <= taken + 1, "one may have been on its way"
        assert "takes no more on sensors/#" in system.run("events", "--at", "plant-1")
        system.run("lab", "heal", "plant")
        system.wait("it takes more", lambda: publisher.acked_count() > taken + 10)
    finally:
        publisher.end()
    sent = publisher.acked()

    def ids() -> list[int]:
        lines = system.run("stream", "read", "line1", "--from", "0", "-o", "json").splitlines()
        return [json.loads(line)["payload"]["id"] for line in lines]

    system.wait("all of it at the hub", lambda: len(ids()) >= len(sent))
    assert sorted(ids()) == sorted(sent), "each once"
