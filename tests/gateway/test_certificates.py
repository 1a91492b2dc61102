"""From Listeners, Secrets and the node's own certificate to what the plane is told."""

from __future__ import annotations

import base64
import datetime
from typing import Any

import msgspec
import pytest
from tests.gateway.papers import Authority
from tests.gateway.test_listener import ALL, make, tls

from edgeward.core.errors import Invalid
from edgeward.gateway.bounds import bounds
from edgeward.gateway.certificates import Listeners, Wish
from edgeward.gateway.listens import ListenerConfig
from edgeward.gateway.pems import Pair, read_authorities, read_pair


def data(issued: tuple[str, str]) -> dict[str, str]:
    """A Secret's."""
    return {"tls.crt": issued[0], "tls.key": issued[1]}


class Seals:
    """Seals so that it can be read, with what it is for and a number: a new seal is seen."""

    def __init__(self) -> None:
        self.count = 0

    def seal(self, data: bytes, place: str) -> bytes:
        self.count += 1
        return f"{self.count} {place} ".encode() + data


class Site:
    def __init__(self, own: str = "", orders: Any = None) -> None:
        self.values: dict[tuple[str, str, str], dict[str, str]] = {}
        self.own = own
        self.seals = Seals()
        self.listeners = Listeners(
            lambda ns, n: self.find("Config", ns, n), lambda ns, n: self.find("Secret", ns, n), self.seals,
            allowed=bounds(None), own=lambda: self.own, orders=orders,
        )  # fmt: skip

    def find(self, kind: str, ns: str, name: str) -> tuple[dict[str, str], str] | None:
        data = self.values.get((kind, ns, name))
        return None if data is None else (data, "1")

    def config(self, **spec: Any) -> ListenerConfig:
        plain = self.listeners.section([make("Listener", "l", **spec)])
        return msgspec.convert(msgspec.json.decode(msgspec.json.encode(plain)), list[ListenerConfig])[0]

    def waiting(self, **spec: Any) -> str:
        made = self.config(**spec)
        assert made.tls is not None
        assert not made.tls.certificates[0].sealed
        return made.tls.certificates[0].waiting


def test_a_certificate_of_a_secret_is_sealed_and_stays_the_same() -> None:
    ca, site = Authority(), Site()
    chain, key = ca.issue("a.example.org", "192.0.2.1")
    site.values["Secret", "shop", "s"] = {"tls.crt": chain, "tls.key": key}
    made = site.config(port=443, tls=tls({"secret": "s"}))
    assert made.tls is not None
    (cert,) = made.tls.certificates
    assert (cert.source, cert.hosts) == ("Secret/s", ("a.example.org", "192.0.2.1"))
    sealed = base64.b64decode(cert.sealed)
    assert sealed.startswith(f"1 Listener/shop/l/{cert.digest} -----BEGIN PRIVATE KEY-----".encode())
    assert "PRIVATE" not in msgspec.json.encode(made).decode()
    assert site.config(port=443, tls=tls({"secret": "s"})) == made
    assert site.seals.count == 1
    site.values["Secret", "shop", "s"] = data(ca.issue("a.example.org"))
    assert site.config(port=443, tls=tls({"secret": "s"})) != made
    assert site.seals.count == 2


def test_why_a_certificate_is_not_there() -> None:
    ca, other, site = Authority(), Authority("other"), Site()
    wish = {"port": 443, "tls": tls({"hosts": ["a.example.org"], "secret": "s"})}
    assert site.waiting(**wish) == "is not here yet"
    (chain, key), (_, strange) = ca.issue("a.example.org"), ca.issue("a.example.org")
    for given, why in (
        ({}, "has no tls.crt and no tls.key"),
        ({"tls.crt": chain}, "has no tls.key"),
        ({"tls.crt": "x", "tls.key": key}, "the chain holds no certificate in PEM form"),
        ({"tls.crt": chain, "tls.key": "x"}, "the key is no private key in PEM form"),
        ({"tls.crt": chain, "tls.key": strange}, "the key is not that of the first certificate"),
        ({"tls.crt": chain + other.pem, "tls.key": key}, "the chain is broken"),
        ({"tls.crt": chain * 20, "tls.key": key}, "the chain holds more than 10 certificates"),
        (data(ca.issue("b.example.org")), "is not for a.example.org"),
    ):
        site.values["Secret", "shop", "s"] = given
        assert site.waiting(**wish) == why
    site.values["Secret", "shop", "s"] = {"tls.crt": chain + ca.pem, "tls.key": key}
    made = site.config(**wish)
    assert made.tls is not None
    assert made.tls.certificates[0].sealed
    site.values["Secret", "shop", "s"] = dict(
        zip(("tls.crt", "tls.key"), ca.issue(common="a.example.org"), strict=True)
    )
    assert site.waiting(port=443, tls=tls({"secret": "s"})) == "names no host"  # a common name is none


