"""A session's link over a WebSocket, and how one is dialled: TCP, a proxy's CONNECT, TLS, the HTTP upgrade.

Both ends use the same :class:`WebLink`: what comes goes to the session as it came from TLS, what the session has to say
goes out as one message. The kernel keeps little that was not sent yet: what waits shall wait in the session, where a
small answer may overtake a large one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import msgspec

from edgeward.core.errors import Conflict, EdgewardError, Unreachable, from_problem
from edgeward.core.spans import host_port
from edgeward.tunnel.framing import Garbage, Messages, accept_key, ws_head
from edgeward.tunnel.session import Session

#: Bytes that may wait in front of the kernel before the session is held, and that it may hold unsent itself.
_HIGH, _LOW, _UNSENT = 128 * 1024, 32 * 1024, 128 * 1024
#: A first piece up to here is copied behind its message's head: one TLS record instead of two.
_COPIED = 16 * 1024
_TCP_NOTSENT_LOWAT = 25  # linux/tcp.h
_MOST_HEAD = 64 * 1024
#: Seconds for TCP, and for all of the way in.
CONNECT, DIAL = 5.0, 15.0


def tune(transport: asyncio.BaseTransport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT)


#: Where links receive. One for all: what is in it was taken out when the next one is asked for it.
_BUFFER = memoryview(bytearray(256 * 1024))


class WebLink(asyncio.BufferedProtocol):
    """One connection of a session. :meth:`Session.attach` comes behind ``connection_made``.

    A buffered protocol: else uvloop allocates 256 KiB for each TLS record of 16, and gives back what it did not need.
    """

    def __init__(self, session: Session, *, client: bool) -> None:
        self.paused = False
        self._session, self._client = session, client
        self._messages = Messages(client=client)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_HIGH, low=_LOW)
        tune(transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(_BUFFER[:nbytes])

    def data_received(self, data: bytes | memoryview) -> None:
        messages = self._messages
        try:
            pieces = messages.feed(data)
        except Garbage as e:
            self.close()
            self._session.detach(self, str(e))
            return
        for piece in pieces:
            self._session.received(self, piece)
        if messages.answers and self._transport is not None:
            self._transport.write(b"".join(messages.answers))
            messages.answers.clear()
        if messages.closed:
            self.close()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._session.resume(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.paused = True
        self._session.detach(self, str(exc) if exc else "")

    def send(self, pieces: list[bytes]) -> None:
        transport = self._transport
        if transport is None:
            return
        head = ws_head(sum(map(len, pieces)), client=self._client)
        first = pieces[0]
        if len(first) <= _COPIED:
            head, pieces = head + first, pieces[1:]
        if pieces:
            transport.writelines([head, *pieces])
        else:
            transport.write(head)

    def close(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()


# -- dialling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """Where a hub is: an address with TLS (perhaps behind a CONNECT proxy), or a unix socket's path."""

    host: str = ""
    port: int = 0
    tls: ssl.SSLContext | None = None
    server_name: str = ""
    proxy: str = field(default="", repr=False)
    unix: str = ""

    def __str__(self) -> str:
        if self.unix:
            return self.unix
        return host_port(self.host, self.port)


