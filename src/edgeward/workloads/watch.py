"""Looks after one running instance: waits for its end and checks its health meanwhile.

What is observed goes into the instance's :class:`~edgeward.workloads.live.Live`; that something changed is told by a
call, and ``plan.py`` decides what follows. How one check is made is in ``health.py``.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from edgeward.core import clock, proc
from edgeward.core.errors import EdgewardError
from edgeward.core.quantity import parse_duration
from edgeward.workloads import health
from edgeward.workloads.ground import Ground
from edgeward.workloads.live import AppKey, Live
from edgeward.workloads.runtime import Runtime
from edgeward.workloads.spec import AppSpec, substitute
from edgeward.workloads.state import WorkloadState
from edgeward.workloads.wish import Source

#: Pauses before the first health checks of an instance, in seconds; then the declared interval.
_FIRST_LOOKS = (0.03, 0.05, 0.07, 0.1, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5)


class Watch:
    def __init__(
        self,
        db: WorkloadState,
        ground: Ground,
        runtime: Callable[[AppSpec], Runtime],
        source: Source,
        changed: Callable[[AppKey], None],
    ) -> None:
        self._db, self._ground, self._runtime, self._source = db, ground, runtime, source
        self._changed = changed

    async def watch(self, live: Live) -> None:
        """Waits for the instance's end and checks its health meanwhile."""
        key = (live.row.namespace, live.row.name)
        if live.process is None or not live.alive:
            live.alive = False
            self._changed(key)
            return
        checks = asyncio.create_task(self._check(live))
        try:
            await proc.wait_exit(live.process)
            live.exit_code = await self._runtime(live.spec).exit_code(live.row, live.spec)
        finally:
            checks.cancel()
            await asyncio.gather(checks, return_exceptions=True)
        live.alive = live.healthy = False
        self._changed(key)

    async def _check(self, live: Live) -> None:
        key = (live.row.namespace, live.row.name)
        spec = live.spec.health
        interval, timeout = parse_duration(spec.interval), parse_duration(spec.timeout)
        n = 0
        while True:
            if not live.ever_healthy:
                if n or not live.adopted:
                    await asyncio.sleep(_FIRST_LOOKS[min(n, len(_FIRST_LOOKS) - 1)])  # the pace of the first checks
            else:
                await asyncio.sleep(interval * random.uniform(0.9, 1.1))  # noqa: S311 - the declared period, with jitter
            n += 1
            why = await self._once(live, timeout)
            was, was_why = live.healthy, live.why
            if why:
                live.failures += 1
                live.why = why
                if live.failures >= spec.failureThreshold or not live.ever_healthy:
                    live.healthy = False
            else:
                live.failures, live.why = 0, ""
                if not live.healthy:
                    live.healthy, live.healthy_since, live.ever_healthy = True, clock.steady(), True
            if was != live.healthy or (live.ever_healthy and was_why != live.why):
                self._changed(key)

    async def _once(self, live: Live, timeout: float) -> str:
        spec = live.spec.health
        if spec.http is not None:
            return await health.http("127.0.0.1", live.row.ports[spec.http.port], spec.http.path, timeout)
        if spec.tcp is not None:
            return await health.tcp("127.0.0.1", live.row.ports[spec.tcp.port], timeout)
        if spec.exec is not None:
            snapshot = self._db.version(live.row.namespace, live.row.name, live.row.version)
            if snapshot is None:
                return "its version is not kept any more"
            try:
                extra = self._source.service_env(live.row.namespace)
                known = self._runtime(live.spec).environment(live.row, snapshot, extra)
                argv = [
                    substitute(t, known, f"$.spec.health.exec.command[{n}]") for n, t in enumerate(spec.exec.command)
                ]
                inside = self._runtime(live.spec).inside(live.row, snapshot, extra, argv)
            except EdgewardError as e:
                return str(e)
            return await health.command(inside.argv, inside.env, inside.folder, timeout, inside.user)
        return ""
