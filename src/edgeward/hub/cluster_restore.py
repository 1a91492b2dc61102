"""A backup into a hub of three servers: how a hub that began alone becomes one of three, and how a lost one comes back.

nats-server does not take a single server's streams into a cluster, so they are written anew: the three servers run for
a moment on this machine, on loopback, each in its member's folder; the backup's streams are made in them with three
copies; when all three have everything they are stopped. What lies there then is what the three machines go on from:
servers know one another by their names, not by their addresses. Until the last step nothing is in the target.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
from nats.aio.client import Client

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.files import ensure_dir
from edgeward.core.identity import HubIdentity
from edgeward.core.natsconf import Cluster
from edgeward.core.natsserver import HubSpec, NatsServer, free_port
from edgeward.core.seal import RecoveryKey
from edgeward.hub.cluster import SERVERS, Member, folders, share
from edgeward.hub.rebuild import Report
from edgeward.hub.restore import RUNTIME, check_room, open_source, restore_into, sync_all

#: Seconds for three servers to find one another, and to have all that one has.
_TOGETHER = 120.0
_LOOK = 0.2


def _servers(made: list[Path], identity: HubIdentity, peer: Path) -> list[NatsServer]:
    ports: list[int] = []
    for _ in made:
        ports.append(free_port(taken=ports))
    found = []
    for n, directory in enumerate(made):
        routes = tuple(f"127.0.0.1:{p}" for p in ports if p != ports[n])
        cluster = Cluster(("127.0.0.1", ports[n]), routes, identity.derived("cluster").hex(), peer, identity.ca_file)
        spec = HubSpec(
            identity.operator_jwt, identity.system_account, identity.own_accounts, directory.name, cluster=cluster
        )
        found.append(NatsServer(directory / "nats", spec))
    return found


async def _until(what: str, ready: Any) -> None:
    until = clock.monotonic() + _TOGETHER
    while True:
        with contextlib.suppress(EdgewardError, nats.errors.Error, TimeoutError, msgspec.DecodeError):
            if await ready():
                return
        if clock.monotonic() >= until:
            raise Unreachable(f"{what} within {_TOGETHER:g} s", remedy="try again when this machine has less to do")
        await asyncio.sleep(_LOOK)  # the pace of asking


async def _formed(client: Client) -> bool:
    """Whether the servers elected who places streams, and it knows all of them."""
    answer = await client.request("$JS.API.STREAM.NAMES", b"{}", timeout=2.0)
    return "error" not in msgspec.json.decode(answer.data)


async def _has_all(system: Bus) -> bool:
    said = await system.request(f"$SYS.REQ.SERVER.{system.server_id}.HEALTHZ", timeout=5.0)
    return (msgspec.json.decode(said.data).get("data") or {}).get("status") == "ok"


async def _peers(system: Bus) -> bool:
    said = await system.request(f"$SYS.REQ.SERVER.{system.server_id}.JSZ", timeout=5.0)
    meta = (msgspec.json.decode(said.data).get("data") or {}).get("meta_cluster") or {}
    return bool(meta.get("leader")) and meta.get("cluster_size") == SERVERS


@asynccontextmanager
async def _together(made: list[Path]) -> AsyncIterator[Client]:
    """A connection to three servers that run as one; they end, each with everything, with the block."""
    identity = HubIdentity.open(made[0] / "identity")
    peer = made[0].parent / "peer.pem"
    identity.authority.server(peer, [], both=True)
    servers = _servers(made, identity, peer)
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            stack.push_async_callback(server.stop)
        await asyncio.gather(*(s.start() for s in servers))
        systems = []
        for server in servers:
            systems.append(await Bus.connect(server.url, name="care", user=identity.system_user))
            stack.push_async_callback(systems[-1].close)
        bus = await Bus.connect(servers[0].url, name="care", user=identity.user)
        stack.push_async_callback(bus.close)
        for system in systems:
            await _until("the three servers did not find one another", lambda system=system: _peers(system))
        await _until("the three servers did not elect", lambda: _formed(bus.client))
        yield bus.client
        for system in systems:
            await _until("not all of the three servers had everything", lambda system=system: _has_all(system))


async def restore_cluster(
    path: Path, out: Path, members: list[Member], key: RecoveryKey, *, bind: str = "", **how: Any
) -> Report:
    """Makes ``out/<name>`` for each member, with what is in the backup. ``how``: as of ``restore.open_source``.

    Raises ``Invalid`` or ``Refused`` before anything there has changed.
    """
    targets = folders(out, members)
    source = await open_source(path, key, **how)
    ensure_dir(out)
    check_room(path, out, SERVERS)
    staging = out / f".restore-{secrets.token_hex(4)}"
    made = [staging / m.name for m in members]
    try:
        ensure_dir(made[0])

        @asynccontextmanager
        async def servers(first: Path) -> AsyncIterator[Client]:
            share(made, members, bind)
            async with _together(made) as client:
                yield client

        restorer = await restore_into(made[0], source, servers, replicas=SERVERS)
        for directory in made:
            for name in RUNTIME:
                (directory / "nats" / name).unlink(missing_ok=True)
        await asyncio.to_thread(sync_all, staging)
        for directory, target in zip(made, targets, strict=True):
            if target.exists():
                target.rmdir()
            directory.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    report = source.report
    report.epoch, report.revision, report.directory = restorer.epoch, restorer.revision, str(out)
    return report