def test_the_nodes_own_certificate() -> None:
    ca, site = Authority(), Site()
    wish = {"port": 443, "tls": tls({"hosts": ["a.example.org"], "platform": True})}
    assert "none from its hub" in site.waiting(**wish)
    chain, key = ca.issue("n1.node.edgeward.internal")
    site.own = key + chain
    assert site.waiting(**wish) == "waits for the hub to sign for a.example.org"
    chain, key = ca.issue("n1.node.edgeward.internal", "a.example.org")
    site.own = key + chain
    made = site.config(**wish)
    assert made.tls is not None
    assert made.tls.certificates[0].hosts == ("a.example.org",)  # and not for the node's own name


def test_without_the_authorities_of_clients_nobody_is_let_in() -> None:
    ca, site = Authority(), Site()
    site.values["Secret", "shop", "s"] = data(ca.issue("a.example.org"))
    wish = {"port": 443, "tls": tls({"secret": "s"}, clientCA={"config": "c"})}
    for given, why in ((None, "is not here yet"), ({}, "no key 'ca.crt'"), ({"ca.crt": "x"}, "no certificate")):
        if given is not None:
            site.values["Config", "shop", "c"] = given
        made = site.config(**wish)
        assert why in made.refused
        assert made.tls is not None
        assert not made.tls.certificates
    site.values["Config", "shop", "c"] = {"ca.crt": "# ours\n" + ca.pem}
    made = site.config(**wish)
    assert made.tls is not None
    assert (made.refused, made.tls.client_ca, made.tls.client_optional) == ("", ca.pem, False)


def test_the_nodes_owner_has_the_last_word() -> None:
    made = Site().config(port=80, address=ALL)
    assert made.refused.startswith(f"this node lets nothing listen on {ALL}:80")


def test_what_acme_authorities_are_asked_for() -> None:
    ca = Authority()

    class Orders:
        wishes: Any = None
        got: Pair | str = "is asked for"

        def wanted(self, wishes: Any) -> None:
            self.wishes = list(wishes)

        def found(self, wish: Wish) -> Pair | str:
            return self.got

    orders = Orders()
    site = Site(orders=orders)
    acme = {"directory": "https://acme.example.org/dir", "ca": {"config": "c"}, "contact": ["mailto:a@b.org"]}
    wish = {"port": 443, "tls": tls({"hosts": ["a.example.org"], "acme": acme})}
    assert "Config/c" in site.waiting(**wish)
    assert orders.wishes == []
    site.values["Config", "shop", "c"] = {"ca.crt": ca.pem}
    assert site.waiting(**wish) == "is asked for"
    assert orders.wishes == [
        Wish(("a.example.org",), "https://acme.example.org/dir", ("mailto:a@b.org",), False, ca.pem, "shop/l")
    ]
    orders.got = read_pair(*ca.issue("a.example.org"))
    made = site.config(**wish)
    assert made.tls is not None
    assert made.tls.certificates[0].sealed


def test_when_a_certificate_is_to_be_renewed() -> None:
    begin = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    pair = read_pair(*Authority().issue("a.org", begin=begin, end=begin + datetime.timedelta(days=90)))
    t = begin.timestamp()
    assert [pair.due(t + d * 86400) for d in (0, 59, 60, 100)] == [False, False, True, True]
    assert pair.missing(["a.org", "b.org", "*.a.org"]) == ["b.org", "*.a.org"]


def test_authorities_are_certificates_and_not_too_many() -> None:
    ca = Authority()
    assert read_authorities(f"x\n{ca.pem}\n{ca.pem}") == ca.pem * 2
    with pytest.raises(Invalid):
        read_authorities(ca.pem * 65)
