"""The tutorial, word by word: its files, its commands and its program, in its order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def test_the_tutorial_holds(systems: Callable[..., Any], tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.S | re.M)
    assert [language for language, _ in blocks] == ["text", "sh", "sh", "sh", "python", "sh", "sh", "sh"]
    (tmp_path / "lab.yaml").write_text(blocks[0][1])
    setup, lab_up = blocks[1][1].splitlines()
    assert setup == "make setup"
    words = lab_up.replace("/tmp/lab.yaml", str(tmp_path / "lab.yaml")).split()
    assert words[0] == ".venv/bin/edgeward"
    assert words[-2:] == ["--data", "/tmp/tutorial"]
    lab = systems("tutorial", *words[1:-2])

    program = tmp_path / "edgeward"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m edgeward "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "EDGEWARD_CONTEXT": str(lab.data / "context.json"), "NO_COLOR": "1", "COLUMNS": "200"}

    def shell(text: str) -> str:
        text = text.replace("/tmp/tutorial", str(lab.data)).replace(".venv/bin/edgeward", str(program))
        done = subprocess.run(
            ["bash", "-euc", text], cwd=ROOT, env=env, capture_output=True, text=True, timeout=90, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    nodes = shell(blocks[2][1])
    assert nodes.count("online") == 2
    assert "bad-dsl" in nodes
    described = shell(blocks[3][1])
    port, host = re.search(r"http: (\d+)", described), re.search(r"address: (\S+)", described)
    assert port and host, described
    assert (
        shell(f"python3 -c \"import urllib.request as u; print(u.urlopen('http://{host[1]}:{port[1]}').status)\"")
        == "200\n"
    )
    subprocess.run([sys.executable, "-c", blocks[4][1]], env=env, timeout=60, check=True)
    lab.wait("ten readings", lambda: shell(blocks[5][1]).count("celsius") == 10)
    shell(blocks[6][1])
    subprocess.run(
        [sys.executable, "-c", blocks[4][1].replace('"id": n', '"id": 100 + n')], env=env, timeout=60, check=True
    )
    heal, journal, get, read = blocks[7][1].splitlines()
    shell(heal)
    lab.wait("the journal", lambda: "hello" in shell(journal))
    lab.wait("the site's change at the hub", lambda: "shift: night" in shell(get))
    assert "shift: night" in shell(get + " --at plant-1")
    lab.wait("all twenty", lambda: shell(read).count("celsius") == 20)
