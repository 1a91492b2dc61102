"""A machine whose clock is set: told, and acted upon once."""

from __future__ import annotations

import asyncio

import pytest

from edgeward.agent import timekeeping
from edgeward.agent.timekeeping import Timekeeper, said
from edgeward.nodes.hubtime import HubClock

NOW, DAY = 1_790_000_000.0, 86400.0


class Wall:
    """The clocks that a Timekeeper finds when it is made."""

    def __init__(self, wall: float, steady: float) -> None:
        self.now = lambda: wall
        self.steady = lambda: steady


def test_a_clock_is_set_and_differs_and_becomes_right(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    calls: list[str] = []
    hub = HubClock()
    monkeypatch.setattr(timekeeping, "clock", Wall(100.0, 100.0))

    async def dial() -> None:
        calls.append("dial")

    def event(type: str, reason: str, message: str) -> None:
        events.append((reason, message))

    async def body() -> None:
        keeper = Timekeeper(hub, lambda: NOW - DAY / 2, event, lambda: calls.append("report"), dial)
        await keeper.step(101.0, 101.0)
        assert (events, calls) == ([], []), "nothing is known"
        hub.heard(NOW, 101.0, 101.2)
        await keeper.step(102.0, 102.0)
        await keeper.step(103.0, 103.0)
        assert [r for r, _ in events] == ["ClockDiffers"]
        assert "behind the hub's" in events[0][1]
        assert calls == ["report"]
        await keeper.step(NOW + 3, 104.0)
        await keeper.step(NOW + 4, 105.0)
        assert [r for r, _ in events] == ["ClockDiffers", "ClockSet"]
        assert calls == ["report", "report", "dial"], "certificates can be judged now, so they are"
        await keeper.step(NOW + 5 - DAY, 106.0)
        await keeper.step(NOW + 6, 107.0)
        assert calls.count("dial") == 1, "a clock that is a day off was set once"
        assert [r for r, _ in events][2:] == ["ClockSet", "ClockDiffers", "ClockSet"]

    asyncio.run(body())


def test_how_long_is_said() -> None:
    assert [said(s) for s in (1.2, -90, 3600, DAY, 56 * 365 * DAY)] == ["1 s", "90 s", "1 h", "24 h", "20440 days"]
