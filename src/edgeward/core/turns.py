"""Whose turn it is on the link: one sender at a time, the most urgent first.

In: who has something to send and how urgent it is. Out: turns, one after the other. What is sent in a turn is the
mover's (``mover.py``); there is one of these per node.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import AsyncIterator


class Turns:
    """One place, for the waiter of the highest priority; nobody gets it while somebody of a higher one wants it.

    Who has more to send reads and prepares it between two turns. Without a word of that the others would take every
    second turn, and a priority would be worth nothing just when all have much to send.
    """

    def __init__(self) -> None:
        self._busy = False
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._wanting: dict[object, int] = {}
        self._n = 0

    def want(self, who: object, priority: int) -> None:
        """``who`` has something to send, and will ask for turns until it says :meth:`leave`."""
        self._wanting[who] = priority

    def leave(self, who: object) -> None:
        if self._wanting.pop(who, None) is not None and not self._busy:
            self._pass_on()

    def _outranked(self, priority: int) -> bool:
        return any(other > priority for other in self._wanting.values())

    @contextlib.asynccontextmanager
    async def turn(self, priority: int) -> AsyncIterator[None]:
        if self._busy or self._outranked(priority):
            self._n += 1
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiters, (-priority, self._n, future))
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self._pass_on()
                raise
        self._busy = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        self._busy = False
        while self._waiters:
            rank, _, future = self._waiters[0]
            if not future.done():
                if self._outranked(-rank):
                    return
                self._busy = True
                future.set_result(None)
            heapq.heappop(self._waiters)
            if self._busy:
                return
