"""Names of blobs are digests and nothing else; pieces are as large as a link brings in a moment."""

from __future__ import annotations

import pytest

from edgeward.core.blobs import PIECE, Pace, hex_of
from edgeward.core.errors import Invalid


def test_a_name_is_a_digest() -> None:
    assert hex_of("sha256:" + "a" * 64) == "a" * 64
    for wrong in (
        "a" * 64,
        "sha256:",
        "sha256:" + "A" * 64,
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 64 + "\n",
        "md5:0",
    ):
        with pytest.raises(Invalid):
            hex_of(wrong)


def test_pieces_grow_on_a_good_link_and_shrink_on_a_slow_one() -> None:
    pace = Pace()
    first = pace.most
    for _ in range(20):
        pace.took(0.01)
    assert pace.most == PIECE > first
    pace.took(1.0)
    assert pace.most == PIECE, "as it is"
    for _ in range(20):
        pace.took(5.0)
    assert 0 < pace.most < first
