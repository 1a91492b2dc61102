"""What a node should do, read from a real replica."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from edgeward.agent.desired import Desired
from edgeward.agent.replica import Replica
from edgeward.core.registry import kinds
from edgeward.core.resource import Key, Resource, decode, to_stored
from edgeward.hub.kinds import load
from edgeward.nodes.wire import HubObject

load()


def doc(kind: str, name: str, spec: dict[str, Any], **meta: Any) -> Resource:
    return decode({"apiVersion": "edgeward/v1", "kind": kind, "metadata": {"name": name, **meta}, "spec": spec})


def app(name: str, replicas: int = 1, *, deleted: str = "", **placement: Any) -> Resource:
    spec = {"process": {"command": ["true"]}, "replicas": replicas, "placement": placement}
    return doc("App", name, spec, **({"deletionTimestamp": deleted} if deleted else {}))


def export(name: str, *, deleted: str = "", **placement: Any) -> Resource:
    spec = {"from": {"mqtt": "s/#"}, "to": {"hub": {"stream": "s"}}, "placement": placement}
    return doc("Export", name, spec, **({"deletionTimestamp": deleted} if deleted else {}))


def replica(path: Path, *resources: Resource, status: dict[str, dict[str, Any]] | None = None) -> Replica:
    nodes = [
        doc("Node", "plant-1", {"site": "plant"}, labels={"gpu": "yes"}),
        doc("Node", "plant-2", {"site": "plant"}),
        doc("Node", "shop-1", {"site": "shop"}, labels={"gpu": "yes"}),
    ]
    made = Replica(path / "r.db", site="plant")
    objects = [
        HubObject(r.kind, *(r.key.namespace, r.key.name), n, to_stored(r), (status or {}).get(str(r.key)))
        for n, r in enumerate([*nodes, *resources], 1)
    ]
    made.apply_sync(objects, revision=100, epoch="e", full=True)
    return made


def test_the_nodes_of_a_site_share_its_apps_without_asking_one_another(tmp_path: Path) -> None:
    r = replica(
        tmp_path,
        app("five", 5),
        app("gpu", 2, nodeSelector={"gpu": "yes"}),
        app("elsewhere", 1, site="shop"),
        app("none", 0),
        app("going", 1, deleted="2026-01-01T00:00:00Z"),
    )
    one, two = (Desired(r, n, "plant") for n in ("plant-1", "plant-2"))
    assert [n.metadata.name for n in one.nodes()] == ["plant-1", "plant-2"]
    counts = [{name: count for (_, name), (_, count) in d.apps().items()} for d in (one, two)]
    assert counts[0].pop("gpu") == 2, "all on the one that matches"
    assert counts[0].keys() == counts[1].keys() == {"five"}
    assert sorted([counts[0]["five"], counts[1]["five"]]) == [2, 3]
    assert Desired(r, "unknown", "plant").apps() == {}
    assert one.apps()["default", "five"][0].kind == "App"


def test_settings_are_copies_and_may_be_missing(tmp_path: Path) -> None:
    config, secret = doc("Config", "c", {"data": {"k": "v"}}), doc("Secret", "s", {"data": {"p": "w"}})
    d = Desired(replica(tmp_path, config, secret), "plant-1", "plant")
    got = d.config("default", "c")
    assert got == {"k": "v"}
    got["k"] = "changed"
    assert d.config("default", "c") == {"k": "v"}
    assert d.secret("default", "s") == {"p": "w"}
    assert [d.config("default", "s"), d.secret("default", "c"), d.config("other", "c")] == [None, None, None]


def test_exports_of_this_node(tmp_path: Path) -> None:
    r = replica(
        tmp_path,
        export("all"),
        export("here", site="plant"),
        export("there", site="shop"),
        export("gpu", nodeSelector={"gpu": "yes"}),
        export("going", deleted="2026-01-01T00:00:00Z"),
    )
    found = {n: [e.metadata.name for e in Desired(r, n, "plant").exports()] for n in ("plant-1", "plant-2", "unknown")}
    assert found == {"plant-1": ["all", "gpu", "here"], "plant-2": ["all", "here"], "unknown": ["all", "here"]}


def test_endpoints_are_this_nodes_own_and_the_sites(tmp_path: Path) -> None:
    service = doc("Service", "my-db", {"app": "db", "port": "sql"})
    lonely = doc("Service", "lonely", {"app": "nowhere", "port": "x"})
    endpoints = [
        {"node": "plant-1", "site": "plant", "address": "10.0.0.1", "port": 9999},  # stale: known better here
        {"node": "plant-2", "site": "plant", "address": "10.0.0.2", "port": 20001},
        {"node": "shop-1", "site": "shop", "address": "10.9.0.1", "port": 20001},
    ]
    r = replica(tmp_path, app("db"), service, lonely, status={"Service/my-db": {"endpoints": endpoints}})

    async def local() -> None:
        instances = [
            {"phase": "Running", "ports": {"sql": 20005}, "address": "10.0.0.1"},
            {"phase": "Running", "ports": {"sql": 20006}, "address": ""},
            {"phase": "Starting", "ports": {"sql": 20007}, "address": "10.0.0.1"},
            {"phase": "Running", "ports": {}, "address": "10.0.0.1"},
        ]
        await r.put_status(app("db").key, {"instances": instances})

    d = Desired(r, "plant-1", "plant")
    assert d.service_env("default") == {
        "EDGEWARD_SERVICE_LONELY": "",
        "EDGEWARD_SERVICE_MY_DB": "10.0.0.2:20001",
    }
    asyncio.run(local())
    assert d.service_env("default")["EDGEWARD_SERVICE_MY_DB"] == "10.0.0.1:20005,127.0.0.1:20006,10.0.0.2:20001"
    assert d.service_env("other") == {}


def instance(id: str, port: int, phase: str = "Running", node: str = "plant-1") -> dict[str, Any]:
    return {"id": id, "node": node, "phase": phase, "ports": {"http": port}, "address": "10.0.0.1"}


def service(name: str, scope: str) -> Resource:
    return doc("Service", name, {"app": "web", "port": "http", "scope": scope})


def test_the_endpoints_of_a_service(tmp_path: Path) -> None:
    elsewhere = [
        {"node": "plant-2", "site": "plant", "address": "10.0.0.2", "port": 7},
        {"node": "plant-1", "site": "plant", "address": "10.0.0.1", "port": 9},
        {"node": "shop-1", "site": "shop", "address": "10.0.0.3", "port": 8},
    ]
    status = {
        "App/web": {"instances": [instance("a", 1), instance("b", 2, "Failed"), instance("c", 3, node="plant-2")]},
        "Service/site": {"endpoints": elsewhere},
        "Service/node": {"endpoints": elsewhere},
    }
    r = replica(tmp_path, app("web"), service("site", "site"), service("node", "node"), status=status)
    desired = Desired(r, "plant-1", "plant")

    def ports(name: str) -> list[tuple[int, bool]]:
        return [(e["port"], e["here"]) for e in desired.endpoints("default", name) or []]

    assert desired.endpoints("default", "none") is None
    assert (ports("site"), ports("node")) == ([(1, True), (7, False)], [(1, True)])
    # an agent that takes over has not looked yet: what served goes on serving, what is new must first be healthy
    key = app("web").key
    desired.said(key, {"instances": [instance("a", 1, "Starting"), instance("d", 4, "Starting")]})
    assert ports("node") == [(1, True)]
    desired.said(key, {"instances": [instance("a", 1, "Degraded"), instance("d", 4)]})
    assert ports("node") == [(4, True)]


def test_the_routes_of_a_node(tmp_path: Path) -> None:
    def route(name: str, **placement: Any) -> Resource:
        return doc("Route", name, {"to": {"upstream": "http://h"}, "placement": placement})

    r = replica(tmp_path, route("all"), route("shop", site="shop"), route("gpu", nodeSelector={"gpu": "yes"}))
    assert [x.metadata.name for x in Desired(r, "plant-1", "plant").routes()] == ["all", "gpu"]
    assert [x.metadata.name for x in Desired(r, "plant-2", "plant").routes()] == ["all"]


def test_a_node_says_where_an_app_runs_that_it_does_not_run(tmp_path: Path) -> None:
    r = replica(tmp_path, app("one"), app("off", 0), app("far", nodeSelector={"gpu": "no"}))
    seen = {n: Desired(r, n, "plant") for n in ("plant-1", "plant-2")}
    key = Key("App", "default", "one")
    (runs,) = [n for n, d in seen.items() if ("default", "one") in d.apps()]
    (other,) = set(seen) - {runs}
    said = seen[other].elsewhere(key)
    assert (said["phase"], said["elsewhere"]) == ("Elsewhere", [runs])
    assert runs in said["message"]
    assert kinds.get("App").columns[1].value({"status": said}) == f"on {runs}"
    assert seen[other].elsewhere(Key("App", "default", "off")) == {"phase": "Stopped"}
    assert seen[other].elsewhere(Key("App", "default", "far"))["phase"] == "Pending"
    assert seen[other].elsewhere(Key("App", "default", "never")) == {}


def test_an_app_is_as_its_site_has_it(tmp_path: Path) -> None:
    per_site = {"plant": {"replicas": 3, "process": {"command": ["false"]}}, "shop": {"replicas": 0}}
    spec = {"process": {"command": ["true"]}, "perSite": per_site}
    r = replica(tmp_path, doc("App", "web", spec), doc("App", "off", {**spec, "perSite": {"plant": {"replicas": 0}}}))
    found = [Desired(r, n, "plant").apps() for n in ("plant-1", "plant-2")]
    assert sum(count for apps in found for _, count in apps.values()) == 3
    one, _ = found[0]["default", "web"]
    assert (one.spec.process.command, one.spec.perSite) == (["false"], {})
    assert Desired(r, "plant-1", "plant").elsewhere(Key("App", "default", "off")) == {"phase": "Stopped"}
