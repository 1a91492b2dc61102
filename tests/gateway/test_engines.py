"""Both engines, one set of tests: whoever stands at the port, a request gets the same answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.gateway.rig import PATIENCE, Answer, Client, Rig, Target, plain
from tests.gateway.test_admission import jwt, token

from edgeward.core.invocation import Call, Reply
from edgeward.gateway.balance import Endpoint
from edgeward.gateway.cors import CorsConfig
from edgeward.gateway.engine import binary
from edgeward.gateway.http1 import PLACE
from edgeward.gateway.rules import CacheConfig, PlaceConfig, RouteConfig

needs_nginx = pytest.mark.skipif(binary() is None, reason="there is no nginx here: the engine nginx is not tested")


@pytest.fixture(params=["embedded", pytest.param("nginx", marks=needs_nginx)])
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(tmp_path, engine=request.param)
    try:
        yield made
    finally:
        made.close()


class Polite:
    """A client as RFC 9112, section 9.3.1, has it: asks again on a new connection when a kept one was closed. nginx
    closes those that wait when it takes a new configuration."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.client = Client(port)

    def get(self, path: str, *headers: str, **more: Any) -> Answer:
        for _ in range(20):
            try:
                return self.client.get(path, *headers, **more)
            except (EOFError, ConnectionError) as e:
                if isinstance(e, EOFError) and not str(e).endswith("b''"):
                    raise  # in the middle of an answer
                self.client.close()
                self.client = Client(self.port)
        raise AssertionError("closed again and again")

    def close(self) -> None:
        self.client.close()


def ask(rig: Rig, path: str, *headers: str, **more: Any) -> Answer:
    client = Client(rig.port)
    try:
        return client.get(path, *headers, **more)
    finally:
        client.close()


def raw(rig: Rig, data: bytes) -> int:
    """The status of the first answer; 0: closed without one."""
    client = Client(rig.port)
    try:
        return client.send(data).answer().status
    except (EOFError, ConnectionError):
        return 0
    finally:
        client.close()


