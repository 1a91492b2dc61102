"""HTTP/2 through a gateway to real servers: streams beside one another, windows both ways, and abuse."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import hpack
import httpx
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from tests.gateway.papers import Authority, certificate, listener
from tests.gateway.rig import PATIENCE, Pour, Rig, Target, echo, free_port, plain

from edgeward.core.invocation import Call, Reply
from edgeward.gateway.rules import CacheConfig

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CALM, PROTOCOL = 11, 1


class Answer:
    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.ended = False
        self.reset: int | None = None


class H2Client:
    """The library's own client over a socket; ``acknowledge``: windows are given back as data comes."""

    def __init__(self, sock: socket.socket, acknowledge: bool = True, window: int | None = None) -> None:
        self.sock = sock
        self.acknowledge = acknowledge
        config = h2.config.H2Configuration(
            header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        if window is not None:
            self.h2.increment_flow_control_window(window)
        self.answers: dict[int, Answer] = {}
        self.goaway: int | None = None
        self.closed = False
        self.flush()

    def flush(self) -> None:
        self.sock.sendall(self.h2.data_to_send())

    def ask(self, path: str, *more: tuple[str, str], method: str = "GET", body: bytes | None = None, end: bool = True,
            authority: str = "a.example.org") -> int:  # fmt: skip
        n: int = self.h2.get_next_available_stream_id()
        head = [(":method", method), (":scheme", "https"), (":authority", authority), (":path", path), *more]
        self.answers[n] = Answer()
        self.h2.send_headers(n, head, end_stream=body is None and end)
        if body is not None:
            self.upload(n, body, end)
        self.flush()
        return n

    def upload(self, n: int, body: bytes, end: bool = True) -> None:
        at = 0
        while at < len(body):
            room = min(self.h2.local_flow_control_window(n), self.h2.max_outbound_frame_size, len(body) - at)
            if room > 0:
                self.h2.send_data(n, body[at : at + room])
                at += room
                self.flush()
            else:
                self.step()
        if end:
            self.h2.end_stream(n)
            self.flush()

    def step(self) -> bool:
        """Reads once; False when the connection is at its end."""
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
            return False
        for event in self.h2.receive_data(data):
            self.on(event)
        self.flush()
        return True

    def on(self, event: Any) -> None:
        a = self.answers.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = int(event.error_code or 0)
        elif a is None:
            return
        elif isinstance(event, h2.events.ResponseReceived):
            a.headers = dict(event.headers or [])
            a.status = int(a.headers[":status"])
        elif isinstance(event, h2.events.DataReceived):
            a.body += event.data or b""
            if self.acknowledge and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            a.ended = True
        elif isinstance(event, h2.events.StreamReset):
            a.reset = int(event.error_code or 0)

    def until(self, done: Callable[[], Any]) -> None:
        while not done():
            if not self.step():
                raise EOFError(f"closed, GOAWAY {self.goaway}")

    def answer(self, n: int) -> Answer:
        a = self.answers[n]
        self.until(lambda: a.ended or a.reset is not None)
        return a

    def get(self, path: str, *more: tuple[str, str], **rest: Any) -> Answer:
        return self.answer(self.ask(path, *more, **rest))

    def end(self) -> int | None:
        """The code of the GOAWAY by which the connection ends."""
        while self.step():
            pass
        return self.goaway


class RawClient:
    """Frames as they are."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.encoder = hpack.Encoder()
        self.send(PREFACE, SettingsFrame(0))

    def send(self, *frames: Frame | bytes) -> None:
        data = b"".join(f if isinstance(f, bytes) else f.serialize() for f in frames)
        try:
            self.sock.sendall(data)
        except OSError:
            pass  # cut off in the middle: what it said is still there to read

    def head(self, n: int, path: str = "/", flags: tuple[str, ...] = ("END_HEADERS", "END_STREAM")) -> HeadersFrame:
        fields = [(":method", "GET"), (":scheme", "https"), (":authority", "a.example.org"), (":path", path)]
        frame = HeadersFrame(n, self.encoder.encode(fields))
        for flag in flags:
            frame.flags.add(flag)
        return frame

    def goaway(self) -> int | None:
        """Reads to the end; the code of the last GOAWAY."""
        data = b""
        while True:
            try:
                piece = self.sock.recv(65536)
            except (ConnectionError, ssl.SSLError):
                break
            if not piece:
                break
            data += piece
        code = None
        while len(data) >= 9:
            size, kind = int.from_bytes(data[:3], "big"), data[3]
            if kind == 7:
                code = int.from_bytes(data[13:17], "big")
            data = data[9 + size :]
        return code


@pytest.fixture
def connect(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], socket.socket]]:
    # a client on a busy machine may still be sending then, and a reset takes the GOAWAY away
    monkeypatch.setattr("edgeward.gateway.openings.SHUTDOWN_TIME", 120.0)
    ca, port = Authority(), free_port()
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
    rig.apply()
    made: list[socket.socket] = []

    def one() -> socket.socket:
        context = ssl.create_default_context(cadata=ca.pem)
        context.set_alpn_protocols(["h2"])
        raw = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.append(context.wrap_socket(raw, server_hostname="a.example.org"))
        return made[-1]

    one.ca, one.port = ca, port  # type: ignore[attr-defined]
    yield one
    for s in made:
        s.close()


Connect = Callable[[], socket.socket]


def test_requests_and_what_the_target_sees(rig: Rig, connect: Connect) -> None:
    target = rig.target(plain(b"hello", "X-From: target", "Connection: keep-alive", "Keep-Alive: 5"))
    rig.route("/", target.port)
    c = H2Client(connect())
    for _ in range(3):
        got = c.get(
            "/a?b=1", ("cookie", "a=1"), ("cookie", "b=2"), ("x-forwarded-for", "1.2.3.4"), ("client-cert", "x")
        )
        assert (got.status, got.body, got.headers["x-from"]) == (200, b"hello", "target")
        assert not {"connection", "keep-alive"} & got.headers.keys()
    head = target.heads[-1]
    assert head.startswith(b"GET /a?b=1 HTTP/1.1\r\nhost: origin\r\n")
    for line in (
        b"cookie: a=1; b=2",
        b"x-forwarded-proto: https",
        b"x-forwarded-for: 127.0.0.1",
        b"via: 2.0 n1.edgeward",
    ):
        assert line + b"\r\n" in head
    assert b"client-cert" not in head
    assert target.connections == 1
    head_only = c.get("/a", method="HEAD")
    assert (head_only.status, head_only.headers["content-length"], head_only.body) == (200, "5", b"")


def test_bodies_both_ways_with_and_without_a_length(rig: Rig, connect: Connect) -> None:
    target = rig.target(echo)
    rig.route("/", target.port)
    large = bytes(range(256)) * 8192  # 2 MiB: many windows
    c = H2Client(connect())
    for more in ((), (("content-length", str(len(large))),)):
        got = c.get("/up", *more, method="POST", body=large)
        assert (got.status, got.body == large) == (200, True)
    assert b"transfer-encoding: chunked" in target.heads[0]
    assert b"content-length: 2097152" in target.heads[1]
    assert c.get("/up", method="POST", body=b"").body == b""


def test_streams_go_beside_one_another(rig: Rig, connect: Connect) -> None:
    """Forty requests whose target answers only when all of them are there."""
    arrived = 0
    everybody = asyncio.Event()

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived
        await target.request(reader)
        arrived += 1
        if arrived == 40:
            everybody.set()
        await everybody.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    rig.route("/", rig.target(script).port)
    c = H2Client(connect())
    asked = [c.ask(f"/{n}") for n in range(40)]
    assert [c.answer(n).status for n in asked] == [200] * 40


def test_an_answer_that_is_not_read_holds_up_no_other(rig: Rig, connect: Connect) -> None:
    """And its target is stopped: it does not pour all of it into the gateway's memory."""
    pour = Pour(24 * 1024 * 1024)
    rig.route("/large", rig.target(pour).port)
    rig.route("/", rig.target(plain(b"small")).port)
    c = H2Client(connect(), acknowledge=False, window=1024 * 1024)  # the connection has room, the stream has not
    large = c.ask("/large")
    c.until(lambda: len(c.answers[large].body) == 65535)
    for _ in range(20):
        assert c.get("/s").body == b"small"
    assert not pour.done
    assert pour.sent < 16 * 1024 * 1024
    # the client goes on reading, and all of it comes
    c.acknowledge = True
    c.h2.acknowledge_received_data(65535, large)
    c.h2.increment_flow_control_window(65535, large)
    c.flush()
    got = c.answer(large)
    assert len(got.body) == 24 * 1024 * 1024


def test_an_upload_that_the_target_does_not_take_holds_up_no_other(rig: Rig, connect: Connect) -> None:
    let_go = asyncio.Event()

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await let_go.wait()
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    slow, quick = rig.target(script), rig.target(echo)
    rig.route("/slow", slow.port)
    rig.route("/", quick.port)
    c = H2Client(connect())
    size = 24 * 1024 * 1024
    n = c.ask("/slow", ("content-length", str(size)), method="POST", body=b"", end=False)
    left, stuck = size, 0
    while stuck < 3:  # until the window stays shut over whole answers to others
        room = min(c.h2.local_flow_control_window(n), 16384, left)
        if room > 0:
            c.h2.send_data(n, b"x" * room)
            c.flush()
            left -= room
            stuck = 0
        else:
            assert c.get("/q", method="POST", body=b"y" * 100_000).body == b"y" * 100_000
            stuck += 1
        assert left > size // 3, "the gateway took what nobody took from it"
    rig.call(let_go.set)
    c.upload(n, b"x" * left)
    assert c.answer(n).status == 200
    assert len(slow.bodies[-1]) == size


def test_from_the_memory_and_misses_of_the_same(rig: Rig, connect: Connect) -> None:
    target = rig.target(plain(b"kept", "Cache-Control: max-age=600", 'ETag: "1"'))
    rig.route("/", target.port, cache=CacheConfig())
    c = H2Client(connect())
    asked = [c.ask("/a") for _ in range(10)]
    assert {bytes(c.answer(n).body) for n in asked} == {b"kept"}
    assert len(target.heads) == 1
    got = c.get("/a")
    assert (got.body, got.headers["content-length"]) == (b"kept", "4")
    assert got.headers["cache-status"].startswith("edgeward; hit")
    assert c.get("/a", ("range", "bytes=1-2")).body == b"ep"
    assert c.get("/a", ("if-none-match", '"1"')).status == 304
    assert c.get("/b", ("cache-control", "only-if-cached")).status == 504


def test_a_function_answers(rig: Rig, connect: Connect) -> None:
    async def f(call: Call) -> Reply:
        return Reply(200, [("content-type", "text/plain")], call.event.data[::-1])

    rig.functions.known["default/f"] = f
    rig.route("/f", to="function", function="default/f", target="Function/f", send_host="")
    c = H2Client(connect())
    assert c.get("/f", method="POST", body=b"abc").body == b"cba"


def test_refusals_end_a_stream_and_not_the_connection(rig: Rig, connect: Connect) -> None:
    rig.route("/post", rig.target(echo).port, methods=("POST",), body=1000)
    c = H2Client(connect())
    assert c.get("/none").status == 404
    got = c.get("/post")
    assert (got.status, got.headers["allow"]) == (405, "POST")
    assert c.get("/post", method="POST", body=b"x" * 1000).status == 200
    n = c.ask("/post", method="POST", body=b"x" * 30_000, end=False)  # more than it may be, and no end of it
    got = c.answer(n)
    assert (got.status, got.ended) == (413, True)
    c.until(lambda: got.reset is not None)
    assert got.reset == 0  # NO_ERROR: the answer counts (RFC 9113, section 8.1)
    assert c.get("/post", ("content-length", "5000"), method="POST", body=b"", end=False).status == 413
    assert c.get("/x", ("connection", "close")).status == 400
    assert c.get("/x", ("x", "a\r\nhost: evil")).status == 400
    assert c.get("/a/../b").status == 400
    assert c.get("/x", authority="b.example.org").status == 421
    assert c.get("/x", ("via", "2.0 n1.edgeward")).status == 404
    assert c.get("/post", method="POST", body=b"still here").body == b"still here"


def test_a_target_that_breaks_off_breaks_the_stream_off(rig: Rig, connect: Connect) -> None:
    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await target.request(reader)
        if b"/cut" in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
            await writer.drain()
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    rig.route("/", rig.target(script).port)
    c = H2Client(connect())
    got = c.get("/cut")
    assert (got.ended, got.reset) == (False, 2)  # INTERNAL_ERROR
    assert c.get("/ok").body == b"ok"


def test_a_request_that_is_taken_back_is_given_up(rig: Rig, connect: Connect) -> None:
    there, given_up = asyncio.Event(), asyncio.Event()

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        there.set()
        await reader.read(1)
        given_up.set()

    target = rig.target(script)
    rig.route("/", target.port)
    c = H2Client(connect())
    n = c.ask("/slow")

    rig.do(asyncio.wait_for(there.wait(), PATIENCE))
    c.h2.reset_stream(n, 8)
    c.flush()
    rig.do(asyncio.wait_for(given_up.wait(), PATIENCE))
    assert not rig.gate.exchanges


def test_events_come_when_they_happen_and_a_client_that_waits_is_told_to_go_on(rig: Rig, connect: Connect) -> None:
    go = asyncio.Event()

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"9\r\ndata: 1\n\n\r\n")
        await go.wait()
        writer.write(b"9\r\ndata: 2\n\n\r\n0\r\nX-Trailer: dropped\r\n\r\n")

    rig.route("/events", rig.target(script).port)
    rig.route("/", rig.target(echo).port)
    c = H2Client(connect())
    n = c.ask("/events")
    c.until(lambda: c.answers[n].body == b"data: 1\n\n")
    rig.call(go.set)
    assert c.answer(n).body == b"data: 1\n\ndata: 2\n\n"
    told: list[Any] = []
    on, c.on = c.on, lambda event: (told.append(type(event)), on(event))[1]  # type: ignore[method-assign]
    n = c.ask("/up", ("expect", "100-continue"), method="POST", body=b"", end=False)
    c.until(lambda: h2.events.InformationalResponseReceived in told)
    c.h2.send_data(n, b"body")
    c.h2.send_headers(n, [("x-trailer", "dropped")], end_stream=True)
    c.flush()
    assert c.answer(n).body == b"body"


