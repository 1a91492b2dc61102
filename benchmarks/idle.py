"""What an idle node costs its link: bytes with TLS, TCP and IP, both ways, as its kernel counts them.

The node has an app that runs and an export that waits. The link is between network namespaces where root may make
them, else a relay on loopback. The baseline is the usual way to see a cut in time: two bare nats-servers whose leaf
connection (without TLS) is pinged every 5 s.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Row, row, system, wait, web
from edgeward.core.natsserver import find_binary
from edgeward.nodes.wan import Meter, connections

_EXPORT: dict[str, Any] = {
    "apiVersion": "edgeward/v1",
    "kind": "Export",
    "metadata": {"name": "line1"},
    "spec": {"from": {"mqtt": "sensors/#"}, "to": {"hub": {"stream": "line1"}}},
}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Pinged:
    """Two bare nats-servers and the leaf between them."""

    def __init__(self, folder: Path) -> None:
        self.port = _free_port()
        common = 'host: 127.0.0.1\nping_interval: "5s"\n'
        hub = f"{common}port: {_free_port()}\nleafnodes {{host: 127.0.0.1, port: {self.port}}}\n"
        edge = f'{common}port: {_free_port()}\nleafnodes {{remotes: [{{urls: ["nats://127.0.0.1:{self.port}"]}}]}}\n'
        self.running = []
        for name, text in (("hub", hub), ("edge", edge)):
            (folder / f"{name}.conf").write_text(text)
            argv = [str(find_binary()), "-c", str(folder / f"{name}.conf"), "-l", str(folder / f"{name}.log")]
            self.running.append(subprocess.Popen(argv))
        self.meter = Meter()
        wait(self.total, 20)

    def total(self) -> int:
        self.meter.look(connections(self.port) or [])
        return sum(self.meter.totals()) if self.meter.established else 0

    def stop(self) -> None:
        for process in self.running:
            process.send_signal(signal.SIGKILL)
            process.wait()


def idle() -> list[Row]:
    seconds = float(os.environ.get("EDGEWARD_BENCH_IDLE", "250"))  # a leaf pings itself each 240 s
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lab.yaml"
        file.write_text("sites: [{name: plant, nodes: 1, link: lan}]")
        bare = Pinged(Path(folder))
        try:
            with system(
                "lab", "up", "-f", str(file), "--backing", "namespaces" if os.geteuid() == 0 else "relays"
            ) as s:
                api = s.api()
                api.call("POST", "/api/v1/namespaces/default/apps", web("web"))
                api.call("POST", "/api/v1/namespaces/default/exports", _EXPORT)
                path = "/api/v1/namespaces/default/apps/web"
                wait(lambda: api.call("GET", path)["status"].get("phase") == "Running")
                time.sleep(30)  # what starting sets off is over

                def carried() -> dict[str, Any]:
                    wan: dict[str, Any] = s.node("/api/v1/top")["nodes"][0]["wan"]
                    return wan

                before, base, began = carried(), bare.total(), time.monotonic()
                time.sleep(seconds)
                after, end, span = carried(), bare.total(), time.monotonic() - began
        finally:
            bare.stop()
    up, down = ((after[k] - before[k]) * 8 / span / 1000 for k in ("sent", "received"))
    pinged = ("a bare leaf pinged every 5 s, no TLS", (end - base) * 8 / span / 1000)
    return [
        row("an idle node's link, both ways, with TLS and TCP", up + down, "kbit/s", 0.25, base=pinged),
        row(
            "an idle node's link, up, with TLS and TCP",
            up,
            "kbit/s",
            0.25,
            base=(f"half of {pinged[0]}", pinged[1] / 2),
        ),
    ]
