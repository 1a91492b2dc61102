"""What instances use of the machine now: read from /proc, over all processes of an instance.

Processor time comes as a sum; a rate needs the sum of the call before, which is kept here for each instance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgeward.core import clock, proc
from edgeward.workloads.live import AppKey, Live


class Meter:
    def __init__(self) -> None:
        #: When an instance was looked at last, and its processor seconds then.
        self._last: dict[str, tuple[float, float]] = {}

    def measure(
        self,
        node: str,
        apps: Mapping[AppKey, Mapping[str, Live]],
        pids: Callable[[Live], Callable[[proc.ProcId], list[int]]],
    ) -> list[dict[str, Any]]:
        """Present use of every instance: processor in cores since the last call, memory in bytes. ``pids``: which
        processes are an instance's."""
        found = []
        now = clock.monotonic()
        for (namespace, name), instances in sorted(apps.items()):
            for live in instances.values():
                if not live.alive or live.process is None:
                    continue
                cpu = memory = 0.0
                for pid in pids(live)(live.process):
                    one = proc.usage(pid)
                    if one is not None:
                        cpu, memory = cpu + one.cpu, memory + one.memory
                was_at, was = self._last.get(live.row.id, (0.0, 0.0))
                rate = max(0.0, (cpu - was) / (now - was_at)) if was_at and now > was_at else 0.0
                self._last[live.row.id] = (now, cpu)
                found.append(
                    {"namespace": namespace, "name": name, "node": node, "instance": live.row.id,
                     "cpu": round(rate, 3), "memory": int(memory)}
                )  # fmt: skip
        return found

    def forget(self, instance: str) -> None:
        self._last.pop(instance, None)
