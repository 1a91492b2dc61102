"""HTTP/1.1 messages, read strictly: bytes of a head in, a message or a refusal out. Pure.

Two parties that read one message differently are how requests are smuggled. So nothing is repaired here: a message has
one spelling (RFC 9112) or it is refused, and what goes on is written anew from what was understood. Who decides where a
request goes is ``match.py``; who moves the bytes is ``door.py`` and ``upstream.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from edgeward.gateway.peer import Peer

if TYPE_CHECKING:
    from edgeward.gateway.auth import Identity

#: Bytes of a head, of its first line; number of fields.
HEAD_BYTES = 32 * 1024
LINE_BYTES = 8 * 1024
FIELDS = 100
#: Bytes of the fields behind a chunked body, which are read and dropped.
TRAILER_BYTES = 8 * 1024

Headers = list[tuple[str, str]]

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
#: RFC 9110, section 9.2.2: doing it twice is like doing it once.
IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS"})
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
#: Between gateways: the Route that another site's gateway asks for, which answers from its own site or says no, and
#: whether its target may have seen the request; and (to clients as well) which place answered.
FALLBACK, REFUSED, PLACE = "edgeward-fallback", "edgeward-refused", "edgeward-place"
#: From an engine before the plane: whose request it is, by which scheme, for which host as it was understood, and what
#: became of it where the engine asked the target by itself (status, and the time to connect).
FRONT_CLIENT, FRONT_SCHEME = "edgeward-front-client", "edgeward-front-scheme"
FRONT_HOST, FRONT_TRIED = "edgeward-front-host", "edgeward-front-tried"
UNTOUCHED, UNANSWERED = "untouched", "unanswered"
#: RFC 9110, section 7.6.1: of this connection only.
HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
     "proxy-authorization", "proxy-authenticate", "http2-settings", FALLBACK, REFUSED, PLACE, FRONT_CLIENT,
     FRONT_SCHEME, FRONT_HOST, FRONT_TRIED}
)  # fmt: skip
#: What a ``Connection`` field may name. To name an end-to-end field is to have it taken away on the way: refused.
_NOMINABLE = frozenset({"close", "keep-alive", "upgrade", "te", "trailer", "http2-settings", "proxy-connection", ""})
#: A client's word about itself, its path or its method, that servers behind a gateway tend to believe.
CLAIMS = frozenset(
    {"forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port", "x-forwarded-server",
     "x-forwarded-prefix", "x-forwarded-scheme", "x-forwarded-ssl", "x-real-ip", "x-client-ip", "x-original-url",
     "x-original-host", "x-original-method", "x-rewrite-url", "x-host", "x-http-method", "x-http-method-override",
     "x-method-override", "x-http-host-override", "true-client-ip", "client-cert", "client-cert-chain", "x-client-cert",
     "x-ssl-client-cert", "ssl-client-cert", "x-forwarded-client-cert", "x-ssl-client-verify", "x-ssl-client-dn",
     "x-ssl-client-s-dn", "x-client-verify", "x-client-dn"}
)  # fmt: skip

#: What the gateway itself tells targets of a client (``auth.py``) begins so; from clients it is dropped.
OURS = "x-edgeward-"

#: What asks for an answer under a condition, or for a part of it.
CONDITIONS = frozenset({"if-none-match", "if-modified-since", "if-match", "if-unmodified-since", "if-range", "range"})
OF_CACHES = frozenset({"cache-control", "pragma", "authorization", "upgrade"})

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELD_LINES = rf"((?:{_WORD}:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*)\r\n"
_REQUEST = re.compile(rf"({_WORD}) ([\x21-\x7e]+) HTTP/1\.([01])\r\n{_FIELD_LINES}")
_RESPONSE = re.compile(rf"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?\r\n{_FIELD_LINES}")
_TRAILERS = re.compile(_FIELD_LINES)
_NUMBER = re.compile(r"[0-9]{1,18}")
_AUTHORITY = re.compile(r"([A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\.?|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t\x20-\x7e]{0,256})?")


class Bad(Exception):
    """A message that is not taken. ``status`` is what its sender is told."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Request:
    """One request's head. Names of fields are lower-case; ``length`` is -1 for a chunked body."""

    __slots__ = (
        "authority", "expect", "fields", "headers", "host", "identity", "keep", "known", "length", "method", "minor",
        "path", "peer", "plain", "query", "scheme", "target", "unconditional", "upgrade",
    )  # fmt: skip

    def __init__(self, method: str, target: str, minor: int, headers: Headers) -> None:
        self.method, self.target, self.minor, self.headers = method, target, minor, headers
        #: Each field once; repeated ones joined by a comma (RFC 9110, section 5.3).
        self.fields: dict[str, str] = {}
        self.authority = self.host = ""
        #: Normalised by ``match.py`` when the request was accepted.
        self.path = self.query = ""
        self.length = 0
        self.keep = self.expect = False
        self.upgrade = ""
        self.scheme = "http"
        #: The client's certificate, where its listener asks for one and it was good.
        self.peer: Peer | None = None
        #: No conditions and no range; and beyond that nothing at all that a cache would have to look at.
        self.unconditional = self.plain = False
        #: It is remembered, with the bytes that it came in (``gate.py``).
        self.known = False
        #: Who asks, where the Route wants to know (``auth.py``).
        self.identity: Identity | None = None

    @property
    def authorised(self) -> bool:
        """The answer is for this client, unless it says otherwise (RFC 9111, section 3.5)."""
        return self.identity is not None or "authorization" in self.fields


