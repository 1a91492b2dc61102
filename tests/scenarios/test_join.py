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
    # the old box, started again: it joined once and is no node any more; it is told why, and dials no longer
    again = box("one", token)
    up.wait("it was told", lambda: "refuses this node: Node/box-1: is revoked" in again.log.read_text(), 90)
    up.wait("it hung up", lambda: "leafnodes" not in (again.data / "nats" / "nats.conf").read_text())
    assert again.process.poll() is None
    assert status(up, "box-1")["online"], "the one that replaced it"
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


def credentials(up: Any, node: str) -> str:
    return str((status(up, node).get("credentials") or {}).get("issued", ""))


def test_credentials_are_renewed_and_an_expired_node_gets_back_in(
    systems: Callable[..., Any], box: Callable[..., Box], tmp_path: Path
) -> None:
    """Lives of 15 s: what is 90 days otherwise."""
    (tmp_path / "hub" / "hub").mkdir(parents=True)
    (tmp_path / "hub" / "hub" / "hub.json").write_text('{"certificateLife": "15s"}')
    up = systems("hub", "up")
    token = up.run("token", "create", "--site", "plant", "--node", "box-1").split()[-1]
    one = box("one", token)
    up.wait("joined", lambda: status(up, "box-1").get("online"))
    first = credentials(up, "box-1")
    since = status(up, "box-1")["since"]
    one.close()
    last = credentials(up, "box-1")
    before = credentials(up, "plant-1")
    up.wait("renewed", lambda: credentials(up, "plant-1") > before, 40)
    ends = status(up, "box-1")["credentials"]["expires"][:19]
    up.wait("box-1's have ended", lambda: time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) > ends, 40)
    again = box("one", token)
    up.wait(
        "back without a visit", lambda: credentials(up, "box-1") > last and status(up, "box-1")["since"] > since, 60
    )
    up.wait("online", lambda: status(up, "box-1").get("online"))
    assert first
    assert again.process.poll() is None
    # renewals are not seen by anybody: plant-1 was never offline
    events = json.loads(up.run("events", "-o", "json"))["items"]
    assert "NodeOffline" not in [e["reason"] for e in events if e["resource"] == "Node/plant-1"]
    assert "CredentialsRenewed" in [e["reason"] for e in events if e["resource"] == "Node/plant-1"]


def test_the_ca_is_replaced_while_a_node_is_away(
    systems: Callable[..., Any], box: Callable[..., Box], tmp_path: Path
) -> None:
    up = systems("hub", "up")
    token = up.run("token", "create", "--site", "plant", "--node", "box-1").split()[-1]
    one = box("one", token)
    up.wait("joined", lambda: status(up, "box-1").get("online"))
    one.close()
    up.wait("away", lambda: not status(up, "box-1").get("online"), 40)
    old = json.loads(up.run("hub", "ca", "-o", "json"))
    new = json.loads(up.run("hub", "rotate-ca", "-o", "json"))
    assert new["signing"] != old["signing"]
    assert (new["trusted"], new["waiting"], new["waitingOnline"]) == (2, ["box-1"], [])
    # a new hub process and nats-server: everybody dials anew
    hub = up.context["pids"]["hub"]
    for pid in (up.context["pids"]["nats"], hub):
        os.kill(pid, signal.SIGKILL)
    up.wait("a new hub", lambda: up.context["pids"]["hub"] not in (None, hub))
    up.wait("plant-1 is linked", lambda: _reached(up, "plant-1"), 60)
    up.run("hub", "retire-ca")
    box("one", token)
    up.wait("box-1 is back", lambda: status(up, "box-1").get("online"), 90)


def _reached(up: Any, node: str) -> bool:
    """Whether the hub reaches the node over the link."""
    env = {**os.environ, "EDGEWARD_CONTEXT": str(up.data / "context.json")}
    argv = [sys.executable, "-m", "edgeward", "top", "nodes", "-o", "json"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=30)
    found = json.loads(done.stdout)["items"] if done.returncode == 0 else []  # the hub is not there yet
    return any(n["name"] == node and n.get("agentMB") for n in found)


def test_many_at_once_and_one_that_leaves(systems: Callable[..., Any], box: Callable[..., Box], tmp_path: Path) -> None:
    up = systems("hub", "up")
    names = [f"box-{n}" for n in range(20)]
    (tmp_path / "boxes").write_text("# ours\n" + "".join(f"{n} field\n" for n in names))
    lines = up.run("token", "create", "--batch", str(tmp_path / "boxes"))
    (tmp_path / "tokens").write_text(lines)
    fleet = tmp_path / "fleet"
    out = up.run("join", "--batch", str(tmp_path / "tokens"), "--data", str(fleet))
    assert sorted(out.split("\n")) == sorted(["", *(f"node/{n} joined" for n in names)])
    assert up.get("node", "box-7")["spec"]["site"] == "field"
    keys = {status(up, n)["credentials"]["publicKey"] for n in names}
    assert len(keys) == 20
    # again: nothing happens; one of them runs
    assert "joined already" in up.run("join", "--batch", str(tmp_path / "tokens"), "--data", str(fleet))
    token = next(line.split()[1] for line in lines.splitlines() if line.startswith("box-7 "))
    seven = Box(fleet / "box-7", token)
    try:
        up.wait("online", lambda: status(up, "box-7").get("online"))
        up.run("leave", "--data", str(fleet / "box-7"))
        assert seven.process.wait(20) == 0
        up.run("get", "node", "box-7", code=5)
        up.run("leave", "--data", str(fleet / "box-7"), code=3)
    finally:
        seven.close()
    for bad in ("box-1\n", "a b c\n", "box-1 x\nbox-1 y\n", "../x ewj_y\n"):
        (tmp_path / "bad").write_text(bad)
        up.run("join", "--batch", str(tmp_path / "bad"), "--data", str(fleet), code=3)
    assert not (tmp_path / "x").exists()


def test_a_box_without_internet_joins_by_one_file(
    systems: Callable[..., Any], box: Callable[..., Box], tmp_path: Path
) -> None:
    up = systems("hub", "up")
    file = tmp_path / "box.tar"
    up.run("token", "create", "--site", "plant", "--node", "box-1", "--bundle", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    up.run("token", "create", "--bundle", str(file), code=2)
    up.run("token", "create", "--site", "plant", "--node", "b", "--proxy", "http://p", code=2)
    up.run("token", "create", "--site", "plant", "--node", "b", "--bundle", str(file), "--wheels", "/nowhere", code=3)
    box("one", "--bundle", str(file))
    up.wait("online", lambda: status(up, "box-1").get("online"))
    up.run("join", "--bundle", str(file), "--data", str(tmp_path / "two"), code=3)
    assert "used before" in up.stderr
