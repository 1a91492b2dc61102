"""Damaged requests, broken targets and changes of rules, all at once: nothing fails inside, nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from typing import Any

from tests.gateway.rig import Client, Rig, Target, plain

from edgeward.gateway.rules import CacheConfig

PIECES = [
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 304 Not Modified\r\n", b"HTTP/1.1 503 X\r\n", b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n",
    b"hello", b"5\r\nhello\r\n", b"0\r\n\r\n", b'ETag: "1"\r\n', b"Cache-Control: max-age=0\r\n", b"Vary: X\r\n",
    b"\0\xff",
    b"Cache-Control: max-age=9,stale-while-revalidate=9\r\n", b"Connection: close\r\n",
]  # fmt: skip
GOOD = (
    b"HTTP/1.1 200 OK\r\nCache-Control: max-age=%d, stale-while-revalidate=3\r\n"
    b'ETag: "1"\r\nContent-Length: 5\r\n\r\nhello'
)
HOST = b" HTTP/1.1\r\nHost: h\r\n"
REQUESTS = [
    b"GET /c/1" + HOST + b"\r\n", b"GET /c/2" + HOST + b"Range: bytes=1-2\r\n\r\n", b"HEAD /c/1" + HOST + b"\r\n",
    b"GET /p/x" + HOST + b"\r\n", b"POST /p/x" + HOST + b"Content-Length: 5\r\n\r\nhello",
    b"GET /none" + HOST + b"\r\n",
    b"POST /s/x" + HOST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"GET /w/" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"POST /c/1" + HOST + b"Content-Length: 900\r\n\r\n" + b"a" * 900,
    b"GET /c/1" + HOST + b"Cache-Control: no-cache\r\n\r\n", b'GET /c/1' + HOST + b'If-None-Match: "1"\r\n\r\n',
    b"PUT /s/" + HOST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
]  # fmt: skip


def broken(rng: random.Random) -> Any:
    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(RuntimeError, TimeoutError):  # the gateway closed it
            while True:
                async with asyncio.timeout(1):
                    await reader.readuntil(b"\r\n\r\n")
                if rng.random() < 0.5:
                    writer.write(GOOD % rng.choice([0, 1, 5]))
                else:
                    writer.write(b"".join(rng.choice(PIECES) for _ in range(rng.randint(1, 8))))
                if (end := rng.random()) < 0.25:
                    if end < 0.15:
                        writer.transport.abort()
                    return

    return script


def strangers(port: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        data = b"".join(rng.choice(REQUESTS) for _ in range(rng.randint(1, 6)))
        if rng.random() < 0.3:
            at = rng.randrange(len(data))
            data = data[:at] + rng.randbytes(rng.randint(0, 3)) + data[at + rng.randint(0, 2) :]
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as s:
            s.sendall(data)
            s.settimeout(rng.choice([0.005, 0.02, 0.05]))
            while s.recv(65536):
                pass


def test_nothing_fails_inside_and_nothing_is_left(rig: Rig) -> None:
    errors: list[dict[str, Any]] = []
    rig.call(lambda: rig.loop.set_exception_handler(lambda _, context: errors.append(context)))
    bad, good = rig.target(broken(random.Random(7))), rig.target(plain(b"good"))
    ports = (bad.port, good.port)
    rig.route("/c/", *ports, failures=3, pause=0.2, cache=CacheConfig(stale_if_error=3.0))
    rig.route("/p/", *ports, failures=3, pause=0.2)
    rig.route("/w/", *ports, answer=0.3, idle=0.3)
    rig.route("/s/", *ports, body=1000, requests=3)
    threads = [threading.Thread(target=strangers, args=(rig.port, n)) for n in range(6)]
    for t in threads:
        t.start()
    for n in range(10):
        rig.route(f"/x{n}", good.port)
        threads[n % 6].join(0.05)  # the changes are spread over the load
    for t in threads:
        t.join(60)

    async def quiet() -> None:
        async with asyncio.timeout(30):
            while rig.gate.doors or rig.gate.exchanges:  # noqa: ASYNC110 - looking, the gate has no event
                await asyncio.sleep(0.02)

    rig.do(quiet())
    assert errors == []
    assert rig.gate.fetching == {}
    assert [r.active[0] for r in rig.gate.table.rules] == [0] * 14
    assert Client(rig.port).get("/x9").body == b"good"
