"""What a site's verdicts cost while nothing happens, and how soon they come.

Idle: 20 nodes' meshes and seats in this process over the loopback, its processor time and the datagrams (with their IP
and UDP headers) divided by 20; the baseline is their meshes without the vote. Soon: a lab of three nodes is cut; of
another one a node is killed, with the hub there and once more in a cut. A cut is seen when every node shows all as
wan-cut, its baseline is the hub's own liveness; a failover is over when the App's Service answers at the gateways of
both nodes that are left. Nearly all of it is waiting, so both idle sites wait together, each in a process of its own,
and then both labs.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import Row, System, answers, percentile, row, wait, web
from edgeward.core.certs import check_csr, key_pem, make_csr, new_key, pem
from edgeward.core.errors import Unreachable
from edgeward.core.identity import HubIdentity, NodeIdentity
from edgeward.core.nkeys import public_raw
from edgeward.nodes.mesh import Mesh
from edgeward.nodes.mesh_sockets import Settings
from edgeward.nodes.mesh_wire import Known, address_of
from edgeward.nodes.verdict_spec import Wish
from edgeward.nodes.verdicts import Verdicts

NODES, SECONDS = 20, 60.0
CUTS, KILLS = 8, 3
_HEADERS = 28  # IPv4 and UDP


class QuietLink:
    """A link that is there and silent."""

    online, good, unanswered, silence = True, True, 0.0, 0.0

    def __init__(self) -> None:
        self._beat = time.monotonic() + random.uniform(0, 11)

    @property
    def next_beat(self) -> float:
        return (self._beat - time.monotonic()) % 11

    def beat_within(self, seconds: float) -> None:
        self._beat = time.monotonic() + seconds

    def excuse(self) -> None:
        return


class Counted:
    """Counts what goes through a datagram transport."""

    def __init__(self, transport: Any, counts: list[int]) -> None:
        self._transport, self._counts = transport, counts

    def sendto(self, data: bytes, address: Any) -> None:
        self._counts[0] += len(data) + _HEADERS
        self._transport.sendto(data, address)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def _idle(root: Path, *, vote: bool) -> tuple[float, float]:
    """Processor time in percent of a core, and bytes a second sent, for each node."""
    hub = HubIdentity.open(root / "hub")
    told: dict[str, Known] = {}
    meshes: dict[str, Mesh] = {}
    seats: list[Verdicts] = []
    names = [f"n{k:02}" for k in range(NODES)]

    def made(name: str) -> Mesh:
        own, key = NodeIdentity.open(root / name / "identity"), new_key()
        cert = hub.authority.node(check_csr(make_csr(name, key), name), name, time.time() + 86400)
        own.accept(hub.issue_node(name, own.public_key), hub.ca_pem, key_pem=key_pem(key), certificate=pem(cert))
        told[name] = Known(name, public_raw(own.public_key, "user"))

        def moved() -> None:
            told[name] = Known(name, told[name].key, address_of(meshes[name].address))
            for other in meshes.values():
                other.look()

        there = Settings("127.0.0.1")
        return Mesh(name, "plant", own, root / name / "mesh.json", there, lambda: list(told.values()), changed=moved)

    async def no_hub(verb: str, data: bytes, timeout: float) -> bytes:
        raise Unreachable("there is none")

    for name in names:
        meshes[name] = made(name)
        if vote:
            path = root / name / "verdicts.json"
            seats.append(
                Verdicts(
                    meshes[name], path, link=QuietLink(), ask_hub=no_hub,
                    wish=Wish, names=lambda: names, changed=lambda nodes: None,
                )
            )  # fmt: skip

    def settled() -> bool:
        linked = all(p.linked for m in meshes.values() for p in m.peers().values())
        return linked and all([v.state for v in s.verdicts.values()] == ["healthy"] * NODES for s in seats)

    tasks = [asyncio.create_task(x.run()) for x in (*meshes.values(), *seats)]
    try:
        async with asyncio.timeout(120):
            while not settled():  # noqa: ASYNC110 - looking at twenty nodes' states
                await asyncio.sleep(0.1)
        await asyncio.sleep(10)  # what is left of finding one another
        counts = [0]
        for mesh in meshes.values():
            mesh._transport = Counted(mesh._transport, counts)  # type: ignore[assignment]
        began, cpu = time.monotonic(), time.process_time()
        await asyncio.sleep(SECONDS)
        took = time.monotonic() - began
        return 100 * (time.process_time() - cpu) / took / NODES, counts[0] / took / NODES
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _alone(vote: bool) -> tuple[float, float]:
    """In a process of its own: its processor time is counted."""
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder:
        return asyncio.run(_idle(Path(folder), vote=vote))


def idle() -> list[Row]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        (bare_cpu, bare_sent), (cpu, sent) = pool.map(_alone, (False, True))
    return [
        row(f"idle vote of {NODES} nodes, processor of each", cpu, "% of a core", 1.0, base=("mesh alone", bare_cpu)),
        row(
            f"idle vote of {NODES} nodes, sent by each", sent / 1000, "kB/s", 2.0, base=("mesh alone", bare_sent / 1000)
        ),
    ]


# -- how soon ----------------------------------------------------------------------------------------------------------

_PLANT = ("plant-1", "plant-2", "plant-3")


def _states(lab: System, node: str) -> dict[str, str]:
    items = lab.node("/api/v1/nodes", node)["items"]
    return {i["metadata"]["name"]: i["status"].get("verdict", "") for i in items}


def _all(lab: System, state: str) -> bool:
    return all(set(_states(lab, n).values()) == {state} for n in _PLANT)


def _answers(lab: System, node: str) -> bool:
    port = urlsplit(next(n["gateway_url"] for n in lab.context["nodes"] if n["name"] == node) or "").port
    return port is not None and answers(port)


def _failover(lab: System) -> float:
    """Kills the node that runs the App; seconds until its Service answers at both others. The node is back after."""
    status = lab.node("/api/v1/namespaces/default/apps/web", "plant-1")["status"]
    (home,) = {i["node"] for i in status["instances"] if i["phase"] == "Running"}
    rest = [n for n in _PLANT if n != home]
    lab.lab("kill", node=home)
    began = time.monotonic()
    # the killed one's program is gone, so an answer is another's
    wait(lambda: all(_answers(lab, n) for n in rest), 120, 0.05)
    took = time.monotonic() - began
    lab.lab("start", node=home)
    wait(lambda: all(_states(lab, n).get(home) in ("healthy", "wan-cut") for n in _PLANT), 120, 0.1)
    wait(lambda: all(_answers(lab, n) for n in _PLANT), 60, 0.1)
    time.sleep(5)  # what took its place is gone
    return took


@contextmanager
def _lab() -> Iterator[System]:
    """Three nodes, and an App whose Service answers at all of them."""
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder:
        file = Path(folder) / "lab.yaml"
        file.write_text("sites: [{name: plant, nodes: 3, link: lan}]\n")
        lab = System(Path(folder) / "data", "lab", "up", "-f", str(file))
        try:
            api, base = lab.api(), "/api/v1/namespaces/default"
            head = {"apiVersion": "edgeward/v1", "metadata": {"name": "web"}}
            api.call("POST", f"{base}/apps", web("web"))
            api.call("POST", f"{base}/services", {**head, "kind": "Service", "spec": {"app": "web", "port": "http"}})
            route = {"path": "/", "to": {"service": "web"}}
            api.call("POST", f"{base}/routes", {**head, "kind": "Route", "spec": route})
            wait(lambda: _all(lab, "healthy") and all(_answers(lab, n) for n in _PLANT), 120, 0.1)
            yield lab
        finally:
            lab.stop()


def _cuts(lab: System) -> tuple[list[float], float]:
    """Seconds of each cut until all show it, and of the first one until the hub misses all nodes."""
    api, cuts, by_hub = lab.api(), [], 0.0
    rng = random.Random(1)
    for n in range(CUTS):
        time.sleep(rng.uniform(5, 16))  # any moment of a beat's period
        lab.lab("cut", site="plant")
        began = time.monotonic()
        wait(lambda: _all(lab, "wan-cut"), 120, 0.05)
        cuts.append(time.monotonic() - began)
        if not n:  # a hub has more patience with a link that fails again and again
            wait(lambda: not any(n["status"]["online"] for n in api.call("GET", "/api/v1/nodes")["items"]), 180, 0.05)
            by_hub = time.monotonic() - began
        lab.lab("heal", site="plant")
        wait(lambda: _all(lab, "healthy"), 180, 0.1)
    return cuts, by_hub


def _kills(lab: System) -> tuple[list[float], list[float]]:
    """Seconds of failovers with the hub there, and in a cut."""
    linked = [_failover(lab) for _ in range(KILLS)]
    lab.lab("cut", site="plant")
    wait(lambda: _all(lab, "wan-cut"), 120, 0.1)
    return linked, [_failover(lab) for _ in range(KILLS)]


def soon() -> list[Row]:
    with _lab() as one, _lab() as other, ThreadPoolExecutor(2) as pool:
        cutting, killing = pool.submit(_cuts, one), pool.submit(_kills, other)
        (cuts, by_hub), (linked, cut_off) = cutting.result(), killing.result()
    return [
        row(
            f"cut to wan-cut at all three nodes, worst of {CUTS}", max(cuts), "s", 15.0,
            base=("until the hub misses all of them, once", by_hub),
        ),
        row(
            f"cut to wan-cut at all three nodes, p50 of {CUTS}", percentile(cuts, 50), "s", 15.0,
            base=("until the hub misses all of them, once", by_hub),
        ),
        row(
            f"node killed in a cut site to its Service answering elsewhere, worst of {KILLS}", max(cut_off), "s", 30.0,
            base=("with the hub there", max(linked)),
        ),
    ]  # fmt: skip


def verdicts() -> list[Row]:
    return [*idle(), *soon()]
