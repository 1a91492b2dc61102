"""Health checks against real servers and commands: the reason is told, and nothing outlives its time."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from edgeward.core.proc import find_by_env, wait_exit
from edgeward.workloads import health

LONG = 90.0


@asynccontextmanager
async def server(answer: bytes | None) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Answers every request with ``answer``; None: takes the connection and says nothing."""
    asked: list[bytes] = []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.IncompleteReadError:  # it only connected
            writer.close()
            return
        if answer is not None:
            writer.write(answer)
        else:
            await reader.read()  # until the other side goes
        writer.close()

    async with await asyncio.start_server(one, "127.0.0.1", 0) as running:
        yield running.sockets[0].getsockname()[1], asked


@contextmanager
def closed_port() -> Iterator[int]:
    """A port where nobody listens, and nobody else can: it is bound."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield int(s.getsockname()[1])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.0 399 x\r\n\r\n", ""),
        (b"HTTP/1.1 204\n", ""),
        (b"HTTP/1.1 199 x\r\n\r\n", "status 199"),
        (b"HTTP/1.1 400 x\r\n\r\n", "status 400"),
        (b"HTTP/1.1 503 x\r\n\r\n", "status 503"),
        (b"HTTP/1.1 -20 x\r\n\r\n", "the answer is no HTTP"),
        (b"HTTP/1.1\r\n", "the answer is no HTTP"),
        (b"SSH-2.0-x 200 \r\n", "the answer is no HTTP"),
        (b"", "the answer is no HTTP"),
        (b"HTTP/1.1 200 " + b"x" * 200_000, "no answer: "),
    ],
)
def test_http(answer: bytes, why: str) -> None:
    async def body() -> None:
        async with server(answer) as (port, asked):
            got = await health.http("127.0.0.1", port, "/é?q=1", LONG)
            assert got.startswith(why) if why.endswith(" ") else got == why
            assert asked[0].startswith(b"GET /?")
            assert f"\r\nHost: 127.0.0.1:{port}\r\n".encode() in asked[0]

    asyncio.run(body())


def test_a_server_that_is_silent_or_not_there() -> None:
    async def body() -> None:
        async with server(None) as (port, _):
            assert await health.http("127.0.0.1", port, "/", 0.05) == "no answer within 0.05 s"
            assert await health.tcp("127.0.0.1", port, LONG) == ""
        with closed_port() as port:
            assert (await health.http("127.0.0.1", port, "/", LONG)).startswith("no answer: ")
            assert (await health.tcp("127.0.0.1", port, LONG)).startswith("no connection: ")

    asyncio.run(body())


def test_tcp_gives_up_on_a_full_backlog() -> None:
    """A listener that takes nobody: the kernel leaves the next connections unanswered."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(0)
        port = s.getsockname()[1]
        fillers = []
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        try:
            assert asyncio.run(health.tcp("127.0.0.1", port, 0.3)) == "no connection within 0.3 s"
        finally:
            for filler in fillers:
                filler.close()


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 0", ""),
        ("exit 3", "ended with status 3"),
        ('test "$MARK" = yes && test "$(pwd -P)" = "$HERE" && test -z "$HOME"', ""),
        ("read x && exit 0; exit 5", "ended with status 5"),  # it reads nothing of ours
        ("kill -HUP $$", "ended by signal 1"),
        ("kill -KILL $$", "ended by signal 9"),
    ],
)
def test_command(tmp_path: Path, script: str, why: str) -> None:
    env = {"MARK": "yes", "HERE": str(tmp_path.resolve())}
    assert asyncio.run(health.command(["/bin/sh", "-c", script], env, tmp_path, LONG)) == why


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = f"check-{os.getpid()}-{tmp_path.name}"
    env = {"MARK": mark, "PATH": os.defpath}

    async def body() -> None:
        got = await health.command(["/bin/sh", "-c", "sleep 1000 & wait"], env, tmp_path, 0.5)
        assert got == "did not end within 0.5 s"
        for child in find_by_env("MARK", mark):
            assert await wait_exit(child, LONG)

    asyncio.run(body())


def test_a_cancelled_check_leaves_no_process(tmp_path: Path) -> None:
    mark = f"cancelled-{os.getpid()}-{tmp_path.name}"
    env = {"MARK": mark, "PATH": os.defpath}

    async def body() -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        task = asyncio.create_task(
            health.command(["/bin/sh", "-c", "echo x > fifo; sleep 1000; exit 0"], env, tmp_path, LONG)
        )
        await asyncio.to_thread(fifo.read_text)  # it runs
        running = find_by_env("MARK", mark)
        assert running
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for process in running:
            assert await wait_exit(process, LONG)

    asyncio.run(body())


@pytest.mark.parametrize("argv", [["/nowhere/at-all"], ["/dev/null"], ["/bin/true\0"]])
def test_what_cannot_be_run_is_a_reason_not_an_error(tmp_path: Path, argv: list[str]) -> None:
    assert asyncio.run(health.command(argv, {}, tmp_path, LONG)).startswith("cannot be run: ")
    assert asyncio.run(health.command(["/bin/true"], {}, tmp_path / "gone", LONG)).startswith("cannot be run: ")
