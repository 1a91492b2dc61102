"""Sizes and durations: exact, bounded, and refused with the accepted forms."""

from __future__ import annotations

import math
import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core.quantity import (
    BYTES_PATTERN,
    DURATION_PATTERN,
    format_age,
    format_bytes,
    parse_bytes,
    parse_duration,
)

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@given(n=st.integers(0, 2**63), unit=st.sampled_from(sorted(UNITS)), suffix=st.sampled_from(["", "B"]))
def test_whole_sizes_are_exact(n: int, unit: str, suffix: str) -> None:
    for text, size in ((f"{n}{unit}{suffix}", n * UNITS[unit]), (n, n)):
        if size <= 2**62:
            assert parse_bytes(text) == size
        else:
            with pytest.raises(ValueError, match="is no size"):
                parse_bytes(text)


@given(value=st.decimals(0, 10**6, places=3), unit=st.sampled_from(sorted(UNITS)))
def test_fractions_lose_less_than_a_byte(value: Decimal, unit: str) -> None:
    exact = value * UNITS[unit]
    got = parse_bytes(f"{value}{unit}")
    assert got <= exact < got + 1


@given(parts=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(sorted(SECONDS))), min_size=1, max_size=4))
def test_durations_are_the_sum_of_their_parts(parts: list[tuple[int, str]]) -> None:
    got = parse_duration("".join(f"{n}{u}" for n, u in parts))
    assert math.isclose(got, sum(n * SECONDS[u] for n, u in parts), rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("text", "seconds"), [("1h30m", 5400), ("500ms", 0.5), ("1.5h", 5400), ("7d", 604800), ("2m500ms", 120.5), (0, 0)]
)
def test_durations_as_people_write_them(text: str | int, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "bad", ["", " ", "64 Mi", "64MI", "64K", "-1", "+1", "1e3", ".5", "1.", "1,5", "64Mi\n", "٣Mi", "0x10", "BB", -1]
)
def test_no_size(bad: str | int) -> None:
    with pytest.raises(ValueError, match="negative" if bad == -1 else "64Mi"):
        parse_bytes(bad)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "90",
        "1h 30m",
        "h",
        "1h30",
        "-1s",
        "1.s",
        "1y",
        "5S",
        "1s\n",
        "٣s",
        -0.1,
        math.nan,
        math.inf,
        10**400,
        "9" * 400 + "d",
    ],
)
def test_no_duration(bad: str | float) -> None:
    with pytest.raises(ValueError, match="negative" if bad == -0.1 else "24h"):
        parse_duration(bad)


@given(st.text("0123456789.kMGTiBsmhd\n ", max_size=8))
def test_the_published_patterns_accept_what_the_parsers_do(text: str) -> None:
    """What passes the schema is understood later, when nobody is there to hear an error."""
    for pattern, parse in ((BYTES_PATTERN, parse_bytes), (DURATION_PATTERN, parse_duration)):
        try:
            parse(text)
            taken = True
        except ValueError:
            taken = False
        assert taken == bool(re.search(pattern, text)), (pattern, text)


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (5 * 2**40, "5120.0 GiB")],
)
def test_bytes_for_people(n: int, text: str) -> None:
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (172799, "47h"), (172800, "2d")],
)
def test_ages_for_people(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
