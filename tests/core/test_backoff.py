"""The pause between two tries."""

from __future__ import annotations

from edgeward.core.backoff import backoff


def test_it_doubles_up_to_its_end_and_no_number_of_tries_is_too_many() -> None:
    assert [backoff(n, 0.5, 60.0) for n in range(6)] == [0.5, 0.5, 1.0, 2.0, 4.0, 8.0]
    assert {backoff(n, 0.5, 60.0) for n in (8, 1024, 2000, 10**9)} == {60.0}
    assert backoff(1, 60.0, 5.0) == 5.0
