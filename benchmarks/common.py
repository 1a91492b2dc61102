"""What the benchmarks share: rows, the machine, a system of our own to measure."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PYTHON = sys.executable


def machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


@dataclass
class Row:
    """``ratio`` is value divided by the baseline's value; ``holds``: the bar is met."""

    name: str
    value: float
    unit: str
    baseline: str
    ratio: float | None
    bar: str
    holds: bool
    machine: str = ""


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def row(name: str, value: float, unit: str, bar: float, *, less: bool = True, base: tuple[str, float] | None) -> Row:
    holds = value <= bar if less else value >= bar
    text = f"{base[0]}: {base[1]:.3g} {unit}" if base else ""
    ratio = round(value / base[1], 3) if base and base[1] else None
    sign = "<=" if less else ">="
    return Row(name, round(value, 3), unit, text, ratio, f"{sign} {bar:g} {unit}", holds, machine())


def percentile(values: list[float], p: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))]


def wait(ready: Callable[[], Any], timeout: float = 60.0, pause: float = 0.01) -> Any:
    deadline = time.monotonic() + timeout
    while True:
        got = ready()
        if got:
            return got
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen in time")
        time.sleep(pause)


class System:
    """A running `up` or `lab up` (a process of its own), with a blocking client for its APIs."""

    def __init__(self, data: Path, *command: str) -> None:
        self.data = data
        self.log = data.parent / "system.log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [PYTHON, "-m", "edgeward", *command, "--data", str(data)], stdout=out, stderr=out
            )
        wait((data / "context.json").exists)

    @property
    def context(self) -> dict[str, Any]:
        doc: dict[str, Any] = json.loads((self.data / "context.json").read_text())
        return doc

    def api(self) -> Any:
        from edgeward.lab.cluster import Api

        c = self.context
        return Api(c["hub_url"], Path(c["ca_file"]), c["token"])

    def node(self, path: str, node: str = "plant-1") -> Any:
        from edgeward.lab.emulated import _UnixConnection

        socket = next(n["api"] for n in self.context["nodes"] if n["name"] == node)
        c = _UnixConnection(socket, 5.0)
        try:
            c.request("GET", path)
            return json.loads(c.getresponse().read())
        finally:
            c.close()

    def lab(self, verb: str, **args: Any) -> Any:
        from edgeward.lab.control import ask

        return ask(self.data, verb, **args)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


@contextmanager
def system(*command: str) -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder:
        running = System(Path(folder) / "data", *command)
        try:
            yield running
        finally:
            running.stop()


def web(name: str) -> dict[str, Any]:
    """The issue's own document."""
    return {
        "apiVersion": "edgeward/v1",
        "kind": "App",
        "metadata": {"name": name},
        "spec": {
            "placement": {"site": "plant"},
            "process": {"command": ["python3", "-m", "http.server", "${PORT}", "--bind", "127.0.0.1"]},
            "ports": [{"name": "http", "env": "PORT"}],
            "health": {"http": {"port": "http", "path": "/"}},
        },
    }


def process_tree(pid: int) -> list[int]:
    """The process and all below it; its threads' children, too."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += process_tree(int(child))
    return found


def answers(port: int) -> bool:
    import http.client

    c = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        c.request("GET", "/")
        return c.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        c.close()


def bare_web(n: int) -> float:
    """Seconds until ``n`` plain `python3 -m http.server` processes, started together, all answer."""
    ports = free_ports(n)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        argv = [["python3", "-m", "http.server", str(p), "--bind", "127.0.0.1"] for p in ports]
        running = [subprocess.Popen(a, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for a in argv]
        try:
            wait(lambda: all(answers(p) for p in ports))
            return time.monotonic() - began
        finally:
            for p in running:
                p.kill()
                p.wait()


RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEAD = "| what | value | bar | holds | baseline | ratio | machine |\n|---|---|---|---|---|---|---|\n"


def save(rows: list[Row]) -> None:
    """Keeps the rows, in place of those of the same name, and shows them on the page of the docs."""

    def what(name: str) -> str:
        return re.sub(r" of \d+$", "", name)  # over 8 runs or 20, it is the same bar

    kept = {what(r["name"]): r for r in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    kept |= {what(r.name): asdict(r) for r in rows}
    RESULTS.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(HEAD)
    after = rest[len(rest) - len(rest.partition("\n\n")[2]) :]
    PAGE.write_text(f"{before}{table(list(kept.values()))}\n{after}")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as the page has them; docs tests compare it with results.json."""
    lines = [
        f"| {r['name']} | {r['value']:.6g} {r['unit']} | {r['bar']} | {'yes' if r['holds'] else 'no'} "
        f"| {r['baseline']} | {r['ratio'] if r['ratio'] is not None else '-'} | {r['machine']} |\n"
        for r in rows
    ]
    return HEAD + "".join(lines)
