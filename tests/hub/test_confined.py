"""The hub needs none of what its unit takes away (cli/service.py), as far as that can be had without systemd."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

#: no_new_privs, an empty bounding set, no memory that is both writable and executable; for children too.
CONFINE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def prctl(*args):
    if libc.prctl(*args, *[0] * (5 - len(args))):
        raise OSError(ctypes.get_errno(), f"prctl {args[0]}")
if os.geteuid() == 0:
    for capability in range(int(open("/proc/sys/kernel/cap_last_cap").read()) + 1):
        prctl(24, capability)
prctl(38, 1)
prctl(65, 1)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {k: v.strip() for k, _, v in (line.partition(":") for line in lines)}


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0,
    reason="this kernel cannot refuse executable memory (PR_SET_MDWE, Linux 6.3)",
)
def test_a_hub_works_without_any_right(tmp_path: Path) -> None:
    data = tmp_path / "hub"
    data.mkdir(mode=0o700)
    argv = [sys.executable, "-c", CONFINE, "-m", "edgeward.hub", "--data", str(data), "--die-with-parent"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ})
    try:
        deadline, state = time.monotonic() + 60, {}
        while not state.get("ready"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
            if (data / "run.json").exists():
                state = json.loads((data / "run.json").read_text())
        for pid in (state["pid"], state["nats"]):
            assert int(status(pid)["CapEff"], 16) == int(status(pid)["CapPrm"], 16) == 0
            assert status(pid)["NoNewPrivs"] == "1"
    finally:
        process.terminate()
        process.wait(30)
    assert process.returncode == 0
