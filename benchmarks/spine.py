"""Start, apply, memory, restart while cut, backlog: the bars of the spine on a real system of this machine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks import sources
from benchmarks.common import PYTHON, Row, System, answers, bare_web, percentile, process_tree, row, system, wait, web
from edgeward.core.daemon import memory_mb
from edgeward.core.errors import EdgewardError
from edgeward.core.natsserver import find_binary


def _bare_nats() -> float:
    """Seconds until two bare nats-servers with JetStream are up: what `up` cannot be faster than."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        running = []
        for n in (1, 2):
            argv = [
                str(find_binary()),
                "-js",
                "-sd",
                f"{folder}/{n}",
                "-a",
                "127.0.0.1",
                "-p",
                "-1",
                "-l",
                f"{folder}/log{n}",
            ]
            running.append(subprocess.Popen(argv))
        logs = [Path(f"{folder}/log{n}") for n in (1, 2)]
        wait(lambda: all(p.exists() and "Server is ready" in p.read_text() for p in logs), 10)
        took = time.monotonic() - began
        for p in running:
            p.kill()
            p.wait()
        return took


def up() -> list[Row]:
    took = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            running = System(Path(folder) / "data", "up")
            took.append(time.monotonic() - began)
            running.stop()
    return [
        row("up to ready, median of 3", statistics.median(took), "s", 5, base=("two bare nats-servers", _bare_nats()))
    ]


def edge() -> list[Row]:
    """The demo's first act: a request answered by the site, and the same by the cloud over the emulated 4g link."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [PYTHON, "-m", "edgeward", "demo", "--json", "--data", str(Path(folder) / "d")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=True)
    r = json.loads(done.stdout.splitlines()[-1])
    what = "a request answered at the edge, p50, part of the same by the cloud over 4g"
    by = f"by the cloud {r['cloud_p50_ms']:g} ms, at the edge {r['edge_p50_ms']:g} ms"
    return [row(what, r["edge_p50_ms"] / r["cloud_p50_ms"], "", 0.1, base=(by, 1.0))]


def apply() -> list[Row]:
    took, bare = [], []
    with system("up") as s:
        api = s.api()
        for n in range(30):
            name = f"web{n}"
            began = time.monotonic()
            api.call("POST", "/api/v1/namespaces/default/apps", web(name))
            path = f"/api/v1/namespaces/default/apps/{name}"
            wait(lambda path=path: api.call("GET", path)["status"].get("phase") == "Running")
            took.append(time.monotonic() - began)
            api.call("DELETE", path)
            if n % 6 == 0:
                bare.append(bare_web(1))

    def base(p: float) -> tuple[str, float]:
        return f"the same program started by hand, p{p:g} of {len(bare)}", percentile(bare, p)

    return [
        row("apply to running on a live link, p95 of 30", percentile(took, 95), "s", 1, base=base(95)),
        row("apply to running on a live link, p50 of 30", percentile(took, 50), "s", 1, base=base(50)),
    ]


def memory() -> list[Row]:
    with system("up") as s:
        time.sleep(20)  # idle is what is measured
        c = s.context
        hub = memory_mb(c["pids"]["hub"]) + memory_mb(c["pids"]["nats"])
        node = c["nodes"][0]["pids"]
        agent = memory_mb(node["agent"]) + memory_mb(node["nats"])
        plane = sum(memory_mb(p) for p in process_tree(node["plane"]))
        of_agent = ("its nats-server alone", memory_mb(node["nats"]))
        of_hub = ("its nats-server alone", memory_mb(c["pids"]["nats"]))
    return [
        row("agent and its nats-server idle, PSS", agent, "MB", 80, base=of_agent),
        row("agent, its nats-server and its plane idle, PSS", agent + plane, "MB", 80, base=of_agent),
        row("hub and its nats-server idle, PSS", hub, "MB", 150, base=of_hub),
    ]


def restart() -> list[Row]:
    runs = int(os.environ.get("EDGEWARD_BENCH_RUNS", "20"))
    took = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lab.yaml"
        file.write_text("sites: [{name: plant, nodes: 1, link: 4g}]")
        with system("lab", "up", "-f", str(file)) as s:
            api = s.api()
            for n in range(10):
                api.call("POST", "/api/v1/namespaces/default/apps", web(f"web{n}"))

            def ports() -> list[int]:
                try:
                    items = s.node("/api/v1/apps")["items"]
                except (OSError, StopIteration, TypeError, ValueError):
                    return []
                found = [i["ports"]["http"] for a in items for i in a["status"].get("instances", []) if i.get("pid")]
                return found if len(found) >= 10 else []

            wait(lambda: (p := ports()) and all(map(answers, p)))
            s.lab("cut", site="plant")
            for _ in range(runs):
                dead = ports()
                s.lab("kill", node="plant-1")
                wait(lambda dead=dead: not any(map(answers, dead)))
                began = time.monotonic()
                s.lab("start", node="plant-1")
                # an app that is started again may have the port that it had
                wait(lambda: (p := ports()) and all(map(answers, p)))
                took.append(time.monotonic() - began)
    bare = [bare_web(10) for _ in range(3)]
    worst = ("the ten programs started by hand, worst of 3", max(bare))
    usual = ("the ten programs started by hand, p50 of 3", percentile(bare, 50))
    what = "site restarted while cut, 10 apps all answering"
    return [
        row(f"{what}, worst of {runs}", max(took), "s", 5, base=worst),
        row(f"{what}, p50 of {runs}", percentile(took, 50), "s", 5, base=usual),
    ]


def backlog() -> list[Row]:
    from edgeward.lab.publisher import Publisher
    from edgeward.lab.reader import Reader

    took = []
    with system("up") as s:
        api = s.api()
        export = {
            "apiVersion": "edgeward/v1",
            "kind": "Export",
            "metadata": {"name": "line1"},
            "spec": {"from": {"mqtt": "sensors/#"}, "to": {"hub": {"stream": "line1"}}, "identity": "$.id"},
        }
        api.call("POST", "/api/v1/namespaces/default/exports", export)
        path = "/api/v1/namespaces/default/exports/line1"
        wait(lambda: api.call("GET", path)["status"].get("nodes"))
        node = s.context["nodes"][0]
        publisher = Publisher(node["mqtt_url"], node["mqtt_user"], node["mqtt_password"], rate=300)
        publisher.start()
        wait(lambda: publisher.acked_count() > 100)
        for _ in range(5):
            c = s.context
            for pid in (c["pids"]["hub"], c["pids"]["nats"]):
                os.kill(pid, signal.SIGKILL)
            before = publisher.acked_count()
            wait(lambda c=c: s.context["pids"]["hub"] not in (None, c["pids"]["hub"]), pause=0.002)

            def ready() -> bool:
                try:
                    return bool(api.call("GET", "/api/v1/version"))
                except (OSError, EdgewardError):
                    return False

            wait(ready, pause=0.005)
            began = time.monotonic()
            now = s.context
            reader = Reader(now["hub_url"], now["ca_file"], now["token"], "line1")
            reader.start()
            wait(lambda before=before, reader=reader: max(reader.arrived, default=0) > before + 20, pause=0.005)
            took.append(time.monotonic() - began)
            reader.end()
        publisher.end()
    with tempfile.TemporaryDirectory() as folder:
        base = ("JetStream sources, two bare servers, worst of 2", max(asyncio.run(sources.backlog(Path(folder), 2))))
    return [row("backlog flowing after the hub is ready again, worst of 5", max(took), "s", 3, base=base)]