def test_an_upload_that_is_taken_back_at_once_harms_no_other(rig: Rig, connect: Connect) -> None:
    """All of it in one packet: the library knows the end before we hear of the beginning."""
    rig.route("/small", rig.target(echo).port, body=10)
    rig.route("/", rig.target(echo).port)
    c = H2Client(connect())
    first = c.ask("/up", method="POST", body=b"a", end=False)
    for path, more in (("/up", ()), ("/small", ()), ("/up", (("expect", "100-continue"),)), ("/none/../x", ())):
        n = c.h2.get_next_available_stream_id()
        head = [(":method", "POST"), (":scheme", "https"), (":authority", "a.example.org"), (":path", path), *more]
        c.h2.send_headers(n, head)
        c.h2.send_data(n, b"x" * 16_000)
        c.h2.reset_stream(n, 8)
    c.flush()
    c.upload(first, b"b")
    assert c.answer(first).body == b"ab"
    assert not rig.call(lambda: [e for e in rig.gate.exchanges if not e.ended])


def test_a_client_that_goes_still_gets_its_answers(rig: Rig, connect: Connect) -> None:
    go = asyncio.Event()
    rig.route("/slow", rig.target(plain(go=go)).port)
    c = H2Client(connect())
    n = c.ask("/slow")
    c.sock.sendall(GoAwayFrame(0).serialize())
    rig.call(go.set)
    assert c.answer(n).body == b"ok"
    assert not c.step()  # and that was it


