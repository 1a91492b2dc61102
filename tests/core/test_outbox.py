"""The outbox between two real nats-servers: bounds, drops, changes of its spec, lost receipts, kills."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from tests.core.pair import Pair, fill, readings, spec, until
from tests.skewing import skew

from edgeward.core import clock
from edgeward.core.delivery import SRC
from edgeward.core.errors import Conflict, EdgewardError, Refused
from edgeward.core.jsread import read_batch
from edgeward.core.outbox import Gate, Outbox, Queue, QueueSpec, stamp_of


async def drained(queue: Queue) -> None:
    async def empty() -> bool:
        await queue.measure()
        return queue.counters.pending == 0

    await until(empty)


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


@pytest.mark.parametrize("policy", ["refuse", "dropNewest"])
def test_a_full_queue_refuses_and_keeps_what_it_has(tmp_path: Path, policy: str) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            p.kill("hub")
            queue = await p.outbox().open(spec(max_bytes=1 << 20, on_full=policy))
            taken = 0
            with pytest.raises(Refused, match=r"bound|disk"):
                for taken in range(0, 40_000, 100):
                    await queue.append(readings(taken, taken + 100, 200))
            assert 1000 < taken < 10_000
            p.start("hub")
            await p.hub.wait_connected(60)
            await p.stream("s")
            await drained(queue)
            await queue.append(readings(taken, taken + 100, 200))  # there is room again
            await drained(queue)
            assert await p.ids("s") == list(range(taken + 100))
            assert queue.counters.dropped_full == 0

    asyncio.run(main())


def test_what_the_hub_has_does_not_count_against_the_bound(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            queue = await p.outbox().open(spec(max_bytes=1 << 20, on_full="refuse", trim_every=1_000_000))
            for at in range(0, 20_000, 1000):
                await queue.append(readings(at, at + 1000, 200))
                await drained(queue)
            assert await p.ids("s") == list(range(20_000))

    asyncio.run(main())


def test_drop_oldest_counts_what_never_went(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            p.kill("hub")
            queue = await p.outbox().open(spec(max_bytes=1 << 20))
            await fill(queue, 0, 20_000, step=100, size=200)
            p.start("hub")
            await p.hub.wait_connected(60)
            await drained(queue)
            got = await p.ids("s")
            assert got == list(range(got[0], 20_000))
            assert got[0] > 0
            assert queue.counters.dropped_full == got[0]
            assert queue.counters.forwarded + queue.counters.dropped_full == queue.counters.accepted == 20_000
            # the numbers outlive the agent
            again = await Outbox(p.edge, node="x").open(queue.spec)
            await again.append(readings(20_000, 20_001))
            p.spawn(again.run())
            await until(lambda: again.counters.forwarded == len(got) + 1)
            assert again.counters.dropped_full == got[0]

    asyncio.run(main())


def test_what_is_too_old_is_dropped_and_counted(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            await p.stream("s")
            p.kill("hub")
            queue = await p.outbox().open(spec(max_age=1.0))
            await fill(queue, 0, 1000, step=100)
            await asyncio.sleep(1.1)  # they grow too old
            await queue.append(readings(1000, 1001))
            p.start("hub")
            await p.hub.wait_connected(60)
            await drained(queue)
            got = await p.ids("s")
            # the one appended last is younger, unless the hub's start took longer than it may wait
            assert got in ([1000], [])
            assert queue.counters.dropped_age == 1001 - len(got)
            assert queue.counters.dropped_full == 0

    asyncio.run(main())


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
            task = asyncio.create_task(queue.run())
            await until(lambda: queue.counters.forwarded >= 100)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            last = await p.hub.last_message("DATA_s", queue.hub_subject("s"))
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


def test_two_writers_are_noticed(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            one, two = await p.outbox().open(spec()), await Outbox(p.edge, node="x").open(spec())
            await one.append(readings(0, 1))
            with pytest.raises(Conflict):
                await two.append(readings(0, 1))
            await two.append(readings(1, 2))

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


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:

        async def main() -> None:
            async with Pair(tmp_path, edge_store=disk / "e") as p:
                await p.stream("s")
                p.kill("hub")
                with pytest.raises(Refused, match=r"cannot have 1073741824 bytes"):
                    await p.outbox().open(spec(max_bytes=1 << 30))
                queue = await p.outbox().open(spec(max_bytes=16 << 20, on_full="refuse"))
                (disk / "somebody-else").write_bytes(bytes(24 << 20))
                taken = 0
                with pytest.raises(EdgewardError):
                    for taken in range(0, 200_000, 100):
                        await queue.append(readings(taken, taken + 100, 400))
                assert taken > 1000
                p.kill("edge")
                (disk / "somebody-else").unlink()
                for name in ("edge", "hub"):
                    p.start(name)
                await p.hub.wait_connected(60)
                await p.edge.wait_connected(60)
                again = await p.outbox().open(spec(max_bytes=16 << 20, on_full="refuse"))
                await drained(again)
                got = await p.ids("s")
                # nothing acknowledged is lost; the append in doubt may be there
                assert got in (list(range(taken)), list(range(taken + 100)))

        asyncio.run(main())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


async def stamps(p: Pair, name: str) -> list[int]:
    """When each batch came to the hub's stream, by the hub's clock."""
    found: list[int] = []
    at = 1
    while got := await read_batch(p.hub.client, "$JS.API", f"DATA_{name}", at, f"ew.data.{name}.>", 64):
        found += [stamp_of(m[2]) for m in got]
        at = got[-1][0] + 1
    return found


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


def test_a_gate_has_one_place_for_the_first_in_rank() -> None:
    async def main() -> None:
        gate = Gate()
        order: list[str] = []
        inside = 0

        async def turns(name: str, priority: int, count: int) -> None:
            nonlocal inside
            gate.want(name, priority)
            for _ in range(count):
                await asyncio.sleep(0)  # it reads and prepares
                async with gate.turn(priority):
                    inside += 1
                    try:
                        assert inside == 1
                        await asyncio.sleep(0)
                        order.append(name)
                    finally:  # also where it is given up inside
                        inside -= 1
            gate.leave(name)

        async with asyncio.timeout(30):
            given_up = asyncio.create_task(turns("given up", 9, 1000))
            works = [asyncio.create_task(turns(*w)) for w in (("low", 1, 3), ("high", 8, 5), ("mid", 5, 2))]
            await until(lambda: len(order) >= 3, 30)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            gate.leave("given up")
            await asyncio.gather(*works)
        assert [n for n in order if n != "given up"] == ["high"] * 5 + ["mid"] * 2 + ["low"] * 3

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
