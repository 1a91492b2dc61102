"""The tutorial, typed word by word: every command of it against the lab that it starts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


class Reader:
    """Somebody who types what the page says, with their own folder instead of /tmp."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = dict(os.environ)
        self.lab: subprocess.Popen[bytes] | None = None
        for language, name in (("yaml", "lab.yaml"), ("python", "publish.py")):
            (text,) = blocks(language)
            assert f"/tmp/{name}" in PAGE
            (folder / name).write_text(text)

    def line(self, text: str) -> str:
        text = text.replace("/tmp/", f"{self.folder}/")
        name, _, value = text.removeprefix("export ").partition("=")
        if text.startswith("export "):
            self.env[name] = value
            return ""
        words = text.split()
        if words == ["make", "setup"]:
            return ""  # this interpreter is what it makes
        program, *rest = words
        argv = [sys.executable, *rest] if program == ".venv/bin/python" else [sys.executable, "-m", "edgeward", *rest]
        assert program in (".venv/bin/python", ".venv/bin/edgeward"), text
        if rest[:2] == ["lab", "up"]:
            self.lab = subprocess.Popen(argv, cwd=ROOT, env=self.env, stdout=subprocess.DEVNULL)
            until(lambda: self.folder.joinpath("tutorial", "context.json").exists())
            return ""
        done = subprocess.run(argv, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=130)
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        return done.stdout

    def block(self, n: int) -> list[str]:
        return [self.line(text) for text in blocks("sh")[n].splitlines()]


def until(true: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    one = Reader(tmp_path)
    yield one
    if one.lab is not None:
        one.lab.send_signal(signal.SIGINT)
        one.lab.wait(60)


def test_it_holds_word_by_word(reader: Reader) -> None:
    assert len(blocks("sh")) == 9
    reader.block(0)
    _, nodes, links = reader.block(1)
    assert "plant-1" in nodes and "bad-dsl" in links
    _, described = reader.block(2)
    assert "http:" in described and "address:" in described
    reader.block(3)
    until(lambda: len(readings(reader)) == 10)
    assert reader.block(4)[0].count("celsius") == 10
    _, app, *_ = reader.block(5)
    assert "Running" in app
    reader.block(6)
    assert len(readings(reader)) == 10, "the link is cut"
    reader.block(7)
    until(lambda: len(readings(reader)) == 20)
    until(lambda: "shift: night" in reader.line(".venv/bin/edgeward get app hello -o yaml"))
    journal, app, stream = reader.block(8)
    assert "App/hello" in journal and "cloud" in journal
    assert "shift: night" in app
    assert stream.count("celsius") == 20
    ids = [r["id"] for r in readings(reader)]
    assert ids == sorted(set(ids)), "each once, in order"


def readings(reader: Reader) -> list[dict[str, int]]:
    lines = reader.line(".venv/bin/edgeward stream read line1 --from 0 -o json").splitlines()
    return [json.loads(line)["payload"] for line in lines]
