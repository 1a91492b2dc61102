"""Processes of the gateway's benchmark: a target, a load, and FastAPI doing the gateway's work.

python -m benchmarks.gateway_peers target PORT
python -m benchmarks.gateway_peers load PORT SECONDS CONNECTIONS PATH...     (by TLS with EDGEWARD_BENCH_CA)
python -m benchmarks.gateway_peers shake PORT SECONDS PATH
python -m benchmarks.gateway_peers pull PORT SECONDS PATH
python -m benchmarks.gateway_peers fastapi PORT TARGET_PORT
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
import time
from typing import Any, cast

BODY = b"x" * 1024
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nCache-Control: max-age=3600\r\nContent-Length: %d\r\n\r\n"
    % len(BODY)
    + BODY
)


class Target(asyncio.Protocol):
    """Answers every request with the same KiB."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            self.buffer = self.buffer[end + 4 :]
            self.transport.write(ANSWER)


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer."""

    def __init__(self, load: Load, number: int) -> None:
        self.load, self.number = load, number
        self.buffer = b""
        self.asked = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.ask()

    def ask(self) -> None:
        self.number += 1
        self.asked = time.perf_counter()
        self.transport.write(self.load.requests[self.number % len(self.load.requests)])

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        at = head.find(b"content-length: ")
        size = int(head[at + 16 :].split(b"\r", 1)[0]) if at >= 0 else 0
        if len(self.buffer) < end + 4 + size:
            return
        self.load.took.append(time.perf_counter() - self.asked)
        if not head.startswith((b"http/1.1 200", b"http/1.0 200")):
            self.load.failed += 1
        self.buffer = b""
        if time.perf_counter() < self.load.until:
            self.ask()
        else:
            self.load.ended += 1
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if time.perf_counter() < self.load.until:
            self.load.failed += 1
        self.load.left -= 1
        if not self.load.left:
            self.load.done.set()


class Load:
    def __init__(self, seconds: float, connections: int, paths: list[str]) -> None:
        self.requests = [self.request(p) for p in paths]
        self.took: list[float] = []
        self.failed = self.ended = 0
        self.left = connections
        self.done = asyncio.Event()
        self.until = time.perf_counter() + seconds

    @staticmethod
    def request(path: str) -> bytes:
        """``/path`` is a GET, ``/path=body`` a POST."""
        path, is_post, body = path.partition("=")
        head = (
            f"{'POST' if is_post else 'GET'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: load\r\nAccept: */*\r\n"
        )
        return (head + (f"Content-Length: {len(body)}\r\n" if is_post else "") + "\r\n" + body).encode()


async def load(port: int, seconds: float, connections: int, paths: list[str]) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    made = Load(seconds, connections, paths)
    tls = context_of(os.environ["EDGEWARD_BENCH_CA"]) if "EDGEWARD_BENCH_CA" in os.environ else None
    for n in range(connections):
        await loop.create_connection(
            lambda n=n: Client(made, n * 7),
            "127.0.0.1",
            port,
            ssl=tls,  # type: ignore[misc]
        )
    await asyncio.wait_for(made.done.wait(), seconds + 30)
    took = sorted(made.took)
    return {
        "requests": len(took), "failed": made.failed, "p50": took[len(took) // 2] if took else 0.0,
        "p99": took[int(len(took) * 0.99)] if took else 0.0,
    }  # fmt: skip


def context_of(ca: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca)


def shake(port: int, seconds: float, path: str) -> dict[str, Any]:
    """Whole handshakes, one after another, each with one request: how many."""
    import socket

    context = context_of(os.environ["EDGEWARD_BENCH_CA"])
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
    done = 0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as s,
        ):
            s.sendall(request)
            while s.recv(65536):
                pass
        done += 1
    return {"requests": done, "failed": 0}


def pull(port: int, seconds: float, path: str) -> dict[str, Any]:
    """One client that asks for a large file again and again: how often, and bytes of bodies."""
    import socket

    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    room = bytearray(1024 * 1024)
    done = got = 0
    until = time.perf_counter() + seconds
    with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
        while time.perf_counter() < until:
            s.sendall(request)
            head = b""
            while b"\r\n\r\n" not in head:
                head += s.recv(65536)
            head, _, body = head.partition(b"\r\n\r\n")
            left = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]) - len(body)
            got += left + len(body)
            while left:
                left -= s.recv_into(room, min(left, len(room)))
            done += 1
    return {"requests": done, "bytes": got, "failed": 0}


async def target(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Target, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    import uvloop

    what, port, *rest = sys.argv[1:]
    if what == "target":
        uvloop.run(target(int(port)))
    elif what == "pull":
        print(json.dumps(pull(int(port), float(rest[0]), rest[1])))
    elif what == "shake":
        print(json.dumps(shake(int(port), float(rest[0]), rest[1])))
    elif what == "load":
        print(json.dumps(uvloop.run(load(int(port), float(rest[0]), int(rest[1]), rest[2:]))))
    else:
        import uvicorn

        from benchmarks.gateway_fastapi import app_for

        uvicorn.run(app_for(int(rest[0])), host="127.0.0.1", port=int(port), log_level="error", access_log=False)


if __name__ == "__main__":
    main()
