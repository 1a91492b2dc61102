"""A fleet of simulated nodes on a real hub: the curve, the storm, one change among a thousand nodes.

The hub is the real program in processes of its own; the nodes are the node's own side of the conversation
(:class:`~edgeward.nodes.edge.NodeEdge`) on links of their own (:mod:`benchmarks.leaf`) in this process. Each measure
prints what the hub's machine paid beside it, and a row's baseline is the same thing at the small end of the curve.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import PYTHON, Row, percentile, row
from benchmarks.leaf import LeafBus
from edgeward.core.daemon import memory_mb
from edgeward.core.errors import Conflict
from edgeward.core.files import read_json, write_json
from edgeward.core.identity import HubIdentity
from edgeward.core.nkeys import KeyPair, NatsUser
from edgeward.core.resource import Key
from edgeward.core.scope import fingerprint
from edgeward.hub.kinds import load
from edgeward.lab.cluster import Api
from edgeward.nodes.ancestry import Ancestor
from edgeward.nodes.edge import NodeEdge
from edgeward.nodes.wire import LEVEL, HubObject, LocalChange

#: Nodes of a site.
SITE = 10
_APPS = 3


class Replica:
    """What a node keeps of the hub's state, without the disk."""

    def __init__(self, store_id: str) -> None:
        self.hub_revision = 0
        self.epoch = ""
        self.store_id = store_id
        self.objects: dict[Key, HubObject] = {}
        self._meta: dict[str, str] = {}

    def pending(self) -> list[LocalChange]:
        return []

    def hub_view(self) -> str:
        return fingerprint((k, o.revision) for k, o in self.objects.items())

    def hub_keys(self) -> list[Key]:
        return list(self.objects)

    def strange(self) -> dict[Key, str]:
        return {}

    def apply_sync(
        self,
        objects: list[HubObject],
        *,
        revision: int,
        epoch: str,
        full: bool,
        line: Sequence[Ancestor] = (),
        level: int = LEVEL,
    ) -> tuple[list[Key], list[Key]]:
        if full:
            self.objects.clear()
        for o in objects:
            if o.stored is None:
                self.objects.pop(o.key, None)
            else:
                self.objects[o.key] = o
        self.hub_revision, self.epoch = revision, epoch
        return [], []

    def resolve(self, seq: int, now: HubObject) -> None:
        raise AssertionError("nothing was pushed")

    def meta(self, name: str) -> str:
        return self._meta.get(name, "")

    def set_meta(self, name: str, value: str) -> str:
        self._meta[name] = value
        return value


class NoEvents:
    """A node to which nothing happens."""

    def first_after(self, name: str, since: int, limit: int) -> list[dict[str, Any]]:
        return []

    async def append(self, name: str, record: dict[str, Any]) -> None:
        return None


class SimNode:
    """One simulated node. It reports each app of its site as running."""

    def __init__(self, name: str, site: str, user: NatsUser, address: tuple[str, int], tls: ssl.SSLContext) -> None:
        self.name, self.site = name, site
        self.bus = LeafBus(name, user, address, tls)
        self.replica = Replica(name)
        self.edge = NodeEdge(name, self.replica, NoEvents())  # type: ignore[arg-type]
        self.bus.on_change = self.edge.link_changed
        self.edge.report_node({"version": "sim", "address": "127.0.0.1", "system": "simulated", "enforced": {}})

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.bus.run())
            group.create_task(self.edge.run(self.bus))  # type: ignore[arg-type]

    def report(self) -> None:
        for key in list(self.replica.objects):
            if key.kind == "App":
                instance = {"node": self.name, "phase": "Running", "pid": 4711, "restarts": 0}
                self.edge.report(key, {"phase": "Running", "instances": [instance], "observedGeneration": 1})


def app(name: str, site: str, value: str = "600") -> dict[str, Any]:
    return {
        "apiVersion": "edgeward/v1",
        "kind": "App",
        "metadata": {"name": name, "labels": {"line": "a"}},
        "spec": {
            "placement": {"site": site} if site else {},
            "process": {"command": ["python3", "-c", f"import time; time.sleep({value})"]},
        },
    }


