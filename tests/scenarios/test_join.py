"""Boxes that join a running hub: by the program, as an operator does it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeward.core.proc import find_by_env


class Box:
    """One box: a directory, and `edgeward join` running in it."""

    def __init__(self, data: Path, *args: str, env: dict[str, str] | None = None) -> None:
        self.data = data
        self.log = data.with_suffix(".log")
        with self.log.open("wb") as out:
            argv = [sys.executable, "-m", "edgeward", "join", *args, "--data", str(data)]
            self.process = subprocess.Popen(
                argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})}
            )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        for p in find_by_env("EDGEWARD_NATS_DIR", str(self.data / "nats")) + find_by_env(
            "EDGEWARD_DATA", str(self.data)
        ):
            with contextlib.suppress(ProcessLookupError):
                os.kill(p.pid, signal.SIGKILL)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Callable[..., Box]]:
    made: list[Box] = []

    def start(name: str, *args: str, **more: Any) -> Box:
        made.append(Box(tmp_path / name, *args, **more))
        return made[-1]

    yield start
    for one in made:
        one.close()


def status(up: Any, node: str) -> dict[str, Any]:
    """Empty while there is no such node."""
    items = json.loads(up.run("get", "nodes", "-o", "json"))["items"]
    found = [n.get("status", {}) for n in items if n["metadata"]["name"] == node]
    return found[0] if found else {}


def test_join_revoke_replace(systems: Callable[..., Any], box: Callable[..., Box], tmp_path: Path) -> None:
    up = systems("hub", "up")
    token = up.run("token", "create", "--site", "plant", "--node", "box-1", "--ttl", "24h").split()[-1]
    assert json.loads(up.run("token", "list", "-o", "json"))["items"]
    one = box("one", token)
    up.wait("online", lambda: status(up, "box-1").get("online"))
    assert status(up, "box-1")["revoked"] is False
    # what is declared for it comes to it
    up.run("label", "node", "box-1", "kind=box")
    app = {
        "process": {"command": [sys.executable, "-c", "import time; time.sleep(600)"]},
        "placement": {"nodeSelector": {"kind": "box"}},
    }
    up.apply({"kind": "App", "metadata": {"name": "idle"}, "spec": app}, "--wait")
    up.wait("runs", lambda: "box-1" in {i["node"] for i in up.get("app", "idle")["status"]["instances"]})

    up.run("join", token, "--data", str(tmp_path / "two"), code=3)
    assert "used before" in up.stderr
    assert not (tmp_path / "two" / "node.json").exists()

    began = time.monotonic()
    up.run("node", "revoke", "box-1")
    assert status(up, "box-1")["online"] is False
    assert status(up, "box-1")["revoked"] is True
    print(f"revoked and seen within {time.monotonic() - began:.2f} s")
    up.run("token", "create", "--site", "plant", "--node", "box-1", code=3)
    assert "node replace box-1" in up.stderr
    assert one.process.poll() is None, "its site goes on by itself"

    new = json.loads(up.run("node", "replace", "box-1", "-o", "json"))["token"]
    box("three", new)
    up.wait("online again", lambda: status(up, "box-1").get("online"))
    assert status(up, "box-1")["revoked"] is False
    one.close()
    # the old box, started again without a token: joined once, and still refused
    again = box("one", token)
    up.wait("it was told", lambda: b"refuse" in again.log.read_bytes() or b"Authorization" in
            (again.data / "nats" / "nats.log").read_bytes())  # fmt: skip
    verbs = [(a["verb"], a["name"]) for a in json.loads(up.run("audit", "-o", "json"))["items"]]
    assert {("enrol", "box-1"), ("revoke", "box-1")} <= set(verbs)


def test_refusals_of_join(systems: Callable[..., Any], tmp_path: Path) -> None:
    up = systems("hub", "up")
    data = str(tmp_path / "b")

    def token(*more: str) -> str:
        return str(up.run("token", "create", "--site", "plant", "--node", "box-1", *more).split()[-1])

    good = token()
    up.run("join", good, "--data", data, "--node", "box-2", code=3)
    assert "for node 'box-1', not for 'box-2'" in up.stderr
    up.run("join", good, "--data", data, "--site", "other", code=3)
    assert "site" in up.stderr
    short = token("--ttl", "1s")
    up.wait("it ends", lambda: up.run("token", "list") and _expired(up, short, data), 15)
    up.run("join", good[:-3], "--data", data, code=3)
    assert "damaged" in up.stderr
    up.run("join", "nonsense", "--data", data, code=3)
    listed = json.loads(up.run("token", "list", "-o", "json"))["items"]
    names = [t["metadata"]["name"] for t in listed if t["spec"]["node"] == "box-1"]
    up.run("token", "revoke", *names)
    up.run("join", good, "--data", data, code=3)
    assert "no such join token" in up.stderr
    up.run("token", "create", "--site", "plant", "--node", "plant-1", code=3)
    up.run("token", "create", "--site", "plant", "--node", "Bad_Name", code=3)
    up.run("token", "create", "--site", "plant", "--node", "x", "--ttl", "99d", code=3)
    up.run("token", "create", "--node", "x", code=2)
    up.run("node", "revoke", "nobody", code=5)
    for secret in (good, short):
        for path in up.data.rglob("*"):
            if path.is_file():
                assert secret.encode() not in path.read_bytes()


def _expired(up: Any, token: str, data: str) -> bool:
    env = {**os.environ, "EDGEWARD_CONTEXT": str(up.data / "context.json")}
    argv = [sys.executable, "-m", "edgeward", "join", token, "--data", data, "--node", "box-1", "--enrol-only"]
    # before its end this would join: ask only when the hub's clock has passed it
    listed = json.loads(up.run("token", "list", "-o", "json"))["items"]
    ends = min(t["spec"]["expires"] for t in listed if t["spec"]["node"] == "box-1")
    if time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) <= ends[:19]:
        return False
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=30)
    assert done.returncode == 3
    assert "expired" in done.stderr
    return True


def test_a_wiped_directory_of_up_is_set_up_anew(systems: Callable[..., Any]) -> None:
    import shutil

    up = systems("hub", "up")
    key = status(up, "plant-1")["credentials"]["publicKey"]
    up.stop()
    up.ready_file.unlink()
    shutil.rmtree(up.data / "nodes")
    again = systems("hub", "up")
    again.wait("online", lambda: status(again, "plant-1").get("online"))
    assert status(again, "plant-1")["credentials"]["publicKey"] != key
    again.run("delete", "node", "plant-1")
    again.stop()
    again.ready_file.unlink()
    third = systems("hub", "up")
    third.wait("online", lambda: status(third, "plant-1").get("online"))
