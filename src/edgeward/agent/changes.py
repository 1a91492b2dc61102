"""What changed in the replica moves the rooms: an App its loop, a Route the plane, an Export the outbox.

The replica says that something changed, whether the hub or somebody at the site did it; each room then reads what it
needs and makes it so. Nothing is decided here but who is told.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from edgeward.agent.closing import Closing
from edgeward.agent.desired import Desired
from edgeward.agent.keeper import Keeper
from edgeward.agent.replica import Replica
from edgeward.core.errors import EdgewardError
from edgeward.core.store import Change
from edgeward.nodes.edge import NodeEdge
from edgeward.workloads.edge import AppsEdge

log = logging.getLogger("edgeward.agent")


class Changes:
    """``exports``: applies the declared Exports; ``closing``: what keeps Services closed; ``release``: looks
    which release of the agent is to run."""

    def __init__(
        self, replica: Replica, *, desired: Desired, apps: AppsEdge, plane: Keeper, link: NodeEdge, closing: Closing,
        exports: Callable[[], Awaitable[None]], release: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._desired, self._closing = desired, closing
        self._replica, self._apps, self._plane, self._link = replica, apps, plane, link
        self._exports, self._release = exports, release

    async def run(self) -> None:
        """Runs until cancelled."""
        for key in [r.key for r in self._replica.items("App")]:
            self._apps.poke(key.namespace, key.name)
        while True:
            try:
                with self._replica.watch(self._replica.revision) as changes:
                    async for change in changes:
                        await self._changed(change)
            except EdgewardError as e:
                log.info("watch starts anew: %s", e)

    async def _changed(self, change: Change) -> None:
        key = change.key
        if self._replica.local_change(key) or change.resource is None:
            self._link.wake_push()
        if key.kind in ("App", "Function", "Release", "Rollout") and self._replica.find(key) is None:
            self._desired.deleted(key)
        if key.kind in ("Site", "Node", "Service", "App"):
            self._closing.poke()
        if key.kind == "Rollout" or (key.kind in ("Release", "Node") and not change.status_only):
            self._release()
        if change.status_only and key.kind not in ("Service", "Site", "Rollout"):
            return
        if key.kind in (
            "Site",
            "Route",
            "Listener",
            "Service",
            "App",
            "Node",
            "Function",
            "Config",
            "Secret",
            "Rollout",
        ):
            self._plane.poke()
        if key.kind in ("Route", "Listener", "Function") and change.resource is None:
            self._link.report(key, None)
        if key.kind == "Export":
            await self._exports()
        elif key.kind == "App":
            self._apps.poke(key.namespace, key.name)
            if change.resource is None:
                self._link.report(key, None)
        elif key.kind == "AccessToken" and change.resource is None:
            self._link.report(key, None)
        elif key.kind in ("Config", "Secret", "Service"):
            for app in self._replica.items("App", key.namespace):
                self._apps.poke(key.namespace, app.metadata.name)
        elif key.kind in ("Node", "Override", "Rollout"):
            for app in self._replica.items("App"):
                self._apps.poke(app.metadata.namespace, app.metadata.name)