def cpu_seconds(pid: int | None) -> float:
    """User and system time that a process has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


class Hub:
    """The real hub in its own processes, with a fleet that was enrolled beforehand."""

    def __init__(self, data: Path, nodes: dict[str, str]) -> None:
        self.data = data
        self.nodes = nodes  # name to site
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = int(s.getsockname()[1])
        data.mkdir(parents=True)
        write_json(data / "hub.json", {"port": self.port})
        identity = HubIdentity.open(data / "identity")
        self.users: dict[str, NatsUser] = {}
        for name in nodes:
            key = KeyPair.create("user")
            self.users[name] = NatsUser(identity.issue_node(name, key.public), key)
        self.token = identity.admin_token()
        self.ca = data / "identity" / "ca.crt"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *prefix: str) -> None:
        (self.data / "run.json").unlink(missing_ok=True)
        argv = [*prefix, PYTHON, "-m", "edgeward.hub", "--data", str(self.data), "--die-with-parent"]
        env = {**os.environ, "EDGEWARD_LOG": "WARNING"}
        with (self.data.parent / "hub.log").open("ab") as out:
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, env=env)

    @property
    def run(self) -> dict[str, Any]:
        doc: dict[str, Any] = read_json(self.data / "run.json", {})
        return doc

    async def ready(self, timeout: float = 90.0) -> None:
        async with asyncio.timeout(timeout):
            while not self.run.get("ready"):  # noqa: ASYNC110 - a file that another process writes
                await asyncio.sleep(0.01)

    def declare(self) -> None:
        """Sites, nodes, three apps a site and a few for all: what a fleet's hub holds."""
        api = self.api()

        def post(path: str, doc: dict[str, Any]) -> None:
            with contextlib.suppress(Conflict):
                api.call("POST", path, {"apiVersion": "edgeward/v1", **doc})

        for site in sorted(set(self.nodes.values())):
            post("/api/v1/sites", {"kind": "Site", "metadata": {"name": site}, "spec": {}})
            for n in range(_APPS):
                post("/api/v1/namespaces/default/apps", app(f"{site}-app{n}", site))
        for n in range(5):
            config = {"kind": "Config", "metadata": {"name": f"c{n}"}, "spec": {"data": {"k": "v" * 200}}}
            post("/api/v1/namespaces/default/configs", config)
        for name, site in self.nodes.items():
            post("/api/v1/nodes", {"kind": "Node", "metadata": {"name": name}, "spec": {"site": site}})

    def api(self) -> Api:
        return Api(f"https://127.0.0.1:{self.port}", self.ca, self.token)

    def kill(self) -> None:
        """SIGKILL to the hub and its nats-server."""
        for pid in (self.run.get("nats"), self.process.pid if self.process else None):
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        pid = self.run.get("nats")
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def used(self) -> tuple[float, float, float, float]:
        """CPU seconds of the hub and of its nats-server, PSS in MB of both."""
        hub, nats = self.process.pid if self.process else None, self.run.get("nats")
        return cpu_seconds(hub), cpu_seconds(nats), memory_mb(hub), memory_mb(nats)


@dataclass
class Measure:
    """One point of the curve."""

    nodes: int
    sync_s: float = 0.0
    sync_p50_s: float = 0.0
    hub_cpu_s: float = 0.0
    nats_cpu_s: float = 0.0
    hub_mb: float = 0.0
    nats_mb: float = 0.0
    idle_hub_cpu: float = 0.0
    idle_bits_per_node: float = 0.0
    down_kb_per_node: float = 0.0
    storm_s: float = 0.0
    storm_hub_mb: float = 0.0
    storm_hub_cpu_s: float = 0.0
    storm_missed: int = 0
    storm_dials_per_s: float = 0.0
    storm_bunching: float = 0.0
    join_cpu_ms_node: float = 0.0
    change_s: float = 0.0
    change_bytes_node: float = 0.0
    change_elsewhere: int = 0
    load1: float = 0.0


