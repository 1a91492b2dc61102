"""The node's nats-server, as the agent sets it up: whom it dials, who may speak MQTT to it, what it refuses.

``core/natsserver.py`` runs it. What it was told to refuse, and its MQTT password, are kept in the replica's file, so
that both hold over a restart of the agent.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from edgeward.agent.replica import Replica
from edgeward.core.daemon import local
from edgeward.core.errors import Unreachable
from edgeward.core.identity import NodeIdentity
from edgeward.core.natsserver import NatsServer, NodeSpec
from edgeward.nodes.door import Door

MQTT_USER = "edge"


class Broker:
    """``hub``: as in ``node.json``; ``doors``: the hub's addresses."""

    def __init__(
        self,
        node: str,
        *,
        bind: str,
        hub: dict[str, Any],
        identity: NodeIdentity,
        doors: Callable[[], list[Door]],
        replica: Replica,
    ) -> None:
        self._node, self._bind, self._hub = node, bind, hub
        self._identity, self._doors, self._replica = identity, doors, replica
        #: None until it is started.
        self.server: NatsServer | None = None
        #: The hub refused this node; it is not dialled until the credentials were renewed.
        self.hung_up = False

    def spec(self, *, dial: bool = True) -> NodeSpec:
        """How it is to run now. ``dial``: it may connect to the hub."""
        enrolled = dial and bool(self._hub) and self._identity.enrolled
        urls = [d.address.url.replace("https:", "wss:", 1) for d in self._doors()] if enrolled else [""]
        return NodeSpec(
            self._node,
            hub_url=urls[0],
            more_urls=tuple(urls[1:]),
            creds_file=self._identity.creds_file if enrolled else None,
            ca_file=self._identity.trust_file if enrolled else None,
            proxy=str(self._hub.get("proxy", "")),
            mqtt_host=self._bind,
            mqtt_users={MQTT_USER: self.password()},
            closed=self.closed_topics(),
            plane_password=self._kept("plane_password"),
        )

    def reach(self) -> dict[str, Any] | None:
        """How the data plane reaches the server, for its configuration: as it is, else as it was last."""
        if self.server is None or not self.server.ports.get("client"):
            return msgspec.json.decode(self._replica.meta("plane_broker") or "null", type=dict[str, Any] | None)
        said = {
            "url": self.server.url,
            "password": self._kept("plane_password"),
            "mqtt_host": local(self._bind),
            "mqtt_port": self.server.ports["mqtt"],
            "closed": list(self.closed_topics()),
        }
        text = msgspec.json.encode(said).decode()
        if text != self._replica.meta("plane_broker"):
            self._replica.set_meta("plane_broker", text)
        return said

    def closed_topics(self) -> tuple[str, ...]:
        """What the broker is to refuse; kept, so that it goes on refusing over a restart of the agent."""
        return tuple(msgspec.json.decode(self._replica.meta("mqtt_closed") or "[]", type=list[str]))

    async def close_topics(self, subjects: tuple[str, ...]) -> None:
        if self.server is None:
            raise Unreachable("the node's nats-server is not started")
        self._replica.set_meta("mqtt_closed", msgspec.json.encode(list(subjects)).decode())
        await self.server.apply(self.spec(dial=not self.hung_up))

    async def dial_again(self, changed: bool) -> bool:
        """Takes renewed credentials into use, when something in them changed or the hub had refused the old ones."""
        if not (changed or self.hung_up) or self.server is None:
            return False
        self.hung_up = False
        self.server.spec = self.spec()
        await self.server.restart()
        return True

    async def hang_up(self) -> None:
        """Dials no more. A hub that refuses us is not to be dialled every second; the renewals ask now and then."""
        if self.server is not None:
            await self.server.apply(self.spec(dial=False))

    def password(self) -> str:
        """Of the node's MQTT user; made once and kept."""
        return self._kept("mqtt_password")

    def _kept(self, name: str) -> str:
        return self._replica.meta(name) or self._replica.set_meta(name, secrets.token_urlsafe(24))