class Response:
    """An answer's head. ``length`` is -1 for a chunked body, -2 for one that ends with the connection."""

    __slots__ = ("fields", "headers", "keep", "length", "reason", "status")

    def __init__(self, status: int, reason: str, headers: Headers) -> None:
        self.status, self.reason, self.headers = status, reason, headers
        self.fields: dict[str, str] = {}
        self.length = 0
        self.keep = False


CHUNKED = -1
UNTIL_CLOSE = -2


def _fields(text: str) -> tuple[Headers, dict[str, str]]:
    headers: Headers = []
    once: dict[str, str] = {}
    for line in text.split("\r\n"):
        if line:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            headers.append((name, value))
            once[name] = f"{once[name]}, {value}" if name in once else value
    if len(headers) > FIELDS:
        raise Bad(431, f"more than {FIELDS} header fields")
    return headers, once


def _count(headers: Headers, name: str) -> int:
    return sum(n == name for n, _ in headers)


def check_partial(data: bytes | bytearray) -> None:
    """Refuses a head that can never become one, before all of it is there: it is not waited for."""
    if len(data) > HEAD_BYTES:
        raise Bad(431, f"the head is longer than {HEAD_BYTES} bytes")
    if data.count(b"\n") != data.count(b"\r\n"):
        raise Bad(400, "a line that does not end in CR LF")
    if len(data) > LINE_BYTES and b"\r\n" not in data[:LINE_BYTES]:
        raise Bad(414, f"the first line is longer than {LINE_BYTES} bytes")


def parse_request(head: bytes, scheme: str = "http") -> Request:
    """The request of a head that ends in an empty line. ``scheme``: by what it came. Raises :class:`Bad`."""
    if len(head) > HEAD_BYTES:
        raise Bad(431, f"the head is longer than {HEAD_BYTES} bytes")
    match = _REQUEST.fullmatch(head.decode("latin-1"))
    if match is None:
        raise _why_not(head)
    method, target, minor, lines = match.groups()
    if len(target) > LINE_BYTES - 64:
        raise Bad(414, f"the first line is longer than {LINE_BYTES} bytes")
    if method not in METHODS:
        raise Bad(501, f"the method {method[:20]} is not served")
    headers, fields = _fields(lines)
    request = Request(method, target, int(minor), headers)
    request.fields, request.scheme = fields, scheme
    read_authority(request)
    _request_body(request)
    _connection(request)
    request.unconditional = not CONDITIONS & fields.keys()
    request.plain = (
        request.unconditional and method == "GET" and request.length == 0 and request.keep and request.minor == 1
        and not OF_CACHES & fields.keys()
    )  # fmt: skip
    return request


