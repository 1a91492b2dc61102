"""A clock that does not step, over restarts of the process and of the machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edgeward.core import clock

DAY = 86400.0


class Wall:
    """Stands for the module ``time``."""

    def __init__(self, step: list[float]) -> None:
        self._step = step

    def time(self) -> float:
        return time.time() + self._step[0]

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


def test_steady_goes_on_when_the_clock_is_set_and_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = [0.0]
    monkeypatch.setattr(clock, "time", Wall(step))
    monkeypatch.setattr(clock, "_base", [0.0])
    monkeypatch.setattr(clock, "boot", lambda: "one")
    file = tmp_path / "clock.json"
    clock.keep_steady(file)
    assert abs(clock.steady() - clock.now()) < 60
    for by in (DAY, -DAY, -50 * 365 * DAY):
        step[0] = by
        assert abs(clock.now() - clock.steady() - by) < 60
    monkeypatch.setattr(clock, "_base", [0.0])  # another process
    clock.keep_steady(file)
    assert abs(clock.now() - clock.steady() - step[0]) < 60, "it goes on where the last one was"
    monkeypatch.setattr(clock, "boot", lambda: "two")
    clock.keep_steady(file)
    assert abs(clock.now() - clock.steady()) < 60, "the machine was started anew"
    monkeypatch.setattr(clock, "boot", lambda: "")
    step[0] = 0.0
    clock.keep_steady(file)
    assert abs(clock.now() - clock.steady()) < 60, "where the machine's runs are not known nothing is kept"
    file.write_text("{")
    clock.keep_steady(file)
    assert abs(clock.now() - clock.steady()) < 60
