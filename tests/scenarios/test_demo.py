"""The main job, as its README says."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

FIELDS = (  # noqa: SIM905 - as the issue lists them
    "edge_p50_ms edge_p99_ms cloud_p50_ms cloud_p99_ms sent received duplicates lost out_of_order offline_requests "
    "offline_failures offline_restart_s backlog_first_s backlog_done_s local_change_applied hub_pss_mb agent_pss_mb "
    "nats_pss_mb enforced"
).split()


@pytest.mark.slow
def test_the_demo_holds(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeward", "demo", "--json", "--data", str(tmp_path / "d")],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(FIELDS) <= set(result)
    assert result["sent"] >= 1000
    assert result["received"] == result["sent"]
    assert (result["lost"], result["duplicates"], result["out_of_order"]) == (0, 0, 0)
    assert result["offline_requests"] >= 100
    assert result["offline_failures"] == 0
    assert result["local_change_applied"] is True
    assert isinstance(result["enforced"], list)


def test_what_did_not_hold_fails_it_and_the_result_has_every_field(tmp_path: Path) -> None:
    """A port of the hub's that somebody else has: the first act fails, and a script still gets its line."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "edgeward", "demo", "--json", "--data", str(tmp_path / "d"), "--port", port],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "did not hold" in done.stdout
    assert set(json.loads(done.stdout.splitlines()[-1])) == set(FIELDS)
    left = [c for c in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path / "d").encode() in read(c)]
    assert left == [], "no process outlives it"


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
