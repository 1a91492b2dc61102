"""Records of a session: what is said is heard, however it is cut; what is no record is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core.errors import Refused
from edgeward.tunnel import channels
from edgeward.tunnel.channels import Decoder, Exit

RECORDS = st.lists(st.tuples(st.sampled_from(sorted(channels.FROM_NODE)), st.binary(max_size=300)), max_size=8)


@given(RECORDS, st.integers(1, 64))
def test_what_is_said_is_heard_however_it_is_cut(said: list[tuple[bytes, bytes]], step: int) -> None:
    data = b"".join(channels.record(kind, body) for kind, body in said)
    decoder = Decoder(channels.FROM_NODE)
    heard = [r for at in range(0, len(data), step) for r in decoder.feed(data[at : at + step])]
    assert heard == said
    assert decoder.empty


@given(st.binary(min_size=5, max_size=200))
def test_a_stranger_s_bytes_are_records_or_refused(data: bytes) -> None:
    decoder = Decoder(channels.TO_NODE)
    try:
        for kind, body in decoder.feed(data):
            assert kind in channels.TO_NODE
            assert len(body) <= channels.MOST
    except Refused:
        pass


@pytest.mark.parametrize("data", [b"z\0\0\0\1a", b"i\xff\xff\xff\xff", b"i\0\1\0\1"])
def test_unknown_kinds_and_too_long_records_are_refused_by_their_head(data: bytes) -> None:
    with pytest.raises(Refused):
        list(Decoder(channels.TO_NODE).feed(data))


def test_the_node_s_records_are_none_of_the_operator_s() -> None:
    with pytest.raises(Refused):
        list(Decoder(channels.TO_NODE).feed(channels.ended(Exit(0))))


def test_long_data_is_several_records() -> None:
    data = bytes(range(256)) * 1024
    decoder = Decoder(channels.FROM_NODE)
    heard = [body for r in channels.records(channels.OUTPUT, data) for _, body in decoder.feed(r)]
    assert len(heard) == 4
    assert b"".join(heard) == data


def test_ends_sizes_and_credits_come_through() -> None:
    (said,) = Decoder(channels.FROM_NODE).feed(channels.ended(Exit(143, "SIGTERM")))
    assert channels.read_exit(said[1]) == Exit(143, "SIGTERM")
    (said,) = Decoder(channels.TO_NODE).feed(channels.size(50, 70000))
    assert channels.read_size(said[1]) == (50, 65535)
    (said,) = Decoder(channels.FROM_NODE).feed(channels.credit(7))
    assert channels.read_credit(said[1]) == 7
    for read in (channels.read_exit, channels.read_size, channels.read_credit):
        with pytest.raises(Refused):
            read(b"x")
