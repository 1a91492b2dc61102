"""The way to the hub: lost receipts, changed streams, clocks that go back, declared rates."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import pytest
from tests.core.pair import Pair, drained, fill, spec, stamps, until
from tests.skewing import skew

from edgeward.core import clock
from edgeward.core.delivery import SRC
from edgeward.core.mover import Mover
from edgeward.core.outbox import Outbox
from edgeward.core.outqueue import QueueSpec
from edgeward.core.turns import Turns


def test_a_receipt_lost_in_a_cut_delays_nothing(tmp_path: Path) -> None:
    """The hub freezes with a batch in its socket, dies and comes back: the batch goes again at once, once."""

    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            queue = await p.outbox().open(spec(max_bytes=1 << 28))
            await fill(queue, 0, 20_000, size=400)
            await drained(queue)
            p.freeze("hub")
            await fill(queue, 20_000, 26_000, size=400)
            await asyncio.sleep(1.0)  # the batch is on its way
            p.kill("hub")
            p.start("hub")
            await p.hub_answers()
            took = await until(lambda: queue.counters.forwarded >= 26_000)
            assert await p.ids("s") == list(range(26_000))
            print(f"resumed {took:.2f} s after the hub answered")

    asyncio.run(main())


def test_a_receipt_lost_before_a_cut_that_outlasts_every_window(tmp_path: Path) -> None:
    """The hub has the batch, the node never hears of it, and both start anew later."""

    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            outbox = Outbox(p.edge, node="x")
            queue = await outbox.open(spec())
            await fill(queue, 0, 300, step=100)
            # the node is killed between the hub's write and its receipt: nothing at the node knows of it
            mover = Mover(queue, p.edge, "x", Turns())
            task = asyncio.create_task(mover.run())
            await until(lambda: queue.counters.forwarded >= 100)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            last = await p.hub.last_message("DATA_s", mover.hub_subject("s"))
            assert last is not None
            assert last.headers[SRC]
            for name in ("edge", "hub"):
                p.kill(name)
            await asyncio.sleep(0.5)  # longer than the streams' de-duplication window of 0.1 s
            for name in ("edge", "hub"):
                p.start(name)
            await p.hub.wait_connected(60)
            await p.edge.wait_connected(60)
            queue = await p.outbox().open(spec())
            await drained(queue)
            assert await p.ids("s") == list(range(300))

    asyncio.run(main())


def test_a_changed_stream_takes_what_comes_after_the_change_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            for name in ("s", "s2"):
                await p.stream(name)
            outbox = p.outbox()
            queue = await outbox.open(spec(trim_every=10_000))
            await fill(queue, 0, 1000, step=100)
            await drained(queue)
            p.kill("hub")
            await fill(queue, 1000, 1500, step=100)  # these wait, and belong to s
            other = await outbox.open(QueueSpec("q", "s2", trim_every=10_000))
            await fill(other, 1500, 2000, step=100)
            p.start("hub")
            await p.hub.wait_connected(60)
            await drained(other)
            assert await p.ids("s") == list(range(1500))
            assert await p.ids("s2") == list(range(1500, 2000))

    asyncio.run(main())


def test_a_power_cut_that_takes_a_tail_and_the_time_loses_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of what was lost are given out again, under time stamps of 1970."""

    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            queue = await p.outbox().open(spec(max_bytes=1 << 26))
            await fill(queue, 0, 400, step=50)
            await drained(queue)
            p.kill("edge")
            await until(lambda: not p.edge.connected)
            shutil.copytree(tmp_path / "e", tmp_path / "kept")
            p.start("edge")
            await p.edge.wait_connected(60)
            await fill(queue, 400, 500, step=10)
            await drained(queue)
            p._tasks[0].cancel()  # the agent, and with it all that it knows
            await asyncio.gather(p._tasks[0], return_exceptions=True)
            p.kill("edge")
            await until(lambda: not p.edge.connected)
            shutil.rmtree(tmp_path / "e")
            shutil.copytree(tmp_path / "kept", tmp_path / "e")
            p.start("edge")
            await p.edge.wait_connected(60)
            skew(p._running["edge"].pid, 100 - int(time.time()))
            monkeypatch.setattr(clock, "boot", lambda: "another")
            queue = await p.outbox().open(spec(max_bytes=1 << 26))
            await fill(queue, 500, 550, step=10)

            async def there() -> bool:  # the queue's own count is of before
                return len(await p.ids("s")) >= 550

            await until(there)
            assert await p.ids("s") == list(range(550))

    asyncio.run(main())


def test_a_declared_rate_is_kept_and_leaves_the_link_to_others(tmp_path: Path) -> None:
    """By the hub's clock; the urgent queue's rests are not the other one's."""

    async def main() -> None:
        async with Pair(tmp_path) as p:
            for name in ("slow", "free"):
                await p.stream(name)
            p.kill("hub")
            outbox = p.outbox()
            slow = await outbox.open(QueueSpec("slow", "slow", priority=9, rate=200_000, max_bytes=1 << 28))
            free = await outbox.open(QueueSpec("free", "free", priority=1, max_bytes=1 << 28))
            await fill(slow, 0, 500, step=50, size=900)
            await fill(free, 0, 5_000, size=900)
            p.start("hub")
            await p.hub.wait_connected(10)
            await drained(slow)
            await drained(free)
            when = await stamps(p, "slow")
            assert len(when) > 3
            # 500 readings are about 470 kB; the first batch (of 64 KiB at most) pays for nobody
            assert when[-1] - when[0] >= (500 * 900 - 2 * 65536) / 200_000 * 1e9
            assert (await stamps(p, "free"))[-1] < when[-1]

    asyncio.run(main())