async def echo_host(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the Host that it was asked for."""
    while True:
        head = (await target.request(reader)).lower()
        host = head.partition(b"\r\nhost: ")[2].partition(b"\r\n")[0]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(host), host))


HOSTS = ["", "", "a.example", "b.example", "*.example", "*.b.example"]
PATHS = ["/", "/a", "/a/", "/a/b", "/a/b/", "/a/b/c", "/b/", "/a$x/", "/b/;y", "/caf%C3%A9"]
ASKED = ["/", "/a", "/a/", "/a/b", "/a/b/", "/a/b/c", "/a/b/c/d", "/b", "/b/x", "/a$x/1", "/b/;y", "/caf%C3%A9", "/A"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_which_route_answers(rig: Rig, seed: int) -> None:
    rng = random.Random(seed)
    target = rig.target(echo_host)
    for n in range(14):
        more: dict[str, Any] = {}
        if rng.random() < 0.2:
            more["methods"] = ("POST",)
        if rng.random() < 0.2:
            more["headers"] = (("x-a", "1"),)
        rig.routes.append(
            RouteConfig(
                f"default/r{n}", "upstream", "test", host=rng.choice(HOSTS), path=rng.choice(PATHS),
                endpoints=(Endpoint("127.0.0.1", target.port),), send_host=f"r{n}.route", **more,
            )
        )  # fmt: skip
    rig.apply()
    client = Polite(rig.port)
    for host in ("a.example", "b.example", "x.b.example", "c.example", "other", "a.example:80", "A.Example"):
        for path in ASKED:
            for method, fields in (("GET", []), ("POST", []), ("GET", ["x-a: 1"])):
                got = client.get(path, *fields, method=method, host=host)
                explained = rig.do(_explained(rig, path, method, host, dict(f.split(": ") for f in fields)))
                if "route" in explained:
                    wanted = explained["route"].partition("/")[2] + ".route"
                    assert (got.status, got.body.decode()) == (200, wanted), (host, path, method, fields)
                else:
                    assert got.status == explained["status"], (host, path, method, fields)
    client.close()


async def _explained(rig: Rig, path: str, method: str, host: str, headers: dict[str, str]) -> Any:
    args = {"url": f"http://{host}{path}", "method": method, "headers": headers}
    return await anext(rig.gate.verbs["gateway.explain"](args))


GET = b"GET %b HTTP/1.1\r\nHost: h\r\n%b\r\n"
ODD = [
    GET % (b"/a/../b", b""), GET % (b"/a//b", b""), GET % (b"/a/./b", b""), GET % (b"/a%2fb", b""),
    GET % (b"/%2e%2e/b", b""), GET % (b"/a\\b", b""), GET % (b"/a%00b", b""), GET % (b"/a%5cb", b""),
    GET % (b"/a%252e", b""), GET % (b"/a/..;x/b", b""), GET % (b"/a#b", b""), GET % (b'/a"b', b""),
    GET % (b"/a", b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n"),
    GET % (b"/a", b"Transfer-Encoding: gzip, chunked\r\n"), GET % (b"/a", b"Content-Length: +3\r\n"),
    GET % (b"/a", b"Content-Length: 3\r\nContent-Length: 5\r\n"), GET % (b"/a", b"Host: other\r\n"),
    GET % (b"/a", b"X: a\r\n b\r\n"), GET % (b"/a", b"Connection: x-secret\r\n"),
    GET % (b"/a", b"Via: 1.1 n1.edgeward\r\n"),
    b"GET /a HTTP/1.1\r\n\r\n", b"GET /a HTTP/1.1\r\nHost: a b\r\n\r\n", b"GET /a HTTP/1.1\r\nHost: h/x\r\n\r\n",
    b"GET http://other/a HTTP/1.1\r\nHost: h\r\n\r\n", b"GET /a HTTP/1.1\nHost : h\r\n\r\n",
    b"TRACE /a HTTP/1.1\r\nHost: h\r\n\r\n", b"GET /a HTTP/3.0\r\nHost: h\r\n\r\n",
    GET % (b"/a", b"X: " + b"y" * 40_000 + b"\r\n"), GET % (b"/" + b"a" * 9000, b""),
    # a field that looks like the rest of what nginx compares, so that the rest would be taken for a query
    GET % (b"/a/../b", b"Upgrade: |0|h|h|/x?\r\n"), GET % (b"/a/..%2fb", b"Edgeward-Fallback: |0|h|h|/x?\r\n"),
    GET % (b"/a//b", b"Via: |0|h|h|/x?\r\n"), b"GET http://other/a HTTP/1.1\r\nHost: h\r\nUpgrade: |0|h|h|/x?\r\n\r\n",
    GET % (b"/a/../b", b"Content-Length: 0|h|h|/x?\r\n"), GET % (b"/a/../b", b"Connection: close||0|h|h|/x?\r\n"),
]  # fmt: skip


def test_what_could_be_read_in_two_ways_is_refused(rig: Rig) -> None:
    target = rig.target(plain(b"ok"))
    rig.route("/", target.port)
    for data in ODD:
        assert raw(rig, data) in (0, *range(400, 432), 501, 505, 508), data[:100]
    assert target.heads == []
    assert ask(rig, "/a").body == b"ok"


async def bodiless(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that reads no body of GET: what follows the head is the next request to it."""
    while True:
        target.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()


def test_the_body_of_a_get_is_nobodys_next_request(rig: Rig) -> None:
    target = rig.target(bodiless)
    rig.route("/", target.port)
    client = Polite(rig.port)
    for n in range(10):
        smuggled = b"GET /admin HTTP/1.1\r\nX: "
        assert client.get(f"/{n}", body=smuggled).body == b"ok"
        assert client.get(f"/{n}/next").body == b"ok"
    client.close()
    assert all(any(h.startswith(b"GET /%d/next " % n) for h in target.heads) for n in range(10))


CLAIMED = [
    "X-Forwarded-For: 9.9.9.9", "Forwarded: for=9.9.9.9", "X-Real-IP: 9.9.9.9", "X-Original-URL: /admin",
    "X_Forwarded_For: 9.9.9.9", "X-Edgeward-Identity: root", "Edgeward-Front-Client: 9.9.9.9", "X-HTTP-Method: PUT",
    "Edgeward-Front-Tried: 502 -", "Keep-Alive: timeout=1", "Proxy-Authorization: x", "Edgeward-Refused: untouched",
]  # fmt: skip


@pytest.mark.parametrize("cache", [None, CacheConfig()])
def test_what_clients_claim_does_not_reach_the_target(rig: Rig, cache: CacheConfig | None) -> None:
    target = rig.target(plain(b"ok"))
    rig.route("/", target.port, cache=cache, send_host="origin")
    assert ask(rig, "/a", *CLAIMED, "X-Own: kept", "Cookie: a=b", host="shop.example:81").body == b"ok"
    (head,) = target.heads
    lines = sorted(head.decode().lower().split("\r\n")[1:-2])
    assert lines == sorted(
        ["host: origin", "x-own: kept", "cookie: a=b", "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http",
         "x-forwarded-host: shop.example:81", "via: 1.1 n1.edgeward"]
    )  # fmt: skip


def test_what_targets_say_to_engines_ends_there(rig: Rig) -> None:
    """To nginx by itself, through it, and from the cache: nothing is kept for an hour, nobody is sent elsewhere."""
    inner = ("X-Accel-Redirect: /secret", "X-Accel-Expires: 3600", "X-Accel-Buffering: yes", "Edgeward-Refused: x")
    target = rig.target(plain(b"ok", "Cache-Control: no-store", *inner))
    kept = rig.target(plain(b"kept", "Cache-Control: max-age=600", *inner))
    rig.route("/secret", rig.target(plain(b"secret")).port)
    rig.route("/a/", target.port)
    rig.route("/c/", target.port, cache=CacheConfig())
    rig.route("/k/", kept.port, cache=CacheConfig())
    for path in ("/a/1", "/c/1", "/c/1"):
        assert ask(rig, path).body == b"ok"
        assert ask(rig, path, "Via: 1.0 x").body == b"ok"  # the plane's in any case
    assert len(target.heads) == 6
    for _ in range(4):
        assert ask(rig, "/k/1").body == b"kept"
    assert len(kept.heads) == 1
    before = len(kept.heads)
    rig.do(_purged(rig, prefix="/"))
    deadline = time.monotonic() + PATIENCE
    while len(kept.heads) == before:
        assert time.monotonic() < deadline, "it is kept for longer than a second"
        assert ask(rig, "/k/1").body == b"kept"


def test_the_cache(rig: Rig) -> None:
    target = rig.target(plain(b"news", "Cache-Control: max-age=100", 'ETag: "1"'))
    rig.route("/n/", target.port, cache=CacheConfig(), key="default/n")
    client = Polite(rig.port)
    for n in range(5):
        got = client.get("/n/1")
        assert got.body == b"news" and ("hit" in got.headers["cache-status"]) == (n > 0)
        assert n == 0 or got.headers["age"] == "0" or int(got.headers["age"]) < 60
    assert client.get("/n/1", 'If-None-Match: "1"').status == 304
    part = client.get("/n/1", "Range: bytes=1-2")
    assert (part.status, part.body) == (206, b"ew")
    assert client.get("/n/1", method="HEAD").headers["content-length"] == "4"
    assert client.get("/n/1", "Cache-Control: no-cache").body == b"news"
    assert client.get("/n/1", host="other").body == b"news"
    before = len(target.heads)
    purged = rig.do(_purged(rig, prefix="/n/"))
    assert purged["purged"] >= 1
    deadline = time.monotonic() + PATIENCE
    while len(target.heads) == before:  # nginx keeps what it has for a second
        assert time.monotonic() < deadline
        client.get("/n/1")
    client.close()
    assert sum(rig.gate.table.rules[0].counters.statuses.values()) > 5


async def _purged(rig: Rig, **what: str) -> Any:
    return await anext(rig.gate.verbs["gateway.purge"](what))


def closed(rig: Rig) -> int:
    """A port at which nothing listens, held to the end."""
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    rig.held.append(s)
    port: int = s.getsockname()[1]
    return port


async def takes_and_goes(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await target.request(reader)


def test_an_endpoint_that_refuses_is_passed_by(rig: Rig) -> None:
    target = rig.target(plain(b"ok"))
    rig.route("/", closed(rig), target.port)
    for n in range(20):
        got = ask(rig, f"/{n}", method="POST", body=b"x") if n % 2 else ask(rig, f"/{n}")
        assert got.body == b"ok"
    assert target.bodies.count(b"x") == 10


def test_what_may_have_been_done_is_not_done_again(rig: Rig) -> None:
    target = rig.target(takes_and_goes)
    rig.route("/", target.port, target.port, attempts=5, budget=1.0, failures=0)
    got = ask(rig, "/", method="POST", body=b"once")
    assert got.status == 502 and got.headers["content-type"] == "application/problem+json"
    assert target.bodies == [b"once"]
    assert ask(rig, "/", method="PUT", body=b"again").status == 502 and len(target.bodies) > 2


def test_one_that_is_silent_is_waited_for_no_longer_than_declared(rig: Rig) -> None:
    async def silent(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        await reader.read()

    target = rig.target(silent)
    rig.route("/", target.port, answer=0.3, idle=0.3)
    assert ask(rig, "/", method="POST", body=b"x").status == 504
    assert target.bodies == [b"x"]


def test_an_answer_that_breaks_off_breaks_off(rig: Rig) -> None:
    async def half(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        await writer.drain()

    target = rig.target(half)
    rig.route("/", target.port)
    with pytest.raises((EOFError, ConnectionError)):
        ask(rig, "/")
    assert len(target.heads) == 1


def test_what_nginx_cannot_do_the_plane_does(rig: Rig) -> None:
    async def function(call: Call) -> Reply:
        return Reply(200, [], b"f " + call.event.data + b" " + call.event.http.client.encode())

    rig.functions.known["default/f"] = function
    target = rig.target(plain(b"ok"))
    port = target.port
    rig.route("/f", to="function", function="default/f")
    rig.route("/rate", port, rate=0.001, burst=1)
    rig.route("/auth", port, auth=jwt(), key="default/auth")
    rig.route("/cors", port, cors=CorsConfig(("https://a.example",), ("PUT",)))
    rig.route("/small", port, body=10)
    rig.route("/none")
    rig.route("/only", port, methods=("GET",))
    rig.route("/far", then=(PlaceConfig("cloud", "http://c", Endpoint("127.0.0.1", port), "c"),))
    assert ask(rig, "/f", method="POST", body=b"x").body == b"f x 127.0.0.1"
    assert [ask(rig, "/rate").status for _ in range(3)] == [200, 429, 429]
    assert [ask(rig, "/auth", *h).status for h in ([], [token()])] == [401, 200]
    asked = ask(rig, "/cors", "Origin: https://a.example", "Access-Control-Request-Method: PUT", method="OPTIONS")
    assert (asked.status, asked.headers["access-control-allow-origin"]) == (204, "https://a.example")
    assert ask(rig, "/small", method="POST", body=b"x" * 11).status == 413
    assert ask(rig, "/small", method="POST", body=b"x" * 10).body == b"ok"
    none = ask(rig, "/none")
    assert none.status == 503 and json.loads(none.body)["route"].startswith("Route/default/")
    assert ask(rig, "/only", method="PUT").status == 405
    assert ask(rig, "/far").headers[PLACE].startswith("cloud")
    assert ask(rig, "/nothing").status == 404


def test_large_bodies_both_ways(rig: Rig) -> None:
    big = random.Random(3).randbytes(9 * 1024 * 1024)
    target = rig.target(plain(big))
    rig.route("/", target.port)
    got = ask(rig, "/", method="POST", body=big)
    assert got.body == big and target.bodies == [big]
    client = Client(rig.port)
    client.send(b"PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n")
    assert client.answer().status == 200 and target.bodies[-1] == b"abcdefg"
    client.close()


@pytest.mark.parametrize("cache", [None, CacheConfig()])
def test_a_stream_comes_as_it_is_said(rig: Rig, cache: CacheConfig | None) -> None:
    go = threading.Event()

    async def events(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\ndata: 1\n\n")
        await writer.drain()
        await asyncio.to_thread(go.wait, PATIENCE)
        writer.write(b"data: 2\n\n")

    target = rig.target(events)
    rig.route("/", target.port, cache=cache)
    client = Client(rig.port)
    client.send(b"GET /e HTTP/1.1\r\nHost: h\r\n\r\n")
    client.until(b"data: 1\n\n")  # before there is more
    go.set()
    client.until(b"data: 2\n\n")
    client.close()


async def upgrades(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await target.request(reader)
    writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
    while data := await reader.read(100):
        writer.write(data.upper())


UPGRADE = b"GET /w HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def test_changes_under_load_fail_nothing(rig: Rig) -> None:
    target, web = rig.target(plain(b"ok")), rig.target(upgrades)
    rig.route("/w", web.port)
    rig.route("/a/", target.port)
    rig.route("/c/", target.port, cache=CacheConfig())
    sockets = [Client(rig.port).send(UPGRADE) for _ in range(3)]
    for s in sockets:
        assert s.answer().status == 101
    stop = threading.Event()
    wrong: list[Any] = []
    count = [0, 0, 0]

    def load(n: int) -> None:
        client = Polite(rig.port)
        try:
            while not stop.is_set():
                for path in ("/a/1", "/c/1"):
                    got = client.get(path)
                    count[n] += 1
                    if got.status != 200 or got.body != b"ok":
                        wrong.append(got)
        except (OSError, EOFError, AssertionError, ValueError) as e:
            wrong.append(e)

    threads = [threading.Thread(target=load, args=(n,)) for n in range(3)]
    for t in threads:
        t.start()
    for n in range(20):
        rig.route(f"/x{n}/", target.port)
        assert ask(rig, f"/x{n}/1").body == b"ok"
    stop.set()
    for t in threads:
        t.join(PATIENCE)
    assert wrong == [] and min(count) > 0
    for s in sockets:
        assert s.send(b"still").exactly(5) == b"STILL"
        s.close()


def test_everything_is_counted_and_logged(rig: Rig) -> None:
    target = rig.target(plain(b"ok", "Cache-Control: max-age=100"))
    rig.route("/a/", target.port, key="default/a")
    rig.route("/c/", target.port, key="default/c", cache=CacheConfig())
    client = Polite(rig.port)
    for path in ["/a/1"] * 7 + ["/c/1"] * 5 + ["/a/x?q=%22,%22status%22:500"] + ["/a/missing", "/nowhere"]:
        client.get(path)
    client.close()
    rules = {r.key: r for r in rig.gate.table.rules}
    deadline = time.monotonic() + PATIENCE

    def lines() -> list[Any]:
        file = rig.folder / "access.log"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    while len(lines()) < 15 or sum(sum(r.counters.statuses.values()) for r in rules.values()) < 14:
        assert time.monotonic() < deadline, (lines(), [r.counters.statuses for r in rules.values()])
        time.sleep(0.05)
    assert {k: r.counters.statuses for k, r in rules.items()} == {"default/a": {200: 9}, "default/c": {200: 5}}
    assert rules["default/c"].counters.cache == {"stored": 1, "hit": 4}
    assert sum(b for r in rules.values() for b in [r.counters.bytes]) == 28
    assert all(sum(r.counters.buckets) == sum(r.counters.statuses.values()) for r in rules.values())
    found = lines()
    assert sorted({tuple(sorted(f)) for f in found}) == [
        tuple(
            sorted(
                ["time", "client", "method", "host", "path", "status", "bytes", "seconds", "route", "target", "cache"]
            )
        )
    ]
    assert {f["client"] for f in found} == {"127.0.0.1"}


# -- of nginx alone ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, engine="nginx")
    try:
        yield made
    finally:
        made.close()


@needs_nginx
def test_what_nginx_does_not_take_changes_nothing(nginx: Rig) -> None:
    from edgeward.core.errors import EdgewardError

    target = nginx.target(plain(b"ok"))
    nginx.route("/", target.port)
    pid = nginx.gate.front.engine.pid
    port = nginx.port
    with pytest.raises(EdgewardError) as e:
        nginx.apply(listen=("192.0.2.77", port))
    assert "192.0.2.77" in str(e.value) and e.value.field == "$.gateway.engine"
    assert ask(nginx, "/").body == b"ok" and nginx.gate.front.engine.pid == pid


@needs_nginx
def test_one_that_does_not_take_it_in_earnest_goes_on_by_the_old(nginx: Rig) -> None:
    """The test said yes, and then nginx did not: what was there stays, and is written back."""
    target = nginx.target(plain(b"ok"))
    nginx.route("/", target.port)
    engine = nginx.gate.front.engine
    written = engine._config.read_text()
    with socket.socket() as taken:  # a port that somebody takes after the test
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        engine._apply_time = 1.0
        nginx.apply(listen=("127.0.0.1", taken.getsockname()[1]))
    assert engine.refused == 1 and engine._config.read_text() == written
    assert [r for r, _ in nginx.heard.events] == ["EngineRefused"]
    assert ask(nginx, "/").body == b"ok"
    engine._apply_time = PATIENCE
    nginx.route("/after/", target.port)
    assert engine.refused == 1 and '"/after/"' in engine._config.read_text()
    assert ask(nginx, "/after/1").body == b"ok"


@needs_nginx
def test_one_that_is_killed_is_started_again(nginx: Rig) -> None:
    import os
    import signal

    target = nginx.target(plain(b"ok"))
    nginx.route("/", target.port)
    engine = nginx.gate.front.engine
    os.kill(engine.pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(EOFError, ConnectionError):
            if engine.starts == 2 and ask(nginx, "/").body == b"ok":
                break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [r for r, _ in nginx.heard.events] == ["EngineEnded"]


@needs_nginx
def test_from_one_engine_to_the_other_and_back(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    try:
        target = rig.target(plain(b"ok"))
        for engine, explained in (("embedded", None), ("nginx", "nginx by itself"), ("embedded", None)):
            rig.engine = engine
            rig.route(f"/{len(rig.routes)}/", target.port)
            path = f"/{len(rig.routes) - 1}/x"
            assert ask(rig, path).body == b"ok"
            assert rig.do(_explained(rig, path, "GET", "h", {})).get("engine") == explained
    finally:
        rig.close()


def test_without_nginx_the_plane_serves_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEWARD_NGINX", raising=False)
    monkeypatch.setattr("edgeward.gateway.engine.shutil.which", lambda *_, **__: None)
    rig = Rig(tmp_path, engine="nginx")
    try:
        target = rig.target(plain(b"ok"))
        rig.route("/", target.port)
        assert ask(rig, "/").body == b"ok"
        assert [r for r, _ in rig.heard.events] == ["EngineMissing"]
    finally:
        rig.close()


def test_msgspec_knows_the_engines() -> None:
    from edgeward.core.errors import Invalid
    from edgeward.gateway.rules import decode

    with pytest.raises(Invalid):
        decode({"engine": "caddy"})
    assert msgspec.to_builtins(decode({"engine": "nginx"}))["engine"] == "nginx"


@needs_nginx
def test_an_engine_that_cannot_start_leaves_the_ports_to_the_plane(tmp_path: Path) -> None:
    from edgeward.core.errors import EdgewardError

    rig = Rig(tmp_path)
    try:
        target = rig.target(plain(b"ok"))
        rig.route("/", target.port)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(EdgewardError, match="cannot listen"):
                rig.apply(listen=taken.getsockname()[:2], engine="nginx")
        assert ask(rig, "/").body == b"ok"
        rig.engine = "nginx"
        rig.apply()
        assert ask(rig, "/").body == b"ok" and rig.gate.front.engine.pid
    finally:
        rig.close()


def test_what_is_kept_is_never_older_than_it_was(rig: Rig) -> None:
    """The target counts; each purge is seen, and nobody gets an answer that was gone already."""

    async def counting(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await target.request(reader)
            body = b"%06d" % len(target.heads)
            writer.write(b"HTTP/1.1 200 OK\r\nCache-Control: max-age=600\r\nContent-Length: 6\r\n\r\n" + body)

    target = rig.target(counting)
    rig.route("/n/", target.port, cache=CacheConfig())
    client, seen = Polite(rig.port), 0
    for _ in range(3):
        rig.do(_purged(rig, prefix="/n/"))
        deadline, before = time.monotonic() + PATIENCE, seen
        while seen == before:
            assert time.monotonic() < deadline
            got = int(client.get("/n/1").body)
            assert got >= seen
            seen = got
        for _ in range(20):
            assert int(client.get("/n/1").body) == seen
    client.close()
    assert len(target.heads) == seen
