"""HTTP/2 requests, read as strictly as those of HTTP/1.1, and the bound on frames that only cost. Pure.

A request of HTTP/2 goes on as one of HTTP/1.1, so whatever could be read there in another way is refused here (RFC
9113, sections 8.2 and 8.3): fields of the connection, line ends in values, names that are none, two authorities. Frames
and header compression are the library ``h2``'s; who moves them is ``h2door.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from edgeward.gateway.http1 import (
    CHUNKED,
    CONDITIONS,
    FIELDS,
    HEAD_BYTES,
    LINE_BYTES,
    METHODS,
    OF_CACHES,
    Bad,
    Headers,
    Request,
    read_authority,
    read_length,
)

#: RFC 9113, section 8.2.2; and what a server behind us would take for such a field.
_OF_CONNECTION = frozenset(
    {"connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade", "http2-settings"}
)
_PSEUDO = frozenset({":method", ":scheme", ":authority", ":path"})
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(r"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")
_TARGET = re.compile(r"/[\x21-\x7e]*")


def request_of(raw: Sequence[tuple[bytes, bytes]], ended: bool, scheme: str) -> Request:
    """``ended``: no body follows. Raises :class:`Bad`."""
    pseudo, headers = _split(raw)
    method = pseudo.get(":method", "")
    if method not in METHODS:  # CONNECT among them
        raise Bad(501 if _NAME.fullmatch(method.lower()) else 400, f"the method {method[:20]!r} is not served")
    if pseudo.get(":scheme") != scheme:
        raise Bad(400, f"a :scheme that is not {scheme}")
    target = pseudo.get(":path", "")
    if len(target) > LINE_BYTES - 64:
        raise Bad(414, f":path is longer than {LINE_BYTES} bytes")
    if not _TARGET.fullmatch(target):
        raise Bad(400, "a :path that is no path")
    _name_host(pseudo.get(":authority"), headers)
    request = Request(method, target, 2, headers)
    once = request.fields
    for name, value in headers:
        once[name] = f"{once[name]}, {value}" if name in once else value
    request.scheme = scheme
    request.keep = True
    read_authority(request)
    declared = read_length(headers, once, 1)
    if ended:
        if declared:
            raise Bad(400, "a Content-Length without the body")
        request.length = 0
    else:
        request.length = CHUNKED if declared is None else declared
    expect = once.get("expect")
    if expect is not None:
        if expect.lower() != "100-continue":
            raise Bad(417, "an expectation other than 100-continue")
        request.expect = request.length != 0
    request.unconditional = not CONDITIONS & once.keys()
    request.plain = (
        request.unconditional and method == "GET" and request.length == 0 and not OF_CACHES & once.keys()
    )  # fmt: skip
    return request


def _split(raw: Iterable[tuple[bytes, bytes]]) -> tuple[dict[str, str], Headers]:
    """Pseudo-header fields, and the others with the crumbs of cookies in one (RFC 9113, section 8.2.3)."""
    pseudo: dict[str, str] = {}
    headers: Headers = []
    cookies: list[str] = []
    size = 0
    for n, v in raw:
        size += len(n) + len(v) + 32
        name, value = n.decode("latin-1"), v.decode("latin-1")
        if name.startswith(":"):
            if headers or cookies or name in pseudo or name not in _PSEUDO:
                raise Bad(400, f"a pseudo-header field that is twice, behind others or unknown: {name[:20]}")
            pseudo[name] = value
            continue
        if not _NAME.fullmatch(name):
            raise Bad(400, "a header field whose name is none")
        if not _VALUE.fullmatch(value):
            raise Bad(400, f"a value that cannot be one, of {name[:40]}")
        if name in _OF_CONNECTION or (name == "te" and value.lower() != "trailers"):
            raise Bad(400, f"{name[:40]}, a field of the connection, in HTTP/2")
        if name == "cookie":
            cookies.append(value)
        else:
            headers.append((name, value))
    if size > HEAD_BYTES:
        raise Bad(431, f"the head is longer than {HEAD_BYTES} bytes")
    if len(headers) + len(cookies) > FIELDS:
        raise Bad(431, f"more than {FIELDS} header fields")
    if cookies:
        headers.append(("cookie", "; ".join(cookies)))
    return pseudo, headers


def _name_host(authority: str | None, headers: Headers) -> None:
    """One Host, whichever way it came."""
    hosts = [v for n, v in headers if n == "host"]
    if authority is None:
        if not hosts:
            raise Bad(400, "neither :authority nor Host")
    elif hosts and [h.lower() for h in hosts] != [authority.lower()]:
        raise Bad(400, ":authority and Host name different hosts")
    elif not hosts:
        headers.insert(0, ("host", authority))


def fields_of(status: int, fields: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """An answer's head as HTTP/2 has it: fields of the connection stay behind."""
    head = [(b":status", b"%d" % status)]
    head += [(n.encode("latin-1"), v.encode("latin-1")) for n, v in fields if n not in _OF_CONNECTION]
    return head


class Patience:
    """How much a connection may do that moves nothing: take requests back (CVE-2023-44487), ping, change settings, send
    empty frames. It grows with time and with what is really sent; at its end the connection is."""

    #: Points at most and each second; what one frame costs, and what one that is sent gives back.
    MOST, PER_SECOND = 200.0, 50.0
    COSTS, SMALL, EARNS = 1.0, 0.05, 0.1

    __slots__ = ("_at", "_left")

    def __init__(self, now: float) -> None:
        self._left, self._at = self.MOST, now

    def spend(self, points: float, now: float) -> bool:
        """False: it is over."""
        if now > self._at:
            self._left = min(self.MOST, self._left + (now - self._at) * self.PER_SECOND)
            self._at = now
        self._left -= points
        return self._left >= 0.0

    def earn(self) -> None:
        if self._left < self.MOST:
            self._left += self.EARNS
