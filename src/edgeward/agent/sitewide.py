"""What this node shows of its whole site: every node's instances of an App, and where its Services are.

In: what this node runs, and what the others say of theirs (``nodes/siblings_status.py``). Out: the status at the node's
own API, in the form that the hub gives it, and the endpoints of Services. Of nodes that were not heard in this run of
the agent nothing is shown but that; of those that fell silent what they said last, marked stale, as at the hub.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from edgeward.agent.desired import Desired
from edgeward.agent.replica import Replica
from edgeward.core.resource import Key, Resource
from edgeward.nodes.siblings_status import Statuses
from edgeward.workloads.cloud import fold, fold_service
from edgeward.workloads.persite import effective

#: Seconds between two looks at who has fallen silent.
_LOOK = 5.0


class Sitewide:
    """``own``: what this node reports of its objects; ``moved``: called when Services may be elsewhere;
    ``show(key, status)``: has the node's API show a status."""

    def __init__(
        self,
        node: str,
        site: str,
        *,
        replica: Replica,
        desired: Desired,
        statuses: Statuses,
        own: Callable[[], Mapping[Key, dict[str, Any]]],
        show: Callable[[Key, dict[str, Any]], None],
        moved: Callable[[], None],
    ) -> None:
        self._node, self._site = node, site
        self._replica, self._desired, self._statuses = replica, desired, statuses
        self._own, self._show, self._moved = own, show, moved
        self._fresh: set[str] = set()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)  # the pace of looking at silence
            if (fresh := self._statuses.fresh()) != self._fresh:
                self._fresh = fresh
                for app in self._replica.items("App"):
                    self.shown(app.key)

    def changed(self, node: str, keys: set[Key]) -> None:
        """Another node says something else of these."""
        apps = [k for k in keys if k.kind == "App"]
        for key in apps:
            self.shown(key)
            self.services(key)
        if apps:
            self._moved()

    def services(self, app: Key) -> None:
        """Has the Services of an App shown with the endpoints that are known here."""
        for service in self._replica.items("Service", app.namespace):
            if service.spec.app == app.name:
                self.service(service.key)

    def service(self, key: Key) -> None:
        """Has a Service shown with the endpoints that are known here, once another node has said anything."""
        service = self._replica.find(key)
        if service is None or not self._statuses.known():
            return
        own = {"instances": self._own().get(Key("App", key.namespace, str(service.spec.app)), {}).get("instances", [])}
        here = self._folded(service, {self._node: own})
        others = [e for e in self.endpoints(service) if e.get("node") != self._node]
        found = [*here, *(e for e in others if not self._desired.dead(str(e.get("node"))))]
        self._replica.put_beside(key, {"endpoints": sorted(found, key=lambda e: (str(e["node"]), str(e["port"])))})

    def shown(self, key: Key) -> None:
        """Has an App shown as it is at the whole site now."""
        if self._replica.find(key) is not None:
            self._show(key, self.status(key, self._own().get(key)))

    def status(self, key: Key, own: dict[str, Any] | None) -> dict[str, Any]:
        """An App's status for the node's own API."""
        app = self._replica.find(key)
        reports = self._statuses.of(key)
        if app is None or not (reports or (own is not None and self._statuses.known())):
            return own if own is not None else self._desired.elsewhere(key)
        if own is not None:
            reports[self._node] = own
        return fold(effective(app, self._site), [self._as_heard(n) for n in self._desired.nodes()], reports)

    def _as_heard(self, node: Resource) -> Resource:
        """The Node, online where this one hears it: what the hub hears is nothing to a cut site."""
        name = node.metadata.name
        online = name == self._node or name in self._statuses.fresh()
        return msgspec.structs.replace(node, status={**node.status, "online": online})

    def endpoints(self, service: Resource) -> list[dict[str, Any]]:
        """A Service's endpoints at other nodes: by their own word, and by the hub's where they have said none."""
        known = self._statuses.known()
        found = [e for e in self._replica.hub_status(service.key).get("endpoints", []) if e.get("node") not in known]
        said = self._statuses.of(Key("App", service.key.namespace, str(service.spec.app)))
        return [*self._folded(service, said), *found]

    def _folded(self, service: Resource, reports: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
        instances = [{**i, "node": n} for n, said in reports.items() for i in said.get("instances", [])]
        app = {str(service.spec.app): {"instances": instances}}
        return list(fold_service(service, self._desired.nodes(), app, {})["endpoints"])
