"""The protocol's own suite, held against Python, Node, a worker in Perl that has no SDK; and a bad one is caught."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from edgeward.functions import conformance, origins

WORKERS = Path(__file__).with_name("workers")
SERVE = "import os, socket; from edgeward.functions import sdk; sdk.serve(socket.socket(fileno=int(os.environ[{!r}])))"


def test_the_python_sdk_keeps_to_the_protocol() -> None:
    argv = [sys.executable, "-c", SERVE.format(conformance.WORKER_ENV)]
    assert conformance.check(argv, files={"main.py": (WORKERS / "main.py").read_text()}) == {}


def test_the_node_sdk_keeps_to_the_protocol() -> None:
    if shutil.which("node") is None:
        pytest.skip("there is no node on this machine (scripts/system-packages.sh installs it)")
    assert conformance.check(["node", origins.NODE_SDK], WORKERS) == {}


def test_a_worker_without_sdk_keeps_to_the_protocol() -> None:
    if shutil.which("perl") is None:
        pytest.skip("there is no perl on this machine")
    assert conformance.check(["perl", str(WORKERS / "worker.pl")]) == {}


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("text('perl')", "text('perl'), die 'no'", "says Ready when it was told what it is to run"),
        ("$codes[0], $n) if $codes[0] && $n < 256", "$codes[0], $n) if $codes[0] && $n < 200", None),
        ("$n < 65536", "$n < 70000", "reads and writes frames of every length"),
        ("0xcf => [8, 'Q>'],", "", "reads every width of msgpack"),
        ("whole(21), text($id)", "whole(21), text('other')", "answers in pieces"),
        ("whole(30)", "whole(40)", "logs a line with the call's id"),
        ("exit 0 unless $got;", "select(undef, undef, undef, 0.1) unless $got;", "ends when its socket closes"),
        ("text('too-large')", "text('error')", "says that an answer is too large, and goes on"),
    ],
    ids=["no-ready", "a-wider-form-is-right", "length", "width", "id", "level", "stays", "kind"],
)
def test_a_worker_that_does_not_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, wrong: str | None
) -> None:
    if shutil.which("perl") is None:
        pytest.skip("there is no perl on this machine")
    if "select" in new:
        monkeypatch.setattr(conformance, "ENDING", 1.0)  # this one is waited for in vain
    text = (WORKERS / "worker.pl").read_text()
    assert old in text
    worker = tmp_path / "worker.pl"
    worker.write_text(text.replace(old, new))
    assert list(conformance.check(["perl", str(worker)])) == ([wrong] if wrong else [])


def test_the_command_line_says_what_holds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("perl") is None:
        pytest.skip("there is no perl on this machine")
    monkeypatch.setattr(sys, "argv", ["conformance", "--", "perl", str(WORKERS / "worker.pl")])
    with pytest.raises(SystemExit) as e:
        conformance.main()
    assert e.value.code == 0
    assert capsys.readouterr().out.count("ok ") == len(conformance.CHECKS) + 1
