"""What all long-running processes share: the metrics' text, the number of open files."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from edgeward.core.daemon import RunFile, metrics_text
from edgeward.core.files import read_json


def test_metrics_are_written_in_full_with_their_type_and_meaning() -> None:
    text = metrics_text(
        {
            'ew_pending{queue="b"}': 0.0,
            'ew_pending{queue="a"}': 2.0,
            "ew_pending_bytes": 123456789.0,
            "ew_sent_total": 53000123.0,
            "ew_at": 1795600229.574,
        },
        {"ew_sent_total": "Readings sent."},
    )
    assert text.splitlines() == [
        "# TYPE ew_at gauge",
        "ew_at 1795600229.574",
        "# TYPE ew_pending_bytes gauge",
        "ew_pending_bytes 123456789",
        "# TYPE ew_pending gauge",
        'ew_pending{queue="a"} 2',
        'ew_pending{queue="b"} 0',
        "# HELP ew_sent_total Readings sent.",
        "# TYPE ew_sent_total counter",
        "ew_sent_total 53000123",
    ]
    assert text.endswith("\n")


def test_the_file_limit_is_raised_as_far_as_it_goes() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    program = (
        "import resource; from edgeward.core.daemon import raise_file_limit;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}));"
        "print(raise_file_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.split() == [str(hard), str(hard)]


def test_a_record_that_cannot_be_written_ends_nobody_and_is_written_later(tmp_path: Path) -> None:
    """A full disk is such a place: the agent and the plane go on."""
    folder = tmp_path / "d"
    record = RunFile(folder)
    folder.mkdir()
    record.write(state="a")
    folder.rmdir()
    record.write(state="a")
    assert read_json(folder)["state"] == "a"
