"""DNS on the wire, as much as steering needs: one query in, one answer out. Pure, bytes to bytes.

A query is read strictly (RFC 1035, EDNS(0) of RFC 6891, client subnet of RFC 7871): one question, no compression in
its name, nothing behind the end; what is wrong says with which code it is refused. An answer compresses names by
pointers to the question, and is cut to an empty one with TC when it would be longer than its limit. What is answered is
decided in ``dnszone.py``.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

A, NS, SOA, AAAA, OPT, ANY = 1, 2, 6, 28, 41, 255
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 2, 3, 4, 5, 16
#: The longest answer over UDP: what passes every link in one piece (DNS flag day 2020).
UDP_MOST = 1232
_PLAIN_MOST = 512
_SUBNET = 8
_QR, _AA, _TC, _RD = 0x8000, 0x0400, 0x0200, 0x0100
_HEAD = struct.Struct("!6H")
_RR = struct.Struct("!HHIH")
_TWO = struct.Struct("!HH")
#: The question's name, as a pointer.
POINTER = b"\xc0\x0c"


@dataclass(frozen=True, slots=True)
class Subnet:
    """The client subnet of a query: ``family`` 1 or 2 (0 with a ``source`` of 0 only), the ``address`` as sent."""

    family: int
    source: int
    address: bytes

    @property
    def client(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        if self.family == 2:
            return ipaddress.IPv6Address(self.address.ljust(16, b"\0"))
        return ipaddress.IPv4Address(self.address.ljust(4, b"\0"))


@dataclass(slots=True)
class Query:
    """``name`` is the question's name on the wire in lower case. ``fault``: the code that refuses it, or 0."""

    id: int
    flags: int
    question: bytes = b""
    name: bytes = b""
    type: int = 0
    klass: int = 0
    edns: bool = False
    size: int = _PLAIN_MOST
    subnet: Subnet | None = None
    fault: int = NOERROR


@dataclass(frozen=True, slots=True)
class Record:
    """``owner`` on the wire, a pointer or a name."""

    owner: bytes
    type: int
    ttl: int
    data: bytes

    def wire(self) -> bytes:
        return self.owner + _RR.pack(self.type, IN, self.ttl, len(self.data)) + self.data


class _Bad(Exception):
    """What was read is refused with this code."""

    def __init__(self, code: int = FORMERR) -> None:
        super().__init__(code)
        self.code = code


def name_of(text: str) -> bytes:
    """A host name on the wire, in lower case. Raises ``ValueError``."""
    wire = b""
    for label in text.lower().rstrip(".").split("."):
        data = label.encode("ascii")
        if not 0 < len(data) < 64:
            raise ValueError(f"{text!r} is no DNS name")
        wire += bytes([len(data)]) + data
    if len(wire) > 254:
        raise ValueError(f"{text[:40]!r}... is longer than a DNS name may be")
    return wire + b"\0"


def _name_end(data: bytes, at: int) -> int:
    """Behind the name that begins at ``at``. Names of queries have no pointers."""
    start = at
    while True:
        if at >= len(data):
            raise _Bad
        n = data[at]
        at += 1
        if n == 0:
            if at - start > 255:
                raise _Bad
            return at
        if n > 63:
            raise _Bad
        at += n


def parse(data: bytes) -> Query | None:
    """A query, with its ``fault`` if it is to be refused; None for what no answer may go to (RFC 1035, 7.3)."""
    if len(data) < 12:
        return None
    ident, flags, questions, answers, authorities, more = _HEAD.unpack_from(data)
    if flags & _QR:
        return None
    query = Query(ident, flags)
    try:
        if flags >> 11 & 15:
            raise _Bad(NOTIMP)
        if questions != 1 or answers or authorities or more > 4:
            raise _Bad
        end = _name_end(data, 12)
        if len(data) < end + 4:
            raise _Bad
        query.question, query.name = data[12 : end + 4], data[12:end].lower()
        query.type, query.klass = _TWO.unpack_from(data, end)
        at = end + 4
        for _ in range(more):
            at = _additional(data, at, query)
        if at != len(data):
            raise _Bad
    except _Bad as e:
        query.fault = e.code
    return query


def _additional(data: bytes, at: int, query: Query) -> int:
    end = _name_end(data, at)
    if len(data) < end + 10:
        raise _Bad
    length: int
    type_, size, ttl, length = _RR.unpack_from(data, end)
    body = end + 10
    if len(data) < body + length:
        raise _Bad
    if type_ == OPT:
        if query.edns or end != at + 1:
            raise _Bad
        query.edns, query.size = True, max(_PLAIN_MOST, size)
        if ttl >> 16 & 255:
            raise _Bad(BADVERS)
        _options(data[body : body + length], query)
    return body + length


def _options(data: bytes, query: Query) -> None:
    at = 0
    while at < len(data):
        if len(data) < at + 4:
            raise _Bad
        code, length = _TWO.unpack_from(data, at)
        at += 4
        if len(data) < at + length:
            raise _Bad
        if code == _SUBNET:
            if query.subnet is not None:
                raise _Bad
            query.subnet = _subnet(data[at : at + length])
        at += length


def _subnet(data: bytes) -> Subnet:
    """RFC 7871, 6 and 7.1.1: as many bytes as the source prefix needs, the rest of the last one and the scope zero."""
    if len(data) < 4:
        raise _Bad
    family, source, scope = struct.unpack_from("!HBB", data)
    address = data[4:]
    most = {0: 0, 1: 32, 2: 128}.get(family)
    if most is None or source > most or scope or len(address) != (source + 7) // 8:
        raise _Bad
    if source % 8 and address[-1] & (0xFF >> source % 8):
        raise _Bad
    return Subnet(family, source, address)


def answer(
    query: Query,
    code: int,
    answers: tuple[Record, ...] = (),
    authority: tuple[Record, ...] = (),
    *,
    scope: int = 0,
    limit: int = UDP_MOST,
    authoritative: bool = True,
) -> bytes:
    """The answer's bytes, at most ``limit``: records that do not fit all go, and TC says so.

    ``scope`` bits of the client subnet are what the answer holds for; it is told only to those who sent one.
    """
    flags = _QR | query.flags & (0x7800 | _RD) | (_AA if authoritative else 0) | code & 15
    tail = _opt(query, code, scope) if query.edns else b""
    extra = 1 if query.edns else 0
    asked = 1 if query.question else 0
    body = b"".join([r.wire() for r in (*answers, *authority)])
    if 12 + len(query.question) + len(body) + len(tail) > limit:
        head = _HEAD.pack(query.id, flags | _TC, asked, 0, 0, extra)
        return head + query.question + tail
    head = _HEAD.pack(query.id, flags, asked, len(answers), len(authority), extra)
    return head + query.question + body + tail


def _opt(query: Query, code: int, scope: int) -> bytes:
    option = b""
    if query.subnet is not None:
        s = query.subnet
        option = struct.pack("!HHHBB", _SUBNET, 4 + len(s.address), s.family, s.source, scope if s.source else 0)
        option += s.address
    return b"\0" + _RR.pack(OPT, UDP_MOST, code >> 4 << 24, len(option)) + option


def soa(primary: bytes, mailbox: bytes, serial: int, negative: int) -> bytes:
    """SOA data; the times but the last are of no use without zone transfers."""
    return primary + mailbox + struct.pack("!5I", serial, 3600, 600, 86400, negative)
