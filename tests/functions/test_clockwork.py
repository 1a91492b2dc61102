"""Triggers by time against a clock that the test moves, and once with a real one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

from tests.core.pair import until
from tests.functions.node import looped
from tests.functions.test_plane import nothing, resource, running, take

from edgeward.core.invocation import Call, CallFailed, Reply
from edgeward.core.vault import Vault
from edgeward.functions.clockwork import Clockwork
from edgeward.functions.edge import Sections
from edgeward.functions.versions import CronPlan

HOURLY = "0 * * * *"


class Clock:
    def __init__(self, at: float) -> None:
        self.at = at
        self.calls: list[Call] = []
        self.failed: list[str] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.fail = False

    async def invoke(self, call: Call) -> Reply:
        self.calls.append(call)
        await self.hold.wait()
        if self.fail:
            raise CallFailed("timeout", "late", function=call.function)
        return Reply(200, [])


@contextlib.asynccontextmanager
async def ticking(file: Path, clock: Clock, *plans: CronPlan) -> AsyncIterator[Clockwork]:
    works = Clockwork(file, "n1", clock.invoke, lambda key, e: clock.failed.append(key), lambda: clock.at)
    works.configure({"default/f": list(plans)})
    task = asyncio.create_task(works.run())
    try:
        await until(lambda: all(t.timer.last for t in works._triggers.values()), 20)  # it has looked once
        yield works
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def move(works: Clockwork, clock: Clock, to: float) -> None:
    clock.at = to
    works._news.set()
    await asyncio.sleep(0)
    await until(lambda: not works._news.is_set(), 20)


@looped
async def test_a_due_call_is_made_once_and_says_which_instant_it_is_for(tmp_path: Path) -> None:
    clock = Clock(1800.0)
    async with ticking(tmp_path / "c", clock, CronPlan(HOURLY, data=b"x")) as works:
        await move(works, clock, 3599.0)
        assert clock.calls == []
        for at in (3600.0, 3601.0, 3000.0, 3600.0):
            await move(works, clock, at)
        await until(lambda: len(clock.calls) == 1, 20)
        event = clock.calls[0].event
        assert (event.id, event.type, event.data) == ("n1/default/f/0/3600", "edgeward.cron", b"x")
        assert event.time == "1970-01-01T01:00:00.000Z"
        works.configure({"default/f": [CronPlan(HOURLY, data=b"x")]})
        await move(works, clock, 7200.0)
        await until(lambda: len(clock.calls) == 2, 20)
        works.configure({})
        await move(works, clock, 10_800.0)
        assert len(clock.calls) == 2


@looped
async def test_a_call_that_still_runs_is_not_made_again_unless_allowed(tmp_path: Path) -> None:
    for overlap, calls in ((False, 1), (True, 2)):
        clock = Clock(1800.0)
        clock.hold.clear()
        async with ticking(tmp_path / str(overlap), clock, CronPlan(HOURLY, overlap=overlap)) as works:
            await move(works, clock, 3600.0)
            await until(lambda c=clock: len(c.calls) == 1, 20)  # type: ignore[misc]
            await move(works, clock, 7200.0)
            await until(lambda c=clock, n=calls: len(c.calls) == n, 20)  # type: ignore[misc]
            clock.hold.set()
            # what was not made then is not made later; the next one is
            await until(lambda w=works: not any(t.running for t in w._triggers.values()), 20)  # type: ignore[misc]
            await move(works, clock, 10800.0)
            await until(lambda c=clock, n=calls: len(c.calls) == n + 1, 20)  # type: ignore[misc]
            assert [c.event.id.rpartition("/")[2] for c in clock.calls] == [
                "3600", *(["7200"] if overlap else []), "10800",
            ]  # fmt: skip


@looped
async def test_what_was_due_while_nothing_ran_is_made_once_or_not_at_all(tmp_path: Path) -> None:
    for once, calls in ((False, 0), (True, 1)):
        file, plan = tmp_path / str(once), CronPlan(HOURLY, once=once)
        clock = Clock(1800.0)
        async with ticking(file, clock, plan):
            await until(file.exists, 20)
        clock.at = 1800.0 + 5 * 3600
        async with ticking(file, clock, plan) as works:
            await move(works, clock, clock.at + 1)
            await until(lambda c=clock, n=calls: len(c.calls) == n, 20)  # type: ignore[misc]
            await move(works, clock, clock.at + 1)
            assert len(clock.calls) == calls


@looped
async def test_failures_are_told_once_in_a_row_and_a_damaged_file_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("{")
    clock = Clock(1800.0)
    clock.fail = True
    async with ticking(tmp_path / "c", clock, CronPlan(HOURLY)) as works:
        for n in range(1, 4):
            await move(works, clock, 3600.0 * n)
            await until(lambda n=n: len(clock.calls) == n, 20)  # type: ignore[misc]
            await until(lambda: not next(iter(works._triggers.values())).running, 20)
        assert clock.failed == ["default/f"]


@looped
async def test_a_function_with_a_schedule_is_called_by_the_plane(tmp_path: Path) -> None:
    code = "def handler(event, context):\n    print(event.type, event.subject, event.text())"
    sections = Sections(nothing, nothing, Vault.open(tmp_path / "identity"))
    every_second = {"cron": {"schedule": "* * * * * *", "zone": "Europe/Berlin", "data": "tick"}}
    async with running(tmp_path) as (part, _):
        await take(part, sections.section([resource("f", code, triggers=[every_second])]))
        file = tmp_path / "functions/logs/default/f.log"
        await until(lambda: file.exists() and file.read_text().count("\n") >= 2, 30)
        line = json.loads(file.read_text().splitlines()[0])
        assert line["message"] == "edgeward.cron * * * * * * tick"
