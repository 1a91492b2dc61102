"""Frames and WebSocket messages survive every cut of the bytes; what is no frame is refused, whatever it is."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.tunnel import framing
from edgeward.tunnel.framing import Frames, Garbage, Messages

_frames = st.lists(
    st.tuples(
        st.sampled_from([framing.OPEN, framing.DATA, framing.END, framing.CREDIT, framing.RESET]),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=300),
    ),
    max_size=12,
)


def _cut(data: bytes, sizes: list[int]) -> list[bytes]:
    out, at = [], 0
    while at < len(data):
        n = sizes[len(out) % len(sizes)]
        out.append(data[at : at + n])
        at += n
    return out


def _whole(found: list[framing.Frame]) -> list[framing.Frame]:
    """Neighbouring pieces of data of one stream as one."""
    out: list[framing.Frame] = []
    for kind, stream, payload in found:
        if kind == framing.DATA and out and out[-1][:2] == (kind, stream):
            out[-1] = (kind, stream, out[-1][2] + payload)
        else:
            out.append((kind, stream, payload))
    return [f for f in out if f[0] != framing.DATA or f[2]]


@given(_frames, st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_frames_come_out_as_they_went_in_however_the_bytes_are_cut(sent: list[framing.Frame], sizes: list[int]) -> None:
    data = b"".join(framing.frame(*f) for f in sent)
    reader = Frames()
    found = [f for piece in _cut(data, sizes) for f in reader.feed(piece)]
    assert _whole(found) == _whole([(k, s, p) for k, s, p in sent])


@given(st.lists(st.binary(max_size=70_000), max_size=4), st.lists(st.integers(1, 9000), min_size=1, max_size=4))
def test_messages_come_out_as_they_went_in(payloads: list[bytes], sizes: list[int]) -> None:
    for client in (True, False):
        data = b"".join(framing.ws_head(len(p), client=client) + p for p in payloads)
        reader = Messages(client=not client)
        assert b"".join(b for piece in _cut(data, sizes) for b in reader.feed(piece)) == b"".join(payloads)


@given(st.binary(min_size=1, max_size=2000), st.binary(min_size=4, max_size=4), st.integers(1, 50))
def test_a_masked_message_of_any_client_is_read(payload: bytes, mask: bytes, size: int) -> None:
    length = len(payload).to_bytes(2, "big")
    masked = bytes(b ^ mask[n % 4] for n, b in enumerate(payload))
    data = bytes((0x82, 0x80 | 126)) + length + mask + masked
    reader = Messages(client=False)
    assert b"".join(b for piece in _cut(data, [size]) for b in reader.feed(piece)) == payload


@given(st.binary(max_size=400))
def test_garbage_never_does_more_than_be_refused(data: bytes) -> None:
    for reader in (Frames(), Messages(client=True), Messages(client=False)):
        try:
            reader.feed(data)
        except Garbage:
            pass


@pytest.mark.parametrize(
    "data",
    [
        framing.HEAD.pack(99 << 24, 1),
        framing.HEAD.pack(framing.OPEN << 24 | framing.MOST_OTHER + 1, 1),
        framing.HEAD.pack(framing.DATA << 24 | framing.MOST_DATA + 1, 1),
    ],
)
def test_a_frame_that_may_not_be_is_refused_by_its_head(data: bytes) -> None:
    with pytest.raises(Garbage):
        Frames().feed(data)


def test_a_client_that_does_not_mask_and_a_server_that_does_are_refused() -> None:
    with pytest.raises(Garbage):
        Messages(client=False).feed(framing.ws_head(3, client=False) + b"abc")
    with pytest.raises(Garbage):
        Messages(client=True).feed(framing.ws_head(3, client=True) + b"abc")


def test_pings_are_answered_and_a_close_is_heard() -> None:
    reader = Messages(client=False)
    assert reader.feed(framing.ws_head(2, client=True, opcode=9) + b"hi") == []
    assert reader.answers == [bytes((0x8A, 2)) + b"hi"]
    reader.feed(framing.ws_head(0, client=True, opcode=8))
    assert reader.closed


def test_the_accept_key_is_the_rfcs() -> None:
    assert framing.accept_key(b"dGhlIHNhbXBsZSBub25jZQ==") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def test_a_large_frame_is_not_gathered() -> None:
    reader = Frames()
    reader.feed(framing.head(framing.DATA, 1, framing.MOST_DATA))
    for _ in range(16):
        (found,) = reader.feed(os.urandom(1000))
        assert len(found[2]) == 1000
