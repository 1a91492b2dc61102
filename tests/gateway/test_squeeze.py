"""Compression: what is given smaller, what never is, and that it is always the same text."""

from __future__ import annotations

import asyncio
import gzip
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.gateway.rig import PATIENCE, Client, Rig, plain

from edgeward.core.invocation import Call, Reply
from edgeward.gateway import gate as gates
from edgeward.gateway.http1 import parse_request
from edgeward.gateway.rules import CacheConfig
from edgeward.gateway.squeeze import LIVE, Budget, CompressConfig, Press, eligible, press, pressed, takes, with_vary
from edgeward.gateway.static import StaticConfig

Connect = Callable[[], Client]
TEXT = b"<p>the same again and again</p>\n" * 200
CONFIG = CompressConfig()
GZIP = "Accept-Encoding: gzip"


def test_which() -> None:
    html = {"content-type": "text/html"}
    assert eligible(CONFIG, 200, html, 1024)
    assert eligible(CONFIG, 404, html, -1)
    assert eligible(CompressConfig(types=("x/y",)), 200, {"content-type": "X/Y; a=b"}, -2)
    for status, fields, length in [
        (200, html, 1023), (206, html, 5000), (204, html, 5000), (304, html, -1), (101, html, -1),
        (200, {}, 5000), (200, {"content-type": "image/png"}, 5000), (200, {**html, "content-encoding": "br"}, 5000),
        (200, {**html, "cache-control": "max-age=1, no-transform"}, 5000), (200, {**html, "content-digest": "x"}, 5000),
    ]:  # fmt: skip
        assert not eligible(CONFIG, status, fields, length), (status, fields, length)


def test_who() -> None:
    def request(*lines: str) -> Any:
        return parse_request(("GET / HTTP/1.1\r\nHost: h\r\n" + "".join(f"{x}\r\n" for x in lines) + "\r\n").encode())

    assert takes(request("Accept-Encoding: br, gzip;q=0.5"))
    assert takes(request("Accept-Encoding: *"))
    for lines in ([], ["Accept-Encoding: gzip;q=0"], ["Accept-Encoding: br"], [GZIP, "Range: bytes=0-1"]):
        assert not takes(request(*lines))


def test_the_fields_of_another_representation() -> None:
    given = [("etag", '"a"'), ("accept-ranges", "bytes"), ("content-length", "9"), ("vary", "Origin"), ("x", "y")]
    assert pressed(given) == [
        ("content-encoding", "gzip"), ("etag", 'W/"a"'), ("vary", "Origin"), ("x", "y"), ("vary", "accept-encoding")
    ]  # fmt: skip
    assert with_vary([("vary", "a, Accept-Encoding")]) == [("vary", "a, Accept-Encoding")]
    assert with_vary([("vary", "*")]) == [("vary", "*")]
    assert pressed([("etag", 'W/"a"')])[1] == ("etag", 'W/"a"')


@pytest.mark.parametrize("flush", [False, True])
def test_pieces_make_the_whole(flush: bool) -> None:
    made, reader, out = Press(flush=flush), zlib.decompressobj(31), b""
    for at in range(0, len(TEXT), 100):
        piece = reader.decompress(made.feed(TEXT[at : at + 100]))
        out += piece
        assert not flush or piece == TEXT[at : at + 100]  # nothing is held back
    assert out + reader.decompress(made.end()) == TEXT
    assert gzip.decompress(press(TEXT)) == TEXT


def test_a_processor_is_not_for_compression_alone() -> None:
    budget = Budget(share=0.5, burst=1.0)
    assert budget.may(100.0)
    budget.spent(1.5)
    assert not budget.may(100.0)
    assert not budget.may(100.9)
    assert budget.may(101.1)
    budget.live = LIVE
    assert not budget.may(200.0)
    assert budget.refused == 3


# -- at work ----------------------------------------------------------------------------------------------------------


def test_answers_of_a_target(rig: Rig, client: Connect) -> None:
    html = ("Content-Type: text/html", 'ETag: "v1"', "Accept-Ranges: bytes")
    rig.route("/text", rig.target(plain(TEXT, *html)).port, compress=CONFIG)
    rig.route("/small", rig.target(plain(b"x", *html)).port, compress=CONFIG)
    rig.route("/png", rig.target(plain(TEXT, "Content-Type: image/png")).port, compress=CONFIG)
    rig.route("/no", rig.target(plain(TEXT, *html, "Cache-Control: no-transform")).port, compress=CONFIG)
    c = client()
    got = c.get("/text", GZIP)
    assert gzip.decompress(got.body) == TEXT
    assert len(got.body) < len(TEXT) // 5
    assert {k: got.headers.get(k) for k in ("content-encoding", "etag", "vary", "accept-ranges", "content-length")} == {
        "content-encoding": "gzip", "etag": 'W/"v1"', "vary": "accept-encoding", "accept-ranges": None,
        "content-length": None,
    }  # fmt: skip
    as_is = c.get("/text")
    assert (as_is.body, as_is.headers["vary"], as_is.headers["etag"]) == (TEXT, "accept-encoding", '"v1"')
    head = c.get("/text", GZIP, method="HEAD")
    assert (head.status, head.headers["vary"], "content-encoding" in head.headers) == (200, "accept-encoding", False)
    for path in ("/small", "/png", "/no"):
        got = c.get(path, GZIP)
        assert ("content-encoding" in got.headers, "vary" in got.headers) == (False, False), path
    old = client().send(b"GET /text HTTP/1.0\r\nHost: h\r\nAccept-Encoding: gzip\r\n\r\n").answer()
    assert gzip.decompress(old.body) == TEXT
    assert rig.gate.presses.live == 0


