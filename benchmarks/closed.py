"""Closed traffic: does a request, or somebody who knows an address, ever leave its site? Three sites of three nodes.

Each node is a network namespace, sites reach one another over their links (``between: open``), and the lab counts every
packet between nodes of different sites, whatever becomes of it. The baseline is the same system a moment later with
``scope: any``: nothing is enforced, so whoever knows an address gets through, and requests that go to all instances in
turn stay in their site as chance has it. Needs root, nft and iproute2.
"""

from __future__ import annotations

import http.client
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import PYTHON, Row, System, percentile, row, system, wait

SITES, NODES, REQUESTS = ("berlin", "bonn", "rome"), 3, 10_000
#: Direct requests of an instance of the same site, for what the rules cost; rounds over all instances in turn.
DIRECT, ROUNDS = 3000, 20
#: It listens on all addresses: each node is a network namespace of its own, which has none but the lab's, and what
#: listened on loopback alone nobody could dial, with rules or without.
_SERVER = """
import http.server, os
class Web(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 65536
    def do_GET(self):
        body = os.environ["EDGEWARD_SITE"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Web).serve_forever()
"""
#: In a node's namespace: dials each place and prints how many answered, asks them in turn and prints who answered, or
#: asks one place and prints each time in ms.
_DIAL = """
import http.client, socket, sys, time
if sys.argv[1] == "dial":
    found = 0
    for place in sys.argv[2:]:
        host, _, port = place.rpartition(":")
        try:
            socket.create_connection((host, int(port)), 0.3).close()
            found += 1
        except OSError:
            pass
    print(found)
elif sys.argv[1] == "turn":
    for place in sys.argv[2:]:
        c = http.client.HTTPConnection(place, timeout=30)
        c.request("GET", "/")
        print(c.getresponse().read().decode())
        c.close()
else:
    c = http.client.HTTPConnection(sys.argv[2], timeout=30)
    for _ in range(int(sys.argv[3])):
        began = time.perf_counter()
        c.request("GET", "/")
        c.getresponse().read()
        print((time.perf_counter() - began) * 1000)
"""


def _document(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "edgeward/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


class _Lab:
    def __init__(self, running: System) -> None:
        self.running, self.api = running, running.api()
        self.nodes = {n["name"]: n for n in running.context["nodes"]}

    def service(self, scope: str) -> None:
        found = self.api.call("GET", "/api/v1/namespaces/default/services/web")
        found["spec"]["scope"] = scope
        self.api.call("PUT", "/api/v1/namespaces/default/services/web", found)

    def declare(self) -> None:
        app = {
            "replicas": NODES,
            "process": {"command": [sys.executable, "-c", _SERVER]},
            "ports": [{"name": "http", "env": "PORT"}],
            "health": {"http": {"port": "http"}},
        }
        for kind, spec in (
            ("App", app),
            ("Service", {"app": "web", "port": "http"}),
            ("Route", {"path": "/", "to": {"service": "web"}}),
        ):
            self.api.call("POST", f"/api/v1/namespaces/default/{kind.lower()}s", _document(kind, "web", spec))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.api.call("GET", "/api/v1/namespaces/default/services/web")["status"]
        return found

    def places(self, at: str | None = None) -> dict[str, str]:
        path = "/api/v1/namespaces/default/services/web"
        status = self.status() if at is None else self.running.node(path, at).get("status", {})
        return {e["node"]: f"{e['address']}:{e['port']}" for e in status.get("endpoints", [])}

    def ask(self, node: str, times: int) -> list[str]:
        """The sites that answered requests at a node's gateway; the status where it was not 200."""
        c = http.client.HTTPConnection(urlsplit(self.nodes[node]["gateway_url"]).netloc, timeout=60)
        found = []
        for _ in range(times):
            c.request("GET", "/")
            answer = c.getresponse()
            body = answer.read().decode()
            found.append(body if answer.status == 200 else str(answer.status))
        c.close()
        return found

    def inside(self, node: str, *args: str) -> str:
        argv = ["nsenter", f"--net=/proc/{self.nodes[node]['pids']['agent']}/ns/net", "--", PYTHON, "-c", _DIAL, *args]
        return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=True).stdout

    def between(self) -> dict[str, int]:
        """Packets from a node to one of another site so far (``A>B``), whatever became of them."""
        pairs = self.running.lab("status")["counters"]["pairs"]
        return {k: c["packets"] + c["cut"] + c["lost"] + c["overflowed"] for k, c in pairs.items()}

    def crossed(self, before: dict[str, int]) -> tuple[int, int]:
        """Since then: packets between sites, and the pairs of nodes between which there were some."""
        since = [n - before.get(k, 0) for k, n in self.between().items()]
        return sum(since), sum(n > 0 for n in since)

    def dial(self) -> tuple[int, int]:
        """Every node dials every instance; how many of its own site answered, and how many of others."""
        own = others = 0
        for node in self.nodes:
            mine = {m: p for m, p in self.places().items() if _site(m) == _site(node)}
            own += int(self.inside(node, "dial", *mine.values()))
            others += int(self.inside(node, "dial", *(p for m, p in self.places().items() if m not in mine)))
        return own, others

    def in_turn(self) -> list[bool]:
        """Every node asks all instances in turn, past the gateways: which answers are its own site's."""
        return [
            site == _site(node)
            for node in self.nodes
            for site in self.inside(node, "turn", *[*self.places().values()] * ROUNDS).split()
        ]

    def direct(self) -> float:
        """Median of a request of a node to an instance of its own site, in ms."""
        place = self.places()["berlin-2"]
        return percentile([float(x) for x in self.inside("berlin-1", "ask", place, str(DIRECT)).split()], 50)


