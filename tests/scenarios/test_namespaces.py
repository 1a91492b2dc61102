"""A lab whose machines are network namespaces: real isolation, packet counters, partitions, and nothing left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import client as mqtt

from edgeward.lab import namespaces

pytestmark = pytest.mark.root

WHY = namespaces.unusable()
TOPOLOGY = "sites: [{name: plant, nodes: 3, link: {delay_ms: 20, name: slow}}, {name: shop, nodes: 1, link: lan}]\n"
SERVER = "import os, http.server as h; h.test(h.SimpleHTTPRequestHandler, port=int(os.environ['PORT']), bind='0.0.0.0')"


@pytest.fixture
def net(systems: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    if WHY:
        pytest.skip(f"no network namespaces here: {WHY}")

    def start(topology: str) -> Any:
        file = tmp_path / "lab.yaml"
        file.write_text(topology)
        return systems("lab", "lab", "up", "-f", str(file), "--backing", "namespaces")

    yield start


def space(lab: Any, node: str) -> str:
    """The namespace in which a node's agent is."""
    pid = next(n["pids"]["agent"] for n in lab.context["nodes"] if n["name"] == node)
    return f"/proc/{pid}/ns/net"


def reaches(lab: Any, origin: str, host: str, port: int, timeout: float = 20) -> bool:
    """Whether a TCP connection from a node's own namespace comes about; where it must not, a short wait will do."""
    code = f"import socket; socket.create_connection(({host!r}, {port}), {timeout})"
    done = subprocess.run(
        ["nsenter", f"--net={space(lab, origin)}", "--", sys.executable, "-c", code], capture_output=True, timeout=120
    )
    return done.returncode == 0


def mqtt_at(lab: Any, node: str) -> tuple[str, int]:
    url = next(n["mqtt_url"] for n in lab.context["nodes"] if n["name"] == node)
    host, _, port = url.removeprefix("mqtt://").partition(":")
    return host, int(port)


def counters(lab: Any) -> dict[str, Any]:
    doc: dict[str, Any] = json.loads(lab.run("lab", "status", "-o", "json"))["counters"]
    return doc


def test_isolation_partition_and_a_cut_without_loss(net: Callable[[str], Any]) -> None:
    lab = net(TOPOLOGY)
    one, two, three, shop = (mqtt_at(lab, n) for n in ("plant-1", "plant-2", "plant-3", "shop-1"))
    assert len({one[0], two[0], three[0], shop[0]}) == 4
    assert reaches(lab, "plant-1", *two)
    assert not reaches(lab, "plant-1", *shop, timeout=1.5), "site to site goes by no way"
    assert counters(lab)["pairs"]["plant-1>shop-1"]["cut"] > 0

    # an app's address is reached from its site and from this machine
    app: dict[str, Any] = {"placement": {"site": "shop"}, "process": {"command": ["python3", "-c", SERVER]}}
    app |= {"ports": [{"name": "http", "env": "PORT"}], "health": {"http": {"port": "http", "path": "/"}}}
    lab.apply({"kind": "App", "metadata": {"name": "web"}, "spec": app}, "--wait")
    instance = lab.get("app", "web")["status"]["instances"][0]
    with urllib.request.urlopen(f"http://{instance['address']}:{instance['ports']['http']}/", timeout=60) as got:
        assert got.status == 200

    # a partition of the site's own network; the WAN goes on
    lab.run("lab", "partition", "plant", "plant-1")
    assert not reaches(lab, "plant-1", *two, timeout=1.5)
    assert reaches(lab, "plant-2", *three)
    lab.wait("all online", lambda: all(n["status"]["online"] for n in lab.get("nodes")["items"]))
    lab.run("lab", "partition", "plant", "plant-1,plant-3/plant-2")
    assert reaches(lab, "plant-1", *three)
    assert not reaches(lab, "plant-3", *two, timeout=1.5)
    said = json.loads(lab.run("lab", "status", "-o", "json"))["sites"][0]
    assert said["parted"] == [["plant-1", "plant-3"], ["plant-2"]]
    assert "parted plant-1,plant-3/plant-2" in lab.run("lab", "status")
    lab.run("lab", "partition", "plant", "nobody", code=3)
    assert "plant-1, plant-2, plant-3" in lab.stderr
    lab.run("lab", "heal", "plant")
    assert reaches(lab, "plant-1", *two)

    # a cut while a foreign client publishes
    lab.apply(
        {
            "kind": "Export",
            "metadata": {"name": "line1"},
            "spec": {"from": {"mqtt": "sensors/#"}, "to": {"hub": {"stream": "line1"}}, "identity": "$.id"},
        }
    )
    lab.wait("the export", lambda: "plant-1" in lab.get("export", "line1").get("status", {}).get("nodes", {}))
    node = next(n for n in lab.context["nodes"] if n["name"] == "plant-1")
    acked: list[int] = []
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="meter")
    client.username_pw_set(node["mqtt_user"], node["mqtt_password"])
    client.connect(*one)
    client.loop_start()

    def publish(count: int) -> None:
        for _ in range(count):
            sent = client.publish("sensors/a", json.dumps({"id": len(acked)}), qos=1)
            sent.wait_for_publish(60)
            assert sent.is_published()
            acked.append(len(acked))

    publish(50)
    lab.run("lab", "cut", "plant")
    before = counters(lab)["nodes"]["plant-1"]["up"]
    publish(100)
    lab.wait("offline", lambda: not lab.get("node", "plant-1")["status"]["online"])
    lab.wait("the other site is not", lambda: lab.get("node", "shop-1")["status"]["online"])
    after = counters(lab)["nodes"]["plant-1"]["up"]
    assert after["packets"] == before["packets"], "nothing passes a cut"
    assert after["cut"] > before["cut"]
    lab.run("lab", "heal", "plant")
    publish(50)
    client.loop_stop()

    def read() -> list[int]:
        lines = lab.run("stream", "read", "line1", "--from", "0", "-o", "json").splitlines()
        return [json.loads(line)["payload"]["id"] for line in lines]

    lab.wait("all readings", lambda: len(read()) >= len(acked))
    assert read() == acked


def test_a_killed_lab_leaves_nothing_that_the_next_one_does_not_clear(net: Callable[[str], Any]) -> None:
    def left(prefix: str) -> list[str]:
        return [f.name for f in Path("/run/netns").iterdir() if f.name.startswith(prefix)]

    small = "sites: [{name: plant, nodes: 1, link: lan}]\n"
    lab = net(small)
    inode = Path(space(lab, "plant-1")).stat().st_ino
    block = next(f.name for f in Path("/run/netns").iterdir() if f.stat().st_ino == inode).partition("-")[0]
    lab.apply(
        {"kind": "App", "metadata": {"name": "nap"}, "spec": {"process": {"command": ["sleep", "1000"]}}}, "--wait"
    )
    lab.process.kill()
    lab.process.wait(60)
    assert len(left(f"{block}-")) == 3

    again = net(small)
    again.wait("the app again", lambda: again.get("app", "nap")["status"]["phase"] == "Running")
    assert len(left(f"{block}-")) == 3, "the same block, cleared first"
    assert again.stop(signal.SIGINT) == 0
    assert left(f"{block}-") == []
    assert not [f.name for f in Path("/sys/class/net").iterdir() if f.name.startswith(f"ewl{block[-1]}")]
