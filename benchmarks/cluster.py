"""A hub of three servers under load while one server, one hub process or one of each is killed, again and again.

The hub is real: two processes that serve, a witness, three nats-servers. Writers go to both hubs as a client with two
addresses does; beside them a node's outbox delivers what a foreign MQTT client publishes. A round kills by SIGKILL,
seeded, and is over for a writer with the acknowledgement of a write that it *began* after the kill; the round's figure
is its slowest writer's. The baseline is the same writers and the same kills on three bare nats-servers by nats-py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import KeyValueConfig

from benchmarks.common import PYTHON, Row, percentile, row
from edgeward.core.bus import Bus, cancellable
from edgeward.core.errors import EdgewardError
from edgeward.core.files import read_json
from edgeward.core.identity import HubIdentity
from edgeward.core.natsserver import find_binary, free_port
from edgeward.hub.cluster import Member, prepare
from edgeward.lab.publisher import Publisher
from edgeward.nodes.enrol import decode_token
from edgeward.nodes.enrol_edge import join

WRITERS = 4
#: Seconds between a writer's acknowledgement and its next write, and after which it asks the other address.
PACE, PATIENCE = 0.05, 2.0
RATE = 200
BAR = 5.0
_HEALTHY = 120.0
#: What dies in a round: the server that leads the state's raft group, another one, the hub process that leads, the
#: other, or the leading server and a hub process at once (on one machine or on two, as the seed has it).
KINDS = ("leading server", "other server", "leading hub", "other hub", "both")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def _until(what: str, ready: Callable[[], Awaitable[Any]], seconds: float = _HEALTHY) -> Any:
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(
                httpx.HTTPError, EdgewardError, nats.errors.Error, OSError, TimeoutError, KeyError
            ):
                if got := await ready():
                    return got
            await asyncio.sleep(0.05)  # the pace of looking at other processes
    raise TimeoutError(what)


class Writer:
    """Writes one thing after the other; knows what was acknowledged, and when the writes of which began."""

    def __init__(self, name: str, put: Callable[[str, int], Awaitable[bool]], ways: int) -> None:
        self.name, self._put, self._ways = name, put, ways
        self.acked: list[str] = []
        self.began = 0.0  # of the last acknowledged write
        self.at = 0.0  # when that was acknowledged
        self._moved = asyncio.Event()

    async def run(self) -> None:
        way, n = hash(self.name) % self._ways, 0
        while True:
            n += 1
            began = time.monotonic()
            if await self._put(f"{self.name}-{n}", way):
                self.acked.append(f"{self.name}-{n}")
                self.began, self.at = began, time.monotonic()
                self._moved.set()
                await asyncio.sleep(PACE)
            else:
                way = (way + 1) % self._ways
                await asyncio.sleep(0.02)  # the pace of asking somebody else

    async def after(self, kill: float) -> float:
        """Seconds from ``kill`` to the first acknowledgement of a write that began after it."""
        async with asyncio.timeout(60):
            while self.began <= kill:
                self._moved.clear()
                await self._moved.wait()
        return self.at - kill


class Process:
    """A hub process with its nats-server, or a node's agent."""

    def __init__(self, directory: Path, module: str) -> None:
        self.directory, self.module = directory, module
        self.process: subprocess.Popen[bytes] | None = None
        self.born = 0.0

    def start(self) -> None:
        argv = [PYTHON, "-m", self.module, "--data", str(self.directory)]
        with (self.directory / "log").open("ab") as out:
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        self.born = time.monotonic()

    @property
    def state(self) -> dict[str, Any]:
        doc: dict[str, Any] = read_json(self.directory / "run.json", {})
        return doc

    def kill_server(self) -> None:
        for name in ("nats", "plane"):
            if pid := self.state.get(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def kill_process(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)

    def end(self) -> None:
        self.kill_process()
        self.kill_server()


class Cloud:
    """Two processes that serve, a witness, a node."""

    def __init__(self, root: Path) -> None:
        ports = [free_port()]
        for _ in range(4):
            ports.append(free_port(taken=ports))
        members = [
            Member("a", "127.0.0.1", ports[0], ports[1]),
            Member("b", "127.0.0.1", ports[2], ports[3]),
            Member("c", "127.0.0.1", 0, ports[4], witness=True),
        ]
        self.root = root
        self.hubs = {d.name: Process(d, "edgeward.hub") for d in prepare(root / "cloud", members)}
        self.serving = ("a", "b")
        self.urls = [f"https://127.0.0.1:{m.port}" for m in members if not m.witness]
        identity = root / "cloud" / "a" / "identity"
        self.identity = HubIdentity.open(identity)
        self._token = (identity / "admin.token").read_text().strip()
        self._tls = ssl.create_default_context(cafile=str(identity / "ca.crt"))
        self.node = Process(root / "n1", "edgeward.agent")
        self.http = self.client()

    def client(self) -> httpx.AsyncClient:
        head = {"Authorization": f"Bearer {self._token}"}
        return httpx.AsyncClient(verify=self._tls, headers=head, timeout=PATIENCE)

    async def start(self) -> Publisher:
        for process in self.hubs.values():
            process.start()
        await _until("the hubs are ready", self._ready)
        http = self.http

        async def post(path: str, doc: dict[str, Any]) -> dict[str, Any]:
            answer = await http.post(f"{self.urls[0]}/api/v1{path}", json=doc, timeout=20)
            answer.raise_for_status()
            made: dict[str, Any] = answer.json()
            return made

        await post("/sites", {"apiVersion": "edgeward/v1", "kind": "Site", "metadata": {"name": "s"}})
        issued = await post("/issue/jointoken", {"node": "n1", "site": "s"})
        self.node.directory.mkdir()
        await asyncio.to_thread(join, self.node.directory, decode_token(issued["token"]))
        self.node.start()
        await post("/namespaces/default/exports", {
            "apiVersion": "edgeward/v1", "kind": "Export", "metadata": {"name": "line1"},
            "spec": {"from": {"mqtt": "sensors/#"}, "to": {"hub": {"stream": "line1"}}, "identity": "$.id"},
        })  # fmt: skip

        async def exports() -> bool:
            got = await http.get(f"{self.urls[0]}/api/v1/namespaces/default/exports/line1")
            return bool(got.json()["status"].get("nodes"))

        await _until("the node has its export", exports)
        state = self.node.state
        return Publisher(state["mqtt_url"], state["mqtt_user"], state["mqtt_password"], rate=RATE)

    async def _ready(self) -> bool:
        if not all(p.state.get("ready") for p in self.hubs.values()):
            return False
        for url in self.urls:
            if (await self.http.get(f"{url}/readyz")).status_code != 200:
                return False
        return True

    @contextlib.asynccontextmanager
    async def bus(self, names: tuple[str, ...] = ("a", "b", "c")) -> AsyncIterator[Bus]:
        """To the first of these servers that is there."""
        for name in names:
            port = read_json(self.hubs[name].directory / "nats" / "ports.json", {}).get("client", 0)
            try:
                bus = await Bus.connect(
                    f"nats://127.0.0.1:{port}", name="bench", user=self.identity.user, timeout=PATIENCE
                )
            except EdgewardError:
                continue
            try:
                yield bus
            finally:
                await bus.close()
            return
        raise TimeoutError("no server of the hub answers")

    async def whole(self) -> str:
        """Until everybody is there and has everything; gives the server that leads the state's group."""

        async def look() -> str:
            if not await self._ready():
                return ""
            async with self.bus() as bus:
                for stream in ("RECORDS", "DATA_line1", "KV_resources"):
                    cluster = (await bus.jetstream(timeout=PATIENCE).stream_info(stream)).cluster
                    peers = (cluster.replicas or []) if cluster else []
                    if not cluster or not cluster.leader or len(peers) != 2:
                        return ""
                    if any(p.offline or not p.current for p in peers):
                        return ""
                return str(cluster.leader) if cluster else ""

        return str(await _until("the cluster is whole", look))

    def leads(self) -> str:
        """The hub process that has been there longest (core/peers.py)."""
        return min(self.serving, key=lambda name: self.hubs[name].born)

    async def put(self, name: str, way: int) -> bool:
        doc = {"apiVersion": "edgeward/v1", "kind": "Config", "metadata": {"name": name}, "spec": {"data": {"k": name}}}
        try:
            answer = await self.http.post(f"{self.urls[way]}/api/v1/namespaces/default/configs", json=doc)
        except httpx.HTTPError:
            return False
        # each name is written once: a conflict would be the write's own first try
        assert answer.status_code != 409, answer.text
        return answer.status_code == 201

    async def configs(self, way: int) -> set[str]:
        found: set[str] = set()
        more = ""
        while True:
            page = await self.http.get(
                f"{self.urls[way]}/api/v1/namespaces/default/configs", params={"continue": more}, timeout=30
            )
            doc = page.json()
            found |= {c["metadata"]["name"] for c in doc["items"]}
            more = doc["metadata"].get("continue", "")
            if not more:
                return found

    async def close(self) -> None:
        await self.http.aclose()
        for process in (self.node, *self.hubs.values()):
            process.end()


class Arrived:
    """The readings at the hub, straight from its stream: identities, and when the last one came."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    async def run(self, cloud: Cloud) -> None:
        last = 0
        while True:
            with contextlib.suppress(EdgewardError, nats.errors.Error, TimeoutError, OSError):
                async with cloud.bus(("c", "b", "a")) as bus:
                    while True:
                        try:
                            got = await bus.jetstream(timeout=1.0).get_msg("DATA_line1", last + 1, next="ew.data.>")
                        except nats.js.errors.NotFoundError:
                            await asyncio.sleep(0.02)  # the pace of asking for more
                            continue
                        last = got.seq or 0
                        self.ids += [json.loads(r[1])["id"] for r in msgspec.msgpack.decode(got.data or b"")]
            await asyncio.sleep(0.05)  # the pace of asking another server


async def _flow(arrived: Arrived, publisher: Publisher, kill: float) -> float:
    """Seconds from ``kill`` until a reading that was published after it is at the hub."""
    newest = publisher.next_id
    async with asyncio.timeout(90):
        while True:
            if any(i >= newest for i in arrived.ids[-400:]):
                return time.monotonic() - kill
            await asyncio.sleep(0.01)  # the pace of looking


def rounds(count: int, seed: int = 7) -> list[str]:
    """The kinds of ``count`` rounds: each as often as the others, in an order of the seed."""
    rng = random.Random(seed)
    got: list[str] = []
    while len(got) < count:
        block = list(KINDS)
        rng.shuffle(block)
        got += block
    return got[:count]


async def _kill(cloud: Cloud, kind: str, rng: random.Random) -> tuple[float, list[str]]:
    """Kills; gives when, and which hub processes have to be started again. A server comes back by its process."""
    leader = await cloud.whole()
    first, second = cloud.leads(), next(n for n in cloud.serving if n != cloud.leads())
    others = [n for n in cloud.hubs if n != leader]
    server = {"leading server": leader, "both": leader, "other server": rng.choice(others)}.get(kind)
    hub = {"leading hub": first, "other hub": second, "both": rng.choice(cloud.serving)}.get(kind)
    _say(f"{kind}: " + ", ".join([*([f"server {server}"] if server else []), *([f"hub {hub}"] if hub else [])]))
    at = time.monotonic()
    if hub:
        cloud.hubs[hub].kill_process()
    if server:
        cloud.hubs[server].kill_server()
    return at, [hub] if hub else []


async def _ours(root: Path, count: int) -> tuple[list[tuple[str, float]], list[float], float]:
    """Per round its kind and the slowest writer's gap; the readings' gaps; how many percent of all that was
    acknowledged is there, and once."""
    cloud, arrived, rng = Cloud(root), Arrived(), random.Random(11)
    gaps: list[tuple[str, float]] = []
    flows: list[float] = []
    tasks: list[asyncio.Task[None]] = []
    try:
        publisher = await cloud.start()
        publisher.start()
        writers = [Writer(f"w{n}", cloud.put, 2) for n in range(WRITERS)]
        tasks = [asyncio.create_task(w.run()) for w in writers]
        tasks.append(asyncio.create_task(arrived.run(cloud)))
        for kind in rounds(count):
            await cloud.whole()
            since = time.monotonic()
            await asyncio.gather(*(w.after(since) for w in writers), _flow(arrived, publisher, since))
            at, again = await _kill(cloud, kind, rng)
            took = await asyncio.gather(*(w.after(at) for w in writers), _flow(arrived, publisher, at))
            gaps.append((kind, max(took[:-1])))
            flows.append(took[-1])
            _say(f"  writes {gaps[-1][1]:.2f} s, readings {flows[-1]:.2f} s")
            for name in again:
                cloud.hubs[name].start()
        await cloud.whole()
        await asyncio.to_thread(publisher.end)
        for task in tasks[:-1]:
            task.cancel()
        await asyncio.gather(*tasks[:-1], return_exceptions=True)
        acked = {name for w in writers for name in w.acked}
        sent = publisher.acked()

        async def delivered() -> bool:
            return sent <= set(arrived.ids)

        with contextlib.suppress(TimeoutError):
            await _until("every reading is at the hub", delivered, 30)
        lost = sum([len(acked - await cloud.configs(way)) for way in range(2)])
        lost += len(sent - set(arrived.ids)) + len(arrived.ids) - len(set(arrived.ids))
        _say(f"{len(acked)} writes and {len(sent)} readings acknowledged, {lost} lost or twice")
        return gaps, flows, 100 * (1 - lost / (len(acked) + len(sent)))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await cloud.close()


class Bare:
    """Three bare nats-servers, and a bucket of three copies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ports = [free_port()]
        for _ in range(5):
            ports.append(free_port(taken=ports))
        self.ports, self._peers = ports[:3], ports[3:]
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.clients: list[Client] = []

    def start(self, n: int) -> None:
        routes = ", ".join(f'"nats-route://127.0.0.1:{p}"' for p in self._peers)
        file = self.root / f"{n}.conf"
        file.write_text(
            f"server_name: s{n}\nhost: 127.0.0.1\nport: {self.ports[n]}\n"
            f'jetstream {{store_dir: "{self.root}/js{n}", sync_interval: always}}\n'
            f"cluster {{name: c, host: 127.0.0.1, port: {self._peers[n]}, routes: [{routes}]}}\n"
        )
        argv = [str(find_binary()), "-c", str(file), "-l", str(self.root / f"{n}.log")]
        self.running[n] = subprocess.Popen(argv)

    async def open(self) -> None:
        for n in range(3):
            self.start(n)

        async def quiet(_: Exception) -> None:
            return None

        for n in range(2):  # a client of each of two addresses, which knows the other
            servers = [f"nats://127.0.0.1:{self.ports[k]}" for k in (n, 1 - n)]
            client = Client()
            await client.connect(
                servers, reconnect_time_wait=0.25, max_reconnect_attempts=-1, dont_randomize=True, error_cb=quiet
            )
            self.clients.append(client)

        async def make() -> bool:
            await self.clients[0].jetstream(timeout=PATIENCE).create_key_value(KeyValueConfig("b", replicas=3))
            return True

        await _until("the bare cluster has a bucket", make)

    async def leader(self) -> int:
        async def look() -> str:
            cluster = (await self.clients[0].jetstream(timeout=PATIENCE).stream_info("KV_b")).cluster
            peers = (cluster.replicas or []) if cluster else []
            if not cluster or not cluster.leader or len(peers) != 2 or any(p.offline or not p.current for p in peers):
                return ""
            return cluster.leader

        return int((await _until("the bare cluster is whole", look))[1:])

    async def put(self, name: str, way: int) -> bool:
        try:
            # a bare client would swallow the cancellation of its writer
            await cancellable(self.clients[way].jetstream(timeout=PATIENCE).publish(f"$KV.b.{name}", name.encode()))
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError, OSError):
            return False
        return True

    async def keys(self) -> set[str]:
        """All of the bucket, as the stream's leader counts them."""

        async def look() -> set[str]:
            info = await self.clients[0].jetstream(timeout=30).stream_info("KV_b", subjects_filter="$KV.b.>")
            return {subject.removeprefix("$KV.b.") for subject in info.state.subjects or {}}

        found: set[str] = await _until("the bare cluster says what it has", look)
        return found

    async def close(self) -> None:
        for client in self.clients:
            with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
                await client.close()
        for process in self.running.values():
            process.kill()
            process.wait()


