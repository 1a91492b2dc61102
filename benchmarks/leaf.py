"""A node's link without a nats-server: what a simulated node speaks to the hub's one port.

In go a node's name, its NATS user and the hub's address; out comes the part of :class:`~edgeward.core.bus.Bus` that the
node's side of the conversation needs, on a leaf connection of its own: TLS, WebSocket on ``/leafnode``, NATS's leaf
protocol, the node's own JWT. So a thousand nodes fit into one process, and the hub cannot tell them from real ones but
for two things: they send uncompressed (a real one frames by S2, some 18 bytes more a message) and keep no streams.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from nats.aio.msg import Msg

from edgeward.core.errors import Unreachable
from edgeward.core.nkeys import NatsUser
from edgeward.nodes.wan import TcpInfo, parse_tcp_info

Handler = Callable[[Msg], Awaitable[None]]
_HANDSHAKE = 15.0  # nats-server's own limits of a leaf: TLS and INFO
_TCP_INFO_SIZE = 232


class _Wire(asyncio.Protocol):
    """WebSocket frames and NATS lines of one connection."""

    def __init__(self, owner: LeafBus) -> None:
        self._owner = owner
        self._raw = bytearray()
        self._text = bytearray()
        self._upgraded = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        key = base64.b64encode(os.urandom(16)).decode()
        host = "{}:{}".format(*self._owner.address)
        head = (
            f"GET /leafnode HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\nUpgrade: websocket\r\n\r\n"
        )
        self.write_raw(head.encode())

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.lost(self)

    def write_raw(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def send(self, data: bytes, code: int = 2) -> None:
        size = len(data)
        # a mask of zeros is a mask: the frame is as long as any, and costs the simulator nothing
        if size < 126:
            head = bytes((0x80 | code, 0x80 | size))
        elif size < 65536:
            head = bytes((0x80 | code, 0xFE)) + size.to_bytes(2, "big")
        else:
            head = bytes((0x80 | code, 0xFF)) + size.to_bytes(8, "big")
        self.write_raw(head + b"\0\0\0\0" + data)

    def data_received(self, data: bytes) -> None:
        self._raw += data
        if not self._upgraded:
            end = self._raw.find(b"\r\n\r\n")
            if end < 0:
                return
            if b" 101 " not in self._raw[:64]:
                self._owner.refusals += 1
                if self.transport is not None:
                    self.transport.close()
                return
            del self._raw[: end + 4]
            self._upgraded = True
        while (frame := self._frame()) is not None:
            code, payload = frame
            if code == 9:
                self.send(payload, 10)
            elif code == 8 and self.transport is not None:
                self.transport.close()
            elif code in (0, 1, 2):
                self._text += payload
        self._lines()

    def _frame(self) -> tuple[int, bytes] | None:
        raw = self._raw
        if len(raw) < 2:
            return None
        size, at = raw[1] & 0x7F, 2
        if size == 126:
            size, at = int.from_bytes(raw[2:4], "big"), 4
        elif size == 127:
            size, at = int.from_bytes(raw[2:10], "big"), 10
        if len(raw) < at + size:
            return None
        code, payload = raw[0] & 15, bytes(raw[at : at + size])
        del raw[: at + size]
        return code, payload

    def _lines(self) -> None:
        text = self._text
        while (end := text.find(b"\r\n")) >= 0:
            line = bytes(text[:end])
            if line[:5] in (b"LMSG ", b"HMSG "):
                size = int(line.rsplit(b" ", 1)[1])
                if len(text) < end + 2 + size + 2:
                    return
                payload = bytes(text[end + 2 : end + 2 + size])
                del text[: end + 2 + size + 2]
                self._owner.message(line, payload)
                continue
            del text[: end + 2]
            self._owner.line(self, line)


class LeafBus:
    """One simulated node's connection: dial, be thrown out, dial again, as its nats-server would."""

    def __init__(self, node: str, user: NatsUser, address: tuple[str, int], context: ssl.SSLContext) -> None:
        self.node, self.address = node, address
        self._user, self._context = user, context
        self._inbox = f"_INBOX_{node}"
        self._handlers: dict[str, Handler] = {}
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wire: _Wire | None = None
        self._ready = asyncio.Event()
        self._gone = asyncio.Event()
        self._interest: set[str] = set()
        self._n = 0
        #: What nats-server would be told as its ``reconnect``, and when this node dialled (seconds of the loop).
        self.pause = 1.0
        self.dials: list[float] = []
        self.refusals = self.messages = 0
        #: Called when the connection came or went, as a node's :class:`~edgeward.nodes.wan.LinkWatch` does.
        self.on_change: Callable[[], None] = lambda: None
        #: Of the connections that ended, and of the present one: :meth:`traffic`.
        self._ended: list[TcpInfo] = []

    # -- what NodeEdge needs of a bus --------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._ready.is_set()

    async def subscribe(self, subject: str, handler: Handler, **_: Any) -> None:
        self._handlers[subject] = handler
        if self._wire is not None and self.connected:
            self._wire.send(f"LS+ {subject}\r\n".encode())

    async def publish(self, subject: str, payload: bytes, *, reply: str = "", **_: Any) -> None:
        wire = self._wire
        if wire is None or not self.connected or not self._interested(subject):
            if reply:  # what nats-server says when nobody is there
                self._deliver(reply, "", b"", {"Status": "503"})
            return
        head = f"LMSG {subject} {reply + ' ' if reply else ''}{len(payload)}\r\n"
        wire.send(head.encode() + payload + b"\r\n")

    async def request(self, subject: str, payload: bytes = b"", *, timeout: float = 5.0, **_: Any) -> Msg:
        if not self.connected or not self._interested(subject):
            raise Unreachable("nobody answers", resource=subject)
        self._n += 1
        reply = f"{self._inbox}.{self._n:x}.{random.getrandbits(48):012x}"
        answer = self._waiting[reply] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self.publish(subject, payload, reply=reply)
                return await answer
        except TimeoutError:
            raise Unreachable(f"no answer within {timeout:g} s", resource=subject) from None
        finally:
            self._waiting.pop(reply, None)

    def _interested(self, subject: str) -> bool:
        verb = subject.split(".")
        return len(verb) == 4 and f"ew.hub.*.{self.node}" in self._interest

    # -- what comes --------------------------------------------------------------------------------------------------

    def message(self, line: bytes, payload: bytes) -> None:
        parts = line.decode().split()
        headers = None
        if parts[0] == "HMSG":
            head, payload = payload[: int(parts[-2])], payload[int(parts[-2]) :]
            headers = {"Status": head.split(b"\r\n", 1)[0].removeprefix(b"NATS/1.0").decode().strip()}
            parts = [*parts[:-2], parts[-1]]
        reply = parts[2] if len(parts) == 4 else ""
        self.messages += 1
        self._deliver(parts[1], reply, payload, headers)

    def _deliver(self, subject: str, reply: str, payload: bytes, headers: dict[str, str] | None) -> None:
        msg = Msg(_client=None, subject=subject, reply=reply, data=payload, headers=headers)  # type: ignore[arg-type]
        future = self._waiting.get(subject)
        if future is not None:
            if not future.done():
                if headers and headers.get("Status") == "503":
                    future.set_exception(Unreachable("nobody answers", resource=subject))
                else:
                    future.set_result(msg)
        elif (handler := self._handlers.get(subject)) is not None:
            task = asyncio.get_running_loop().create_task(handler(msg))  # type: ignore[arg-type]
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def line(self, wire: _Wire, line: bytes) -> None:
        if line.startswith(b"INFO "):
            info = json.loads(line[5:])
            if "nonce" in info and not self.connected:
                self._connect(wire, info)
            elif info.get("connect_info"):
                inner = "".join(f"LS+ {s}\r\n" for s in (f"{self._inbox}.>", *self._handlers))
                wire.send(inner.encode() + b"PING\r\n")
        elif line == b"PING":
            wire.send(b"PONG\r\n")
        elif line == b"PONG":
            if not self.connected:
                self._ready.set()
                self.on_change()
        elif line.startswith(b"LS+ "):
            self._interest.add(line[4:].split(b" ")[0].decode())
        elif line.startswith(b"LS- "):
            self._interest.discard(line[4:].split(b" ")[0].decode())
        elif line.startswith(b"-ERR"):
            self.refusals += 1

    def _connect(self, wire: _Wire, info: dict[str, Any]) -> None:
        signed = self._user.key.sign(str(info["nonce"]).encode())
        options = {
            "version": "2.15.1",
            "jwt": self._user.jwt,
            "sig": base64.urlsafe_b64encode(signed).decode().rstrip("="),
            "server_id": f"N{self.node}",
            "server_name": f"n-{self.node}",
            "domain": f"n-{self.node}",
            "headers": True,
            "jetstream": True,
            "proto": 1,
        }
        wire.send(b"CONNECT " + json.dumps(options).encode() + b"\r\n")

    def lost(self, wire: _Wire) -> None:
        if wire is self._wire:
            self._wire = None
            self._ready.clear()
            self._interest.clear()
            self._gone.set()
            self.on_change()

    # -- life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keeps the link up, until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._gone.clear()
                self.dials.append(loop.time())
                try:
                    async with asyncio.timeout(_HANDSHAKE):
                        _, self._wire = await loop.create_connection(
                            lambda: _Wire(self), *self.address, ssl=self._context, server_hostname=self.address[0]
                        )
                        while not self.connected and not self._gone.is_set():
                            await asyncio.wait(
                                [asyncio.ensure_future(self._ready.wait()), asyncio.ensure_future(self._gone.wait())],
                                return_when=asyncio.FIRST_COMPLETED,
                            )
                    await self._gone.wait()
                except (OSError, TimeoutError):
                    self.drop()
                await asyncio.sleep(self.pause)  # nats-server's own wait between two tries
        finally:
            self.drop()

    def drop(self) -> None:
        """Ends the connection, as a cut that is noticed does."""
        wire = self._wire
        if wire is not None and wire.transport is not None:
            self._ended.append(self._info(wire))
            wire.transport.abort()
            self.lost(wire)

    @staticmethod
    def _info(wire: _Wire) -> TcpInfo:
        sock = wire.transport.get_extra_info("socket") if wire.transport is not None else None
        if sock is None:
            return TcpInfo()
        with contextlib.suppress(OSError):
            return parse_tcp_info(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE))
        return TcpInfo()

    def traffic(self) -> TcpInfo:
        """What the kernel counted on this node's present connection."""
        return self._info(self._wire) if self._wire is not None else TcpInfo()
