"""What an engine before the plane gives on: requests by a unix socket that nobody else may open.

A front door is a door whose client is told by the engine, in fields that end here; from any other door they are
nobody's word and are dropped. A request that the engine itself could not get answered comes with what became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from edgeward.core import daemon
from edgeward.gateway.cache import Stored
from edgeward.gateway.desk import IDLE_TIME
from edgeward.gateway.door import Door
from edgeward.gateway.engine import Nginx, Planned
from edgeward.gateway.http1 import (
    FRONT_CLIENT,
    FRONT_HOST,
    FRONT_SCHEME,
    FRONT_TRIED,
    IDEMPOTENT,
    Headers,
    Request,
)
from edgeward.gateway.match import Table
from edgeward.gateway.nginx import KEPT, why_not
from edgeward.gateway.rules import GatewayConfig, Rule
from edgeward.gateway.shelf import hit_head

if TYPE_CHECKING:
    from edgeward.gateway.gate import Gate

_ERROR = re.compile(rb'","status":[45]')
_TO_ENGINES = re.compile(rb"(?im)^x-accel-[^\r\n]*\r\n")
_HIT_END = b"x-accel-expires: %d\r\n\r\n" % KEPT


class Front:
    """The engine of a gate, and the socket by which it gives on."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._socket = daemon.socket_path(gate.data, "front.sock")
        self.engine = Nginx(gate.data, self._socket, self._say, self._counted, self._lines)
        self._server: asyncio.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def plan(self, config: GatewayConfig, table: Table[Rule], free: Callable[[], Awaitable[None]]) -> Planned:
        """Raises ``EdgewardError``. ``free``: gives up the ports that the engine is to have; then it runs already."""
        planned = await self.engine.plan(config, table, config.listen)
        if self._server is None:
            self._socket.unlink(missing_ok=True)
            old = os.umask(0o177)
            try:
                self._server = await self._gate.loop.create_unix_server(
                    lambda: FrontDoor(self._gate), str(self._socket), backlog=1024
                )
            finally:
                os.umask(old)
        if self.engine.pid is None:
            await free()
            await self.engine.begin(planned)
            self._task = self._gate.loop.create_task(self.engine.run())
        return planned

    def commit(self, planned: Planned) -> None:
        self.engine.commit(planned)

    async def settled(self) -> None:
        await self.engine.settled()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self.engine.stop()
        self._end()

    def close(self) -> None:
        """At once."""
        if self._task is not None:
            self._task.cancel()
        self.engine.kill()
        self._end()

    def _end(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._socket.unlink(missing_ok=True)

    def _say(self, reason: str, text: str) -> None:
        self._gate.voice.event("Warning", reason, text, "", "", "Node")

    def _counted(self, route: str, status: int, seconds: float, size: int, cache: str, times: int) -> None:
        rule = next((r for r in self._gate.table.rules if r.key == route), None)
        if rule is not None:
            rule.counters.counted(status, seconds, size, cache, times)

    def _lines(self, lines: bytes) -> None:
        wanted = self._gate.config.access_log
        if wanted == "errors":
            lines = b"".join(line for line in lines.splitlines(True) if _ERROR.search(line))
        if lines and wanted != "off":
            self._gate.access.write(lines)

    def explain(self, rule: Rule) -> str:
        """Who answers plain requests for a rule."""
        why = why_not(rule)
        return f"the plane behind nginx: {why}" if why else "nginx by itself"

    def numbers(self) -> dict[str, float]:
        """For /metrics."""
        e = self.engine
        return {
            "edgeward_gateway_engine_starts_total": float(e.starts),
            "edgeward_gateway_engine_reloads_total": float(e.reloads),
            "edgeward_gateway_engine_refused_total": float(e.refused),
        }


class FrontDoor(Door):
    """A connection of the engine: many clients' requests, one after another."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(gate)

    def take(self, request: Request, rule: Rule | None) -> None:
        fields = request.fields
        self.client = fields.get(FRONT_CLIENT, "")
        if (scheme := fields.get(FRONT_SCHEME)) in ("http", "https"):
            request.scheme = scheme
        host = fields.get(FRONT_HOST, "").removesuffix(".")
        if host and request.host != host and request.host != f"[{host}]":
            self.refuse(400, "the target names another host than Host", request)
            return
        status, _, connected = fields.get(FRONT_TRIED, "").partition(" ")
        if rule is not None and status in ("502", "504") and self._is_over(request, rule, status, connected):
            return
        super().take(request, rule)

    def _is_over(self, request: Request, rule: Rule, status: str, connected: str) -> bool:
        """Whether a request that the engine tried by itself ends here: it may have been done, or it took its time."""
        target = rule.config.target
        if status == "504" and connected not in ("", "-"):
            self.refuse(504, f"{target} has not answered in time", request)
            return True
        if connected not in ("", "-") and request.method not in IDEMPOTENT:
            self.refuse(502, f"{target} closed the connection before it answered", request)
            return True
        return False

    @staticmethod
    def _said(fields: Headers) -> Headers:
        """Without what a target says to an engine: it would be obeyed (``X-Accel-Redirect``)."""
        return [*(f for f in fields if not f[0].lower().startswith("x-accel-")), ("x-accel-buffering", "no")]

    def head(self, status: int, fields: Headers, reason: str = "") -> None:
        super().head(status, self._said(fields), reason)

    def whole(self, status: int, fields: Headers, body: bytes, reason: str = "") -> None:
        super().whole(status, self._said(fields), body, reason)

    def give(self, stored: Stored, now: float) -> None:
        head = hit_head(stored, now)
        if any(name.startswith("x-accel-") for name in stored.fields):
            head = _TO_ENGINES.sub(b"", head)
        if "vary" not in stored.fields and stored.ttl(now) > KEPT:
            head = head[:-2] + _HIT_END
        self.write(head + stored.body)
        self.deadline = self.gate.loop.time() + IDLE_TIME
