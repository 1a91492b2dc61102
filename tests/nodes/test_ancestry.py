"""What a restored store means for those who were ahead of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.nodes.ancestry import Ancestor, base_now, newer_than

A_AT_100 = Ancestor("A", 100, 5_000)  # restored from epoch A as of revision 100; 5000 was the last it wrote
B_AT_5100 = Ancestor("B", 5_100, 90_000)


@pytest.mark.parametrize(
    ("epoch", "line", "hub", "hub_line", "want"),
    [
        ("A", [], "A", [], None),  # the same store
        ("", [], "B", [A_AT_100], None),  # a node that never heard of a hub has nothing
        ("A", [], "Z", [], None),  # a hub that was made anew
        ("A", [], "B", [A_AT_100], 100),
        ("B", [A_AT_100], "C", [A_AT_100, B_AT_5100], 5_100),
        ("A", [], "C", [A_AT_100, B_AT_5100], 100),  # away during two restores
        ("B", [A_AT_100], "C", [Ancestor("A", 100, 90_000)], 5_000),  # the same backup restored a second time
        ("B", [A_AT_100], "A", [], 5_000),  # the machine that was thought lost is back
    ],
)
def test_what_a_node_has_that_the_hub_has_not(
    epoch: str, line: list[Ancestor], hub: str, hub_line: list[Ancestor], want: int | None
) -> None:
    assert newer_than(epoch, line, hub, hub_line) == want


@pytest.mark.parametrize(
    ("base", "revision", "was", "deleted", "want"),
    [
        (80, 4_080, 80, 0, 4_080),  # made on what the backup holds
        (140, 4_080, 80, 0, 4_080),  # made on something newer than the backup: the hub's is older, no conflict
        (80, 4_090, 90, 0, 80),  # the hub had changed it before the backup: a conflict then, and now
        (80, 6_000, 0, 0, 80),  # the hub changed it after the restore: a conflict
        (140, 6_000, 0, 0, 140),
        (140, 0, 0, 0, 0),  # made after the backup: the hub knows nothing of it
        (140, 0, 0, 4_090, 0),  # deleted before the backup, made again after it
        (80, 0, 0, 4_090, 80),  # was deleted before the backup
        (140, 0, 0, 6_001, 140),  # deleted after the restore
        (0, 4_080, 80, 0, 0),  # the site never knew the hub's
        (4_080, 4_080, 80, 0, 4_080),  # made after the restore
        (6_000, 6_001, 0, 0, 6_000),  # an ordinary conflict after the restore
        (6_000, 0, 0, 6_001, 6_000),
    ],
)
def test_a_base_in_the_restored_stores_numbers(base: int, revision: int, was: int, deleted: int, want: int) -> None:
    assert base_now(base, [A_AT_100], revision=revision, was=was, deleted=deleted) == want


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_store_that_was_never_restored_changes_no_base(base: int, revision: int, deleted: int) -> None:
    assert base_now(base, [], revision=revision, was=0, deleted=deleted) == base
