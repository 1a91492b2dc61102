"""Calls functions at their times: the shell around ``cron.py``, in the plane: it needs neither the hub nor the agent.

What was last run is kept in ``functions/cron.json``, so that a plane that starts again knows what it missed. The wall
clock is looked at again at least every ``LOOK`` seconds: it may have been set.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec

from edgeward.core import clock
from edgeward.core.cron import Schedule, Timer
from edgeward.core.errors import EdgewardError
from edgeward.core.files import read_json, write_atomic
from edgeward.core.invocation import Call, CallFailed, Event, Reply
from edgeward.functions.versions import CronPlan

log = logging.getLogger("edgeward.functions")

#: Longest time between two looks at the wall clock, seconds.
LOOK = 20.0
#: Shortest time between two writes of what was last run, seconds.
_WRITE = 5.0


class _Trigger:
    def __init__(self, key: str, number: int, plan: CronPlan, node: str, last: float) -> None:
        self.key, self.number, self.plan = key, number, plan
        name = f"{node} {key} {number}"
        share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
        zone = ZoneInfo(plan.zone)
        self.timer = Timer(Schedule.parse(plan.schedule), zone, share * plan.jitter, plan.once, last)
        self.running: set[asyncio.Task[None]] = set()
        self.skipped = 0
        self.failing = False

    @property
    def id(self) -> str:
        """Names it for as long as it is the same trigger."""
        return f"{self.key}#{self.number} {self.plan.schedule} {self.plan.zone}"


class Clockwork:
    """All triggers by time of one node; :meth:`run` until cancelled."""

    def __init__(
        self,
        file: Path,
        node: str,
        invoke: Callable[[Call], Awaitable[Reply]],
        failed: Callable[[str, CallFailed], None],
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._file, self._node = file, node
        self._invoke, self._failed, self._now = invoke, failed, now
        self._triggers: dict[str, _Trigger] = {}
        self._last = self._read()
        self._news = asyncio.Event()
        self._dirty = asyncio.Event()

    def _read(self) -> dict[str, float]:
        try:
            return msgspec.convert(read_json(self._file, {}), dict[str, float])
        except (EdgewardError, msgspec.ValidationError) as e:
            log.error("what was last run by time is not readable, so nothing counts as missed: %s", e)
            return {}

    def configure(self, wanted: Mapping[str, Sequence[CronPlan]]) -> None:
        """Takes what should be; triggers that stay the same go on as if nothing had happened."""
        found: dict[str, _Trigger] = {}
        for key, plans in wanted.items():
            for number, plan in enumerate(plans):
                made = _Trigger(key, number, plan, self._node, 0.0)
                old = self._triggers.get(made.id)
                if old is not None and old.plan == plan:
                    made = old
                else:
                    made.timer.last = self._last.get(made.id, 0.0)
                found[made.id] = made
        if found.keys() != self._triggers.keys():
            self._dirty.set()
        self._triggers = found
        self._news.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write())
            while True:
                wait = self._look(group)
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait if self._triggers else None):
                        await self._news.wait()

    def _look(self, group: asyncio.TaskGroup) -> float:
        """Starts what is due; seconds until the next look."""
        wait = LOOK
        for trigger in self._triggers.values():
            due, again = trigger.timer.look(self._now())
            wait = min(wait, again)
            if due:
                self._dirty.set()
                if trigger.running and not trigger.plan.overlap:
                    trigger.skipped += 1
                    continue
                task = group.create_task(self._call(trigger, due))
                trigger.running.add(task)
                task.add_done_callback(trigger.running.discard)
        return wait + 0.001

    async def _call(self, trigger: _Trigger, due: float) -> None:
        event = Event(
            # the same for the same instant, so that what it does can be recognised when it is done again
            id=f"{self._node}/{trigger.key}/{trigger.number}/{due:.0f}",
            source=f"/functions/{trigger.key}/cron/{trigger.number}",
            type="edgeward.cron",
            subject=trigger.plan.schedule,
            time=clock.timestamp(due),
            data=trigger.plan.data,
        )
        try:
            reply = await self._invoke(Call(trigger.key, event))
            if reply.chunks is not None:
                async for _ in reply.chunks:
                    pass
            trigger.failing = False
        except CallFailed as e:
            log.warning("%s, called by its schedule: %s", trigger.key, e.message)
            if not trigger.failing:
                trigger.failing = True
                self._failed(trigger.key, e)

    async def _write(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            self._last = {t.id: t.timer.last for t in self._triggers.values() if t.timer.last}
            await asyncio.to_thread(write_atomic, self._file, msgspec.json.encode(self._last))
            await asyncio.sleep(_WRITE)  # the shortest time between two writes
