"""The outbox between two real nats-servers: bounds, drops, changes of its spec, lost receipts, kills."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from tests.core.pair import Pair, drained, fill, readings, spec, stamps

from edgeward.core.outbox import Outbox
from edgeward.core.outqueue import QueueSpec


def test_all_arrives_in_order_and_is_read_to_the_end(tmp_path: Path) -> None:
    """12 MB: more than one answer of a direct read holds."""

    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            queue = await p.outbox().open(spec(max_bytes=1 << 28))
            await fill(queue, 0, 30_000, size=400)
            await drained(queue)
            assert await p.ids("s") == list(range(30_000))
            assert (queue.counters.accepted, queue.counters.forwarded) == (30_000, 30_000)

    asyncio.run(main())


def test_prune_takes_only_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            outbox = Outbox(p.edge, node="x")
            for name in ("export_a_b", "export_a_c", "other"):
                await outbox.open(QueueSpec(name, "s"))
            assert await Outbox(p.edge, node="x").prune("export_", {"export_a_b"}) == ["export_a_c"]
            left = {i.config.name for i in await p.edge.jetstream().streams_info()}
            assert left == {"OUT_export_a_b", "OUT_other"}

    asyncio.run(main())


def test_ten_kills_of_both_servers_under_load(tmp_path: Path) -> None:
    rng = random.Random(20261124)

    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            queue = await p.outbox().open(spec(max_bytes=1 << 28))
            done = asyncio.Event()

            async def load() -> None:
                at = 0
                while not done.is_set() or at % 1000 or at < 2000:
                    try:
                        await queue.append(readings(at, at + 50))
                    except Exception:  # noqa: BLE001 - in doubt: what the queue says decides
                        while True:
                            try:
                                await p.edge.wait_connected(60)
                                await queue.refresh()
                                break
                            except Exception:  # noqa: BLE001
                                await asyncio.sleep(0.1)
                        await queue.measure()
                        if queue.counters.accepted == at:
                            continue
                    at += 50
                nonlocal sent
                sent = at

            sent = 0
            task = asyncio.create_task(load())
            for _ in range(10):
                await asyncio.sleep(rng.uniform(0.1, 0.6))
                name = rng.choice(["hub", "edge"])
                p.kill(name)
                await asyncio.sleep(rng.uniform(0.0, 0.4))
                p.start(name)
                await (p.hub if name == "hub" else p.edge).wait_connected(60)
            done.set()
            await asyncio.wait_for(task, 120)
            assert sent > 1000
            await drained(queue)
            assert await p.ids("s") == list(range(sent))

    asyncio.run(main())


def tear(store: Path, stream: str, how: str) -> None:
    """What a power cut leaves of the write that nobody had acknowledged yet, or of the index beside it."""
    (folder,) = store.rglob(f"streams/{stream}/msgs")
    last = max(folder.glob("*.blk"), key=lambda f: int(f.stem))
    data = last.read_bytes()
    if how == "index gone":
        (folder / "index.db").unlink(missing_ok=True)
    elif how == "index torn":
        index = folder / "index.db"
        index.write_bytes(index.read_bytes()[:-7] if index.exists() else b"\0" * 9)
    else:
        assert len(data) > 4000
        rest = {"half a record": data[:1500], "zeros": bytes(4096), "noise": random.Random(7).randbytes(777)}[how]
        last.write_bytes(data + rest)


@pytest.mark.parametrize("how", ["half a record", "zeros", "noise", "index gone", "index torn"])
def test_a_torn_last_write_loses_nothing_acknowledged(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            queue = await p.outbox().open(spec(max_bytes=1 << 26))
            await fill(queue, 0, 500, step=50)
            await drained(queue)
            p.kill("hub")
            await fill(queue, 500, 1000, step=50)
            p.kill("edge")
            tear(tmp_path / "e", "OUT_q", how)
            tear(tmp_path / "h", "DATA_s", how)
            for name in ("edge", "hub"):
                p.start(name)
            await p.hub.wait_connected(60)
            await p.edge.wait_connected(60)
            await queue.refresh()
            await queue.measure()
            assert queue.counters.accepted == 1000
            await fill(queue, 1000, 1500, step=50)
            await drained(queue)
            assert await p.ids("s") == list(range(1500))

    asyncio.run(main())


def test_the_urgent_queue_goes_first(tmp_path: Path) -> None:
    """What waited while the hub was away: all of the urgent queue is there before the second batch of the other."""

    async def main() -> None:
        async with Pair(tmp_path) as p:
            for name in ("low", "high"):
                await p.stream(name)
            p.kill("hub")
            outbox = p.outbox()
            low = await outbox.open(QueueSpec("low", "low", priority=1, max_bytes=1 << 28))
            high = await outbox.open(QueueSpec("high", "high", priority=9, max_bytes=1 << 28))
            await fill(low, 0, 8_000, size=900)
            await fill(high, 0, 8_000, size=900)
            p.start("hub")
            await p.hub.wait_connected(10)
            await drained(high)
            await drained(low)
            last = await stamps(p, "high")
            other = await stamps(p, "low")
            assert len(other) > 3
            assert len(last) > 3
            assert sum(t < last[-1] for t in other) <= 3, (
                "one may have found the hub, one been under way, one slipped in"
            )

    asyncio.run(main())
