"""Steering against a naive oracle: every prefix looked at, every distance measured."""

from __future__ import annotations

import ipaddress
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.gateway.steer import BITS, LEAST, SHARED, Edge, Prefixes, Steering, client_address, distance

PARIS, BERLIN, TOKYO = (48.8566, 2.3522), (52.52, 13.405), (35.6762, 139.6503)


def edge(name: str, *prefixes: str, **more: object) -> Edge:
    return Edge(name, prefixes, addresses=(f"{name}.example.org:80",), **more)  # type: ignore[arg-type]


def naive_home(edges: list[Edge], address: object) -> str | None:
    best: tuple[int, str] | None = None
    for e in sorted(edges, key=lambda e: e.name):
        for p in e.prefixes:
            net = ipaddress.ip_network(p)
            if address in net and (best is None or net.prefixlen > best[0]):  # type: ignore[operator]
                best = (net.prefixlen, e.name)
    return best[1] if best else None


def naive_near(edges: list[Edge], home: str) -> str | None:
    here = next(e for e in edges if e.name == home)
    there = [e for e in edges if e.addresses and e.online]
    if here in there:
        return home
    far = [(distance(here.place, e.place) if here.place and e.place else math.inf, e.name) for e in there]
    return min(far)[1] if far else None


def test_great_circles_are_as_the_tables_say() -> None:
    assert distance(PARIS, BERLIN) == pytest.approx(877.5, abs=1)
    assert distance(PARIS, TOKYO) == pytest.approx(9711.7, abs=3)
    assert distance((0, 0), (0, 180)) == pytest.approx(math.pi * 6371.0088)
    assert distance((0, 179.5), (0, -179.5)) == pytest.approx(111.2, abs=0.1)


def test_own_site_then_the_nearest_with_reasons() -> None:
    paris = edge("paris", "198.51.100.0/24", place=PARIS)
    others = [edge("berlin", "10.0.0.0/8", place=BERLIN), edge("tokyo", "10.9.0.0/16", place=TOKYO), edge("nowhere")]
    client = ipaddress.ip_address("198.51.100.7")
    answer = Steering.of([paris, *others]).steer(client)
    assert (answer.site, answer.addresses) == ("paris", ("paris.example.org:80",))
    assert answer.why == ("198.51.100.7 is in 198.51.100.0/24 of site paris", "paris is its own site")
    gone = Edge("paris", paris.prefixes, PARIS, paris.addresses, nodes=2, online=0)
    answer = Steering.of([gone, *others]).steer(client)
    assert answer.site == "berlin"
    assert answer.why[1:] == (
        "paris is not taken: none of its 2 nodes is heard",
        "berlin is the nearest that takes it, 877 km from paris",
    )
    mute = Edge("paris", paris.prefixes, PARIS)
    assert "spec.addresses" in Steering.of([mute, *others]).steer(client).why[1]
    assert Steering.of([gone]).steer(client).site is None
    assert Steering.of([]).steer(client).why[-1] == "no site is there"


def test_two_hundred_networks_as_the_naive_way_says() -> None:
    rng = random.Random(7)
    edges = [
        edge(
            f"s{n:02}",
            *{f"10.{n}.{m}.0/{rng.choice([24, 25, 26, 28])}" for m in range(5)},
            *([f"10.{n}.0.0/16", f"2001:db8:{n:x}::/48"] if n % 2 else []),
            place=(rng.uniform(-60, 70), rng.uniform(-180, 180)) if n % 7 else None,
            online=n % 3 and 1,
        )
        for n in range(40)
    ]
    steering = Steering.of(edges)
    nets = [ipaddress.ip_network(p) for e in edges for p in e.prefixes]
    assert len(nets) >= 200
    seen = set()
    for net in nets:
        for address in (net[0], net[-1], net[rng.randrange(min(2**16, net.num_addresses))]):
            home = naive_home(edges, address)
            assert home is not None
            answer = steering.steer(address)
            assert answer.site == naive_near(edges, home), (address, answer)
            seen.add(answer.site)
    assert len(seen) > 20


ADDRESS4 = st.integers(0, 2**32 - 1)
#: Few bits in use, so that prefixes nest and meet.
PREFIX = st.builds(
    lambda value, length, six: str(
        ipaddress.ip_network(((value >> (8 - min(8, length)) << (8 - min(8, length))) << (120 if six else 24), length))
        if not six
        else ipaddress.IPv6Network((((value >> (8 - min(8, length))) << (8 - min(8, length))) << 120, length))
    ),
    st.integers(0, 255),
    st.integers(0, 12),
    st.booleans(),
)
EDGES = st.lists(
    st.builds(
        lambda ps, place, online, load, bare: (tuple(ps), place, online, load, bare),
        st.lists(PREFIX, max_size=5),
        st.none() | st.tuples(st.floats(-90, 90), st.floats(-180, 180)),
        st.integers(0, 2),
        st.sampled_from([0.0, 0.9, 3.0]),
        st.booleans(),
    ),
    max_size=6,
).map(
    lambda rows: [
        Edge(f"s{n}", ps, place, () if bare else (f"192.0.2.{n}",), nodes=2, online=online, load=load)
        for n, (ps, place, online, load, bare) in enumerate(rows)
    ]
)
CLIENT = st.one_of(
    ADDRESS4.map(ipaddress.IPv4Address),
    st.builds(lambda v, low: ipaddress.IPv6Address(v << 120 | low), st.integers(0, 255), st.integers(0, 2**64)),
)