def test_httpx_gets_along(rig: Rig, connect: Connect) -> None:
    rig.route("/", rig.target(echo).port)
    context = ssl.create_default_context(cadata=connect.ca.pem)  # type: ignore[attr-defined]
    transport = httpx.HTTPTransport(verify=context, http2=True)
    with httpx.Client(transport=transport, timeout=PATIENCE) as client:
        for n in range(3):
            got = client.post(
                f"https://127.0.0.1:{connect.port}/x", content=b"y" * n * 70_000,  # type: ignore[attr-defined]
                headers={"host": "a.example.org"}, extensions={"sni_hostname": "a.example.org"},
            )  # fmt: skip
            assert (got.http_version, got.status_code, len(got.content)) == ("HTTP/2", 200, n * 70_000)


# --- abuse ------------------------------------------------------------------------------------------------------------


def test_rapid_reset(rig: Rig, connect: Connect) -> None:
    """CVE-2023-44487: streams that are opened and taken back at once. A few hundred are all that the target sees."""

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        await reader.read()

    target = rig.target(script)
    rig.route("/", target.port)
    c = RawClient(connect())
    for n in range(1, 4001, 2):
        reset = RstStreamFrame(n)
        reset.error_code = 8
        c.send(c.head(n), reset)
    assert c.goaway() == CALM
    assert target.connections <= 600
    assert not rig.call(lambda: [e for e in rig.gate.exchanges if not e.ended])


