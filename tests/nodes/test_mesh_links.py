"""Links of a mesh without sockets: two nodes and what a network, a stranger and a liar may do in between."""

from __future__ import annotations

import random

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from edgeward.core.errors import Invalid
from edgeward.core.nkeys import KeyPair
from edgeward.nodes.mesh_links import FUTURE, STALE, Links, Said
from edgeward.nodes.mesh_wire import (
    SAY_MOST,
    Card,
    Known,
    Window,
    address_of,
    known_of,
    sealed,
    show,
    shown,
    text_of,
    to_sign_card,
)

PLACE = {n: (f"10.0.0.{i}", 7000) for i, n in enumerate("abcd", 1)}


class Box:
    """A device: its key outlives its runs, and its clock is its own."""

    def __init__(self, name: str, skew: float = 0.0) -> None:
        self.name, self.skew = name, skew
        self.device = Ed25519PrivateKey.generate()
        self.epoch = 0
        self.start()

    def start(self, site: str = "plant", name: str = "") -> None:
        self.epoch += 1
        key = X25519PrivateKey.generate()
        card = Card(name or self.name, site, self.epoch, key.public_key().public_bytes_raw())
        self.packed = msgspec.msgpack.encode(card)
        self.links = Links(card, self.packed, self.device.sign(to_sign_card(self.packed)), key)

    @property
    def known(self) -> Known:
        return Known(self.name, self.device.public_key().public_bytes_raw(), PLACE[self.name])


class Net:
    """Carries datagrams after ``delay`` seconds; ``loss`` of them not; ``taps`` sees all of them."""

    def __init__(self, *boxes: Box, delay: float = 0.01, loss: float = 0.0, seed: int = 1) -> None:
        self.boxes = {PLACE[b.name]: b for b in boxes}
        self.delay, self.loss, self.random = delay, loss, random.Random(seed)
        self.now = 1000.0
        self.way: list[tuple[float, bytes, tuple[str, int], tuple[str, int]]] = []
        self.seen: list[tuple[str, bytes]] = []
        self.heard: dict[str, list[Said]] = {b.name: [] for b in boxes}
        self.deaf: set[tuple[str, str]] = set()
        self.learn()

    def learn(self) -> None:
        known = [b.known for b in self.boxes.values()]
        for box in self.boxes.values():
            box.links.learn(known, {})

    def flush(self) -> None:
        for place, box in self.boxes.items():
            out, box.links.out = box.links.out, []
            for data, target in out:
                self.seen.append((box.name, data))
                to = self.boxes.get(target)
                if to is None or (box.name, to.name) in self.deaf or self.random.random() < self.loss:
                    continue
                self.way.append((self.now + self.delay, data, place, target))

    def give(self, box: Box, data: bytes, source: tuple[str, int]) -> Said | None:
        said = box.links.receive(data, source, self.now + box.skew)
        if said is not None:
            self.heard[box.name].append(said)
        return said

    def run(self, seconds: float, step: float = 0.05) -> None:
        end = self.now + seconds
        while self.now < end:
            for box in self.boxes.values():
                box.links.tick(self.now + box.skew)
            self.flush()
            self.now += step
            due = [w for w in self.way if w[0] <= self.now]
            self.way = [w for w in self.way if w[0] > self.now]
            for _, data, source, target in due:
                self.give(self.boxes[target], data, source)
            self.flush()

    def say(self, box: Box, data: bytes) -> int:
        sent = box.links.say("t", data, None, self.now + box.skew)
        self.flush()
        return sent

    def linked(self) -> bool:
        return all(p.linked for b in self.boxes.values() for p in b.links.peers().values())


def pair(**how: float) -> tuple[Box, Box, Net]:
    a, b = Box("a"), Box("b", skew=3600.0)
    net = Net(a, b, **how)  # type: ignore[arg-type]
    net.run(3.0)
    return a, b, net


def test_clocks_an_hour_apart_agree_on_what_is_old() -> None:
    a, _b, net = pair()
    assert net.linked()
    assert net.say(a, b"one") == 1
    net.run(0.2)
    (said,) = net.heard["b"]
    assert (said.peer, said.topic, said.data) == ("a", "t", b"one")
    assert said.heard.address == PLACE["a"]
    assert said.heard.epoch == a.epoch
    assert 0.0 <= said.heard.age < 0.2
    assert 0.0 < a.links.peers()["b"].rtt < 0.3


@pytest.mark.parametrize("seed", range(5))
def test_a_satellite_that_loses_a_third_links_and_carries(seed: int) -> None:
    a, b = Box("a"), Box("b", skew=-7200.0)
    net = Net(a, b, delay=0.6, loss=0.3, seed=seed)
    net.run(60.0)
    assert net.linked()
    for n in range(200):
        net.say(a, str(n).encode())
        net.run(0.5)
    net.run(3.0)
    assert len(net.heard["b"]) > 100
    assert a.links.counters["future"] == b.links.counters["future"] == b.links.counters["stale"] == 0


