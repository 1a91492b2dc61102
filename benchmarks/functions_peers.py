"""What a function call costs by other ways: HTTP to uvicorn, HTTP to uvicorn to gRPC (as Baetyl calls its runtimes).

``python -m benchmarks.functions_peers http PORT [GRPC_PORT]`` and ``... grpc PORT`` are the servers, plain ASGI and
grpc.aio, which do the work of the issue's hello and nothing else; :func:`peers` measures them one call at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.common import PYTHON, free_ports, wait

METHOD = "/edgeward.bench.Function/Call"


def app_for(grpc_port: int) -> Any:
    calling: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        if grpc_port:
            if not calling:
                import grpc.aio

                calling.append(grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}").unary_unary(METHOD))
            answer = await calling[0](body)
        else:
            answer = hello(body)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return app


def hello(body: bytes) -> bytes:
    return json.dumps({"hello": body.decode(), "version": "1"}).encode()


async def serve_grpc(port: int) -> None:
    import grpc.aio

    async def call(request: bytes, context: Any) -> bytes:
        return hello(request)

    server = grpc.aio.server()
    service, method = METHOD[1:].split("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(call)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def _p50(port: int, n: int) -> float:
    """Microseconds of one POST at a time on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    ask = b"POST /hello HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nedge"
    took = []
    for _ in range(n):
        begun = time.perf_counter()
        writer.write(ask)
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        assert b"200" in head[:16]
        await reader.readexactly(size)
        took.append(time.perf_counter() - begun)
    writer.close()
    return statistics.median(took) * 1e6


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def _server(*words: object) -> Any:
    process = subprocess.Popen(
        [PYTHON, "-m", "benchmarks.functions_peers", *map(str, words)], stderr=subprocess.DEVNULL
    )
    try:
        wait(lambda: _listens(int(str(words[1]))))
        yield
    finally:
        process.terminate()
        process.wait(20)


async def peers(n: int = 2000) -> str:
    """``HTTP to uvicorn: x us; HTTP to gRPC: y us``; what is not installed is left out."""
    said = []
    ports = free_ports(3)
    with contextlib.ExitStack() as stack:
        await asyncio.to_thread(stack.enter_context, _server("http", ports[0]))
        said.append(f"HTTP to uvicorn: {await _p50(ports[0], n):.3g} us")
        if importlib.util.find_spec("grpc") is not None:
            await asyncio.to_thread(stack.enter_context, _server("grpc", ports[1]))
            await asyncio.to_thread(stack.enter_context, _server("http", ports[2], ports[1]))
            said.append(f"HTTP to gRPC: {await _p50(ports[2], n):.3g} us")
    return "; ".join(said)


def main() -> None:
    what, port, *rest = sys.argv[1:]
    if what == "grpc":
        asyncio.run(serve_grpc(int(port)))
        return
    import uvicorn

    uvicorn.run(
        app_for(int(rest[0]) if rest else 0), port=int(port), log_level="error", loop="uvloop", http="httptools"
    )


if __name__ == "__main__":
    main()
