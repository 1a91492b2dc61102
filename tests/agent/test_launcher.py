"""The launcher with real processes: releases are small programs that say that they are ready, or do not."""

from __future__ import annotations

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

#: An "agent": it says that it is ready, notes its name, and ends when it is told to.
READY = """#!{python}
import ctypes, json, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # as --die-with-parent
data = {data!r}
with open(data + "/starts", "a") as f:
    f.write({name!r} + "\\n")
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
{more}
with open(data + "/run.json.tmp", "w") as f:
    json.dump({{"pid": os.getpid(), "ready": True, "online": {online}, "name": {name!r}}}, f)
os.rename(data + "/run.json.tmp", data + "/run.json")
while True:
    signal.pause()
"""
OLD, GOOD, BAD = "a" * 64, "b" * 64, "c" * 64


class Box:
    def __init__(self, data: Path) -> None:
        self.data, self.releases = data, data / "releases"
        (data / "identity").mkdir(parents=True)
        (data / "identity" / "node.creds").write_text("")
        self.process: subprocess.Popen[bytes] | None = None

    def release(self, name: str, more: str = "", online: bool = True) -> None:
        program = self.releases / name / "bin" / "python"
        program.parent.mkdir(parents=True)
        program.write_text(
            READY.format(python=sys.executable, data=str(self.data), name=name[0], more=more, online=online)
        )
        program.chmod(0o755)

    def start(self, *more: str) -> None:
        argv = [sys.executable, "-m", "edgeward.agent.launcher", "--data", str(self.data), *more]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)

    def kill(self, sig: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(sig)
        self.process.wait(60)

    def order(self, id: str, release: str, **more: Any) -> None:
        """As an agent does it: the order, then its end."""
        doc = {"id": id, "release": release, "window": 0.2, "startup": 30.0, "link": 0.0, **more}
        scratch = self.releases / "new"
        scratch.write_text(json.dumps(doc))
        scratch.replace(self.releases / "order.json")
        os.kill(self.read("run.json")["pid"], signal.SIGTERM)

    def read(self, name: str) -> dict[str, Any]:
        try:
            doc: dict[str, Any] = json.loads((self.data / name).read_text())
        except FileNotFoundError:
            return {}
        return doc

    @property
    def state(self) -> dict[str, Any]:
        return self.read("releases/state.json")

    def starts(self) -> str:
        return "".join((self.data / "starts").read_text().split())

    def wait(self, what: str, ready: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            assert time.monotonic() < deadline, f"{what}: {self.state}, {self.starts()}"
            time.sleep(0.02)

    def runs(self, name: str) -> bool:
        run = self.read("run.json")
        return run.get("name") == name[0] and Path(f"/proc/{run['pid']}").exists()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path / "box")
    made.release(OLD)
    (made.releases / "state.json").write_text(json.dumps({"current": OLD, "starts": 0}))
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill(signal.SIGTERM)
    pid = made.read("run.json").get("pid")
    if pid and OLD.encode() in b"".join(p.read_bytes() for p in Path("/proc").glob(f"{pid}/cmdline")):
        os.kill(pid, signal.SIGKILL)


def test_from_one_to_the_other_and_back_from_a_bad_one(box: Box) -> None:
    box.release(GOOD)
    box.release(BAD, "sys.exit(3)")
    box.start()
    box.wait("the old one", lambda: box.runs(OLD))
    box.order("1", GOOD)
    box.wait("the new one", lambda: box.state.get("current") == GOOD and box.runs(GOOD))
    assert box.state["previous"] == OLD
    box.order("2", BAD)
    box.wait("back", lambda: box.state.get("failed") == "2" and box.runs(GOOD))
    assert "status 3" in box.state["failedWhy"]
    assert box.starts() == "abcccb"
    # what has proven itself is started again when it ends
    os.kill(box.read("run.json")["pid"], signal.SIGKILL)
    box.wait("again", lambda: box.starts() == "abcccbb" and box.runs(GOOD))
    box.kill(signal.SIGTERM)
    assert box.process is not None
    assert box.process.returncode == 0
    assert not box.runs(GOOD)


def test_one_that_is_never_ready_and_one_that_does_not_reach_the_hub(box: Box) -> None:
    box.release(BAD, "signal.pause()")
    box.release(GOOD, online=False)
    box.start()
    box.wait("the old one", lambda: box.runs(OLD))
    box.order("1", BAD, startup=0.5)
    box.wait("back", lambda: box.state.get("failed") == "1" and box.runs(OLD))
    assert "not ready" in box.state["failedWhy"]
    box.order("2", GOOD, link=1.0)
    box.wait("back", lambda: box.state.get("failed") == "2" and box.runs(OLD))
    assert "hub" in box.state["failedWhy"]
    assert box.state["current"] == OLD


def test_the_power_goes_in_the_middle(box: Box) -> None:
    """The launcher is killed whenever the new one is on trial: in the end the old one runs, and says why."""
    box.release(BAD, "signal.pause()")
    box.start()
    box.wait("the old one", lambda: box.runs(OLD))
    box.order("1", BAD)
    for n in (1, 2, 3):
        box.wait("the trial", lambda n=n: box.starts().count("c") == n)  # type: ignore[misc]
        box.kill()
        assert box.state["trying"]["release"] == BAD
        box.start()
    box.wait("back", lambda: box.state.get("failed") == "1" and box.runs(OLD))
    assert "stopped while" in box.state["failedWhy"]
    second = subprocess.run(
        [sys.executable, "-m", "edgeward.agent.launcher", "--data", str(box.data)],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert second.returncode == 1


def test_a_supervisor_sees_what_ends(box: Box) -> None:
    box.release(BAD, "sys.exit(3)")
    box.start("--supervised")
    box.wait("the old one", lambda: box.runs(OLD))
    # a trial and the way back from it are the launcher's own
    box.order("1", BAD)
    box.wait("back", lambda: box.state.get("failed") == "1" and box.runs(OLD))
    assert box.process is not None
    assert box.process.poll() is None
    os.kill(box.read("run.json")["pid"], signal.SIGKILL)
    assert box.process.wait(60) == 128 + signal.SIGKILL


def test_state_that_cannot_be_read_and_a_release_that_is_gone(box: Box) -> None:
    (box.releases / OLD / "bin" / "python").unlink()
    box.release(GOOD)
    (box.releases / "state.json").write_text(json.dumps({"current": OLD, "previous": GOOD}))
    box.start()
    box.wait("what was before", lambda: box.runs(GOOD))
    assert box.state["current"] == GOOD
