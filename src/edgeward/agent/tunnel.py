"""The node's tunnel, put together: its ways to the hub from enrolment, its policy from ``node.json``, its services."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeward.core.certs import verify
from edgeward.core.identity import NodeIdentity
from edgeward.nodes.door import Door
from edgeward.tunnel.edge import Policy, TunnelEdge
from edgeward.tunnel.link import Way


def tunnel_of(node: str, identity: NodeIdentity, doors: Callable[[], list[Door]], config: Any) -> TunnelEdge:
    """``config``: ``tunnel`` in ``node.json``."""

    def ways() -> list[Way]:
        return [Way(d.address.host, d.address.port, d.context(), proxy=d.address.proxy) for d in doors()]

    def hubs(proof: bytes, signature: bytes) -> bool:
        return any(verify(ca, proof, signature) for ca in identity.trusted())

    return TunnelEdge(node, ways=ways, sign=identity.sign, hubs=hubs, policy=Policy.read(config))