def _why_not(head: bytes) -> Bad:
    if re.match(rb"[^\r\n]* HTTP/(?!1\.[01]\r\n)[0-9.]+\r\n", head):
        return Bad(505, "only HTTP/1.1 and HTTP/1.0 are served")
    if re.search(rb"\r\n[ \t]", head):
        return Bad(400, "a header field that goes on in another line (obs-fold)")
    if head.count(b"\n") != head.count(b"\r\n") or head.count(b"\r") != head.count(b"\r\n"):
        return Bad(400, "a line that does not end in CR LF")
    return Bad(400, "a malformed head")


def read_authority(request: Request) -> None:
    hosts = _count(request.headers, "host")
    if hosts > 1:
        raise Bad(400, "more than one Host")
    if hosts == 0 and request.minor == 1:
        raise Bad(400, "HTTP/1.1 without Host")
    authority = request.fields.get("host", "")
    if not request.target.startswith("/"):
        scheme, slashes, rest = request.target.partition("://")
        if not slashes or scheme.lower() != request.scheme:
            raise Bad(400, f"a target that is neither a path nor an {request.scheme} URL")
        named, slash, path = rest.partition("/")
        if authority and named.lower() != authority.lower():
            raise Bad(400, "the target names another host than Host")
        authority, request.target = named, slash + path or "/"
    if authority:
        match = _AUTHORITY.fullmatch(authority)
        if match is None or len(authority) > 255 or (match[2] and not 0 < int(match[2]) < 65536):
            raise Bad(400, "Host is no host")
        request.host = match[1].lower().removesuffix(".")
    elif hosts:
        raise Bad(400, "Host is empty")
    request.authority = authority


def read_length(headers: Headers, fields: dict[str, str], minor: int) -> int | None:
    """The length that the fields declare; None when they declare none."""
    coding, declared = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is not None:
        if declared is not None:
            raise Bad(400, "Transfer-Encoding and Content-Length together")
        if minor == 0:
            raise Bad(400, "Transfer-Encoding in HTTP/1.0")
        if coding.lower() != "chunked" or _count(headers, "transfer-encoding") != 1:
            raise Bad(400, "a Transfer-Encoding other than chunked")
        return CHUNKED
    if declared is None:
        return None
    if _count(headers, "content-length") != 1 or not _NUMBER.fullmatch(declared):
        raise Bad(400, "a Content-Length that is not one number")
    return int(declared)


def _request_body(request: Request) -> None:
    length = read_length(request.headers, request.fields, request.minor)
    request.length = 0 if length is None else length
    expect = request.fields.get("expect")
    if expect is not None:
        if expect.lower() != "100-continue":
            raise Bad(417, "an expectation other than 100-continue")
        request.expect = request.minor == 1 and request.length != 0


def _options(value: str) -> list[str]:
    return [o.strip(" \t").lower() for o in value.split(",")]


def _connection(request: Request) -> None:
    value = request.fields.get("connection", "")
    options = _options(value) if value else []
    for option in options:
        if option not in _NOMINABLE:
            raise Bad(400, f"Connection names {option[:40]!r}, which is not of the connection")
    request.keep = "close" not in options if request.minor else "keep-alive" in options
    if "upgrade" in options:
        upgrade = request.fields.get("upgrade", "").lower()
        if upgrade == "websocket" and request.method == "GET" and request.length == 0 and request.minor == 1:
            request.upgrade = upgrade
        # any other upgrade is an offer (RFC 9110, section 7.8): it is not taken up


def parse_response(head: bytes, method: str) -> Response:
    """The answer to a request of ``method``. Raises :class:`Bad` (502)."""
    match = _RESPONSE.fullmatch(head.decode("latin-1")) if len(head) <= HEAD_BYTES else None
    if match is None:
        raise Bad(502, "a malformed answer")
    minor, status, reason, lines = match.groups()
    try:
        headers, fields = _fields(lines)
        declared = read_length(headers, fields, int(minor))
    except Bad as e:
        raise Bad(502, f"an answer with {e.why}") from None
    response = Response(int(status), reason or "", headers)
    response.fields = fields
    if method == "HEAD" or response.status < 200 or response.status in (204, 304):
        if declared == CHUNKED and response.status < 200:
            raise Bad(502, "an interim answer with a body")
        response.length = 0
    else:
        response.length = UNTIL_CLOSE if declared is None else declared
    options = _options(fields.get("connection", ""))
    response.keep = ("close" not in options if minor == "1" else "keep-alive" in options) and (
        response.length != UNTIL_CLOSE
    )
    return response


