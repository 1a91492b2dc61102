"""When topics are closed, and which can be."""

from __future__ import annotations

import pytest

from edgeward.core.topics import filters
from edgeward.streams.refusal import closable, is_full


def test_it_closes_when_a_batch_finds_no_room_and_opens_when_half_is_free() -> None:
    assert not is_full(False, False, 100, 100), "as long as everything finds room"
    assert is_full(False, True, 76, 100)
    assert is_full(True, False, 51, 100), "one free place is no reason to open"
    assert not is_full(True, False, 50, 100)
    assert is_full(True, True, 10, 100), "what waits at the broker comes first"


@pytest.mark.parametrize(
    ("topic", "can"),
    [
        ("sensors/#", True),
        ("sensors/a", True),
        ("a//b.c/#", True),
        ("messgröße/1", True),
        ("sensors/+/temp", False),
        ("+/temp", False),
        ("ew/x/#", False),
        ("_INBOX/#", False),
        ("a/$x", False),
        ("a/{{wildcard(1)}}", False),
        ('a/"/#', False),
    ],
)
def test_what_a_broker_can_refuse(topic: str, can: bool) -> None:
    assert closable(filters(topic)) is can
