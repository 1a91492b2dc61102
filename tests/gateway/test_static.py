"""Names, conditions and ranges of files. Pure."""

from __future__ import annotations

import email
from typing import Any

import pytest

from edgeward.gateway.cache import http_date
from edgeward.gateway.coding import best, compressible
from edgeward.gateway.http1 import Bad, Request, parse_request
from edgeward.gateway.match import clean
from edgeward.gateway.static import Facts, Plan, failed, name_of, plan, ranges, type_of

AT = 1_700_000_000.5
FACTS = Facts(1000, '"abc"', AT, "text/plain")


def asked(*headers: str, method: str = "GET") -> Request:
    lines = "".join(f"{h}\r\n" for h in headers)
    return parse_request(f"{method} / HTTP/1.1\r\nHost: h\r\n{lines}\r\n".encode())


def made(*headers: str, facts: Facts = FACTS, method: str = "GET") -> Plan:
    return plan(asked(*headers, method=method), facts, "", "BOUNDARY")


@pytest.mark.parametrize(
    ("prefix", "path", "name"),
    [
        ("/s/", "/s/", ""), ("/s/", "/s/a/b.css", "a/b.css"), ("/s/", "/s/a/", "a/"), ("/", "/x", "x"),
        ("/logo.png", "/logo.png", "logo.png"), ("/s/", "/s/a%20b", "a b"), ("/s/", "/s/%C3%A9", "é"),
        ("/s/", "/s/.well-known/x", ".well-known/x"), ("/s/", "/s/a..b", "a..b"),
        ("/s/", "/s/.git/config", None), ("/s/", "/s/a/.env", None), ("/s/", "/s/%FF", None),
        ("/s/", "/s/..%20/x", None),
    ],
    ids=range(13),
)  # fmt: skip
def test_names(prefix: str, path: str, name: str | None) -> None:
    assert name_of(prefix, clean(path)[0]) == name


@pytest.mark.parametrize(
    "path",
    ["/s/../x", "/s/%2e%2e/x", "/s/..%2fx", "/s/..\\x", "/s/%5c..", "/s/a%00b", "/s/%252e%252e/", "/s//etc/passwd",
     "/s/.%2e/x", "/s/..;/x"],
    ids=range(10),
)  # fmt: skip
def test_tricks_do_not_get_as_far_as_a_name(path: str) -> None:
    with pytest.raises(Bad):
        clean(path)


def test_types() -> None:
    assert type_of("a/B.HTML") == "text/html; charset=utf-8"
    assert type_of("x.unknown") == type_of("x") == "application/octet-stream"
    assert type_of("x.svg") == "image/svg+xml"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("bytes=0-0", [(0, 1)]), ("bytes=990-", [(990, 1000)]), ("bytes=-10", [(990, 1000)]),
        ("bytes=-5000", [(0, 1000)]),
        ("bytes=0-1,5-6", [(0, 2), (5, 7)]), ("bytes= 1 - 2 , -1", [(1, 3), (999, 1000)]), ("BYTES=1-1", [(1, 2)]),
        ("bytes=999-2000", [(999, 1000)]), ("bytes=0-1,2000-", [(0, 2)]),
        ("bytes=1000-", "unsatisfiable"), ("bytes=-0", "unsatisfiable"), ("bytes=2000-,3000-", "unsatisfiable"),
        ("bytes=5-1", None), ("bytes=", None), ("bytes=-", None), ("bytes=a-b", None), ("items=0-1", None),
        ("0-1", None),
        ("bytes=0-999,0-0", None), ("bytes=" + ",".join(["0-0"] * 17), None), ("bytes=1-2,,", None),
        ("bytes=" + "9" * 30 + "-", None), ("bytes=--1", None),
    ],
    ids=range(23),
)  # fmt: skip
def test_ranges(value: str, found: Any) -> None:
    assert ranges(value, 1000) == found


