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
    assert [language for language, _ in blocks] == ["yaml", "sh", "sh", "sh", "python", *["sh"] * 6]
    for n, name in ((0, "lab.yaml"), (4, "publish.py")):
        assert f"/tmp/{name}" in page
        (tmp_path / name).write_text(blocks[n][1])
    setup, lab_up = blocks[1][1].splitlines()
    assert setup == "make setup"
    words = lab_up.replace("/tmp/lab.yaml", str(tmp_path / "lab.yaml")).split()
    assert words[0] == ".venv/bin/edgeward"
    assert words[-2:] == ["--data", "/tmp/tutorial"]
    lab = systems("tutorial", *words[1:-2])

    program = tmp_path / "edgeward"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m edgeward "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "EDGEWARD_CONTEXT": str(lab.data / "context.json"), "NO_COLOR": "1"}

    def shell(text: str) -> str:
        for said, is_ in (
            ("/tmp/tutorial", str(lab.data)),
            ("/tmp/publish.py", str(tmp_path / "publish.py")),
            (".venv/bin/edgeward", str(program)),
            (".venv/bin/python", sys.executable),
        ):
            text = text.replace(said, is_)
        done = subprocess.run(
            ["bash", "-euc", text], cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    lab.wait("both nodes heard", lambda: shell(blocks[2][1]).count("online") == 2)  # "ready" does not wait for ever
    assert "bad-dsl" in shell(blocks[2][1])
    described = shell(blocks[3][1])
    port, host = re.search(r"http: (\d+)", described), re.search(r"address: (\S+)", described)
    assert port and host, described
    assert (
        shell(f"python3 -c \"import urllib.request as u; print(u.urlopen('http://{host[1]}:{port[1]}').status)\"")
        == "200\n"
    )
    # a reader of the page is slower than the capture; a test need not be
    lab.wait("the capture", lambda: "plant-1" in lab.get("export", "line1")["status"]["nodes"])
    lab.wait("the stream", lambda: "line1" in lab.run("stream", "list"))
    assert shell(blocks[5][1]) == "", "publishing says nothing"
    lab.wait("ten readings", lambda: shell(blocks[6][1]).count("celsius") == 10)
    assert "Running" in shell(blocks[7][1])
    shell(blocks[8][1])
    assert shell(blocks[6][1]).count("celsius") == 10, "the link is cut"
    shell(blocks[9][1])
    journal, get, read = blocks[10][1].splitlines()
    lab.wait("the journal", lambda: "hello" in shell(journal))
    lab.wait("the site's change at the hub", lambda: "shift: night" in shell(get))
    assert "shift: night" in shell(get + " --at plant-1")
    lab.wait("all twenty", lambda: shell(read).count("celsius") == 20)
    ids = re.findall(r'"id": ?(\d+)', shell(read + " -o json"))
    assert len(set(ids)) == 20
    assert ids == sorted(ids, key=int), "each once, in order"
