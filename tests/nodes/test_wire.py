"""What hub and node say to one another: read back as it was sent, by this release and by a neighbouring one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgeward.core.resource import Key, Metadata, Stored
from edgeward.nodes import wire

STORED = Stored("Config", Metadata(name="c", namespace="default", labels={"a": "b"}), {"data": {"k": "é"}}, 1)
OBJECT = wire.HubObject("Config", "default", "c", 7, STORED, {"phase": "x"})
CHANGE = wire.LocalChange(3, "Config", "default", "c", "put", 7, 1.5, "ann", STORED)
MESSAGES: list[Any] = [
    OBJECT,
    wire.HubObject("Config", "default", "c", 7),
    CHANGE,
    wire.LocalChange(3, "Config", "default", "c", "delete", 0, 1.5, "ann"),
    wire.SyncAsk(5, "e"),
    wire.SyncAsk(0, "", ("App", "default", "a")),
    wire.SyncAnswer("e", 9, True, [OBJECT], False, "print"),
    wire.SyncAnswer(error="no"),
    wire.PushAsk("store", [CHANGE]),
    wire.PushAnswer([wire.Decided(3, "accept", "why", OBJECT, {"outcome": "accept"})]),
    wire.ReportAsk([wire.Status("App", "default", "a", None)], True, {"version": "1"}, [{"seq": 1}]),
    wire.SyncAnswer("e", 9, False, [], False, "print", names=[("App", "default", "a")]),
    wire.BeatAsk(1, "run"),
    wire.BeatAsk(1, "run", "print", 1.5),
    wire.BeatAnswer(5, "hub", "e"),
    wire.BeatAnswer(0, "hub", "e", sync=True, short=True, spread=5.0),
    wire.Ok(),
    wire.Ok("refused"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_it_is_read_as_it_was_sent(message: Any) -> None:
    data = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(data, type=type(message)) == message
    newer = msgspec.msgpack.encode(msgspec.msgpack.decode(data) | {"ofALaterRelease": [1]})
    assert msgspec.msgpack.decode(newer, type=type(message)) == message, "a later release may say more"


def test_an_error_fits_every_answer() -> None:
    """The hub refuses with Ok(error), whatever was asked for."""
    data = msgspec.msgpack.encode(wire.Ok(error="why"))
    for answer in (wire.SyncAnswer, wire.PushAnswer, wire.BeatAnswer, wire.Ok):
        assert msgspec.msgpack.decode(data, type=answer).error == "why"


def test_what_is_left_out_costs_nothing() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(wire.Ok())) == {}
    assert set(msgspec.msgpack.decode(msgspec.msgpack.encode(wire.BeatAsk(1)))) == {"n"}
    assert OBJECT.key == CHANGE.key == Key("Config", "default", "c")


@pytest.mark.parametrize(
    ("doc", "type_", "field"),
    [
        ({"since": 1}, wire.SyncAsk, "epoch"),
        ({"since": "1", "epoch": ""}, wire.SyncAsk, "since"),
        ({"since": 1, "epoch": "", "after": ["a", "b"]}, wire.SyncAsk, "after"),
        ({"store": "s", "changes": [{"seq": 1}]}, wire.PushAsk, "kind"),
        ({"statuses": [{"kind": "App", "namespace": "d", "name": "a"}]}, wire.ReportAsk, "status"),
        ([], wire.BeatAsk, "array"),
    ],
)
def test_what_is_not_understood_is_refused(doc: Any, type_: Any, field: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.msgpack.decode(msgspec.msgpack.encode(doc), type=type_)
