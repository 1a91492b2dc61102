"""Which sites hold, as the hub shows it: ``status.hold`` of a Site, made of what its nodes report.

In come changes of Nodes, out go statuses of Sites. The word itself is the site's (``nodes/holding.py``); nothing here
decides whether the hub sends anything. Of several hub processes the one that leads writes.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeward.core.errors import Conflict
from edgeward.core.reconcile import Loop
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.store import Change
from edgeward.core.store_nats import NatsStore
from edgeward.nodes.holding import of_site

#: Seconds between two looks at who leads, and until a write that was too late is made anew.
_AGAIN, _LATER = 5.0, 0.1


class Holds:
    """``leads``: whether this process is the one that writes."""

    def __init__(self, store: NatsStore, leads: Callable[[], bool]) -> None:
        self._store, self._leads = store, leads
        self._loop: Loop[str] = Loop("holds", self._write)
        store.listen(self._changed)

    async def run(self) -> None:
        """Until cancelled."""
        for site in self._store.items("Site"):
            self._loop.add(site.metadata.name)
        await self._loop.run()

    def _changed(self, change: Change) -> None:
        if change.key.kind != "Node" or change.resource is None:
            return
        site = str(change.resource.spec.site)
        found = self._store.find(Key("Site", CLUSTER, site))
        if found is not None and (change.resource.status.get("hold") or found.status.get("hold")):
            self._loop.add(site)

    async def _write(self, site: str) -> float | None:
        key = Key("Site", CLUSTER, site)
        found = self._store.find(key)
        if found is None:
            return None
        hold = of_site(n.status for n in self._store.items("Node") if n.spec.site == site)
        if found.status.get("hold", {}) == hold:
            return None
        if not self._leads():
            return _AGAIN
        status = {k: v for k, v in found.status.items() if k != "hold"} | ({"hold": hold} if hold else {})
        try:
            await self._store.put_status(key, status, checked=True)
        except Conflict:
            return _LATER
        return None