class Fleet:
    """The nodes, running in this process."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        address = ("127.0.0.1", hub.port)
        tls = ssl.create_default_context(cafile=str(hub.ca))
        self.nodes = [SimNode(name, site, hub.users[name], address, tls) for name, site in hub.nodes.items()]
        rng = random.Random(5)  # repeatable
        for node in self.nodes:
            node.bus.pause = rng.uniform(0.7, 1.4)  # natsconf gives each node its own, too
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self.tasks = [asyncio.create_task(n.run()) for n in self.nodes]

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def when(self, done: Callable[[SimNode], bool], timeout: float = 120.0) -> list[float]:
        """Seconds from now until it was true of each node."""
        began = time.monotonic()
        took: dict[str, float] = {}
        while len(took) < len(self.nodes):
            at = time.monotonic() - began
            for node in self.nodes:
                if node.name not in took and done(node):
                    took[node.name] = at
            if at > timeout:
                lacking = [n.name for n in self.nodes if n.name not in took]
                raise TimeoutError(f"{len(lacking)} of {len(self.nodes)} nodes are not there: {lacking[:5]}")
            await asyncio.sleep(0.02)
        return list(took.values())

    def bytes_down(self) -> dict[str, int]:
        return {n.name: n.bus.traffic().on_the_link()[1] for n in self.nodes}

    def bytes_all(self) -> int:
        return sum(sum(n.bus.traffic().on_the_link()) for n in self.nodes)


def fleet_of(count: int) -> dict[str, str]:
    return {f"n{n}": f"s{n // SITE}" for n in range(count)}


@contextlib.asynccontextmanager
async def system(count: int) -> AsyncIterator[tuple[Hub, Fleet]]:
    with tempfile.TemporaryDirectory(prefix="edgeward-fleet-") as folder:
        hub = Hub(Path(folder) / "hub", fleet_of(count))
        hub.start()
        try:
            await hub.ready()
            await asyncio.to_thread(hub.declare)
            fleet = Fleet(hub)
            try:
                yield hub, fleet
            finally:
                await fleet.stop()
        finally:
            hub.stop()


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def measure(count: int, *, idle_s: float = 60.0, storm: bool = True) -> Measure:
    m = Measure(count, load1=round(os.getloadavg()[0], 2))
    async with system(count) as (hub, fleet):
        before = hub.used()
        _say(f"{count} nodes: first sync")
        await fleet.start()
        took = await fleet.when(lambda n: n.edge.synced.is_set())
        m.sync_s, m.sync_p50_s = max(took), percentile(took, 50)
        for node in fleet.nodes:
            node.report()
        await fleet.when(lambda n: n.edge.online and not n.edge._dirty and not n.edge._full)
        await settle(hub)
        after = hub.used()
        m.hub_cpu_s, m.nats_cpu_s = after[0] - before[0], after[1] - before[1]
        m.join_cpu_ms_node = (m.hub_cpu_s + m.nats_cpu_s) * 1000 / count
        m.hub_mb, m.nats_mb = after[2], after[3]
        m.down_kb_per_node = sum(fleet.bytes_down().values()) / count / 1000

        _say("one change of one site")
        await asyncio.to_thread(_change, hub, "s0-app0", "s0", "11")  # the first write of an object writes more
        await settle(hub)
        messages = {n.name: n.bus.messages for n in fleet.nodes}
        down = fleet.bytes_down()
        began = time.monotonic()
        revision = await asyncio.to_thread(_change, hub, "s0-app0", "s0", "12")
        mine = [n for n in fleet.nodes if n.site == "s0"]
        while not all(_holds(n, "s0-app0", revision) for n in mine):  # noqa: ASYNC110 - many nodes' state
            await asyncio.sleep(0.005)
        m.change_s = time.monotonic() - began
        await asyncio.sleep(1.0)  # whatever else the change sets off
        now = fleet.bytes_down()
        m.change_bytes_node = max(now[n.name] - down[n.name] for n in mine)
        # what else a node got meanwhile is an answer to its own beat
        beats = {n.name: n.bus.messages - messages[n.name] for n in fleet.nodes if n.site != "s0"}
        m.change_elsewhere = sum(1 for v in beats.values() if v > 1)

        if idle_s:
            _say("idle")
            await settle(hub)
            used, sent, began = hub.used(), fleet.bytes_all(), time.monotonic()
            await asyncio.sleep(idle_s)
            span = time.monotonic() - began
            m.idle_hub_cpu = (sum(hub.used()[:2]) - sum(used[:2])) / span
            m.idle_bits_per_node = (fleet.bytes_all() - sent) * 8 / span / count

        if storm:
            _say("the hub is killed")
            await asyncio.to_thread(hub.kill)
            changed = await _storm(hub, fleet, m)
            m.storm_missed = sum(1 for n in fleet.nodes if not all(_holds(n, k, r) for k, r in changed[n.site]))
        m.load1 = max(m.load1, round(os.getloadavg()[0], 2))
    return m


async def _storm(hub: Hub, fleet: Fleet, m: Measure) -> dict[str, list[tuple[str, int]]]:
    """Starts the killed hub, changes every site while nodes come back, and waits until all have all."""
    old = {n.name: n.edge.hub for n in fleet.nodes}
    for n in fleet.nodes:
        n.bus.dials.clear()
    await asyncio.sleep(8.0)  # the outage
    dials = [d for n in fleet.nodes for d in n.bus.dials]
    m.storm_dials_per_s = busiest(dials)
    m.storm_bunching = bunching(dials)
    began = time.monotonic()
    hub.start()
    await hub.ready()
    used = hub.used()
    sites = sorted(set(hub.nodes.values()))
    revisions = await asyncio.to_thread(lambda: {s: _change(hub, f"{s}-app1", s, "77") for s in sites})
    changed = {s: [(f"{s}-app1", revisions[s])] for s in sites}
    peak = 0.0

    def back(n: SimNode) -> bool:
        return n.edge.online and n.edge.hub != old[n.name] and _holds(n, *changed[n.site][0])

    waiting = asyncio.ensure_future(fleet.when(back, 180))
    while not waiting.done():
        peak = max(peak, hub.used()[2] + hub.used()[3])
        await asyncio.sleep(0.25)
    await waiting
    m.storm_s = time.monotonic() - began
    m.storm_hub_mb = peak
    m.storm_hub_cpu_s = sum(hub.used()[:2]) - sum(used[:2])
    return changed


def busiest(times: list[float], window: float = 0.25) -> float:
    """The most of them in any ``window``, a second; the first round, which the loss itself set off, left out."""
    ordered = sorted(times)
    ordered = [t for t in ordered if t > ordered[0] + 3.0]
    most, first = 0, 0
    for last, t in enumerate(ordered):
        while ordered[first] < t - window:
            first += 1
        most = max(most, last - first + 1)
    return most / window


def bunching(times: list[float]) -> float:
    """The busiest moment beside the mean: 1 is an even spread, 4 is all of them in one quarter of each second."""
    ordered = sorted(times)
    ordered = [t for t in ordered if t > ordered[0] + 3.0]
    if len(ordered) < 2:
        return 0.0
    return busiest(times) * (ordered[-1] - ordered[0]) / len(ordered)


def _holds(node: SimNode, name: str, revision: int) -> bool:
    got = node.replica.objects.get(Key("App", "default", name))
    return got is not None and got.revision >= revision


def _change(hub: Hub, name: str, site: str, value: str) -> int:
    spec = {"process": {"command": ["python3", "-c", f"import time; time.sleep({value})"]}}
    got = hub.api().call("PATCH", f"/api/v1/namespaces/default/apps/{name}", {"spec": spec})
    return int(got["metadata"]["resourceVersion"])


async def settle(hub: Hub, quiet: float = 2.0, timeout: float = 90.0) -> None:
    """Until the hub's processes have done next to nothing for a while."""
    async with asyncio.timeout(timeout):
        while True:
            before = sum(hub.used()[:2])
            await asyncio.sleep(quiet)
            if sum(hub.used()[:2]) - before < 0.15 * quiet:
                return


