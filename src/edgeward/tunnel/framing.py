"""What goes over a tunnel's link: frames of streams, inside messages of a WebSocket. Pure.

Bytes of a link come in, frames go out, and the other way round. The frames of one session are one stream of bytes:
where a WebSocket message ends means nothing, so that a link which breaks in the middle of one is resumed at any byte.
Data is handed on as it comes, a frame need not be whole; so nothing here grows with a frame's size. What is not by
the rules raises :class:`Garbage`, and the link ends. Credit is in ``credit.py``, what is done with frames in
``session.py``.

A frame is 8 bytes of head, big-endian: type (8 bits), length of the payload (24 bits), number of the stream (32 bits).
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

#: Opens a stream; payload :class:`Open` as msgpack.
OPEN = 1
#: The other side serves it; payload: a map as msgpack.
OPENED = 2
DATA = 3
#: No more data from this side (half-close).
END = 4
#: The stream is no more; payload: a problem document as msgpack.
RESET = 5
#: The other side may send so many bytes more (32 bits).
CREDIT = 6
#: Payload of 8 bytes that comes back in a PONG.
PING = 7
PONG = 8
#: So many bytes of frames were received in the session's life (64 bits): they need not be kept any more.
ACK = 9
#: The session ends; payload: a problem document as msgpack. Nothing is resumed.
BYE = 10

#: Bytes that each side may send on a new stream before it is given any.
FIRST = 128 * 1024
#: The longest payload of a frame of data, and of any other.
MOST_DATA = 1 << 20
MOST_OTHER = 64 * 1024

HEAD = struct.Struct("!II")
_U32 = struct.Struct("!I")
_U64 = struct.Struct("!Q")

Frame = tuple[int, int, bytes]


class Garbage(Exception):
    """What came is not by the rules of the tunnel."""


class Open(msgspec.Struct, omit_defaults=True):
    """What a stream is opened for. ``who``, ``source``: whom the hub let in and from where; an operator's own are
    overwritten by it. ``listen``: of a connection that a node took in for a reverse tunnel, the tunnel's name."""

    service: str
    args: dict[str, Any] = {}
    who: str = ""
    source: str = ""
    listen: str = ""


def frame(kind: int, stream: int, payload: bytes = b"") -> bytes:
    return HEAD.pack(kind << 24 | len(payload), stream) + payload


def head(kind: int, stream: int, length: int) -> bytes:
    """The head of a frame whose payload follows by itself."""
    return HEAD.pack(kind << 24 | length, stream)


def credit(stream: int, n: int) -> bytes:
    return HEAD.pack(CREDIT << 24 | 4, stream) + _U32.pack(n)


def ack(received: int) -> bytes:
    return HEAD.pack(ACK << 24 | 8, 0) + _U64.pack(received)


def number(payload: bytes) -> int:
    """What a CREDIT or an ACK says."""
    if len(payload) not in (4, 8):
        raise Garbage("a number has 4 or 8 bytes")
    return int(_U32.unpack(payload)[0] if len(payload) == 4 else _U64.unpack(payload)[0])


