"""A queue at the node: its bound, its age, its writers and its disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.core.pair import Pair, drained, fill, readings, spec, until

from edgeward.core.errors import Conflict, EdgewardError, Refused
from edgeward.core.mover import Mover
from edgeward.core.outbox import Outbox
from edgeward.core.turns import Turns


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
            p.spawn(Mover(again, p.edge, "x", Turns()).run())
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


def test_two_writers_are_noticed(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pair(tmp_path) as p:
            one, two = await p.outbox().open(spec()), await Outbox(p.edge, node="x").open(spec())
            await one.append(readings(0, 1))
            with pytest.raises(Conflict):
                await two.append(readings(0, 1))
            await two.append(readings(1, 2))

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
