"""Closed traffic: one App over three sites whose requests never leave their site; then each declared fallback."""

from __future__ import annotations

import http.client
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from edgeward.gateway import nft
from edgeward.lab import namespaces

pytestmark = pytest.mark.root

WHY = namespaces.unusable() or nft.unusable()
TOPOLOGY = """
between: open
sites: [{name: berlin, nodes: 2, link: lan}, {name: bonn, nodes: 1, link: lan}, {name: rome, nodes: 1, link: lan}]
"""
SERVER = """
import http.server, os
class Web(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 65536
    def do_GET(self):
        body = f"{os.environ['EDGEWARD_SITE']} {os.environ['WORD']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Web).serve_forever()
"""
#: From this machine to a gateway; how long is waited decides nothing but the test's time.
DROPPED = 1.0


def app(**per_site: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {"process": {"command": [sys.executable, "-c", SERVER], "env": {"WORD": "plain"}}}
    spec |= {"ports": [{"name": "http", "env": "PORT"}], "health": {"http": {"port": "http"}}, "perSite": per_site}
    return {"kind": "App", "metadata": {"name": "web"}, "spec": spec}


def service(**more: str) -> dict[str, Any]:
    return {"kind": "Service", "metadata": {"name": "web"}, "spec": {"app": "web", "port": "http", **more}}


def route(**more: Any) -> dict[str, Any]:
    return {"kind": "Route", "metadata": {"name": "web"}, "spec": {"path": "/web", "to": {"service": "web"}, **more}}


class Net:
    """The lab, and what is asked of it."""

    def __init__(self, lab: Any) -> None:
        self.lab = lab
        self.gateways = {n["name"]: urlsplit(n["gateway_url"]).netloc for n in lab.context["nodes"]}

    def ask(self, node: str, times: int = 1) -> list[tuple[int, str]]:
        """Status and body of requests at a node's gateway, from this machine."""
        connection = http.client.HTTPConnection(self.gateways[node], timeout=60)
        found = []
        try:
            for _ in range(times):
                connection.request("GET", "/web")
                answer = connection.getresponse()
                found.append((answer.status, answer.read().decode()))
        except OSError as e:
            return [(0, str(e))]
        finally:
            connection.close()
        return found

    def says(self, node: str, *words: str) -> bool:
        return self.ask(node)[0] == (200, " ".join(words))

    def dial(self, node: str, host: str, port: int, wait: float = 30.0) -> str:
        """A connection from a node's own namespace: ``open``, or the name of the error."""
        pid = next(n["pids"]["agent"] for n in self.lab.context["nodes"] if n["name"] == node)
        code = (
            "import socket, sys\n"
            "try: socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])); print('open')\n"
            "except OSError as e: print(type(e).__name__)\n"
        )
        argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "--", sys.executable, "-c", code, host, str(port), str(wait)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout.strip()

    def between(self) -> dict[str, int]:
        """Packets from site to site, whatever became of them, by pair of nodes."""
        pairs = json.loads(self.lab.run("lab", "status", "-o", "json"))["counters"]["pairs"]
        return {k: c["packets"] + c["cut"] + c["lost"] + c["overflowed"] for k, c in pairs.items()}

    def places(self, *at: str) -> dict[str, tuple[str, int]]:
        endpoints = self.lab.get("service", "web", *at)["status"].get("endpoints", [])
        return {e["node"]: (e["address"], e["port"]) for e in endpoints}


@pytest.fixture
def net(systems: Callable[..., Any], tmp_path: Path) -> Net:
    if WHY:
        pytest.skip(f"nothing can be closed here: {WHY}")
    file = tmp_path / "lab.yaml"
    file.write_text(TOPOLOGY)
    return Net(systems("lab", "lab", "up", "-f", str(file), "--backing", "namespaces"))


def test_requests_never_leave_their_site_until_a_fallback_says_so(net: Net) -> None:
    lab = net.lab
    for site, lat in {"berlin": 52.5, "bonn": 50.7, "rome": 41.9}.items():
        spec = {"addresses": [net.gateways[f"{site}-1"]], "coordinates": {"lat": lat, "lon": 10.0}}
        lab.apply({"kind": "Site", "metadata": {"name": site}, "spec": spec})
    lab.apply(
        [app(berlin={"replicas": 2}, bonn={"process": {"env": {"WORD": "canary"}}}), service(), route()], "--wait"
    )
    lab.wait("all sites serve", lambda: set(net.places()) == set(net.gateways))
    for node in net.gateways:
        lab.wait(f"{node} answers", lambda node=node: net.ask(node)[0][0] == 200)
    status = lab.wait("closed", lambda: (s := lab.get("service", "web")["status"])["enforced"] is True and s)
    assert "notEnforced" not in status
    for node in lab.get("nodes")["items"]:
        assert "service.scope" in node["status"]["enforced"]
    assert lab.get("app", "web")["status"]["sites"]["berlin"]["wanted"] == 2

    # what is asked at a site is answered there, by what the site has of the one declaration
    for node in net.gateways:
        site = node.split("-")[0]
        word = "canary" if site == "bonn" else "plain"
        assert net.ask(node, 100) == [(200, f"{site} {word}")] * 100
    assert net.between() == {}, "not one packet between sites"
    # nor does a dial of another site's instance: not a packet
    places = net.places()
    net.lab.wait("berlin knows of bonn's", lambda: "bonn-1" in net.places("--at", "berlin-1"))
    net.lab.wait("and refuses it", lambda: net.dial("berlin-1", *places["bonn-1"], DROPPED) == "ConnectionRefusedError")
    before = net.between()
    assert net.dial("berlin-1", *places["bonn-1"]) == "ConnectionRefusedError"
    assert net.dial("berlin-1", *places["berlin-2"]) == "open"
    assert net.between() == before, "not one packet between sites"
    # one who does not care about the rules of his own node is kept out by those of the other
    table = subprocess.run(_nft(net, "rome-1", "list", "tables"), capture_output=True, text=True, check=True).stdout
    subprocess.run(_nft(net, "rome-1", "delete", *table.split()), check=True)
    assert net.dial("rome-1", *places["bonn-1"], wait=DROPPED) == "TimeoutError"
    assert net.between()["rome-1>bonn-1"] > 0
    assert "bonn-1>rome-1" not in net.between(), "it is not answered"

    # fail: a site without an instance answers by itself, and nobody else is asked
    before = net.between()
    lab.apply(app(berlin={"replicas": 2}, bonn={"replicas": 0}))
    lab.wait("bonn has none", lambda: net.ask("bonn-1")[0][0] == 503)
    assert net.ask("bonn-1", 20) == [net.ask("bonn-1")[0]] * 20
    assert {k: v for k, v in net.between().items() if k != "rome-1>bonn-1"} == {
        k: v for k, v in before.items() if k != "rome-1>bonn-1"
    }
    # nearest: berlin is nearer to bonn than rome is
    lab.apply(service(fallback="nearest"))
    lab.wait("berlin answers", lambda: net.says("bonn-1", "berlin", "plain"))
    assert net.ask("bonn-1", 50) == [(200, "berlin plain")] * 50
    assert net.ask("rome-1", 50) == [(200, "rome plain")] * 50, "who has one asks nobody"
    pairs = net.between()
    assert pairs["bonn-1>berlin-1"] > 50
    assert not [k for k in pairs if k.startswith("rome") and k != "rome-1>bonn-1"]
    # cloud
    cloud = http.server.ThreadingHTTPServer((_host_address(net), 0), Cloud)
    threading.Thread(target=cloud.serve_forever, daemon=True).start()
    try:
        host = _host_address(net)
        lab.apply([service(fallback="cloud"), route(cloud=f"http://{host}:{cloud.server_address[1]}")])
        lab.wait("the cloud answers", lambda: net.says("bonn-1", "the", "cloud"))
        assert net.ask("berlin-1", 20) == [(200, "berlin plain")] * 20
    finally:
        cloud.shutdown()
        cloud.server_close()
    # back home
    lab.apply(app(berlin={"replicas": 2}))
    lab.wait("bonn answers again", lambda: net.says("bonn-1", "bonn", "plain"))


class Cloud(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 65536

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "9")
        self.end_headers()
        self.wfile.write(b"the cloud")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _host_address(net: Net) -> str:
    """This machine, as the lab's namespaces see it: the first address of the block."""
    hub = urlsplit(net.lab.context["hub_url"]).hostname or ""
    first, _, last = hub.rpartition(".")
    return f"{first}.{int(last) - 1}"


def _nft(net: Net, node: str, *args: str) -> list[str]:
    pid = next(n["pids"]["agent"] for n in net.lab.context["nodes"] if n["name"] == node)
    return ["nsenter", f"--net=/proc/{pid}/ns/net", "--", nft.program() or "nft", *args]
