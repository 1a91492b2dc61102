"""Who a client is by its certificate."""

from __future__ import annotations

from edgeward.gateway.peer import Peer, allows, peer_of


def test_a_certificate_in_plain_words() -> None:
    said = {
        "subject": ((("organizationName", "Shop, Ltd"),), (("commonName", "till-7"),)),
        "subjectAltName": (
            ("DNS", "till-7.shop"), ("URI", "spiffe://shop/till-7"), ("IP Address", "10.0.0.7"), ("DirName", "x"),
        ),
    }  # fmt: skip
    peer = peer_of(said, b"der")
    assert peer.subject == "O=Shop\\, Ltd,CN=till-7"
    assert peer.sans == ("dns:till-7.shop", "uri:spiffe://shop/till-7", "ip:10.0.0.7")
    assert len(peer.fingerprint) == 64
    assert peer_of({}, b"").subject == ""


def test_a_name_cannot_pass_for_two() -> None:
    forged = peer_of({"subject": ((("commonName", "x,CN=boss"),),)}, b"")
    assert forged.subject == "CN=x\\,CN=boss"
    assert not allows(forged, subjects=["CN=boss"])
    several = peer_of({"subject": ((("commonName", "a+CN=b"), ("userId", " c")),)}, b"")
    assert several.subject == "CN=a\\+CN=b+UID=\\ c"


def test_who_is_let_in() -> None:
    peer = Peer("CN=till-7", ("dns:till-7.shop",), "ab" * 32)
    assert not allows(None)
    assert allows(peer)
    assert allows(peer, subjects=["CN=till-7"])
    assert allows(peer, subjects=["CN=other"], sans=["dns:till-7.shop"])
    assert allows(peer, fingerprints=["ab" * 32])
    assert not allows(peer, subjects=["CN=till"], sans=["dns:shop"], fingerprints=["ab"])
