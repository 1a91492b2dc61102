"""What strangers try at the door, with raw sockets: nothing of it reaches a target, and nobody else suffers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from tests.gateway.rig import Client, Rig, Target, plain

from edgeward.gateway import door, gate
from edgeward.gateway.rules import CacheConfig

Connect = Callable[[], Client]

HOST = b"Host: h\r\n"
EVIL = b"GET /evil HTTP/1.1\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL, 400),  # noqa: E501
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nContent-Length: 30\r\n\r\nabc" + EVIL, 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: h\n\n", 400),
        (b"GET /a/../evil HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /%2e%2e/evil HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET //evil HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET http://other/evil HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Connection: x-forwarded-for\r\n\r\n", 400),
        (b"CONNECT evil:443 HTTP/1.1\r\n" + HOST + b"\r\n", 501),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 40000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n" * 200 + b"\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", 400),
    ],
)  # fmt: skip
def test_refused_before_any_target_hears_of_it(rig: Rig, client: Connect, data: bytes, status: int) -> None:
    target = rig.target(plain())
    rig.route("/", target.port)
    c = client().send(data)
    got = c.answer()
    assert (got.status, got.headers["connection"]) == (status, "close")
    assert got.headers["content-type"] == "application/problem+json"
    assert c.closed()
    assert target.heads == []


def test_a_bad_chunk_ends_the_request_at_both_sides(rig: Rig, client: Connect) -> None:
    target = rig.target(plain())
    rig.route("/", target.port)
    c = client().send(
        b"POST / HTTP/1.1\r\n"
        + HOST
        + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n"
    )
    assert c.answer().status == 400
    assert c.closed()
    # the target got no end of that body, so it never took the request for whole
    assert target.bodies == []
    assert client().get("/").status == 200


def test_what_follows_a_refused_body_is_no_request(rig: Rig, client: Connect) -> None:
    """Routes that refuse at once must not read the body as the next request."""
    target = rig.target(plain())
    rig.route("/", target.port, body=10)
    rig.route("/none", to="service")
    inner = b"GET /evil HTTP/1.1\r\nHost: h\r\n\r\n"
    for path, status in ((b"/", 413), (b"/none", 503)):
        c = client().send(
            b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(inner) + inner
        )
        assert c.answer().status == status
        assert c.closed()
    assert target.heads == []


def test_a_body_flood_is_cut_at_the_limit(rig: Rig, client: Connect) -> None:
    target = rig.target(plain())
    rig.route("/", target.port, body=1000)
    assert client().send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1001\r\n\r\n").answer().status == 413
    c = client().send(b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
    c.send(b"3e8\r\n" + b"a" * 1000 + b"\r\n1\r\na\r\n")
    assert c.answer().status == 413
    assert c.closed()


def test_slow_ones_are_sent_away(rig: Rig, client: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HEAD_TIME", 0.1)
    monkeypatch.setattr(door, "BODY_TIME", 0.1)
    monkeypatch.setattr(door, "IDLE_TIME", 0.1)
    target = rig.target(plain())
    rig.route("/", target.port)
    head = client().send(b"GET / HTTP/1.1\r\nHost: h\r\nX-")
    body = client().send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\nabc")
    idle = client()
    assert idle.get("/").status == 200
    assert head.answer().status == 408
    assert body.answer().status == 408
    assert head.closed()
    assert body.closed()
    assert idle.closed()


def test_pipelined_requests_are_answered_in_their_order(rig: Rig, client: Connect) -> None:
    target = rig.target(plain(b"t"))
    rig.route("/", target.port)
    c = client().send(b"".join(b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n" % n for n in range(50)))
    assert [c.answer().body for _ in range(50)] == [b"t"] * 50
    assert [h.split(b" ")[1] for h in target.heads] == [b"/%d" % n for n in range(50)]


def test_claims_of_clients_do_not_reach_the_target(rig: Rig, client: Connect) -> None:
    target = rig.target(plain())
    rig.route("/", target.port)
    client().get(
        "/", "X-Forwarded-For: 6.6.6.6", "X-Forwarded-Host: evil", "Forwarded: for=6.6.6.6", "X-Original-URL: /admin",
        "X-Rewrite-URL: /admin", "X-HTTP-Method-Override: DELETE", "X-Real-IP: 6.6.6.6", "TE: trailers",
         "Keep-Alive: 1", "X_Forwarded_For: 6.6.6.6", "X-Forwarded_Host: evil", "Transfer_Encoding: chunked",
        "Proxy-Authorization: Basic x", "X-Mine: 1",
    )  # fmt: skip
    head = target.heads[0].lower()
    for word in (b"6.6.6.6", b"evil", b"admin", b"delete", b"trailers", b"chunked", b"keep-alive", b"proxy-auth"):
        assert word not in head
    assert b"x-mine: 1\r\n" in head
    assert b"x-forwarded-for: 127.0.0.1\r\n" in head


def test_a_loop_is_noticed(rig: Rig, client: Connect) -> None:
    rig.route("/", rig.port)
    got = client().get("/")
    assert got.status == 508
    target = rig.target(plain())
    rig.route("/on", target.port)
    for other in ("1.1 n10.edgeward", "1.1 an1.edgeward", "1.1 edgeward-n10"):
        assert client().get("/on", f"Via: {other}").status == 200, "another node, of a longer name"


def test_what_is_remembered_of_a_head_ends_with_the_rules(rig: Rig, client: Connect) -> None:
    one, two = rig.target(plain(b"one")), rig.target(plain(b"two"))
    rig.route("/", one.port)
    c = client()
    assert c.get("/").body == b"one"
    rig.routes.clear()
    rig.route("/", two.port)
    assert c.get("/").body == b"two"
    rig.routes.clear()
    rig.apply()
    assert c.get("/").status == 404


def test_methods_and_hosts(rig: Rig, client: Connect) -> None:
    target = rig.target(plain(b"x"))
    rig.route("/a", target.port, methods=("GET",))
    rig.route("/b", target.port, host="example.org")
    c = client()
    got = c.get("/a", method="DELETE")
    assert (got.status, got.headers["allow"]) == (405, "GET, HEAD")
    assert c.get("/b").status == 404
    assert c.get("/b", host="example.org:80").status == 200
    head = c.get("/a", method="HEAD")
    assert (head.status, head.headers["content-length"], head.body) == (200, "1", b"")
    assert c.get("/a").status == 200


def test_http_1_0(rig: Rig, client: Connect) -> None:
    rig.route("/", rig.target(plain(b"old")).port)
    c = client().send(b"GET / HTTP/1.0\r\n\r\n")
    got = c.answer()
    assert (got.body, got.headers["connection"]) == (b"old", "close")
    assert c.closed()
    c = client().send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert c.answer().headers["connection"] == "keep-alive"
    assert c.send(b"GET / HTTP/1.0\r\n\r\n").answer().body == b"old"


def test_expect_continue(rig: Rig, client: Connect) -> None:
    target = rig.target(plain())
    rig.route("/", target.port, body=10)
    c = client().send(b"PUT / HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert c.answer().status == 100
    assert c.send(b"hello").answer().status == 200
    assert target.bodies == [b"hello"]
    c = client().send(b"PUT / HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 50\r\n\r\n")
    assert c.answer().status == 413


def test_what_is_sent_ahead_is_not_kept_without_bound(rig: Rig, client: Connect) -> None:
    async def silent(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    rig.route("/", rig.target(silent).port)
    c = client()
    c.socket.settimeout(0.5)
    one = b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 1000 + b"\r\n\r\n"
    with pytest.raises(TimeoutError):  # the gateway reads no more
        for _ in range(64):
            c.send(one * 1000)
    (held,) = rig.gate.doors
    assert len(held._buffer) < 512 * 1024


def test_idle_connections_make_room_for_new_ones(rig: Rig, client: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "CONNECTIONS", 3)
    go = asyncio.Event()

    async def waits(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        await go.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()

    rig.route("/", rig.target(plain(b"x")).port)
    rig.route("/busy", rig.target(waits).port)
    busy = client().send(b"GET /busy HTTP/1.1\r\nHost: h\r\n\r\n")
    idle = [client() for _ in range(2)]
    for c in idle:
        assert c.get("/").status == 200
    for _ in range(4):  # each takes the place of one that does nothing
        assert client().get("/").status == 200
    assert all(c.closed() for c in idle)
    for _ in range(4):  # and of one that does not say its head to its end
        slow = client().send(b"GET / HTTP/1.1\r\nHo")
        rig.do(_begun(rig, slow))
    assert client().get("/").status == 200
    rig.call(go.set)
    assert busy.answer().status == 200


async def _begun(rig: Rig, c: Client) -> None:
    """Until its first bytes are there."""
    port = c.socket.getsockname()[1]
    async with asyncio.timeout(30):
        while not any(  # noqa: ASYNC110 - looking, the gate has no event
            d.beginning and d.transport.get_extra_info("peername")[1] == port for d in rig.gate.doors if d.transport
        ):
            await asyncio.sleep(0.01)


def test_a_customer_of_ipv6_has_many_addresses_and_one_rate(rig: Rig, client: Connect) -> None:
    rig.route("/", rig.target(plain(b"x")).port, rate=0.001, burst=2)
    c = client()
    assert c.get("/").status == 200, "the door is there, and has asked as 127.0.0.1"
    (door,) = rig.gate.doors
    for address, status in (
        ("2001:db8::1", 200), ("2001:db8::2", 200), ("2001:db8:0:0:ffff::3", 429), ("2001:db8:0:1::1", 200),
    ):  # fmt: skip
        door.client = address
        assert c.get("/").status == status, address


def test_a_client_that_asks_too_often(rig: Rig, client: Connect) -> None:
    target = rig.target(plain(b"x", "Cache-Control: max-age=60"))
    rig.route("/", target.port, rate=0.001, burst=3)
    rig.route("/cached", target.port, rate=0.001, burst=2, cache=CacheConfig())
    c = client()
    assert [c.get("/").status for _ in range(5)] == [200, 200, 200, 429, 429]
    got = c.get("/")
    assert int(got.headers["retry-after"]) > 0
    assert b"limits.rate" in got.body
    # what is in the memory is bounded as well; an unrelated change gives nobody more
    assert [c.get("/cached").status for _ in range(3)] == [200, 200, 429]
    rig.route("/other", target.port)
    assert c.get("/cached").status == 429
    refused = client().send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 26\r\n\r\nGET /other HTTP/1.1\r\n\r\n123")
    assert refused.answer().status == 429
    assert refused.closed()