class Frames:
    """Takes a session's bytes apart. A frame of data may come in several pieces, each of them given as DATA."""

    def __init__(self) -> None:
        self._rest = b""
        self._data_left = 0
        self._stream = 0

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """What it gives is never a part of ``data``, whose memory may be used again."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        found: list[Frame] = []
        at, size = 0, len(data)
        while at < size:
            if self._data_left:
                piece = bytes(data[at : at + self._data_left])
                at += len(piece)
                self._data_left -= len(piece)
                found.append((DATA, self._stream, piece))
                continue
            if size - at < 8:
                break
            word, stream = HEAD.unpack_from(data, at)
            kind, length = word >> 24, word & 0xFFFFFF
            if kind == DATA:
                if length > MOST_DATA:
                    raise Garbage(f"a frame of {length} bytes")
                self._data_left, self._stream = length, stream
                at += 8
                continue
            if not OPEN <= kind <= BYE:
                raise Garbage(f"no such frame: {kind}")
            if length > MOST_OTHER:
                raise Garbage(f"a frame of {length} bytes that is no data")
            if size - at < 8 + length:
                break
            found.append((kind, stream, bytes(data[at + 8 : at + 8 + length])))
            at += 8 + length
        if at < size:
            self._rest = bytes(data[at:])
        return found


# -- RFC 6455 --------------------------------------------------------------------------------------------------------

_BINARY, _CLOSE, _WS_PING, _WS_PONG = 0x2, 0x8, 0x9, 0xA
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def accept_key(key: bytes) -> bytes:
    """``Sec-WebSocket-Accept`` for a ``Sec-WebSocket-Key`` (RFC 6455, 4.2.2)."""
    import base64
    import hashlib

    return base64.b64encode(hashlib.sha1(key + _GUID).digest())  # noqa: S324 - the RFC's own, no secret hangs on it


def ws_head(length: int, *, client: bool, opcode: int = _BINARY) -> bytes:
    """The head of a whole message of that length.

    A client's is marked as masked, as it must be, with a mask of zeros: masks keep scripts in browsers from talking to
    proxies in clear text; here all is inside TLS, and to mask a byte costs more than all else that is done to it.
    """
    flag = 0x80 if client else 0
    if length < 126:
        out = bytes((0x80 | opcode, flag | length))
    elif length < 65536:
        out = struct.pack("!BBH", 0x80 | opcode, flag | 126, length)
    else:
        out = struct.pack("!BBQ", 0x80 | opcode, flag | 127, length)
    return out + b"\0\0\0\0" if client else out


class Messages:
    """Takes a WebSocket apart into the bytes that it carries. ``client``: whether this end is the client."""

    def __init__(self, *, client: bool) -> None:
        self._client = client
        self._rest = b""
        self._left = 0
        self._mask = b""
        self._turn = 0
        self._opcode = _BINARY
        self._control = b""
        #: Answers to the other side's pings, to be written.
        self.answers: list[bytes] = []
        self.closed = False

    def feed(self, data: bytes | memoryview) -> list[bytes | memoryview]:
        """The pieces of payload in ``data``, as parts of it."""
        if self._left >= len(data) and not self._rest and self._opcode < 8 and not self._mask:
            self._left -= len(data)  # the middle of a large message
            return [data]
        if self._rest:
            data, self._rest = self._rest + data, b""
        found: list[bytes | memoryview] = []
        at = 0
        while at < len(data) and not self.closed:
            if self._left:
                piece = data[at : at + self._left]
                at += len(piece)
                self._payload(piece, found)
                continue
            used = self._head(data, at)
            if not used:
                self._rest = bytes(data[at:])
                break
            at += used
        return found

    def _head(self, data: bytes | memoryview, at: int) -> int:
        """The bytes of the head at ``at``; 0 when it is not whole."""
        size = len(data) - at
        if size < 2:
            return 0
        first, second = data[at], data[at + 1]
        length, used = second & 0x7F, 2
        if first & 0x70 or (first & 0xF) not in (0, _BINARY, _CLOSE, _WS_PING, _WS_PONG):
            raise Garbage("no WebSocket message of the tunnel")
        if bool(second & 0x80) == self._client:
            raise Garbage("clients mask, servers do not (RFC 6455, 5.1)")
        if length > 125:
            used = 4 if length == 126 else 10
            if size < used:
                return 0
            length = int.from_bytes(data[at + 2 : at + used], "big")
        opcode = first & 0xF
        if opcode >= 8 and (length > 125 or not first & 0x80):
            raise Garbage("a control message that is too long (RFC 6455, 5.5)")
        if length >> 62:
            raise Garbage("a message without end")
        self._mask, self._turn = b"", 0
        if second & 0x80:
            if size < used + 4:
                return 0
            mask = bytes(data[at + used : at + used + 4])
            used += 4
            self._mask = mask if mask != b"\0\0\0\0" else b""
        self._left, self._opcode = length, opcode
        if not length and opcode >= 8:
            self._act(b"")
        return used

    def _payload(self, piece: bytes | memoryview, found: list[bytes | memoryview]) -> None:
        self._left -= len(piece)
        if self._mask:
            piece = self._unmasked(piece)
        if self._opcode < 8:
            found.append(piece)
            return
        self._control += piece
        if not self._left:
            said, self._control = self._control, b""
            self._act(said)

    def _unmasked(self, piece: bytes | memoryview) -> bytes:
        n = len(piece)
        key = (self._mask[self._turn :] + self._mask[: self._turn]) * (n // 4 + 1)
        self._turn = (self._turn + n) % 4
        return (int.from_bytes(piece, "big") ^ int.from_bytes(key[:n], "big")).to_bytes(n, "big")

    def _act(self, said: bytes) -> None:
        if self._opcode == _CLOSE:
            self.closed = True
        elif self._opcode == _WS_PING and len(self.answers) < 16:
            self.answers.append(ws_head(len(said), client=self._client, opcode=_WS_PONG) + said)
        self._opcode = _BINARY
