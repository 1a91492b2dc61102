"""A forward proxy (HTTP CONNECT) for tests: one that passes bytes, or one that looks into TLS with a CA of its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from edgeward.core.certs import Authority


class Proxy:
    def __init__(self, folder: Path, *, inspects: bool, login: str = "", upstream_ca: Path | None = None) -> None:
        #: Connections on which nothing came for so many seconds are dropped, and how many were.
        self.idle = 0.0
        self.dropped = 0
        self._login, self._inspects = login, inspects
        self.authority = Authority(folder)
        self.authority.server(folder / "tls.pem", ["127.0.0.1"])
        self._server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._server_tls.load_cert_chain(folder / "tls.pem")
        self._client_tls = ssl.create_default_context(cafile=str(upstream_ca)) if upstream_ca else None
        self.port = 0
        self.asked: list[str] = []
        #: Plain bytes that it saw in what clients sent: what an inspecting one could keep.
        self.seen = bytearray()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split("\r\n")[0].split(" ")
        assert method == "CONNECT"
        self.asked.append(target)
        given = [h.partition(":")[2].strip() for h in head.split("\r\n") if h.lower().startswith("proxy-authorization")]
        if self._login and given != ["Basic " + base64.b64encode(self._login.encode()).decode()]:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
            return
        host, _, port = target.rpartition(":")
        tls = self._client_tls if self._inspects else None
        up_reader, up_writer = await asyncio.open_connection(host, int(port), ssl=tls)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await writer.drain()
        if self._inspects:
            await writer.start_tls(self._server_tls)

        heard = asyncio.Event()

        async def watch() -> None:
            while self.idle:
                heard.clear()
                try:
                    async with asyncio.timeout(self.idle):
                        await heard.wait()
                except TimeoutError:
                    self.dropped += 1
                    writer.close()
                    up_writer.close()
                    return

        async def pump(a: asyncio.StreamReader, b: asyncio.StreamWriter, keep: bool) -> None:
            with contextlib.suppress(OSError, ssl.SSLError):
                while data := await a.read(65536):
                    heard.set()
                    if keep and len(self.seen) < 1 << 20:
                        self.seen += data
                    b.write(data)
                    await b.drain()
            b.close()

        watching = asyncio.create_task(watch())
        try:
            await asyncio.gather(pump(reader, up_writer, True), pump(up_reader, writer, False))
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


@asynccontextmanager
async def proxy(
    folder: Path, *, inspects: bool = False, login: str = "", upstream_ca: Path | None = None
) -> AsyncIterator[Proxy]:
    p = Proxy(folder, inspects=inspects, login=login, upstream_ca=upstream_ca)
    server = await asyncio.start_server(p.serve, "127.0.0.1", 0)
    p.port = server.sockets[0].getsockname()[1]
    try:
        yield p
    finally:
        server.close()
        for task in tuple(p._tasks):
            task.cancel()
        await asyncio.gather(*p._tasks, return_exceptions=True)
