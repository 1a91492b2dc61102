"""What the kernel says of a link: counted over connections, told apart from others' connections, stuck when it is."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.js.api import StreamConfig
from tests.core.pair import until

from edgeward.core.bus import Bus
from edgeward.core.identity import HubIdentity, NodeIdentity
from edgeward.core.jsread import read_batch
from edgeward.core.natsserver import AGENT_USER, HubSpec, NatsServer, NodeSpec
from edgeward.nodes.wan import (
    ESTABLISHED,
    Connection,
    LinkWatch,
    Meter,
    TcpInfo,
    connections,
    owns,
    parse_dump,
    parse_tcp_info,
    redial,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="the counters of Linux's kernel")


def one(port: int, sent: int, received: int = 0, *, state: int = ESTABLISHED, **info: int) -> Connection:
    return Connection(("127.0.0.1", port), state, TcpInfo(sent, received, sent // 100, received // 100, **info))  # type: ignore[arg-type]


def test_headers_count_and_so_does_every_connection() -> None:
    assert TcpInfo(1000, 500, 10, 5).on_the_link() == (1000 + 10 * 40, 500 + 5 * 40)
    assert TcpInfo(1000, 500, 10, 5, timestamps=True).on_the_link() == (1000 + 10 * 52, 500 + 5 * 52)
    meter = Meter()
    assert meter.look([one(1, 100)]), "it came"
    assert not meter.look([one(1, 300)])
    assert meter.look([]), "it went"
    assert not meter.established
    assert meter.totals() == (300 + 3 * 40, 0)
    assert meter.look([one(2, 200), one(3, 100, state=8)])
    assert meter.connections == 3
    assert meter.totals() == (600 + 6 * 40, 0)
    # the same port again, another connection: its counters begin anew
    assert not meter.look([one(2, 100), one(3, 100, state=8)])
    assert meter.totals() == (700 + 7 * 40, 0)


def test_stuck_is_unacknowledged_and_silent() -> None:
    meter = Meter()
    meter.look([one(1, 100, unacked=2, silent_ms=9000)])
    assert not meter.stuck
    meter.look([one(1, 100, unacked=0, silent_ms=90000)])
    assert not meter.stuck, "idle"
    meter.look([one(1, 100, unacked=2, silent_ms=11000)])
    assert meter.stuck
    # a link by satellite, where a packet was lost three times: 1.2 s, then 2.4 and 4.8 more, and its acknowledgement
    meter.look([one(1, 100, unacked=2, silent_ms=20_000, rtt=1_200_000)])
    assert not meter.stuck
    assert meter.patience == 26
    meter.look([one(1, 100, unacked=2, silent_ms=27_000, rtt=1_200_000)])
    assert meter.stuck
    meter.look([one(1, 100, unacked=2, silent_ms=46_000, rtt=30_000_000)])
    assert meter.stuck, "there is a bound"


def test_a_dump_that_is_not_understood_does_no_harm() -> None:
    assert parse_tcp_info(b"") == TcpInfo()
    assert parse_dump(b"", 1) == ([], False)
    assert parse_dump(struct.pack("=IHHII", 8, 20, 0, 0, 0), 1) == ([], False)
    assert parse_dump(struct.pack("=IHHII", 999, 20, 0, 0, 0), 1) == ([], False)
    assert parse_dump(struct.pack("=IHHII", 16, 3, 0, 0, 0), 1) == ([], True)
    body = bytearray(80)
    body[0] = socket.AF_INET
    body[6:8] = (443).to_bytes(2, "big")
    body[72:76] = struct.pack("=HH", 2, 2)  # an attribute of impossible length
    found, _ = parse_dump(struct.pack("=IHHII", 96, 20, 0, 0, 0) + bytes(body), 443)
    assert [c.info for c in found] == [TcpInfo()]
    with pytest.raises(OSError, match="sock_diag"):
        parse_dump(struct.pack("=IHHIIi", 20, 2, 0, 0, 0, -1), 1)


class Talker:
    online = False
    silence = 0.0
    changes = 0

    def link_changed(self) -> None:
        self.changes += 1


def test_a_link_that_gives_no_answer_is_dialled_anew_and_a_slow_hub_is_not_stormed() -> None:
    async def body() -> None:
        talk, again = Talker(), []

        async def dial() -> None:
            again.append(now)

        watch = LinkWatch(talk, [443], lambda: None, dial)
        now = 0.0
        talk.online = True
        await watch.step([one(1, 100)], now)
        assert talk.changes == 1
        for now in range(1, 200):
            await watch.step([one(1, 100 + now, unacked=1, silent_ms=60_000)], now)
        assert again == [], "the hub answers: whatever the kernel says"
        talk.silence = 60.0
        await watch.step([one(1, 300, unacked=1, silent_ms=60_000)], now)
        assert again == [now], "TCP waits ever longer, and the hub is not heard: before the node is taken for gone"
        talk.silence = 0.0
        again.clear()
        for n in range(20):
            now += 1
            await watch.step([one(1, 301 + n, unacked=1, silent_ms=60_000)], now)
        assert again == []
        talk.online = False
        await watch.step([one(1, 400, unacked=1, silent_ms=11_000)], now)
        assert again == [now], "stuck: at once"
        talk.online = True
        await watch.step([one(2, 100)], now)
        talk.online, began = False, now
        again.clear()
        for now in range(began, began + 1000):
            await watch.step([one(2, 100)], now)
        assert 3 <= len(again) <= 10, again
        assert again[0] - began > 40
        assert again[1] - again[0] > 60, "ever more patience"
        usage = watch.usage()
        assert usage["sent"] > 0 and usage["connections"] == 2

    asyncio.run(body())


def test_a_new_connection_is_given_time_for_its_first_answer() -> None:
    async def body() -> None:
        talk, again = Talker(), []

        async def dial() -> None:
            again.append(now)

        watch = LinkWatch(talk, [443], lambda: None, dial)
        for now in range(1, 11):
            # what it sent is on its way; the kernel counts its silence from the start of the machine
            await watch.step([one(1, 100, unacked=1, silent_ms=5_000_000)], now)
        assert again == [], "a slow link is not dialled anew every second"
        for now in range(11, 20):
            await watch.step([one(1, 100, unacked=1, silent_ms=5_000_000)], now)
        assert again == [12], "after ten seconds without any answer it is stuck"

    asyncio.run(body())


@linux
def test_the_kernel_counts_our_own_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert connections(port) == []
        with socket.create_connection(("127.0.0.1", port)) as client:
            far, _ = server.accept()
            with far:
                client.sendall(b"x" * 1000)
                assert far.recv(2000)
                far.sendall(b"y" * 300)
                client.recv(2000)
                found = connections(port)
                assert found is not None
                (mine,) = found
                assert mine.local == client.getsockname()
                assert mine.state == ESTABLISHED
                assert (mine.info.bytes_sent, mine.info.bytes_received) == (1000, 300)
                assert mine.info.packets_sent >= 3 and mine.info.packets_received >= 2
                assert owns(os.getpid(), mine.inode)
                assert not owns(None, mine.inode)


class Leaf:
    """A hub's and a node's nats-server with the leaf between them, and a connection to each."""

    def __init__(self, hub: NatsServer, node: NatsServer, cloud: Bus, edge: Bus) -> None:
        self.hub, self.node, self.cloud, self.edge = hub, node, cloud, edge
        self.port = hub.ports["websocket"]
        self.heard: list[str] = []

    async def hears(self) -> bool:
        await self.edge.publish("ew.hub.beat.plant-1", b"", reply="_INBOX_plant-1.0")
        await self.edge.flush()
        return bool(self.heard)

    def carried(self) -> tuple[int, int]:
        (one,) = connections(self.port) or []
        return one.info.bytes_sent, one.info.bytes_received


@asynccontextmanager
async def leaf(tmp_path: Path) -> AsyncIterator[Leaf]:
    identity = HubIdentity.open(tmp_path / "identity")
    own = NodeIdentity.open(tmp_path / "node-identity")
    own.accept(identity.issue_node("plant-1", own.public_key), identity.ca_pem)
    hub = NatsServer(tmp_path / "hub", HubSpec(identity.operator_jwt, identity.system_account, identity.accounts))
    await hub.start()
    url = f"ws://127.0.0.1:{hub.ports['websocket']}"
    node = NatsServer(tmp_path / "node", NodeSpec("plant-1", hub_url=url, creds_file=own.creds_file))
    await node.start()
    try:
        cloud = await Bus.connect(hub.url, name="hub", user=identity.user)
        edge = await Bus.connect(node.url, name="x", username=AGENT_USER, password=node.secret, inbox="_INBOX_plant-1")
        pair = Leaf(hub, node, cloud, edge)

        async def hear(msg: object) -> bytes:
            pair.heard.append("one")
            return b"yes"

        await cloud.serve("ew.hub.beat.*", hear, node_token=3)  # type: ignore[arg-type]
        async with asyncio.timeout(60):
            await until(pair.hears, 20)
            yield pair
        await edge.close()
        await cloud.close()
    finally:
        await node.stop()
        await hub.stop()


@linux
def test_a_leaf_is_ended_and_comes_back_by_itself(tmp_path: Path) -> None:
    async def body() -> None:
        async with leaf(tmp_path) as pair:
            node, port, talk = pair.node, pair.port, Talker()
            watch = LinkWatch(talk, [port], lambda: node.pid, lambda: redial(node.url, node.secret))
            await watch.step(watch._own(connections(port) or []), 0.0)
            assert watch.meter.connections == 1
            await redial(node.url, node.secret)
            pair.heard.clear()
            await until(pair.hears, 20)

            async def new() -> bool:
                await watch.step(watch._own(connections(port) or []), 1.0)
                return watch.meter.connections == 2

            await until(new, 20)
            assert talk.changes >= 2
            sent, received = watch.meter.totals()
            assert sent > 4000 and received > 4000

    asyncio.run(body())


@linux
def test_what_a_node_reads_of_its_own_streams_does_not_cross_the_link(tmp_path: Path) -> None:
    async def body() -> None:
        async with leaf(tmp_path) as pair:
            client = pair.edge.client
            js = client.jetstream()
            await js.add_stream(StreamConfig(name="T", subjects=["t.>"], allow_direct=True))
            await js.publish("t.a", b"1")

            async def read() -> list[bytes]:
                return [data for *_, data in await read_batch(client, "$JS.API", "T", 1, "t.>", 10)]

            assert await read() == [b"1"]
            pair.heard.clear()
            await pair.hears()  # behind all that was to be sent before
            await until(lambda: bool(pair.heard), 20)
            before = pair.carried()
            for _ in range(20):
                assert await read() == [b"1"]
            await pair.edge.flush()
            # nats-server sends what it has within some milliseconds; one beat is behind all of it
            pair.heard.clear()
            await pair.hears()
            await until(lambda: bool(pair.heard), 20)
            sent = pair.carried()[0] - before[0]
            assert sent < 300, f"20 reads sent {sent} bytes"

    asyncio.run(body())
