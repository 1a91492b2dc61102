"""One leader at a time: the pure rule under any interleaving, and on a real server."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from tests.core.pair import until

from edgeward.core.bus import Bus
from edgeward.core.lease import Leadership, Lease, Record
from edgeward.core.natsserver import AGENT_USER, NatsServer, NodeSpec


class World:
    """A record with revisions, and processes whose clocks have nothing in common and whose writes are slow or lost."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.record: Record | None = None
        self.revision = 0
        self.leases = [Lease(name) for name in ("a", "b", "c")]
        self.offset = [self.random.uniform(0, 1e6) for _ in self.leases]
        #: (when it arrives, whose, begun at, expected revision, record)
        self.flying: list[tuple[float, int, float, int, Record]] = []
        self.led: set[int] = set()

    def clock(self, n: int) -> float:
        return self.now + self.offset[n]

    def turn(self) -> None:
        self.now += self.random.uniform(0.01, 0.4)
        for write in sorted(w for w in self.flying if w[0] <= self.now):
            self.flying.remove(write)
            _, n, begun, expected, record = write
            if expected == self.revision:
                self.revision, self.record = self.revision + 1, record
                if self.random.random() < 0.9:
                    self.leases[n].wrote(begun, self.revision)
                # else the answer is lost: it is in the store, and its writer does not know
            else:
                self.leases[n].failed()
        for n, lease in enumerate(self.leases):
            if self.random.random() < 0.3:
                continue  # paused, or the server did not answer
            if lease.step(self.clock(n)) != "renew":
                lease.saw(self.clock(n), self.record, self.revision)
            if lease.step(self.clock(n)) != "wait" and not any(w[1] == n for w in self.flying):
                slow = self.random.choice([0.0, 0.05, 0.5, 3.0])
                write = (self.now + slow, n, self.clock(n), lease.revision, Record(lease.me, self.revision + 1))
                self.flying.append(write)


@pytest.mark.parametrize("seed", range(60))
def test_never_two_at_once_and_always_one_again(seed: int) -> None:
    world = World(seed)
    led: set[str] = set()
    for _ in range(2000):
        world.turn()
        leaders = [lease.me for n, lease in enumerate(world.leases) if lease.leads(world.clock(n))]
        assert len(leaders) <= 1
        led |= set(leaders)
    assert led, "somebody led"


def test_a_restarted_holder_has_it_at_once_and_others_wait_their_time() -> None:
    me, other = Lease("a"), Lease("b")
    for lease in (me, other):
        lease.saw(100.0, Record("a", 7), 12)
    assert me.step(100.0) == "renew"
    assert other.step(100.0) == "wait"
    assert other.step(103.9) == "wait"
    other.saw(103.9, Record("a", 8), 13)  # it was renewed
    assert other.step(107.8) == "wait"
    assert other.step(107.91) == "take"
    me.wrote(101.0, 13)
    assert me.leads(103.9)
    assert not me.leads(104.0), "before anybody may take it"


async def connect(server: NatsServer) -> Bus:
    return await Bus.connect(server.url, name="t", username=AGENT_USER, password=server.secret, inbox="_INBOX_solo")


def test_work_runs_in_one_process_and_moves_when_it_ends(tmp_path: Path) -> None:
    async def main() -> None:
        server = NatsServer(tmp_path, NodeSpec("solo"))
        await server.start()
        try:
            running: list[str] = []
            buses = [await connect(server) for _ in range(3)]
            made = [Leadership(bus.client, "x", f"hub-{n}", ttl=1.0) for n, bus in enumerate(buses)]

            async def work(name: str) -> None:
                running.append(name)
                assert len(running) == 1, "one at a time"
                try:
                    await asyncio.Event().wait()
                finally:
                    running.remove(name)

            tasks = [asyncio.create_task(m.run(lambda n=m.lease.me: work(n))) for m in made]  # type: ignore[misc]
            await until(lambda: len(running) == 1, 30)
            first = int(running[0][-1])
            tasks[first].cancel()  # killed: it says nothing to anybody
            await asyncio.gather(tasks[first], return_exceptions=True)
            await until(lambda: len(running) == 1, 30)
            second = int(running[0][-1])
            assert second != first
            await buses[second].close()  # cut off: it must stop by itself
            await until(lambda: running not in ([], [f"hub-{second}"]), 30)
            assert not made[second].leads
            third = made[int(running[0][-1])]
            tasks[int(running[0][-1])].cancel()
            await asyncio.sleep(0)
            await third.resign()
            assert not third.leads
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for bus in buses:
                await bus.close()
        finally:
            await server.stop()

    asyncio.run(main())
