"""Functions as a user meets them: declared at the hub, called there, at the node and through the gateway."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from tests.scenarios.conftest import ROOT

from edgeward.cli.client import _UnixConnection

ALARMS = Path(__file__).parents[2] / "examples" / "07-alarms"
HELLO = """\
apiVersion: edgeward/v1
kind: Function
metadata: {name: hello}
spec:
  runtime: python
  source:
    inline: |
      def handler(event, context):
          return {"hello": event.data.decode(), "version": context.version}
---
apiVersion: edgeward/v1
kind: Route
metadata: {name: hello}
spec: {path: /hello, to: {function: hello}}
"""
MOODY = """
import os
def handler(event, context):
    context.logger.warning("mood %s", event.text())
    if event.data == b"loop":
        while True: ...
    if event.data == b"secret":
        return os.environ["PASSWORD"]
    return context.node
"""


def function(name: str, code: str, **spec: Any) -> dict[str, Any]:
    base = {"runtime": "python", "source": {"inline": code}}
    return {"apiVersion": "edgeward/v1", "kind": "Function", "metadata": {"name": name}, "spec": base | spec}


def post(url: str, data: bytes) -> tuple[int, dict[str, Any]]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", parts.path, data)
        got = connection.getresponse()
        return got.status, json.load(got)


def test_a_function_answers_at_hub_node_and_gateway_and_outlives_the_agent(
    systems: Callable[..., Any], tmp_path: Path
) -> None:
    up = systems("a", "up", "--port", "0")
    up.run("apply", "-f", "-", "--wait", stdin=HELLO)
    answer = {"hello": "edge", "version": up.get("function", "hello")["status"]["version"]}
    assert json.loads(up.run("invoke", "hello", "-d", "edge")) == answer
    assert json.loads(up.run("--at", "plant-1", "invoke", "hello", "-d", "-", stdin="edge")) == answer
    url = up.wait("the gateway's address", lambda: up.context["nodes"][0].get("gateway_url"))
    up.wait("the route", lambda: post(f"{url}/hello", b"edge") == (200, answer))

    # one that was written on this machine is handed over as it is
    folder = tmp_path / "mine"
    up.run("function", "new", "mine", "--dir", str(folder))
    up.run("function", "deploy", str(folder))
    assert json.loads(up.run("invoke", "mine", "-d", '{"name": "it"}'))["hello"] == "it"

    # a program in C, compiled to WebAssembly
    up.run("apply", "-f", str(ROOT / "examples" / "06-wasm"), "--wait")
    words = {"greeting": "hello", "words": 3, "bytes": 14}
    assert json.loads(up.run("invoke", "words", "-d", "one two  three")) == words
    up.wait("the route", lambda: post(f"{url}/words", b"one two  three") == (200, words))

    # what fails names the function and the limit, by exit code, by problem document, and in the log
    secret = {"apiVersion": "edgeward/v1", "kind": "Secret", "metadata": {"name": "db"}}
    up.apply({**secret, "spec": {"data": {"PASSWORD": "x1"}}})
    route = {"apiVersion": "edgeward/v1", "kind": "Route", "metadata": {"name": "moody"}}
    moody = function("moody", MOODY, limits={"timeout": "500ms"}, envFrom=[{"secret": "db"}])
    up.apply([moody, {**route, "spec": {"path": "/moody", "to": {"function": "moody"}}}], "--wait")
    assert up.run("invoke", "moody", "-d", "secret") == "x1"
    up.run("invoke", "moody", "-d", "loop", code=1)
    up.wait("the route", lambda: post(f"{url}/moody", b"loop")[0] == 504)
    status, problem = post(f"{url}/moody", b"loop")
    assert (status, problem["function"], problem["limit"]) == (504, "default/moody", {"timeout": 0.5})
    lines = up.run("functions", "logs", "moody", "--level", "warning", "--grep", "mood loop").splitlines()
    assert len(lines) >= 3
    assert up.run("--at", "plant-1", "functions", "logs", "moody", "--tail", "1", "-o", "json").count("\n") == 1
    with contextlib.closing(_UnixConnection(up.context["nodes"][0]["api"], 30.0)) as node:
        node.request("GET", "/metrics")
        assert b'edgeward_function_failed_total{function="default/moody",kind="timeout"}' in node.getresponse().read()
    up.run("invoke", "nobody", code=5)
    up.run("invoke", "moody", "--node", "elsewhere", code=5)

    # a version that does not load leaves the old one answering, and --wait says so
    broken = function("hello", "import nothing_like_it")
    up.apply(broken, "--wait", code=1)
    assert json.loads(up.run("invoke", "hello", "-d", "edge")) == answer
    assert up.get("function", "hello")["status"]["phase"] == "Degraded"

    up.apply(function("later", "(module)", runtime="wasm", handler="a:b"), code=3)

    # calls go on while the agent is away, and the next one takes over what it finds
    before = up.context["nodes"][0]["pids"]["agent"]
    os.kill(before, signal.SIGKILL)
    assert post(f"{url}/hello", b"edge") == (200, answer)
    up.wait("a new agent", lambda: up.context["nodes"][0]["pids"]["agent"] not in (None, before))
    up.run("delete", "route", "hello")
    up.run("delete", "function", "hello", "--wait")
    up.run("invoke", "hello", code=5)


JOBS = """
def handler(event, context):
    if event.type == "edgeward.cron":
        context.publish("out/tick", event.id)
    elif event.type == "edgeward.event":
        context.publish("out/event", event.json()["reason"])
    elif event.data == b"poison":
        raise ValueError("poison")
    else:
        context.state.set("n", str(int(context.state.get("n", b"0")) + 1))
        context.publish("out/done", event.data)
