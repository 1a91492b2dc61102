"""Sites are told who may answer for them: those that are heard, the nearest first, and only while somebody asks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.hub.test_steering import ADDRESSES, CONFIG, heard, until
from tests.nodes.fleet import Fleet, doc, fleet

from edgeward.core.resource import CLUSTER, Key
from edgeward.gateway.steer import Edge, Steering
from edgeward.hub.neighbours import Neighbours, neighbours
from edgeward.hub.steering import HubSteering, Settings


def test_the_nearest_first_and_those_of_no_known_place_last() -> None:
    edges = [
        Edge("a", place=(48.0, 11.0), addresses=("192.0.2.1",)),
        Edge("b", place=(52.0, 13.0), addresses=("192.0.2.2", "192.0.2.3")),
        Edge("c", place=(48.0, 12.0), addresses=("2001:db8::3",)),
        Edge("d", addresses=("d.example:8080",)),
        Edge("e", place=(48.0, 11.1)),
        Edge("f", place=(48.0, 11.1), addresses=("192.0.2.4",), online=0),
        Edge("g", place=(-48.0, 11.1), addresses=("192.0.2.5",)),
    ]
    steering = Steering.of(edges)
    assert neighbours(steering, "a", "https") == [
        {"site": "c", "url": "https://[2001:db8::3]", "km": 74},
        {"site": "b", "url": "https://192.0.2.2", "km": 467},
        {"site": "g", "url": "https://192.0.2.5", "km": 10675},
    ]
    assert [n["site"] for n in neighbours(steering, "e", "http")] == ["a", "c", "b"], "who has no address may ask"
    assert neighbours(steering, "d", "http")[0] == {"site": "a", "url": "http://192.0.2.1"}, (
        "of no known place: by name"
    )


def told(f: Fleet, site: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = f.store.get(Key("Site", CLUSTER, site)).status.get("neighbours", [])
    return found


async def _sites_are_told(tmp_path: Path) -> None:
    leads = True
    async with fleet(tmp_path) as f:

        async def usage(node: str) -> dict[str, Any]:
            return {}

        s = HubSteering(f.store, Settings.read(CONFIG), usage, Neighbours(f.store, "http", lambda: leads))
        for site, lat in (("plant", 48), ("shop", 52)):
            old = f.store.get(Key("Site", CLUSTER, site))
            spec = {"addresses": ADDRESSES[site], "coordinates": {"lat": lat, "lon": 8}}
            await f.write(doc("Site", site, spec), old.key, old.revision, "ann")
        task = asyncio.create_task(s.run())
        try:
            await heard(f, "plant-1", "shop-1")
            for node in ("plant-1", "shop-1"):
                f.nodes._live[node].down_after = 3600.0  # however slow this machine is
            await until(lambda: len(s.known.serving()) == 2)
            route = doc("Route", "r", {"to": {"upstream": "http://h"}, "fallback": ["nearest"]}, namespace="default")
            made = await f.store.put(route)
            await until(lambda: told(f, "plant") and told(f, "shop"))
            assert told(f, "plant") == [{"site": "shop", "url": "http://[2001:db8::2]", "km": 445}]
            assert told(f, "shop") == [{"site": "plant", "url": "http://192.0.2.1", "km": 445}]

            f.nodes._live["plant-1"].down_after = 0.0  # from now on its silence is one
            await until(lambda: told(f, "shop") == [])
            assert told(f, "plant"), "a site that is cut keeps what it knows"

            await f.store.remove(made.key)
            await until(lambda: told(f, "plant") == [])
            assert not task.done()
        finally:
            task.cancel()


def test_sites_are_told(tmp_path: Path) -> None:
    asyncio.run(_sites_are_told(tmp_path))
