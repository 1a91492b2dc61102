"""Sealed files: whole with the key and without it, or refused."""

from __future__ import annotations

import io
import itertools
import random
import struct
from collections.abc import Iterator

import pytest

from edgeward.core.errors import EdgewardError, Invalid, Refused
from edgeward.core.seal import (
    CHUNK,
    MAGIC,
    RecoveryKey,
    Sealer,
    SealingKey,
    new_keys,
    read_header,
    unseal,
)

RECOVERY, SEALING = new_keys()


def sealed(data: bytes, key: SealingKey = SEALING, step: int = 10_000) -> bytes:
    sealer = Sealer(key, {"what": "test"})
    out = b"".join(sealer.update(data[i : i + step]) for i in range(0, len(data), step))
    return out + sealer.finish()


def opened(raw: bytes, key: RecoveryKey | None = RECOVERY) -> bytes:
    source = io.BytesIO(raw)
    return b"".join(unseal(source, read_header(source), key=key))


def frames(raw: bytes) -> Iterator[int]:
    """Where each frame begins, and the end."""
    at = len(MAGIC) + 6 + struct.unpack(">I", raw[len(MAGIC) + 2 : len(MAGIC) + 6])[0]
    while at < len(raw):
        yield at
        at += 5 + struct.unpack(">I", raw[at + 1 : at + 5])[0]
    assert at == len(raw)
    yield at


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 77])
def test_what_goes_in_comes_out(size: int) -> None:
    data = random.Random(size).randbytes(size)
    raw = sealed(data)
    assert opened(raw) == data
    assert opened(raw, None) == b""  # without the key it is checked, and nothing is given away
    assert size < 64 or data[:64] not in raw


def test_every_cut_is_found() -> None:
    raw = sealed(random.Random(1).randbytes(4 * CHUNK + 5))
    borders = list(frames(raw))
    assert len(borders) == 7  # five chunks, the signature, the end
    cuts = {*borders[:-1], *range(60), *random.Random(2).sample(range(len(raw)), 100), len(raw) - 1}
    for cut in sorted(cuts):
        for key in (RECOVERY, None):
            with pytest.raises(EdgewardError) as e:
                opened(raw[:cut], key)
            assert e.value.exit_code == 3


def test_every_flipped_byte_is_found() -> None:
    rng = random.Random(3)
    raw = sealed(rng.randbytes(2 * CHUNK + 5))
    borders = list(frames(raw))
    near = {at + d for at in borders for d in range(-20, 21) if 0 <= at + d < len(raw)}
    for at in sorted({*range(borders[0]), *near, *rng.sample(range(len(raw)), 150)}):
        changed = bytearray(raw)
        changed[at] ^= 1 << rng.randrange(8)
        for key in (RECOVERY, None):
            with pytest.raises(EdgewardError) as e:
                opened(bytes(changed), key)
            assert e.value.exit_code == 3, at


def test_chunks_left_out_swapped_doubled_or_added_are_found() -> None:
    raw = sealed(random.Random(4).randbytes(3 * CHUNK + 5))
    at = list(frames(raw))
    parts = [raw[a:b] for a, b in itertools.pairwise(at)]
    start = raw[: at[0]]
    other = sealed(random.Random(4).randbytes(3 * CHUNK + 5))
    foreign = [other[a:b] for a, b in itertools.pairwise(at)]
    made = [
        parts[1:],
        [parts[1], parts[0], *parts[2:]],
        [parts[0], *parts],
        [*parts, parts[0]],
        [*parts[:3], *parts[4:]],
        [foreign[0], *parts[1:]],
        [*parts[:4], foreign[4]],
        [*parts, b"x"],
    ]
    for pieces in made:
        for key in (RECOVERY, None):
            with pytest.raises(Invalid):
                opened(start + b"".join(pieces), key)


def test_a_wrong_key_and_a_foreign_writer_are_refused() -> None:
    raw = sealed(b"state")
    other, other_sealing = new_keys()
    with pytest.raises(Refused, match=RECOVERY.id):
        opened(raw, other)
    # anybody can encrypt to the public half; without the hub's signing key it is not the hub's file
    forged = sealed(b"state", SealingKey(SEALING.recipient, other_sealing.seed))
    with pytest.raises(Refused, match="not written by the hub"):
        opened(forged)
    source = io.BytesIO(forged)
    with pytest.raises(Refused, match="not written by the hub"):
        list(unseal(source, read_header(source), signer=SEALING.signer))


def test_a_later_layout_is_named() -> None:
    raw = bytearray(sealed(b"state"))
    raw[len(MAGIC) + 1] = 9
    with pytest.raises(Refused, match="layout 9"):
        opened(bytes(raw))


def test_a_hostile_header_takes_no_memory() -> None:
    with pytest.raises(Invalid):
        opened(MAGIC + struct.pack(">HI", 1, 2**32 - 1) + b"x" * 100)
    deep = b"[" * 60_000
    with pytest.raises(Invalid):
        opened(MAGIC + struct.pack(">HI", 1, len(deep)) + deep)
    for header in (b"[]", b"null", b"{}", b'{"recipient": 1, "signer": 2, "ephemeral": 3}'):
        with pytest.raises(Invalid):
            opened(MAGIC + struct.pack(">HI", 1, len(header)) + header)


def test_keys_as_text() -> None:
    text = RECOVERY.text()
    assert RecoveryKey.parse(f"# keep this\n\n  {text}\n") == RECOVERY
    assert text not in repr(RECOVERY)
    for wrong in (text[:-1], text[:-5] + "AAAAA", "ewr_", "ewr_???", "nothing"):
        with pytest.raises(Invalid) as e:
            RecoveryKey.parse(wrong, file="k")
        assert text[10:40] not in str(e.value)
    assert SealingKey.parse(SEALING.document()) == SEALING
    with pytest.raises(Invalid):
        SealingKey.parse({"recipient": "x"})
