"""Whom a Route's Service lets in: other sites' gateways, by their node's certificate, at the one door."""

from __future__ import annotations

import itertools

import pytest

from edgeward.gateway.guests import why_not
from edgeward.gateway.peer import Peer

BERLIN = Peer("CN=berlin-1", ("dns:berlin-1.node.edgeward.internal",), "00")
ROME = Peer("CN=rome-1", ("dns:rome-1.node.edgeward.internal", "dns:shop.example"), "01")
ALLOWED = frozenset({"dns:berlin-1.node.edgeward.internal"})


@pytest.mark.parametrize(
    ("door", "gateway", "peer", "guests", "says"),
    [
        (True, True, BERLIN, ALLOWED, ""),
        (False, False, None, ALLOWED, ""),
        (False, False, None, None, ""),
        (False, True, None, None, ""),
        (True, True, ROME, ALLOWED, "CN=rome-1 is not among those whom Route/shop/r lets in"),
        (True, True, BERLIN, frozenset(), "is not among those"),
        (True, True, BERLIN, None, "is for no other site"),
        (True, False, BERLIN, ALLOWED, "for other sites' gateways"),
        (True, True, None, ALLOWED, "certificates only"),
        (False, True, BERLIN, ALLOWED, "certificates only"),
        (False, True, None, ALLOWED, "certificates only"),
    ],
)
def test_who_is_let_in(door: bool, gateway: bool, peer: Peer | None, guests: frozenset[str] | None, says: str) -> None:
    got = why_not("shop/r", door=door, gateway=gateway, peer=peer, guests=guests)
    assert says in got
    assert bool(got) == bool(says)


def test_nobody_else_whatever_comes_together() -> None:
    """At the door only a gateway of an allowed node; elsewhere no gateway where somebody is allowed by name."""
    for door, gateway, peer, guests in itertools.product(
        (True, False), (True, False), (None, BERLIN, ROME), (None, frozenset(), ALLOWED)
    ):
        let_in = not why_not("r", door=door, gateway=gateway, peer=peer, guests=guests)
        if door:
            assert let_in == (gateway and peer is BERLIN and guests == ALLOWED)
        else:
            assert let_in == (not gateway or guests is None)
