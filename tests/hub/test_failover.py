"""Three real servers: who leads is gone, and another one is elected because it was told, with everything kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import StorageType, StreamConfig

from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError
from edgeward.core.identity import HubIdentity
from edgeward.core.natsconf import Cluster
from edgeward.core.natsserver import HubSpec, NatsServer, free_port
from edgeward.core.raftz import Group, overdue
from edgeward.hub.failover import Failover

STREAM = "S"


class Three:
    """Servers a, b and c of one hub, and a stream that all three keep."""

    def __init__(self, folder: Path) -> None:
        self.identity = identity = HubIdentity.open(folder / "identity")
        pem = folder / "peer.pem"
        identity.authority.server(pem, ["127.0.0.1"], both=True)
        ports = [free_port()]
        for _ in range(2):
            ports.append(free_port(taken=ports))
        routes = tuple(f"127.0.0.1:{p}" for p in ports)
        self.servers: dict[str, NatsServer] = {}
        for name, port in zip("abc", ports, strict=True):
            cluster = Cluster(("127.0.0.1", port), routes, "secret", pem, identity.ca_file)
            spec = HubSpec(identity.operator_jwt, identity.system_account, identity.own_accounts, name, cluster=cluster)
            self.servers[name] = NatsServer(folder / name, spec)

    async def bus(self, name: str, *, system: bool = False) -> Bus:
        user = self.identity.system_user if system else self.identity.user
        return await Bus.connect(self.servers[name].url, name="test", user=user, timeout=60)

    def failover(self, system: Bus) -> Failover:
        return Failover(system, self.identity.system_account, self.identity.account)

    async def group(self, system: Bus) -> tuple[str, Group]:
        """The stream's raft group as the server at hand sees it."""
        account = self.identity.account
        subject = f"$SYS.REQ.SERVER.{system.server_id}.RAFTZ"
        answer = await system.request(subject, msgspec.json.encode({"account": account}), timeout=10)
        groups = msgspec.json.decode(answer.data, type=dict[str, Any])["data"][account]
        ((name, doc),) = groups.items()
        return name, msgspec.convert(doc, Group)


@asynccontextmanager
async def three(folder: Path) -> AsyncIterator[Three]:
    made = Three(folder)
    try:
        for server in made.servers.values():
            await server.start()
        yield made
    finally:
        for server in made.servers.values():
            await server.stop()


async def until(what: str, ready: Callable[[], Awaitable[Any]], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(EdgewardError, nats.errors.Error, nats.js.errors.Error, TimeoutError, KeyError):
            if got := await ready():
                return got
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


def test_a_group_elects_when_it_is_told_that_its_leader_is_gone(tmp_path: Path) -> None:
    async def body(t: Three) -> None:
        bus = await t.bus("a")
        config = StreamConfig(name=STREAM, subjects=["s.>"], num_replicas=3, storage=StorageType.FILE)
        await until("the stream is made", lambda: bus.jetstream(timeout=2).add_stream(config))
        kept = 0

        async def write() -> bool:
            nonlocal kept
            for name in t.servers:
                with contextlib.suppress(EdgewardError):
                    other = await Bus.connect(t.servers[name].url, name="w", user=t.identity.user, timeout=2)
                    try:
                        await other.publish_acked("s.x", str(kept).encode(), timeout=2)
                        kept += 1
                        return True
                    finally:
                        await other.close()
            return False

        async def leader() -> str:
            info = await bus.jetstream(timeout=2).stream_info(STREAM)
            peers = (info.cluster.replicas or []) if info.cluster else []
            whole = len(peers) == 2 and all(p.current and not p.offline for p in peers)
            return str(info.cluster.leader or "") if info.cluster and whole else ""

        # a machine that stands still for seconds may see nats-server elect by itself: then once more
        for _ in range(4):
            first = await until("somebody leads", leader)
            await until("a message is kept", write)
            await bus.close()
            left = next(n for n in t.servers if n != first)
            system = await t.bus(left, system=True)
            looks = t.failover(system)
            assert not await looks.look(), "all is well"
            name, before = await t.group(system)
            term = before.term
            os.kill(t.servers[first].pid or 0, signal.SIGKILL)

            async def told(looks: Failover = looks, system: Bus = system, name: str = name, term: int = term) -> str:
                if any(n.group == name for n in await looks.look()):
                    return "told"
                return "by itself" if (await t.group(system))[1].term > term else ""

            how = await until("the group hears of it", told)
            await until("a message is kept without the leader", write)
            after = (await t.group(system))[1]
            await system.close()
            await t.servers[first].start()
            bus = await t.bus("a")
            if how == "told":
                break
        assert how == "told"
        # nobody voted for the one that is gone (term + 1): one that has all the messages asked for the next term
        assert after.term >= term + 2
        await until("all three have it", leader)

        # and where the leader is there after all, it costs an election and nothing else
        system = await t.bus("b", system=True)
        name, now = await t.group(system)
        wrong = msgspec.structs.replace(now, state="FOLLOWER", id="nobody00")
        if now.leader == now.id:  # this server leads: it does not list itself
            wrong.peers = now.peers | {now.leader: next(iter(now.peers.values()))}
        ended = {p.name: 0.0 for p in wrong.peers.values()}
        (nudge,) = overdue({name: wrong}, ended, 2)
        await system.publish(nudge.subject, nudge.payload)

        async def newer() -> bool:
            return (await t.group(system))[1].term > now.term

        await until("there was an election", newer)
        await until("a message is kept after it", write)
        state = (await bus.jetstream(timeout=10).stream_info(STREAM)).state
        assert state.messages >= kept, "what was acknowledged is there"
        await system.close()
        await bus.close()

    async def run() -> None:
        async with three(tmp_path) as t:
            await body(t)

    asyncio.run(run())