def test_conditions() -> None:
    date = http_date(int(AT))
    before, after = http_date(AT - 10), http_date(AT + 10)
    assert failed(asked(), FACTS) == 0
    for header, answer in [
        ('If-None-Match: "abc"', 304), ('If-None-Match: W/"abc"', 304), ('If-None-Match: "x", "abc"', 304),
        ("If-None-Match: *", 304), ('If-None-Match: "x"', 0), ('If-Match: "abc"', 0), ('If-Match: W/"abc"', 412),
        ('If-Match: "x"', 412), ("If-Match: *", 0), (f"If-Modified-Since: {date}", 304),
        (f"If-Modified-Since: {before}", 0), ("If-Modified-Since: yesterday", 0), (f"If-Unmodified-Since: {date}", 0),
        (f"If-Unmodified-Since: {before}", 412), (f"If-Unmodified-Since: {after}", 0),
    ]:  # fmt: skip
        assert failed(asked(header), FACTS) == answer, header
    # the first of two counts (RFC 9110, section 13.2.2)
    assert failed(asked('If-None-Match: "x"', f"If-Modified-Since: {date}"), FACTS) == 0
    assert failed(asked('If-Match: "abc"', f"If-Unmodified-Since: {before}"), FACTS) == 0
    # of a file whose time is not known nothing follows from a time
    assert failed(asked(f"If-Modified-Since: {after}"), FACTS._replace(modified=0.0)) == 0
    assert dict(made('If-None-Match: "abc"').headers).keys() == {"etag", "last-modified"}


def test_whole_and_parts() -> None:
    whole = made()
    assert (whole.status, whole.parts, dict(whole.headers)["content-length"]) == (200, [(b"", 0, 1000)], "1000")
    part = made("Range: bytes=1-9")
    assert (part.status, part.parts) == (206, [(b"", 1, 10)])
    assert ("content-range", "bytes 1-9/1000") in part.headers
    none = made("Range: bytes=1000-")
    assert (none.status, dict(none.headers)["content-range"]) == (416, "bytes */1000")
    assert made("Range: bytes=1-9", method="HEAD").status == 200
    for condition, status in [
        ('"abc"', 206), ('"x"', 200), ('W/"abc"', 200), (http_date(int(AT)), 206), (http_date(AT - 9), 200),
        ("junk", 200),
    ]:  # fmt: skip
        assert made("Range: bytes=1-9", f"If-Range: {condition}").status == status, condition


def test_several_parts_are_one_message() -> None:
    data = bytes(range(250)) * 4
    several = made("Range: bytes=0-3,10-12,-2")
    headers = dict(several.headers)
    body = b"".join(before + data[start:end] for before, start, end in several.parts) + several.tail
    assert int(headers["content-length"]) == several.length == len(body)
    message = email.message_from_bytes(f"Content-Type: {headers['content-type']}\r\n\r\n".encode() + body)
    parts = message.get_payload()
    assert isinstance(parts, list)
    assert [(p["content-range"], p.get_payload(decode=True)) for p in parts] == [
        ("bytes 0-3/1000", data[:4]), ("bytes 10-12/1000", data[10:13]), ("bytes 998-999/1000", data[-2:]),
    ]  # fmt: skip
    assert [n for n, _ in several.headers].count("content-type") == 1


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        (None, ""), ("", ""), ("gzip", "gzip"), ("gzip, br", "br"), ("br;q=0.1, gzip", "gzip"), ("gzip;q=0", ""),
        ("*", "br"), ("*;q=0", ""), ("br;q=0, *", "gzip"), ("identity", ""), ("gzip;q=0.5, identity", ""),
        ("GZIP", "gzip"), ("gzip;q=x", ""), ("gzip;q=2", ""), ("x-gzip", ""), (", ,;q=1", ""), ("gzip," * 1000, ""),
    ],
    ids=range(17),
)  # fmt: skip
def test_what_a_client_takes(accept: str | None, coding: str) -> None:
    assert best(accept, ("br", "gzip")) == coding


def test_what_shrinks() -> None:
    assert all(
        map(compressible, ("text/html; charset=utf-8", "Application/JSON", "image/svg+xml", "application/x+json"))
    )
    assert not any(map(compressible, ("image/png", "video/mp4", "application/octet-stream", "", "application/gzip")))
