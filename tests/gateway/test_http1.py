"""Heads and chunks: what is taken means one thing only, all else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.gateway.http1 import (
    CHUNKED,
    UNTIL_CLOSE,
    Bad,
    Chunks,
    check_partial,
    end_to_end,
    parse_request,
    parse_response,
)


def head(*lines: str, first: str = "GET / HTTP/1.1", host: str = "h") -> bytes:
    return "\r\n".join([first, *([f"Host: {host}"] if host else []), *lines, "", ""]).encode("latin-1")


def test_a_request() -> None:
    r = parse_request(head("A: 1", "a:\t2 ", "Connection: close", first="POST /x?y=1 HTTP/1.1", host="Example.org:81"))
    assert (r.method, r.target, r.minor, r.host, r.authority) == ("POST", "/x?y=1", 1, "example.org", "Example.org:81")
    assert r.headers == [("host", "Example.org:81"), ("a", "1"), ("a", "2"), ("connection", "close")]
    assert r.fields["a"] == "1, 2"
    assert (r.keep, r.length, r.upgrade) == (False, 0, "")


REFUSED = {
    # two lengths: request smuggling
    "CL and TE": (400, head("Content-Length: 4", "Transfer-Encoding: chunked", first="POST / HTTP/1.1")),
    "two CL": (400, head("Content-Length: 4", "Content-Length: 5", first="POST / HTTP/1.1")),
    "two CL alike": (400, head("Content-Length: 4", "Content-Length: 4", first="POST / HTTP/1.1")),
    "CL list": (400, head("Content-Length: 4, 4", first="POST / HTTP/1.1")),
    "CL signed": (400, head("Content-Length: +4", first="POST / HTTP/1.1")),
    "CL negative": (400, head("Content-Length: -4", first="POST / HTTP/1.1")),
    "CL hex": (400, head("Content-Length: 0x4", first="POST / HTTP/1.1")),
    "CL with a blank inside": (400, head("Content-Length: 4 4", first="POST / HTTP/1.1")),
    "CL empty": (400, head("Content-Length:", first="POST / HTTP/1.1")),
    "CL underscore": (400, head("Content-Length: 1_0", first="POST / HTTP/1.1")),
    "CL other digits": (400, head("Content-Length: \xb2", first="POST / HTTP/1.1")),
    "CL endless": (400, head("Content-Length: " + "9" * 19, first="POST / HTTP/1.1")),
    "TE twice": (400, head("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", first="POST / HTTP/1.1")),
    "TE identity": (400, head("Transfer-Encoding: identity", first="POST / HTTP/1.1")),
    "TE list": (400, head("Transfer-Encoding: gzip, chunked", first="POST / HTTP/1.1")),
    "TE obscured": (400, head("Transfer-Encoding: xchunked", first="POST / HTTP/1.1")),
    "TE with vertical tab": (400, head("Transfer-Encoding: \x0bchunked", first="POST / HTTP/1.1")),
    "TE quoted": (400, head('Transfer-Encoding: "chunked"', first="POST / HTTP/1.1")),
    "TE in 1.0": (400, head("Transfer-Encoding: chunked", first="POST / HTTP/1.0")),
    "blank before colon": (400, head("Transfer-Encoding : chunked", first="POST / HTTP/1.1")),
    "obs-fold": (400, head("X: a", " b")),
    "obs-fold with tab": (400, head("X: a", "\tb")),
    "obs-fold at once": (400, b"GET / HTTP/1.1\r\n Host: h\r\n\r\n"),
    "NUL in a value": (400, head("X: a\0b")),
    "bare CR in a value": (400, head("X: a\rY: b")),
    "bare LF in a value": (400, head("X: a\nTransfer-Encoding: chunked")),
    "no colon": (400, head("X")),
    "empty name": (400, head(": x")),
    "name with a blank": (400, head("A B: x")),
    "name beyond ASCII": (400, head("\xe9: x")),
    # hosts
    "no Host": (400, head(host="")),
    "two Hosts": (400, head("Host: other")),
    "empty Host": (400, b"GET / HTTP/1.1\r\nHost: \r\n\r\n"),
    "Host with a path": (400, head(host="h/x")),
    "Host with a user": (400, head(host="a@h")),
    "Host list": (400, head(host="a, b")),
    "Host with a bad port": (400, head(host="h:99999")),
    "Host with port zero": (400, head(host="h:0")),
    "Host with a blank": (400, head(host="h x")),
    "absolute target of another host": (400, head(first="GET http://other/ HTTP/1.1")),
    "target of another scheme": (400, head(first="GET ftp://h/ HTTP/1.1")),
    "target *": (400, head(first="OPTIONS * HTTP/1.1")),
    # lines
    "lower case method": (501, head(first="get / HTTP/1.1")),
    "CONNECT": (501, head(first="CONNECT h:1 HTTP/1.1")),
    "TRACE": (501, head(first="TRACE / HTTP/1.1")),
    "two blanks": (400, head(first="GET  / HTTP/1.1")),
    "blank in the target": (400, head(first="GET /a b HTTP/1.1")),
    "tab in the target": (400, head(first="GET /a\tb HTTP/1.1")),
    "target beyond ASCII": (400, head(first="GET /\xe9 HTTP/1.1")),
    "HTTP/0.9": (400, b"GET /\r\n\r\n"),
    "HTTP/2.0": (505, head(first="GET / HTTP/2.0")),
    "HTTP/1.2": (505, head(first="GET / HTTP/1.2")),
    "the preface of HTTP/2": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[:18]),
    "long target": (414, head(first="GET /" + "a" * 9000 + " HTTP/1.1")),
    "many fields": (431, head(*[f"X{n}: 1" for n in range(101)])),
    "long head": (431, head("X: " + "a" * 40000)),
    # what is of the connection only
    "nominates an end-to-end field": (400, head("Connection: close, X-Forwarded-For")),
    "nominates Host": (400, head("Connection: host")),
    "nominates Content-Length": (400, head("Connection: content-length")),
    "nominates Authorization": (400, head("Connection: keep-alive, Authorization")),
    "other expectation": (417, head("Expect: 200-ok")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    status, data = REFUSED[name]
    with pytest.raises(Bad) as e:
        parse_request(data)
    assert e.value.status == status, e.value.why


def test_what_is_allowed_though_rare() -> None:
    assert parse_request(head(first="GET http://h/a HTTP/1.1")).target == "/a"
    assert parse_request(head(first="GET http://H HTTP/1.1")).target == "/"
    assert parse_request(head(first="GET / HTTP/1.0", host="")).keep is False
    assert parse_request(head("Connection: keep-alive", first="GET / HTTP/1.0")).keep is True
    assert parse_request(head("Transfer-Encoding: Chunked", first="POST / HTTP/1.1")).length == CHUNKED
    assert parse_request(head("Expect: 100-continue", "Content-Length: 1", first="PUT / HTTP/1.1")).expect
    assert parse_request(head(host="[::1]:80")).host == "[::1]"
    assert parse_request(head(host="example.org.")).host == "example.org"


def test_only_a_websocket_is_an_upgrade() -> None:
    up = ("Connection: keep-alive, Upgrade", "Upgrade: WebSocket")
    assert parse_request(head(*up)).upgrade == "websocket"
    assert parse_request(head("Connection: upgrade, http2-settings", "Upgrade: h2c", "HTTP2-Settings: x")).upgrade == ""
    assert parse_request(head(*up, "Content-Length: 3", first="POST / HTTP/1.1")).upgrade == ""
    assert parse_request(head("Upgrade: websocket")).upgrade == ""


def test_a_head_that_cannot_become_one_is_not_waited_for() -> None:
    check_partial(b"GET / HTTP/1.1\r\nHost: h\r\nX-")
    for data, status in (
        (b"GET / HTTP/1.1\nHost: h\n\n", 400),
        (b"A" * 9000, 414),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 9000, 431),
    ):
        with pytest.raises(Bad) as e:
            check_partial(data)
        assert e.value.status == status


def test_hop_by_hop_fields_do_not_go_on() -> None:
    kept = end_to_end(
        [("connection", "te, upgrade"), ("te", "trailers"), ("keep-alive", "1"), ("upgrade", "x"),
         ("proxy-connection", "y"),
         ("proxy-authorization", "z"), ("transfer-encoding", "chunked"), ("trailer", "t"), ("x", "1")]
    )  # fmt: skip
    assert kept == [("x", "1")]
    # an answer may nominate: what its server calls of this connection ends here
    assert end_to_end([("connection", "x-private"), ("x-private", "1"), ("y", "2")]) == [("y", "2")]


def test_answers() -> None:
    def answer(*lines: str, status: str = "200 OK", method: str = "GET") -> tuple[int, bool]:
        r = parse_response("\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1"), method)
        return r.length, r.keep

    assert answer("Content-Length: 5") == (5, True)
    assert answer("Content-Length: 5", method="HEAD") == (0, True)
    assert answer("Content-Length: 5", status="304 Not Modified") == (0, True)
    assert answer("Transfer-Encoding: chunked") == (CHUNKED, True)
    assert answer("Content-Length: 5", "Connection: close") == (5, False)
    assert answer() == (UNTIL_CLOSE, False)
    assert answer("Content-Length: 0", status="200") == (0, True)
    for bad in (
        ("Content-Length: 5", "Transfer-Encoding: chunked"), ("Content-Length: 5", "Content-Length: 6"),
        ("Transfer-Encoding: gzip",), ("X: a", " b"), ("X : a",), ("X: a\rb",),
    ):  # fmt: skip
        with pytest.raises(Bad) as e:
            answer(*bad)
        assert e.value.status == 502


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), max_size=5), st.data())
def test_chunks_come_apart_in_any_pieces(body: list[bytes], data: st.DataObject) -> None:
    coded = b"".join(b"%X;a=b\r\n%b\r\n" % (len(c), c) for c in body) + b"0\r\nX-T: 1\r\n\r\n" + b"NEXT"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(coded)), max_size=20)))
    chunks = Chunks()
    got, rest = b"", b""
    for a, b in zip([0, *cuts], [*cuts, len(coded)], strict=True):
        if chunks.done:
            rest += coded[a:b]
            continue
        piece, rest = chunks.feed(coded[a:b])
        got += piece
    assert chunks.done
    assert (got, rest) == (b"".join(body), b"NEXT")


@pytest.mark.parametrize(
    "coded",
    [b"5\nhello\r\n0\r\n\r\n", b"5\r\nhelloX\r\n", b"-5\r\nhello", b"+5\r\nhello", b"0x5\r\nhello", b" 5\r\nhello",
     b"5 \r\nhello\r\nZ\r\n", b"\r\n", b"FFFFFFFFF\r\n", b"5;a=\x01\r\nhello", b"5;" + b"a" * 400 + b"\r\nhello",
     b"5;a\nb\r\nhello", b"0\r\nbad trailer\r\n\r\n", b"0\r\nX: a\r\n b\r\n\r\n",
      b"0\r\n" + b"X: a\r\n" * 2000 + b"\r\n",
     b"5\r\nhello\n0\r\n\r\n"],
)  # fmt: skip
def test_malformed_chunks(coded: bytes) -> None:
    with pytest.raises(Bad):
        Chunks().feed(coded)
    chunks = Chunks()
    with pytest.raises(Bad):
        for n in range(len(coded)):
            chunks.feed(coded[n : n + 1])


def test_a_url_as_target_is_of_the_scheme_that_brought_it() -> None:
    head = b"GET https://h/a HTTP/1.1\r\nHost: h\r\n\r\n"
    assert (parse_request(head, "https").target, parse_request(head, "https").scheme) == ("/a", "https")
    with pytest.raises(Bad):
        parse_request(head)
    with pytest.raises(Bad):
        parse_request(head.replace(b"https:", b"http:"), "https")
