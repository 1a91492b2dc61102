"""The gateway of a running system: what scripts rely on, through changes, kills and updates."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import http.server
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from edgeward.lab.emulated import _UnixConnection

ROOT = Path(__file__).parents[2]
PROGRAM = """
import http.server, os, sys
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = os.environ["WORD"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), H).serve_forever()
"""


def web(word: str) -> dict[str, Any]:
    process = {"command": ["python3", "-c", PROGRAM], "env": {"WORD": word}}
    spec = {
        "process": process, "ports": [{"name": "http", "env": "PORT"}], "health": {"http": {"port": "http"}},
        "stop": {"drain": "2s"},
    }  # fmt: skip
    return {"kind": "App", "metadata": {"name": "web"}, "spec": spec}


class News(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    count = 0

    def do_GET(self) -> None:
        type(self).count += 1
        body = f"{self.path} {type(self).count}".encode()
        self.send_response(200)
        self.send_header("Cache-Control", "max-age=600")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def news() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), News)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


class Door:
    """A client of the gateway, with one connection that is kept."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._at = (str(parts.hostname), int(parts.port or 80))
        self.connection = http.client.HTTPConnection(*self._at, timeout=60)

    def get(self, path: str, body: bytes | None = None) -> tuple[int, bytes, http.client.HTTPMessage]:
        self.connection.request("GET" if body is None else "POST", path, body)
        got = self.connection.getresponse()
        return got.status, got.read(), got.headers

    def close(self) -> None:
        self.connection.close()


def test_the_example_answers_with_its_origin_gone(systems: Callable[..., Any]) -> None:
    system = systems("e", "up")
    system.run("apply", "-f", str(ROOT / "examples" / "02-answers-at-the-edge"), "--wait")
    url = system.context["nodes"][0]["gateway_url"]
    door = Door(url)
    system.wait("the function", lambda: door.get("/hello", b"edge")[0] == 200)
    assert json.loads(door.get("/hello", b"edge")[1])["hello"] == "edge"
    assert door.get("/hello")[0] == 405
    system.wait("the origin", lambda: door.get("/news/today")[:2] == (200, b"news of /news/today\n"))
    app = system.get("app", "news")
    system.apply({"kind": "App", "metadata": {"name": "news"}, "spec": {**app["spec"], "replicas": 0}})
    # what is not in the cache fails, what is goes on
    system.wait("the origin's end", lambda: door.get("/news/other")[0] in (502, 503))
    stale = system.wait("what is stale", lambda: (got := door.get("/news/today"))[0] == 200 and got)
    assert stale[1] == b"news of /news/today\n"
    system.wait("the word for it", lambda: "stale-if-error" in door.get("/news/today")[2]["cache-status"])


