"""The peer of our outbox: JetStream `sources` between the same two nats-servers, the hub killed and started again."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from pathlib import Path

import nats.errors
from nats.js.api import ExternalStream, StreamSource

from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError
from edgeward.core.natsserver import find_binary

_PATIENCE = 120.0


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def backlog(folder: Path, rounds: int) -> list[float]:
    """Seconds from "the hub's JetStream answers" to "the first message of the backlog is there", per round."""
    hub_port, leaf, edge_port = _port(), _port(), _port()
    configs = {
        "hub": f"""port: {hub_port}
host: 127.0.0.1
server_name: hub
jetstream {{store_dir: "{folder}/h", domain: hub, sync_interval: always}}
leafnodes {{port: {leaf}, host: 127.0.0.1}}
""",
        "edge": f"""port: {edge_port}
host: 127.0.0.1
server_name: edge
jetstream {{store_dir: "{folder}/e", domain: edge}}
leafnodes {{reconnect: "250ms", remotes: [{{urls: ["nats://127.0.0.1:{leaf}"]}}]}}
""",
    }
    running: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str) -> None:
        file = folder / f"{name}.conf"
        file.write_text(configs[name])
        running[name] = subprocess.Popen([str(find_binary()), "-c", str(file), "-l", str(folder / f"{name}.log")])

    took = []
    start("hub")
    start("edge")
    try:
        hub = await Bus.connect(f"nats://127.0.0.1:{hub_port}", name="hub")
        edge = await Bus.connect(f"nats://127.0.0.1:{edge_port}", name="edge")
        await edge.jetstream().add_stream(name="S", subjects=["s.>"])
        source = StreamSource(name="S", external=ExternalStream(api="$JS.edge.API"))
        await hub.jetstream().add_stream(name="ALL", sources=[source])

        async def count() -> int:
            try:
                return int((await hub.jetstream(timeout=1.0).stream_info("ALL")).state.messages)
            except (EdgewardError, nats.errors.Error, TimeoutError):
                return -1

        sent = 0
        async with asyncio.timeout(_PATIENCE * (rounds + 1)):
            for n in range(rounds + 1):
                if n:
                    running["hub"].kill()
                    running["hub"].wait()
                before = sent
                for _ in range(50):
                    await edge.publish_acked("s.a", b"x" * 100)
                    sent += 1
                if n:
                    start("hub")
                    while await count() < 0:  # noqa: ASYNC110 - asking a server
                        await asyncio.sleep(0.005)
                began = time.monotonic()
                while await count() <= before:  # noqa: ASYNC110 - asking a server
                    await asyncio.sleep(0.005)
                if n:
                    took.append(time.monotonic() - began)
                while await count() < sent:  # noqa: ASYNC110 - asking a server
                    await asyncio.sleep(0.02)
        await hub.close()
        await edge.close()
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return took