def test_nothing_counts_twice_and_nothing_of_an_earlier_run() -> None:
    a, b, net = pair()
    net.say(a, b"one")
    net.run(0.2)
    captured = [d for who, d in net.seen if who == "a"]
    for data in captured:
        assert net.give(b, data, PLACE["a"]) is None
    assert b.links.counters["replayed"] >= 1
    # the receiver starts anew: it knows nothing of what came before
    b.start()
    net.learn()
    for data in captured:
        assert net.give(b, data, PLACE["a"]) is None
    assert not b.links.peers()["a"].linked
    net.run(30.0)
    assert net.linked()
    for data in captured:
        assert net.give(b, data, PLACE["a"]) is None
    net.say(a, b"two")
    net.run(0.2)
    assert [s.data for s in net.heard["b"]] == [b"one", b"two"]


def test_old_cards_do_not_keep_a_new_run_out() -> None:
    a, b, net = pair()
    old: list[bytes] = []
    for _ in range(6):
        old += [d for who, d in net.seen if who == "a" and shown(d)]
        a.start()
        net.learn()
        net.seen.clear()
        for n in range(600):  # a stranger shows all that he has, again and again
            for data in dict.fromkeys(old) if n % 10 == 0 else ():
                net.give(b, data, ("10.9.9.9", 1))
            net.run(0.05)
        assert net.linked()
    net.say(a, b"new")
    net.run(0.2)
    assert net.heard["b"][-1].data == b"new"
    assert net.heard["b"][-1].heard.epoch == a.epoch


def test_what_is_held_back_or_dated_later_is_refused() -> None:
    a, b, net = pair()
    link = a.links._peers["b"].link
    assert link is not None
    now = net.now
    late = link.seal(now - STALE - 5, b"t", b"held back")
    early = link.seal(now + FUTURE + 5, b"t", b"not yet")
    never = link.seal(float("nan"), b"t", b"no time")
    good = link.seal(now, b"t", b"good")
    assert [net.give(b, d, PLACE["a"]) for d in (late, early, never)] == [None] * 3
    assert b.links.counters["stale"] == 1
    assert b.links.counters["future"] == 2
    assert net.give(b, good, PLACE["a"]) is not None


def test_a_machine_that_stood_still_is_measured_anew() -> None:
    a, b, net = pair()
    a.skew -= 500.0  # its clock stood still while others' went on
    net.say(a, b"lost")
    net.run(5.0)
    assert b.links.counters["stale"] >= 1
    net.say(a, b"found")
    net.run(0.5)
    assert [s.data for s in net.heard["b"]] == [b"found"]


def test_no_bit_can_be_changed() -> None:
    a, b, net = pair()
    link = a.links._peers["b"].link
    assert link is not None
    datagram = link.seal(net.now, b"t", b"payload")
    for n in range(len(datagram)):
        changed = bytearray(datagram)
        changed[n] ^= 1 << n % 8
        assert net.give(b, bytes(changed), PLACE["a"]) is None, n
    for n in range(len(datagram)):
        assert net.give(b, datagram[:n], PLACE["a"]) is None
    assert net.heard["b"] == []
    assert net.give(b, datagram, PLACE["a"]) is not None, "none of them was taken for it"


def test_no_bit_of_a_card_can_be_changed() -> None:
    a, b = Box("a"), Box("b")
    net = Net(a, b)
    card = show(a.packed, a.device.sign(to_sign_card(a.packed)), asks=True)
    for n in range(len(card)):
        if n != 3:  # whether it asks is not signed
            changed = bytearray(card)
            changed[n] ^= 1 << n % 8
            net.now += 1.0
            net.give(b, bytes(changed), PLACE["a"])
    assert b.links._peers["a"].candidates == {}
    net.now += 20.0
    net.give(b, card, PLACE["a"])
    assert list(b.links._peers["a"].candidates) == [a.epoch]


def test_a_liar_gets_nobody_elses_name() -> None:
    a, b, liar = Box("a"), Box("b"), Box("c")
    net = Net(a, b, liar)
    net.run(3.0)
    liar.start(name="a")
    liar.links.learn([a.known, b.known], {})
    liar.links.tick(net.now)
    (card,) = {d for d, _ in liar.links.out if shown(d)}
    before = b.links.counters["forged"]
    net.give(b, card, PLACE["c"])
    assert b.links.counters["forged"] == before + 1
    assert b.links._peers["a"].candidates == {}
    assert b.links.peers()["a"].linked, "and the true one is not hurt"


def test_another_site_and_strangers_are_counted_and_nothing_else() -> None:
    a, b = Box("a"), Box("b")
    net = Net(a, b)
    b.start(site="shop")
    b.links.learn([a.known], {})
    b.links.tick(net.now)
    for data, _ in b.links.out:
        net.give(a, data, PLACE["b"])
    assert a.links.counters["otherSite"] >= 1
    stranger = Box("d")
    stranger.links.learn([a.known], {})
    stranger.links.tick(net.now)
    for data, _ in stranger.links.out:
        net.give(a, data, PLACE["d"])
    assert a.links.counters["strange"] >= 1
    assert a.links.out == [], "no stranger gets an answer"
    assert a.links._by_id == {}


