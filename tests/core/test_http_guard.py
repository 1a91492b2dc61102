"""Strangers at the door: slow heads, endless heads, large bodies, while others are served."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from tests.core.pair import free_port

from edgeward.core import http_guard, streaming
from edgeward.core.access import opened
from edgeward.core.api import build_app
from edgeward.core.audit import Audit
from edgeward.core.authz import Principal, administrator
from edgeward.core.daemon import http_server, memory_mb
from edgeward.core.errors import Unauthorized
from edgeward.core.resources import Resources
from edgeward.core.store_sqlite import SqliteStore

MIB = 1 << 20


def auth(token: str | None, _: Any) -> Principal:
    if token != "good":
        raise Unauthorized("no")
    return administrator("root")


@asynccontextmanager
async def door() -> AsyncIterator[int]:
    async def size(request: Request) -> Response:
        return PlainTextResponse(str(len(await streaming.read_body(request))))

    resources, port = Resources(SqliteStore(), Audit()), free_port()
    app = build_app(
        resources, resources.store, auth=auth, health=lambda: (True, {}), metrics=lambda: "", info={},
        extra_routes=[Route("/size", opened(size), methods=["POST"])],
    )  # fmt: skip
    async with http_server(app, host="127.0.0.1", port=port), asyncio.timeout(60):
        yield port


async def status(port: int, head: bytes, *, body: bytes = b"") -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + body)
    line = await reader.readline()
    writer.close()
    return int(line.split()[1])


GOOD = b"GET /api/v1/configs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer good\r\n\r\n"


def test_slow_heads_are_closed_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "HEAD_TIME", 1.0)

    async def body() -> None:
        async with door() as port:
            slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(200)]
            for n, (_, writer) in enumerate(slow):
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * (n % 3))  # some not even a byte of it
            assert await status(port, GOOD) == 200

            async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
                """A byte now and then does not make its time longer."""
                ended = asyncio.create_task(reader.read())
                while not ended.done():
                    await asyncio.wait({ended}, timeout=0.2)
                    if not writer.is_closing():
                        writer.write(b"z")
                return await ended

            answers = await asyncio.gather(*(drip(*s) for s in slow))
            assert {a.split(b"\r\n")[0] for a in answers} == {b"HTTP/1.1 408 Request Timeout"}
            # a connection that did its part stays, and its next head has its own time
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):
                writer.write(GOOD)
                assert b" 200 " in await reader.readline()
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
            writer.write(GOOD[:20])
            assert b" 408 " in await reader.readline()
            writer.close()

    asyncio.run(body())


def test_an_endless_head_is_not_kept() -> None:
    async def body() -> None:
        async with door() as port:
            before = memory_mb(os.getpid())

            async def flood() -> int:
                _reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET / HTTP/1.1\r\n")
                sent = 0
                try:
                    while sent < 64 * MIB:
                        writer.write(b"X-%d: %b\r\n" % (sent, b"y" * 16384))
                        sent += 16384
                        await writer.drain()
                except OSError:
                    pass
                return sent

            sent = await asyncio.gather(*(flood() for _ in range(20)))
            assert max(sent) < 32 * MIB, "the connection ended long before"
            assert await status(port, GOOD) == 200
            assert memory_mb(os.getpid()) - before < 200
            assert await status(port, b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000) == 431
            # a large body behind a small head, in one piece, is none
            assert (
                await status(port, b"POST /size HTTP/1.1\r\nContent-Length: 900000\r\n\r\n", body=b"b" * 900_000) == 200
            )

    asyncio.run(body())


def test_64_mib_of_body_are_refused_by_their_announcement_or_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with door() as port:
            head = b"POST /size HTTP/1.1\r\nHost: x\r\n"
            assert await status(port, head + b"Content-Length: %d\r\n\r\n" % (64 * MIB)) == 413
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
            piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
            try:
                for _ in range(1024):
                    writer.write(piece)
                    await writer.drain()
            except OSError:
                pass
            assert b" 413 " in await reader.readline()
            writer.close()
            # without a token nothing of it is read at all
            unknown = b"POST /api/v1/configs HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (64 * MIB)
            assert await status(port, unknown) == 401
            monkeypatch.setattr(streaming, "BODY_TIME", 0.5)
            assert await status(port, head + b"Content-Length: 10\r\n\r\n", body=b"12345") == 408
            assert await status(port, GOOD) == 200

    asyncio.run(body())
