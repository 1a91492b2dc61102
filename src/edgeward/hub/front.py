"""The hub's one port: the API, and the link's WebSocket for nodes.

TLS ends here. A connection whose first request asks for ``/leafnode`` is a node's: its bytes are spliced, both ways and
with back-pressure, to the WebSocket of the hub's nats-server on loopback. Every other one is the API's. So a node needs
one outbound port, through any proxy that passes WebSocket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any, cast

from edgeward.core.http_guard import GuardedProtocol

log = logging.getLogger("edgeward.front")

LINK_PATH = b"GET /leafnode"
_HIGH = 256 * 1024
_CONNECT_TIMEOUT = 5.0
#: linux/tcp.h
_TCP_THIN_LINEAR_TIMEOUTS = 16


class _Half(asyncio.Protocol):
    """One side of a splice: what it receives goes to ``other``; it pauses when the other side cannot keep up."""

    def __init__(self, ended: Callable[[_Half], None] | None = None) -> None:
        self._ended = ended
        self.transport: asyncio.Transport | None = None
        self.other: _Half | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_HIGH)

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            with contextlib.suppress(RuntimeError):
                self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            with contextlib.suppress(RuntimeError):
                self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()
        if self._ended is not None:
            self._ended(self)


def _patient(transport: asyncio.Transport) -> None:
    """A node's link carries little: after a loss it is repeated at an even pace, not ever later (Linux: tcp(7))."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sys.platform == "linux":
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_THIN_LINEAR_TIMEOUTS, 1)


class Links:
    """The splices that are open, and where they lead."""

    def __init__(self, upstream: Callable[[], tuple[str, int]]) -> None:
        self.upstream = upstream
        self.open: set[_Half] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def splice(self, transport: asyncio.Transport, head: bytes) -> None:
        transport.pause_reading()
        _patient(transport)
        task = asyncio.get_running_loop().create_task(self._connect(transport, head))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, transport: asyncio.Transport, head: bytes) -> None:
        host, port = self.upstream()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                _, inner = await loop.create_connection(_Half, host, port)
        except (OSError, TimeoutError) as e:
            log.info("a node's link could not reach nats-server: %s", e or type(e).__name__)
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            transport.close()
            return
        outer = _Half(self.open.discard)
        outer.connection_made(transport)
        outer.other, inner.other = inner, outer
        transport.set_protocol(outer)
        if inner.transport is not None:
            inner.transport.write(head)
        transport.resume_reading()
        self.open.add(outer)

    def close(self) -> None:
        for half in tuple(self.open):
            if half.transport is not None:
                half.transport.close()
        self.open.clear()


def front_protocol(links: Links) -> type[asyncio.Protocol]:
    """The protocol class for uvicorn (``Config(http=...)``)."""

    class Front(GuardedProtocol):
        _head = b""
        _decided = False

        def data_received(self, data: bytes) -> None:
            if self._decided:
                super().data_received(data)
                return
            self._head += data
            if len(self._head) < len(LINK_PATH) and LINK_PATH.startswith(self._head):
                return
            self._decided = True
            head, self._head = self._head, b""
            if head.startswith(LINK_PATH):
                self.unguard()
                cast(Any, self).connections.discard(self)
                cast(Any, self)._unset_keepalive_if_required()
                links.splice(self.transport, head)
            else:
                super().data_received(head)

    return cast(type[asyncio.Protocol], Front)
