"""Kind Listener: what may be declared, where it may listen, and which names the platform certifies."""

from __future__ import annotations

from typing import Any

import pytest

from edgeward.core.errors import Invalid
from edgeward.core.registry import kinds
from edgeward.core.resource import Resource, decode
from edgeward.core.scope import check_reach
from edgeward.gateway.bounds import bounds, why_not
from edgeward.gateway.listener_spec import names_by_node
from edgeward.gateway.listens import by_host, find
from edgeward.hub.kinds import load

load()
ALL = "0.0.0.0"  # noqa: S104


def make(kind: str, name: str, **spec: Any) -> Resource:
    meta = {"name": name} | ({"namespace": "shop"} if kind == "Listener" else {})
    made = decode({"apiVersion": "edgeward/v1", "kind": kind, "metadata": meta, "spec": spec})
    kinds.get(kind).check(made)
    return made


def tls(*certificates: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"certificates": list(certificates), **more}


ACME = {"directory": "https://acme.example.org/directory"}


def test_what_it_may_be() -> None:
    listener = make(
        "Listener", "l", port=8443, address="192.0.2.1",
        tls=tls(
            {"secret": "s"}, {"hosts": ["a.example.org", "192.0.2.1", "::1"], "acme": ACME | {"ca": {"config": "c"}}},
            {"hosts": ["*.b.example.org"], "platform": True}, clientCA={"config": "clients"},
        ),
    )  # fmt: skip
    refs = {(r.kind, r.name) for r in kinds.get("Listener").refs(listener)}
    assert refs == {("Secret", "s"), ("Config", "c"), ("Config", "clients")}
    assert make("Listener", "plain", port=80, redirect=443).spec.address == "127.0.0.1"


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"port": 80, "address": "localhost"}, "$.spec.address"),
        ({"port": 80, "address": "::1%lo"}, "$.spec.address"),
        ({"port": 443, "tls": tls({"secret": "s"}), "redirect": 443}, "$.spec.redirect"),
        ({"port": 443, "tls": tls({"hosts": ["a"]})}, "$.spec.tls.certificates[0]"),
        ({"port": 443, "tls": tls({"secret": "s", "platform": True})}, "$.spec.tls.certificates[0]"),
        ({"port": 443, "tls": tls({"platform": True})}, "$.spec.tls.certificates[0].hosts"),
        ({"port": 443, "tls": tls({"acme": ACME})}, "$.spec.tls.certificates[0].hosts"),
        ({"port": 443, "tls": tls({"hosts": ["A.example.org"], "secret": "s"})}, "$.spec.tls.certificates[0].hosts[0]"),
        ({"port": 443, "tls": tls({"hosts": ["a..b"], "secret": "s"})}, "$.spec.tls.certificates[0].hosts[0]"),
        ({"port": 443, "tls": tls({"hosts": ["a.*.b"], "secret": "s"})}, "$.spec.tls.certificates[0].hosts[0]"),
        ({"port": 443, "tls": tls({"hosts": ["0::1"], "secret": "s"})}, "$.spec.tls.certificates[0].hosts[0]"),
        # the same address in another text: it could be the hub's own
        ({"port": 443, "tls": tls({"hosts": ["fd00::1%x"], "platform": True})}, "$.spec.tls.certificates[0].hosts[0]"),
        ({"port": 443, "tls": tls({"hosts": ["*.a.org"], "acme": ACME})}, "$.spec.tls.certificates[0].hosts[0]"),
        ({"port": 443, "tls": tls({"hosts": ["localhost"], "platform": True})}, "$.spec.tls.certificates[0].hosts[0]"),
        ({"port": 443, "tls": tls({"hosts": ["127.0.0.2"], "platform": True})}, "$.spec.tls.certificates[0].hosts[0]"),
        (
            {"port": 443, "tls": tls({"hosts": ["n2.node.edgeward.internal"], "platform": True})},
            "$.spec.tls.certificates[0].hosts[0]",
        ),
        (
            {"port": 443, "tls": tls({"hosts": ["*.edgeward.internal"], "platform": True})},
            "$.spec.tls.certificates[0].hosts[0]",
        ),
        (
            {"port": 443, "tls": tls({"hosts": ["a.org"], "secret": "s"}, {"hosts": ["a.org"], "secret": "t"})},
            "$.spec.tls.certificates[1].hosts",
        ),
        (
            {"port": 443, "tls": tls({"hosts": ["a.org"], "acme": {"directory": "http://a.org/"}})},
            "$.spec.tls.certificates[0].acme.directory",
        ),
        (
            {"port": 443, "tls": tls({"hosts": ["a.org"], "acme": ACME | {"contact": ["ops@a.org"]}})},
            "$.spec.tls.certificates[0].acme.contact[0]",
        ),
    ],
    ids=str,
)
def test_what_is_refused(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as e:
        make("Listener", "l", **spec)
    assert e.value.field == field


def test_no_site_declares_one() -> None:
    """Else a node that was broken into had itself certified for whatever name it likes."""
    with pytest.raises(Invalid, match="a site cannot write a Listener"):
        check_reach(make("Listener", "l", port=80), "plant")


def test_only_the_loopback_unless_the_owner_says_more() -> None:
    default = bounds(None)
    assert not why_not("127.0.0.1", 443, default)
    assert not why_not("127.8.8.8", 1, default)
    assert not why_not("::1", 443, default)
    for address in (ALL, "::", "192.0.2.10", "10.0.0.1", "::ffff:127.0.0.1"):
        assert '"allow"' in why_not(address, 443, default)
    some = bounds(["192.0.2.10:443", "10.0.0.0/8:8000-8999", "[fd00::/8]:443"])
    assert not why_not("192.0.2.10", 443, some)
    assert not why_not("10.1.2.3", 8999, some)
    assert not why_not("fd00::1", 443, some)
    for address, port in (("192.0.2.10", 80), ("10.1.2.3", 9000), ("127.0.0.1", 443), (ALL, 443)):
        assert why_not(address, port, some)
    # all interfaces are more than any network, and only themselves allow them
    assert why_not(ALL, 443, bounds([f"{ALL}/0"]))
    assert not why_not(ALL, 443, bounds([f"{ALL}:443"]))
    assert not why_not("::", 443, bounds(["[::]"]))
    assert why_not("127.0.0.1", 443, bounds([]))


@pytest.mark.parametrize(
    "entry", ["", "localhost", "192.0.2.10:0", "192.0.2.10:90-80", "192.0.2.10:70000", "10.0.0.1/8", "::1", 7, None]
)
def test_what_is_no_bound(entry: object) -> None:
    with pytest.raises(Invalid, match=r"gateway\.allow\[0\]"):
        bounds([entry])


def test_which_certificate_a_name_gets() -> None:
    known = by_host([(("a.org", "*.b.org"), 1), (("a.org", "*.c.b.org"), 2)])
    assert [find(known, h) for h in ("a.org", "x.b.org", "x.c.b.org", "c.b.org")] == [1, 1, 2, 1]
    assert not any(find(known, h) for h in ("b.org", "x.y.b.org", "", ".b.org"))


def test_the_hub_certifies_what_is_declared_and_never_its_own_names() -> None:
    nodes = [make("Node", "n1", site="plant"), make("Node", "n2", site="ship")]
    mine = {"hosts": ["shop.plant.org", "hub.example.org", "*.example.org", "10.0.0.9"], "platform": True}
    listeners = [
        make(
            "Listener", "a", port=443, placement={"site": "plant"}, tls=tls(mine, {"hosts": ["s.org"], "secret": "s"})
        ),
        make("Listener", "b", port=444, tls=tls({"hosts": ["everywhere.org"], "platform": True})),
        make("Listener", "c", port=80),
    ]
    found = names_by_node(listeners, nodes, {"hub.example.org", "10.0.0.9", "localhost"})
    assert found == {"n1": ("everywhere.org", "shop.plant.org"), "n2": ("everywhere.org",)}
    many = {"hosts": [f"{'x' * 60}.{'y' * 60}.h{n}.org" for n in range(30)], "platform": True}
    (names,) = names_by_node([make("Listener", "d", port=1, tls=tls(many))], nodes[:1], set()).values()
    assert 20 < len(names) < 30  # a certificate must fit into what travels
