"""What the rooms say of what they run: to the hub, to the node's own API, and into the record of events.

A status goes both ways at once, for the site must see it without a link; an event is on the disk before the link is
told of it. ``nodes/edge.py`` brings both to the hub when it answers.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from edgeward import __version__
from edgeward.agent.closing import Closing
from edgeward.agent.desired import Desired
from edgeward.agent.replica import Replica
from edgeward.core import clock
from edgeward.core.chain import Head
from edgeward.core.records import SqliteRecords
from edgeward.core.resource import Key
from edgeward.core.vault import Vault
from edgeward.nodes.edge import NodeEdge
from edgeward.workloads.edge import AppsEdge


class Reports:
    """``moved``: called when apps may be somewhere else; ``spawn``: owns what runs beside; ``happened``: gets each
    event and what it is about (None: the node)."""

    def __init__(
        self,
        node: str,
        *,
        replica: Replica,
        records: SqliteRecords,
        desired: Desired,
        link: NodeEdge,
        moved: Callable[[], None],
        spawn: Callable[[Any], None],
        happened: Callable[[dict[str, Any], Key | None], None] = lambda *_: None,
    ) -> None:
        self._node, self._replica, self._records = node, replica, records
        self._desired, self._link = desired, link
        self._moved, self._spawn, self._happened = moved, spawn, happened
        #: An App's status as it is shown here, of what it is on this node (None: it does not run on it).
        self.sitewide: Callable[[Key, dict[str, Any] | None], dict[str, Any]] = lambda key, own: (
            own if own is not None else desired.elsewhere(key)
        )

    def status(self, key: Key, status: dict[str, Any] | None) -> None:
        self._link.report(key, status)
        self.keep(key, status or {})

    def keep(self, key: Key, status: dict[str, Any]) -> None:
        """What the node's own API shows."""
        if self._replica.find(key) is not None:
            self._spawn(self._replica.put_status(key, status))

    def app_status(self, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        key = Key("App", namespace, name)
        self._desired.said(key, status)
        self._moved()  # where its Services are may be new
        self._link.report(key, status if status is not None else self._desired.waits(key) or None)
        self.keep(key, self.sitewide(key, status))

    def export_status(self, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        self.status(Key("Export", namespace, name), status)

    def event(
        self, type: str, reason: str, message: str, namespace: str = "", name: str = "", kind: str = "App"
    ) -> None:
        about = Key(kind, namespace or "default", name) if name else None
        resource = str(about) if about is not None else f"Node/{self._node}"
        record = {"type": type, "reason": reason, "resource": resource, "message": message, "node": self._node}

        async def keep() -> None:
            await self._records.append("events", record)
            self._link.wake_events()

        self._spawn(keep())
        self._happened({**record, "time": clock.timestamp()}, about)


def about_node(
    address: str,
    apps: AppsEdge,
    vault: Vault,
    link: NodeEdge,
    replica: Replica,
    head: Head | None,
    mesh: dict[str, Any],
    hold: dict[str, Any],
) -> dict[str, Any]:
    """What the node reports of itself. ``head``: the newest entry of its audit trail; ``mesh``: the mesh's members;
    ``hold``: of a site that holds."""
    return {
        "version": __version__,
        "address": address,
        **mesh,
        **({"hold": hold} if hold else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "enforced": [*apps.enforced(), *Closing.enforced()],
        **apps.about(),
        "secrets": {"sealed": True, "key": vault.source},
        "clock": link.hub_clock.status(clock.now(), clock.steady()),
        "audit": {"last": head.seq, "hash": head.hash} if head is not None else {},
        **({"notUnderstood": [str(k) for k in sorted(strange)[:20]]} if (strange := replica.strange()) else {}),
    }
