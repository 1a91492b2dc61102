"""Whose leader is gone, and whose is only silent for a moment."""

from __future__ import annotations

import struct

import pytest

from edgeward.core.raftz import SILENT, Group, Peer, Servers, overdue, seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [("67.5ms", 0.0675), ("1m2.5s", 62.5), ("120µs", 0.00012), ("3s", 3.0), ("", None), ("soon", None), ("3s!", None)],
)
def test_gos_durations_are_read(text: str, value: float | None) -> None:
    got = seconds(text)
    assert got == (value if value is None else pytest.approx(value))


def test_a_server_has_ended_when_it_stays_away_or_comes_back_as_another() -> None:
    servers = Servers()
    servers.look({"b": "B1", "c": "C1"}, 10.0)
    assert servers.ended(10.0) == {}
    servers.look({"c": "C1"}, 11.0)
    assert servers.ended(11.0) == {}, "its connection may just have broken"
    assert servers.ended(11.5) == {"b": 0.5}
    servers.look({"b": "B1", "c": "C1"}, 12.0)
    assert servers.ended(12.0) == {}, "it had"
    servers.look({"b": "B1"}, 13.0)
    servers.look({"b": "B2", "c": "C2"}, 13.5)
    assert servers.ended(13.5) == {"b": 0.0, "c": 0.5}, "b was never seen away"
    assert servers.ended(43.0) == {"b": 29.5, "c": 30.0}
    servers.look({"b": "B2", "c": "C2"}, 50.0)
    assert servers.ended(50.0) == {}, "forgotten"


def group(last_seen: str, **more: object) -> dict[str, Group]:
    made = {"state": "FOLLOWER", "leader": "LLLLLLLL", "term": 7, "pindex": 9, "system_account": True} | more
    return {"S-R3F-x": Group("OOOOOOOO", peers={"LLLLLLLL": Peer("b", last_seen)}, **made)}  # type: ignore[arg-type]


def test_a_leader_that_was_not_heard_of_since_its_server_ended_is_overdue() -> None:
    (nudge,) = overdue(group("1.2s"), {"b": 0.5}, 1)
    assert (nudge.group, nudge.gone, nudge.subject) == ("S-R3F-x", "b", "$NRG.V.S-R3F-x")
    assert struct.unpack("<QQQ8s", nudge.payload) == (8, 0, 0, b"LLLLLLLL"), "the next term, and a log that is empty"
    assert not list(overdue(group("300ms"), {"b": 0.5}, 1)), "heard of since: it was elected anew"
    assert not list(overdue(group("1.2s"), {"c": 0.5}, 1)), "another one ended"
    assert not list(overdue(group("1.2s"), {}, 2))
    assert list(overdue(group(f"{SILENT}s"), {}, 2)), "a machine that lost its power says nothing, its connection stays"
    assert list(overdue(group(""), {"b": 1.0}, 1)), "never heard of since this server started"
    assert not list(overdue(group(""), {}, 2))


def test_nothing_is_done_by_one_that_is_alone_or_where_it_could_be_misread() -> None:
    ended = {"b": 5.0}
    assert list(overdue(group("9s"), ended, 1))
    assert not list(overdue(group("9s"), ended, 0)), "it is this server that is cut off"
    for other in (
        {"state": "LEADER"},
        {"state": "CANDIDATE"},
        {"leader": ""},
        {"leader": "unknown8"},
        {"pindex": 0},
        {"term": 0},
        {"system_account": False},
    ):
        assert not list(overdue(group("9s", **other), ended, 1)), other
