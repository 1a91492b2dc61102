"""A node's agent becomes another release by itself, and comes back from a bad one by itself; its app serves on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import site
import subprocess
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeward.core.natsserver import free_port
from edgeward.core.proc import find_by_env

ROOT = Path(__file__).parents[2]
SERVER = "import http.server as h;h.HTTPServer(('127.0.0.1', {port}), h.SimpleHTTPRequestHandler).serve_forever()"
MAIN = "edgeward/agent/__main__.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree's wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    (made,) = folder.glob("*.whl")
    return made


def wheels(wheel: Path, folder: Path, version: str, main: str = "") -> Path:
    """A folder of wheels: that of another version, and what stands for its dependencies, which are this environment's.
    ``main``: what the agent's program begins with."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(folder / f"edgeward-{version}-py3-none-any.whl", "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename == "edgeward/__init__.py":
                data, count = re.subn(rb'__version__ = "[^"]*"', f'__version__ = "{version}"'.encode(), data)
                assert count == 1
            new.writestr(info, main.encode() + data if info.filename == MAIN else data)
    with zipfile.ZipFile(folder / "dependencies-1-py3-none-any.whl", "w") as z:
        z.writestr("dependencies.pth", "\n".join(site.getsitepackages()) + "\n")
        z.writestr("dependencies-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: dependencies\nVersion: 1\n")
    return folder


class Box:
    """A box that joined, and its launcher."""

    def __init__(self, data: Path) -> None:
        self.data, self.log = data, data.with_suffix(".log")
        with self.log.open("ab") as out:
            argv = [sys.executable, "-m", "edgeward.agent.launcher", "--data", str(data)]
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        for name, value in (("EDGEWARD_NATS_DIR", self.data / "nats"), ("EDGEWARD_DATA", self.data)):
            for p in find_by_env(name, str(value)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(p.pid, signal.SIGKILL)


@pytest.fixture
def boxes() -> Iterator[list[Box]]:
    made: list[Box] = []
    yield made
    for one in made:
        one.close()


class Client(threading.Thread):
    """Asks an app all the time."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.answers, self.failures = port, 0, list[str]()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=30) as answer:
                    answer.read()
                self.answers += 1
            except OSError as e:
                self.failures.append(str(e))


@pytest.mark.slow
def test_to_another_release_and_back_from_bad_ones(
    systems: Callable[..., Any], boxes: list[Box], wheel: Path, tmp_path: Path
) -> None:
    up = systems("hub", "up")
    token = up.run("token", "create", "--site", "plant", "--node", "box-1", "--ttl", "1h").split()[-1]
    data = tmp_path / "box"
    up.run("join", token, "--enrol-only", "--data", str(data))
    boxes.append(Box(data))
    up.wait("the box", lambda: up.get("node", "box-1")["status"].get("online"))
    assert up.get("node", "box-1")["status"]["release"] == "installed"
    up.run("label", "node", "box-1", "kind=box")
    port = free_port()
    up.apply(
        {
            "kind": "App",
            "metadata": {"name": "web"},
            "spec": {
                "placement": {"nodeSelector": {"kind": "box"}},
                "process": {"command": [sys.executable, "-c", SERVER.format(port=port)]},
            },
        },
        "--wait",
    )

    def pid() -> int:
        (instance,) = up.get("app", "web")["status"]["instances"]
        return int(instance["pid"])

    def node() -> dict[str, Any]:
        found: dict[str, Any] = up.get("node", "box-1")["status"]
        return found

    def here(name: str = "agent") -> dict[str, Any]:
        found: dict[str, Any] = up.get("release", name, "-n", "edgeward")["status"]["nodes"]["box-1"]
        return found

    def rollout() -> dict[str, Any]:
        found: dict[str, Any] = up.get("rollout", "agent", "-n", "edgeward")["status"]
        return found

    one, first = pid(), wheels(wheel, tmp_path / "w1", "0.1.1")
    client = Client(port)
    up.wait("it serves", lambda: not _fails(port))
    client.start()

    # without a Rollout the node takes what is declared
    doc = up.run("release", "create", "agent", "--wheels", str(first), "--print")
    (tmp_path / "release.yaml").write_text(
        doc + "  health: {window: 1s, startup: 2m, link: 2m}\n  placement: {nodeSelector: {kind: box}}\n"
    )
    up.run("apply", "-f", str(tmp_path / "release.yaml"))
    up.wait("0.1.1", lambda: here()["phase"] == "Running" and node()["version"] == "0.1.1")
    assert node()["release"] != "installed"
    assert pid() == one

    # group by group from now on
    up.apply(
        {
            "kind": "Rollout",
            "metadata": {"name": "agent", "namespace": "edgeward"},
            "spec": {
                "targets": [{"kind": "Release", "name": "agent"}],
                "healthWindow": "500ms",
                "timeout": "3m",
            },
        }
    )
    up.wait("the baseline", lambda: rollout()["phase"] == "Succeeded")
    up.run("release", "create", "agent", "--wheels", str(wheels(wheel, tmp_path / "w2", "0.1.2")))
    assert "Succeeded" in up.run("rollout", "status", "agent", "-n", "edgeward", "--wait", "--timeout", "5m")
    up.wait("0.1.2", lambda: node()["version"] == "0.1.2")

    # one that ends when it is started, and one that does not load
    ends = "import sys\nif '--check' not in sys.argv:\n    sys.exit(3)\n"
    for n, (main, why) in enumerate(((ends, "status 3"), ("import edgeward.nothing\n", "edgeward.nothing"))):
        bad = wheels(wheel, tmp_path / f"bad{n}", f"0.2.{n}", main)
        up.run("release", "create", "agent", "--wheels", str(bad))
        out = up.run("rollout", "status", "agent", "-n", "edgeward", "--wait", "--timeout", "5m", code=1)
        assert "RolledBack" in out
        assert why in out
        up.wait("it is back", lambda: here()["phase"] == "Running" and node()["online"])
        assert node()["version"] == "0.1.2"
    assert "status 3" in node()["releaseFailed"]
    state = json.loads((data / "releases" / "state.json").read_text())
    kept = {p.name for p in (data / "releases").iterdir() if re.fullmatch("[0-9a-f]{64}", p.name)}
    assert {state["current"], state["previous"]} <= kept

    client.over.set()
    client.join(60)
    assert pid() == one
    assert client.answers
    assert client.failures == []


def _fails(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return bool(answer.status != 200)
    except OSError:
        return True