@settings(max_examples=200, deadline=None)
@given(EDGES, CLIENT, st.randoms(use_true_random=False))
def test_the_match_is_the_longest_and_the_scope_is_exact(edges: list[Edge], client: object, rng: random.Random) -> None:
    prefixes = Prefixes(edges)
    version, value = client.version, int(client)  # type: ignore[attr-defined, call-overload]
    bits = BITS[version]
    found, scope = prefixes.match(version, value, bits)
    assert (found[1] if found else None) == naive_home(edges, client)
    nets = [n for e in edges for n in map(ipaddress.ip_network, e.prefixes) if n.version == version]
    kind = ipaddress.IPv4Network if version == 4 else ipaddress.IPv6Network
    around = kind((value >> (bits - scope) << (bits - scope), scope))
    # nobody in the scope is in a network that not all of it is in; one bit less, and somebody would be
    assert not [n for n in nets if n != around and n.subnet_of(around)]  # type: ignore[arg-type]
    if scope:
        wider = around.supernet()
        assert [n for n in nets if n == around or (n.subnet_of(wider) and n != wider)]  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(EDGES, CLIENT, st.integers(0, 128), st.integers(0, 2**128))
def test_everybody_in_the_scope_gets_the_same_answer(
    edges: list[Edge], client: object, source: int, other: int
) -> None:
    steering = Steering.of(edges)
    bits = BITS[client.version]  # type: ignore[attr-defined]
    answer = steering.steer(client)  # type: ignore[arg-type]
    assert 0 <= answer.scope <= bits
    low = (1 << (bits - answer.scope)) - 1
    neighbour = type(client)(int(client) & ~low | other & low)  # type: ignore[call-arg, call-overload]
    same = steering.steer(neighbour)
    assert (same.site, same.scope) == (answer.site, answer.scope)
    # what is not sent does not matter, and a prefix that is long enough is as good as the address
    source = min(source, bits)
    part = steering.steer(client, source)  # type: ignore[arg-type]
    if source >= answer.scope:
        assert (part.site, part.scope) == (answer.site, answer.scope)
    if part.scope <= source:
        assert part.site == answer.site
    there = {e.name for e in edges if not e.out}
    assert (answer.site in there) if there else answer.site is None
    assert Steering.of(reversed(edges)).steer(client) == answer  # type: ignore[arg-type]


def spread(edges: list[Edge], first: str) -> list[str | None]:
    steering = Steering.of(edges)
    return [steering.steer(ipaddress.ip_address(f"{first}.{a}.{b}.9")).site for a in range(40) for b in range(25)]


@pytest.mark.parametrize("first", ["10", "99"])
def test_a_weaker_site_loses_its_share_and_moves_nobody_elses(first: str) -> None:
    def sites(load: float, online: int = 4) -> list[Edge]:
        a = edge("a", "10.0.0.0/8", place=PARIS, nodes=4, online=online, load=load)
        return [a, edge("b", place=BERLIN), edge("c", place=TOKYO)]

    before = spread(sites(0.0), first)
    for weaker, share in ((sites(1.1), 0.55), (sites(0.0, 3), 0.75), (sites(9.0), LEAST)):
        after = spread(weaker, first)
        assert all(new == old for old, new in zip(before, after, strict=True) if old != "a")
        kept = after.count("a") / 1000
        want = share if first == "10" else share / (2 + share)
        assert abs(kept - want) < 0.06, (kept, want)
    if first == "10":
        assert set(before) == {"a"} and "c" not in spread(sites(1.1), first)  # those who go, go to the nearest
    assert "a" not in spread(sites(0.0, 0), first)


def test_shares_are_drawn_by_network_and_said() -> None:
    edges = [edge("a", "10.0.0.0/8", place=PARIS, load=9.0), edge("b", place=BERLIN)]
    steering = Steering.of(edges)
    moved = steering.steer(ipaddress.ip_address("10.0.0.1"))
    assert moved.scope == SHARED[4]
    assert any("takes 10% of its networks" in w and "load is 9.00" in w for w in moved.why) == (moved.site == "b")
    assert Steering.of(edges[:1]).steer(ipaddress.ip_address("10.0.0.1")).site == "a", "there is no other"
    assert client_address("::ffff:192.0.2.1") == ipaddress.ip_address("192.0.2.1")
    assert str(client_address(" fe80::1%eth0 ")) == "fe80::1"
    with pytest.raises(ValueError, match="does not appear"):
        client_address("plant")


def test_a_prefix_that_is_too_short_is_no_place_in_a_longer_one() -> None:
    prefixes = Prefixes([edge("a", "10.0.0.0/16"), edge("b", "10.0.0.0/8")])
    ten = 10 << 24
    assert prefixes.match(4, ten, 8) == (("10.0.0.0/8", "b"), 16)
    assert prefixes.match(4, ten, 16) == (("10.0.0.0/16", "a"), 16)
    assert prefixes.match(4, ten, 7) == (None, 16)
