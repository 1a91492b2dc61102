"""What is inside a backup: typed entries as length-prefixed msgpack, one after the other. Pure.

In: entries, out: bytes, and back. The order is ``Meta``, then each ``File`` with its ``Data``, then each ``Stream``
with its ``Msg``, then ``End``, which counts them. The decoder takes any cut of the bytes, holds one entry at a time,
and refuses what a later release wrote, what is out of order and every path that would leave the target folder.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import msgspec

from edgeward.core.errors import Invalid, Refused

FORMAT = 1
#: Bytes of a file in one entry.
PIECE = 256 * 1024
#: nats-server takes messages of 8 MiB; with headers and names around them.
_ENTRY_MOST = 12 << 20


class Meta(msgspec.Struct, tag="meta"):
    """``layout``: ``system`` where the hub's folder is one of several (`up`), ``hub`` where it stands alone."""

    format: int
    version: str
    made: str
    epoch: str
    revision: int
    layout: str
    readings: bool


class File(msgspec.Struct, tag="file"):
    path: str
    mode: int
    size: int


class Data(msgspec.Struct, tag="data"):
    data: bytes


class Stream(msgspec.Struct, tag="stream"):
    """A JetStream stream: its configuration as the server gives it, and its last sequence."""

    name: str
    config: dict[str, Any]
    last: int


class Msg(msgspec.Struct, tag="msg"):
    seq: int
    subject: str
    headers: dict[str, str]
    data: bytes


class End(msgspec.Struct, tag="end"):
    files: int
    streams: int
    messages: int


Entry = Meta | File | Data | Stream | Msg | End
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode
_plain = msgspec.msgpack.Decoder().decode


def encode(entry: Entry) -> bytes:
    raw = _encode(entry)
    return struct.pack(">I", len(raw)) + raw


def safe_path(text: str) -> PurePosixPath:
    """A path that stays below the folder it is put into. Raises ``Invalid``."""
    path = PurePosixPath(text)
    parts = path.parts
    if not parts or path.is_absolute() or ".." in parts or "\0" in text or len(text) > 1024 or str(path) != text:
        raise Invalid(f"has a file in it that would leave the folder: {text[:80]!r}", remedy="do not restore it")
    return path


class Decoder:
    """Feed it plain chunks; it gives entries, and with :meth:`close` vouches that they were all."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._count = End(0, 0, 0)
        self._left = 0
        self._ended = False
        self.meta: Meta | None = None
        self._in_stream = False

    @property
    def counts(self) -> End:
        return self._count

    def feed(self, data: bytes) -> Iterator[Entry]:
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= 4:
            (size,) = struct.unpack_from(">I", self._buffer, at)
            if size > _ENTRY_MOST:
                raise Invalid("has an entry that is too large", remedy="do not restore it")
            if len(self._buffer) - at - 4 < size:
                break
            raw = bytes(self._buffer[at + 4 : at + 4 + size])
            at += 4 + size
            yield self._one(raw)
        del self._buffer[:at]

    def _one(self, raw: bytes) -> Entry:
        if self.meta is None:
            self._refuse_later(raw)
        try:
            entry: Entry = _decode(raw)
        except msgspec.DecodeError as e:
            raise Invalid(f"has an entry that is not understood: {e}") from None
        self._check(entry)
        return entry

    @staticmethod
    def _refuse_later(raw: bytes) -> None:
        """A later format may have other fields: its number is read before anything else is."""
        try:
            doc = _plain(raw)
            found = int(doc["format"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            raise Invalid("does not begin as a backup does") from None
        if found > FORMAT:
            raise Refused(
                f"is a backup of format {found}, this release knows {FORMAT}",
                remedy=f"restore it with Edgeward {doc.get('version', '')} or later",
            )

    def _check(self, entry: Entry) -> None:
        count = self._count
        bad = self._ended or (self._left > 0) != isinstance(entry, Data)
        if isinstance(entry, Meta):
            bad = bad or self.meta is not None
            self.meta = entry
        elif isinstance(entry, File):
            bad = bad or self._in_stream or entry.size < 0
            safe_path(entry.path)
            count.files += 1
            self._left = entry.size
        elif isinstance(entry, Data):
            self._left -= len(entry.data)
            bad = bad or self._left < 0 or not entry.data
        elif isinstance(entry, Stream):
            self._in_stream = True
            count.streams += 1
        elif isinstance(entry, Msg):
            bad = bad or not self._in_stream
            count.messages += 1
        else:
            bad = bad or entry != count
            self._ended = True
        if bad or self.meta is None:
            raise Invalid("has entries out of order", remedy="do not restore it")

    def close(self) -> None:
        if not self._ended or self._buffer:
            raise Invalid("ends too early", remedy="use another copy")
