"""What a Site and a Node may say."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from edgeward.core.errors import Invalid
from edgeward.core.registry import kinds
from edgeward.core.resource import decode
from edgeward.hub.kinds import load

load()


def made(kind: str, spec: dict[str, Any], **meta: Any) -> Any:
    return decode({"apiVersion": "edgeward/v1", "kind": kind, "metadata": {"name": "x", **meta}, "spec": spec})


@pytest.mark.parametrize(
    ("kind", "spec", "field", "says"),
    [
        ("Node", {}, "$.spec.site", "is required"),
        ("Node", {"site": ""}, "$.spec.site", r"is empty \(at least 1"),
        ("Node", {"site": "a", "sites": "b"}, "$.spec.sites", "did you mean 'site'"),
        ("Site", {"displayName": "x" * 257}, "$.spec.displayName", "at most 256"),
        ("Site", {"coordinates": {"lat": 90.1, "lon": 0}}, "$.spec.coordinates.lat", "too large .at most 90"),
        ("Site", {"coordinates": {"lat": 0, "lon": -180.1}}, "$.spec.coordinates.lon", "too small .at least -180"),
        ("Site", {"coordinates": {"lat": 0}}, "$.spec.coordinates.lon", "is required"),
        ("Site", {"prefixes": ["10.0.0.0/8", "10.1"]}, "$.spec.prefixes[1]", "10.1.0.0/16"),
        ("Site", {"prefixes": ["10.1.0.1/16"]}, "$.spec.prefixes[0]", "host bits set"),
        ("Site", {"prefixes": ["fd00::/129"]}, "$.spec.prefixes[0]", "write a network as"),
        ("Site", {"addresses": ["a.example.org:80", "192.0.2.256"]}, "$.spec.addresses[1]", "write an IP address"),
        ("Site", {"addresses": ["http://a.example.org/"]}, "$.spec.addresses[0]", "is no address"),
        ("Site", {"addresses": ["[192.0.2.1]:80"]}, "$.spec.addresses[0]", "is no address"),
        ("Site", {"addresses": ["[2001:db8::1]"]}, "$.spec.addresses[0]", "is no address"),
        ("Site", {"addresses": ["192.0.2.1:65536"]}, "$.spec.addresses[0]", "is no address"),
        ("Site", {"addresses": ["a b"]}, "$.spec.addresses[0]", "is no address"),
        ("Site", {"addresses": ["a.example.org\n"]}, "$.spec.addresses[0]", "is no address"),
    ],
)
def test_refusals(kind: str, spec: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(Invalid, match=says) as caught:
        made(kind, spec)
    assert (caught.value.resource, caught.value.field) == (f"{kind}/x", field)


def test_neither_has_a_namespace() -> None:
    for kind, spec in (("Site", {}), ("Node", {"site": "a"})):
        with pytest.raises(Invalid, match=r"has no namespace \(remove it\)"):
            made(kind, spec, namespace="default")


def test_what_is_taken() -> None:
    site = made("Site", {"coordinates": {"lat": -90, "lon": 180}, "prefixes": ["10.1.0.0/16", "fd00::/64", "10.9.9.9"]})
    assert decode(site.document()) == site
    node = made("Node", {"site": "plant"})
    assert [(r.kind, r.namespace, r.name, r.path) for r in kinds.get("Node").refs(node)] == [
        ("Site", "_", "plant", "$.spec.site")
    ]
    for kind in ("Site", "Node"):
        decode(yaml.safe_load(kinds.get(kind).example))


@pytest.mark.parametrize(
    ("status", "state"), [({"online": True}, "online"), ({"online": False}, "offline"), ({}, "never seen")]
)
def test_the_state_that_people_see(status: dict[str, Any], state: str) -> None:
    d = made("Node", {"site": "plant"}).document() | {"status": status}
    shown = {c.title: c.value(d) for c in kinds.get("Node").columns}
    assert (shown["SITE"], shown["STATE"], shown["VERSION"]) == ("plant", state, "")
    d.pop("status")
    assert {c.title: c.value(d) for c in kinds.get("Node").columns}["STATE"] == "never seen"


@pytest.mark.parametrize(
    "address",
    ["192.0.2.1", "192.0.2.1:80", "2001:db8::1", "[2001:db8::1]:8443", "localhost", "edge-1.example.org:65535"],
)
def test_addresses_of_a_site(address: str) -> None:
    assert made("Site", {"addresses": [address]}).spec.addresses == [address]
