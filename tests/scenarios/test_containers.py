"""A program in a container as a user meets it: declared, found by its Service, followed, and gone without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.scenarios.conftest import ROOT
from tests.workloads.engines import BOX, Store, a_store

from edgeward.core import proc

WEB = f"""\
apiVersion: edgeward/v1
kind: App
metadata: {{name: web}}
spec:
  container:
    image: {BOX}
    args: ['echo "serving $$WORD"; echo "$$WORD" > /tmp/index.html; exec httpd -f -p 8080 -h /tmp']
    env: {{WORD: hello}}
    ports: {{http: 8080}}
  ports: [{{name: http}}]
  health: {{http: {{port: http}}}}
  stop: {{grace: 1s}}
  limits: {{pids: 50}}
---
apiVersion: edgeward/v1
kind: Service
metadata: {{name: web}}
spec: {{app: web, port: http}}
---
apiVersion: edgeward/v1
kind: Route
metadata: {{name: web}}
spec: {{path: /index.html, to: {{service: web}}}}
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    yield from a_store(tmp_path / "store", monkeypatch)


def test_a_container_on_a_node_of_up(store: Store, systems: Callable[..., Any]) -> None:
    up = systems("a", "up", "--port", "0")
    up.run("apply", "-f", "-", "--wait", stdin=WEB)
    (one,) = up.get("app", "web")["status"]["instances"]
    assert one["image"].startswith("sha256:")
    assert up.get("node", "plant-1")["status"]["containers"] == {"engine": "podman"}
    assert "serving hello" in up.run("logs", "web")
    look = "echo $WORD; hostname; cat; exit 5"
    out = up.run("exec", "--app", "web", "--", "sh", "-c", look, stdin="typed\n", code=5)
    assert (out.splitlines()[0], out.splitlines()[-1]) == ("hello", "typed")
    stays_not(up)
    direct = f"http://127.0.0.1:{one['ports']['http']}"

    def says(url: str = direct) -> str:
        ask = f"{url}/index.html"
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(ask, timeout=30) as got:  # noqa: S310
            return str(got.read().decode())
        return ""

    assert says() == "hello\n"
    up.wait("the gateway", lambda: says(up.context["nodes"][0]["gateway_url"]) == "hello\n")
    agent = up.context["nodes"][0]["pids"]["agent"]
    os.kill(agent, signal.SIGKILL)
    up.wait("another agent", lambda: up.context["nodes"][0]["pids"]["agent"] not in (None, agent))
    assert says() == "hello\n", "it outlives its agent"
    up.run("apply", "-f", "-", "--wait", stdin=WEB.replace("WORD: hello", "WORD: again"))
    running = [i for i in up.get("app", "web")["status"]["instances"] if i["phase"] == "Running"]
    assert [i["id"] for i in running] != [one["id"]], "what --wait waited for"
    up.run("delete", "app/web", "service/web", "route/web")
    up.wait("nothing of it", lambda: store.names() == [])
    assert json.loads(up.run("get", "apps", "-o", "json"))["items"] == []


def stays_not(up: Any) -> None:
    """A program inside a container is asked to end with its session, and is gone."""
    argv = [
        "exec",
        "--app",
        "web",
        "--",
        "sh",
        "-c",
        "trap 'echo asked; exit 9' TERM; echo on; while :; do sleep 1; done",
    ]
    env = {**os.environ, "EDGEWARD_CONTEXT": str(up.data / "context.json")}
    running = subprocess.Popen([sys.executable, "-m", "edgeward", *argv], env=env, stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.readline() == b"on\n"
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=60)
    assert (out, running.returncode) == (b"asked\n", 9)
    running = subprocess.Popen(
        [sys.executable, "-m", "edgeward", *argv[:-1], "trap '' TERM; echo on; while :; do sleep 1; done"],
        env=env, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == b"on\n"
    (here,) = [p for p in inner() if b"trap '' TERM" in Path(f"/proc/{p.pid}/cmdline").read_bytes()]
    running.send_signal(signal.SIGTERM)
    running.send_signal(signal.SIGINT)  # a second one ends the session, whatever the program says
    running.communicate(timeout=60)
    assert proc.wait_exit_blocking(here, 60)


def inner() -> list[proc.ProcId]:
    """Programs that sessions run inside this test's containers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if b"EDGEWARD_SESSION=" in path.read_bytes() and (p := proc.identify(int(path.parent.name))):
                found.append(p)
    return found


def the_next_comes_before_its_run(up: Any, store: Store, folder: Path, running: str) -> None:
    """The image of a version that waits for a person's word is here; nothing of it runs until then."""
    group = {"name": "all", "approval": True}
    policy = {"targets": [{"kind": "App", "name": "page"}], "groups": [group], "healthWindow": "1s"}
    up.apply({"kind": "Rollout", "metadata": {"name": "page"}, "spec": policy})

    def status() -> dict[str, Any]:
        return dict(up.get("rollout", "page").get("status") or {})

    up.wait("the baseline", lambda: status().get("phase") == "Succeeded")
    files = {"www/index.html": "two"}
    id = store.box("localhost/page:2", **files)
    store.podman("save", "--quiet", "--output", str(folder / "next.tar"), "localhost/page:2")
    store.podman("rmi", "--force", "localhost/page:2")
    text = (folder / "app.yaml").read_text().replace("archive: page.tar", "archive: next.tar")
    text = text.replace("    ports: {http: 8080}", "    args: [exec httpd -f -p 8080 -h /www]\n    ports: {http: 8080}")
    (folder / "next.yaml").write_text(text)
    up.run("apply", "-f", str(folder / "next.yaml"))
    up.wait("the image", lambda: status().get("phase") == "Paused" and status().get("prefetched") == 1)
    assert store.has(id)
    assert [i["id"] for i in up.get("app", "page")["status"]["instances"]] == [running]
    assert "1 nodes have all" in up.run("rollout", "status", "page")
    up.run("rollout", "approve", "page")
    up.wait("the run", lambda: status()["phase"] == "Succeeded")
    (two,) = [i for i in up.get("app", "page")["status"]["instances"] if i["phase"] == "Running"]
    with urllib.request.urlopen(f"http://127.0.0.1:{two['ports']['http']}/", timeout=30) as got:
        assert got.read() == b"two"


def test_an_image_comes_through_the_hub(store: Store, systems: Callable[..., Any], tmp_path: Path) -> None:
    """examples/09-container as its README says, on a node that does not have the image."""
    folder = tmp_path / "example"
    shutil.copytree(ROOT / "examples" / "09-container", folder)
    subprocess.run(["sh", str(folder / "box.sh")], check=True, timeout=120)
    store.podman("rmi", "--force", "localhost/page:1")
    up = systems("a", "up", "--port", "0")
    up.run("apply", "-f", str(folder / "app.yaml"), "--wait")
    (one,) = up.get("app", "page")["status"]["instances"]
    assert one["image"].startswith("sha256:")
    with urllib.request.urlopen(f"http://127.0.0.1:{one['ports']['http']}/", timeout=30) as got:
        assert b"the image came through the hub" in got.read()
    assert store.has("localhost/page:1")
    the_next_comes_before_its_run(up, store, folder, str(one["id"]))
    up.run("delete", "-f", str(folder / "app.yaml"))
    up.wait("the image is gone", lambda: not store.has("localhost/page:1"))
    refused = up.run("--at", "plant-1", "apply", "-f", str(folder / "app.yaml"), code=3)
    assert refused == ""
