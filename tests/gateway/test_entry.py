"""Stored answers as files: what went in comes out, or nothing does. Pure."""

from __future__ import annotations

import random

import pytest

from edgeward.gateway.cache import Stored, directives
from edgeward.gateway.entry import (
    HEAD,
    PIECE,
    SUM,
    Blob,
    Damaged,
    Sums,
    meta,
    meta_of,
    name_of,
    pack,
    seen_at,
    sums_of,
    unpack,
)

KEY = ("h", "/a?b")
FILE = f"00/{'0' * 32}-{'0' * 8}.b"


def stored(body: bytes = b"body", **more: object) -> Stored:
    fields = {"cache-control": "max-age=60", "etag": '"1"', "vary": "accept-language"}
    made = Stored(
        200, "OK", list(fields.items()), fields, body, (("accept-language", "de"),), directives("max-age=60"), 1.5,
        1_800_000_000.25, 60.0, 5.0, 6.0, frozenset({"a", "b"}), owner="default/r t ",
    )  # fmt: skip
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_what_goes_in_comes_out() -> None:
    given = stored()
    key, found = unpack(pack(meta_of(KEY, given, None), given.body))
    assert (key, found) == (KEY, given)
    blob = Blob(FILE, PIECE + 1, b"s" * 2 * SUM)
    _, large = unpack(pack(meta_of(KEY, given, blob)))
    assert (large.blob, large.body, large.length) == (blob, b"", PIECE + 1)


def test_every_flipped_bit_and_every_cut_is_found() -> None:
    data = pack(meta_of(KEY, stored(), None), b"body")
    for at in range(len(data)):
        for bit in (0, 7):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(Damaged):
                unpack(bytes(damaged))
        with pytest.raises(Damaged):
            unpack(data[:at])
    for more in (b"\0", data):
        with pytest.raises(Damaged):
            unpack(data + more)
    rng = random.Random(7)
    for _ in range(300):
        with pytest.raises(Damaged):
            unpack(rng.randbytes(rng.randrange(0, 300)))


def test_a_meta_is_read_without_its_body() -> None:
    data = pack(meta_of(KEY, stored(), None), b"x" * PIECE)
    assert meta(data[:2000], len(data)).key == KEY
    with pytest.raises(Damaged):
        meta(data[: HEAD + 10], len(data))
    for blob in (
        Blob("../../../../etc/passwd", 5, b"s" * SUM),
        Blob(f"00/../{FILE}", 5, b"s" * SUM),
        Blob(FILE, PIECE + 1, b"s" * SUM),
    ):
        damaged = pack(meta_of(KEY, stored(), blob))
        with pytest.raises(Damaged):
            meta(damaged, len(damaged))


def test_names_are_of_variants() -> None:
    names = {
        name_of(k, owner, varied)
        for k in (KEY, ("h/a", "?b"), ("", "h/a?b"))
        for owner in ("a", "b")
        for varied in ((), (("x", "y"),), (("x", ""), ("y", "")))
    }
    assert len(names) == 18


def test_sums_of_a_body_that_comes_bit_by_bit() -> None:
    rng = random.Random(3)
    body = rng.randbytes(3 * PIECE + 17)
    for most in (1000, PIECE, 5 * PIECE):
        made, at = Sums(), 0
        while at < len(body):
            n = rng.randrange(1, most)
            made.feed(body[at : at + n])
            at += n
        assert (made.length, made.end()) == (len(body), sums_of(body))


def test_what_comes_from_the_future_is_of_unknown_age() -> None:
    assert seen_at(stored(), 1_800_000_010.0).ttl(1_800_000_010.0) > 40
    late = seen_at(stored(), 1_000_000.0)
    assert late.ttl(1_000_000.0) <= 0
    assert late.stale_if_error == 5.0
