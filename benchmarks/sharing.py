"""What a site's nodes cost its link for what all of them need: 20 nodes against one, as the kernel counts the bytes.

The hub is the real program; the nodes are the node's own side (link, mesh, sharing) on links of their own
(:mod:`benchmarks.leaf`) in this process, so each byte between hub and site is counted, beats and acknowledgements too.
All need the same: Configs of an App, changes of them one after the other, and an archive. The baseline is the same site
whose nodes ask each for themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import ssl
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.common import Row, row
from benchmarks.fleet import Fleet, Hub, SimNode, _say
from edgeward.core.blobs import PREFIX, BlobAsk, BlobPart
from edgeward.core.certs import check_csr, key_pem, make_csr, new_key, pem
from edgeward.core.errors import EdgewardError
from edgeward.core.identity import HubIdentity, NodeIdentity
from edgeward.core.nkeys import public_raw
from edgeward.nodes.mesh import Mesh
from edgeward.nodes.mesh_sockets import Settings
from edgeward.nodes.mesh_wire import Known, address_of
from edgeward.nodes.sharing import Sharing

_CONFIGS, _SIZE, _CHANGES, _ARCHIVE = 20, 20_000, 10, 3_000_000


class Shared:
    """The site's nodes with their mesh."""

    def __init__(self, root: Path, hub: Hub, fleet: Fleet, *, share: bool) -> None:
        self.fleet = fleet
        self.told: dict[str, Known] = {}
        self.meshes: dict[str, Mesh] = {}
        self.sharings: dict[str, Sharing] = {}
        identity = HubIdentity.open(hub.data / "identity")
        for node in fleet.nodes if share else ():
            self._add(root / node.name, identity, node)

    def _add(self, folder: Path, hub: HubIdentity, node: SimNode) -> None:
        own, key, name = NodeIdentity.open(folder / "identity"), new_key(), node.name
        cert = hub.authority.node(check_csr(make_csr(name, key), name), name, time.time() + 86400)
        own.accept(hub.issue_node(name, own.public_key), hub.ca_pem, key_pem=key_pem(key), certificate=pem(cert))
        self.told[name] = Known(name, public_raw(own.public_key, "user"))

        def moved() -> None:
            self.told[name] = Known(name, self.told[name].key, address_of(mesh.address))
            for other in self.meshes.values():
                other.look()

        mesh = self.meshes[name] = Mesh(
            name, node.site, own, folder / "mesh.json", Settings("127.0.0.1"), lambda: list(self.told.values()),
            changed=moved,
        )  # fmt: skip
        node.edge.site = self.sharings[name] = Sharing(
            name, node.site, mesh=mesh, link=node.edge, replica=node.replica, trusted=own.trusted,
            ask=_asks(node), folder=folder / "share",
        )  # fmt: skip

    def start(self) -> list[asyncio.Task[None]]:
        works = [m.run for m in self.meshes.values()] + [s.run for s in self.sharings.values()]
        return [asyncio.create_task(w()) for w in works]

    def settled(self) -> bool:
        """One asks for the others, and all of them know."""
        names = sorted(self.sharings)
        if not names or not all(s.carrier == names[0] for s in self.sharings.values()):
            return not names
        return set(self.sharings[names[0]]._told) == set(names[1:])

    async def fetch(self, node: SimNode, digest: str) -> bytes:
        """As an agent does: piece by piece."""
        sharing = self.sharings.get(node.name)
        ask = sharing.ask if sharing is not None else _asks(node)
        got = bytearray()
        while True:
            asked = msgspec.msgpack.encode(BlobAsk("default", digest, len(got), 512 * 1024))
            part = msgspec.msgpack.decode(await ask("blob", asked, 60.0), type=BlobPart)
            if part.error:
                raise EdgewardError(part.error)
            got += part.data
            if len(got) >= part.size:
                return bytes(got)


def _asks(node: SimNode) -> Any:
    async def ask(verb: str, data: bytes, timeout: float) -> bytes:
        return (await node.bus.request(f"ew.hub.{verb}.{node.name}", data, timeout=timeout)).data

    return ask


