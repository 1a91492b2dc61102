"""Several things on one stream of a session: input, output, errors, signals, the end. Pure.

A *record* is a kind (one byte), a length (four, big-endian) and so many bytes. Input has a credit of its own inside the
stream: the node says how much more it takes, so that a program that reads nothing never stands before a signal or a new
window size. Output needs none: the stream's own credit stops a program whose reader stalls. What comes is judged as if
it came from a stranger: kinds and lengths are bounded, and a peer that breaks the rules is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from edgeward.core.errors import Refused

#: From the operator: bytes for the program's input, its end, a signal's name, the terminal's rows and columns.
INPUT, INPUT_END, SIGNAL, SIZE = b"i", b"I", b"s", b"w"
#: From the node: what the program wrote, more credit for input, how it ended.
OUTPUT, ERRORS, CREDIT, EXIT = b"o", b"e", b"c", b"x"
TO_NODE = frozenset({INPUT, INPUT_END, SIGNAL, SIZE})
FROM_NODE = frozenset({OUTPUT, ERRORS, CREDIT, EXIT})

MOST = 64 * 1024
#: Bytes of input that may be on their way before the node has said anything.
INPUT_WINDOW = 256 * 1024
_HEAD = struct.Struct(">cI")
_SIZE = struct.Struct(">HH")
_COUNT = struct.Struct(">I")


class Exit(msgspec.Struct, omit_defaults=True):
    """How a program ended. ``code``: 0 to 255, 128 + N after signal N, as shells say it; 126 and 127: not started."""

    code: int
    signal: str = ""
    error: str = ""


def record(kind: bytes, data: bytes = b"") -> bytes:
    """One record; ``data`` of at most ``MOST`` bytes."""
    if len(data) > MOST:
        raise ValueError("a record is too long")
    return _HEAD.pack(kind, len(data)) + data


def records(kind: bytes, data: bytes) -> Iterator[bytes]:
    """As many records as it takes."""
    for at in range(0, len(data), MOST):
        yield record(kind, data[at : at + MOST])


def size(rows: int, columns: int) -> bytes:
    return record(SIZE, _SIZE.pack(min(max(rows, 0), 65535), min(max(columns, 0), 65535)))


def read_size(data: bytes) -> tuple[int, int]:
    if len(data) != _SIZE.size:
        raise broken("a window size of a wrong length")
    rows, columns = _SIZE.unpack(data)
    return rows, columns


def credit(count: int) -> bytes:
    return record(CREDIT, _COUNT.pack(count))


def read_credit(data: bytes) -> int:
    if len(data) != _COUNT.size:
        raise broken("a credit of a wrong length")
    return int(_COUNT.unpack(data)[0])


def ended(exit: Exit) -> bytes:
    return record(EXIT, msgspec.json.encode(exit))


def read_exit(data: bytes) -> Exit:
    try:
        return msgspec.json.decode(data, type=Exit)
    except msgspec.MsgspecError:
        raise broken("an end that cannot be read") from None


def broken(what: str) -> Refused:
    return Refused(
        f"the other side does not keep to the session's form: {what}", remedy="is it an Edgeward of this age?"
    )


class Decoder:
    """Bytes in, records out. Holds at most one record and what was fed last."""

    def __init__(self, kinds: frozenset[bytes]) -> None:
        self._kinds = kinds
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Raises ``Refused`` at the first thing that is no record."""
        self._data += data
        while len(self._data) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._data)
            if kind not in self._kinds:
                raise broken(f"a record of kind {kind!r}")
            if length > MOST:
                raise broken(f"a record of {length} bytes")
            end = _HEAD.size + length
            if len(self._data) < end:
                return
            found = bytes(self._data[_HEAD.size : end])
            del self._data[:end]
            yield kind, found

    @property
    def empty(self) -> bool:
        """Whether nothing of a record is left: only then is an end of the stream an end."""
        return not self._data
