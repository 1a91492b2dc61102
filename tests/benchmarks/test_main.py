"""The run of all benchmarks: one that fails loses its own rows only, and it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.cluster import KINDS, rounds
from benchmarks.common import Row, row
from benchmarks.convergence import by_the_clock
from benchmarks.fleet import bunching

from benchmarks import __main__ as module
from benchmarks import common


def test_one_that_fails_loses_its_own_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Benchmarks\n\n{common.HEAD}\nend\n")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(common, "PAGE", page)

    def good(name: str) -> list[Row]:
        return [row(name, 1.0, "s", 2.0, base=("bare", 0.5))]

    def bad() -> list[Row]:
        raise RuntimeError("the machine caught fire")

    monkeypatch.setattr(module, "ALL", {"a": lambda: good("a"), "bad": bad, "b": lambda: good("b")})
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    assert module.main() == 1
    assert [r["name"] for r in json.loads((tmp_path / "results.json").read_text())] == ["a", "b"]
    said = capsys.readouterr()
    assert "2 of 3: bad" in said.out
    assert "failed: bad" in said.out
    assert "caught fire" in said.err
    assert "| a | 1 s | <= 2 s | yes | bare: 0.5 s | 2.0 |" in page.read_text()
    monkeypatch.setattr("sys.argv", ["benchmarks", "b"])
    assert module.main() == 0
    monkeypatch.setattr("sys.argv", ["benchmarks", "c"])
    assert module.main() == 2


def test_every_kind_of_kill_has_its_turn() -> None:
    assert rounds(15) == rounds(15)
    assert sorted(rounds(15)) == sorted(KINDS * 3)


def test_dials_that_come_together_are_told_from_those_that_are_spread() -> None:
    spread = [n / 100 for n in range(1200)]
    assert bunching(spread) == pytest.approx(1.0, abs=0.1)
    together = [float(n) for n in range(12) for _ in range(100)]
    assert bunching(together) > 3


def test_the_later_write_by_the_clock_is_not_what_a_rule_declares() -> None:
    assert by_the_clock("newest", [("hub", 1), ("heal",), ("site", 2)])
    assert by_the_clock("edge", [("hub", 1), ("heal",), ("hub", 3), ("site", 2)])
    assert not by_the_clock("cloud", [("hub", 1), ("heal",), ("hub", 3), ("site", 2)])
    assert not by_the_clock("cloud", [("hub", 1), ("heal",), ("site clock", -3600.0), ("site", 2)])
