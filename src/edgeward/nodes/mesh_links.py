"""Whom of the site a node is linked with, what of a datagram counts, and what to send when. Pure; time is an argument.

In come datagrams, words to say and the time; out come datagrams to send and what was heard. A peer gets this run's
card until both have agreed on keys (``mesh_wire.py``); a link counts only when something came over it, for an old card
can be shown again but nobody has its key. Before anything is handed on, the other clock is measured there and back: so
what is held back and sent later, or dated later than it is, is told apart though clocks differ by an hour. All is
bounded: what strangers send by the peers that the hub named, what a peer sends by its own bucket.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from edgeward.core.errors import Invalid
from edgeward.core.throttle import Throttle
from edgeward.nodes.hubtime import HubClock
from edgeward.nodes.mesh_wire import (
    SAY_MOST,
    Address,
    Card,
    Heard,
    Known,
    Link,
    Opened,
    PeerInfo,
    check_topic,
    sealed,
    show,
    shown,
    signed,
    to_sign_card,
)

#: Seconds between two cards to a peer that does not answer, at first and at most.
_FIRST, _LONGEST = 0.5, 10.0
#: Seconds between two measures of the other clock: until the first, and then; and of silence before we ask.
_MEASURE, _MEASURE_AGAIN, _SILENT = 1.0, 60.0, 10.0
#: Seconds that a datagram may be dated later than now, beyond what the measure leaves open; how old it may be.
FUTURE, STALE = 2.0, 30.0
#: Seconds within which an answer says anything of the clock.
_ANSWER = 10.0
#: Links of one peer that nothing came over yet.
_CANDIDATES = 3
_PING, _PONG = b"?", b"!"
_TIME = struct.Struct(">d")
_NEVER = float("-inf")

COUNTED = (
    "said", "heard", "cards", "garbage", "strange", "otherSite", "forged", "replayed", "future", "stale", "early",
    "flooded",
)  # fmt: skip


class Said(NamedTuple):
    peer: str
    topic: str
    data: bytes
    heard: Heard


class _Peer:
    def __init__(self, known: Known, kept: Address | None) -> None:
        self.known, self.kept = known, kept
        self.learned: Address | None = None
        #: The link that the newest word came over, and those that none came over yet, by epoch.
        self.link: Link | None = None
        self.candidates: dict[int, Link] = {}
        self.clock = HubClock()
        self.heard, self.rtt = _NEVER, 0.0
        self.card_due, self.card_wait = _NEVER, _FIRST
        self.pinged = self.measured = _NEVER

    @property
    def address(self) -> Address | None:
        return self.learned or self.known.address or self.kept

    def addresses(self) -> list[Address]:
        return list(dict.fromkeys(a for a in (self.learned, self.known.address, self.kept) if a is not None))

    @property
    def linked(self) -> bool:
        return self.link is not None and self.clock.offset is not None

    def links(self) -> list[Link]:
        return [*([self.link] if self.link is not None else []), *self.candidates.values()]


class Links:
    """The links of one run. What is to be sent is in :attr:`out`: (datagram, address), emptied by who sends it."""

    def __init__(self, card: Card, packed: bytes, signature: bytes, key: X25519PrivateKey) -> None:
        self.card, self._packed, self._key = card, packed, key
        self._ask = show(packed, signature, asks=True)
        self._tell = show(packed, signature, asks=False)
        self._peers: dict[str, _Peer] = {}
        self._by_id: dict[bytes, tuple[_Peer, Link]] = {}
        self.out: list[tuple[bytes, Address]] = []
        self.counters = dict.fromkeys(COUNTED, 0)
        #: Something is due now: see :meth:`tick`. And: peers came, went or were linked.
        self.hurried = self.moved = False
        #: Of one name: cards whose signature is looked at, cards that are answered, datagrams, questions for the time.
        self._looked = Throttle(burst=8, rate=1)
        self._answered = Throttle(burst=8, rate=1)
        self._words = Throttle(burst=500, rate=100)
        self._asked = Throttle(burst=20, rate=5)

    # -- who there is ------------------------------------------------------------------------------------------------

    def learn(self, known: Iterable[Known], kept: Mapping[str, Address]) -> list[str]:
        """Takes the hub's present word of the site; those who are not in it any more, or have another key, are out."""
        named = {k.node: k for k in known if k.node != self.card.node}
        gone = [n for n, p in self._peers.items() if n not in named or named[n].key != p.known.key]
        for node in gone:
            self._unlink(self._peers.pop(node))
        for node, k in named.items():
            peer = self._peers.get(node)
            if peer is None:
                self._peers[node] = _Peer(k, kept.get(node))
                self.hurried = self.moved = True
            elif peer.known != k:
                peer.known = k
        self.moved |= bool(gone)
        return gone

    def key_of(self, node: str) -> bytes | None:
        peer = self._peers.get(node)
        return peer.known.key if peer else None

    def peers(self) -> dict[str, PeerInfo]:
        return {n: PeerInfo(n, p.address, p.heard, p.rtt, p.linked) for n, p in self._peers.items()}

    def addresses(self, node: str) -> list[Address]:
        """Where a peer may be, the likeliest first."""
        peer = self._peers.get(node)
        return peer.addresses() if peer else []

    def was_heard(self, node: str, now: float) -> None:
        """It proved itself by another way."""
        if peer := self._peers.get(node):
            peer.heard = now

    # -- out -----------------------------------------------------------------------------------------------------------

    def say(self, topic: str, data: bytes, nodes: Iterable[str] | None, now: float) -> int:
        """Has it sent to those of ``nodes`` (None: all) that are linked; how many those are."""
        name = check_topic(topic)
        if len(data) > SAY_MOST:
            raise Invalid(f"{len(data)} bytes on topic {topic!r}", remedy=f"at most {SAY_MOST}: ask instead")
        sent = 0
        for node in self._peers if nodes is None else nodes:
            peer = self._peers.get(node)
            if peer is not None and peer.link is not None and (address := peer.address) is not None:
                self.out.append((peer.link.seal(now, name, data), address))
                sent += 1
        self.counters["said"] += sent
        return sent

    def tick(self, now: float) -> float:
        """Has sent what is due; gives when the next is."""
        self.hurried = False
        due = now + _LONGEST
        for peer in self._peers.values():
            silent = now - peer.heard
            if (peer.link is None or silent > 2 * _SILENT) and now >= peer.card_due:
                self.out += [(self._ask, a) for a in peer.addresses()]
                peer.card_due = now + peer.card_wait
                peer.card_wait = min(_LONGEST, 2 * peer.card_wait)
            if peer.link is not None and now >= self._ping_due(peer):
                self._ping(peer, now)
            due = min(due, peer.card_due if peer.link is None else self._ping_due(peer))
        return max(due, now + 0.05)

    @staticmethod
    def _ping_due(peer: _Peer) -> float:
        if peer.clock.offset is None:
            return peer.pinged + max(_MEASURE, peer.rtt)
        wanted = min(peer.measured + _MEASURE_AGAIN, peer.heard + _SILENT)
        return max(wanted, peer.pinged + _SILENT / 2)

    def _ping(self, peer: _Peer, now: float, address: Address | None = None) -> None:
        if peer.link is None or (address := address or peer.address) is None:
            return
        peer.pinged = now
        self.out.append((peer.link.seal(now, b"", _PING + _TIME.pack(now)), address))

    def cry(self) -> bytes:
        """What makes this run known to those who can hear it and know no address of it."""
        return self._ask

    # -- in ------------------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, address: Address, now: float) -> Said | None:
        """What a peer said by this datagram; None: nothing to hand on."""
        at = sealed(data)
        if at is None:
            self._card(data, address, now)
            return None
        found = self._by_id.get(at[0])
        if found is None:
            return self._drop("strange")
        peer, link = found
        if not link.window.fresh(at[1]):
            return self._drop("replayed")
        opened = link.open(data)
        if opened is None:
            return self._drop("forged")
        link.window.take(opened.seq)
        if peer.link is not link:
            self._prove(peer, link, now)
        peer.heard = now
        if link.window.newest == opened.seq and peer.learned != address:
            peer.learned = address
            self.moved = True
        if not opened.topic:
            self._control(peer, link, opened, address, now)
            return None
        return self._hand_on(peer, link, opened, address, now)

    def _drop(self, why: str) -> Said | None:
        self.counters[why] += 1
        return None

    def _hand_on(self, peer: _Peer, link: Link, opened: Opened, address: Address, now: float) -> Said | None:
        node = peer.known.node
        if self._words.take(node, now) > 0:
            return self._drop("flooded")
        if peer.clock.offset is None:
            return self._drop("early")
        age = now - (opened.time - peer.clock.offset)
        why = "future" if age < -FUTURE - peer.clock.slack else "stale" if age > STALE + peer.clock.slack else ""
        if why or age != age:  # not a number
            peer.measured = _NEVER  # its clock may have stood still with its machine: measured anew
            self.hurried = True
            return self._drop(why or "future")
        self.counters["heard"] += 1
        heard = Heard(link.card.epoch, opened.seq, max(0.0, age), now, address)
        return Said(node, opened.topic, opened.data, heard)

    def _control(self, peer: _Peer, link: Link, opened: Opened, address: Address, now: float) -> None:
        kind, rest = opened.data[:1], opened.data[1:]
        if len(rest) != 8 or self._asked.take(peer.known.node, now) > 0:
            return
        if kind == _PING:
            self.out.append((link.seal(now, b"", _PONG + rest), address))
        elif kind == _PONG:
            (asked,) = _TIME.unpack(rest)
            if 0.0 <= now - asked <= _ANSWER:
                self.moved |= not peer.linked
                peer.clock.heard(opened.time, asked, now)
                peer.rtt, peer.measured = now - asked, now

    def _card(self, data: bytes, address: Address, now: float) -> None:
        got = shown(data)
        if got is None:
            self._drop("garbage")
            return
        card, packed, signature, asks = got
        peer = self._peers.get(card.node)
        if card.site != self.card.site or peer is None:
            if card.node != self.card.node:
                self._drop("otherSite" if card.site != self.card.site else "strange")
            return
        if not any(link.packed == packed for link in peer.links()):
            # the address may be forged; but who floods under a peer's name from elsewhere does not keep that peer out
            near = "" if address in peer.addresses() else "?"
            if self._looked.take(card.node + near, now) > 0:
                self._drop("flooded")
                return
            good = signed(peer.known.key, to_sign_card(packed), signature)
            if not good or not self._candidate(peer, card, packed):
                self._drop("forged")
                return
        self.counters["cards"] += 1
        if self._answered.take(card.node, now) > 0:
            return
        if asks:
            self.out.append((self._tell, address))
        for link in peer.links():
            if link.packed == packed:  # a word over the link proves to the other side that this run is alive
                self.out.append((link.seal(now, b"", _PING + _TIME.pack(now)), address))

    def _candidate(self, peer: _Peer, card: Card, packed: bytes) -> bool:
        try:
            link = Link(self._key, self._packed, packed, card, self.card.node)
        except ValueError:
            return False
        if card.epoch in peer.candidates:  # no run has two cards
            return False
        peer.candidates[card.epoch] = link
        self._by_id[link.in_id] = peer, link
        # old cards that are shown again push none out that is newer
        while len(peer.candidates) > _CANDIDATES:
            self._forget(peer.candidates.pop(min(peer.candidates)))
        return True

    def _prove(self, peer: _Peer, link: Link, now: float) -> None:
        """Something came over it: the other run is this one, and those before it are over."""
        for old in peer.links():
            if old is not link:
                self._forget(old)
        peer.link, peer.candidates, peer.clock = link, {}, HubClock()
        peer.card_due, peer.card_wait = _NEVER, _FIRST
        peer.measured = _NEVER
        self._ping(peer, now)
        self.hurried = self.moved = True

    def _forget(self, link: Link) -> None:
        self._by_id.pop(link.in_id, None)

    def _unlink(self, peer: _Peer) -> None:
        for link in peer.links():
            self._forget(link)
