"""Frames come out as they went in, however the stream is cut; failures are problem documents."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core.invocation import (
    STATUS,
    CallFailed,
    Event,
    Frames,
    FrameTooLong,
    Http,
    Invoke,
    Log,
    Raised,
    Result,
    decode_from_worker,
    decode_to_worker,
    frame,
)


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(1, 50), min_size=1, max_size=50))
def test_frames_survive_any_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(frame(Result("i", b)) for b in bodies)
    frames, got, n = Frames(), [], 0
    while stream:
        step = cuts[n % len(cuts)]
        got += [decode_from_worker(p) for p in frames.feed(stream[:step])]
        stream, n = stream[step:], n + 1
    assert [m.body for m in got if isinstance(m, Result)] == bodies


def test_a_frame_over_the_bound_is_refused_by_its_length_alone() -> None:
    frames = Frames(limit=100)
    assert list(frames.feed((100).to_bytes(4, "big") + b"x" * 100)) == [b"x" * 100]
    with pytest.raises(FrameTooLong, match="101 bytes"):
        list(frames.feed((101).to_bytes(4, "big")))


def test_messages_keep_their_kind_and_content() -> None:
    event = Event("1", "/s", "t", b"\x00\xff", extensions={"a": "b"}, http=Http("GET", "/x", "q=1", [("a", "b")]))
    assert decode_to_worker(bytes(frame(Invoke("i", 1.5, event))[4:])) == Invoke("i", 1.5, event)
    for message in (Raised("i", "error", "no", "trace"), Log("", 20, 1.0, "hi", {"n": 1})):
        assert decode_from_worker(bytes(frame(message)[4:])) == message
    with pytest.raises(msgspec.DecodeError):
        decode_from_worker(bytes(frame(Invoke("i", 1.5, event))[4:]))  # a worker cannot invoke


@pytest.mark.parametrize("kind", sorted(STATUS))
def test_a_failed_call_is_a_problem_document_that_names_function_and_limit(kind: str) -> None:
    e = CallFailed(kind, "why", function="default/f", limit={"timeout": "2s"}, retry_after=0.2)  # type: ignore[arg-type]
    doc = e.problem()
    assert doc["status"] == STATUS[kind] == e.status
    assert doc["type"] == f"urn:edgeward:problem:function-{kind}"
    assert (doc["function"], doc["limit"], doc["resource"]) == ("default/f", {"timeout": "2s"}, "Function/default/f")
    assert dict(e.headers()) == {"content-type": "application/problem+json", "retry-after": "1"}
