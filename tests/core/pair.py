"""A hub's and a node's nats-server, joined by a leaf: what the outbox moves between."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType

from edgeward.core.bus import Bus
from edgeward.core.jsread import read_batch, stamp_of
from edgeward.core.natsconf import closed_mappings
from edgeward.core.natsserver import free_port
from edgeward.core.outbox import Outbox
from edgeward.core.outqueue import Queue, QueueSpec, Reading
from edgeward.streams.cloud import StreamsCloud

_BINARY = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or "nats-server"


def readings(start: int, end: int, size: int = 100, topic: str = "sensors/a") -> list[Reading]:
    return [(topic, b'{"id":%d,"pad":"%s"}' % (i, b"x" * size), i) for i in range(start, end)]


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 90) -> float:
    """Seconds until the condition held; fails after ``seconds``: a guard against hanging, not a bound to measure by."""
    started = time.monotonic()
    while True:
        held = condition()
        if not isinstance(held, bool):
            held = await held
        took = time.monotonic() - started
        if held:
            return took
        assert took < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.02)


class Pair:
    """``async with Pair(dir)``; the node is ``x``. ``kill``, ``start`` and ``freeze`` take ``hub`` or ``edge``."""

    def __init__(self, root: Path, edge_store: Path | None = None) -> None:
        self.root = root
        ports: list[int] = []  # they stay the same over kills
        for _ in range(4):
            ports.append(free_port(taken=ports))
        self.hub_port, self.leaf, self.edge_port, self.mqtt = ports
        self._configs = {
            "hub": f"""port: {self.hub_port}
host: 127.0.0.1
server_name: hub
max_payload: 8388608
jetstream {{store_dir: "{root}/h", domain: hub, sync_interval: always}}
leafnodes {{port: {self.leaf}, host: 127.0.0.1}}
""",
            "edge": f"""port: {self.edge_port}
host: 127.0.0.1
server_name: edge
max_payload: 8388608
jetstream {{store_dir: "{edge_store or root / "e"}", domain: n-x}}
mqtt {{port: {self.mqtt}, host: 127.0.0.1}}
leafnodes {{reconnect: "250ms", remotes: [{{urls: ["nats://127.0.0.1:{self.leaf}"], account: EDGE}}]}}
no_auth_user: agent
accounts {{EDGE {{
  jetstream: enabled, users: [{{user: agent, password: a}}, {{user: u, password: p}}], mappings: {{}}
}}}}
""",
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Pair:
        self.start("hub")
        self.start("edge")
        try:
            self.hub = await Bus.connect(f"nats://127.0.0.1:{self.hub_port}", name="hub", timeout=60)
            self.edge = await Bus.connect(f"nats://127.0.0.1:{self.edge_port}", name="edge", timeout=60)
        except BaseException:
            self._end()
            raise
        self.cloud = StreamsCloud(self.hub.client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self._running.values():
            process.send_signal(signal.SIGCONT)
        await self.hub.close(1)
        await self.edge.close(1)
        self._end()

    def _end(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()

    def start(self, name: str) -> None:
        path = self.root / f"{name}.conf"
        path.write_text(self._configs[name])
        with (self.root / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen([_BINARY, "-c", str(path)], stderr=log)

    async def close_topics(self, subjects: Sequence[str]) -> None:
        """As the agent does it: the edge's configuration is written anew and reloaded."""
        said = json.dumps(closed_mappings(subjects))
        (self.root / "edge.conf").write_text(self._configs["edge"].replace("mappings: {}", f"mappings: {said}"))
        log = self.root / "edge.log"
        before = log.read_bytes().count(b"Reloaded server configuration")
        self._running["edge"].send_signal(signal.SIGHUP)
        await until(lambda: log.read_bytes().count(b"Reloaded server configuration") > before)

    def kill(self, name: str) -> None:
        self._running[name].kill()
        self._running[name].wait()

    def freeze(self, name: str) -> None:
        self._running[name].send_signal(signal.SIGSTOP)

    def spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        self._tasks.append(asyncio.create_task(run()))

    def outbox(self) -> Outbox:
        outbox = Outbox(self.edge, node="x")
        self.spawn(outbox.run())
        return outbox

    async def stream(self, name: str) -> None:
        """Makes the hub's stream."""
        from edgeward.core.resource import decode
        from edgeward.hub.kinds import load

        load()
        doc = {"apiVersion": "edgeward/v1", "kind": "Export", "metadata": {"name": "e", "namespace": "default"}}
        await self.cloud.ensure(decode(doc | {"spec": {"from": {"mqtt": "s/#"}, "to": {"hub": {"stream": name}}}}))

    async def ids(self, name: str) -> list[int]:
        """The ids of all readings in the hub's stream, in its order."""
        return [m["payload"]["id"] async for m in await self.cloud.reader(name)]

    async def hub_answers(self) -> None:
        """Waits until the edge reaches the hub's JetStream."""

        async def asked() -> bool:
            try:
                await self.edge.request("$JS.hub.API.INFO", timeout=0.5)
            except Exception:  # noqa: BLE001 - whatever it is, it is not there yet
                return False
            return True

        await until(asked)


async def fill(queue: Queue, start: int, end: int, *, step: int = 500, size: int = 100) -> None:
    for at in range(start, end, step):
        await queue.append(readings(at, min(at + step, end), size))


def spec(**more: object) -> QueueSpec:
    return QueueSpec("q", "s", **more)  # type: ignore[arg-type]


def loads(rows: Sequence[Reading]) -> list[int]:
    return [json.loads(r[1])["id"] for r in rows]


async def drained(queue: Queue) -> None:
    async def empty() -> bool:
        await queue.measure()
        return queue.counters.pending == 0

    await until(empty)


async def stamps(p: Pair, name: str) -> list[int]:
    """When each batch came to the hub's stream, by the hub's clock."""
    found: list[int] = []
    at = 1
    while got := await read_batch(p.hub.client, "$JS.API", f"DATA_{name}", at, f"ew.data.{name}.>", 64):
        found += [stamp_of(m[2]) for m in got]
        at = got[-1][0] + 1
    return found
