"""What `up` and `lab` propose can be typed as it stands, where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeward.cli import session
from edgeward.lab import view
from edgeward.lab.cli import lab_directory


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("EDGEWARD_CONTEXT", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "venv" / "bin" / "edgeward"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    monkeypatch.setattr("sys.argv", [str(program), "up"])
    return tmp_path


def test_the_usual_context_is_not_named(home: Path) -> None:
    assert view.proposals(home / "state" / "edgeward" / "context.json")[0] == "venv/bin/edgeward get nodes"


def test_another_context_is_named_first(home: Path) -> None:
    assert view.proposals(home / "my data" / "context.json")[:2] == [
        f"export EDGEWARD_CONTEXT='{home}/my data/context.json'",
        "venv/bin/edgeward get nodes",
    ]


def test_the_example_proposed_is_there(home: Path) -> None:
    def proposed() -> Path:
        line = next(p for p in view.proposals(home / "context.json") if " apply " in p)
        return Path(line.split()[3])

    assert (proposed() / "app.yaml").is_file(), "outside of a checkout"
    (home / "examples" / "01-hello-edge").mkdir(parents=True)
    assert proposed() == Path("examples/01-hello-edge")


def test_on_the_path_the_name_is_enough(home: Path) -> None:
    (home / "bin").symlink_to(home / "venv" / "bin")
    assert view.program() == "edgeward"


def test_the_lab_meant_is_that_of_the_context(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab_directory(None) == home / "state" / "edgeward" / "lab"
    monkeypatch.setenv("EDGEWARD_CONTEXT", str(home / "env" / "context.json"))
    assert lab_directory(None) == home / "env"
    monkeypatch.setattr(session.before, "context", str(home / "given" / "context.json"))
    assert lab_directory(None) == home / "given"
    assert lab_directory(home / "data") == home / "data"
