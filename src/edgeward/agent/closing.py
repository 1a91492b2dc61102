"""Keeps this node's Services closed: what is declared becomes rules of the kernel, and the status says whether it did.

In: the replica's Services with the instances that are here and those that the hub knows of at other sites, and what
belongs to the site. Out: ``gateway/nft.py``'s table as ``gateway/closed.py`` makes it, and for each Service that is to
be closed ``{enforced}`` or ``{enforced, why}``. The table goes with the last closed Service, and outlives the agent
like the apps behind it. One that somebody else took away (``nft flush ruleset``) is put back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeward.agent.desired import Desired
from edgeward.agent.replica import Replica
from edgeward.core.errors import EdgewardError
from edgeward.core.resource import CLUSTER, Key
from edgeward.gateway import closed
from edgeward.gateway.closed import Closed, Wall
from edgeward.gateway.nft import Nft, links, unusable

log = logging.getLogger("edgeward.closed")

#: Seconds between two looks at whether the table is still there, and after a failure.
_LOOK = 30.0
_META = "closed_table"

Status = Callable[[Key, dict[str, Any] | None], None]
Event = Callable[[str, str, str], None]


def services(desired: Desired, replica: Replica, site: str) -> dict[Key, Closed]:
    """Every Service of the node, with the ports of its instances here and its places at other sites."""
    found = {}
    for service in replica.items("Service"):
        if service.metadata.deletionTimestamp:
            continue
        away = [
            (str(e["address"]), e["port"])
            for e in service.status.get("endpoints", [])
            # other sites' nodes have said that, whatever it is
            if e.get("site") not in ("", None, site) and e.get("address") and _is_port(e.get("port"))
        ]
        ports = tuple(desired.ports(service))
        found[service.key] = Closed(str(service.key), service.spec.scope, ports, tuple(sorted(away)))
    return found


def _is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536


class Closing:
    """:meth:`run` until cancelled; :meth:`poke` when something may have moved."""

    def __init__(
        self, node: str, site: str, address: str, data: Path,
        *, replica: Replica, desired: Desired, status: Status, event: Event, door: Callable[[], str] = lambda: "",
    ) -> None:  # fmt: skip
        """``door``: where other sites' gateways ask this node."""
        self._node, self._site, self._address = node, site, address
        self._replica, self._desired = replica, desired
        self._status, self._event, self._door = status, event, door
        mark = hashlib.sha256(str(data.absolute()).encode()).hexdigest()[:8]
        self._nft = Nft(replica.meta(_META) or closed.table_name(node, mark))
        self._moved = asyncio.Event()
        self._wall: Wall | None = None
        self._told: set[Key] = set()
        self._failed = ""

    @staticmethod
    def enforced() -> list[str]:
        """What a Node's ``status.enforced`` says of it."""
        return [] if unusable() else ["service.scope"]

    def poke(self) -> None:
        self._moved.set()

    async def run(self) -> None:
        """Until cancelled."""
        look = True
        while True:
            self._moved.clear()
            failed = await self._step(look)
            if failed and failed != self._failed:
                self._event("Warning", "NotClosed", failed)
            self._failed, look = failed, False
            try:  # without rules there is nothing to look after
                async with asyncio.timeout(_LOOK if self._wall or failed else None):
                    await self._moved.wait()
            except TimeoutError:
                look = True

    async def stop(self) -> None:
        """The apps end with the agent: so do the rules."""
        if self._replica.meta(_META):
            with contextlib.suppress(EdgewardError):
                await self._drop()

    async def counted(self) -> dict[str, int]:
        """Packets that were refused, by counter of ``closed.COUNTERS``; {} without rules."""
        if not self._wall:
            return {}
        return {name: packets for name, (packets, _) in (await self._nft.counted() or {}).items()}

    async def _step(self, look: bool) -> str:
        """Makes it so; what failed, in words. ``look``: whether the kernel still has it."""
        declared = services(self._desired, self._replica, self._site)
        wanted = {k: s for k, s in declared.items() if s.scope != "any"}
        failed, why = "", dict[str, str]()
        try:
            wall, why = closed.build(list(declared.values()), self._around(), self._address)
            if wall and (cannot := unusable()):
                why = dict.fromkeys((s.key for s in wanted.values()), cannot)
            else:
                await self._apply(wall, look)
        except (EdgewardError, OSError, ValueError) as e:  # what is not closed is told; the node goes on
            failed, self._wall = str(e), None
            why = dict.fromkeys((s.key for s in wanted.values()), failed)
        self._tell({k: why.get(s.key) for k, s in wanted.items()})
        return failed

    async def _apply(self, wall: Wall, look: bool) -> None:
        if not wall:
            if self._replica.meta(_META):
                await self._drop()
            self._wall = wall
            return
        gone = wall == self._wall and look and await self._nft.counted() is None
        if gone:
            self._event("Warning", "TableGone", f"somebody removed the nftables table {self._nft.table}")
        if gone or wall != self._wall:
            self._replica.set_meta(_META, self._nft.table)  # before: whoever comes after a kill knows what to remove
            await self._nft.apply(wall)
            self._wall = wall
            log.info("closed: %d ports, %d places elsewhere", len(wall.site) + len(wall.node), len(wall.away))

    async def _drop(self) -> None:
        await self._nft.remove()
        self._replica.set_meta(_META, "")

    def _around(self) -> closed.Site:
        site = self._replica.find(Key("Site", CLUSTER, self._site))
        nodes = [str(n.status.get("address") or "") for n in self._desired.nodes()]
        prefixes = tuple(site.spec.prefixes) if site is not None else ()
        return closed.Site(prefixes, () if prefixes else links(), tuple(sorted({*nodes, self._address} - {""})))

    def _tell(self, why: dict[Key, str | None]) -> None:
        door = self._door()
        for key, reason in why.items():
            status: dict[str, Any] = {"enforced": True} if reason is None else {"enforced": False, "why": reason}
            service = self._replica.find(key)
            if door and service is not None and self._desired.lets_in(service):
                status["door"] = door
            self._status(key, status)
        for key in self._told - why.keys():
            self._status(key, None)
        self._told = set(why)
