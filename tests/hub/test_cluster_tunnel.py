"""A tunnel by any process of a hub of three: whoever the operator comes to, and whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.hub.test_cluster import Cloud

from edgeward.core.errors import EdgewardError
from edgeward.tunnel.client import Target, connect, tunnel
from edgeward.tunnel.flow import Stream
from edgeward.tunnel.link import Way


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "cloud")
    yield made
    for process in (*made.agents, *made.hubs.values()):
        process.close()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _whole(stream: Stream, data: bytes) -> bool:
    await stream.write(data)
    stream.end()
    return await stream.readexactly(len(data)) == data and await stream.read() == b""


@pytest.mark.slow
def test_a_node_is_reached_by_either_process_and_found_again_when_one_dies(cloud: Cloud, tmp_path: Path) -> None:
    async def body() -> None:
        echo = await asyncio.start_server(_echo, "127.0.0.1", 0)
        port = echo.sockets[0].getsockname()[1]
        tls = ssl.create_default_context(cafile=str(cloud.ca))

        def target(name: str) -> Target:
            return Target(Way("127.0.0.1", urlsplit(cloud.urls[name]).port or 0, tls), cloud.token)

        async with cloud.client() as client:
            await cloud.begin(client)
            await cloud.node(client, tmp_path / "n1")

            async def opens(name: str) -> bool:
                async with connect(target(name), "n1", "tcp", {"port": port}) as stream:
                    return await _whole(stream, name.encode() * 300_000)

            for name in ("a", "b"):
                await cloud.until(f"a tunnel by {name}", lambda name=name: opens(name))
            logs = {name: cloud.hubs[name].log.read_text() for name in ("a", "b")}
            (holder,) = (name for name, text in logs.items() if "n1 opened its tunnel" in text)  # one dial, for both
            other = "b" if holder == "a" else "a"
            async with tunnel(target(other), "n1") as made:
                stream = made.open("tcp", {"port": port})
                await stream.write(b"first")
                assert await stream.readexactly(5) == b"first"
                cloud.hubs[holder].kill()
                with pytest.raises(EdgewardError):  # it does not hang
                    async with asyncio.timeout(60):
                        await stream.read()
                await cloud.until(f"the node is found without {holder}", lambda: opens(other))
        echo.close()

    asyncio.run(body())
