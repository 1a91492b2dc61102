"""A gateway at work in a thread of this process, targets to stand behind it, and a client that speaks bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from tests.gateway.papers import unsealed

from edgeward.core.invocation import Call, Reply
from edgeward.gateway.balance import Endpoint
from edgeward.gateway.gate import Gate
from edgeward.gateway.listens import ListenerConfig
from edgeward.gateway.rules import CacheConfig, GatewayConfig, Listen, RouteConfig

PATIENCE = 30.0  # guards against a hang; nothing is measured by it


class Heard:
    """What the gateway tells the agent."""

    def __init__(self) -> None:
        self.statuses: dict[str, dict[str, Any] | None] = {}
        self.events: list[tuple[str, str]] = []

    def report(self, kind: str, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        self.statuses[f"{namespace}/{name}"] = status

    def event(self, type: str, reason: str, message: str, namespace: str, name: str, kind: str) -> None:
        self.events.append((reason, message))


class Functions:
    """Stands for the dispatcher: a Python callable for each function."""

    def __init__(self) -> None:
        self.known: dict[str, Callable[[Call], Coroutine[Any, Any, Reply]]] = {}

    async def invoke(self, call: Call) -> Reply:
        return await self.known[call.function](call)


class Target:
    """A server that answers each connection by a script: a callable of ``(reader, writer, number)``."""

    def __init__(self, rig: Rig, script: Callable[..., Coroutine[Any, Any, None]]) -> None:
        self.script = script
        self.connections = 0
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.server = rig.do(self._start())
        self.port: int = self.server.sockets[0].getsockname()[1]

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self.script(self, reader, writer)
        writer.close()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        """The next request's head; its body (by Content-Length or chunks) goes to ``bodies``."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        low = head.lower()
        if b"transfer-encoding: chunked" in low:
            body = b""
            while size := int(await reader.readuntil(b"\n"), 16):
                body += await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readexactly(2)
            self.bodies.append(body)
        elif b"content-length: " in low:
            size = int(low.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            self.bodies.append(await reader.readexactly(size))
        else:
            self.bodies.append(b"")
        return head


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Rig:
    """A Gate in a loop of its own. ``do`` runs a coroutine there, ``call`` a function."""

    def __init__(self, folder: Path, node: str = "n1", engine: str = "embedded", **more: Any) -> None:
        """``more``: of ``GatewayConfig``, also for what :meth:`apply` is not told otherwise."""
        self.engine = engine
        self.node, self.more = node, more
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()  # as the plane has it
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.heard = Heard()
        self.functions = Functions()
        self.folder = folder
        self.gate: Gate = self.do(self._make())
        self._run = asyncio.run_coroutine_threadsafe(self.gate.run(), self.loop)
        self.port = free_port()
        self.routes: list[RouteConfig] = []
        self.listeners: list[ListenerConfig] = []
        self.targets: list[Target] = []
        #: Sockets that are kept open to the end.
        self.held: list[socket.socket] = []
        self.apply()

    async def _make(self) -> Gate:
        return Gate(
            node=self.node, log_file=self.folder / "access.log", voice=self.heard, invoker=self.functions,
            unseal=unsealed,
        )  # fmt: skip

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def call(self, function: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return function()

        return self.do(run())

    def apply(self, listen: tuple[str, int] | None = None, **more: Any) -> None:
        """``listen``: there as well."""
        more = {"engine": self.engine, **self.more, **more}
        listens = (Listen("127.0.0.1", self.port), *([Listen(*listen)] if listen else []))
        config = GatewayConfig(self.node, listens, tuple(self.routes), listeners=tuple(self.listeners), **more)
        section = msgspec.json.decode(msgspec.json.encode(config))

        async def take() -> None:
            self.gate.commit(await self.gate.provision(section))
            if self.gate.front is not None:
                await self.gate.front.settled()

        self.do(take())

    def target(self, script: Callable[..., Coroutine[Any, Any, None]]) -> Target:
        self.targets.append(Target(self, script))
        return self.targets[-1]

    def route(self, path: str, *ports: int, key: str = "", cache: CacheConfig | None = None, **more: Any) -> None:
        endpoints = tuple(Endpoint("127.0.0.1", p) for p in ports)
        key = key or f"default/r{len(self.routes)}"
        more = {"to": "upstream", "target": "test", "send_host": "origin", **more}
        self.routes.append(RouteConfig(key, path=path, endpoints=endpoints, cache=cache, **more))
        self.apply()

    def close(self) -> None:
        self._run.cancel()

        async def end() -> None:
            for target in self.targets:
                target.server.close()
            self.gate.close()
            mine = asyncio.current_task()
            for task in asyncio.all_tasks():
                if task is not mine:
                    task.cancel()

        self.do(end())
        for s in self.held:
            s.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        self.loop.close()


class Client:
    """A socket and a strict reader of answers."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self._data = b""

    def send(self, data: bytes) -> Client:
        self.socket.sendall(data)
        return self

    def _more(self) -> bool:
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            data = b""
        self._data += data
        return bool(data)

    def exactly(self, n: int) -> bytes:
        while len(self._data) < n:
            if not self._more():
                raise EOFError(f"closed after {self._data!r}")
        got, self._data = self._data[:n], self._data[n:]
        return got

    def until(self, mark: bytes) -> bytes:
        while mark not in self._data:
            if not self._more():
                raise EOFError(f"closed after {self._data!r}")
        end = self._data.index(mark) + len(mark)
        got, self._data = self._data[:end], self._data[end:]
        return got

    def answer(self, method: str = "GET") -> Answer:
        head = self.until(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = int(lines[0].split(" ")[1])
        headers: dict[str, str] = {}
        for line in filter(None, lines[1:]):
            name, _, value = line.partition(": ")
            name = name.lower()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        body = b""
        if method == "HEAD" or status in (101, 204, 304) or status < 200:
            pass
        elif "transfer-encoding" in headers:
            while size := int(self.until(b"\r\n"), 16):
                body += self.exactly(size)
                assert self.exactly(2) == b"\r\n"
            assert self.exactly(2) == b"\r\n"
        elif "content-length" in headers:
            body = self.exactly(int(headers["content-length"]))
        else:
            body = self.rest()
        return Answer(status, headers, body)

    def rest(self) -> bytes:
        while self._more():
            pass
        got, self._data = self._data, b""
        return got

    def closed(self) -> bool:
        """Whether the other side ends the connection without another byte."""
        return self.rest() == b""

    def get(self, path: str, *headers: str, method: str = "GET", body: bytes = b"", host: str = "h") -> Answer:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.send(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body)
        return self.answer(method)

    def close(self) -> None:
        self.socket.close()


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: bytes


async def echo(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A target that gives back every body, in chunks."""
    while True:
        await target.request(reader)
        body = target.bodies[-1]
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(body), 100_000):
            piece = body[at : at + 100_000]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        writer.write(b"0\r\n\r\n")


class Pour:
    """A target's script: one large answer, as fast as it is taken."""

    def __init__(self, size: int) -> None:
        self.size, self.sent, self.done = size, 0, False

    async def __call__(self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % self.size)
        while self.sent < self.size:
            writer.write(b"x" * 65536)
            self.sent += 65536
            await writer.drain()
        self.done = True


def plain(
    body: bytes = b"ok", *headers: str, status: str = "200 OK", go: asyncio.Event | None = None
) -> Callable[..., Coroutine[Any, Any, None]]:
    """A target that answers every request alike, with keep-alive. ``go``: not before it is set (by ``rig.call``)."""
    lines = "".join(f"{h}\r\n" for h in headers)
    answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await target.request(reader)
            if go is not None:
                await go.wait()
            writer.write(answer if not head.startswith(b"HEAD") else answer[: len(answer) - len(body)])
            await writer.drain()

    return script


def rig(folder: Path) -> Iterator[Rig]:
    made = Rig(folder)
    try:
        yield made
    finally:
        made.close()
