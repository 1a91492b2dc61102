"""A limit that is said to be enforced is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeward.core import cgroup
from edgeward.core.proc import find_by_env
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


def test_the_cap_on_output_holds_whoever_is_killed(systems: Callable[..., Any]) -> None:
    up = systems("a", "up")
    cap = 1 << 20
    spec = {"process": {"command": ["yes"]}, "logs": {"bytes": "1Mi"}}
    up.apply({"kind": "App", "metadata": {"name": "loud"}, "spec": spec})
    folder = up.data / "nodes" / "plant-1" / "logs" / "default" / "loud"
    sizes: list[int] = []

    def pids() -> list[int]:
        return [i["pid"] for i in up.get("app", "loud")["status"]["instances"] if i["phase"] == "Running"]

    def agent() -> int:
        return int(up.context["nodes"][0]["pids"]["agent"] or 0)

    def size() -> int:
        total = 0
        for path in folder.glob("*.log*"):
            with contextlib.suppress(FileNotFoundError):  # the pump renames it
                total += path.stat().st_size
        sizes.append(total)
        return total

    def written() -> int:
        size()
        io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return int(io["wchar"])

    def goes_on(what: str) -> None:
        before = written()
        up.wait(what, lambda: written() > before + 2 * cap)

    (pid,) = up.wait("it runs", pids)
    goes_on("it writes")
    for victims in (("agent",), ("pump",), ("agent", "pump")):
        first = agent()
        (pump,) = up.wait("its pump", lambda: find_by_env("EDGEWARD_PUMP", str(folder.parents[1])))
        for victim in victims:
            os.kill(first if victim == "agent" else pump.pid, signal.SIGKILL)
        goes_on(f"it writes on without {victims}")
        if "agent" in victims:
            up.wait("the next agent", lambda first=first: agent() not in (0, first))
    up.wait("it is adopted", lambda: pids() == [pid])
    assert up.run("logs", "loud", "--tail", "2").endswith("y\n")
    assert size() >= cap // 2
    assert max(sizes) <= cap
