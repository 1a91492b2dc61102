"""Passing bytes on: from one stream to another at the hub, between a stream and a socket at both ends.

Nothing here waits or is woken for a piece: what comes is handed on in the same turn, and it is credited when it has
left, so that the slowest hop sets the pace and no hop gathers more than a window.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

from edgeward.core.errors import EdgewardError, Gone
from edgeward.tunnel.flow import HIGH, Sink, Stream

#: Bytes that may wait in front of a socket.
_SOCKET_HIGH = 128 * 1024


class Pipe(Sink):
    """One direction of two joined streams."""

    def __init__(self, source: Stream, target: Stream) -> None:
        self._source, self._target = source, target

    def received(self, data: bytes) -> None:
        self._target.send(data)

    def ended(self) -> None:
        self._target.end()

    def failed(self, error: EdgewardError) -> None:
        self._target.fail(error)

    def sent(self, n: int) -> None:
        self._target.consumed(n)

    def accepted(self, info: dict[str, Any]) -> None:
        self._target.accept(info)


def join(one: Stream, other: Stream) -> None:
    """What comes on either goes out on the other."""
    one.attach(Pipe(one, other))
    other.attach(Pipe(other, one))


class Socket(asyncio.Protocol, Sink):
    """A socket's end of a stream: a protocol for the one, a sink for the other."""

    def __init__(self, stream: Stream | None = None) -> None:
        self.stream = stream
        self._transport: asyncio.Transport | None = None
        self._paused = self._held = self._eof = False
        self._owed = 0

    # -- the socket's side -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_SOCKET_HIGH)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = stream = self.stream or self.opened()
        if stream is None:
            transport.close()
        else:
            stream.attach(self)

    def opened(self) -> Stream | None:
        """The stream of a connection that was accepted; None: it is closed."""
        return None

    def data_received(self, data: bytes) -> None:
        stream = self.stream
        if stream is not None and stream.send(data) >= HIGH and self._transport is not None:
            self._held = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._eof = True
        if self.stream is None:
            return False
        self.stream.end()
        return not self.stream.end_received  # the other direction goes on

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        stream = self.stream
        if stream is None:
            return
        if not self._eof or not stream.end_received:
            stream.fail(Gone(f"the connection was closed{f': {exc}' if exc else ''}"))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        owed, self._owed = self._owed, 0
        if owed and self.stream is not None:
            self.stream.consumed(owed)

    # -- the stream's side -----------------------------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        if self._transport is None:
            return
        self._transport.write(data)
        if self._paused:
            self._owed += len(data)
        elif self.stream is not None:
            self.stream.consumed(len(data))

    def ended(self) -> None:
        transport = self._transport
        if transport is None:
            return
        if self._eof:
            transport.close()
        elif transport.can_write_eof():
            transport.write_eof()

    def failed(self, error: EdgewardError) -> None:
        if self._transport is not None:
            self._transport.abort()

    def writable(self) -> None:
        if self._held and self._transport is not None:
            self._held = False
            self._transport.resume_reading()
