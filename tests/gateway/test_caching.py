"""The cache at work, between real clients and real servers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.gateway.rig import Client, Rig, Target, plain

from edgeward.core import clock
from edgeward.core.errors import Invalid
from edgeward.gateway import exchange
from edgeward.gateway.cache import http_date
from edgeward.gateway.rules import CacheConfig

Connect = Callable[[], Client]


class Clock:
    """The time that the cache sees."""

    def __init__(self) -> None:
        self.at = 1_800_000_000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    time = Clock()
    monkeypatch.setattr(clock, "now", time)
    yield time


def numbered(*headers: str, tag: bool = False, now: Clock | None = None) -> Callable[..., Any]:
    """Answers with the number of the request; with ``tag`` it says 304 to those who have the present one."""

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await target.request(reader)).decode().lower()
            version = getattr(target, "version", 1)
            status, body = "200 OK", f"{len(target.heads)}".encode()
            if getattr(target, "broken", False):
                status, body = "503 Service Unavailable", b"broken"
            if tag and f'if-none-match: "{version}"' in head:
                status, body = "304 Not Modified", b""
            lines = [f"HTTP/1.1 {status}", *headers]
            if now is not None:
                lines.append(f"Date: {http_date(now.at)}")
            if tag:
                lines.append(f'ETag: "{version}"')
            if not status.startswith("304"):
                lines.append(f"Content-Length: {len(body)}")
            writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if head.startswith("head") else body))
            await writer.drain()

    return script


def test_a_hit_says_so(rig: Rig, client: Connect, now: Clock) -> None:
    target = rig.target(numbered("Cache-Control: max-age=60", now=now))
    rig.route("/", target.port, cache=CacheConfig())
    c = client()
    first = c.get("/a")
    assert (first.body, first.headers["cache-status"]) == (b"1", "edgeward; fwd=uri-miss; fwd-status=200; stored")
    assert "age" not in first.headers
    now.at += 10
    for host in ("h", "h"):
        hit = c.get("/a", host=host)
        assert (hit.body, hit.headers["age"], hit.headers["cache-status"]) == (b"1", "10", "edgeward; hit; ttl=50")
    assert c.get("/a?q").body == b"2"
    assert c.get("/a", host="other").body == b"3"  # what a target was told of the client is in the key
    head = c.get("/a", method="HEAD")
    assert (head.status, head.headers["content-length"], head.headers["age"]) == (200, "1", "10")
    now.at += 50
    stale = c.get("/a")
    assert (stale.body, stale.headers["cache-status"]) == (b"4", "edgeward; fwd=stale; fwd-status=200; stored")
    old = client().send(b"GET /a HTTP/1.0\r\nHost: h\r\n\r\n").answer()
    assert (old.body, old.headers["connection"]) == (b"4", "close")
    assert len(target.heads) == 4


def test_unkeyed_headers_poison_nothing(rig: Rig, client: Connect, now: Clock) -> None:
    async def reflects(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await target.request(reader)
            writer.write(
                b"HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: %d\r\n\r\n" % len(head) + head
            )
            await writer.drain()

    rig.route("/", rig.target(reflects).port, cache=CacheConfig())
    evil = client().get(
        "/p", "X-Forwarded-Host: evil", "X-Forwarded-Proto: evil", "X-Host: evil", "X-Original-URL: /evil",
        "Forwarded: evil",
    )  # fmt: skip
    assert b"evil" not in evil.body
    assert client().get("/p").headers["cache-status"].startswith("edgeward; hit")


def test_validation(rig: Rig, client: Connect, now: Clock) -> None:
    target = rig.target(numbered("Cache-Control: max-age=60", tag=True, now=now))
    rig.route("/", target.port, cache=CacheConfig())
    c = client()
    assert c.get("/").body == b"1"
    now.at += 61
    same = c.get("/")
    assert (same.status, same.body, same.headers["age"]) == (200, b"1", "0")
    assert same.headers["cache-status"] == "edgeward; fwd=stale; fwd-status=304; stored; ttl=60"
    assert b'if-none-match: "1"\r\n' in target.heads[1]
    now.at += 61
    # the client's own condition is answered by what was validated
    theirs = c.get("/", 'If-None-Match: "1"')
    assert (theirs.status, theirs.body) == (304, b"")
    now.at += 61
    target.version = 2  # type: ignore[attr-defined]
    assert c.get("/").body == b"4"
    assert c.get("/", 'If-None-Match: "2"').status == 304
    assert c.get("/", 'If-None-Match: "1"').body == b"4"
    assert len(target.heads) == 4


def test_parts_of_what_is_kept(rig: Rig, client: Connect) -> None:
    target = rig.target(plain(b"0123456789", "Cache-Control: max-age=60", 'ETag: "1"'))
    rig.route("/", target.port, cache=CacheConfig())
    c = client()
    # asked for a part of what is not there: passed on, nothing is kept
    assert c.get("/", "Range: bytes=0-1").headers["cache-status"] == "edgeward; fwd=uri-miss; fwd-status=200"
    c.get("/")
    part = c.get("/", "Range: bytes=2-4")
    assert (part.status, part.body, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
    none = c.get("/", "Range: bytes=20-")
    assert (none.status, none.headers["content-range"]) == (416, "bytes */10")
    assert c.get("/", "Range: bytes=0-1,3-4").status == 200
    assert len(target.heads) == 2


def test_stays_up_when_the_target_is_gone(rig: Rig, client: Connect, now: Clock) -> None:
    target = rig.target(numbered("Cache-Control: max-age=60", now=now))
    rig.route("/", target.port, cache=CacheConfig(stale_if_error=600.0), failures=0)
    rig.route("/strict/", target.port, cache=CacheConfig(), failures=0)
    c = client()
    assert c.get("/").body == b"1"
    assert c.get("/strict/").body == b"2"
    now.at += 100
    target.broken = True  # type: ignore[attr-defined]
    got = c.get("/")
    assert (got.status, got.body) == (200, b"1")
    assert got.headers["cache-status"] == "edgeward; hit; ttl=-40; detail=stale-if-error-503"
    assert c.get("/strict/").status == 503
    port = target.port
    rig.routes.clear()
    rig.route("/", key="default/r0", cache=CacheConfig(stale_if_error=600.0))  # no endpoint at all
    assert c.get("/").headers["cache-status"] == "edgeward; hit; ttl=-40; detail=stale-if-error-503"
    rig.routes.clear()
    rig.route("/", port, key="default/r0", cache=CacheConfig(stale_if_error=600.0), failures=2, pause=3600.0)
    rig.call(target.server.close)
    for _ in range(5):  # nobody listens, and then the circuit is open
        assert c.get("/").status == 200
    now.at += 600
    assert c.get("/").status in (502, 503)


def test_renewed_behind_the_answer(rig: Rig, client: Connect, now: Clock) -> None:
    target = rig.target(numbered("Cache-Control: max-age=60, stale-while-revalidate=60", now=now))
    rig.route("/", target.port, cache=CacheConfig())
    c = client()
    assert c.get("/").body == b"1"
    now.at += 90
    stale = c.get("/")
    assert (stale.body, stale.headers["age"]) == (b"1", "90")

    async def renewed() -> None:
        async with asyncio.timeout(30):
            while len(target.heads) < 2 or rig.gate.exchanges:  # noqa: ASYNC110 - looking, the gate has no event
                await asyncio.sleep(0.01)

    rig.do(renewed())
    assert c.get("/").body == b"2"
    assert len(target.heads) == 2


def test_misses_of_the_same_are_one(rig: Rig, client: Connect) -> None:
    go = asyncio.Event()
    target = rig.target(plain(b"ok", "Cache-Control: max-age=60", go=go))
    rig.route("/", target.port, cache=CacheConfig())
    clients = [client().send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n") for _ in range(20)]

    async def waiting() -> None:
        async with asyncio.timeout(30):
            while sum(d.waiting for d in rig.gate.doors) < 19:  # noqa: ASYNC110 - looking, the gate has no event
                await asyncio.sleep(0.01)

    rig.do(waiting())
    # the one that asked first goes away: the others get the answer all the same
    leader = next(i for i, d in enumerate(clients) if not _waits(rig, d))
    clients.pop(leader).close()
    rig.call(go.set)
    assert [c.answer().body for c in clients] == [b"ok"] * 19
    assert len(target.heads) == 1


def test_a_client_that_sends_far_ahead_while_it_waits_is_read_on(rig: Rig, client: Connect) -> None:
    go = asyncio.Event()
    rig.route("/", rig.target(plain(b"ok", "Cache-Control: max-age=60", go=go)).port, cache=CacheConfig())
    first = client().send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")

    async def until(there: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not there():  # noqa: ASYNC110 - looking, the gate has no event
                await asyncio.sleep(0.01)

    rig.do(until(lambda: bool(rig.gate.fetching)))
    ahead = client()
    one = b"GET / HTTP/1.1\r\nHost: h\r\nX-Much: " + b"x" * 4000 + b"\r\n\r\n"
    ahead.send(one * 20)  # more than is read ahead, less than the kernel takes
    rig.do(until(lambda: any(d.waiting and d._paused for d in rig.gate.doors)))
    rig.call(go.set)
    assert first.answer().body == b"ok"
    assert [ahead.answer().body for _ in range(20)] == [b"ok"] * 20
    assert ahead.get("/").body == b"ok", "and is read as before"


def _waits(rig: Rig, c: Client) -> bool:
    port = c.socket.getsockname()[1]
    return any(d.waiting and d.transport.get_extra_info("peername")[1] == port for d in rig.gate.doors if d.transport)


def test_what_may_not_be_kept_is_asked_for_by_each(rig: Rig, client: Connect) -> None:
    target = rig.target(numbered("Cache-Control: private, max-age=60"))
    rig.route("/", target.port, cache=CacheConfig())
    c = client()
    assert [c.get("/").body for _ in range(3)] == [b"1", b"2", b"3"]
    assert c.get("/").headers["cache-status"] == "edgeward; fwd=uri-miss; fwd-status=200"


def test_unsafe_methods_make_it_unsure(rig: Rig, client: Connect) -> None:
    target = rig.target(numbered("Cache-Control: max-age=60"))
    rig.route("/", target.port, cache=CacheConfig())
    c = client()
    assert [c.get("/x").body, c.get("/x").body] == [b"1", b"1"]
    assert c.get("/x", method="POST", body=b"p").body == b"2"
    assert c.get("/x").body == b"3"


def test_vary(rig: Rig, client: Connect) -> None:
    target = rig.target(numbered("Cache-Control: max-age=60", "Vary: Accept-Language"))
    rig.route("/", target.port, cache=CacheConfig())
    c = client()
    assert c.get("/", "Accept-Language: de").body == b"1"
    en = c.get("/", "Accept-Language: en")
    assert (en.body, en.headers["cache-status"]) == (b"2", "edgeward; fwd=vary-miss; fwd-status=200; stored")
    assert c.get("/", "Accept-Language: de").body == b"1"
    assert c.get("/", "Accept-Language: en").body == b"2"


def test_too_large_and_cut_answers_are_not_kept(rig: Rig, client: Connect) -> None:
    big = rig.target(plain(b"x" * 2000, "Cache-Control: max-age=60"))
    rig.route("/big", big.port, cache=CacheConfig(object=1000))

    async def cut(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(
            b"HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
        )
        if target.connections > 1:
            writer.write(b"0\r\n\r\n")
        await writer.drain()

    rig.route("/cut", rig.target(cut).port, cache=CacheConfig())
    c = client()
    assert [len(c.get("/big").body) for _ in range(2)] == [2000, 2000]
    assert len(big.heads) == 2
    with pytest.raises(EOFError):
        client().get("/cut")
    assert c.get("/cut").headers["cache-status"] == "edgeward; fwd=uri-miss; fwd-status=200; stored"
    assert c.get("/cut").headers["cache-status"].startswith("edgeward; hit")


def test_only_from_the_cache(rig: Rig, client: Connect) -> None:
    target = rig.target(numbered("Cache-Control: max-age=60"))
    rig.route("/", target.port, cache=CacheConfig())
    c = client()
    assert c.get("/", "Cache-Control: only-if-cached").status == 504
    c.get("/")
    assert c.get("/", "Cache-Control: only-if-cached").status == 200
    assert len(target.heads) == 1


def test_another_target_has_its_own_answers(rig: Rig, client: Connect) -> None:
    one, two = (
        rig.target(plain(b"one", "Cache-Control: max-age=60")),
        rig.target(plain(b"two", "Cache-Control: max-age=60")),
    )
    rig.route("/", one.port, key="d/a", cache=CacheConfig(), target="one")
    c = client()
    assert [c.get("/").body, c.get("/").body] == [b"one", b"one"]
    rig.route("/x", one.port)  # an unrelated change keeps what is there
    assert c.get("/").headers["cache-status"].startswith("edgeward; hit")
    rig.routes.clear()
    rig.route("/", two.port, key="d/a", cache=CacheConfig(), target="two")
    assert [c.get("/").body, c.get("/").body] == [b"two", b"two"]


def test_purge_and_explain(rig: Rig, client: Connect) -> None:
    target = rig.target(numbered("Cache-Control: max-age=60"))
    rig.route("/", target.port, key="default/all", cache=CacheConfig())
    rig.route("/a", target.port, key="default/a", methods=("POST",))
    c = client()
    c.get("/a")

    def verb(name: str, **args: Any) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            return {k: v async for doc in rig.gate.verbs[name](args) for k, v in doc.items()}

        found: dict[str, Any] = rig.do(ask())
        return found

    said = verb("gateway.explain", url="http://h/a")
    assert (said["route"], said["target"], said["cache"]["state"]) == ("default/all", "test", "hit")
    assert said["considered"][0] == {"route": "default/a", "matches": False, "why": "method is not POST"}
    assert said["endpoints"][0]["circuit"] == "closed"
    assert verb("gateway.explain", url="http://h/b")["cache"] == {"state": "miss", "fwd": "uri-miss"}
    assert verb("gateway.explain", url="/a/../b")["status"] == 400
    assert verb("gateway.explain", url="/a", method="POST")["route"] == "default/a"
    assert verb("gateway.purge", url="http://h/%61") == {"purged": 1}, "whichever way it is spelled"
    assert c.get("/a").body == b"2"
    for bad in ({"prefix": "a"}, {"url": "http://[::1/a"}, {"url": "/a/../b"}, {"prefix": "/a//"}, {"url": "a"}):
        with pytest.raises(Invalid, match=r"(begins with a slash|is no URL|nothing can be kept)"):
            verb("gateway.purge", **bad)
    metrics = verb("gateway.stats")["metrics"]
    assert metrics['edgeward_gateway_requests_total{route="default/all",status="200"}'] == 2
    assert metrics['edgeward_gateway_cache_total{route="default/all",result="stored"}'] == 2


@pytest.mark.parametrize(
    ("line", "kept"),
    [("Set-Cookie: session=victim", True), ("Cache-Control: private, max-age=60", False), ("Vary: *", False)],
)
def test_what_a_304_says_to_one_client_is_no_one_elses(rig: Rig, client: Connect, line: str, kept: bool) -> None:
    """Many sites give a session's cookie with every answer, a 304 too."""

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            asked = b'if-none-match: "1"' in await target.request(reader)
            said = f"304 Not Modified\r\n{line}\r\nX-User: victim" if asked else "200 OK\r\nContent-Length: 1"
            control = "" if "Control" in line and asked else "Cache-Control: max-age=60\r\n"
            writer.write(f'HTTP/1.1 {said}\r\n{control}ETag: "1"\r\n\r\n{"" if asked else "x"}'.encode())
            await writer.drain()

    rig.route("/", rig.target(script).port, cache=CacheConfig())
    assert client().get("/").body == b"x"
    victim = client().get("/", "Cache-Control: no-cache")
    assert (victim.status, victim.body, victim.headers["x-user"]) == (200, b"x", "victim")
    assert "stored" not in victim.headers["cache-status"]
    other = client().get("/")
    assert other.body == b"x"
    assert "x-user" not in other.headers
    assert other.headers["cache-status"].startswith("edgeward; hit" if kept else "edgeward; fwd=uri-miss")


def test_a_first_client_that_reads_nothing_holds_nobody_up(rig: Rig, client: Connect) -> None:
    size = 12 * 1024**2  # more than sockets hold by themselves

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
        await writer.drain()

    rig.route("/", rig.target(script).port, cache=CacheConfig(object=16 * 1024**2), idle=3600.0)
    rig.apply(memory=256 * 1024**2)
    slow = client()
    slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    slow.exactly(10)
    got = client().get("/")
    assert (len(got.body), got.headers["cache-status"][:13]) == (size, "edgeward; hit")
    slow.close()
    assert rig.call(lambda: rig.gate.held) == 0


def test_what_is_being_kept_has_a_bound(rig: Rig, client: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "HELD", 200)
    rig.route("/", rig.target(numbered("Cache-Control: max-age=60", "X: " + "x" * 50)).port, cache=CacheConfig())
    rig.call(lambda: setattr(rig.gate, "held", 100))
    c = client()
    assert [c.get("/").body for _ in range(2)] == [b"1", b"2"], "passed on and not kept"
    rig.call(lambda: setattr(rig.gate, "held", 0))
    assert [c.get("/").body for _ in range(2)] == [b"3", b"3"]
