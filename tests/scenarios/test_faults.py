"""What a site must survive, seeded."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeward.core.proc import alive, identify
from edgeward.lab.publisher import Publisher

EXPORT = {
    "kind": "Export",
    "metadata": {"name": "line1"},
    "spec": {"from": {"mqtt": "sensors/#"}, "to": {"hub": {"stream": "line1"}}, "identity": "$.id"},
}
SLEEP = ["python3", "-c", "import time; time.sleep(600)"]


def app(name: str, command: list[str] = SLEEP, conflict: str = "cloud", **more: Any) -> dict[str, Any]:
    spec = {"placement": {"site": "plant"}, "process": {"command": command}, **more}
    return {"kind": "App", "metadata": {"name": name, "conflict": conflict}, "spec": spec}


def ids(system: Any) -> list[int]:
    lines = system.run("stream", "read", "line1", "--from", "0", "-o", "json").splitlines()
    return [json.loads(line)["payload"]["id"] for line in lines]


@pytest.mark.slow
def test_twenty_random_kills_lose_nothing_and_double_nothing(systems: Callable[..., Any]) -> None:
    up = systems("a", "up")
    up.apply(EXPORT)
    up.wait("the capture", lambda: "plant-1" in up.get("export", "line1")["status"].get("nodes", {}))
    node = up.context["nodes"][0]
    publisher = Publisher(node["mqtt_url"], node["mqtt_user"], node["mqtt_password"], rate=150)
    publisher.start()
    rng = random.Random(20)
    kills: dict[str, int] = {}
    for _ in range(20):
        who = rng.choice(["agent", "hub", "hub-nats", "nats"])

        def killed(who: str = who) -> bool:
            """Whether it was there; one that was killed before may still be on its way back."""
            context = up.context
            pids = {"hub": context["pids"]["hub"], "hub-nats": context["pids"]["nats"]}
            pids |= context["nodes"][0]["pids"]
            there = identify(pids[who] or 0)
            if there is None or not alive(there):
                return False
            os.kill(there.pid, signal.SIGKILL)
            return True

        up.wait(f"{who} to kill", killed)
        kills[who] = kills.get(who, 0) + 1
        time.sleep(rng.uniform(0.2, 1.2))  # the load between two kills
    assert len(kills) == 4, kills
    acked = publisher.acked_count()
    up.wait("the broker's return", lambda: publisher.acked_count() > max(acked + 20, 300))
    publisher.end()
    sent = publisher.acked()
    assert len(sent) > 300

    def complete() -> bool:
        try:
            return sent <= set(ids(up))
        except AssertionError:
            return False  # the hub is on its way back

    up.wait("every acknowledged reading", complete)
    got = ids(up)
    assert len(got) == len(set(got)), "none twice"
    assert [i for i in got if i in sent] == sorted(sent), "in order"


def test_local_changes_are_decided_by_their_rule(lab: Callable[[str], Any]) -> None:
    system = lab("sites: [{name: plant, nodes: 1, link: lan}, {name: shop, nodes: 1, link: lan}]")

    def config(rule: str, value: str, sleep: str = "600") -> list[dict[str, Any]]:
        command = ["python3", "-c", f"import time; time.sleep({sleep})"]
        return [app(f"c-{rule}", command, rule, restart={"backoff": value})]

    for rule in ("cloud", "edge", "newest"):
        system.apply(config(rule, "1s"), "--wait")
    shared = {"kind": "App", "metadata": {"name": "shared"}, "spec": {"process": {"command": SLEEP}}}
    system.apply([shared, app("doomed")], "--wait")
    system.wait("both sites", lambda: len(system.get("app", "shared")["status"]["instances"]) == 2)
    doomed = system.get("app", "doomed")["status"]["instances"][0]["pid"]

    system.run("lab", "cut", "plant", "--data", str(system.data))
    for rule in ("cloud", "edge", "newest"):
        system.apply(config(rule, "2s"), "--at", "plant-1")
    for rule in ("cloud", "edge"):
        system.apply(config(rule, "3s"))
    local = {**shared, "spec": {"process": {"command": SLEEP}, "replicas": 2}}
    system.apply(local, "--at", "plant-1")
    system.run("delete", "app", "shared", "--at", "plant-1", code=3)
    assert "at every site" in system.stderr
    assert "replicas: 0" in system.stderr
    system.run("delete", "app", "doomed")
    assert Path(f"/proc/{doomed}").exists(), "cut off, the site does not know yet"
    system.run("lab", "heal", "plant", "--data", str(system.data))

    def backoff(rule: str, *at: str) -> str:
        return str(system.get("app", f"c-{rule}", *at)["spec"]["restart"]["backoff"])

    want = {"cloud": "3s", "edge": "2s", "newest": "2s"}
    for at in ((), ("--at", "plant-1")):
        system.wait(f"decided at {at or 'the hub'}", lambda at=at: {r: backoff(r, *at) for r in want} == want)
    for at in ((), ("--at", "plant-1")):
        journal: list[dict[str, Any]] = []

        def losers(at: tuple[str, ...] = at, journal: list[dict[str, Any]] = journal) -> dict[str, str]:
            journal[:] = json.loads(system.run("journal", "-o", "json", *at))["items"]
            return {j["name"]: j["loser"] for j in journal if j.get("loser")}

        system.wait("both in the journal", lambda losers=losers: {"c-cloud", "c-edge"} <= set(losers()))
        assert losers()["c-cloud"] == "edge"
        assert losers()["c-edge"] == "cloud"
        assert all(j["lost"]["spec"]["restart"]["backoff"] for j in journal if j.get("loser"))

    # what other sites share became an override of this site alone
    system.wait("the override", lambda: json.loads(system.run("override", "list", "-o", "json"))["items"])
    assert system.get("app", "shared")["spec"].get("replicas", 1) == 1
    assert system.get("app", "shared", "--at", "shop-1")["spec"].get("replicas", 1) == 1
    assert system.get("app", "shared", "--at", "plant-1")["spec"]["replicas"] == 2
    name = json.loads(system.run("override", "list", "-o", "json"))["items"][0]["metadata"]["name"]
    system.run("override", "drop", name)
    system.wait("dropped", lambda: system.get("app", "shared", "--at", "plant-1")["spec"].get("replicas", 1) == 1)
    # the delete arrived, and no process was left
    system.wait("no orphan", lambda: not Path(f"/proc/{doomed}").exists())


def test_a_bad_version_is_rolled_back_at_a_cut_site(lab: Callable[[str], Any]) -> None:
    system = lab("sites: [{name: plant, nodes: 1, link: lan}]")
    quick = {"health": {"startup": "3s", "window": "500ms"}}
    system.apply(app("web", SLEEP, **quick), "--wait")
    before = system.get("app", "web")["status"]["instances"][0]["pid"]
    system.run("lab", "cut", "plant", "--data", str(system.data))
    system.apply(app("web", ["python3", "-c", "raise SystemExit(3)"], **quick), "--at", "plant-1")

    def rolled_back() -> bool:
        status = system.get("app", "web", "--at", "plant-1")["status"]
        return status.get("phase") == "Degraded" and [i["pid"] for i in status["instances"]] == [before]

    system.wait("the roll-back", rolled_back)
    system.wait("the event", lambda: "RolledBack" in system.run("events", "--at", "plant-1"))


@pytest.mark.slow
def test_an_agent_killed_in_an_update_ends_with_one_whole_version(systems: Callable[..., Any]) -> None:
    up = systems("a", "up")
    rng = random.Random(4)
    quick = {"health": {"window": "300ms"}}
    up.apply(app("web", SLEEP, **quick), "--wait")
    for n in range(5):
        command = ["python3", "-c", f"import time; time.sleep({700 + n})"]
        up.apply(app("web", command, **quick))
        time.sleep(rng.uniform(0.0, 0.9))  # the moment of the kill
        agent = up.context["nodes"][0]["pids"]["agent"]
        os.kill(agent, signal.SIGKILL)
        running = [p for p in up.processes() if f"sleep({700 + n})" in cmdline(p) or "sleep(" in cmdline(p)]
        assert running, "never none"

        def whole(command: list[str] = command) -> bool:
            live = [p for p in up.processes() if "time.sleep(" in cmdline(p)]
            status = up.get("app", "web")["status"]
            one = [i for i in status.get("instances", []) if i["phase"] == "Running"]
            return len(live) == 1 and command[2] in cmdline(live[0]) and [i["pid"] for i in one] == live

        up.wait("one whole version", whole)


def cmdline(pid: int) -> str:
    try:
        with Path(f"/proc/{pid}/cmdline").open("rb") as f:
            return f.read().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_a_message_too_large_is_refused_and_harms_nobody(systems: Callable[..., Any]) -> None:
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion

    up = systems("a", "up")
    up.apply(EXPORT)
    up.wait("the capture", lambda: "plant-1" in up.get("export", "line1")["status"].get("nodes", {}))
    node = up.context["nodes"][0]
    port = int(node["mqtt_url"].rsplit(":", 1)[1])
    big = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="big")
    big.username_pw_set(node["mqtt_user"], node["mqtt_password"])
    acked: list[int] = []
    gone: list[int] = []
    big.on_publish = lambda c, u, mid, *_: acked.append(mid)
    big.on_disconnect = lambda *a: gone.append(1)
    big.connect("127.0.0.1", port)
    big.loop_start()
    big.publish("sensors/big", b"x" * (64 * 1024 * 1024), qos=1)
    up.wait("the broker hangs up", lambda: gone)
    big.loop_stop()
    assert not acked, "refused, not acknowledged"
    publisher = Publisher(node["mqtt_url"], node["mqtt_user"], node["mqtt_password"], rate=200)
    publisher.start()
    up.wait("others go on", lambda: publisher.acked_count() >= 20)
    publisher.end()
    up.wait("and arrive", lambda: publisher.acked() <= set(ids(up)))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_node_whose_disk_is_full_says_so_and_goes_on(systems: Callable[..., Any], tmp_path: Path) -> None:
    disk = tmp_path / "a" / "nodes"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        up = systems("a", "up")
        up.apply(app("web"), "--wait")
        pid = up.get("app", "web")["status"]["instances"][0]["pid"]
        filler = disk / "somebody-else"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as f:
            while True:
                f.write(bytes(65536))
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as f:
            while True:
                f.write(bytes(1))
        up.apply(app("web", restart={"backoff": "3s"}), "--at", "plant-1", code=3)
        assert "full" in up.stderr
        assert "free space on the disk" in up.stderr
        up.apply(app("later"))
        time.sleep(2)  # the agent meets the full disk, again and again
        assert Path(f"/proc/{pid}").exists(), "what runs goes on"
        filler.unlink()
        up.wait("the new app", lambda: up.get("app", "later")["status"].get("phase") == "Running")
        up.apply(app("web", restart={"backoff": "3s"}), "--at", "plant-1")
        up.wait("the local change", lambda: up.get("app", "web")["spec"].get("restart") == {"backoff": "3s"})
        assert up.get("app", "web", "--at", "plant-1")["status"]["instances"]
        assert up.stop() == 0
    finally:
        for system in disk.glob("*/run.json"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(json.loads(system.read_text())["pid"], signal.SIGKILL)
        subprocess.run(["umount", "-l", str(disk)], check=False)
