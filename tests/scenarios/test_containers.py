"""A program in a container as a user meets it: declared, found by its Service, followed, and gone without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.workloads.engines import BOX, Store, a_store

WEB = f"""\
apiVersion: edgeward/v1
kind: App
metadata: {{name: web}}
spec:
  container:
    image: {BOX}
    args: ['echo "serving $$WORD"; echo "$$WORD" > /tmp/index.html; exec httpd -f -p 8080 -h /tmp']
    env: {{WORD: hello}}
    ports: {{http: 8080}}
  ports: [{{name: http}}]
  health: {{http: {{port: http}}}}
  stop: {{grace: 1s}}
  limits: {{pids: 50}}
---
apiVersion: edgeward/v1
kind: Service
metadata: {{name: web}}
spec: {{app: web, port: http}}
---
apiVersion: edgeward/v1
kind: Route
metadata: {{name: web}}
spec: {{path: /index.html, to: {{service: web}}}}
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    yield from a_store(tmp_path / "store", monkeypatch)


def test_a_container_on_a_node_of_up(store: Store, systems: Callable[..., Any]) -> None:
    up = systems("a", "up", "--port", "0")
    up.run("apply", "-f", "-", "--wait", stdin=WEB)
    (one,) = up.get("app", "web")["status"]["instances"]
    assert one["image"].startswith("sha256:")
    assert "serving hello" in up.run("logs", "web")
    direct = f"http://127.0.0.1:{one['ports']['http']}"

    def says(url: str = direct) -> str:
        ask = f"{url}/index.html"
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(ask, timeout=30) as got:  # noqa: S310
            return str(got.read().decode())
        return ""

    assert says() == "hello\n"
    up.wait("the gateway", lambda: says(up.context["nodes"][0]["gateway_url"]) == "hello\n")
    agent = up.context["nodes"][0]["pids"]["agent"]
    os.kill(agent, signal.SIGKILL)
    up.wait("another agent", lambda: up.context["nodes"][0]["pids"]["agent"] not in (None, agent))
    assert says() == "hello\n", "it outlives its agent"
    up.run("apply", "-f", "-", "--wait", stdin=WEB.replace("WORD: hello", "WORD: again"))
    running = [i for i in up.get("app", "web")["status"]["instances"] if i["phase"] == "Running"]
    assert [i["id"] for i in running] != [one["id"]], "what --wait waited for"
    up.run("delete", "app/web", "service/web", "route/web")
    up.wait("nothing of it", lambda: store.names() == [])
    assert json.loads(up.run("get", "apps", "-o", "json"))["items"] == []
