"""A small fleet of simulated nodes on the real hub: the benchmark's own machinery, at a size for every day."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import fleet
from edgeward.core.errors import Unreachable
from edgeward.hub.kinds import load


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    monkeypatch.setattr(fleet, "SITE", 3)


def test_a_fleet_gets_its_state_follows_changes_and_comes_back_after_its_hub_was_killed() -> None:
    m = asyncio.run(fleet.measure(12, idle_s=0))
    assert m.change_elsewhere == 0, "a change of one site is that site's business"
    assert m.change_bytes_node < 2000
    assert m.storm_missed == 0
    assert 0 < m.sync_s < 60 and 0 < m.storm_s < 60
    assert m.hub_mb > 0 and m.nats_mb > 0 and m.hub_cpu_s > 0


def test_a_simulated_node_speaks_with_its_own_rights_only() -> None:
    async def body() -> None:
        async with fleet.system(4) as (hub, nodes):
            await nodes.start()
            await nodes.when(lambda n: n.edge.synced.is_set())
            first, last = nodes.nodes[0], nodes.nodes[-1]
            assert first.site != last.site
            names = {k.name for k in first.replica.objects}
            assert {"n0", "n1", "n2", "s0", "s0-app0"} <= names
            assert not any(n.startswith("s1") for n in names)
            bus = first.bus
            bus._interest.add(f"ew.hub.*.{last.name}")
            with pytest.raises(Unreachable):
                # what a real node's server would not even send: the hub's does not let it through
                await asyncio.wait_for(_as(bus, last.name), 60)
            first.bus.drop()
            await nodes.when(lambda n: n.edge.online and n.bus.connected)
            assert first.bus.traffic().bytes_sent > 0
            assert hub.used()[0] > 0

    asyncio.run(body())


async def _as(bus: object, name: str) -> None:
    from benchmarks.leaf import LeafBus

    assert isinstance(bus, LeafBus)
    bus.node, mine = name, bus.node
    try:
        await bus.request(f"ew.hub.sync.{name}", b"\x82\xa5since\x00\xa5epoch\xa0", timeout=2)
    finally:
        bus.node = mine
