"""A stored answer as a file: bytes to an answer and back, and never to another answer than was kept. Pure.

An entry is ``magic, length of meta (4), length of body (4), digest of meta (16), digest of body (16), meta, body``;
integers are big-endian, digests BLAKE2b, meta is msgpack. A small body stands in it. A large one has a file of its own,
which is never changed, and its entry holds a digest for each piece of it: every piece is held against that before it is
given. What was torn by a power cut, cut short, changed or put there by somebody else does not fit and is dropped.
"""

from __future__ import annotations

import hashlib
import re
import struct
from typing import NamedTuple

import msgspec

from edgeward.gateway.cache import Stored, directives
from edgeward.gateway.shelf import Key

MAGIC = b"EWCACHE1"
#: Bodies up to this size stand in the entry; larger ones are cut into pieces of this size, each with its digest.
PIECE = 64 * 1024
SUM = 8
_HEAD = struct.Struct(">8sII16s16s")
HEAD = _HEAD.size
META_MOST = 1024 * 1024
_FILE = re.compile(r"[0-9a-f]{2}/[0-9a-f]{32}-[0-9a-f]{8}\.b")


class Blob(NamedTuple):
    """A large body on the disk."""

    file: str
    length: int
    sums: bytes


class Meta(msgspec.Struct, array_like=True):
    key: tuple[str, str]
    owner: str
    status: int
    reason: str
    headers: list[tuple[str, str]]
    fields: dict[str, str]
    varied: list[tuple[str, str]]
    age0: float
    got: float
    fresh_for: float
    stale_if_error: float
    stale_while_revalidate: float
    tags: list[str]
    squeezable: bool
    #: Of a body in a file of its own: the file's name, its length, the digests of its pieces.
    file: str = ""
    length: int = 0
    sums: bytes = b""


class Damaged(ValueError):
    """It is not what was kept."""


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def piece_sum(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=SUM).digest()


def sums_of(body: bytes) -> bytes:
    view = memoryview(body)
    return b"".join(piece_sum(view[at : at + PIECE]) for at in range(0, len(body), PIECE))


def name_of(key: Key, owner: str, varied: tuple[tuple[str, str], ...]) -> str:
    """The same for the same variant of the same answer."""
    return hashlib.blake2b(msgspec.msgpack.encode((key, owner, varied)), digest_size=16).hexdigest()


def meta_of(key: Key, stored: Stored, blob: Blob | None) -> Meta:
    return Meta(
        key, stored.owner, stored.status, stored.reason, stored.headers, stored.fields, list(stored.varied),
        stored.age0, stored.got, stored.fresh_for, stored.stale_if_error, stored.stale_while_revalidate,
        sorted(stored.tags), stored.squeezable, *(blob or ("", 0, b"")),
    )  # fmt: skip


def pack(meta: Meta, body: bytes = b"") -> bytes:
    """The file's bytes. ``body``: where it has no file of its own."""
    said = msgspec.msgpack.encode(meta)
    return _HEAD.pack(MAGIC, len(said), len(body), _digest(said), _digest(body)) + said + body


def sizes(head: bytes, size: int) -> tuple[int, int]:
    """``(meta, body)``: the lengths of a file's parts, from its first bytes and its size. Raises :class:`Damaged`."""
    if len(head) < HEAD:
        raise Damaged("is too short")
    magic, said, body, _, _ = _HEAD.unpack_from(head)
    if magic != MAGIC or said > META_MOST or body > PIECE or HEAD + said + body != size:
        raise Damaged("is no entry, or not a whole one")
    return said, body


def meta(data: bytes, size: int) -> Meta:
    """The meta of a file, from its first bytes. Raises :class:`Damaged`."""
    said, _ = sizes(data, size)
    raw = data[HEAD : HEAD + said]
    if len(raw) < said or _digest(raw) != _HEAD.unpack_from(data)[3]:
        raise Damaged("its meta was changed")
    try:
        found = msgspec.msgpack.decode(raw, type=Meta)
    except msgspec.DecodeError:
        raise Damaged("its meta is of another release") from None
    if found.file and (len(found.sums) != SUM * -(-found.length // PIECE) or not _FILE.fullmatch(found.file)):
        raise Damaged("its digests do not fit")
    return found


def unpack(data: bytes) -> tuple[Key, Stored]:
    """Raises :class:`Damaged`."""
    found = meta(data, len(data))
    said, size = sizes(data, len(data))
    body = data[HEAD + said :]
    if len(body) != size or _digest(body) != _HEAD.unpack_from(data)[4]:
        raise Damaged("its body was changed")
    blob = Blob(found.file, found.length, found.sums) if found.file else None
    stored = Stored(
        found.status, found.reason, found.headers, found.fields, body, tuple(found.varied),
        directives(found.fields.get("cache-control")), found.age0, found.got, found.fresh_for,
        found.stale_if_error, found.stale_while_revalidate, frozenset(found.tags),
        squeezable=found.squeezable, owner=found.owner, blob=blob,
    )  # fmt: skip
    return found.key, stored


def seen_at(stored: Stored, now: float) -> Stored:
    """As it counts now: what comes from the future was kept by a clock that was ahead, so nobody knows its age."""
    if stored.got > now + 60.0:
        stored.got, stored.fresh_for = now, 0.0
    return stored


class Sums:
    """The digests of a body that comes bit by bit."""

    def __init__(self) -> None:
        self._rest = b""
        self._sums: list[bytes] = []
        self.length = 0

    def feed(self, data: bytes) -> None:
        self.length += len(data)
        data = self._rest + data
        view = memoryview(data)
        whole = len(data) // PIECE * PIECE
        for at in range(0, whole, PIECE):
            self._sums.append(piece_sum(view[at : at + PIECE]))
        self._rest = data[whole:]

    def end(self) -> bytes:
        if self._rest:
            self._sums.append(piece_sum(self._rest))
            self._rest = b""
        return b"".join(self._sums)
