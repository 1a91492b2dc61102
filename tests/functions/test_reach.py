"""What a list of `limits.network` means, entry by entry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.functions.node import function

from edgeward.core.errors import Invalid
from edgeward.functions.reach import Allowed, Target, environment, parse, plausible


@pytest.mark.parametrize(
    ("text", "name", "network", "ports", "protocol"),
    [
        ("api.example.org:443", "api.example.org", None, (443, 443), "tcp"),
        ("API.Example.org.:443", "api.example.org", None, (443, 443), "tcp"),
        ("plc_1:502", "plc_1", None, (502, 502), "tcp"),
        ("192.0.2.1:53/udp", "", "192.0.2.1/32", (53, 53), "udp"),
        ("192.0.2.0/24:1000-2000", "", "192.0.2.0/24", (1000, 2000), "tcp"),
        ("[2001:db8::1]:*", "", "2001:db8::1/128", (1, 65535), "tcp"),
        ("[2001:db8::]/32:443", "", "2001:db8::/32", (443, 443), "tcp"),
    ],
)
def test_an_entry(text: str, name: str, network: str | None, ports: tuple[int, int], protocol: str) -> None:
    e = parse(text)
    got = None if e.network is None else str(e.network)
    assert (e.name, got, (e.low, e.high), e.protocol) == (name, network, ports, protocol)


@pytest.mark.parametrize(
    "text",
    [
        "", "host", "host:", ":443", "host:0", "host:65536", "host:2-1", "host:443/tcp", "host:443/UDP", "a b:1",
        "192.0.2.1/24:5", "192.0.2.300:5", "[::1:5", "::1:5", "-a:1", "a..b:1", "*.example.org:1", "http://a:1",
        "user@a:1", "1.2.3:4", "a" * 64 + ":1", "é.org:1",
    ],
)  # fmt: skip
def test_what_is_no_entry(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse(text)


def test_the_field_is_named() -> None:
    with pytest.raises(Invalid) as e:
        function("f", "x", limits={"network": ["a:1", "b"]})
    assert e.value.field == "$.spec.limits.network[1]"
    with pytest.raises(Invalid, match="empty"):
        function("f", "x", limits={"network": []})
    assert function("f", "x", limits={"network": ["b:1", "a:1", "b:1"]}).version.reach == ["a:1", "b:1"]
    digests = {function("f", "x", limits={"network": n}).version.digest for n in ("none", "all", ["a:1"], ["a:2"])}
    assert len(digests) == 4


def test_targets() -> None:
    r = Allowed(["192.0.2.0/24:502", "a.org:443", "b.org:443", "b.org:53/udp", "[2001:db8::]/32:80"])
    assert r.target("tcp", "192.0.2.9", 502) == Target("192.0.2.9", False)
    assert r.target("tcp", "::ffff:192.0.2.9", 502) == Target("192.0.2.9", False)
    assert r.target("tcp", "2001:db8::1%eth0", 80) == Target("2001:db8::1", False)
    for protocol, host, port in (
        ("udp", "192.0.2.9", 502), ("tcp", "192.0.2.9", 503), ("tcp", "192.0.3.9", 502), ("tcp", "2001:db9::1", 80),
        ("tcp", "a.org", 443), ("tcp", "127.199.0.3", 443), ("tcp", "127.199.0.0", 443),
    ):  # fmt: skip
        assert r.target(protocol, host, port) is None  # type: ignore[arg-type]
    hosts = r.hosts()
    assert sorted(hosts) == ["a.org", "b.org"]
    for name, addresses in hosts.items():
        for address in addresses:
            assert r.target("tcp", address, 443) == Target(name, True)
            assert (r.target("udp", address, 53) is not None) == (name == "b.org")
            assert r.target("tcp", address, 80) is None
    assert environment(["a.org:1"]) == "a.org=127.199.0.1,fd65:6467:6577:6172::1"


@given(st.ip_addresses(), st.integers(1, 65535))
def test_nothing_is_reached_by_an_empty_list_or_anothers_port(address: object, port: int) -> None:
    assert Allowed([]).target("tcp", str(address), port) is None
    other = port % 65535 + 1
    assert (
        Allowed([f"0.0.0.0/0:{other}", f"[::]/0:{other}"]).target("tcp", str(address).partition("%")[0], port) is None
    )


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "169.254.169.254", "fe80::1", "::", "::ffff:127.0.0.1", "224.0.0.1"]
)
def test_a_name_never_means_the_node_itself(address: str) -> None:
    assert not plausible(address)
    assert plausible("10.0.0.1") and plausible("2001:db8::1")
