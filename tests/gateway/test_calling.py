"""Requests that functions answer, and what of their replies becomes an answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.gateway.rig import PATIENCE, Client, Rig

from edgeward.core.invocation import MAX_BODY, Call, CallFailed, Reply
from edgeward.gateway import calling
from edgeward.gateway.rules import CacheConfig

Connect = Callable[[], Client]


def function(rig: Rig, answer: Callable[[Call], Any], path: str = "/f", **more: Any) -> list[Call]:
    """A route to a function that answers with what ``answer`` gives (or awaits); the calls that it got."""
    calls: list[Call] = []

    async def run(call: Call) -> Reply:
        calls.append(call)
        got = answer(call)
        reply: Reply = await got if asyncio.iscoroutine(got) else got
        return reply

    rig.functions.known["default/f"] = run
    rig.route(path, to="function", target="Function/f", function="default/f", **more)
    return calls


def test_a_call_and_its_answer(rig: Rig, client: Connect) -> None:
    calls = function(
        rig, lambda c: Reply(201, [("Content-Type", "text/plain"), ("X-A", "1")], b"<" + c.event.data + b">"),
        version="canary",
    )  # fmt: skip
    c = client()
    got = c.get(
        "/f?a=b", "Content-Type: text/x", "X-Forwarded-For: evil", "Connection: close", method="POST", body=b"edge"
    )
    assert (got.status, got.body, got.headers["content-type"], got.headers["x-a"]) == (
        201,
        b"<edge>",
        "text/plain",
        "1",
    )
    (call,) = calls
    event = call.event
    assert (call.function, call.version, call.key) == ("default/f", "canary", "127.0.0.1")
    assert (event.source, event.type, event.datacontenttype) == (
        "/routes/default/r0",
        "edgeward.http.request",
        "text/x",
    )
    assert event.http is not None
    assert (event.http.method, event.http.path, event.http.query, event.http.client) == (
        "POST",
        "/f",
        "a=b",
        "127.0.0.1",
    )
    assert [h for h in event.http.headers if h[0] in ("x-forwarded-for", "connection")] == []
    c = client()
    assert [c.get("/f", method="POST", body=b"%d" % n).body for n in range(3)] == [b"<0>", b"<1>", b"<2>"]
    assert c.get("/f").body == b"<>"
    assert c.get("/f", method="HEAD").body == b""
    assert len({x.event.id for x in calls}) == len(calls)
    c.send(b"POST /f HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")
    assert c.answer().body == b"<abc>"


@pytest.mark.parametrize(
    ("sticky", "headers", "key"),
    [
        (("", ""), ["X-User: anna"], "127.0.0.1"),
        (("x-user", ""), ["X-User: anna"], "anna"),
        (("x-user", ""), [], "127.0.0.1"),
        (("cookie", "id"), ["Cookie: a=b; id=anna=1; c=d"], "anna=1"),
        (("cookie", "id"), ["Cookie: xid=anna; id2=bert"], "127.0.0.1"),
        (("cookie", "id"), [], "127.0.0.1"),
    ],
)
def test_a_route_says_who_is_asking(
    rig: Rig, client: Connect, sticky: tuple[str, str], headers: list[str], key: str
) -> None:
    calls = function(rig, lambda c: Reply(200, []), sticky=sticky)
    assert client().get("/f", *headers).status == 200
    assert [c.key for c in calls] == [key]


def test_refusals_name_function_and_limit(rig: Rig, client: Connect) -> None:
    def fails(call: Call) -> Reply:
        kind = call.event.data.decode()
        raise CallFailed(kind, "no", function="f", limit={"timeout": "2s"}, retry_after=2.0 if kind == "busy" else 0)  # type: ignore[arg-type]

    function(rig, fails)
    c = client()
    for kind, status in (("timeout", 504), ("memory", 502), ("busy", 503), ("unknown", 404)):
        got = c.get("/f", method="POST", body=kind.encode())
        doc = json.loads(got.body)
        assert (got.status, got.headers["content-type"]) == (status, "application/problem+json")
        assert (doc["function"], doc["limit"], doc["route"]) == ("f", {"timeout": "2s"}, "Route/default/r0")
        assert got.headers.get("retry-after") == ("2" if kind == "busy" else None)


def test_an_event_has_its_bound(rig: Rig, client: Connect) -> None:
    calls = function(rig, lambda c: Reply(200, [], b""))
    c = client().send(b"POST /f HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1))
    assert c.answer().status == 413
    assert c.closed()
    assert calls == []


def test_events_have_a_bound_all_together(rig: Rig, client: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "HELD", 1000)
    calls = function(rig, lambda c: Reply(200, [], b""))
    waits = client().send(b"POST /f HTTP/1.1\r\nHost: h\r\nContent-Length: 2000\r\n\r\n" + bytes(900))
    guard = time.monotonic() + PATIENCE
    while rig.call(lambda: rig.gate.held) < 900:
        assert time.monotonic() < guard
    assert client().get("/f", method="POST", body=bytes(200)).status == 503
    assert waits.send(bytes(1100)).answer().status == 503
    assert rig.call(lambda: rig.gate.held) == 0
    assert client().get("/f", method="POST", body=b"x").status == 200
    assert len(calls) == 1


def test_what_a_function_says_is_not_trusted_to_be_http(rig: Rig, client: Connect) -> None:
    headers = [
        ("X-Ok", "1"), ("Bad Name", "1"), ("X-Split", "a\r\nSet-Cookie: evil"), ("Content-Length", "999"),
        ("Transfer-Encoding", "chunked"), ("Connection", "upgrade"), ("X\r\nY", "1"),
        ("X-Nul", "a\0"), ("X-Wide", "\u4e00"),
    ]  # fmt: skip
    function(rig, lambda c: Reply(200, headers, b"body"))
    c = client()
    for _ in range(2):
        got = c.get("/f")
        assert (got.status, got.body) == (200, b"body")
        assert got.headers.keys() == {"x-ok", "content-length", "date"}


@pytest.mark.parametrize("status", [100, 101, 199, 0, 600, 999])
def test_a_status_that_is_none(rig: Rig, client: Connect, status: int) -> None:
    function(rig, lambda c: Reply(status, [], b"x"))
    assert client().get("/f").status == 502


def test_pieces_come_as_they_are_made(rig: Rig, client: Connect) -> None:
    more = asyncio.Event()
    closed = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        try:
            yield b"one"
            await more.wait()
            yield b""
            yield b"two"
        finally:
            closed.set()

    function(rig, lambda c: Reply(200, [], chunks=pieces()))
    c = client().send(b"GET /f HTTP/1.1\r\nHost: h\r\n\r\n")
    c.until(b"one\r\n")
    rig.call(more.set)
    c.until(b"3\r\ntwo\r\n0\r\n\r\n")
    rig.do(asyncio.wait_for(closed.wait(), 30))
    # a client that goes away ends the function's work
    more.clear()
    closed.clear()
    c = client().send(b"GET /f HTTP/1.1\r\nHost: h\r\n\r\n")
    c.until(b"one\r\n")
    c.close()
    rig.do(asyncio.wait_for(closed.wait(), 30))


def test_one_that_breaks_off_is_seen_as_such(rig: Rig, client: Connect) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        raise CallFailed("crashed", "its process ended", function="f")

    function(rig, lambda c: Reply(200, [], chunks=pieces()))
    with pytest.raises(EOFError):
        client().get("/f")


def test_a_client_that_goes_away_gives_the_call_up(rig: Rig, client: Connect) -> None:
    begun, gone = asyncio.Event(), asyncio.Event()

    async def waits() -> Reply:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()
        raise AssertionError

    function(rig, lambda c: waits())
    c = client().send(b"GET /f HTTP/1.1\r\nHost: h\r\n\r\n")
    rig.do(asyncio.wait_for(begun.wait(), 30))
    c.close()
    rig.do(asyncio.wait_for(gone.wait(), 30))


def test_a_fault_of_ours_is_an_answer(rig: Rig, client: Connect) -> None:
    def breaks(call: Call) -> Reply:
        raise RuntimeError("a bug")

    function(rig, breaks)
    c = client()
    assert c.get("/f").status == 500
    assert c.get("/f").status == 500


def test_answers_of_functions_are_kept_as_well(rig: Rig, client: Connect) -> None:
    calls = function(rig, lambda c: Reply(200, [("cache-control", "max-age=60")], b"x"), cache=CacheConfig())
    c = client()
    assert [c.get("/f").body for _ in range(3)] == [b"x"] * 3
    assert len(calls) == 1
    assert c.get("/f").headers["cache-status"].startswith("edgeward; hit")


def test_a_route_to_a_function_that_is_gone_does_not_say_ready(rig: Rig, client: Connect) -> None:
    function(rig, lambda c: Reply(200, [], b""), key="default/here")
    function(rig, lambda c: Reply(200, [], b""), path="/g", key="default/gone", missing=True)
    here, gone = (rig.heard.statuses[f"default/{n}"] for n in ("here", "gone"))
    assert here is not None and here["phase"] == "Ready"
    assert gone is not None and (gone["phase"], "requests get 404" in gone["message"]) == ("NoEndpoints", True)


def test_no_functions_here(rig: Rig, client: Connect) -> None:
    rig.gate.invoker = None
    rig.route("/f", to="function", target="Function/f", function="default/f")
    assert client().get("/f").status == 404
