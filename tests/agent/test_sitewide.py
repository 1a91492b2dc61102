"""What a node shows of its whole site, made of what it runs and what the others say."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.agent.test_desired import app, doc, replica

from edgeward.agent.desired import Desired
from edgeward.agent.sitewide import Sitewide
from edgeward.core import clock
from edgeward.core.resource import Key, to_stored
from edgeward.nodes.siblings_status import Statuses, Told
from edgeward.nodes.wire import HubObject, Status

WEB, SERVICE = Key("App", "default", "web"), Key("Service", "default", "web")


class NoMesh:
    def serve(self, verb: str, handler: Any) -> None:
        pass

    async def ask(self, peer: str, verb: str, data: bytes = b"", timeout: float = 10.0) -> bytes:
        raise AssertionError("nobody is asked here")


def running(id: str, port: int) -> dict[str, Any]:
    return {"phase": "Running", "instances": [
        {"id": id, "phase": "Running", "address": "10.0.0.1", "ports": {"http": port}}
    ]}  # fmt: skip


def test_apps_and_services_of_the_whole_site(tmp_path: Path) -> None:
    hubs = [
        {"node": "plant-2", "site": "plant", "address": "10.0.0.2", "port": 7},
        {"node": "shop-1", "site": "shop", "address": "10.0.9.1", "port": 8},
    ]
    service = doc("Service", "web", {"app": "web", "port": "http"})
    r = replica(tmp_path, app("web", 2), service, status={str(SERVICE): {"endpoints": hubs}})
    desired = Desired(r, "plant-1", "plant")
    own: dict[Key, dict[str, Any]] = {}
    statuses = Statuses(NoMesh(), 1, lambda: own, lambda *said: site.changed(*said))  # noqa: PLW0108 - made later
    moved: list[str] = []

    def show(key: Key, status: dict[str, Any]) -> None:
        asyncio.run(r.put_status(key, status))

    site = Sitewide(
        "plant-1", "plant", replica=r, desired=desired, statuses=statuses, own=lambda: own, show=show,
        moved=lambda: moved.append("moved"),
    )  # fmt: skip
    desired.others = site.endpoints

    def at() -> set[tuple[str, int]]:
        return {(e["address"], e["port"]) for e in desired.endpoints("default", "web") or []}

    # nobody was heard: the node's own, as it is
    own[WEB] = running("a", 1)
    desired.said(WEB, own[WEB])
    assert site.status(WEB, own[WEB]) == own[WEB] and site.status(WEB, None)["phase"] == "Elsewhere"
    site.service(SERVICE)
    assert r.get(SERVICE).status["endpoints"] == hubs
    assert at() == {("10.0.0.1", 1), ("10.0.0.2", 7)}, "and of others what the hub said last"

    # another one speaks
    statuses.heard("plant-2", (0, 0), clock.monotonic())
    held = statuses._held["plant-2"]
    statuses._take("plant-2", held, Told(5, 1, True, [Status("App", "default", "web", running("b", 2))]))
    shown = r.get(WEB).status
    assert (shown["phase"], [(i["node"], i["id"]) for i in shown["instances"]]) == (
        "Running", [("plant-1", "a"), ("plant-2", "b")],
    )  # fmt: skip
    assert "stale" not in str(shown) and moved == ["moved"]
    assert at() == {("10.0.0.1", 1), ("10.0.0.1", 2)}, "its own word stands for it"
    nodes = [(e["node"], e["port"]) for e in r.get(SERVICE).status["endpoints"]]
    assert nodes == [("plant-1", 1), ("plant-2", 2), ("shop-1", 8)]

    # what the hub says of other sites' is heard, though what is shown here stands over it
    heard: list[Key] = []
    r.listen(lambda change: heard.append(change.key))
    more = [*hubs, {"node": "shop-2", "site": "shop", "address": "10.0.9.2", "port": 9}]
    said = HubObject("Service", "default", "web", 101, to_stored(service), {"endpoints": more})
    r.apply_sync([said], revision=101, epoch="e", full=False)
    assert heard == [SERVICE]
    site.service(SERVICE)
    assert [e["node"] for e in r.get(SERVICE).status["endpoints"]] == ["plant-1", "plant-2", "shop-1", "shop-2"]

    # it falls silent, and says nothing of the App any more when it comes back
    held.heard -= 3600
    site.shown(WEB)
    assert [i.get("stale") for i in r.get(WEB).status["instances"]] == [None, True]
    held.heard = clock.monotonic()
    statuses._take("plant-2", held, Told(6, 1, True, []))
    assert [i["node"] for i in r.get(WEB).status["instances"]] == ["plant-1"]
    assert r.get(WEB).status["message"] == "not heard from: plant-2"
    assert at() == {("10.0.0.1", 1)}
