"""Requests of HTTP/2 become requests of HTTP/1.1, or are refused: whatever could be read there in another way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.gateway.http1 import CHUNKED, FIELDS, Bad, parse_request, write_request
from edgeward.gateway.http2 import Patience, fields_of, request_of

Raw = list[tuple[bytes, bytes]]
GET: Raw = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"h:8443"), (b":path", b"/a?b=1")]


def with_(*more: tuple[bytes, bytes], **pseudo: bytes | None) -> Raw:
    """The plain request with pseudo-header fields changed (None: left out) and others behind."""
    head = [(n, pseudo.get(n[1:].decode(), v)) for n, v in GET]
    return [(n, v) for n, v in head if v is not None] + list(more)


def test_a_request() -> None:
    r = request_of(with_((b"accept", b"*/*"), (b"accept", b"text/html"), (b"te", b"trailers")), True, "https")
    assert (r.method, r.target, r.host, r.authority, r.length, r.minor) == ("GET", "/a?b=1", "h", "h:8443", 0, 2)
    assert (r.keep, r.plain, r.scheme) == (True, True, "https")
    assert r.fields == {"host": "h:8443", "accept": "*/*, text/html", "te": "trailers"}
    assert request_of(with_((b"content-length", b"5"), method=b"POST"), False, "https").length == 5
    assert request_of(with_(method=b"POST"), False, "https").length == CHUNKED
    assert not request_of(with_((b"range", b"bytes=0-1")), True, "https").plain
    assert request_of(with_((b"expect", b"100-continue"), method=b"PUT"), False, "https").expect
    # the crumbs of a cookie are one field (RFC 9113, section 8.2.3)
    assert request_of(with_((b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2")), True, "https").headers == [
        ("host", "h:8443"), ("x", "y"), ("cookie", "a=1; b=2"),
    ]  # fmt: skip
    assert request_of(with_((b"host", b"h:8443"), authority=None), True, "https").host == "h"
    assert request_of(with_((b"host", b"H:8443")), True, "https").host == "h"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (with_((b"connection", b"close")), 400),
        (with_((b"transfer-encoding", b"chunked"), method=b"POST"), 400),
        (with_((b"upgrade", b"websocket")), 400),
        (with_((b"keep-alive", b"1")), 400),
        (with_((b"proxy-connection", b"close")), 400),
        (with_((b"http2-settings", b"AAA")), 400),
        (with_((b"te", b"gzip")), 400),
        (with_((b"x", b"a\r\nhost: evil")), 400),
        (with_((b"x", b"a\nb")), 400),
        (with_((b"x", b"a\0b")), 400),
        (with_((b"x", b" a")), 400),
        (with_((b"x", b"a ")), 400),
        (with_((b"x y", b"a")), 400),
        (with_((b"x:y", b"a")), 400),
        (with_((b"x\r\ny", b"a")), 400),
        (with_((b"X-Upper", b"a")), 400),
        (with_((b"", b"a")), 400),
        (with_((b":path", b"/other")), 400),
        (with_((b":authority", b"evil")), 400),
        (with_((b":protocol", b"websocket")), 400),
        ([(b"x", b"y"), *GET], 400),
        (with_((b"host", b"evil")), 400),
        (with_((b"host", b"h:8443"), (b"host", b"h:8443")), 400),
        (with_(authority=None), 400),
        (with_(authority=b""), 400),
        (with_(authority=b"user@h"), 400),
        (with_(authority=b"h/x"), 400),
        (with_(authority=b"h\r\nx: y"), 400),
        (with_(scheme=b"http"), 400),
        (with_(scheme=None), 400),
        (with_(path=None), 400),
        (with_(path=b""), 400),
        (with_(path=b"*"), 400),
        (with_(path=b"a"), 400),
        (with_(path=b"https://h/a"), 400),
        (with_(path=b"/a HTTP/1.1\r\nx: y"), 400),
        (with_(path=b"/a b"), 400),
        (with_(path=b"/\xff"), 400),
        (with_(path=b"/" + b"a" * 9000), 414),
        (with_(method=None), 400),
        (with_(method=b"GET /x HTTP/1.1\r\n"), 400),
        (with_(method=b"CONNECT"), 501),
        (with_(method=b"BREW"), 501),
        (with_((b"content-length", b"5"), (b"content-length", b"5"), method=b"POST"), 400),
        (with_((b"content-length", b"+5"), method=b"POST"), 400),
        (with_((b"content-length", b"5, 5"), method=b"POST"), 400),
        (with_((b"expect", b"miracles")), 417),
        (with_(*[(b"x%d" % n, b"y") for n in range(FIELDS + 1)]), 431),
        (with_((b"x", b"y" * 40_000)), 431),
    ],
    ids=str,
)
def test_what_is_refused(raw: Raw, status: int) -> None:
    with pytest.raises(Bad) as e:
        request_of(raw, False, "https")
    assert e.value.status == status


def test_a_length_without_a_body_is_a_lie() -> None:
    with pytest.raises(Bad):
        request_of(with_((b"content-length", b"5")), True, "https")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=12), st.binary(max_size=12)), max_size=4), st.booleans())
def test_whatever_is_taken_means_the_same_in_http_1(more: Raw, ended: bool) -> None:
    """What goes on is read by the strict parser of HTTP/1.1 as the very same request."""
    try:
        r = request_of(with_(*more), ended, "https")
    except Bad:
        return
    again = parse_request(write_request(r.method, r.target, r.headers), "https")
    assert (again.method, again.target, again.host, again.headers) == (r.method, r.target, r.host, r.headers)


def test_an_answers_fields() -> None:
    fields = [
        ("content-type", "text/plain"),
        ("connection", "close"),
        ("keep-alive", "x"),
        ("transfer-encoding", "chunked"),
    ]
    assert fields_of(200, fields) == [(b":status", b"200"), (b"content-type", b"text/plain")]


def test_patience_ends_and_comes_back() -> None:
    p = Patience(0.0)
    assert all(p.spend(Patience.COSTS, 0.0) for _ in range(int(Patience.MOST)))
    assert not p.spend(Patience.COSTS, 0.0)
    assert p.spend(Patience.COSTS, 1.0)  # by time
    for _ in range(10_000):
        p.earn()  # by what is sent
    assert all(p.spend(Patience.COSTS, 1.0) for _ in range(int(Patience.MOST)))
    assert not Patience(0.0).spend(Patience.MOST + 1, 5.0)
