"""Functions that are more than a text: a packed folder, packages from wheels, at a site that is cut."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.functions.making import wheel

MAIN = """
import json, os
from pathlib import Path
import tinygreet
from lib import shout

def handler(event, context):
    words = json.loads((Path(__file__).parent / "data.json").read_text())
    return shout.loud(tinygreet.greet(event.text() or words["who"]))
"""
FUNCTION = """\
apiVersion: edgeward/v1
kind: Function
metadata: {{name: greet}}
spec:
  runtime: python
  source: {{folder: ./src}}
  dependencies:
    lock: |
      {lock}
"""
LAB = "sites:\n  - {name: plant, nodes: 1}\n"


def _source(folder: Path) -> None:
    (folder / "lib").mkdir(parents=True)
    (folder / "main.py").write_text(MAIN)
    (folder / "data.json").write_text('{"who": "edge"}')
    (folder / "lib" / "__init__.py").write_text("")
    (folder / "lib" / "shout.py").write_text("def loud(text):\n    return text.upper()\n")


def _tried(system: Any, *args: str) -> str:
    """What a command prints; nothing while it fails, as it may while a node starts."""
    with contextlib.suppress(AssertionError):
        return str(system.run(*args))
    return ""


def test_a_folder_and_its_packages_run_at_a_site_that_is_cut_and_started_anew(
    systems: Callable[..., Any], tmp_path: Path
) -> None:
    wheels = tmp_path / "wheels"
    lock = wheel(wheels, "tinygreet", {"tinygreet.py": "def greet(who):\n    return f'hello {who}'\n"})
    _source(tmp_path / "src")
    file = tmp_path / "function.yaml"
    file.write_text(FUNCTION.format(lock=lock.strip()))
    (tmp_path / "lab" / "hub").mkdir(parents=True)
    (tmp_path / "lab" / "hub" / "hub.json").write_text(json.dumps({"packages": {"findLinks": str(wheels)}}))
    (tmp_path / "topology.yaml").write_text(LAB)
    lab = systems("lab", "lab", "up", "-f", str(tmp_path / "topology.yaml"))
    lab.run("apply", "-f", str(file), "--wait")
    assert lab.run("invoke", "greet") == "HELLO EDGE"
    version = lab.get("function", "greet")["status"]["version"]

    # the same folder is the same version; a text elsewhere in it is another one
    lab.run("apply", "-f", str(file), "--wait")
    assert lab.get("function", "greet")["status"]["version"] == version

    # cut, and everything of the node ended: it starts with what it has
    lab.run("lab", "cut", "plant", "--data", str(lab.data))

    def running() -> dict[str, int] | None:
        pids: dict[str, int] = lab.context["nodes"][0]["pids"]
        return pids if pids["agent"] and pids["plane"] else None

    pids = lab.wait("its processes", running)
    for who in ("agent", "plane"):
        os.kill(pids[who], signal.SIGKILL)
    lab.wait("a new agent", lambda: lab.context["nodes"][0]["pids"]["agent"] not in (None, pids["agent"]))
    lab.wait("a new plane", lambda: lab.context["nodes"][0]["pids"]["plane"] not in (None, pids["plane"]))
    lab.wait("it answers", lambda: "HELLO SITE" in _tried(lab, "--at", "plant-1", "invoke", "greet", "-d", "site"))


def test_a_hub_without_a_registry_is_brought_what_it_lacks(systems: Callable[..., Any], tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    lock = wheel(wheels, "tinygreet", {"tinygreet.py": "def greet(who):\n    return f'hello {who}'\n"})
    _source(tmp_path / "src")
    file = tmp_path / "function.yaml"
    file.write_text(FUNCTION.format(lock=lock.strip()))
    (tmp_path / "up" / "hub").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    packages = {"packages": {"findLinks": str(tmp_path / "empty")}}
    (tmp_path / "up" / "hub" / "hub.json").write_text(json.dumps(packages))
    up = systems("up", "up", "--port", "0")

    # a folder is the hub's to keep, and nothing is brought by looking
    up.run("--at", "plant-1", "apply", "-f", str(file), code=3)
    assert "uploaded to the hub only" in up.stderr
    up.run("apply", "-f", str(file), "--dry-run")
    up.run("diff", "-f", str(file), code=1)
    assert json.loads(up.run("functions", "blobs", "-o", "json"))["items"] == []

    up.run("apply", "-f", str(file), "--wait", code=1)  # it does not wait for what will not come

    def message() -> str:
        status = up.get("function", "greet")["status"]
        return str(status.get("message", "")) if status.get("phase") == "Degraded" else ""

    up.wait("what is missing", lambda: "tinygreet 1.0 has no wheel" in message())
    assert "edgeward functions bundle" in message()
    up.run("functions", "bundle", "-f", str(file), "--find-links", str(wheels), "--glibc", "17")
    up.wait("it runs", lambda: up.get("function", "greet")["status"].get("phase") == "Running")
    assert up.run("invoke", "greet", "-d", "you") == "HELLO YOU"
    held = json.loads(up.run("functions", "blobs", "-o", "json"))["items"]
    assert len(held) == 2 and all(b["size"] for b in held)

    # a version whose packages cannot be had leaves the one before answering, and says why
    file.write_text(FUNCTION.format(lock="nothing==1 --hash=sha256:" + "0" * 64))
    up.run("apply", "-f", str(file), "--wait", code=1)
    assert "a newer version waits" in message() and "nothing 1 has no wheel" in message()
    assert up.run("invoke", "greet", "-d", "you") == "HELLO YOU"
    (tmp_path / "src" / "main.py").unlink()  # what is deleted need not be whole any more
    (tmp_path / "src").rename(tmp_path / "elsewhere")
    up.run("delete", "-f", str(file), "--wait")
