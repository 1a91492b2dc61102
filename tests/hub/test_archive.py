"""Entries of a backup: whole and in order, or refused."""

from __future__ import annotations

import random

import msgspec
import pytest

from edgeward.core.errors import Invalid, Refused
from edgeward.hub.archive import FORMAT, Data, Decoder, End, Entry, File, Meta, Msg, Stream, encode, safe_path

META = Meta(FORMAT, "1.0", "now", "e", 7, "hub", False)
WHOLE: list[Entry] = [
    META,
    File("a/b", 0o600, 3),
    Data(b"ab"),
    Data(b"c"),
    File("empty", 0o600, 0),
    Stream("KV_x", {"name": "KV_x"}, 9),
    Msg(3, "s", {"h": "v"}, b"\0\xff"),
    Msg(9, "t", {}, b""),
    Stream("Y", {}, 0),
    End(2, 2, 2),
]


def decoded(entries: list[Entry], seed: int = 0) -> list[Entry]:
    raw = b"".join(encode(e) for e in entries)
    decoder, rng, found = Decoder(), random.Random(seed), []
    while raw:
        n = rng.randrange(1, 30)
        found += list(decoder.feed(raw[:n]))
        raw = raw[n:]
    decoder.close()
    return found


@pytest.mark.parametrize("seed", range(5))
def test_any_cut_of_the_bytes_gives_the_same_entries(seed: int) -> None:
    assert decoded(WHOLE, seed) == WHOLE


@pytest.mark.parametrize("missing", range(len(WHOLE)))
def test_no_entry_can_be_left_out(missing: int) -> None:
    with pytest.raises(Invalid):
        decoded([e for i, e in enumerate(WHOLE) if i != missing])


@pytest.mark.parametrize(
    "entries",
    [
        [META, META, End(0, 0, 0)],
        [META, End(0, 0, 0), End(0, 0, 0)],
        [META, File("a", 0o600, 1), End(1, 0, 0)],
        [META, File("a", 0o600, 1), Data(b"xy"), End(1, 0, 0)],
        [META, Data(b"x"), End(0, 0, 0)],
        [META, Msg(1, "s", {}, b""), End(0, 0, 1)],
        [META, Stream("s", {}, 0), File("a", 0o600, 0), End(1, 1, 0)],
        [META, File("a", 0o600, -1), End(1, 0, 0)],
    ],
)
def test_what_is_out_of_order_is_refused(entries: list[Entry]) -> None:
    with pytest.raises(Invalid):
        decoded(entries)


def test_a_later_format_is_refused_by_name_whatever_its_fields_are() -> None:
    raw = msgspec.msgpack.encode({"type": "other", "format": FORMAT + 1, "version": "9.1", "new": 1})
    with pytest.raises(Refused, match=f"format {FORMAT + 1}") as e:
        list(Decoder().feed(len(raw).to_bytes(4, "big") + raw))
    assert "9.1" in e.value.remedy


@pytest.mark.parametrize("raw", [b"\xff" * 8, b"\0\0\0\x01\xc1", b"\0\0\0\x01\x90", b"\0\0\0\x00"])
def test_other_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(Invalid):
        list(Decoder().feed(raw))


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "", ".", "a//b", "a/./b", "a\0b", "x" * 2000])
def test_no_path_leaves_the_folder(path: str) -> None:
    with pytest.raises(Invalid):
        safe_path(path)
    with pytest.raises(Invalid):
        decoded([META, File(path, 0o600, 0), End(1, 0, 0)])
