"""What the data plane is told to do: the gateway's section and the functions', made of the desired state.

``keeper.py`` hands the whole to the plane and says when the plane refused it. Where the gateway listens is decided
here: as ``node.json`` says, else on a port of the agent's own choice, kept until somebody else has taken it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from edgeward.agent.desired import Desired
from edgeward.agent.listen import address_of
from edgeward.agent.replica import Replica
from edgeward.core import daemon
from edgeward.core.errors import EdgewardError
from edgeward.core.identity import NodeIdentity
from edgeward.core.natsserver import free_port
from edgeward.core.resource import Key
from edgeward.core.spans import host_port
from edgeward.core.vault import Vault
from edgeward.functions.beside import Beside
from edgeward.functions.edge import Sections
from edgeward.functions.keeping import EdgeHistory
from edgeward.functions.stock import Stock
from edgeward.gateway import edge as gateway
from edgeward.gateway.auth_edge import Auths
from edgeward.gateway.bounds import bounds
from edgeward.gateway.certificates import Listeners
from edgeward.gateway.orders import Orders
from edgeward.gateway.rules import Listen


class PlaneSections:
    """``given``: the ``gateway`` of ``node.json``; ``broker``: how the plane reaches the node's nats-server;
    ``report``: tells the hub of an object (None: no more);
    ``status``: keeps what is told as well."""

    def __init__(
        self,
        node: str,
        site: str,
        *,
        bind: str,
        address: str,
        given: dict[str, Any],
        identity: NodeIdentity,
        orders: Orders,
        desired: Desired,
        replica: Replica,
        vault: Vault,
        stock: Stock,
        history: EdgeHistory,
        beside: Beside,
        broker: Callable[[], dict[str, Any] | None],
        report: Callable[[Key, dict[str, Any] | None], None] = lambda *_: None,
        status: Callable[[Key, dict[str, Any]], None] = lambda *_: None,
    ) -> None:
        self._node, self._site, self._bind, self._address = node, site, bind, address
        self._gateway, self._desired, self._replica = given, desired, replica
        self._history, self._broker, self._identity, self._report = history, broker, identity, report
        self._reported: set[Key] = set()
        #: Of Apps that a Rollout will bring: whether their images are here.
        self.images: Callable[[], dict[Key, bool]] = dict
        self._status = status
        self._waiting: dict[Key, dict[str, Any]] = {}
        values = desired.values
        self._auths = Auths(values, vault)
        self._functions = Sections(partial(values, "Config"), partial(values, "Secret"), vault, stock, beside.of)
        self._listeners = Listeners(
            partial(values, "Config"),
            partial(values, "Secret"),
            vault,
            allowed=bounds(given.get("allow")),
            own=lambda: identity.tls_file.read_text() if identity.tls_file.exists() else "",
            orders=orders,
        )

    def all(self) -> dict[str, Any]:
        """What the plane shall do now."""
        declared = self._desired.functions()
        functions = self._functions.section(declared, self._desired.coming())
        waiting = self._desired.waiting()
        for key, said in waiting.items():
            if self._waiting.get(key) != said:
                self._status(key, said)
        self._waiting = waiting
        self._tell_fetched(self._desired.fetched(self._functions.fetched | self.images()))
        self._history.note(declared, functions["functions"])
        if (broker := self._broker()) is not None:
            functions["broker"] = broker
        routes = gateway.section(
            self._node, self._desired.routes(), self._desired.endpoints, self._gateway, self._listens(),
            {f"{f.metadata.namespace}/{f.metadata.name}" for f in declared}, auths=self._auths,
            values=self._desired.values,
            around=gateway.Around(
                self._desired.neighbours(), self._desired.fallback, self._desired.guests, self._desired.doors,
                self._desired.remote,
            ),
        )  # fmt: skip
        routes["listeners"] = self._listeners.section(self._desired.listeners(), self._guests())
        return {"node": self._node, "site": self._site, "functions": functions, "gateway": routes}

    def _tell_fetched(self, said: dict[Key, dict[str, Any]]) -> None:
        """The hub hears what has come before its time."""
        for key in self._reported - said.keys():
            self._report(key, None)
        for key, status in said.items():
            self._report(key, status)
        self._reported = set(said)

    def _listens(self) -> list[Listen]:
        """Where the gateway listens: as ``node.json`` says, else on a port of its own that is kept."""
        given = self._gateway.get("listen")
        if given == "":
            return []
        if given is not None and (address := address_of(self._gateway, "gateway")) is not None:
            return [Listen(*address)]
        kept = self._replica.meta("gateway_port")
        port = int(kept) if kept else int(self._replica.set_meta("gateway_port", str(free_port(self._bind))))
        return [Listen(self._bind, port)]

    def _guests(self) -> tuple[str, int, str] | None:
        """The door for other sites' gateways, where something here lets any in: address, port, authorities."""
        given = self._gateway.get("guests")
        if given == "" or not self._identity.tls_file.exists() or not self._identity.ca_file.exists():
            return None
        if not any(self._desired.lets_in(s) for s in self._replica.items("Service")):
            return None
        if given is not None and (address := address_of({"listen": given}, "gateway.guests")) is not None:
            host, port = address
        else:
            kept = self._replica.meta("guests_port")
            port = int(kept) if kept else int(self._replica.set_meta("guests_port", str(free_port(self._bind))))
            host = self._bind
        return host, port, self._identity.ca_file.read_text()

    def door(self) -> str:
        """Where other sites' gateways ask this node; empty: nowhere."""
        found = self._guests()
        if found is None:
            return ""
        host = self._address if found[0] == self._bind else found[0]
        return host_port(host, found[1])

    def gateway_url(self, up: bool) -> str | None:
        """What answers requests, when it does. ``up``: the plane runs and has taken its configuration."""
        listens = self._listens()
        if not listens or not up:
            return None
        host = self._address if listens[0].host == self._bind else daemon.local(listens[0].host)
        return f"http://[{host}]:{listens[0].port}" if ":" in host else f"http://{host}:{listens[0].port}"

    def refused(self, error: EdgewardError) -> bool:
        """A port of our own choice that somebody has taken meanwhile is no reason not to serve."""
        if error.field == "$.gateway.listen" and self._gateway.get("listen") is None:
            self._replica.set_meta("gateway_port", str(free_port(self._bind)))
            return True
        return False
