"""A site judges its own nodes: cut from the cloud, with a dead node, and parted in two."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeward.core.proc import find_by_env
from edgeward.core.resource import decode
from edgeward.hub.kinds import load
from edgeward.lab import namespaces
from edgeward.workloads.placement import share

load()

NODES = ("plant-1", "plant-2", "plant-3")
TOPOLOGY = "sites: [{name: plant, nodes: 3, link: lan}]\n"
SITE = {"kind": "Site", "metadata": {"name": "plant"}, "spec": {"verdicts": {"deadAfter": "7s"}}}
SERVER = "import os, http.server as h; h.test(h.SimpleHTTPRequestHandler, port=int(os.environ['PORT']), bind='0.0.0.0')"
WEB: list[dict[str, Any]] = [
    {
        "kind": "App",
        "metadata": {"name": "web"},
        "spec": {
            "placement": {"site": "plant"},
            "process": {"command": ["python3", "-c", SERVER]},
            "ports": [{"name": "http", "env": "PORT"}],
            "health": {"http": {"port": "http", "path": "/"}},
        },
    },
    {"kind": "Service", "metadata": {"name": "web"}, "spec": {"app": "web", "port": "http"}},
    {"kind": "Route", "metadata": {"name": "web"}, "spec": {"path": "/", "to": {"service": "web"}}},
]

#: What must never run twice, at each node; nobody is alone for as long as it may be.
ONCE: dict[str, Any] = {
    "kind": "App",
    "metadata": {"name": "once"},
    "spec": {
        "placement": {"site": "plant"},
        "process": {"command": ["sleep", "1000"]},
        "replicas": 3,
        "disconnect": {"stopAfter": "900s"},
    },
}


def states(system: Any, node: str) -> dict[str, str]:
    items = system.peek("Node", at=node)["items"]
    assert all(i["status"].get("evidence") for i in items if i["status"].get("verdict")), items
    return {i["metadata"]["name"]: i["status"].get("verdict", "") for i in items}


def say(system: Any, nodes: tuple[str, ...], **expected: str) -> None:
    """Until each of ``nodes`` says it; ``_1`` stands for ``plant-1``."""
    full = {f"plant{name.replace('_', '-')}": state for name, state in expected.items()}
    for node in nodes:
        system.wait(f"{node} says {full}", lambda node=node: states(system, node) == full)


def settled_at(system: Any, node: str) -> str:
    """Another App that runs at ``node`` and stays where it is moved to. Who runs what is by the names."""
    for n in range(100):
        name = f"stays-{n}"
        spec = {**WEB[0]["spec"], "disconnect": {"reconcile": "keep-replacement"}}
        app = decode({"apiVersion": "edgeward/v1", **WEB[0], "metadata": {"name": name}, "spec": spec})
        nodes = [decode({"apiVersion": "edgeward/v1", **i}) for i in system.peek("Node")["items"]]
        if share(app, nodes, node):
            system.apply({**WEB[0], "metadata": {"name": name}, "spec": spec}, "--wait")
            system.wait(f"{name} runs at {node}", lambda name=name: homes(system, app=name) == {node})
            return name
    raise AssertionError("no name of a hundred")


def homes(system: Any, at: str = "", app: str = "web") -> set[str]:
    instances = system.peek("App", app, at)["status"].get("instances", [])
    return {i["node"] for i in instances if i["phase"] == "Running" and not i.get("stale")}


def answers(system: Any, node: str) -> bool:
    import urllib.error
    import urllib.request

    url = next(n["gateway_url"] for n in system.context["nodes"] if n["name"] == node)
    try:
        with urllib.request.urlopen(url, timeout=10) as got:  # noqa: S310 - our own node's gateway
            return bool(got.status == 200)
    except OSError:
        return False


@pytest.mark.root
def test_a_site_judges_its_nodes(systems: Callable[..., Any], tmp_path: Path) -> None:
    if why := namespaces.unusable():
        pytest.skip(f"no network namespaces here: {why}")
    file = tmp_path / "lab.yaml"
    file.write_text(TOPOLOGY)
    lab = systems("lab", "lab", "up", "-f", str(file), "--backing", "namespaces")
    lab.apply(SITE)
    say(lab, NODES, _1="healthy", _2="healthy", _3="healthy")
    lab.apply([*WEB, ONCE], "--wait")
    (home,) = lab.wait("it runs", lambda: homes(lab))
    stays = settled_at(lab, home)
    rest = tuple(n for n in NODES if n != home)

    # the site is cut: nothing moves
    lab.run("lab", "cut", "plant")
    say(lab, NODES, _1="wan-cut", _2="wan-cut", _3="wan-cut")
    lab.wait("nothing moves", lambda: homes(lab, rest[0]) == {home})

    # one node hears nobody: it decides nothing, also not that it goes on alone; the others take its share
    lab.run("lab", "partition", "plant", f"{home}/{','.join(rest)}")
    lab.wait("the minority knows nothing", lambda: set(states(lab, home).values()) == {"unknown"})
    lab.wait("the majority decides", lambda: states(lab, rest[0])[home] == states(lab, rest[1])[home] == "dead")
    lab.wait("the Service answers at both", lambda: all(answers(lab, n) for n in rest))
    (heir,) = lab.wait("one of them has it", lambda: (at := homes(lab, rest[0])) - {home} == at and at)
    lab.wait("what the minority runs goes on there", lambda: homes(lab, home) == {home})
    lab.wait("the hub says that it does not know", lambda: _verdicts(lab) == {"unknown"})
    lab.run("lab", "heal", "plant")
    say(lab, NODES, _1="healthy", _2="healthy", _3="healthy")
    lab.wait("it runs where it belongs", lambda: homes(lab) == {home} == homes(lab, rest[1]))
    lab.wait("the other one stays", lambda: len(at := homes(lab, app=stays)) == 1 and home not in at)
    lab.wait("its first node knows", lambda: homes(lab, home, app=stays) == homes(lab, app=stays))

    # a node dies while the cloud is there: the hub hears it from the others
    lab.run("lab", "kill", home)
    lab.wait("dead at the hub", lambda: lab.peek("Node", home)["status"].get("verdict") == "dead")
    lab.wait("counted where it runs now", lambda: homes(lab) == {heir})
    lab.wait("the Service answers at both", lambda: all(answers(lab, n) for n in rest))
    lab.wait("it is told", lambda: any(e["resource"] == f"Node/{home}" for e in told(lab, "NodeDead")))
    # switched on while it hears nobody, it runs what it ran, but for what must not run twice
    lab.run("lab", "partition", "plant", f"{home}/{','.join(rest)}")
    lab.run("lab", "start", home)
    lab.wait("it runs again", lambda: answers(lab, home) and states(lab, home)[home] == "unknown")
    lab.wait("it says so", lambda: homes(lab, home) == {home} and home not in homes(lab, home, app="once"))
    assert not sleepers(lab, home) and sleepers(lab, rest[0])

    # what scripts read
    shown = {i["metadata"]["name"]: i["status"] for i in lab.get("nodes", "--at", rest[0])["items"]}
    assert (shown[home]["verdict"], set(shown[home]["evidence"]["lost"])) == ("dead", set(rest))
    lab.run("lab", "heal", "plant")
    lab.wait("a majority is with it", lambda: homes(lab, home, app="once") == set(NODES))


def sleepers(system: Any, node: str) -> list[int]:
    """The processes of the App that must not run twice."""
    found = []
    for process in find_by_env("EDGEWARD_DATA", str(system.data / "nodes" / node)):
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{process.pid}/cmdline").read_bytes() == b"sleep\x001000\x00":
                found.append(process.pid)
    return found


def told(system: Any, reason: str) -> list[dict[str, Any]]:
    return [e for e in json.loads(system.run("events", "-o", "json"))["items"] if e["reason"] == reason]


def _verdicts(system: Any) -> set[str]:
    return {i["status"].get("verdict", "") for i in system.peek("Node")["items"]}