def frames(kind: str) -> list[Frame]:
    if kind == "settings":
        return [SettingsFrame(0, settings={4: 65535 + n % 2}) for n in range(3000)]
    if kind == "ping":
        return [PingFrame(0, b"12345678") for _ in range(3000)]
    if kind == "priority":
        return [PriorityFrame(5, depends_on=0, stream_weight=1) for _ in range(60_000)]
    if kind == "window":
        return [WindowUpdateFrame(0, 1) for _ in range(60_000)]
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["settings", "ping", "priority", "window"])
def test_frames_that_only_cost(rig: Rig, connect: Connect, kind: str) -> None:
    c = RawClient(connect())
    c.send(*frames(kind))
    assert c.goaway() == CALM


def test_empty_data_without_end(rig: Rig, connect: Connect) -> None:
    rig.route("/", rig.target(echo).port)
    c = RawClient(connect())
    c.send(c.head(1, flags=("END_HEADERS",)))
    c.send(*[DataFrame(1) for _ in range(3000)])
    assert c.goaway() == CALM


def test_headers_without_end(rig: Rig, connect: Connect) -> None:
    """CVE-2024-27316: CONTINUATION frames whose end never comes are not collected."""
    c = RawClient(connect())
    c.send(c.head(1, flags=("END_STREAM",)))
    for _ in range(60):
        c.send(ContinuationFrame(1, b"\x00" * 16_000))
    assert c.goaway() == CALM


