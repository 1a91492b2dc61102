"""What makes a reading itself, and the window that knows it again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.streams.dedupe import SIZE, Window, identity_of


def ident(payload: Any, path: str = "id", topic: str = "t") -> bytes | None:
    return identity_of(topic, json.dumps(payload).encode(), path.split("."))


def test_the_identity_is_topic_and_value() -> None:
    assert ident({"id": 1, "v": 2}) == ident({"v": 3, "id": 1})
    assert ident({"meta": {"id": "é"}}, "meta.id") == ident({"meta": {"id": "é"}, "x": 0}, "meta.id")
    assert ident({"id": 1}) != ident({"id": 1}, topic="u")
    values = [1, "1", 1.0, True, False, 0, "", "True", 10**18, -1]
    found = {ident({"id": v}) for v in values}
    assert len(found) == len(values), "neither 1 and '1' nor 1 and true are the same reading"
    assert all(i is not None and len(i) == SIZE for i in found)
    # NUL, which no MQTT topic may hold, keeps topic and value apart
    assert ident({"id": "c"}, topic="ab") != ident({"id": "bc"}, topic="a")


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"\xff\xfe", b"7", b"[1]", b"{}", b'{"id":null}', b'{"id":{"a":1}}', b'{"id":[1]}', b'"id"']
)
def test_a_payload_without_identity(payload: bytes) -> None:
    assert identity_of("t", payload, ["id"]) is None
    assert identity_of("t", payload, ["id", "deeper"]) is None


def _name(n: int) -> bytes:
    return n.to_bytes(SIZE, "big")


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(0, 12), max_size=60))
def test_it_knows_the_last_different_ones_and_survives_a_dump(size: int, numbers: list[int]) -> None:
    """Against the plainest model: a list of the last ``size`` different numbers, the newest at the end."""
    window = Window(size)
    model: list[int] = []
    for n in numbers:
        assert window.known(_name(n)) == (n in model)
        window.add(_name(n))
        model = [*(m for m in model if m != n), n][-size:]
        assert len(window) == len(model)
    assert window.dump() == b"".join(map(_name, model))
    again = Window(size)
    again.load(window.dump() + b"half")  # a torn end is left out
    assert again.dump() == window.dump()
    narrow = Window(3)
    narrow.load(window.dump())
    assert narrow.dump() == b"".join(map(_name, model[-3:])), "a smaller one keeps the newest"
