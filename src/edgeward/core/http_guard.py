"""HTTP connections that strangers cannot hold or fill: a limit on the time and the bytes of a request's head.

uvicorn has neither for its fast parser. A connection that has not brought a whole head in time is closed (408), one
whose head is too large as well (431), before anything of it is kept. Bodies have their limits where they are read
(``api.read_body``), answers their back-pressure.

A request that wants to become something else (``Upgrade``) is routed, and let in or refused, like every other one; its
handler may then take the connection over: ``scope["extensions"][TAKEOVER]``.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: Seconds for a request's head, from the connection's start or the head's first byte.
HEAD_TIME = 15.0
HEAD_BYTES = 64 * 1024
#: In a request's extensions: ``(protocol) -> transport``. Nothing of HTTP is sent or read on the connection from then
#: on, the handler's answer included.
TAKEOVER = "edgeward.takeover"
_GONE = b"HTTP/1.1 %b\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class GuardedProtocol(HttpToolsProtocol):
    """For ``uvicorn.Config(http=...)``."""

    _in_head = True
    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(Any, transport))
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self.unguard()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            # what stands behind a small head is body: it is counted by who reads it
            if self._head_bytes > HEAD_BYTES and b"\r\n\r\n" not in data[:HEAD_BYTES]:
                self._refuse(b"431 Request Header Fields Too Large")
                return
        super().data_received(data)

    def _should_upgrade(self) -> bool:
        return False  # not by uvicorn

    def _unsupported_upgrade_warning(self) -> None:
        """It is a request like others until its handler takes it over."""

    def _take_over(self, protocol: asyncio.BaseProtocol) -> asyncio.Transport:
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        self.unguard()
        self.connections.discard(self)
        self._unset_keepalive_if_required()
        if self.cycle is not None:
            self.cycle.disconnected = True  # what the handler returns is not sent
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        return transport

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast(Any, self.scope)["extensions"] = {TAKEOVER: self._take_over}
        self._begin()

    def on_headers_complete(self) -> None:
        self.unguard()
        super().on_headers_complete()

    def _begin(self) -> None:
        if self._in_head and self._timer is not None:
            return  # the first request of a connection: its time runs since the connection began
        self._in_head, self._head_bytes = True, 0
        self._timer = self.loop.call_later(HEAD_TIME, self._refuse, b"408 Request Timeout")

    def unguard(self) -> None:
        """The head is there, or this is no HTTP connection any more."""
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: bytes) -> None:
        self.unguard()
        transport = self.transport
        if transport is not None and not transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                transport.write(_GONE % status)
            transport.close()
