"""A limit that is said to be enforced is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from edgeward.core import cgroup

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
