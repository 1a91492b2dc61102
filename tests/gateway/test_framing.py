"""What the gateway takes, another strict reader (h11) takes too, and reads the same in it: nothing can be smuggled."""

from __future__ import annotations

import h11
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.gateway.http1 import CHUNKED, Bad, Request, parse_request, write_request

PIECES = [
    b"GET / HTTP/1.1\r\n", b"POST /a HTTP/1.1\r\n", b"POST / HTTP/1.0\r\n", b"Host: h\r\n", b"Host: a\r\n",
    b"Host:h\r\n",
    b"Content-Length: 5\r\n", b"Content-Length: 5, 5\r\n", b"Content-Length: +5\r\n", b"content-length: 05\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding:\tchunked\r\n",
    b"Transfer-Encoding : chunked\r\n", b"Transfer-Encoding: chunked, gzip\r\n", b"transfer-encoding: CHUNKED\r\n",
    b"X: a\r\n", b" folded\r\n", b"X: a\n", b"X: \x0b\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n",
    b"\r\n", b"\n", b"\r", b"\0", b":", b" ", b"\t", b"X\xff: y\r\n", b"X: \xff\r\n", b"Expect: 100-continue\r\n",
]  # fmt: skip


def taken(head: bytes) -> Request | None:
    try:
        return parse_request(head)
    except Bad:
        return None


def reads(head: bytes) -> tuple[str, str, int, list[tuple[str, str]]]:
    """Method, target, length and fields as h11 reads them."""
    c = h11.Connection(h11.SERVER)
    c.receive_data(head)
    event = c.next_event()
    assert isinstance(event, h11.Request), event
    headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in event.headers]
    names = dict(headers)
    length = CHUNKED if "transfer-encoding" in names else int(names.get("content-length", 0))
    return event.method.decode(), event.target.decode(), length, headers


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), st.booleans())
def test_what_is_taken_has_one_meaning(pieces: list[bytes], ordinary: bool) -> None:
    head = (b"POST / HTTP/1.1\r\nHost: h\r\n" if ordinary else b"") + b"".join(pieces) + b"\r\n"
    end = head.find(b"\r\n\r\n")
    head = head[: end + 4] if end >= 0 else head
    got = taken(head)
    if got is None:
        return
    method, target, length, headers = reads(head)
    assert (got.method, got.target, got.length) == (method, target, length)
    plain = [(n, v.lower() if n == "transfer-encoding" else v) for n, v in got.headers]  # as h11 gives it
    assert plain == [(n, v.strip(" \t")) for n, v in headers]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.binary(max_size=12), st.integers(0, 60), st.integers(0, 6))
def test_damage_is_refused_or_means_the_same_to_both(noise: bytes, at: int, cut: int) -> None:
    whole = b"POST /a HTTP/1.1\r\nHost: h\r\nX: y\r\nContent-Length: 5\r\n\r\n"
    head = whole[:at] + noise + whole[at + cut :]
    end = head.find(b"\r\n\r\n")
    if end < 0:
        return
    got = taken(head[: end + 4])
    if got is not None:
        method, target, length, _ = reads(head[: end + 4])
        assert (got.method, got.target, got.length) == (method, target, length)


VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20)


@given(st.lists(st.tuples(st.sampled_from(["x", "y", "accept"]), VALUES), max_size=5))
def test_what_is_written_is_read_the_same(fields: list[tuple[str, str]]) -> None:
    clean = [("host", "h"), *[(n, v.strip(" \t")) for n, v in fields]]
    head = write_request("GET", "/a?b", clean)
    got = parse_request(head)
    assert (got.method, got.target, got.headers) == ("GET", "/a?b", clean)
