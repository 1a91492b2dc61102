"""Requests through a gateway to real servers, and what comes back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
from tests.gateway.rig import Client, Rig, Target, echo, plain

Connect = Callable[[], Client]


def test_a_request_and_the_next_on_the_same_connections(rig: Rig, client: Connect) -> None:
    target = rig.target(plain(b"hello", "X-From: target"))
    rig.route("/news/", target.port)
    c = client()
    for _ in range(3):
        got = c.get("/news/a?b=1")
        assert (got.status, got.body, got.headers["x-from"]) == (200, b"hello", "target")
    assert target.connections == 1
    assert len(target.heads) == 3
    assert target.heads[0].startswith(b"GET /news/a?b=1 HTTP/1.1\r\nhost: origin\r\n")
    assert b"x-forwarded-for: 127.0.0.1\r\n" in target.heads[0]
    assert b"x-forwarded-host: h\r\n" in target.heads[0]


def test_bodies_go_both_ways(rig: Rig, client: Connect) -> None:
    target = rig.target(echo)
    rig.route("/", target.port)
    large = bytes(range(256)) * 16384
    c = client()
    assert c.get("/a", method="POST", body=b"small").body == b"small"
    assert c.get("/a", method="POST", body=large).body == large
    c.send(b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    c.send(b"4;ext=1\r\ndefg\r\n0\r\nX-Trailer: 1\r\n\r\n")
    assert c.answer().body == b"abcdefg"
    assert c.get("/a", method="PUT", body=b"again").body == b"again"
    assert target.connections == 1


Script = Callable[..., Any]


def once(answer: bytes, *, reset: bool = False) -> Script:
    """A target that reads a request, says this, and closes."""

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(answer)
        await writer.drain()
        if reset:
            writer.transport.abort()

    return script


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Le", 502),
        (b"garbage\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 502),
        (b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 40000 + b"\r\n\r\n", 502),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", 502),
    ],
)
def test_targets_that_do_not_speak_http(rig: Rig, client: Connect, answer: bytes, status: int) -> None:
    rig.route("/", rig.target(once(answer)).port, attempts=1)
    c = client()
    got = c.get("/")
    assert got.status == status
    assert b'"route":"Route/default/r0"' in got.body
    assert c.get("/nothing", host="h").status == status  # the client's own connection goes on


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX",
    ],
)
def test_a_target_that_dies_in_mid_body_is_seen_as_such(rig: Rig, client: Connect, answer: bytes) -> None:
    rig.route("/", rig.target(once(answer)).port)
    with pytest.raises(EOFError):
        client().get("/")


def test_more_than_it_says_goes_to_nobody(rig: Rig, client: Connect) -> None:
    evil = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await target.request(reader)
            writer.write(evil)
            await writer.drain()

    target = rig.target(script)
    rig.route("/", target.port)
    c = client()
    assert [c.get("/").body for _ in range(4)] == [b"ok"] * 4
    assert target.connections == 4  # never used again


def test_what_comes_unasked_goes_to_nobody(rig: Rig, client: Connect) -> None:
    said = asyncio.Event()

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        if target.connections == 1:
            await said.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
            await writer.drain()
            await reader.read()  # until the gateway closes it

    target = rig.target(script)
    rig.route("/", target.port)
    c = client()
    assert c.get("/").body == b"ok"
    rig.call(said.set)
    assert c.get("/").body == b"ok"
    assert c.get("/").body == b"ok"


def test_an_answer_that_ends_with_its_connection(rig: Rig, client: Connect) -> None:
    rig.route("/", rig.target(once(b"HTTP/1.0 200 OK\r\n\r\nall of it")).port)
    got = client().get("/")
    assert (got.status, got.body, got.headers["transfer-encoding"]) == (200, b"all of it", "chunked")
    assert client().send(b"GET / HTTP/1.0\r\n\r\n").answer().body == b"all of it"


def test_interim_answers_are_not_the_answer(rig: Rig, client: Connect) -> None:
    rig.route(
        "/",
        rig.target(
            once(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
        ).port,
    )
    assert client().get("/").body == b"x"
    rig.route("/flood", rig.target(once(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100_000)).port)
    assert b"more than 32 interim answers" in client().get("/flood").body


def test_repeats(rig: Rig, client: Connect) -> None:
    """Idempotent requests go again, others never once they were sent; nobody listening harms no method."""
    dead = rig.target(once(b""))
    good = rig.target(plain(b"good"))
    rig.route("/", dead.port, good.port, failures=0)
    c = client()
    assert [c.get("/", method=m).status for m in ("GET", "PUT", "DELETE", "HEAD") for _ in range(4)] == [200] * 16
    assert len(dead.heads) >= 4
    dead.heads.clear()
    good.heads.clear()
    statuses = [c.get("/", method="POST", body=b"x").status for _ in range(10)]
    assert sorted(set(statuses)) == [200, 502]
    assert len(dead.heads) + len(good.heads) == 10  # each exactly once
    rig.do(asyncio.sleep(0))
    rig.call(dead.server.close)
    assert [c.get("/", method="POST", body=b"x").status for _ in range(10)] == [200] * 10


def test_the_budget_of_repeats(rig: Rig, client: Connect) -> None:
    dead = rig.target(once(b""))
    rig.route("/", dead.port, failures=0, budget=0.1, attempts=5)
    c = client()
    assert [c.get("/").status for _ in range(40)] == [502] * 40
    # ten that are saved, and a tenth for each request
    assert 40 < len(dead.heads) <= 40 + 10 + 4


def test_an_endpoint_that_goes_on_failing_is_left_alone(rig: Rig, client: Connect) -> None:
    dead = rig.target(once(b""))
    rig.route("/", dead.port, failures=3, pause=3600.0, attempts=1)
    c = client()
    assert [c.get("/").status for _ in range(5)] == [502, 502, 502, 503, 503]
    assert len(dead.heads) == 3
    assert [e[0] for e in rig.heard.events] == ["CircuitOpen"]
    got = c.get("/")
    assert "retry-after" in got.headers
    # after the pause one request tries it
    circuit = next(iter(rig.gate.table.rules[0].balance.circuits.values()))
    circuit.open_until = 0.0
    assert [c.get("/").status for _ in range(2)] == [502, 503]


def test_no_endpoint_and_no_listener(rig: Rig, client: Connect) -> None:
    rig.route("/none", to="service", target="Service/web")
    assert rig.heard.statuses["default/r0"] == {
        "phase": "NoEndpoints", "target": "Service/web", "endpoints": 0,
        "message": "Service/web has no running endpoint at this site: requests get 503",
    }  # fmt: skip
    c = client()
    got = c.get("/none")
    assert (got.status, got.headers["retry-after"]) == (503, "1")
    gone = rig.target(plain())
    rig.call(gone.server.close)
    rig.route("/gone", gone.port)
    assert c.get("/gone").status == 502


def test_a_target_that_does_not_answer_in_time(rig: Rig, client: Connect) -> None:
    async def silent(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def stalls(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await reader.read()

    rig.route("/silent", rig.target(silent).port, answer=0.1)
    rig.route("/stalls", rig.target(stalls).port, idle=0.1)
    c = client()
    got = c.get("/silent")
    assert (got.status, b"within 0.1 s" in got.body) == (504, True)
    with pytest.raises(EOFError):
        c.get("/stalls")


def test_a_client_that_goes_away_takes_its_request_along(rig: Rig, client: Connect) -> None:
    ended = asyncio.Event()

    async def waits(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await reader.read()
        ended.set()

    rig.route("/", rig.target(waits).port)
    c = client().send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    c.until(b"half")
    c.close()
    rig.do(asyncio.wait_for(ended.wait(), 30))
    assert rig.gate.exchanges == set()


def test_too_many_at_once_are_refused(rig: Rig, client: Connect) -> None:
    free = asyncio.Event()

    async def waits(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        await free.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()

    target = rig.target(waits)
    rig.route("/", target.port, requests=2)
    held = [client().send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n") for _ in range(2)]

    async def both() -> None:
        async with asyncio.timeout(30):
            while len(target.heads) < 2:  # noqa: ASYNC110 - looking, the script has no event
                await asyncio.sleep(0.01)

    rig.do(both())
    got = client().get("/")
    assert (got.status, got.headers["retry-after"]) == (503, "1")
    assert b"limits.requests" in got.body
    rig.call(free.set)
    assert [h.answer().status for h in held] == [200, 200]


def test_a_slow_reader_is_not_buffered_for(rig: Rig, client: Connect) -> None:
    """The target is not read faster than the client reads."""
    sent = [0]

    async def floods(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 268435456\r\n\r\n")
        block = b"x" * 65536
        for _ in range(4096):
            writer.write(block)
            await writer.drain()
            sent[0] += len(block)

    rig.route("/", rig.target(floods).port, idle=0.5)
    c = client().send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    c.until(b"\r\n\r\n")

    async def ended() -> None:
        async with asyncio.timeout(30):
            while rig.gate.exchanges:  # noqa: ASYNC110 - looking, the gate has no event
                await asyncio.sleep(0.02)

    rig.do(ended())  # it is given up at last
    assert sent[0] < 64 * 1024 * 1024


def test_connections_and_requests_outlive_a_change(rig: Rig, client: Connect) -> None:
    go = asyncio.Event()

    async def slow(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
        await writer.drain()
        await go.wait()
        writer.write(b"cd")
        await writer.drain()

    rig.route("/slow", rig.target(slow).port)
    c = client().send(b"GET /slow HTTP/1.1\r\nHost: h\r\n\r\n")
    c.until(b"ab")
    rig.routes.clear()
    rig.route("/other", rig.target(plain(b"other")).port)
    rig.call(go.set)
    assert c.exactly(2) == b"cd"
    assert c.get("/other").body == b"other"
    assert c.get("/slow").status == 404


def test_a_configuration_that_cannot_be_taken_changes_nothing(rig: Rig, client: Connect) -> None:
    from edgeward.core.errors import EdgewardError

    target = rig.target(plain(b"still"))
    rig.route("/", target.port)
    for section in (
        {"listen": [{"host": "127.0.0.1", "port": target.port}], "routes": []},
        {"routes": [{"key": 1}]},
        {"listen": "x"},
    ):
        with pytest.raises(EdgewardError):
            rig.do(rig.gate.provision(section))
    assert client().get("/").body == b"still"


def test_a_websocket_passes_and_outlives_changes(rig: Rig, client: Connect) -> None:
    async def echo(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Accept: x\r\n\r\nhi"
        )
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    target = rig.target(echo)
    rig.route("/ws", target.port)
    c = client().send(
        b"GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\nfirst"
    )
    got = c.answer()
    assert (got.status, got.headers["upgrade"], got.headers["sec-websocket-accept"]) == (101, "websocket", "x")
    assert c.exactly(7) == b"hifirst"
    assert b"upgrade: websocket\r\n" in target.heads[0]
    for n in range(20):
        rig.route(f"/more{n}", target.port)
        assert c.send(b"\x81\x05hello").exactly(7) == b"\x81\x05hello"
    big = bytes(range(256)) * 4096
    c.send(big)
    assert c.exactly(len(big)) == big
    # without the target's consent it is an ordinary request
    rig.route("/plain", rig.target(plain(b"no")).port)
    got = client().get("/plain", "Connection: Upgrade", "Upgrade: websocket")
    assert (got.status, got.body) == (200, b"no")


def test_events_pass_as_they_come(rig: Rig, client: Connect) -> None:
    more = asyncio.Event()

    async def events(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await writer.drain()
        await more.wait()
        writer.write(b"data: 2\n\n")
        await writer.drain()

    rig.route("/", rig.target(events).port)
    c = client().send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    c.until(b"data: 1\n\n")
    rig.call(more.set)
    c.until(b"data: 2\n\n")
    c.until(b"0\r\n\r\n")


def test_a_listener_that_is_taken_away(rig: Rig, client: Connect) -> None:
    rig.route("/", rig.target(plain(b"x")).port)
    before = client()
    assert before.get("/").status == 200
    old = rig.port
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        rig.port = s.getsockname()[1]
    rig.apply()
    assert client().get("/").status == 200  # at the new one
    assert before.get("/").status == 200  # what is open stays
    with pytest.raises(ConnectionRefusedError):
        Client(old)
