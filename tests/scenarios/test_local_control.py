"""A site of three nodes that is cut off is worked on from any of them, and every node shows the same."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

NODES = ("plant-1", "plant-2", "plant-3")
APP: dict[str, Any] = {
    "kind": "App",
    "metadata": {"name": "web", "conflict": "edge"},
    "spec": {
        "process": {"command": ["python3", "-m", "http.server", "${PORT}", "--bind", "127.0.0.1"]},
        "ports": [{"name": "http", "env": "PORT"}],
        "replicas": 3,
        "placement": {"site": "plant"},
    },
}
SERVICE = {"kind": "Service", "metadata": {"name": "web"}, "spec": {"app": "web", "port": "http"}}
ROUTE = {
    "kind": "Route",
    "metadata": {"name": "web"},
    "spec": {"path": "/", "to": {"service": "web"}, "placement": {"site": "plant"}},
}


def with_replicas(count: int) -> dict[str, Any]:
    return {**APP, "spec": {**APP["spec"], "replicas": count}}


def at(system: Any, node: str, name: str = "web") -> dict[str, Any]:
    doc: dict[str, Any] = system.peek("App", name, node)
    return doc


def runs(system: Any, node: str) -> list[str]:
    """Where the instances are that a node knows to run."""
    return sorted(i["node"] for i in at(system, node)["status"]["instances"] if i["phase"] == "Running")


def endpoints(system: Any, node: str) -> list[Any]:
    found: list[Any] = system.peek("Service", "web", node)["status"]["endpoints"]
    return found


def items(system: Any, *args: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(system.run(*args, "-o", "json"))["items"]
    return found


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own gateway
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_a_cut_site_is_worked_on_from_any_of_its_nodes(
    lab: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = lab("sites: [{name: plant, nodes: 3, link: lan}]")
    roles = {}
    for role in ("operator", "viewer"):
        made = system.run("token", "create", "--role", role, "--sites", "plant", "--ttl", "1h", "-o", "json")
        roles[role] = json.loads(made)["token"]
    for node in NODES:
        monkeypatch.setenv("EDGEWARD_TOKEN", roles["viewer"])
        system.wait("the role", lambda node=node: "viewer" in system.attempt("whoami", "--at", node))
        monkeypatch.delenv("EDGEWARD_TOKEN")
    system.run("lab", "cut", "plant")
    for node in NODES:
        verdict = lambda node=node: system.peek("Node", node, node)["status"]["verdict"]  # noqa: E731
        system.wait(f"{node} notices", lambda verdict=verdict: verdict() == "wan-cut")

    # people with a role do at any node what it lets them, and no more
    monkeypatch.setenv("EDGEWARD_TOKEN", roles["operator"])
    system.apply([APP, SERVICE, ROUTE], "--at", "plant-1")
    for node in NODES:
        system.wait(f"all instances, seen at {node}", lambda node=node: runs(system, node) == list(NODES))
    monkeypatch.setenv("EDGEWARD_TOKEN", roles["viewer"])
    for node in NODES:
        system.apply(with_replicas(9), "--at", node, code=3)
    monkeypatch.delenv("EDGEWARD_TOKEN")

    # scaled at another one; the Service has one instance, and answers at every gateway
    old = at(system, "plant-3")
    system.run("scale", "web", "--replicas", "1", "--at", "plant-2")
    for node in NODES:
        system.wait(f"one instance, seen at {node}", lambda node=node: len(runs(system, node)) == 1)
        urls = {n["name"]: n["gateway_url"] for n in system.context["nodes"]}
        system.wait(f"the Service at {node}", lambda url=urls[node]: answers(url + "/"))
        system.wait(f"its endpoint, seen at {node}", lambda node=node: len(endpoints(system, node)) == 1)

    # who did not see that is refused, as everywhere; who saw it goes back at a third one
    system.apply({**old, "spec": {**old["spec"], "replicas": 5}}, "--at", "plant-3", code=4)
    system.apply(APP, "--at", "plant-3")
    system.wait("as before", lambda: runs(system, "plant-1") == list(NODES))
    assert not items(system, "journal", "--at", "plant-1")

    # another version, and the way back, each at another node; what is no part of a version stays
    first = system.wait("its version", lambda: at(system, "plant-2")["status"]["version"])
    newer = at(system, "plant-1")
    newer["spec"]["process"]["env"] = {"NEWER": "1"}
    system.apply(newer, "--at", "plant-1")
    version = lambda node: {i["version"] for i in at(system, node)["status"]["instances"]}  # noqa: E731
    for node in NODES:
        system.wait(f"the newer one, seen at {node}", lambda node=node: first not in version(node))
    system.wait("three of it", lambda: runs(system, "plant-2") == list(NODES))
    kept = lambda *at: [(i["state"], i["version"]) for i in items(system, "app", "versions", "web", *at)]  # noqa: E731
    system.wait("what is kept", lambda: [state for state, _ in kept("--at", "plant-2")] == ["kept", "serves"])
    assert kept("--at", "plant-2")[0] == ("kept", first)
    system.run("app", "rollback", "web", "--to", "ffff", "--at", "plant-2", code=5)
    system.run("app", "rollback", "web", "--at", "plant-2")
    for node in NODES:
        system.wait(f"as it was, seen at {node}", lambda node=node: version(node) == {first})
    assert "env" not in at(system, "plant-3")["spec"]["process"] and at(system, "plant-3")["spec"]["replicas"] == 3
    system.wait("three of it again", lambda: runs(system, "plant-1") == list(NODES))

    # a node that dies takes nothing along that it told, and one that comes back has what it missed
    system.run("lab", "kill", "plant-3")
    config = {"kind": "Config", "metadata": {"name": "late"}, "spec": {"data": {"k": "v"}}}
    idle = {**APP["spec"], "replicas": 0, "envFrom": [{"config": "late"}]}
    system.apply([config, {"kind": "App", "metadata": {"name": "idle"}, "spec": idle}], "--at", "plant-1")
    system.wait("at plant-2", lambda: system.peek("Config", "late", "plant-2"))
    system.run("lab", "start", "plant-3")
    system.wait("at plant-3", lambda: system.peek("Config", "late", "plant-3"))

    # the hub takes it all over, once, and nobody has lost anything
    system.run("lab", "heal", "plant")
    system.wait("at the hub", lambda: system.peek("App", "web"))
    system.wait("all instances at the hub", lambda: len(system.peek("App", "web")["status"]["instances"]) == 3)
    system.wait("the Config at the hub", lambda: system.peek("Config", "late"))
    system.wait("the other App at the hub", lambda: system.peek("App", "idle"))
    system.wait("what serves, at the hub", lambda: "serves" in {state for state, _ in kept()})
    journal = system.wait("the journal", lambda: items(system, "journal"))
    assert {j["outcome"] for j in journal} == {"accept"} and not any(j["loser"] for j in journal), journal

    # the site keeps the hub's changes waiting until it says so; roles go on to be the hub's to say
    monkeypatch.setenv("EDGEWARD_TOKEN", roles["viewer"])
    system.run("site", "hold", "plant", "--at", "plant-1", code=3)
    monkeypatch.setenv("EDGEWARD_TOKEN", roles["operator"])
    system.run("site", "hold", "plant", "--at", "plant-1")
    monkeypatch.delenv("EDGEWARD_TOKEN")
    for node in NODES:
        system.wait(
            f"{node} holds", lambda node=node: "held since" in system.attempt("site", "status", "plant", "--at", node)
        )
    system.apply(with_replicas(2))
    counts = lambda: (system.peek("Site", "plant")["status"].get("hold") or {}).get("waiting")  # noqa: E731
    system.wait("what waits, at the hub", lambda: counts() == 1)
    at_2 = lambda: system.peek("Site", "plant", "plant-2")["status"]["hold"]["changes"]  # noqa: E731
    system.wait("what waits, at the site", lambda: at_2() == ["App/web"])
    system.apply({**config, "spec": {"data": {"k": "mine"}}}, "--at", "plant-2")
    system.wait("among themselves", lambda: system.peek("Config", "late", "plant-3")["spec"]["data"]["k"] == "mine")
    assert system.get("config", "late")["spec"]["data"]["k"] == "v"
    assert {at(system, node)["spec"]["replicas"] for node in NODES} == {3}
    system.run("site", "release", "plant", code=2)
    system.run("site", "release", "plant", "--at", "plant-3")
    for node in NODES:
        system.wait(f"released, {node}", lambda node=node: at(system, node)["spec"]["replicas"] == 2)
    system.wait("the site's own", lambda: system.peek("Config", "late")["spec"]["data"]["k"] == "mine")
    system.wait("nothing waits", lambda: counts() is None)
