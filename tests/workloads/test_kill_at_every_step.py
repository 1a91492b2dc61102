"""SIGKILL of the agent at every step of an app's update: old or new whole, never none, and one at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.workloads.engines import BOX, Store, a_store

from edgeward.core.proc import find_by_env

DRIVER = Path(__file__).with_name("driver.py")


def agent(data: Path, version: int, step: int, *image: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(DRIVER), str(data), str(version), str(step), *image]
    return subprocess.run(argv, capture_output=True, text=True, timeout=100)


def versions(data: Path) -> list[int]:
    """What runs: the version of each process of the app."""
    found = []
    for process in find_by_env("EDGEWARD_DATA", str(data)):
        try:
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:1] == [b"sleep"]:
            found.append(int(words[1]))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_agent_killed_at_any_step_of_an_update(tmp_path: Path) -> None:
    try:
        assert agent(tmp_path, 70_000, -1).returncode == 0
        assert versions(tmp_path) == [70_000]
        killed, old = 0, 70_000
        while True:
            new = old + 1
            cut = agent(tmp_path, new, killed)
            if cut.returncode == 0:
                break
            assert cut.returncode == -signal.SIGKILL, cut.stderr
            assert {old, new} >= set(versions(tmp_path)), "nothing else runs"
            assert versions(tmp_path), f"none ran after the kill at step {killed}"
            after = agent(tmp_path, new, -1)
            assert after.returncode == 0, f"step {killed}: {after.stderr}"
            assert versions(tmp_path) == [new], f"one whole version after the kill at step {killed}"
            killed, old = killed + 1, new
        assert killed > 20, "an update has more steps than that"
        assert len(list((tmp_path / "apps" / "default" / "web").iterdir())) <= 2, "old work files are gone"
    finally:
        for process in find_by_env("EDGEWARD_DATA", str(tmp_path)):
            os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    yield from a_store(tmp_path / "store", monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_of_a_container(tmp_path: Path, store: Store) -> None:
    """The steps at which a container or its image is made, written down, stopped and taken away."""
    data = tmp_path / "node"
    assert agent(data, 70_000, -1, BOX).returncode == 0
    assert versions(data) == [70_000]
    killed, old = 0, 70_000
    while True:
        new = old + 1
        cut = agent(data, new, killed, BOX)
        if cut.returncode == 0:
            break
        assert cut.returncode == -signal.SIGKILL, cut.stderr
        assert {old, new} >= set(versions(data)), "nothing else runs"
        assert versions(data), f"none ran after the kill at step {killed}"
        after = agent(data, new, -1, BOX)
        assert after.returncode == 0, f"step {killed}: {after.stderr}"
        assert versions(data) == [new], f"one whole version after the kill at step {killed}"
        assert len(store.names()) == 1, f"and nothing else is left of step {killed}"
        killed, old = killed + 1, new
    assert killed >= 6, "an update has more steps than that"