def test_a_bomb_of_compressed_fields(rig: Rig, connect: Connect) -> None:
    """One entry of the table, named ten thousand times: 40 MB in 10 kB."""
    c = RawClient(connect())
    encoder = hpack.Encoder()
    encoder.encode([("x", "y" * 4000)])
    first = hpack.Encoder().encode([("x", "y" * 4000)])
    index = b"\xbe"  # the newest entry of the dynamic table
    frame = HeadersFrame(1, first + index * 10_000)
    frame.flags.add("END_HEADERS")
    frame.flags.add("END_STREAM")
    c.send(frame)
    assert c.goaway() == CALM


def test_too_many_streams_and_broken_frames(rig: Rig, connect: Connect) -> None:
    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    rig.route("/", rig.target(script).port)
    c = RawClient(connect())
    c.send(*[c.head(n) for n in range(1, 300, 2)])
    assert c.goaway() is not None
    for bad in (
        b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00",  # an increment of nothing
        b"\x00\x00\x08\x00\x00\x00\x00\x00\x0112345678",  # data of a stream that is none
        b"\x00\x00\x05\x04\x00\x00\x00\x00\x0012345",  # settings of odd length
        b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",  # a frame of 16 MB
        b"\x00\x00\x04\x01\x05\x00\x00\x00\x01\xff\xff\xff\xff",  # fields that cannot be decoded
        WindowUpdateFrame(0, 2**31 - 1).serialize(),  # a window that overflows
    ):
        c = RawClient(connect())
        c.send(bad)
        assert c.goaway() not in (None, 0)
    c = RawClient(connect())
    c.sock.close()
    sock = connect()
    sock.sendall(b"GET / HTTP/1.1\r\nHost: a.example.org\r\n\r\n")  # not what was agreed on
    data = b""
    while piece := sock.recv(65536):
        data += piece
    assert b"HTTP/1.1" not in data


def test_frames_of_a_stream_that_was_refused(rig: Rig, connect: Connect) -> None:
    """Each is answered by a RST_STREAM, and the library tells nobody."""
    rig.route("/", rig.target(echo).port, body=1)
    c = RawClient(connect())
    c.send(c.head(1, flags=("END_HEADERS",)), DataFrame(1, b"two"))
    c.send(*[DataFrame(1) for _ in range(60_000)])
    assert c.goaway() == CALM


def test_a_plane_that_ends_says_so_and_ends_what_it_began(rig: Rig, connect: Connect) -> None:
    go = asyncio.Event()
    rig.route("/slow", rig.target(plain(go=go)).port)
    rig.route("/", rig.target(plain(b"ok")).port)
    c = H2Client(connect())
    assert c.get("/").status == 200
    n = c.ask("/slow")
    assert c.get("/").status == 200  # so the one before it is there, too
    draining = asyncio.run_coroutine_threadsafe(rig.gate.drain(PATIENCE), rig.loop)
    c.until(lambda: c.goaway is not None)
    assert c.goaway == 0
    rig.call(go.set)
    # the library takes a GOAWAY for the end; the frames are there all the same
    draining.result(PATIENCE)
    data = b""
    while piece := c.sock.recv(65536):
        data += piece
    assert data.endswith(b"ok")
    assert n == 3


def test_silence_ends_a_connection_with_a_word(rig: Rig, connect: Connect) -> None:
    rig.route("/", rig.target(plain(b"ok")).port)
    c = H2Client(connect())
    assert c.get("/").status == 200
    doors = [d for d in rig.gate.doors if type(d).__name__ == "H2Door"]

    def age() -> None:
        for d in doors:
            d.deadline = 0.0  # type: ignore[attr-defined]

    rig.call(age)
    assert c.end() == 0
