"""A hundred simulated nodes on a real hub get a version that seven of them do not bear: how far does it come?

The nodes are the node's own side of the conversation (:mod:`benchmarks.fleet`) and decide as real ones do, by
``workloads/release.py``. The baseline is the same change without a Rollout: of the version that seven do not bear, and
of one that all of them do.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import Row, row
from benchmarks.fleet import Fleet, Hub, SimNode, system
from edgeward.core.registry import kinds
from edgeward.core.resource import Key
from edgeward.hub.kinds import load
from edgeward.nodes.wire import HubObject
from edgeward.workloads.release import Declared, choose, digest_of, parts_of, read_status

NODES, FAULTY, BATCH = 100, 7, 10
APP, ROLLOUT = Key("App", "default", "web"), Key("Rollout", "default", "web")


@dataclass
class Box:
    """A simulated node that runs one app. ``bears``: whether new versions run here."""

    sim: SimNode
    bears: bool = True
    runs: tuple[int, str] = (0, "")
    #: Every version that was begun here, and when; when another one took its place.
    began: dict[str, float] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)

    def follow(self) -> None:
        """Looks at what it holds after each sync."""
        taken = self.sim.replica.apply_sync

        def apply_sync(*args: Any, **more: Any) -> Any:
            done = taken(*args, **more)
            self.look()
            return done

        self.sim.replica.apply_sync = apply_sync  # type: ignore[method-assign]

    def look(self) -> None:
        app, rollout = (self.sim.replica.objects.get(k) for k in (APP, ROLLOUT))
        if app is None or app.stored is None:
            return
        generation, version = self._chosen(app, rollout)
        if version != self.runs[1]:
            self.began[version] = self.left[self.runs[1]] = time.monotonic()
        self.runs = (generation, version)
        status: dict[str, Any] = {"phase": "Running", "observedGeneration": generation, "version": version}
        if version.startswith("bad") and not self.bears:
            status |= {"phase": "Degraded", "takenBack": version, "wanted": version, "message": "it ended by itself"}
        self.sim.edge.report(APP, {**status, "instances": [{"phase": "Running", "id": version}]})

    def _chosen(self, app: HubObject, rollout: HubObject | None) -> tuple[int, str]:
        assert app.stored is not None
        meta, spec = app.stored.metadata, app.stored.spec
        declared = (meta.generation, word(spec))
        if rollout is None or rollout.stored is None:
            return declared
        digest = digest_of(parts_of(spec, kinds.get("App").at_once))
        of = Declared("App", "web", meta.uid, meta.generation, digest, meta.creationTimestamp)
        status = read_status(rollout.status or {})
        made = rollout.stored.metadata.creationTimestamp
        if choose(status, made, of, self.sim.name, time.time()) == "declared":
            return declared
        baseline = status.targets[0].baseline
        assert baseline is not None
        return baseline.generation, word(baseline.parts)


def word(spec: dict[str, Any]) -> str:
    return str(spec["process"]["args"][0])


def app(version: str) -> dict[str, Any]:
    process = {"command": ["run"], "args": [version]}
    # as many at each site as it has nodes
    return {
        "apiVersion": "edgeward/v1",
        "kind": "App",
        "metadata": {"name": "web"},
        "spec": {"process": process, "replicas": 10},
    }


class Trial:
    def __init__(self, hub: Hub, fleet: Fleet) -> None:
        self.hub, self.fleet, self.api = hub, fleet, hub.api()
        unfit = set(random.Random(7).sample(range(NODES), FAULTY))
        self.boxes = [Box(n, bears=i not in unfit) for i, n in enumerate(fleet.nodes)]
        for box in self.boxes:
            box.follow()

    async def declare(self, version: str) -> None:
        path = "/api/v1/namespaces/default/apps"
        if version == "1":
            await asyncio.to_thread(self.api.call, "POST", path, app(version))
        else:
            await asyncio.to_thread(self.api.call, "PUT", f"{path}/web", app(version))

    async def status(self) -> dict[str, Any]:
        doc = await asyncio.to_thread(self.api.call, "GET", "/api/v1/namespaces/default/rollouts/web")
        found: dict[str, Any] = doc["status"]
        return found

    async def until(self, phase: str) -> None:
        began = time.monotonic()
        while (await self.status()).get("phase") != phase:
            if time.monotonic() - began > 120:
                raise TimeoutError(f"not {phase}: {await self.status()}")
            await asyncio.sleep(0.1)  # the pace of looking

    async def everywhere(self, version: str) -> float:
        began = time.monotonic()
        while any(b.runs[1] != version for b in self.boxes):
            if time.monotonic() - began > 120:
                raise TimeoutError(f"not everywhere: {version}")
            await asyncio.sleep(0.02)  # the pace of looking
        return time.monotonic() - began

    def harmed(self, version: str) -> int:
        """Nodes that ever began a version and do not bear it."""
        return sum(version in b.began and not b.bears for b in self.boxes)

    def harm(self, version: str) -> float:
        """Seconds from the first node that began a version and does not bear it until nobody had it any more."""
        had = [b for b in self.boxes if version in b.began]
        return max(b.left[version] for b in had) - min(b.began[version] for b in had if not b.bears)


def most(before: dict[str, int], now: dict[str, int]) -> float:
    """The kilobytes that the node got which got most."""
    return max(now[n] - before[n] for n in now) / 1000


async def _measure() -> list[Row]:
    async with system(NODES) as (hub, fleet):
        trial = Trial(hub, fleet)
        await fleet.start()
        await fleet.when(lambda n: n.edge.synced.is_set())
        await trial.declare("1")
        await trial.everywhere("1")
        await trial.declare("bad-alone")
        plain = await trial.everywhere("bad-alone")
        down = fleet.bytes_down()
        await trial.declare("2")
        await trial.everywhere("2")
        plain_cost = most(down, fleet.bytes_down())

        spec = {
            "targets": [{"kind": "App", "name": "web"}],
            "groups": [{"name": "all", "batch": BATCH}],
            "healthWindow": "1s",
        }
        policy = {"apiVersion": "edgeward/v1", "kind": "Rollout", "metadata": {"name": "web"}, "spec": spec}
        await asyncio.to_thread(trial.api.call, "POST", "/api/v1/namespaces/default/rollouts", policy)
        await trial.until("Succeeded")
        await trial.declare("bad-rolled")
        await trial.until("RolledBack")
        await trial.everywhere("2")

        down = fleet.bytes_down()
        began = time.monotonic()
        await trial.declare("3")
        await trial.everywhere("3")
        await trial.until("Succeeded")
        whole = time.monotonic() - began
        cost = most(down, fleet.bytes_down())
    what = f"rollout, {NODES} nodes, batch {BATCH}"
    return [
        row(
            f"{what}: nodes harmed by a version that {FAULTY} do not bear",
            trial.harmed("bad-rolled"),
            "nodes",
            BATCH,
            base=("no Rollout", trial.harmed("bad-alone")),
        ),
        row(
            f"{what}: from the first node that does not bear it to all at the baseline",
            trial.harm("bad-rolled"),
            "s",
            5.0,
            base=("no Rollout, the version before declared as soon as all have it", trial.harm("bad-alone")),
        ),
        row(f"{what}: a good version everywhere, health window 1 s", whole, "s", 60.0, base=("no Rollout", plain)),
        row(f"{what}: bytes to a node for a whole run, most", cost, "kB", 200.0, base=("no Rollout", plain_cost)),
    ]


def rollouts() -> list[Row]:
    load()
    return asyncio.run(_measure())
