"""Which sites may answer for which: each Site is told its neighbours, and its gateways know them while they are cut.

In come changes of the store, out goes ``status.neighbours`` of each Site: the nearest sites that are there and that
have addresses, by ``gateway/steer.py``. A Site's status travels to its own nodes, whose gateways ask these when a Route
says ``fallback: [nearest]``. While no Route and no Service does, nothing is told and nothing travels. Of several hub
processes the one that leads writes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from edgeward.core.errors import EdgewardError
from edgeward.core.resource import CLUSTER, Key, Resource
from edgeward.core.store import Change
from edgeward.core.store_nats import NatsStore
from edgeward.gateway.steer import Edge, Prefixes, Steering

log = logging.getLogger("edgeward.steering")

#: Neighbours that a site is told of.
MOST = 3
#: Seconds that changes are gathered for, and between two looks at who leads.
_GATHER, _AGAIN = 1.0, 5.0


def authority(address: str) -> str:
    """An entry of ``spec.addresses`` as it stands in a URL: IPv6 alone gets its brackets."""
    return f"[{address}]" if address.count(":") > 1 and not address.startswith("[") else address


def neighbours(steering: Steering, site: str, scheme: str) -> list[dict[str, Any]]:
    """``{site, url, km}`` of those who may answer for ``site``, the nearest first; ``km`` where it is known."""
    found = []
    for edge, km in steering.neighbours(site, MOST):
        entry: dict[str, Any] = {"site": edge.name, "url": f"{scheme}://{authority(edge.addresses[0])}"}
        found.append(entry if km is None else {**entry, "km": round(km)})
    return found


def wanted(resource: Resource) -> bool:
    """Whether a Route (its list) or a Service (its word) falls back to the nearest site."""
    return not resource.metadata.deletionTimestamp and "nearest" in resource.spec.fallback


class Neighbours:
    """Keeps the Sites' ``status.neighbours``. ``leads``: whether this process is the one that writes."""

    def __init__(self, store: NatsStore, scheme: str, leads: Callable[[], bool]) -> None:
        self._store, self._scheme, self._leads = store, scheme, leads
        self._changed = asyncio.Event()
        self._moved = True
        self._told = False

    def take(self, change: Change, moved: bool) -> None:
        """``moved``: it is news of where sites are and which of them are there."""
        if moved or (change.key.kind in ("Route", "Service") and not change.status_only):
            self._moved = self._moved or moved
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(_GATHER)  # what comes together is told once
            if not self._leads():
                await asyncio.sleep(_AGAIN)  # the pace of looking who leads; what changed waits
                continue
            self._changed.clear()
            moved, self._moved = self._moved, False
            tell = any(wanted(r) for kind in ("Route", "Service") for r in self._store.items(kind))
            if moved or tell != self._told:
                self._told = tell
                await self._all(tell)

    async def _all(self, tell: bool) -> None:
        steering = self._steering()
        for name in steering.edges:
            await asyncio.sleep(0)  # a thousand sites are some work
            try:
                await self._tell(name, neighbours(steering, name, self._scheme) if tell else [])
            except EdgewardError as e:
                log.info("site %s is told of its neighbours later: %s", name, e)
                self._moved = True
                self._changed.set()

    def _steering(self) -> Steering:
        at: dict[str, list[bool]] = {}
        for node in self._store.items("Node"):
            at.setdefault(node.spec.site, []).append(bool(node.status.get("online")))
        edges = []
        for site in self._store.items("Site"):
            name, where = site.metadata.name, site.spec.coordinates
            online = at.get(name, [])
            place = (where.lat, where.lon) if where else None
            addresses = tuple(site.spec.addresses)
            edges.append(Edge(name, place=place, addresses=addresses, nodes=len(online), online=sum(online)))
        return Steering.of(edges, Prefixes([]))

    async def _tell(self, name: str, told: list[dict[str, Any]]) -> None:
        key = Key("Site", CLUSTER, name)
        found = self._store.find(key)
        if found is None or found.status.get("neighbours", []) == told:
            return
        status = {k: v for k, v in found.status.items() if k != "neighbours"}
        await self._store.put_status(key, status | ({"neighbours": told} if told else {}), checked=True)