def test_events_are_not_held_back(rig: Rig, client: Connect) -> None:
    async def function(call: Call) -> Reply:
        said: asyncio.Event = asyncio.Event()
        heard.append(said)

        async def chunks() -> AsyncIterator[bytes]:
            yield b"data: one\n\n"
            await asyncio.wait_for(said.wait(), PATIENCE)
            yield b"data: two\n\n"

        return Reply(200, [("content-type", "text/event-stream")], chunks=chunks())

    heard: list[asyncio.Event] = []
    rig.functions.known["default/f"] = function
    rig.route("/", to="function", function="default/f", compress=CONFIG)
    c = client().send(b"GET / HTTP/1.1\r\nHost: h\r\nAccept-Encoding: gzip\r\n\r\n")
    assert b"content-encoding: gzip" in c.until(b"\r\n\r\n")
    reader = zlib.decompressobj(31)

    def piece() -> bytes:
        size = int(c.until(b"\r\n"), 16)
        data = c.exactly(size)
        c.exactly(2)
        return reader.decompress(data)

    assert piece() == b"data: one\n\n"  # before there is a second
    rig.call(heard[0].set)
    assert piece() == b"data: two\n\n"


@pytest.mark.parametrize("size", [3000, 40_000], ids=["at once", "in a thread"])
def test_what_is_kept_is_compressed_once(rig: Rig, client: Connect, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    made: list[int] = []

    def counted(body: bytes) -> bytes:
        made.append(len(body))
        return press(body)

    monkeypatch.setattr(gates, "press", counted)
    text = (TEXT * 10)[:size]
    target = rig.target(plain(text, "Content-Type: text/html", "Cache-Control: max-age=600", 'ETag: "v1"'))
    rig.route("/", target.port, cache=CacheConfig(), compress=CONFIG)
    c = client()
    first = c.get("/a", GZIP)
    assert gzip.decompress(first.body) == text
    bodies = set()
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:  # until the thread has it
        got = c.get("/a", GZIP)
        assert got.headers["cache-status"].startswith("edgeward; hit")
        assert got.headers["vary"] == "accept-encoding"
        if "content-encoding" in got.headers:
            bodies.add(got.body)
            if len(bodies) and rig.call(lambda: not rig.gate._zipping):
                break
        else:
            assert got.body == text
    (body,) = bodies
    assert gzip.decompress(body) == text
    assert made == [size]
    as_is = c.get("/a")
    assert (as_is.body, as_is.headers["etag"]) == (text, '"v1"')
    assert c.get("/a", GZIP, 'If-None-Match: "v1"').status == 304
    assert c.get("/a", GZIP, "Range: bytes=0-3").body == text[:4]
    assert c.get("/a", GZIP, method="HEAD").headers["content-length"] == str(len(body))
    assert len(target.heads) == 1
    # its bytes count
    shelf = rig.gate.shelf
    assert shelf.used == sum(s.size for variants in shelf._items.values() for s in variants)
    assert rig.call(lambda: shelf.purge(prefix="/")) == 1
    assert shelf.used == 0


def test_a_validated_answer_stays_compressed(rig: Rig, client: Connect) -> None:
    async def script(target: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await target.request(reader)
            fields = b'Content-Type: text/html\r\nCache-Control: max-age=0\r\nETag: "v1"\r\n'
            if b'if-none-match: "v1"\r\n' in head:
                writer.write(b"HTTP/1.1 304 Not Modified\r\n" + fields + b"\r\n")
            else:
                writer.write(b"HTTP/1.1 200 OK\r\n" + fields + b"Content-Length: %d\r\n\r\n" % len(TEXT) + TEXT)

    target = rig.target(script)
    rig.route("/", target.port, cache=CacheConfig(), compress=CONFIG)
    c = client()
    for n in range(4):
        got = c.get("/a", GZIP)
        assert gzip.decompress(got.body) == TEXT
        assert c.get("/a").body == TEXT
        assert "fwd-status=304" in got.headers["cache-status"] or not n
    assert all(b'if-none-match: "v1"\r\n' in h for h in target.heads[1:])


def test_files(rig: Rig, client: Connect, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.mktemp("site")
    big = TEXT * 100
    (folder / "page.html").write_bytes(TEXT)
    (folder / "big.json").write_bytes(big)
    (folder / "x.png").write_bytes(TEXT)
    rig.route("/s/", to="static", static=StaticConfig(folder=str(folder)), compress=CONFIG)
    rig.route("/c/", to="static", static=StaticConfig(files={"page.html": TEXT.decode()}), compress=CONFIG)
    c = client()
    for path, text in (("/s/page.html", TEXT), ("/s/big.json", big), ("/c/page.html", TEXT)):
        for _ in range(3):
            got = c.get(path, GZIP)
            assert gzip.decompress(got.body) == text
            assert (got.headers["vary"], got.headers["etag"][:3]) == ("accept-encoding", 'W/"')
            assert c.get(path, GZIP, f"If-None-Match: {got.headers['etag']}").status == 304
            as_is = c.get(path)
            assert (as_is.body == text, as_is.headers["vary"]) == (True, "accept-encoding")
            assert c.get(path, GZIP, "Range: bytes=0-4").body == text[:5]
    assert "content-encoding" not in c.get("/s/x.png", GZIP).headers
    old = client().send(b"GET /s/big.json HTTP/1.0\r\nHost: h\r\nAccept-Encoding: gzip\r\n\r\n").answer()
    assert gzip.decompress(old.body) == big