"""


def test_triggers_go_on_while_the_link_is_cut_and_the_agent_is_dead(lab: Callable[[str], Any]) -> None:
    system = lab("sites: [{name: plant, nodes: 1, link: lan}]")
    triggers = [
        {"mqtt": {"topic": "jobs/#", "retries": 1, "backoff": "50ms"}},
        {"event": {"reasons": ["LinkDown"]}},
        {"cron": {"schedule": "* * * * * *"}},
    ]
    export = {"apiVersion": "edgeward/v1", "kind": "Export", "metadata": {"name": "out"}}
    export |= {"spec": {"from": {"mqtt": "out/done"}, "to": {"hub": {"stream": "out"}}}}
    system.apply([function("jobs", JOBS, triggers=triggers, publish=["out/#"]), export], "--wait")
    node = system.context["nodes"][0]
    got: list[tuple[str, bytes]] = []
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.username_pw_set(node["mqtt_user"], node["mqtt_password"])
    client.on_message = lambda _, __, message: got.append((message.topic, message.payload))
    subscribed = threading.Event()
    client.on_subscribe = lambda *_: subscribed.set()
    parts = urlsplit(node["mqtt_url"])
    client.connect(str(parts.hostname), parts.port)
    client.loop_start()
    client.subscribe("out/#", 1)
    assert subscribed.wait(60)

    def connected(name: str, number: int) -> bool:
        told = system.get("function", name)["status"].get("nodes", {}).get("plant-1", {}).get("triggers", [])
        return len(told) == number and all(t["connected"] for t in told)

    system.wait("the triggers", lambda: connected("jobs", 2))

    def job(name: str) -> None:
        client.publish("jobs/a", name.encode(), 1).wait_for_publish(60)
        system.wait(name, lambda: ("out/done", name.encode()) in got)

    def ticks() -> int:
        return sum(topic == "out/tick" for topic, _ in got)

    try:
        job("online")
        # examples/07-alarms: said when it changes
        system.run("apply", "-f", str(ALARMS), "--wait")
        system.wait("its trigger", lambda: connected("alarm", 1))
        for celsius in (b"20", b"91", b"92", b"30"):
            client.publish("machines/press/temperature", celsius, 1).wait_for_publish(60)

        def alarms() -> list[str]:
            lines = system.run("stream", "read", "alarms", "--from", "0", "-o", "json").splitlines()
            return [json.loads(line)["payload"]["state"] for line in lines]

        system.wait("the alarms", lambda: alarms()[:1] == ["hot"] and "well" in alarms())
        system.run("lab", "cut", "plant", "--data", str(system.data))
        system.wait("the event of the cut", lambda: ("out/event", b"LinkDown") in got)
        agent = system.context["nodes"][0]["pids"]["agent"]
        os.kill(agent, signal.SIGSTOP)
        try:
            job("without an agent")
            client.publish("jobs/a", b"poison", 1).wait_for_publish(60)
            job("after poison")
            before = ticks()
            system.wait("a call by time", lambda: ticks() > before)
        finally:
            os.kill(agent, signal.SIGKILL)
        system.wait("a new agent", lambda: system.context["nodes"][0]["pids"]["agent"] not in (None, agent))
        job("with a new agent")

        def answers() -> str:
            with contextlib.suppress(AssertionError):
                return system.run("--at", "plant-1", "get", "function", "jobs", "-o", "json")
            return ""

        system.wait("the new agent's answer", answers)

        def letters(*args: str) -> list[dict[str, Any]]:
            lines = system.run(*args, "functions", "deadletters", "jobs", "-o", "json").splitlines()
            return [json.loads(line) for line in lines]

        at = ("--at", "plant-1")
        system.wait("the dead letter", lambda: len(letters(*at)) == 1)
        (letter,) = letters(*at)
        assert (letter["data"], letter["node"]) == ("poison", "plant-1")
        assert "ValueError" in letter["reason"]
        system.run(*at, "functions", "deadletters", "jobs", "--replay", code=1)
        system.run("lab", "heal", "plant", "--data", str(system.data))
        system.wait("the hub's view", lambda: [x["data"] for x in letters() if "error" not in x] == ["poison"])
        system.run("functions", "deadletters", "jobs", "--drop")

        # what it published went the way of all readings
        def exported() -> bool:
            lines = system.run("stream", "read", "out", "--from", "0", "-o", "json").splitlines()
            names = {"online", "without an agent", "after poison", "with a new agent"}
            return names <= {json.loads(line)["payload"] for line in lines}

        system.wait("the export", exported)
        assert letters() == []
    finally:
        client.disconnect()
        client.loop_stop()
