from __future__ import annotations

import ipaddress
import random

import msgspec
import pytest

from edgeward.lab.links import Profile
from edgeward.lab.topology import SiteSpec, Topology
from edgeward.lab.wan import BLOCKS, HUB, Plan, Wan, groups_of

TOPOLOGY = Topology(
    (
        SiteSpec("plant", 3, Profile(delay_ms=10, up_kbit=8_000)),
        SiteSpec("shop", 1, Profile(delay_ms=50, jitter_ms=20, loss=0.1)),
    )
)


def ip(plan: Plan, source: str, target: str, size: int = 100) -> bytes:
    head = bytes([0x45, 0]) + size.to_bytes(2, "big") + bytes(8)
    return (head + plan.address[source].packed + plan.address[target].packed).ljust(size, b"x")


def wan() -> Wan:
    return Wan(TOPOLOGY, Plan(TOPOLOGY, BLOCKS[3]), seed=7)


def test_addresses_are_apart_and_every_lab_fits_its_block() -> None:
    largest = Topology(tuple(SiteSpec(f"s{n}", 64) for n in range(64)))
    plan = Plan(largest, BLOCKS[0])
    assert len(set(plan.address.values()) | {plan.host}) == 64 * 64 + 2
    assert all(a in BLOCKS[0] for a in plan.address.values())
    for site, node in largest.nodes():
        homes = [s for s, lan in plan.lan.items() if plan.address[node] in lan]
        assert homes == [site.name]
        assert plan.address[node] not in (plan.lan[site.name].network_address, plan.lan[site.name].broadcast_address)
    assert len({b.network_address for b in BLOCKS}) == 8
    assert not any(a.overlaps(b) for a in BLOCKS for b in BLOCKS if a is not b)


def test_node_and_hub_talk_after_the_delay_and_in_order() -> None:
    w = wan()
    packets = [ip(w.plan, "plant-1", HUB, 1000 + n) for n in range(5)]
    for packet in packets:
        w.send(0.0, "plant-1", packet)
    assert w.due(0.0109) == []
    assert w.next_at == pytest.approx(0.011)  # 1000 bytes at 8 Mbit/s, and 10 ms
    got = w.due(1.0)
    assert [d.packet for d in got] == packets
    assert {(d.origin, d.to) for d in got} == {("plant-1", HUB)}
    assert w.next_at is None
    w.send(2.0, HUB, ip(w.plan, HUB, "plant-2"))
    assert [d.to for d in w.due(2.011)] == ["plant-2"]
    assert (w.nodes["plant-1"].up.packets, w.nodes["plant-1"].up.bytes) == (5, sum(map(len, packets)))
    assert w.nodes["plant-2"].down.packets == 1


def test_the_nodes_of_a_site_share_its_bandwidth() -> None:
    w = wan()
    w.send(0.0, "plant-1", ip(w.plan, "plant-1", HUB, 1000))
    w.send(0.0, "plant-2", ip(w.plan, "plant-2", HUB, 1000))
    assert [d.at for d in w.due(1.0)] == pytest.approx([0.011, 0.012])


def test_nothing_goes_past_the_hub_or_under_a_false_name() -> None:
    w = wan()
    w.send(0.0, "plant-1", ip(w.plan, "plant-1", "shop-1"))
    w.send(0.0, "plant-1", ip(w.plan, "shop-1", HUB))  # a forged source
    w.send(0.0, "plant-1", ip(w.plan, "plant-1", "plant-1"))
    nowhere = bytearray(ip(w.plan, "plant-1", HUB))
    nowhere[16:20] = ipaddress.IPv4Address("8.8.8.8").packed
    w.send(0.0, "plant-1", bytes(nowhere))
    w.send(0.0, HUB, bytes(nowhere))
    w.send(0.0, "plant-1", b"")
    w.send(0.0, "plant-1", bytes([0x60]) * 60)
    assert w.due(9.0) == []
    assert w.pairs["plant-1>shop-1"].cut == 1
    assert w.nodes["plant-1"].refused == 3


def test_where_sites_reach_one_another_both_links_carry_it_and_both_count() -> None:
    w = Wan(msgspec.structs.replace(TOPOLOGY, between="open"), Plan(TOPOLOGY, BLOCKS[3]), seed=7)
    packet = ip(w.plan, "shop-1", "plant-1", 1000)
    w.links["shop"].set_profile(Profile(delay_ms=50))
    w.send(0.0, "shop-1", packet)
    assert w.due(0.051) == [], "at the far end of the shop's link"
    assert w.next_at == pytest.approx(0.061), "then over the plant's"
    assert [(d.origin, d.to, d.packet) for d in w.due(0.062)] == [("shop-1", "plant-1", packet)]
    assert (w.nodes["shop-1"].up.packets, w.nodes["plant-1"].down.packets) == (1, 1)
    assert (w.pairs["shop-1>plant-1"].packets, w.pairs["shop-1>plant-1"].bytes) == (1, 1000)
    w.links["plant"].cut = True
    w.send(1.0, "shop-1", packet)
    w.due(1.05)
    assert w.due(2.0) == []
    w.send(3.0, "plant-1", ip(w.plan, "plant-1", "shop-1"))
    assert (w.pairs["shop-1>plant-1"].cut, w.pairs["plant-1>shop-1"].cut) == (1, 1)
    assert w.next_at is None


def test_a_cut_swallows_what_is_sent_and_what_is_on_its_way() -> None:
    w = wan()
    w.send(0.0, "plant-1", ip(w.plan, "plant-1", HUB))
    w.links["plant"].cut = True
    w.send(0.001, HUB, ip(w.plan, HUB, "plant-1"))
    assert w.due(1.0) == []
    assert (w.nodes["plant-1"].up.cut, w.nodes["plant-1"].down.cut) == (1, 1)
    w.links["plant"].cut = False
    w.send(2.0, "plant-1", ip(w.plan, "plant-1", HUB))
    assert len(w.due(3.0)) == 1


def test_every_packet_is_accounted_for_and_a_seed_repeats() -> None:
    def run() -> tuple[list[tuple[float, bytes]], tuple[int, int, int]]:
        w, dice, sent = wan(), random.Random(3), 0
        got, now = [], 0.0
        for n in range(3000):
            now += dice.random() * 0.002
            if n == 1500:
                w.links["shop"].set_profile(Profile(delay_ms=1, down_kbit=100))
            w.send(now, HUB, ip(w.plan, HUB, "shop-1", 60 + n % 1400))
            sent += 1
            got += [(d.at, d.packet) for d in w.due(now)]
        got += [(d.at, d.packet) for d in w.due(now + 100)]
        c = w.nodes["shop-1"].down
        assert c.packets + c.lost + c.overflowed == sent
        assert c.packets == len(got)
        assert [at for at, _ in got] == sorted(at for at, _ in got)
        return got, (c.packets, c.lost, c.overflowed)

    one, counts = run()
    assert min(counts) > 0
    assert (one, counts) == run()


def test_groups() -> None:
    nodes = ("p-1", "p-2", "p-3")
    assert groups_of(nodes, [["p-1"]]) == [["p-1"], ["p-2", "p-3"]]
    assert groups_of(nodes, [["p-1", "p-3"], ["p-2"]]) == [["p-1", "p-3"], ["p-2"]]
    with pytest.raises(ValueError, match="no node 'x'"):
        groups_of(nodes, [["x"]])
    with pytest.raises(ValueError, match="two groups"):
        groups_of(nodes, [["p-1"], ["p-1"]])