def test_a_cached_site_survives_its_cloud_and_a_power_cut(systems: Callable[..., Any]) -> None:
    system = systems("e", "up")
    system.run("apply", "-f", str(ROOT / "examples" / "05-cached-site"), "--wait")
    url = system.context["nodes"][0]["gateway_url"]
    key = {"X-Api-Key": "staff-0123456789abcdef"}
    film = bytes(range(256)) * 80 * 1024

    def ask(path: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
        with contextlib.closing(Door(url)) as door:
            door.connection.request("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})
            got = door.connection.getresponse()
            return got.status, got.read(), got.headers

    page = system.wait("the site", lambda: (got := ask("/"))[0] == 200 and got)[1]
    assert gzip.decompress(ask("/", Accept_Encoding="gzip")[1]) == page
    assert ask("/media/film")[1] == film
    system.wait("the keys", lambda: ask("/staff/plan", **key)[0] == 200)
    staff = ask("/staff/plan", **key)[1]
    assert ask("/contact/")[1] == b"<h1>How to reach us</h1>\n"
    node = next((system.data / "nodes").iterdir())
    assert b"staff-0123456789abcdef" not in (node / "plane.json").read_bytes()
    system.wait("all on the disk", lambda: sum(1 for _ in (node / "cache").glob("*/*.e")) >= 3)

    app = system.get("app", "cloud")
    system.apply({"kind": "App", "metadata": {"name": "cloud"}, "spec": {**app["spec"], "replicas": 0}})
    system.wait("the cloud's end", lambda: ask("/other")[0] in (502, 503))
    old = system.context["nodes"][0]["pids"]["plane"]
    os.kill(old, signal.SIGKILL)  # the memory is gone
    system.wait("another plane", lambda: system.context["nodes"][0]["pids"]["plane"] not in (None, old))

    def up() -> bool:
        try:
            return ask("/")[0] == 200
        except OSError:
            return False

    system.wait("the site without its cloud", up)
    got = ask("/")
    assert (got[1], "stale-if-error" in got[2]["cache-status"] or "hit" in got[2]["cache-status"]) == (page, True)
    assert ask("/media/film")[1] == film
    part = ask("/media/film", Range="bytes=1000000-1000099")
    assert (part[0], part[1]) == (206, film[1_000_000:1_000_100])
    assert ask("/staff/plan")[0] == 401
    assert ask("/staff/plan", **key)[1] == staff
    assert ask("/contact/")[0] == 200
    name = system.context["nodes"][0]["name"]
    system.run("gateway", "purge", "--prefix", "/media/", "--node", name)
    assert ask("/media/film")[0] in (502, 503)


def test_a_gateway_through_changes_and_kills(systems: Callable[..., Any], news: int) -> None:
    system = systems("a", "up")
    node = system.context["nodes"][0]
    door = Door(node["gateway_url"])
    status, _, headers = door.get("/")
    assert (status, headers["content-type"]) == (404, "application/problem+json")

    routes = [
        {"kind": "Service", "metadata": {"name": "web"}, "spec": {"app": "web", "port": "http"}},
        {"kind": "Route", "metadata": {"name": "web"}, "spec": {"path": "/web", "to": {"service": "web"}}},
        {
            "kind": "Route",
            "metadata": {"name": "news"},
            "spec": {"path": "/news/", "to": {"upstream": f"http://127.0.0.1:{news}"}, "cache": {}},
        },
    ]
    system.apply([web("one"), *routes], "--wait")
    system.wait("the service", lambda: door.get("/web")[:2] == (200, b"one"))
    system.wait("status", lambda: system.get("route", "web")["status"]["phase"] == "Ready")
    first = door.get("/news/a")
    again = door.get("/news/a")
    assert (first[0], first[1], again[1]) == (200, b"/news/a 1", b"/news/a 1")
    assert again[2]["cache-status"].startswith("edgeward; hit; ttl=")
    assert "age" in again[2]

    url = node["gateway_url"]
    said = json.loads(system.run("gateway", "explain", f"{url}/news/a", "-o", "json"))
    assert (said["route"], said["cache"]["state"]) == ("default/news", "hit")
    assert "default/web: path is not /web" in system.run("gateway", "explain", f"{url}/news/a")
    assert "circuit closed" in system.run("gateway", "explain", "/web")
    system.run("gateway", "purge", "--prefix", "/news/")
    assert door.get("/news/a")[1] == b"/news/a 2"
    assert "route     default/news" in system.run("gateway", "explain", "/news/b", "--node", "plant-1")
    assert "forgotten" in system.run("gateway", "purge", "/news/b", "--node", "plant-1")
    system.run("gateway", "explain", "/news/b", "--node", "plant-9", code=5)
    connection = _UnixConnection(node["api"], 10.0)
    connection.request("GET", "/metrics")
    metrics = connection.getresponse().read().decode()
    connection.close()
    assert 'edgeward_gateway_requests_total{route="default/news",status="200"} 3' in metrics

    # what is there goes on, on the same connection, while the agent is killed and another takes over
    pids = node["pids"]
    os.kill(pids["agent"], signal.SIGKILL)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        assert door.get("/web")[:2] == (200, b"one")
    system.wait("another agent", lambda: system.context["nodes"][0]["pids"]["agent"] not in (None, pids["agent"]))
    assert door.get("/news/a")[1] == b"/news/a 2"
    now = system.context["nodes"][0]
    assert (now["pids"]["plane"], now["gateway_url"]) == (pids["plane"], node["gateway_url"])

    # an update of the app behind it fails nobody
    seen: list[tuple[int, bytes]] = []
    done = threading.Event()

    def load() -> None:
        mine = Door(url)
        while not done.is_set():
            seen.append(mine.get("/web")[:2])

    threads = [threading.Thread(target=load) for _ in range(2)]
    for t in threads:
        t.start()
    try:
        system.apply(web("two"), "--wait")
        system.wait("the new version", lambda: seen[-1][1] == b"two")
        # twenty changes of routes under load fail nobody, either
        for n in range(20):
            system_route = {"kind": "Route", "metadata": {"name": "extra"}}
            system.apply({**system_route, "spec": {"path": f"/extra{n}", "to": {"service": "web"}}})
        system.wait("the last change", lambda: door.get("/extra19")[0] == 200)
    finally:
        done.set()
        for t in threads:
            t.join(60)
    assert [s for s in seen if s[0] != 200] == []
    assert {b for _, b in seen} == {b"one", b"two"}

    # a plane that dies comes back, with all it served
    os.kill(pids["plane"], signal.SIGKILL)
    system.wait("another plane", lambda: system.context["nodes"][0]["pids"]["plane"] not in (None, pids["plane"]))
    later = Door(system.wait("its door", lambda: system.context["nodes"][0]["gateway_url"]))
    assert later.get("/web")[:2] == (200, b"two")
    assert "PlaneEnded" in system.run("events")
