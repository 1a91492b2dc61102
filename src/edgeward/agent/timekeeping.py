"""Notices that somebody set this machine's clock, and that it is not the hub's.

In: the wall clock, and what the hub said of its own. Out: events, the Node's status, and one new dial of the link when
a clock that was never set becomes right: until then no certificate's end could be judged by it, and the link stood on
the hub's CA alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from edgeward.core import clock
from edgeward.core.errors import EdgewardError
from edgeward.nodes.hubtime import HubClock, untold

log = logging.getLogger("edgeward.clock")

#: Seconds between two looks, and a step that is worth a word.
LOOK, _STEP = 1.0, 1.0
_MINUTE = 60


class Timekeeper:
    def __init__(
        self,
        hub: HubClock,
        issued: Callable[[], float],
        event: Callable[[str, str, str], None],
        report: Callable[[], None],
        redial: Callable[[], Awaitable[None]],
    ) -> None:
        """``issued``: when the hub last gave credentials; ``event(type, reason, message)``."""
        self._hub, self._issued, self._event, self._report, self._redial = hub, issued, event, report, redial
        self._set = clock.now() - clock.steady()
        self._untold = untold(clock.now(), issued())
        self._status = hub.status(clock.now(), clock.steady())

    async def run(self) -> None:
        while True:
            await self.step(clock.now(), clock.steady())
            await asyncio.sleep(LOOK)  # the period of looking

    async def step(self, wall: float, steady: float) -> None:
        """One look."""
        by = wall - steady - self._set
        if abs(by) > _STEP:
            self._set = wall - steady
            message = f"this machine's clock was set {'ahead' if by > 0 else 'back'} by {said(by)}"
            log.info(message)
            self._event("Normal", "ClockSet", message)
        status = self._hub.status(wall, steady)
        if status != self._status:
            if status.get("agrees") is False and self._status.get("agrees") is not False:
                message = f"this machine's clock is {said(status['aheadSeconds'])} {_side(status)} the hub's"
                log.warning(message)
                self._event("Warning", "ClockDiffers", message)
            self._status = status
            self._report()
        before, self._untold = self._untold, untold(wall, self._issued())
        if before and not self._untold:
            log.info("the clock is right: the link is dialled anew, so that the hub's certificate is judged by it")
            with contextlib.suppress(EdgewardError):
                await self._redial()


def _side(status: dict[str, object]) -> str:
    return "ahead of" if isinstance(by := status["aheadSeconds"], int) and by > 0 else "behind"


def said(seconds: float) -> str:
    """``90 s``, ``60 min``, ``24 h``, ``365 days``."""
    by = abs(seconds)
    for unit, size in (("days", 86400), ("h", 3600), ("min", _MINUTE)):
        if by >= 2 * size or (unit == "h" and by >= size):
            return f"{by / size:.0f} {unit}"
    return f"{by:.0f} s"