def end_to_end(headers: Headers) -> Headers:
    """The fields that go on: without those of the connection and those that ``Connection`` names."""
    dropped = HOP
    for name, value in headers:
        if name == "connection":
            dropped = dropped | frozenset(_options(value))
    return [h for h in headers if h[0] not in dropped]


def is_claim(name: str) -> bool:
    """Whether a field is a client's word about itself, or would be one, or frame the message, for a target that takes
    underscores for hyphens (CGI and what came after it do)."""
    if name in CLAIMS or name.startswith(OURS):
        return True
    plain = name.replace("_", "-") if "_" in name else ""
    return bool(plain) and (
        plain in CLAIMS or plain.startswith(OURS) or plain in HOP or plain in ("host", "content-length", "via")
    )


def write_request(method: str, target: str, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"{n}: {v}\r\n" for n, v in headers]
    return f"{method} {target} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1")


def write_response(status: int, headers: Iterable[tuple[str, str]], reason: str = "") -> bytes:
    lines = [f"{n}: {v}\r\n" for n, v in headers]
    return f"HTTP/1.1 {status} {reason or REASONS.get(status, '')}\r\n{''.join(lines)}\r\n".encode("latin-1")


class Chunks:
    """The chunked coding (RFC 9112, section 7.1), taken apart as it comes; extensions and trailers are dropped."""

    __slots__ = ("_buffer", "_left", "_state", "done")

    def __init__(self) -> None:
        self._buffer = b""
        self._left = 0
        self._state = "size"
        self.done = False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """``(body, rest)``: what is body, and (once :attr:`done`) what stands behind the message. Raises ``Bad``."""
        data = self._buffer + data if self._buffer else data
        self._buffer = b""
        body: list[bytes] = []
        at = 0
        while not self.done:
            if self._state == "data":
                piece = data[at : at + self._left]
                body.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._state = "crlf"
            elif self._state == "crlf":
                if len(data) - at < 2:
                    if data[at : at + 1] not in (b"", b"\r"):
                        raise Bad(400, "a chunk that is longer than it says")
                    self._buffer = data[at:]
                    break
                if data[at : at + 2] != b"\r\n":
                    raise Bad(400, "a chunk that is longer than it says")
                at += 2
                self._state = "size"
            elif self._state == "size":
                end = data.find(b"\n", at, at + 300)
                if end < 0:
                    if len(data) - at >= 300:
                        raise Bad(400, "a malformed chunk size")
                    self._buffer = data[at:]
                    break
                match = _CHUNK.fullmatch(data[at : end - 1]) if data[end - 1 : end] == b"\r" and end > at else None
                if match is None:
                    raise Bad(400, "a malformed chunk size")
                self._left = int(match[1], 16)
                at = end + 1
                self._state = "data" if self._left else "trailer"
            else:
                at = self._trailer(data, at)
                if not self.done:
                    break
        return b"".join(body), data[at:] if self.done else b""

    def _trailer(self, data: bytes, at: int) -> int:
        if data[at : at + 2] == b"\r\n":
            self.done = True
            return at + 2
        end = data.find(b"\r\n\r\n", at)
        if end >= 0 and end - at <= TRAILER_BYTES:
            if not _TRAILERS.fullmatch(data[at : end + 4].decode("latin-1")):
                raise Bad(400, "malformed trailers")
            self.done = True
            return end + 4
        if len(data) - at > TRAILER_BYTES or end >= 0:
            raise Bad(431, "trailers that are too long")
        self._buffer = data[at:]
        return at


REASONS = {
    100: "Continue", 101: "Switching Protocols", 200: "OK", 201: "Created", 202: "Accepted", 204: "No Content",
    206: "Partial Content", 301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified",
    307: "Temporary Redirect", 308: "Permanent Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
    404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 413: "Content Too Large",
    414: "URI Too Long", 416: "Range Not Satisfiable", 417: "Expectation Failed", 421: "Misdirected Request",
    429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
    505: "HTTP Version Not Supported", 508: "Loop Detected",
}  # fmt: skip