def curve(counts: tuple[int, ...]) -> list[Measure]:
    load()
    return [asyncio.run(measure(n)) for n in counts]


def main() -> int:
    counts = tuple(int(a) for a in sys.argv[1:]) or (1, 10, 100)
    for m in curve(counts):
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(m).items()}))
    return 0


def fleet() -> list[Row]:
    counts = tuple(int(n) for n in os.environ.get("EDGEWARD_BENCH_NODES", "10 1000").split())
    small, *_, large = curve(counts)
    n = large.nodes
    return [
        row(f"{n} nodes back after the hub was killed, all synced", large.storm_s, "s", 60,
            base=(f"{small.nodes} nodes", small.storm_s)),
        row(f"hub and its nats-server while {n} nodes come back, PSS", large.storm_hub_mb, "MB", 500,
            base=(f"{small.nodes} nodes", small.storm_hub_mb)),
        row(f"nodes of {n} that hold what changed while they came back", n - large.storm_missed, "nodes", n, less=False,
            base=(f"of {small.nodes}", small.nodes - small.storm_missed)),
        row(f"{n} nodes without their hub, dials of the busiest 0.25 s beside the mean", large.storm_bunching,
            "times", 2, base=(f"{small.nodes} nodes", small.storm_bunching)),
        row(f"one change of one site among {n} nodes, bytes down a node of the site", large.change_bytes_node, "B",
            2000, base=(f"{small.nodes} nodes", small.change_bytes_node)),
        row(f"one change of one site among {n} nodes, nodes that were told", SITE + large.change_elsewhere, "nodes",
            SITE, base=(f"{small.nodes} nodes", min(SITE, small.nodes) + small.change_elsewhere)),
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
