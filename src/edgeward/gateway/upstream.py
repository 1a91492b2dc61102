"""Connections to targets: opened, used for one request after another, kept for a while, closed when in doubt.

A connection has one user at a time, who hears the answer's head, its pieces and its end, or that it failed. What comes
unasked, or behind the end of an answer, belongs to nobody: such a connection is closed and never used again, so that no
client gets another one's answer. Reading stops while the user's own side is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Protocol, cast

from edgeward.gateway.balance import Endpoint
from edgeward.gateway.http1 import CHUNKED, HEAD_BYTES, UNTIL_CLOSE, Bad, Chunks, Response, parse_response

#: Idle connections kept for each endpoint, and how long (servers often close after 5 s; most before 60 s).
KEPT = 64
KEEP = 4.0
#: Interim answers (1xx) to one request; they are read and dropped.
INTERIM = 32


class User(Protocol):
    """Whose request a connection carries."""

    def on_head(self, response: Response) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_end(self) -> None: ...
    def on_fail(self, status: int, why: str) -> None: ...
    def on_full(self, full: bool) -> None: ...
    def on_tunnel(self, data: bytes) -> None: ...


class Connection(asyncio.Protocol):
    """One connection to an endpoint."""

    def __init__(self, pool: Pool, endpoint: Endpoint) -> None:
        self._pool = pool
        self.endpoint = endpoint
        self.transport: asyncio.Transport | None = None
        self.user: User | None = None
        self.since = 0.0
        self.closed = False
        #: A request was sent before: its server may close it while the next one is on its way.
        self.used = False
        self.request_done = True
        #: Nothing is asked on it after this request.
        self.last = False
        self._method = ""
        self._buffer = b""
        self._response: Response | None = None
        self._left = 0
        self._chunks: Chunks | None = None
        self._tunnel = False
        self._paused = False
        self._interim = 0

    # -- the user's side ---------------------------------------------------------------------------------------------

    def begin(self, user: User, method: str, head: bytes, *, done: bool) -> None:
        """Sends a request's head. ``done``: there is no body."""
        self.user, self._method, self.request_done = user, method, done
        self._response, self._chunks = None, None
        self._interim = 0
        self.write(head)

    def write(self, data: bytes) -> None:
        transport = self.transport
        if transport is not None and not self.closed and not transport.is_closing():
            transport.write(data)

    def pause(self) -> None:
        if self.transport is not None and not self.closed and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.transport is not None and not self.closed and self._paused:
            self._paused = False
            self.transport.resume_reading()

    def abort(self) -> None:
        """Nobody wants it any more."""
        self.user = None
        self.closed = True
        if self.transport is not None:
            self.transport.abort()

    def leave(self) -> None:
        """The client ended what was switched to; what it said last still goes out."""
        self.user = None
        self.closed = True
        if self.transport is not None:
            self.transport.close()

    # -- the transport's side ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        if self.user is not None:
            self.user.on_full(True)

    def resume_writing(self) -> None:
        if self.user is not None:
            self.user.on_full(False)

    def data_received(self, data: bytes) -> None:
        user = self.user
        if user is None:
            self._pool.forget(self)
            self.abort()
        elif self._tunnel:
            user.on_tunnel(data)
        elif self._response is None:
            self._buffer = self._buffer + data if self._buffer else data
            self._head(user)
        else:
            self._body(user, data)

    def eof_received(self) -> bool:
        return False  # the connection closes; connection_lost says what that means

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._pool.forget(self)
        user, self.user = self.user, None
        if user is None:
            return
        if self._tunnel or (self._response is not None and self._response.length == UNTIL_CLOSE and exc is None):
            user.on_end()
        else:
            what = "in the middle of its answer" if self._response is not None else "before it answered"
            user.on_fail(502, f"the target closed the connection {what}")

    def _head(self, user: User) -> None:
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > HEAD_BYTES:
                    self._broken(user, "an answer whose head is too long")
                return
            head, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
            try:
                response = parse_response(head, self._method)
            except Bad as e:
                self._broken(user, e.why)
                return
            if response.status >= 200 or response.status == 101:
                break
            self._interim += 1
            if self._interim > INTERIM:
                self._broken(user, f"more than {INTERIM} interim answers")
                return
        data, self._buffer = self._buffer, b""
        self._response = response
        self._left = response.length
        if response.status == 101:
            self._tunnel = True
            user.on_head(response)
            if data and self.user is user:
                user.on_tunnel(data)
            return
        if response.length == CHUNKED:
            self._chunks = Chunks()
        user.on_head(response)
        if self.user is user:  # not given up at the sight of the head
            self._body(user, data)

    def _body(self, user: User, data: bytes) -> None:
        if self._chunks is not None:
            try:
                body, rest = self._chunks.feed(data)
            except Bad as e:
                self._broken(user, e.why)
                return
            if body:
                user.on_body(body)
            if self._chunks.done and self.user is user:
                self._finish(user, bool(rest))
        elif self._left == UNTIL_CLOSE:
            if data:
                user.on_body(data)
        else:
            piece = data[: self._left]
            self._left -= len(piece)
            if piece:
                user.on_body(piece)
            if not self._left and self.user is user:
                self._finish(user, len(data) > len(piece))

    def _finish(self, user: User, excess: bool) -> None:
        response = self._response
        self.user = None
        self._response = None
        if response is not None and response.keep and self.request_done and not (excess or self.closed or self.last):
            self.used = True
            self._pool.give(self)
        else:
            self.abort()
        user.on_end()

    def _broken(self, user: User, why: str) -> None:
        self.abort()
        user.on_fail(502, f"the target sent {why}")


