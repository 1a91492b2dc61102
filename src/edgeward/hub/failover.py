"""Has the hub's streams elect a new leader about a second after the old one's server died, not after 4 to 9.

Each process of a cluster, the witness too, asks its own nats-server some times a second which servers it is connected
to and whom its raft groups follow. A leader that is gone is reported to its group (``core/raftz.py`` says how, and why
that is safe); nats-server does the rest. Without this, or where another release of nats-server does not heed it, an
election takes as long as nats-server makes it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError
from edgeward.core.raftz import Group, Nudge, Servers, overdue

log = logging.getLogger("edgeward.failover")

#: Seconds between two looks; and after a nudge until the same group gets another one.
LOOK = 0.4
AGAIN = 2.0


class _Route(msgspec.Struct):
    remote_name: str = ""
    remote_id: str = ""


class _Routes(msgspec.Struct):
    routes: list[_Route] = []


class _RouteZ(msgspec.Struct):
    data: _Routes


class _RaftZ(msgspec.Struct):
    data: dict[str, dict[str, Group]] = {}


class Failover:
    """``system``: a connection as the system account's user; ``accounts``: those whose groups are looked after."""

    def __init__(self, system: Bus, *accounts: str) -> None:
        self._system = system
        self._accounts = accounts
        self._servers = Servers()
        self._nudged: dict[str, float] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK)  # the period of looking
            try:
                await self.look()
            except (EdgewardError, msgspec.DecodeError) as e:
                log.debug("cannot look at the servers: %s", e)

    async def look(self) -> list[Nudge]:
        """One look; gives the groups that were nudged."""
        routes = msgspec.json.decode(await self._ask("ROUTEZ", {}), type=_RouteZ).data.routes
        connected = {r.remote_name: r.remote_id for r in routes if r.remote_name}
        self._servers.look(connected, clock.monotonic())
        due: list[Nudge] = []
        for account in self._accounts:
            groups = msgspec.json.decode(await self._ask("RAFTZ", {"account": account}), type=_RaftZ).data
            now = clock.monotonic()
            found = overdue(groups.get(account, {}), self._servers.ended(now), len(connected))
            due += [n for n in found if now - self._nudged.get(n.group, -AGAIN) >= AGAIN]
        now = clock.monotonic()
        self._nudged = {g: at for g, at in self._nudged.items() if now - at < AGAIN}
        for nudge in due:
            self._nudged[nudge.group] = now
            await self._system.publish(nudge.subject, nudge.payload)
        if due:
            gone = ", ".join(sorted({n.gone for n in due}))
            log.warning("server %s is gone: %d raft groups that it led elect anew", gone, len(due))
        return due

    async def _ask(self, what: str, options: dict[str, Any]) -> bytes:
        subject = f"$SYS.REQ.SERVER.{self._system.server_id}.{what}"
        return (await self._system.request(subject, msgspec.json.encode(options), timeout=2.0)).data
