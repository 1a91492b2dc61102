"""The model of a WAN link: nothing is lost but by its rules, nothing is faster than its rate, nothing is reordered."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.lab.links import BUILTIN, MAX_FLIGHT, RTO_MIN, SEGMENT, Counts, Draws, Profile, Shaper, Stall

CALM = Draws(loss=0.999999, jitter=0.0, stall=0.999999)

_unit = st.floats(0, 1, exclude_max=True)
_draws = st.builds(Draws, _unit, _unit, _unit)
_profiles = st.builds(
    Profile,
    delay_ms=st.floats(0, 500),
    jitter_ms=st.floats(0, 100),
    up_kbit=st.none() | st.floats(8, 100_000),
    loss=st.floats(0, 1),
    stall=st.none() | st.builds(Stall, every_s=st.floats(0.1, 100), for_ms=st.floats(1, 5000)),
)
#: (pause before, size, draws)
_traffic = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 20_000), _draws), max_size=60)


@settings(deadline=None)
@given(_profiles, _traffic)
def test_offer_conserves_packets_and_keeps_rate_delay_and_order(profile: Profile, traffic: Any) -> None:
    shaper = Shaper(profile, "up")
    rate = profile.bytes_per_second("up")
    now, counts, waiting, last = 0.0, Counts(), [], -math.inf
    carried = 0
    busy_from = 0.0
    for pause, size, draws in traffic:
        now += pause
        if shaper.backlog(now) == 0:
            busy_from, carried = now, 0
        fate = shaper.offer(now, size, draws)
        assert fate.late == 0
        if fate.dropped == "queue":
            counts.drop(fate.dropped)
            assert fate.at == now
            assert shaper.backlog(now) + size > shaper.queue_bytes or rate == math.inf
            continue
        carried += size
        assert fate.at >= now + profile.delay_ms / 1000 - 1e-9
        assert fate.at >= last, "never reordered"
        last = fate.at
        assert fate.at - profile.delay_ms / 1000 - busy_from >= carried / rate - 1e-6, "never faster than the rate"
        assert shaper.backlog(now) <= shaper.queue_bytes
        if fate.dropped:
            counts.drop(fate.dropped)
            assert draws.loss < profile.loss
        else:
            counts.arrived(size)
            assert draws.loss >= profile.loss
        waiting.append(fate.at)
    assert counts.packets + counts.lost + counts.overflowed == len(traffic)
    assert counts.cut == 0
    assert shaper.backlog(max([now, *waiting])) == 0, "the queue runs empty by itself"


@settings(deadline=None)
@given(_profiles, _traffic)
def test_a_stream_loses_nothing_and_waits_its_turn(profile: Profile, traffic: Any) -> None:
    shaper = Shaper(profile, "up")
    now, last = 0.0, -math.inf
    for pause, size, draws in traffic:
        now += pause
        at = shaper.room_at(now, size)
        assert at >= now
        now = at
        assert shaper.backlog(now) + size <= shaper.queue_bytes or shaper.backlog(now) == 0
        fate = shaper.carry(now, size, draws)
        assert fate.dropped == ""
        assert fate.at >= max(last, now)
        assert 0 <= fate.late <= 63.001 * max(RTO_MIN, profile.rtt), "six retransmissions at most"
        if draws.loss >= 1 - (1 - min(profile.loss, 0.99)) ** math.ceil(size / SEGMENT):
            assert fate.late == 0
        last = fate.at


def test_the_numbers_of_a_plain_link() -> None:
    shaper = Shaper(Profile(delay_ms=100, jitter_ms=50, up_kbit=80, down_kbit=8), "up")  # 10 kB/s
    assert shaper.offer(0, 1000, CALM) == (pytest.approx(0.2), "", 0)
    assert shaper.offer(0, 1000, CALM._replace(jitter=1.0)).at == pytest.approx(0.35)
    assert shaper.offer(0, 1000, CALM).at == pytest.approx(0.4), "its own time, later than the jitter before it"
    assert shaper.backlog(0.0) == 3000
    assert shaper.backlog(0.1) == 2000, "what leaves at this moment waits no more"
    assert shaper.backlog(0.301) == 0
    assert Shaper(Profile(up_kbit=80, down_kbit=8), "down").offer(0, 1000, CALM).at == pytest.approx(1.0)
    free = Shaper(Profile(), "up")
    assert [free.offer(5, 1 << 19, CALM).at for _ in range(2)] == [5, 5]


def test_the_queue_drops_its_tail_and_a_stream_waits_instead() -> None:
    shaper = Shaper(Profile(up_kbit=8), "up")  # 1 kB/s, 32 KiB of queue
    assert shaper.queue_bytes == 32 * 1024
    assert [shaper.offer(0, 8192, CALM).dropped for _ in range(5)] == ["", "", "", "", "queue"]
    assert shaper.room_at(0, 8192) == pytest.approx(8.192), "when the first has left"
    assert shaper.room_at(0, 8193) == pytest.approx(2 * 8.192)
    assert shaper.room_at(0, 10**9) == pytest.approx(4 * 8.192), "anything fits an empty queue"
    assert shaper.offer(8.192, 8192, CALM).dropped == ""


def test_a_long_link_without_a_limit_holds_so_much_and_no_more() -> None:
    shaper = Shaper(Profile(delay_ms=1000), "up")
    size = 1 << 20
    fates = [shaper.offer(0, size, CALM).dropped for _ in range(MAX_FLIGHT // size + 1)]
    assert fates == [""] * (MAX_FLIGHT // size) + ["queue"]
    assert shaper.offer(1.0, size, CALM).dropped == "", "when it arrived there is room"


def test_loss_delays_a_stream_by_its_retransmissions() -> None:
    profile = Profile(delay_ms=300, loss=0.5)
    late = [Shaper(profile, "up").carry(0, SEGMENT, CALM._replace(loss=draw)).late for draw in (0.5, 0.4, 0.2, 0.0)]
    assert late == [0, pytest.approx(0.6), pytest.approx(1.8), pytest.approx(0.6 * 63)]
    assert Shaper(Profile(loss=0.5), "up").carry(0, 1, CALM._replace(loss=0.4)).late == RTO_MIN
    one, many = (Shaper(profile, "up").carry(0, n * SEGMENT, CALM._replace(loss=0.7)).late for n in (1, 2))
    assert (one, many) == (0, pytest.approx(0.6)), "more segments, more chances"


def test_a_cut_takes_all_and_its_end_finds_no_old_traffic_overtaken() -> None:
    shaper = Shaper(Profile(delay_ms=500), "up")
    slow = shaper.offer(0, 100, CALM).at
    shaper.set_profile(Profile(cut=True))
    assert shaper.offer(0.1, 100, CALM) == (0.1, "cut", 0)
    shaper.set_profile(Profile(delay_ms=1))
    assert shaper.offer(0.2, 100, CALM).at == slow, "a faster profile stays behind what is on its way"
    assert [Profile(cut=True).silent, Profile(loss=1.0).silent, Profile(loss=0.999).silent] == [True, True, False]


def test_a_stall_holds_everything_up_for_its_length() -> None:
    shaper = Shaper(Profile(stall=Stall(every_s=10, for_ms=2000)), "up")
    soon = CALM._replace(stall=0.0)  # the next stall begins at once
    assert shaper.offer(0, 100, soon).at == 2.0
    assert shaper.offer(0, 100, CALM._replace(stall=0.5)).at >= 2.0
    calm = Shaper(Profile(stall=Stall(every_s=10, for_ms=2000)), "up")
    assert calm.offer(0, 100, CALM).at == 0.0


@pytest.mark.parametrize(
    ("doc", "why"),
    [
        ({"delay_ms": -1}, r">= 0.*delay_ms"),
        ({"delay_ms": 60_001}, r"<= 60000.*delay_ms"),
        ({"loss": 1.1}, r"<= 1.*loss"),
        ({"up_kbit": 0.5}, r"up_kbit is 0.5; it must be 1 to 100000000 kbit/s, or absent"),
        ({"down_kbit": 2e8}, r"down_kbit is 2e\+08; it must be"),
        ({"jitter": 1}, r"unknown field `jitter`"),
        ({"name": ""}, r"length >= 1.*name"),
        ({"stall": {"every_s": 0, "for_ms": 1}}, r"> 0.*every_s"),
        ({"stall": {"every_s": 1}}, r"for_ms"),
    ],
)
def test_a_wrong_profile_is_refused_with_its_field(doc: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert(doc, Profile)


@pytest.mark.parametrize("field", ["delay_ms", "jitter_ms", "loss", "up_kbit", "down_kbit"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_that_is_none(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} is "):
        Profile(**{field: value})  # type: ignore[arg-type]


def test_the_links_that_have_a_name() -> None:
    assert list(BUILTIN) == ["lan", "4g", "satellite", "bad-dsl"]
    assert all(p.name == name and not p.silent for name, p in BUILTIN.items())
    assert BUILTIN["satellite"].rtt == pytest.approx(0.6)
    for p in BUILTIN.values():
        assert msgspec.convert(msgspec.to_builtins(p), Profile) == p
