"""The node's tunnel, put together: its ways to the hub from enrolment, its policy from ``node.json``, its services.

The same services are at the node's own API for people at the site, where they are decided, watched and recorded as at
the hub: with the link cut, ``edgeward --at NODE`` runs programs, copies files and opens ports all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.routing import Route

from edgeward.core.audit import Audit
from edgeward.core.authz import PROGRAMS
from edgeward.core.certs import verify
from edgeward.core.errors import Invalid, Refused
from edgeward.core.identity import NodeIdentity
from edgeward.core.passage import Passage
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.store import Store
from edgeward.nodes.door import Door
from edgeward.tunnel.cloud import Desk, Tunnels
from edgeward.tunnel.copy import Copy
from edgeward.tunnel.edge import Policy, Service, TunnelEdge, tcp
from edgeward.tunnel.exec import Exec
from edgeward.tunnel.framing import Open
from edgeward.tunnel.inside import Places
from edgeward.tunnel.link import Way
from edgeward.tunnel.session import Session, Stream, pair


class OwnTunnels(Tunnels):
    """The tunnel's end for operators at the node itself: streams go straight to its services."""

    def __init__(self, node: str, edge: TunnelEdge, store: Store, audit: Audit, programs: Exec) -> None:
        super().__init__(
            store,
            audit,
            key_of=lambda _: "",
            verify=lambda *_: False,
            prove=lambda _: b"",
            nonce=lambda: "",
            use_nonce=lambda _: None,
            call=_no_call,
            online=lambda _: True,
        )
        self._node, self._edge, self._programs = node, edge, programs
        self._own: Session | None = None

    def routes(self) -> list[Route]:
        return [route for route in super().routes() if "{name}" in route.path]

    async def run(self) -> None:
        await self._programs.sweep()
        await super().run()

    async def prepare(self, node: str) -> None:
        if node != self._node:
            raise Refused(
                f"this is the API of node {self._node}, which leads to no other node",
                resource=f"Node/{node}",
                remedy=f"ask it itself: --at {node}",
            )

    async def reach(self, node: str) -> Session:
        await self.prepare(node)
        if self._own is None or self._own.error is not None:
            self._own, _ = pair(self._edge.serve)
        return self._own

    async def forward(self, stream: Stream, node: str, purpose: Open, origin: Session) -> None:
        stream.purpose = purpose
        self._edge.serve(stream)

    async def record(self, desk: Desk, use: Passage, outcome: str, detail: dict[str, Any]) -> None:
        # how a program ended is in this same audit already, with more, by the service that ran it
        if outcome != "ended" or use.protocol not in PROGRAMS:
            await super().record(desk, use, outcome, detail)


async def _no_call(node: str, args: dict[str, Any]) -> None:
    raise Refused("a node calls no other node")


def tunnel_of(
    node: str,
    identity: NodeIdentity,
    doors: Callable[[], list[Door]],
    config: Any,
    *,
    data: Path,
    store: Store,
    audit: Audit,
    places: Places | None = None,
) -> tuple[TunnelEdge, OwnTunnels]:
    """``config``: ``tunnel`` in ``node.json``. ``places``: instances of the node's Apps."""

    def ways() -> list[Way]:
        return [Way(d.address.host, d.address.port, d.context(), proxy=d.address.proxy) for d in doors()]

    def hubs(proof: bytes, signature: bytes) -> bool:
        return any(verify(ca, proof, signature) for ca in identity.trusted())

    async def note(use: dict[str, Any]) -> None:
        await audit.write(
            str(use["verb"]), Key("Node", CLUSTER, node), actor=str(use["who"]), source=str(use["source"]),
            outcome=str(use["outcome"]), detail=use["detail"],
        )  # fmt: skip

    user = user_of(config)
    programs = Exec(user=user, data=str(data), note=note, places=places)
    services: dict[str, Service] = {
        "exec": programs.exec, "shell": programs.shell, "copy": Copy(user=user, note=note), "http": tcp,
    }  # fmt: skip
    policy = Policy.read(config)
    edge = TunnelEdge(node, ways=ways, sign=identity.sign, hubs=hubs, policy=policy, services=services)
    return edge, OwnTunnels(node, edge, store, audit, programs)


def user_of(config: Any) -> str:
    """``tunnel.user`` in ``node.json``: whom programs run as; empty: as the agent itself. Raises ``Invalid``."""
    user = config.get("user", "") if isinstance(config, dict) else ""
    if not isinstance(user, str) or len(user) > 64:
        raise Invalid("expected a user's name", field="tunnel.user", file="node.json")
    return user
