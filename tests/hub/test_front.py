"""One port for API and links: real sockets, with and without TLS, through the server that the hub runs."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from tests.core.pair import free_port, until

from edgeward.core.daemon import http_server
from edgeward.core.identity import HubIdentity
from edgeward.hub.front import Links, front_protocol

HEAD = b"GET /leafnode HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n"
BIG = 32 << 20

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def front(root: Path, tls: bool, upstream: Handler | None = _echo) -> AsyncIterator[tuple[Links, Connect]]:
    """``upstream`` None: nobody listens there."""

    async def hello(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{request.method} {request.url.path} {len(await request.body())}")

    app = Starlette(routes=[Route("/{rest:path}", hello, methods=["GET", "POST"])])
    inner = await asyncio.start_server(upstream, "127.0.0.1", 0) if upstream else None
    links = Links(lambda: ("127.0.0.1", inner.sockets[0].getsockname()[1] if inner else free_port()))
    port = free_port()
    options: dict[str, str] = {}
    context: ssl.SSLContext | None = None
    if tls:
        identity = HubIdentity.open(root)
        options = {"ssl_certfile": str(identity.tls_file), "ssl_keyfile": str(identity.tls_file)}
        context = ssl.create_default_context(cadata=identity.ca_pem)
        context.check_hostname = False

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", port, ssl=context)

    try:
        async with (
            asyncio.timeout(240),
            http_server(app, host="127.0.0.1", port=port, http=front_protocol(links), **options),
        ):
            yield links, connect
            links.close()
    finally:
        if inner is not None:
            inner.close()


async def response(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    return head.split(b"\r\n")[0], await reader.readexactly(length)


@pytest.mark.parametrize("tls", [False, True])
def test_requests_reach_the_api_and_links_nats(tmp_path: Path, tls: bool) -> None:
    async def body() -> None:
        async with front(tmp_path, tls) as (links, connect):
            reader, writer = await connect()
            writer.write(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
            assert await response(reader) == (b"HTTP/1.1 200 OK", b"POST /a 3")
            writer.write(HEAD)  # a link is told by the first request of a connection only
            assert (await response(reader))[1] == b"GET /leafnode 0"
            assert not links.open
            link, to_link = await connect()
            to_link.write(HEAD + b"\x00more")
            assert await link.readexactly(len(HEAD) + 5) == HEAD + b"\x00more", "nothing of it is lost or changed"
            to_link.write(b"GET /a HTTP/1.1\r\n\r\n")
            assert await link.readexactly(19) == b"GET /a HTTP/1.1\r\n\r\n"
            assert len(links.open) == 1
            writer.write(b"GET /still HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await response(reader))[1] == b"GET /still 0"
            writer.close()
            to_link.close()
            await until(lambda: not links.open)

    asyncio.run(body())


@pytest.mark.parametrize(
    ("head", "got"),
    [
        (HEAD, None),
        (b"GET /leafnod HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /leafnod 0"),
        (b"GET /leaf HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /leaf 0"),
        (b"POST /leafnode HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b"POST /leafnode 0"),
    ],
)
def test_a_head_that_comes_byte_by_byte(tmp_path: Path, head: bytes, got: bytes | None) -> None:
    async def body() -> None:
        async with front(tmp_path, False) as (_, connect):
            reader, writer = await connect()
            for byte in head:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0)
            if got is None:
                assert await reader.readexactly(len(head)) == head
            else:
                assert (await response(reader))[1] == got
            writer.close()

    asyncio.run(body())


def test_without_nats_a_link_is_told_to_come_again(tmp_path: Path) -> None:
    async def body() -> None:
        async with front(tmp_path, False, None) as (links, connect):
            reader, writer = await connect()
            writer.write(HEAD)
            assert await response(reader) == (b"HTTP/1.1 503 Service Unavailable", b"")
            assert await reader.read() == b"", "and its connection ends"
            assert not links.open
            writer.close()

    asyncio.run(body())


@pytest.mark.parametrize("tls", [False, True])
def test_a_side_that_ends_ends_the_other(tmp_path: Path, tls: bool) -> None:
    ended = asyncio.Event()

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(HEAD))
        writer.write(b"hello")
        if await reader.read(1) == b"x":
            writer.write(b"bye")
        else:
            ended.set()
        writer.close()

    async def body() -> None:
        async with front(tmp_path, tls, upstream) as (links, connect):
            reader, writer = await connect()
            writer.write(HEAD)
            assert await reader.readexactly(5) == b"hello"
            writer.write(b"x")
            assert await reader.read() == b"bye", "what it said last still arrives"
            writer.close()
            reader, writer = await connect()
            writer.write(HEAD)
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            await ended.wait()
            await until(lambda: not links.open)
            reader, writer = await connect()
            writer.write(HEAD)
            assert await reader.readexactly(5) == b"hello"
            links.close()
            assert await reader.read() == b"", "a hub that ends closes its links"
            assert not links.open
            writer.close()

    asyncio.run(body())


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("slow", ["node", "nats"])
def test_a_slow_side_slows_the_other_and_memory_stays_bounded(tmp_path: Path, slow: str, tls: bool) -> None:
    block = bytes(range(256)) * 1024
    wanted = hashlib.sha256(block * (BIG // len(block))).hexdigest()
    go_on, done = asyncio.Event(), asyncio.Event()
    seen: list[str] = []

    async def send(writer: asyncio.StreamWriter) -> None:
        for _ in range(BIG // len(block)):
            writer.write(block)
            await writer.drain()

    async def take(reader: asyncio.StreamReader) -> None:
        digest = hashlib.sha256()
        left = BIG
        while left:
            data = await reader.read(min(left, 1 << 20))
            assert data
            digest.update(data)
            left -= len(data)
        seen.append(digest.hexdigest())

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(HEAD))
        if slow == "node":
            await send(writer)
        else:
            await go_on.wait()
            await take(reader)
        await done.wait()
        writer.close()

    async def body() -> None:
        async with front(tmp_path, tls, upstream) as (links, connect):
            reader, writer = await connect()
            writer.write(HEAD)
            await until(lambda: len(links.open) == 1)
            (outer,) = links.open
            assert outer.other is not None
            fast, held = (outer.other, outer) if slow == "node" else (outer, outer.other)
            assert fast.transport is not None and held.transport is not None
            sending = asyncio.create_task(send(writer)) if slow == "nats" else None
            await until(lambda: not fast.transport.is_reading())  # type: ignore[union-attr]
            assert held.transport.get_write_buffer_size() < 2 << 20
            if slow == "node":
                await take(reader)
            else:
                go_on.set()
                await until(lambda: bool(seen))
            assert seen == [wanted], "and then all of it arrives"
            if sending is not None:
                await sending
            done.set()
            writer.close()

    asyncio.run(body())