def _declare(hub: Hub, archive: bytes, rng: random.Random) -> None:
    api = hub.api()
    base = "/api/v1/namespaces/default"
    digest = PREFIX + hashlib.sha256(archive).hexdigest()
    request = urllib.request.Request(
        f"https://127.0.0.1:{hub.port}{base}/blobs/{digest}",
        data=archive,
        method="PUT",
        headers={"Authorization": f"Bearer {hub.token}", "Content-Type": "application/octet-stream"},
    )
    trusted = ssl.create_default_context(cafile=str(hub.ca))
    with urllib.request.urlopen(request, timeout=60, context=trusted):  # noqa: S310
        pass

    def post(path: str, kind: str, name: str, spec: dict[str, Any]) -> None:
        api.call("POST", path, {"apiVersion": "edgeward/v1", "kind": kind, "metadata": {"name": name}, "spec": spec})

    for n in range(_CONFIGS):
        post(f"{base}/configs", "Config", f"d{n}", {"data": {"k": _text(rng)}})
    names = [{"config": f"d{n}"} for n in range(_CONFIGS)]
    process = {"command": ["sleep", "1000"]}
    post(f"{base}/apps", "App", "all", {"placement": {"site": "s0"}, "process": process, "envFrom": names})
    spec = {
        "runtime": "python",
        "source": {"archive": {"digest": digest}},
        "placement": {"site": "s0"},
    }
    post(f"{base}/functions", "Function", "f", spec)


def _text(rng: random.Random) -> str:
    return rng.randbytes(_SIZE // 2).hex()


def _change(hub: Hub, n: int, rng: random.Random) -> int:
    path = f"/api/v1/namespaces/default/configs/d{n}"
    doc = hub.api().call("GET", path)
    doc["spec"] = {"data": {"k": _text(rng)}}
    return int(hub.api().call("PUT", path, doc)["metadata"]["resourceVersion"])


async def _until(done: Any, seconds: float = 120.0) -> None:
    async with asyncio.timeout(seconds):
        while not done():  # noqa: ASYNC110 - many nodes' state
            await asyncio.sleep(0.05)


async def measure(count: int, *, share: bool = True) -> dict[str, float]:
    """Bytes on the site's link, both ways: of the state and an archive, and of the changes; all nodes have all then."""
    rng = random.Random(count)
    _say(f"{count} nodes{'' if share else ', each for itself'}")
    with tempfile.TemporaryDirectory(prefix="edgeward-sharing-") as folder:
        hub = Hub(Path(folder) / "hub", {f"n{n:02}": "s0" for n in range(count)})
        hub.start()
        tasks: list[asyncio.Task[None]] = []
        try:
            await hub.ready()
            await asyncio.to_thread(hub.declare)
            fleet = Fleet(hub)
            shared = Shared(Path(folder), hub, fleet, share=share)
            await fleet.start()
            tasks = shared.start()
            try:
                await fleet.when(lambda n: n.edge.synced.is_set() and n.edge.online)
                await _until(shared.settled)
                await asyncio.sleep(12.0)  # what coming up sets off is over
                archive = rng.randbytes(_ARCHIVE)
                digest = PREFIX + hashlib.sha256(archive).hexdigest()
                began, at = fleet.bytes_all(), time.monotonic()
                await asyncio.to_thread(_declare, hub, archive, rng)
                await fleet.when(lambda n: any(k.name == "f" for k in n.replica.objects))
                got = await asyncio.gather(*(shared.fetch(n, digest) for n in fleet.nodes))
                assert all(g == archive for g in got)
                filled = fleet.bytes_all()
                for n in range(_CHANGES):
                    revision = await asyncio.to_thread(_change, hub, n, rng)
                    await fleet.when(lambda node, revision=revision: node.replica.hub_revision >= revision)
                return {
                    "fill": filled - began,
                    "changes": fleet.bytes_all() - filled,
                    "seconds": time.monotonic() - at,
                    "load": os.getloadavg()[0],
                }
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                with contextlib.suppress(EdgewardError):
                    await fleet.stop()
        finally:
            hub.stop()


async def _all() -> list[Row]:
    one = await measure(1)
    five, twenty = await measure(5), await measure(20)
    alone = await measure(20, share=False)

    def times(many: dict[str, float], what: str) -> float:
        return many[what] / one[what]

    def total(m: dict[str, float]) -> float:
        return m["fill"] + m["changes"]

    base = ("each node asks for itself", total(alone) / total(one))
    return [
        row("a site's link: 20 nodes against 1, all of it", total(twenty) / total(one), "times", 1.2,
            base=base),
        row("a site's link: 5 nodes against 1", total(five) / total(one), "times", 1.2, base=base),
        row("a site's link: 20 nodes against 1, state and an archive", times(twenty, "fill"), "times", 1.2,
            base=("each node asks for itself", times(alone, "fill"))),
        row("a site's link: 20 nodes against 1, ten changes of 20 kB", times(twenty, "changes"), "times", 1.2,
            base=("each node asks for itself", times(alone, "changes"))),
    ]  # fmt: skip


def sharing() -> list[Row]:
    return asyncio.run(_all())
