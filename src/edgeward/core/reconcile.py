"""The level-triggered loop that every controller and supervisor uses.

Keys come in (something about this key may have changed), the handler is called with one key at a time, never twice for
the same key at once, with everything that happened meanwhile folded into one later call. A handler that fails is
called again with exponential backoff; one that returns a number is called again after that many seconds. What the
handler sees is the present state, never the event, so a lost or doubled event does no harm.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from edgeward.core.backoff import backoff

log = logging.getLogger("edgeward.reconcile")

K = TypeVar("K", bound=Hashable)
Handler = Callable[[K], Awaitable[float | None]]


class Loop(Generic[K]):
    """Runs ``handler`` for keys, ``workers`` at a time.

    ``handler(key)`` returns None, or the seconds after which it wants to be called again.
    """

    def __init__(
        self,
        name: str,
        handler: Handler[K],
        *,
        workers: int = 4,
        backoff: tuple[float, float] = (0.1, 30.0),
        timeout: float = 60.0,
    ) -> None:
        self.name = name
        self._handler = handler
        self._workers = workers
        self._backoff = backoff
        self._timeout = timeout
        self._dirty: dict[K, None] = {}  # insertion-ordered set: the queue; bounded by the number of keys
        self._busy: set[K] = set()
        self._failures: dict[K, int] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, key: K) -> None:
        """Says that something about ``key`` may have changed."""
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        self._dirty[key] = None
        self._idle.clear()
        self._wake.set()

    def add_after(self, key: K, seconds: float) -> None:
        if key in self._dirty:
            return
        old = self._timers.pop(key, None)
        if old is not None:
            old.cancel()
        self._timers[key] = asyncio.get_running_loop().call_later(seconds, self.add, key)

    def forget(self, key: K) -> None:
        self._failures.pop(key, None)
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    async def settled(self) -> None:
        """Returns when no key is waiting or being handled (timers do not count)."""
        await self._idle.wait()

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._workers):
                    group.create_task(self._work())
        finally:
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()

    def _take(self) -> K | None:
        for key in self._dirty:
            if key not in self._busy:
                del self._dirty[key]
                self._busy.add(key)
                return key
        return None

    async def _work(self) -> None:
        while True:
            key = self._take()
            if key is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                async with asyncio.timeout(self._timeout):
                    again = await self._handler(key)
                self._failures.pop(key, None)
                if again is not None:
                    self.add_after(key, again)
            # a handler's failure is retried, never lost, never kills the loop; so is a CancelledError of its own, from
            # something it awaited
            except (Exception, asyncio.CancelledError) as e:
                me = asyncio.current_task()
                if isinstance(e, asyncio.CancelledError) and (me is None or me.cancelling()):
                    raise
                n = self._failures.get(key, 0) + 1
                self._failures[key] = n
                low, high = self._backoff
                delay = backoff(n, low, high) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
                level = logging.WARNING if n in (1, 5) or n % 50 == 0 else logging.DEBUG
                log.log(level, "%s: %s failed (%s), again in %.1f s", self.name, key, e or type(e).__name__, delay)
                self.add_after(key, delay)
            finally:
                self._busy.discard(key)
                # a key that became dirty while it was busy must wake somebody
                if self._dirty:
                    self._wake.set()
                elif not self._busy:
                    self._idle.set()