def test_who_is_revoked_or_has_another_key_is_out_at_once() -> None:
    a, b, net = pair()
    link = a.links._peers["b"].link
    assert link is not None
    assert b.links.learn([], {}) == ["a"]
    assert b.links.peers() == {}
    assert net.give(b, link.seal(net.now, b"t", b"after"), PLACE["a"]) is None
    # another box has the name now
    new = Box("a")
    b.links.learn([new.known], {})
    assert net.give(b, link.seal(net.now, b"t", b"after"), PLACE["a"]) is None
    card = show(a.packed, a.device.sign(to_sign_card(a.packed)), asks=True)
    net.give(b, card, PLACE["a"])
    assert b.links._peers["a"].candidates == {}


def test_floods_cost_little_and_keep_nobody_out() -> None:
    a, b = Box("a"), Box("b")
    net = Net(a, b)
    rng = random.Random(7)
    fakes = []
    for n in range(2000):
        packed = msgspec.msgpack.encode(Card("a", "plant", n + 1, rng.randbytes(32)))
        fakes.append(show(packed, rng.randbytes(64), asks=True))
    for data in fakes:
        net.give(b, data, ("10.9.9.9", 9))
    assert b.links.counters["forged"] <= 10, "signatures that were looked at"
    assert b.links.counters["flooded"] >= 1990
    for _ in range(5000):
        net.give(b, rng.randbytes(rng.randrange(1300)), ("10.9.9.9", 9))
        net.give(b, b"EM\x02" + rng.randbytes(100), ("10.9.9.9", 9))
    assert len(b.links._by_id) == 0
    net.run(10.0)
    assert net.linked(), "who comes from where the hub says has a bucket of its own"
    # a peer that floods fills its own bucket
    for _ in range(2000):
        net.say(a, b"x" * 10)
    net.run(0.2)
    assert len(net.heard["b"]) <= 520
    assert b.links.counters["flooded"] > 1400


def test_one_way_is_enough_to_be_heard() -> None:
    a, _b, net = pair()
    net.deaf.add(("b", "a"))  # a hears nothing of b any more
    net.say(a, b"still")
    net.run(60.0)
    net.say(a, b"here")
    net.run(0.2)
    assert [s.data for s in net.heard["b"]] == [b"still", b"here"]


def test_a_peer_that_moved_is_followed() -> None:
    a, b, net = pair()
    place = ("10.0.0.77", 7001)
    net.boxes[place] = net.boxes.pop(PLACE["b"])
    net.say(b, b"from elsewhere")
    net.run(0.5)
    assert a.links.peers()["b"].address == place
    net.say(a, b"to there")
    net.run(0.5)
    assert [s.data for s in net.heard["b"]] == [b"to there"]


def test_what_is_too_long_is_refused_before_it_is_sent() -> None:
    a, _b, net = pair()
    net.say(a, b"x" * SAY_MOST)
    net.run(0.2)
    assert len(net.heard["b"][0].data) == SAY_MOST
    with pytest.raises(Invalid):
        a.links.say("t", b"x" * (SAY_MOST + 1), None, net.now)
    for topic in ("", "T", "x" * 33, "a b"):
        with pytest.raises(Invalid):
            a.links.say(topic, b"", None, net.now)


def test_the_window_takes_each_number_once() -> None:
    rng = random.Random(3)
    window = Window()
    taken: set[int] = set()
    at = 0
    for _ in range(5000):
        at += rng.choice((0, 0, 1, 1, 2, 5, 2000))
        seq = max(1, at - rng.randrange(1200))
        if window.fresh(seq):
            assert seq not in taken
            window.take(seq)
            taken.add(seq)
        else:
            assert seq in taken or seq <= window.newest - 1024
    assert not window.fresh(0) or window.newest < 1024
    window.take(1 << 63)
    assert window.fresh((1 << 63) + 1)
    assert not window.fresh(at)


def test_any_bytes_are_read_or_refused() -> None:
    rng = random.Random(5)
    for _ in range(20000):
        data = rng.choice((b"", b"EM\x01\x01", b"EM\x02", b"EM")) + rng.randbytes(rng.randrange(200))
        shown(data)
        sealed(data)


def test_addresses_and_what_the_hub_says_of_a_node() -> None:
    assert address_of("10.0.0.1:70") == ("10.0.0.1", 70)
    assert address_of("[fd00::1]:70") == ("fd00::1", 70)
    assert text_of(("fd00::1", 70)) == "[fd00::1]:70"
    for wrong in ("", "10.0.0.1", ":70", "10.0.0.1:0", "10.0.0.1:70000", "10.0.0.1:x", None, 7, "x" * 400 + ":1"):
        assert address_of(wrong) is None, wrong
    key = KeyPair.create("user").public
    good = {"credentials": {"publicKey": key}, "revoked": False, "mesh": "10.0.0.1:70"}
    found = known_of("a", good)
    assert found is not None
    assert found.address == ("10.0.0.1", 70)
    for change in ({"revoked": True}, {"credentials": {}}, {"credentials": "x"}, {"credentials": {"publicKey": "U"}}):
        assert known_of("a", good | change) is None
    no_address = known_of("a", good | {"mesh": 3})
    assert no_address is not None and no_address.address is None
