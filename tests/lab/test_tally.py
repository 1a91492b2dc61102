"""The demo's numbers: what was lost, came twice or out of order is counted, whatever the stream holds."""

from __future__ import annotations

from edgeward.lab.tally import FIELDS, enforced_of, percentile, rows, tally


def test_each_reading_is_looked_up() -> None:
    assert tally({1, 2, 3}, [1, 2, 3]) == {"sent": 3, "received": 3, "duplicates": 0, "lost": 0, "out_of_order": 0}
    assert tally({1, 2, 3, 4}, [1, 3, 2, 3, 9]) == {
        "sent": 4, "received": 3, "duplicates": 1, "lost": 1, "out_of_order": 1
    }  # fmt: skip
    assert tally(set(), []) == dict.fromkeys(("sent", "received", "duplicates", "lost", "out_of_order"), 0)


def test_percentiles_are_of_the_values() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (percentile(values, 0), percentile(values, 50), percentile(values, 100)) == (1.0, 51.0, 100.0)
    assert percentile([7.0], 99) == 7.0


def test_a_run_that_was_broken_off_has_its_rows() -> None:
    empty = dict.fromkeys(FIELDS)
    assert enforced_of(empty) == []
    told = dict(rows(empty))
    assert told["limits enforced on this machine"] == "none"
    told = dict(rows(empty | {"enforced": ["limits.cpu", "process.user"]}))
    assert told["limits enforced on this machine"] == "cpu, user"