class Pool:
    """Idle connections by endpoint, and the opening of new ones."""

    def __init__(self, ca_file: Path) -> None:
        """``ca_file``: the hub's authority, when it is there."""
        self._idle: dict[Endpoint, list[Connection]] = {}
        self._ca_file = ca_file
        self._tls: dict[bool, tuple[int, ssl.SSLContext]] = {}
        self._node_tls: tuple[int, ssl.SSLContext] | None = None
        self.opened = 0
        self.reused = 0

    def take(self, endpoint: Endpoint) -> Connection | None:
        """An idle connection, the one used last."""
        kept = self._idle.get(endpoint)
        while kept:
            connection = kept.pop()
            transport = connection.transport
            if not connection.closed and transport is not None and not transport.is_closing():
                self.reused += 1
                return connection
        return None

    def give(self, connection: Connection) -> None:
        kept = self._idle.setdefault(connection.endpoint, [])
        if len(kept) >= KEPT:
            connection.abort()
            return
        connection.since = asyncio.get_running_loop().time()
        connection.resume()
        kept.append(connection)

    def forget(self, connection: Connection) -> None:
        kept = self._idle.get(connection.endpoint)
        if kept and connection in kept:
            kept.remove(connection)

    def _trusting(self, *, ours: bool) -> ssl.SSLContext:
        """What a target's certificate is held against: the machine's authorities; for gateways the hub's as well, as
        it is now."""
        stamp = 0
        if ours:
            with contextlib.suppress(OSError):
                stamp = self._ca_file.stat().st_mtime_ns
        known = self._tls.get(ours)
        if known is not None and known[0] == stamp:
            return known[1]
        context = ssl.create_default_context()
        if stamp:
            with contextlib.suppress(OSError, ssl.SSLError):
                context.load_verify_locations(self._ca_file)
        self._tls[ours] = stamp, context
        return context

    def _as_node(self) -> ssl.SSLContext:
        """As this node, to another one: both by the hub's authority alone. Raises ``OSError``."""
        own = self._ca_file.parent / "node.pem"
        stamp = hash((self._ca_file.stat().st_mtime_ns, own.stat().st_mtime_ns))
        if self._node_tls is None or self._node_tls[0] != stamp:
            context = ssl.create_default_context(cafile=str(self._ca_file))
            context.load_cert_chain(own, password=lambda: b"")
            self._node_tls = stamp, context
        return self._node_tls[1]

    async def open(self, endpoint: Endpoint, timeout: float) -> Connection:
        """Raises ``OSError`` or ``TimeoutError``."""
        loop = asyncio.get_running_loop()
        tls = None
        if endpoint.node:
            tls = self._as_node()
        elif endpoint.tls:
            tls = self._trusting(ours=endpoint.ours)
        async with asyncio.timeout(timeout):
            _, connection = await loop.create_connection(
                lambda: Connection(self, endpoint),
                endpoint.host,
                endpoint.port,
                ssl=tls,
                server_hostname=(endpoint.node or endpoint.host) if tls else None,
            )
        self.opened += 1
        return connection

    def sweep(self, now: float) -> None:
        """Closes what was idle for long."""
        for endpoint, kept in list(self._idle.items()):
            for connection in [c for c in kept if now - c.since > KEEP]:
                kept.remove(connection)
                connection.abort()
            if not kept:
                del self._idle[endpoint]

    def close(self) -> None:
        for kept in self._idle.values():
            for connection in list(kept):
                connection.abort()
        self._idle.clear()
