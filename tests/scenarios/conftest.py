"""Whole systems for the scenarios: the real program, started as a user starts it, ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeward.cli.client import connect
from edgeward.cli.kinds import load_kinds
from edgeward.core.errors import NotFound, Unreachable
from edgeward.core.proc import find_by_env

ROOT = Path(__file__).parents[2]


class System:
    """One running `up`, `lab up` or `demo`, and the program to talk to it."""

    def __init__(self, data: Path, *command: str, timeout: float = 180.0) -> None:
        self.data = data
        self.ready_file = data.parent / f"{data.name}.ready"
        self.log = data.parent / f"{data.name}.log"
        argv = [sys.executable, "-m", "edgeward", *command, "--data", str(data), "--ready-file", str(self.ready_file)]
        self.ready_file.unlink(missing_ok=True)  # of an earlier run on the same directory
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        self.wait("ready", self.ready_file.exists, timeout)

    def wait(self, what: str, ready: Callable[[], Any], timeout: float = 120.0) -> Any:
        """What ``ready`` gives at last; a key or an item that is missing is not there yet. The time-out guards only."""
        deadline = time.monotonic() + timeout
        while True:
            got = None
            with contextlib.suppress(KeyError, IndexError):
                got = ready()
            if got:
                return got
            assert self.process.poll() is None, f"it ended: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{self.log.read_text()}"
            time.sleep(0.05)

    @property
    def context(self) -> dict[str, Any]:
        doc: dict[str, Any] = json.loads((self.data / "context.json").read_text())
        return doc

    def run(self, *args: str, code: int = 0, stdin: str = "", timeout: float = 120.0) -> str:
        """The program's standard output; asserts its exit code."""
        done = self._program(args, stdin, timeout)
        assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        self.stderr = done.stderr
        return done.stdout

    def attempt(self, *args: str) -> str:
        """Its output; "" when it fails: for waits until it does not."""
        done = self._program(args)
        return done.stdout if done.returncode == 0 else ""

    def _program(
        self, args: tuple[str, ...], stdin: str = "", timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "EDGEWARD_CONTEXT": str(self.data / "context.json"), "NO_COLOR": "1", "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "edgeward", *args],
            input=stdin, capture_output=True, text=True, env=env, timeout=timeout,
        )  # fmt: skip

    def get(self, *args: str) -> dict[str, Any]:
        doc: dict[str, Any] = json.loads(self.run("get", *args, "-o", "json"))
        return doc

    def peek(self, kind: str, name: str = "", at: str = "") -> dict[str, Any]:
        """What ``get`` gives, with no program for each look: for waits. ``KeyError``: it does not give it yet."""
        with connect(str(self.data / "context.json"), at or None) as api:
            found = load_kinds().get(kind)
            try:
                return api.get(found, "default", name) if name else api.list(found, "default")
            except (NotFound, Unreachable) as e:
                raise KeyError(str(e)) from e

    def apply(self, doc: dict[str, Any] | list[dict[str, Any]], *args: str, code: int = 0) -> str:
        docs = doc if isinstance(doc, list) else [doc]
        text = "\n---\n".join(json.dumps({"apiVersion": "edgeward/v1", **d}) for d in docs)
        return self.run("apply", "-f", "-", *args, stdin=text, code=code)

    def processes(self) -> list[int]:
        """Everything that belongs to its nodes."""
        nodes = self.data / "nodes"
        found = []
        for node in nodes.iterdir() if nodes.is_dir() else []:
            found += [p.pid for p in find_by_env("EDGEWARD_DATA", str(node))]
        return found

    @staticmethod
    def contents(root: Path) -> Iterator[tuple[Path, int, bytes]]:
        """Every file below ``root``, its mode and what is in it; what goes away under our eyes is left out."""
        for folder, _, names in os.walk(root):
            for path in (Path(folder) / name for name in names):
                if not path.is_file() or path.is_symlink():
                    continue
                try:
                    with path.open("rb") as file:
                        mode, content = os.fstat(file.fileno()).st_mode, file.read()
                except FileNotFoundError:
                    continue
                yield path, mode, content

    def stop(self, sig: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(120)

    def close(self) -> None:
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole systems on a slow machine take their time; the common limit is for the other tests."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture
def systems(tmp_path: Path) -> Iterator[Callable[..., System]]:
    """Starts systems by their command line, e.g. ``systems("a", "up")``."""
    made: list[System] = []

    def start(name: str, *command: str) -> System:
        made.append(System(tmp_path / name, *command))
        return made[-1]

    yield start
    for system in made:
        system.close()


@pytest.fixture
def lab(systems: Callable[..., System], tmp_path: Path) -> Callable[[str], System]:
    """Starts a lab of a topology text."""

    def start(topology: str) -> System:
        file = tmp_path / "lab.yaml"
        file.write_text(topology)
        return systems("lab", "lab", "up", "-f", str(file))

    return start