async def _bare(root: Path, count: int) -> tuple[list[float], float]:
    """The slowest writer's gap of each round, in turn without the leader and without another server; percent kept."""
    bare, rng, gaps = Bare(root), random.Random(13), list[float]()
    tasks: list[asyncio.Task[None]] = []
    try:
        await bare.open()
        writers = [Writer(f"w{n}", bare.put, 2) for n in range(WRITERS)]
        tasks = [asyncio.create_task(w.run()) for w in writers]
        for n in range(count):
            leader = await bare.leader()
            since = time.monotonic()
            await asyncio.gather(*(w.after(since) for w in writers))
            victim = leader if n % 2 == 0 else rng.choice([k for k in range(3) if k != leader])
            at = time.monotonic()
            bare.running[victim].kill()
            gaps.append(max(await asyncio.gather(*(w.after(at) for w in writers))))
            _say(f"bare, {'leader' if victim == leader else 'other'}: {gaps[-1]:.2f} s")
            bare.running[victim].wait()
            bare.start(victim)
        await bare.leader()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        acked = {name for w in writers for name in w.acked}
        return gaps, 100 * len(acked & await bare.keys()) / len(acked)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await bare.close()


def cluster() -> list[Row]:
    """Rows: worst and p50 of writes, worst of readings, and what was lost."""
    count = int(os.environ.get("EDGEWARD_BENCH_KILLS", "15"))
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder:
        gaps, flows, kept = asyncio.run(_ours(Path(folder), count))
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder:
        bare, bare_kept = asyncio.run(_bare(Path(folder), max(4, count * 2 // 5)))
    writes = [took for _, took in gaps]
    what = "one of three servers, one of two hubs or one of each killed under load"
    n, of = len(gaps), len(bare)
    return [
        row(f"{what}: every writer writes again, worst of {n}", max(writes), "s", BAR,
            base=(f"bare KV puts, one of three servers killed, worst of {of}", max(bare))),
        row(f"{what}: every writer writes again, p50 of {n}", percentile(writes, 50), "s", BAR,
            base=(f"bare KV puts, one of three servers killed, p50 of {of}", percentile(bare, 50))),
        row(f"{what}: a node's readings arrive again, worst of {n}", max(flows), "s", BAR,
            base=(f"bare KV puts, one of three servers killed, worst of {of}", max(bare))),
        row(f"{what}: acknowledged writes and readings that are there, and once, all of {n}", kept, "%", 100,
            less=False, base=(f"bare KV puts, one of three servers killed, all of {of}", bare_kept)),
    ]  # fmt: skip
