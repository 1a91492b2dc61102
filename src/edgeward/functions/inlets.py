"""Where calls by topic, subject and event come in, and where functions publish: loaded when a function needs it.

A thin layer before ``intake.py``: the NATS client is some megabytes that a node without such triggers does not carry.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeward.core.errors import Unreachable
from edgeward.core.invocation import Call, Reply
from edgeward.functions.triggers import Reach
from edgeward.functions.versions import Config

if TYPE_CHECKING:
    from edgeward.functions.intake import Intake


class Inlets:
    """Of one node; :meth:`run` until cancelled. ``told`` and ``event`` as in :class:`Intake`."""

    def __init__(
        self,
        node: str,
        folder: Path,
        invoke: Callable[[Call], Awaitable[Reply]],
        told: Callable[[str], None],
        event: Callable[[str, str, str], None],
    ) -> None:
        self._node, self._mark = node, folder / "listening"
        self._invoke, self._told, self._event = invoke, told, event
        self._intake: Intake | None = None
        self._needed = asyncio.Event()

    def configure(
        self, configs: Sequence[Config], keys: Collection[str], unsure: Collection[str], reach: Reach | None
    ) -> None:
        wanted = {c.version.key: c.policy.takings for c in configs if c.policy.takings}
        speaks = any(c.policy.publish for c in configs)
        if self._intake is None and (wanted or speaks or self._mark.exists()):
            from edgeward.functions.intake import Intake

            self._intake = Intake(self._node, self._mark, self._invoke, self._told, self._event)
            self._needed.set()
        if self._intake is not None:
            self._intake.configure(wanted, keys, reach, unsure=unsure, speaks=speaks)

    async def run(self) -> None:
        await self._needed.wait()
        if self._intake is not None:
            await self._intake.run()

    async def publish(self, key: str, topic: str, data: bytes, qos: int, hops: int) -> None:
        if self._intake is None:
            raise Unreachable("the node's broker is not there yet")
        await self._intake.publish(key, topic, data, qos, hops)

    async def letters(self, key: str, do: str) -> AsyncIterator[dict[str, Any]]:
        if self._intake is not None:
            async for doc in self._intake.letters(key, do):
                yield doc

    def adorn(self, key: str, status: dict[str, Any]) -> dict[str, Any]:
        """A function's status with its triggers in it."""
        if self._intake is None:
            return status
        if triggers := self._intake.status(key):
            status = {**status, "triggers": triggers}
        if dead := self._intake.dead.get(key):
            status = {**status, "deadLetters": dead}
        return status

    def metrics(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for key, name, listener in self._intake.counters() if self._intake is not None else []:
            quoted = name.replace("\\", r"\\").replace('"', r"\"")
            labels = f'{{function="{key}",trigger="{quoted}"}}'
            for word, value in (
                ("answered_total", listener.done),
                ("failed_total", listener.failed),
                ("dead_total", listener.dead),
                ("dropped_total", listener.dropped),
                ("pending", listener.pending),
                ("connected", listener.connected),
            ):
                values[f"edgeward_function_trigger_{word}{labels}"] = float(value)
        for key, n in self._intake.dead.items() if self._intake is not None else ():
            values[f'edgeward_function_dead_letters{{function="{key}"}}'] = float(n)
        return values
