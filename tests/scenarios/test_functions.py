"""Functions as a user meets them: declared at the hub, called there, at the node and through the gateway."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgeward.cli.client import _UnixConnection

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