class _Upgrade(asyncio.Protocol):
    """Sends a request's head, gathers the answer's, and then stands still until the connection is taken over."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[tuple[int, dict[str, str], bytes]] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def again(self) -> None:
        """Another answer is waited for, on the same connection."""
        self.answered = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self.answered.done():
            return
        head, found, rest = self._got.partition(b"\r\n\r\n")
        if not found:
            if len(self._got) > _MOST_HEAD:
                self.answered.set_exception(Unreachable("what answers is no hub"))
            return
        lines = head.decode("latin-1").split("\r\n")
        parts = lines[0].split(" ", 2)
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        code = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0
        if code not in (101, 200):
            length = headers.get("content-length", "0")
            if length.isdigit() and len(rest) < min(int(length), _MOST_HEAD):
                return  # the error's body is not whole yet
        elif self.transport is not None and code == 101:
            self.transport.pause_reading()
        self._got = b""
        self.answered.set_result((code, headers, rest))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_exception(Unreachable(f"the connection was closed{f': {exc}' if exc else ''}"))

    @property
    def late(self) -> bytes:
        """What came behind the answer."""
        got, self._got = self._got, b""
        return got


async def _connected(way: Way) -> tuple[asyncio.Transport, _Upgrade]:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT):
        if way.unix:
            transport, up = await loop.create_unix_connection(_Upgrade, way.unix)
            return transport, up
        if not way.proxy:
            name = (way.server_name or way.host) if way.tls else None
            made, up = await loop.create_connection(_Upgrade, way.host, way.port, ssl=way.tls, server_hostname=name)
            return made, up
        via = urlsplit(way.proxy)
        plain, up = await loop.create_connection(_Upgrade, via.hostname or "", via.port or 80)
        try:
            return await _through(plain, up, way, via)
        except BaseException:
            plain.abort()
            raise


async def _through(plain: asyncio.Transport, up: _Upgrade, way: Way, via: Any) -> tuple[asyncio.Transport, _Upgrade]:
    head = f"CONNECT {way} HTTP/1.1\r\nHost: {way}\r\n"
    if via.username:
        login = base64.b64encode(f"{unquote(via.username)}:{unquote(via.password or '')}".encode()).decode()
        head += f"Proxy-Authorization: Basic {login}\r\n"
    plain.write((head + "\r\n").encode("latin-1"))
    code, _, _ = await up.answered
    if code != 200:
        raise Unreachable(f"the proxy refused the way to {way}: {code}", remedy="see its log")
    up.again()
    if way.tls is None:
        return plain, up
    loop = asyncio.get_running_loop()
    made = await loop.start_tls(plain, up, way.tls, server_hostname=way.server_name or way.host)
    if made is None:
        raise Unreachable(f"{way} closed the connection")
    up.transport = made
    return made, up


class Upgraded:
    """A connection whose upgrade was answered: ``headers`` of the answer; :meth:`take` makes it a link."""

    def __init__(self, transport: asyncio.Transport, up: _Upgrade, headers: dict[str, str], rest: bytes) -> None:
        self._transport, self._up, self.headers, self._rest = transport, up, headers, rest

    def take(self, session: Session, received: int, said: int) -> None:
        """The session goes on over it. ``received``: what the other end has; ``said``: what we told that we have."""
        link = WebLink(session, client=True)
        link.connection_made(self._transport)
        self._transport.set_protocol(link)
        session.attach(link, received, said)
        rest = self._rest + self._up.late
        if rest:
            link.data_received(rest)
        self._transport.resume_reading()

    def close(self) -> None:
        self._transport.abort()


async def dial(way: Way, path: str, headers: Mapping[str, str]) -> Upgraded:
    """Raises what the hub refused with, or ``Unreachable``."""
    try:
        async with asyncio.timeout(DIAL):
            transport, up = await _connected(way)
            try:
                return await _upgraded(transport, up, way, path, headers)
            except BaseException:
                transport.abort()
                raise
    except TimeoutError:
        raise Unreachable(f"the hub at {way} cannot be reached: no answer in time") from None
    except ssl.SSLCertVerificationError as e:
        raise Unreachable(f"the hub at {way} is not trusted: {e.verify_message}") from None
    except OSError as e:
        raise Unreachable(f"the hub at {way} cannot be reached: {e.strerror or e}") from None


async def _upgraded(
    transport: asyncio.Transport, up: _Upgrade, way: Way, path: str, headers: Mapping[str, str]
) -> Upgraded:
    key = base64.b64encode(os.urandom(16))
    lines = [f"GET {path} HTTP/1.1", f"Host: {way if not way.unix else 'localhost'}", "Connection: Upgrade"]
    lines += ["Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key.decode()}"]
    lines += [f"{k}: {v}" for k, v in headers.items()]
    tune(transport)
    transport.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
    code, answer, rest = await up.answered
    if code != 101:
        raise _refusal(code, rest)
    if answer.get("sec-websocket-accept", "").encode() != accept_key(key):
        raise Unreachable(f"what answers at {way} is no hub: its upgrade is none")
    return Upgraded(transport, up, answer, rest)


def _refusal(code: int, body: bytes) -> EdgewardError:
    try:
        doc = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError):
        doc = {}
    error = from_problem(doc, code)
    return error if doc else Unreachable(f"the hub does not open the tunnel: HTTP status {code}")


class Redial:
    """Brings a session a link, and a new one whenever it is lost or suspect, until it ends."""

    def __init__(self, session: Session, connect: Callable[[Session, int], Awaitable[None]]) -> None:
        """``connect(session, attempt)`` dials and attaches; a refusal that it raises ends the session."""
        self._session, self._connect = session, connect
        self._task: asyncio.Task[None] | None = None
        self.attempts = 0

    def poke(self) -> None:
        if self._session.error is None and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._dial())

    async def first(self) -> None:
        """The first link. Raises why there is none."""
        await self._connect(self._session, 0)

    async def _dial(self) -> None:
        session = self._session
        while session.error is None:
            if session.link is not None and not session.suspect:
                return
            self.attempts += 1
            try:
                # on a way that answers in a moment a lost packet shall not cost seconds
                async with asyncio.timeout(max(2.0, 12 * session.rtt)):
                    await self._connect(session, self.attempts)
                return
            except TimeoutError:
                pass
            except (Unreachable, Conflict):
                pass
            except EdgewardError as e:
                session.close(e, tell=False)
                return
            await asyncio.sleep(0.25)  # the pace of trying

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
