"""What the steering zone answers, read by dnspython."""

from __future__ import annotations

import ipaddress

import dns.edns
import dns.flags
import dns.message
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.gateway.dnszone import FACTOR, TCP_MOST, Zone, literal, respond
from edgeward.gateway.steer import Edge, Steering

ZONE = Zone("edge.example.org", ("app", "a.deep"), {"ns1.edge.example.org": ("192.0.2.53", "2001:db8::53")})
SITES = [
    Edge("plant", ("10.1.0.0/16",), None, ("192.0.2.1", "[2001:db8::1]:8443", "plant.example.org:80")),
    Edge("shop", ("10.1.9.0/24", "2001:db8:9::/48"), None, ("192.0.2.2:8080",)),
]
STEER = Steering.of(SITES).steer


def get(
    name: str,
    kind: str = "A",
    ecs: dns.edns.ECSOption | None = None,
    asker: str = "10.1.2.3",
    udp: bool = True,
    **more: object,
) -> dns.message.Message:
    if ecs is not None:
        more |= {"use_edns": 0, "options": [ecs]}
    message = dns.message.make_query(name, kind, **more)  # type: ignore[arg-type]
    data = message.to_wire()
    wire, _ = respond(data, asker, ZONE, STEER, udp=udp)
    assert wire is not None and len(wire) <= (FACTOR * len(data) if udp else TCP_MOST)
    answer = dns.message.from_wire(wire)
    assert message.is_response(answer)
    return answer


def said(answer: dns.message.Message) -> list[str]:
    return [str(r) for s in answer.answer for r in s]


@pytest.mark.parametrize("name", ["edge.example.org", "App.EDGE.example.org", "a.deep.edge.example.org"])
def test_a_host_has_the_addresses_of_the_clients_site(name: str) -> None:
    assert said(get(name)) == ["192.0.2.1"]
    assert said(get(name, "AAAA")) == ["2001:db8::1"]
    assert said(get(name, asker="10.1.9.1")) == ["192.0.2.2"]
    assert said(get(name, asker="::ffff:10.1.9.1")) == ["192.0.2.2"]
    ecs = get(name, ecs=dns.edns.ECSOption("10.1.9.0", 24))
    assert said(ecs) == ["192.0.2.2"]
    assert ecs.options[0].scopelen == 24  # type: ignore[attr-defined]
    # the rest of 10.1/16 is another site's, so the answer may not be kept for all of 10.1/16
    other = get(name, ecs=dns.edns.ECSOption("10.1.2.0", 24))
    assert (said(other), other.options[0].scopelen) == (["192.0.2.1"], 21)  # type: ignore[attr-defined]
    six = get(name, ecs=dns.edns.ECSOption("2001:db8:9:1::", 56))
    assert (said(six), six.options[0].scopelen) == (["192.0.2.2"], 48)  # type: ignore[attr-defined]
    # who does not want to be known is known by who asks for them
    private = get(name, ecs=dns.edns.ECSOption("10.0.0.0", 0), asker="10.1.9.1")
    assert (said(private), private.options[0].scopelen) == (["192.0.2.2"], 0)  # type: ignore[attr-defined]


def test_what_there_is_not() -> None:
    nodata = get("edge.example.org", "AAAA", ecs=dns.edns.ECSOption("10.1.9.0", 24))
    assert nodata.rcode() == 0 and not nodata.answer
    assert nodata.authority[0].name.to_text() == "edge.example.org."
    assert nodata.options[0].scopelen == 24, "that there is none holds for those clients only"  # type: ignore[attr-defined]
    for name, kind in (("app.edge.example.org", "TXT"), ("deep.edge.example.org", "A"), ("app.edge.example.org", "NS")):
        answer = get(name, kind)
        assert (answer.rcode(), answer.answer) == (0, []), name
        assert answer.authority[0][0].minimum == 10
    gone = get("nobody.edge.example.org")
    assert gone.rcode() == dns.rcode.NXDOMAIN and gone.flags & dns.flags.AA
    assert gone.authority[0].name.to_text() == "edge.example.org."
    for name in ("example.org", "notedge.example.org", "edge.example.org.evil.net", "."):
        refused = get(name)
        assert refused.rcode() == dns.rcode.REFUSED and not refused.flags & dns.flags.AA and not refused.authority
    assert get("edge.example.org", "ANY").rcode() == dns.rcode.REFUSED
    assert get("edge.example.org", "ANY", udp=False).rcode() == dns.rcode.REFUSED
    assert get("edge.example.org", rdclass="CH").rcode() == dns.rcode.REFUSED


def test_the_zones_own_records() -> None:
    soa = get("edge.example.org", "SOA").answer[0]
    assert (str(soa[0].mname), soa.ttl) == ("ns1.edge.example.org.", 10)
    assert said(get("edge.example.org", "NS")) == ["ns1.edge.example.org."]
    assert said(get("ns1.edge.example.org")) == ["192.0.2.53"]
    assert said(get("ns1.edge.example.org", "AAAA")) == ["2001:db8::53"]
    for wrong in ({"name": "a..b"}, {"name": "a.b", "hosts": ("x" * 64,)}, {"name": "a", "servers": {"n": ("x",)}}):
        with pytest.raises(ValueError):
            Zone(**wrong)  # type: ignore[arg-type]


def test_nobody_is_flooded_with_our_answers() -> None:
    many = Edge("a", (), None, tuple(f"192.0.2.{n}" for n in range(16)))
    steer = Steering.of([many]).steer
    data = dns.message.make_query("edge.example.org", "A").to_wire()
    wire, _ = respond(data, "10.0.0.1", ZONE, steer)
    assert wire is not None and len(wire) <= FACTOR * len(data)
    assert dns.message.from_wire(wire).flags & dns.flags.TC
    wire, _ = respond(data, "10.0.0.1", ZONE, steer, udp=False)
    assert wire is not None and len(said(dns.message.from_wire(wire))) == 16


def test_no_site_is_no_answer_that_stays() -> None:
    data = dns.message.make_query("edge.example.org", "A").to_wire()
    wire, mine = respond(data, "10.0.0.1", ZONE, Steering.of([]).steer)
    assert wire is not None and mine
    assert dns.message.from_wire(wire).rcode() == dns.rcode.SERVFAIL


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_odd_bytes_get_a_short_answer_or_none(noise: bytes, udp: bool) -> None:
    good = dns.message.make_query("edge.example.org", "A", use_edns=0).to_wire()
    for data in (noise, good[:12] + noise, good + noise):
        wire, _ = respond(data, "10.0.0.1", ZONE, STEER, udp=udp)
        assert wire is None or len(wire) <= FACTOR * len(data)


def test_addresses_are_told_from_names() -> None:
    for text, want in (
        ("192.0.2.1", "192.0.2.1"), ("192.0.2.1:80", "192.0.2.1"), ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]:80", "2001:db8::1"), ("plant.example.org", None), ("plant:80", None),
    ):  # fmt: skip
        assert literal(text) == (ipaddress.ip_address(want) if want else None)
