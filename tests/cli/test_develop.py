"""`edgeward function`: what it writes is what it can test, serve and hand over, by the program as a user calls it."""

from __future__ import annotations

import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.functions.making import wheel

from edgeward.cli.develop import TEMPLATES

EDGEWARD = [sys.executable, "-m", "edgeward.cli.main", "function"]


def edgeward(*args: str, code: int = 0, cwd: Path) -> str:
    done = subprocess.run([*EDGEWARD, *args], capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("template", sorted(p.name for p in TEMPLATES.iterdir()))
def test_every_template_passes_its_own_events(tmp_path: Path, template: str) -> None:
    if template == "node" and shutil.which("node") is None:
        pytest.skip("there is no node on this machine")
    edgeward("new", "my-one", "-t", template, cwd=tmp_path)
    assert "0 failed" in edgeward("test", "my-one", cwd=tmp_path)
    assert "is there already" in edgeward("new", "my-one", cwd=tmp_path, code=1)


def test_a_case_that_fails_says_what_and_what_was_logged(tmp_path: Path) -> None:
    edgeward("new", "f", cwd=tmp_path)
    (tmp_path / "f/src/main.py").write_text(
        "import socket\n\ndef handler(event, context):\n    print('before')\n    if event.text() == 'loop':\n"
        "        while True: pass\n    if event.text() == 'dial':\n        socket.socket()\n    return 'y'\n"
    )
    (tmp_path / "f/function.yaml").write_text(
        (tmp_path / "f/function.yaml").read_text().replace("timeout: 2s", "timeout: 300ms")
    )
    (tmp_path / "f/events/greets.yaml").write_text(
        "name: says y\nexpect: {body: x}\n---\nname: ends\nevent: {data: loop}\nexpect: {error: timeout}\n"
        "---\nname: dials\nevent: {data: dial}\nexpect: {error: error}\n"
    )
    said = edgeward("test", "f", cwd=tmp_path, code=1)
    assert re.search(r"FAIL says y\n +body: 'y', expected 'x'\n +\| .*before\n", said)
    # the sandbox is a node's: the call that never ends is ended, and what has no network gets none
    assert "ok   ends" in said and "ok   dials" in said and "2 passed, 1 failed" in said
    told = json.loads(edgeward("test", "f", "-o", "json", "--only", "ends", cwd=tmp_path))
    assert [(r["name"], r["passed"]) for r in told["items"]] == [("ends", True)]


def test_what_cannot_be_tested_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    assert "edgeward function new NAME" in edgeward("test", cwd=tmp_path, code=2)
    assert "one of" in edgeward("new", "f", "-t", "cobol", cwd=tmp_path, code=2)
    edgeward("new", "f", cwd=tmp_path)
    assert "no case with 'zebra'" in edgeward("test", "f", "--only", "zebra", cwd=tmp_path, code=2)
    (tmp_path / "f/src/main.py").write_text("def handler(:\n")
    assert "SyntaxError" in edgeward("test", "f", cwd=tmp_path, code=1)
    config = "apiVersion: edgeward/v1\nkind: Config\nmetadata: {name: c}\nspec: {data: {}}\n"
    (tmp_path / "f/function.yaml").write_text(config)
    assert "declares no Function" in edgeward("test", "f", cwd=tmp_path, code=3)


def test_packages_of_a_lock_file_are_fetched_here_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = wheel(tmp_path / "wheels", "greeting", {"greeting.py": "WORD = 'hello by a wheel'\n"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    edgeward("new", "f", cwd=tmp_path)
    manifest = tmp_path / "f/function.yaml"
    manifest.write_text(
        manifest.read_text().replace("source:", f"dependencies: {{lock: {json.dumps(lock)}}}\n  source:")
    )
    (tmp_path / "f/src/main.py").write_text(
        "import greeting\n\ndef handler(event, context):\n    return greeting.WORD\n"
    )
    (tmp_path / "f/events/greets.yaml").write_text("expect: {body: hello by a wheel}\n")
    assert "1 passed, 0 failed" in edgeward("test", "f", cwd=tmp_path)
    (tmp_path / "wheels/greeting-1.0-py3-none-any.whl").unlink()
    assert "greeting 1.0 has no wheel" in edgeward("test", "f", cwd=tmp_path, code=3)


class Served:
    """`function run` and what it printed."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.text = process, ""
        assert process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(process.stdout, selectors.EVENT_READ)

    def until(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, self.text)):
            left = deadline - time.monotonic()
            assert left > 0 and self.process.poll() is None, self.text
            if self._selector.select(left):
                self.text += (self.process.stdout.read() or b"").decode()  # type: ignore[union-attr]
        self.text = self.text[found.end() :]
        return found


@contextmanager
def served(tmp_path: Path, *args: str) -> Iterator[Served]:
    process = subprocess.Popen(
        [*EDGEWARD, "run", *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield Served(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


def ask(url: str, data: bytes) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as answer:  # noqa: S310
        body: bytes = answer.read()
        return body


def test_a_change_of_its_files_takes_over_and_a_bad_one_does_not(tmp_path: Path) -> None:
    edgeward("new", "hello", cwd=tmp_path)
    code = tmp_path / "hello/src/main.py"
    with served(tmp_path, "hello") as run:
        url = run.until(r"route hello: (http://\S+/hello)\n").group(1)
        assert json.loads(ask(url, b'{"name": "x"}'))["hello"] == "x"
        run.until("greeting x")
        code.write_text("def handler(event, context):\n    return 'second'\n")
        run.until(r"hello \S+: Running")
        assert ask(url, b"") == b"second"
        code.write_text("def handler(event, context)\n")
        run.until(r"Degraded.*SyntaxError")
        assert ask(url, b"") == b"second"  # what ran before goes on
        (tmp_path / "hello/function.yaml").write_text("kind: [")
        run.until(r"not taken: hello/function.yaml:\d.*goes on")
        assert ask(url, b"") == b"second"
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(60) == 0
        assert "Traceback" not in run.text
