"""Readings per second from a node to the hub, through the outbox, over two real nats-servers."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks.common import Row, row
from edgeward.core.bus import Bus
from edgeward.core.identity import HubIdentity, NodeIdentity, inbox_prefix
from edgeward.core.natsserver import AGENT_USER, HubSpec, NatsServer, NodeSpec
from edgeward.core.outbox import Outbox
from edgeward.core.outqueue import QueueSpec
from edgeward.lab.links import BUILTIN
from edgeward.lab.relay import Relay

READINGS = 600_000
BATCH = 500
PAYLOAD = b'{"id":123456,"celsius":21.5,"at":1795520169.437,"line":"line1","quality":"good","unit":"C","n":1}'


async def _run(folder: Path) -> tuple[float, float]:
    identity = HubIdentity.open(folder / "hub" / "identity")
    node_identity = NodeIdentity.open(folder / "node" / "identity")
    node_identity.accept(identity.issue_node("a", node_identity.public_key), identity.ca_pem)
    hub = NatsServer(
        folder / "hub" / "nats", HubSpec(identity.operator_jwt, identity.system_account, identity.accounts)
    )
    await hub.start()
    relay = Relay(("127.0.0.1", hub.ports["websocket"]), BUILTIN["lan"])
    await relay.open()
    node = NatsServer(
        folder / "node" / "nats",
        NodeSpec("a", hub_url=f"ws://127.0.0.1:{relay.port}", creds_file=node_identity.creds_file),
    )
    await node.start()
    hub_bus = await Bus.connect(hub.url, name="hub", user=identity.user)
    bus = await Bus.connect(node.url, name="a", username=AGENT_USER, password=node.secret, inbox=inbox_prefix("a"))
    await hub_bus.jetstream().add_stream(name="DATA_x", subjects=["ew.data.x.>"], allow_direct=True)
    outbox = Outbox(bus, node="a")
    queue = await outbox.open(QueueSpec("q", "x", max_bytes=1 << 30))
    running = asyncio.create_task(outbox.run())
    while True:  # the leaf's first connection
        try:
            await bus.last_message("DATA_x", "ew.data.x.a.q", domain="hub", timeout=1.0)
            break
        except Exception:  # noqa: BLE001 - until the link is there
            await asyncio.sleep(0.05)
    readings = [("sensors/line1", PAYLOAD, 1795520169437)] * BATCH
    began = time.monotonic()
    for _ in range(READINGS // BATCH):
        await queue.append(readings)
    while queue.counters.forwarded < READINGS:  # noqa: ASYNC110 - a counter has no event
        await asyncio.sleep(0.01)
    ours = READINGS / (time.monotonic() - began)
    js = bus.jetstream(domain="hub")
    began = time.monotonic()
    count = 1500
    for n in range(count):
        await js.publish("ew.data.x.a.peer", PAYLOAD, headers={"Nats-Msg-Id": str(n)})
    peer = count / (time.monotonic() - began)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await bus.close()
    await hub_bus.close()
    await node.stop()
    await hub.stop()
    await relay.close()
    return ours, peer


def outbox() -> list[Row]:
    import uvloop

    with (
        tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        ours, peer = runner.run(_run(Path(folder)))
    base = ("awaiting each publish with Nats-Msg-Id", peer)
    return [row("outbox, batches of 500, edge to hub", ours, "readings/s", 50_000, less=False, base=base)]
