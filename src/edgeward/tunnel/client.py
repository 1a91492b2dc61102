"""The operator's end of a tunnel: one WebSocket to the hub, many streams over it.

Used by the command line and by whatever else has a token. A session is named by a random word that only its two ends
know, lasts as long as it is used, and is resumed by it, together with the token, when the link flaps.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from edgeward.core.errors import EdgewardError, Invalid, Unreachable
from edgeward.core.spans import host_port
from edgeward.tunnel.framing import Open
from edgeward.tunnel.link import Redial, Way, dial
from edgeward.tunnel.session import Session, Stream
from edgeward.tunnel.splice import Socket


@dataclass(frozen=True)
class Target:
    """A hub, or a node's own API, and the token for it (none on a unix socket)."""

    way: Way
    token: str = field(default="", repr=False)


class Tunnel:
    """``serve``: called with streams that the node opens (reverse tunnels)."""

    def __init__(self, target: Target, node: str, serve: Callable[[Stream], None] | None = None) -> None:
        self._target, self.node = target, node
        self._id = secrets.token_hex(24)
        self.session = Session(
            f"to {node}", dials=True, serve=serve or _nobody, on_suspect=self._poke, on_end=lambda _: self.ended.set()
        )
        self.ended = asyncio.Event()
        self._redial = Redial(self.session, self._connect)

    def _poke(self) -> None:
        self._redial.poke()

    async def connect(self) -> None:
        """Raises why there is no tunnel."""
        try:
            await self._redial.first()
        except BaseException:
            self.session.close(Unreachable("there is no tunnel"), tell=False)
            raise

    async def _connect(self, session: Session, attempt: int) -> None:
        said = session.received_bytes
        headers = {
            "User-Agent": "edgeward-cli",
            "Edgeward-Session": self._id,
            "Edgeward-Attempt": str(attempt),
            "Edgeward-Received": str(said),
        }
        if self._target.token:
            headers["Authorization"] = f"Bearer {self._target.token}"
        upgraded = await dial(self._target.way, f"/api/v1/nodes/{quote(self.node, safe='')}/tunnel", headers)
        received = upgraded.headers.get("edgeward-received", "")
        if not received.isdigit():
            upgraded.close()
            raise Unreachable(f"what answers at {self._target.way} is no Edgeward hub")
        upgraded.take(session, int(received), said)

    def open(self, service: str, args: dict[str, Any] | None = None) -> Stream:
        """Data may be sent at once; :meth:`Stream.opened` tells whether the node serves it."""
        return self.session.open(service, args or {})

    def close(self) -> None:
        self._redial.close()
        self.session.close()


def _nobody(stream: Stream) -> None:
    stream.reset("refused", "nothing is served here")


@contextlib.asynccontextmanager
async def tunnel(target: Target, node: str, serve: Callable[[Stream], None] | None = None) -> AsyncIterator[Tunnel]:
    """A tunnel to the node inside the block."""
    made = Tunnel(target, node, serve)
    await made.connect()
    try:
        yield made
    finally:
        made.close()


@contextlib.asynccontextmanager
async def connect(target: Target, node: str, service: str, args: dict[str, Any]) -> AsyncIterator[Stream]:
    """One stream that the node serves. Raises why it does not."""
    async with tunnel(target, node) as made:
        stream = made.open(service, args)
        await stream.opened()
        yield stream


def address(text: str, field: str = "--listen") -> tuple[str, int]:
    """``HOST:PORT`` or ``[HOST]:PORT``. Raises ``Invalid``."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise Invalid("is no address", field=field, remedy="write 127.0.0.1:8080, [::1]:8080 or 127.0.0.1:0")
    return host, int(port)


class Forward:
    """A listener here whose connections go to a port at the node (or behind it). Opens the tunnel anew when its session
    was lost for good, as when a hub process ends; what the hub refuses ends it."""

    def __init__(
        self, target: Target, node: str, host: str, port: int, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._target, self._node, self._say = target, node, say
        self._args: dict[str, Any] = {"port": port} | ({"host": host} if host else {})
        self._tunnel: Tunnel | None = None
        self._said = ""

    async def run(self, listen: tuple[str, int], ready: Callable[[str], None]) -> None:
        """Until it is cancelled; ``ready`` is told the address. Raises what the hub or the node refuses it with."""
        self._tunnel = made = Tunnel(self._target, self._node)
        await made.connect()
        try:
            server = await asyncio.get_running_loop().create_server(lambda: _Accepted(self), *listen, backlog=512)
            async with server:
                at = server.sockets[0].getsockname()
                ready(host_port(at[0], at[1]))
                await self._keep()
        finally:
            self._tunnel.close()

    async def _keep(self) -> None:
        while self._tunnel is not None:
            await self._tunnel.ended.wait()
            error = self._tunnel.session.error
            if error is not None and not isinstance(error, Unreachable) and error.reason != "Gone":
                raise error
            self._told(error)
            await self._again()

    async def _again(self) -> None:
        while True:
            made = Tunnel(self._target, self._node)
            try:
                await made.connect()
                self._tunnel = made
                return
            except Unreachable as e:
                self._told(e)
                await asyncio.sleep(0.5)  # the pace of trying

    def opened(self) -> Stream | None:
        if self._tunnel is None or self._tunnel.session.error is not None:
            return None
        return self._tunnel.open("tcp", self._args)

    def _told(self, error: EdgewardError | None) -> None:
        """Each thing once in a row."""
        text = str(error or "")
        if text and text != self._said:
            self._said = text
            self._say(text)

    def failed(self, error: EdgewardError) -> None:
        self._told(error)


class _Accepted(Socket):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._forward = forward

    def opened(self) -> Stream | None:
        return self._forward.opened()

    def failed(self, error: EdgewardError) -> None:
        if error.reason != "Gone":
            self._forward.failed(error)
        super().failed(error)


async def reverse(
    target: Target, node: str, at_node: tuple[str, int], to: tuple[str, int], ready: Callable[[str], None]
) -> None:
    """A port of the node whose connections come out here and go to ``to``. Until it is cancelled."""
    tasks: set[asyncio.Task[None]] = set()

    def serve(stream: Stream) -> None:
        task = asyncio.get_running_loop().create_task(_out(stream, *to))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async with tunnel(target, node, serve) as made:
        stream = made.open("reverse", {"host": at_node[0], "port": at_node[1]})
        said = await stream.opened()
        ready(host_port(str(said.get("host", "")), int(said.get("port", 0))))
        await stream.read()  # ends with an error, or never


async def _out(stream: Stream, host: str, port: int) -> None:
    from edgeward.tunnel.edge import reach

    try:
        if stream.purpose.service != "back":
            stream.reset("refused", "nothing is served here")
            return
        await reach(host, port, Socket(stream))
        stream.accept()
    except EdgewardError as e:
        stream.fail(e)


__all__ = ["Forward", "Open", "Target", "Tunnel", "address", "connect", "reverse", "tunnel"]
