"""Nonces: ours, fresh, used once; by any process of a hub."""

from __future__ import annotations

import pytest

from edgeward.core.errors import Refused
from edgeward.core.nonces import Nonces

NOW = 1_800_000_000.0


def test_a_nonce_is_good_once_and_for_a_while() -> None:
    n = Nonces(b"key", 60)
    one = n.make(NOW)
    n.check(one, NOW)
    n.check(one, NOW + 60)
    n.use(one, NOW + 1)
    for again in (n.use, n.check):
        with pytest.raises(Refused, match="was used"):
            again(one, NOW + 1)
    late = n.make(NOW)
    for at in (NOW + 60.1, NOW - 2):
        with pytest.raises(Refused, match="run out"):
            n.use(late, at)


def test_another_process_of_the_hub_takes_it_and_another_hub_does_not() -> None:
    one = Nonces(b"key", 60).make(NOW)
    Nonces(b"key", 60).use(one, NOW)
    with pytest.raises(Refused, match="not this hub's"):
        Nonces(b"other", 60).use(one, NOW)


def test_every_change_is_noticed() -> None:
    n = Nonces(b"key", 60)
    # its last character carries two bits of sixteen spellings each: all four must be met, whatever was drawn
    last: dict[str, str] = {}
    while len(last) < 4:
        one = n.make(NOW)
        last[one[-3]] = one
    for one in last.values():
        for at in range(len(one)):
            for other in "ABCDQgw-_=":
                if other != one[at]:
                    with pytest.raises(Refused):
                        n.check(one[:at] + other + one[at + 1 :], NOW)
    for junk in ("", "=", "é", one[:-4], one + "AAAA", "A" * 100_000):
        with pytest.raises(Refused):
            n.check(junk, NOW)


def test_what_is_remembered_is_bounded() -> None:
    n = Nonces(b"key", 60)
    for i in range(5000):
        at = NOW + i
        n.use(n.make(at), at)
    assert len(n._seen) <= 62
