"""Separate thresholds up and down: a bad link does not flap, a cut is seen in time, an idle link carries little."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest

from edgeward.lab.links import Direction, Draws, Profile, Shaper
from edgeward.nodes.liveness import BEAT, DOWN, DOWN_MOST, LOOK, Liveness, Pace


def test_one_late_beat_never_flips() -> None:
    live = Liveness()
    live.beat(0.0)
    assert live.beat(BEAT) and live.online
    assert not live.tick(BEAT + DOWN - 0.1)
    live.beat(BEAT + DOWN - 0.1)
    assert live.online
    assert live.patience == DOWN, "one late beat is an accident"


def test_a_cut_is_seen_within_fifteen_seconds_and_the_return_needs_two_beats() -> None:
    live = Liveness()
    live.beat(0.0, certain=True)
    t = 0.0
    while not live.tick(t):
        t += LOOK
        assert t <= 15
    assert not live.beat(100.0), "one beat after a long silence is not enough"
    assert live.beat(100.0 + BEAT)


def test_a_link_that_is_late_again_and_again_gets_patience_and_loses_it() -> None:
    live = Liveness()
    t = 0.0
    live.beat(t, certain=True)
    for late in (3.4, 0.0, 3.0, 0.0):
        t += BEAT + late
        live.beat(t)
    assert 25 < live.patience <= DOWN_MOST
    assert not live.tick(t + 25)
    for _ in range(64):
        t += BEAT
        live.beat(t)
    assert live.patience == DOWN


def test_outages_do_not_teach_patience() -> None:
    live = Liveness()
    t = 0.0
    live.beat(t, certain=True)
    for _ in range(5):
        t += 40.0
        assert live.tick(t)
        for _ in range(3):
            t += 1.0
            live.beat(t)
        t += BEAT
        live.beat(t)
    assert live.online and live.patience == DOWN
    for _ in range(5):
        live.excused = True  # the hub was started anew, and the link with it
        t += BEAT + 3.0
        live.beat(t)
    assert live.patience == DOWN


def test_silence_of_our_own_is_forgiven() -> None:
    live = Liveness()
    live.beat(100.0, certain=True)
    live.forgive(30.0, 131.0)
    assert not live.tick(131.0)
    live.forgive(3600.0, 140.0)
    assert live.heard == 140.0
    assert live.tick(140.0 + DOWN + LOOK)


class Stream:
    """One direction of a TCP connection over a link with delay and loss, in simulated time.

    A lost segment is sent again when its time is out (RFC 6298, doubled each time), and when the acknowledgement of a
    later one says that it is missing (RFC 8985): why a second beat helps the first.
    """

    def __init__(self, rng: random.Random, delay: float, loss: float) -> None:
        self._rng, self._delay, self._loss = rng, delay, loss
        self._waiting: list[list[float]] = []  # [asked, timer, rto]; oldest first
        self._events: list[tuple[float, int, str, list[float]]] = []
        self._n = 0
        self._arrived: set[int] = set()
        self.delivered: list[float] = []

    def _at(self, when: float, what: str, segment: list[float]) -> None:
        self._n += 1
        heapq.heappush(self._events, (when, self._n, what, segment))

    def _transmit(self, now: float, segment: list[float]) -> None:
        segment[1] = now + segment[2]
        if self._rng.random() >= self._loss:
            self._at(now + self._delay, "data", segment)

    def send(self, now: float, asked: float) -> None:
        segment = [asked, 0.0, max(0.2, 3 * self._delay)]
        self._waiting.append(segment)
        self._transmit(now, segment)

    def step(self, now: float) -> list[float]:
        """What is delivered by now, in order."""
        while self._events and self._events[0][0] <= now:
            at, _, what, segment = heapq.heappop(self._events)
            if what == "data" and any(s is segment for s in self._waiting):
                self._arrived.add(id(segment))
                if self._rng.random() >= self._loss:
                    self._at(at + self._delay, "ack", segment)
            elif what == "ack":
                for earlier in self._waiting:
                    if earlier is segment or earlier[0] > segment[0]:
                        break
                    if id(earlier) not in self._arrived:
                        self._transmit(at, earlier)
        for segment in self._waiting:
            if id(segment) not in self._arrived and segment[1] <= now:
                segment[2] *= 2
                self._transmit(now, segment)
        got: list[float] = []
        while self._waiting and id(self._waiting[0]) in self._arrived:
            segment = self._waiting.pop(0)
            self._arrived.discard(id(segment))
            got.append(segment[0])
        return got


class Relayed:
    """One direction through the lab's relay: a loss is a wait, doubled for each loss of the repeat; all wait behind.

    Nothing helps a lost packet to be repeated earlier, so this is worse than TCP.
    """

    def __init__(self, rng: random.Random, delay: float, loss: float, direction: Direction) -> None:
        self._rng = rng
        self._shaper = Shaper(Profile(delay_ms=delay * 1000, loss=loss), direction)
        self._waiting: list[tuple[float, float]] = []
        self._behind = 0.0

    def send(self, now: float, asked: float) -> None:
        fate = self._shaper.carry(now, 100, Draws(self._rng.random(), self._rng.random(), self._rng.random()))
        self._behind = max(self._behind, fate.at + fate.late)
        self._waiting.append((self._behind, asked))

    def step(self, now: float) -> list[float]:
        got = [asked for at, asked in self._waiting if at <= now]
        self._waiting = [w for w in self._waiting if w[0] > now]
        return got


class Link:
    """A node and its hub over one TCP connection, in simulated time."""

    def __init__(self, seed: int, delay: float, loss: float, *, relayed: bool = False) -> None:
        self.rng = random.Random(seed)
        self.up: Stream | Relayed
        self.down: Stream | Relayed
        if relayed:
            self.up, self.down = (Relayed(self.rng, delay, loss, direction) for direction in ("up", "down"))
        else:
            self.up, self.down = Stream(self.rng, delay, loss), Stream(self.rng, delay, loss)
        self.pace = Pace()
        self.node, self.hub = Liveness(), Liveness()
        self.cut = False
        self.flips: list[tuple[float, str, bool]] = []
        self.beats = 0
        self.asked: list[float] = []
        self.now = 0.0

    def run(self, until: float) -> None:
        while self.now < until:
            self.now += 0.1
            if not self.cut:
                for asked in self.up.step(self.now):
                    self._saw("hub", self.hub.beat(self.now, certain=self.beats == 1), self.hub)
                    self.down.send(self.now, asked)
                for asked in self.down.step(self.now):
                    self.pace.answer(self.now, asked)
                    self.node.rtt = self.hub.rtt = self.pace.rtt
                    self._saw("node", self.node.beat(self.now), self.node)
            self._saw("hub", self.hub.tick(self.now), self.hub)
            self._saw("node", self.node.tick(self.now), self.node)
            if self.now >= self.pace.due(online=self.node.online, jitter=self.rng.random()):
                self.pace.ask(self.now)
                self.beats += 1
                self.asked.append(self.now)
                self.up.send(self.now, self.now)

    def _saw(self, who: str, flipped: bool, live: Liveness) -> None:
        if flipped:
            self.flips.append((self.now, who, live.online))


@pytest.mark.parametrize("relayed", [False, True], ids=["tcp", "relay"])
@pytest.mark.parametrize("seed", range(8))
def test_thirty_percent_loss_and_a_round_trip_of_1200_ms_do_not_flap(seed: int, relayed: bool) -> None:
    link = Link(seed, delay=0.6, loss=0.3, relayed=relayed)
    link.run(1800.0)
    assert [flip for flip in link.flips if not flip[2]] == [], "from its first minute on"
    assert {who for _, who, _ in link.flips} == {"hub", "node"}
    link.flips.clear()
    link.cut = True
    link.run(link.now + DOWN_MOST + LOOK)
    assert sorted(who for _, who, online in link.flips if not online) == ["hub", "node"], "and yet its cut is seen"


def test_a_satellite_link_is_soon_known_and_its_cut_is_seen_in_less() -> None:
    link = Link(3, delay=0.3, loss=0.01)
    link.run(1800.0)
    assert [flip for flip in link.flips if not flip[2]] == []
    assert link.hub.patience < DOWN_MOST / 2
    link.cut = True
    link.run(link.now + DOWN_MOST / 2)
    assert {who for _, who, online in link.flips if not online} == {"hub", "node"}


def test_a_good_link_carries_one_beat_each_period_and_its_cut_is_seen_at_both_ends() -> None:
    link = Link(1, delay=0.04, loss=0.002)
    link.run(60.0)
    link.flips.clear()
    beats = link.beats
    link.run(60.0 + 1100.0)
    assert 98 <= link.beats - beats <= 108
    gaps = [b - a for a, b in itertools.pairwise(link.asked)]
    assert max(gaps) < 15, "proxies drop what is idle for 60 s, and mobile networks some for 30 s"
    assert link.flips == []
    link.cut = True
    link.run(link.now + 15.5)
    assert sorted((who, online) for _, who, online in link.flips) == [("hub", False), ("node", False)]
    link.cut = False
    came = link.now
    link.run(came + 10.0)
    assert [online for _, _, online in link.flips[2:]] == [True, True]
    assert link.flips[-1][0] - came < 7


def test_what_else_is_answered_stands_in_for_a_beat() -> None:
    pace = Pace()
    pace.ask(0.0)
    pace.answer(0.1, 0.0)
    assert pace.sure
    assert pace.due(online=True, jitter=0.0) == BEAT
    pace.answer(6.2, 6.0)  # a report
    assert pace.due(online=True, jitter=0.0) == 6.0 + BEAT


def test_without_a_link_it_asks_its_own_server_twice_a_second_and_in_doubt_at_once() -> None:
    pace = Pace()
    assert pace.due(online=False, jitter=0.5) <= 0.0, "at the start at once"
    pace.ask(0.0)
    pace.refuse(0.01)
    assert 0.3 < pace.due(online=True, jitter=0.5) < 0.7
    assert not pace.sure
    pace.ask(1.0)
    pace.answer(1.1, 1.0)
    assert pace.sure
    assert 1.3 < pace.due(online=False, jitter=0.5) < 1.7, "the second sign of life soon after the first"
    pace.doubt()
    assert not pace.sure
    assert pace.due(online=True, jitter=0.0) < 4.0
    pace.refuse(19.0)
    pace.ask(19.5)
    pace.answer(19.6, 19.5)
    spread = [pace.due(online=True, jitter=n / 10) - 19.5 for n in range(10)]
    assert max(spread) == BEAT and min(spread) < BEAT / 2, "a fleet that came back together does not beat so"
    pace.ask(19.9)
    pace.answer(20.0, 19.9)
    assert pace.due(online=True, jitter=0.9) > 19.9 + 0.9 * BEAT
    pace.ask(20.0)
    assert 21 < pace.due(online=True, jitter=0.0) < 26, "one that is not answered is followed by another"
    pace.ask(22.5)
    pace.answer(23.0, 20.0)
    assert not pace.sure, "the answer to the earlier one"