def _site(node: str) -> str:
    return node.partition("-")[0]


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole


def closed() -> list[Row]:
    from edgeward.gateway import nft
    from edgeward.lab import namespaces

    if why := namespaces.unusable() or nft.unusable():
        print(f"closed: nothing can be closed here: {why}", file=sys.stderr)
        return []
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder:
        file = Path(folder) / "lab.yaml"
        sites = ", ".join(f"{{name: {s}, nodes: {NODES}, link: lan}}" for s in SITES)
        file.write_text(f"between: open\nsites: [{sites}]\n")
        with system("lab", "up", "-f", str(file), "--backing", "namespaces") as running:
            return _measure(_Lab(running))


def _answers(lab: _Lab, node: str) -> bool:
    try:
        return lab.ask(node, 1) == [_site(node)]
    except (OSError, http.client.HTTPException):
        return False


def _measure(lab: _Lab) -> list[Row]:
    lab.declare()
    pairs, inside = len(lab.nodes) ** 2, len(lab.nodes) * NODES
    wait(lambda: set(lab.places()) == set(lab.nodes), 120)
    wait(lambda: lab.status().get("enforced") is True, 60)
    for node in lab.nodes:
        wait(lambda node=node: set(lab.places(node)) == set(lab.nodes), 60)
        wait(lambda node=node: _answers(lab, node), 60)
    wait(lambda: lab.dial() == (inside, 0), 60)
    before = lab.between()
    each = -(-REQUESTS // len(lab.nodes))
    began = time.monotonic()
    with ThreadPoolExecutor(len(lab.nodes)) as pool:
        answers = dict(zip(lab.nodes, pool.map(lambda n: lab.ask(n, each), lab.nodes), strict=True))
    took = time.monotonic() - began
    at_home = sum(site == _site(node) for node, got in answers.items() for site in got)
    own, others = lab.dial()
    packets, crossed = lab.crossed(before)
    with_rules = lab.direct()
    lab.service("any")
    wait(lambda: lab.dial()[1] == pairs - inside, 60)
    before = lab.between()
    open_own, open_others = lab.dial()
    open_packets, open_crossed = lab.crossed(before)
    turns = lab.in_turn()
    without = lab.direct()
    total = each * len(lab.nodes)
    print(
        f"closed: {total} requests in {took:.1f} s; packets between sites: {packets}, with scope: any {open_packets}",
        file=sys.stderr,
        flush=True,
    )
    what = f"closed traffic, 3 sites of 3 nodes, {total:,} requests and {pairs} dials"
    return [
        row(
            f"{what}: pairs of nodes between which no packet left the site", _percent(pairs - crossed, pairs), "%", 100,
            less=False, base=("the same dials with scope: any", _percent(pairs - open_crossed, pairs)),
        ),
        row(
            f"{what}: dials that came through and were of their own site", _percent(own, own + others), "%", 100,
            less=False, base=("the same dials with scope: any", _percent(open_own, open_own + open_others)),
        ),
        row(
            f"{what}: requests answered by their own site", _percent(at_home, total), "%", 100, less=False,
            base=("scope: any, all instances in turn", _percent(sum(turns), len(turns))),
        ),
        row(
            "closed traffic: a request to an instance of the same site, past the rules, p50",
            with_rules, "ms", without * 1.25, base=("without rules", without),
        ),
    ]  # fmt: skip
