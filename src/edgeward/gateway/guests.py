"""Which other sites' gateways are let in, and to which Routes. Pure.

A Service of ``scope: site`` names in ``allowFrom`` the sites that may ask for it. Their gateways come by a door of
their own: TLS at which both sides show their node's certificate, so each knows by the hub's word who the other one is.
In: the request, who TLS says is asking, the nodes that the hub has named; out: why not, or nothing.
"""

from __future__ import annotations

from collections.abc import Collection

from edgeward.gateway.peer import Peer

#: The Listener that is this door.
KEY = "guests"


def why_not(route: str, *, door: bool, gateway: bool, peer: Peer | None, guests: Collection[str] | None) -> str:
    """``door``: it came by the guests' door. ``gateway``: another site's gateway asks. ``guests``: alternative names
    (``dns:NAME``) of those whom the Route's Service allows; None: it allows nobody by name."""
    if door and not gateway:
        return "this door is for other sites' gateways"
    if door and guests is None:
        return f"Route/{route} is for no other site (allowFrom of its Service)"
    if not gateway or guests is None:
        return ""
    if not door or peer is None:
        return f"Route/{route} lets other sites ask by their nodes' certificates only (allowFrom of its Service)"
    if not any(name in guests for name in peer.sans):
        return f"{peer.subject[:120]} is not among those whom Route/{route} lets in (allowFrom of its Service)"
    return ""
