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
    pids = lab.context["nodes"][0]["pids"]
    for who in ("agent", "plane"):
        os.kill(pids[who], signal.SIGKILL)
    lab.wait("a new agent", lambda: lab.context["nodes"][0]["pids"]["agent"] not in (None, pids["agent"]))
    lab.wait("a new plane", lambda: lab.context["nodes"][0]["pids"]["plane"] not in (None, pids["plane"]))
    lab.wait("it answers", lambda: "HELLO SITE" in _tried(lab, "--at", "plant-1", "invoke", "greet", "-d", "site"))
