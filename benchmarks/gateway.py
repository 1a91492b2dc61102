"""The gateway: requests per CPU second of its process, beside FastAPI on uvicorn, nginx, haproxy and Caddy.

Each server gets the same load in turns, several rounds; what counts is the CPU time of the server's own process (from
/proc), so that neighbours on the machine disturb little. Others are taken where they are installed (or by
EDGEWARD_NGINX, EDGEWARD_HAPROXY, EDGEWARD_CADDY).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import PYTHON, Row, free_ports, process_tree, row, system, wait
from edgeward.core import proc

ROUNDS = int(os.environ.get("EDGEWARD_BENCH_RUNS", "3"))
SECONDS = 3.0
CONNECTIONS = 32
CACHED = [f"/cached/{n}" for n in range(64)]
FILES = [f"/files/{n}.txt" for n in range(64)]
LARGE = "/files/large.bin"
#: More than the memory of the second plane takes: each is read from its disk.
ON_DISK = [f"/cached/{n}" for n in range(256)]
PROXIED = [f"/proxied/{n}" for n in range(64)]


@contextlib.contextmanager
def running(argv: list[str], port: int, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(argv, env={**os.environ, **(env or {})}, stderr=subprocess.DEVNULL)
    try:
        wait(lambda: _listens(port) or process.poll() is not None)
        yield process
    finally:
        process.terminate()
        process.wait(20)


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def cpu(pids: list[int]) -> float:
    found = [proc.usage(p) for p in pids]
    return sum(u.cpu for u in found if u is not None)


def load(port: int, paths: list[str], seconds: float = SECONDS, connections: int = CONNECTIONS) -> dict[str, Any]:
    argv = [PYTHON, "-m", "benchmarks.gateway_peers", "load", str(port), str(seconds), str(connections), *paths]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    doc: dict[str, Any] = json.loads(done.stdout)
    return doc


def pull(pid: int, port: int) -> float:
    """MB a CPU second of a large file."""
    pids = process_tree(pid)
    before = cpu(pids)
    argv = [PYTHON, "-m", "benchmarks.gateway_peers", "pull", str(port), str(SECONDS), LARGE]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    got = int(json.loads(done.stdout)["bytes"])
    return got / 1e6 / max(cpu(pids) - before, 0.01)


def site(folder: Path) -> None:
    """The files that are asked for."""
    (folder / "files").mkdir(parents=True)
    for n in range(64):
        (folder / "files" / f"{n}.txt").write_bytes(b"x" * 1024)
    (folder / "files" / "large.bin").write_bytes(os.urandom(1024 * 1024) * 64)


def per_cpu(pid: int, port: int, paths: list[str]) -> tuple[float, dict[str, Any]]:
    pids = process_tree(pid)
    before = cpu(pids)
    got = load(port, paths)
    used = cpu(pids) - before
    assert not got["failed"], (pid, port, got)
    return got["requests"] / max(used, 0.01), got


def plane_config(port: int, target: int, extra: int = 0, files: Path | None = None) -> dict[str, Any]:
    where = {"to": "upstream", "target": "target", "endpoints": [{"host": "127.0.0.1", "port": target}]}
    routes: list[dict[str, Any]] = [
        {"key": "default/cached", "path": "/cached/", "cache": {}, **where},
        {"key": "default/proxied", "path": "/proxied/", **where},
    ]
    if files is not None:
        static = {"folder": str(files / "files")}
        routes.append(
            {"key": "default/files", "path": "/files/", "to": "static", "target": "Folder/files", "static": static}
        )
    routes += [{"key": f"default/extra{n}", "path": f"/extra{n}", **where} for n in range(extra)]
    listen = [{"host": "127.0.0.1", "port": port}]
    return {"node": "n1", "site": "s", "gateway": {"node": "n1", "listen": listen, "routes": routes}}


def ask(folder: Path, verb: str) -> dict[str, Any]:
    import socket

    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(30)
        s.connect(str(folder / "plane.sock"))
        s.sendall(json.dumps({"verb": verb, "args": {}}).encode() + b"\n")
        doc: dict[str, Any] = json.loads(s.makefile().readline())
        return doc


@contextlib.contextmanager
def plane(
    folder: Path, target: int, files: Path | None = None, engine: str = "embedded", *, memory: int = 0, disk: int = 0
) -> Iterator[tuple[int, int]]:
    """The node's data plane alone: ``(pid, port)``."""
    (port,) = free_ports(1)
    config = plane_config(port, target, files=files)
    config["gateway"] |= {"engine": engine, "memory": memory or 32 * 1024**2, "disk": disk}
    (folder / "plane.json").write_text(json.dumps(config))
    with running([PYTHON, "-m", "edgeward.agent.plane", "--data", str(folder)], port) as process:
        yield process.pid, port


NGINX = """
daemon off; {user} worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  proxy_cache_path {folder}/cache keys_zone=c:10m;
  upstream t {{ server 127.0.0.1:{target}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    keepalive_requests 1000000;
    proxy_http_version 1.1; proxy_set_header Connection "";
    location /cached/ {{ proxy_pass http://t; proxy_cache c; }}
    location /proxied/ {{ proxy_pass http://t; }}
    location /files/ {{ root {site}; sendfile on; }}
  }}
}}
"""


@contextlib.contextmanager
def nginx(folder: Path, target: int, files: Path) -> Iterator[tuple[int, int] | None]:
    binary = found_binary("nginx")
    if binary is None:
        yield None
        return
    (port,) = free_ports(1)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(NGINX.format(user=user, folder=folder, target=target, port=port, site=files))
    argv = [binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    with running(argv, port) as process:
        yield process.pid, port


HAPROXY = """
global
  nbthread 1
  maxconn 4096
cache c
  total-max-size 64
  max-object-size 1000000
  max-age 600
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend f
  bind 127.0.0.1:{port}
  http-request set-var(txn.cached) int(1) if {{ path_beg /cached/ }}
  http-request cache-use c if {{ path_beg /cached/ }}
  http-response cache-store c if {{ var(txn.cached) -m int 1 }}
  default_backend t
backend t
  http-reuse always
  server s 127.0.0.1:{target}
"""
CADDY = """
{{
  admin off
  auto_https off
  storage file_system {folder}
}}
http://127.0.0.1:{port} {{
  reverse_proxy 127.0.0.1:{target}
}}
"""


def found_binary(name: str) -> str | None:
    """What ``EDGEWARD_<NAME>`` says, or what is installed."""
    return os.environ.get(f"EDGEWARD_{name.upper()}") or shutil.which(name) or shutil.which(name, path="/usr/sbin")


@contextlib.contextmanager
def haproxy(folder: Path, target: int) -> Iterator[tuple[int, int] | None]:
    if (binary := found_binary("haproxy")) is None:
        yield None
        return
    (port,) = free_ports(1)
    (folder / "haproxy.cfg").write_text(HAPROXY.format(port=port, target=target))
    with running([binary, "-q", "-db", "-f", str(folder / "haproxy.cfg")], port) as process:
        yield process.pid, port


@contextlib.contextmanager
def caddy(folder: Path, target: int) -> Iterator[tuple[int, int] | None]:
    """Debian's has no cache: it only passes on."""
    if (binary := found_binary("caddy")) is None:
        yield None
        return
    (port,) = free_ports(1)
    (folder / "Caddyfile").write_text(CADDY.format(port=port, target=target, folder=folder))
    argv = [binary, "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    with running(argv, port, {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}) as process:
        yield process.pid, port


def gateway() -> list[Row]:
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ew-gw-")))
        (target,) = free_ports(1)
        stack.enter_context(running([PYTHON, "-m", "benchmarks.gateway_peers", "target", str(target)], target))
        for name in ("plane", "nginx", "engine", "haproxy", "caddy"):
            (root / name).mkdir()
        site(root / "site")
        mine = stack.enter_context(plane(root / "plane", target, root / "site"))
        (port,) = free_ports(1)
        argv = [PYTHON, "-m", "benchmarks.gateway_peers", "fastapi", str(port), str(target)]
        peers: dict[str, tuple[int, int]] = {}
        peer = stack.enter_context(running(argv, port))
        if peer.poll() is None:
            peers["FastAPI on uvicorn"] = peer.pid, port
        bare = stack.enter_context(nginx(root / "nginx", target, root / "site"))
        if bare is not None:
            peers["bare nginx"] = bare
            peers["engine nginx"] = stack.enter_context(plane(root / "engine", target, root / "site", "nginx"))
        for name, start in (("haproxy", haproxy), ("Caddy", caddy)):
            if (other := stack.enter_context(start(root / name.lower(), target))) is not None:
                peers[name] = other
        found: dict[tuple[str, str], list[float]] = {}
        p50: dict[str, list[float]] = {}
        for what, paths in (("cached", CACHED), ("proxied", PROXIED)):
            for _ in range(ROUNDS):
                for name, (pid, at) in {"edgeward": mine, **peers}.items():
                    if (what, name) == ("cached", "Caddy"):
                        continue  # it would pass on
                    load(at, paths, 0.3)
                    rate, got = per_cpu(pid, at, paths)
                    found.setdefault((what, name), []).append(rate)
                    if name == "edgeward":
                        p50.setdefault(what, []).append(got["p50"])
        pairs = {"edgeward": mine} | ({"bare nginx": bare} if bare is not None else {})
        (root / "small").mkdir()
        small = stack.enter_context(plane(root / "small", target, memory=64 * 1024, disk=64 * 1024**2))
        for what, paths, who in (("files", FILES, pairs), ("disk", ON_DISK, {**pairs, "edgeward": small})):
            for _ in range(ROUNDS):
                for name, (pid, at) in who.items():
                    load(at, paths, 0.5)
                    found.setdefault((what, name), []).append(per_cpu(pid, at, paths)[0])
        for _ in range(ROUNDS):
            for name, (pid, at) in pairs.items():
                found.setdefault(("large", name), []).append(pull(pid, at))
        through, own, beside = function(peers.get("FastAPI on uvicorn"))
        changed, kept, calm = changes(root / "plane", mine, target)
    rows = []
    for what, bar in (("cached", 15_000.0), ("proxied", 6_000.0)):
        value = statistics.median(found[what, "edgeward"])
        others = {n: statistics.median(found[what, n]) for n in peers if (what, n) in found}
        base = others.get("FastAPI on uvicorn")
        what_for = f"{what} answer by the gateway, requests per CPU second"
        made = row(what_for, value, "1/s", bar, less=False, base=("FastAPI on uvicorn", base) if base else None)
        for other in ("bare nginx", "haproxy", "Caddy"):
            if other in others:
                made.baseline = "; ".join(filter(None, [made.baseline, f"{other}: {others[other]:.3g} 1/s"]))
        rows.append(made)
        if "engine nginx" in others:
            what_for = f"{what} answer by the engine nginx with its plane, part of bare nginx"
            part = others["engine nginx"] / others["bare nginx"]
            rows.append(row(what_for, part, "", 0.9, less=False, base=("bare nginx", 1.0)))
    for what, bar, unit, words in (
        ("files", 15_000.0, "1/s", "small file by the gateway, requests per CPU second"),
        ("disk", 5_000.0, "1/s", "cached answer from the gateway's disk, requests per CPU second"),
        ("large", 1_000.0, "MB/s", "large file by the gateway, MB per CPU second"),
    ):
        values = {n: statistics.median(v) for (w, n), v in found.items() if w == what}
        base = ("bare nginx", values["bare nginx"]) if "bare nginx" in values else None
        rows.append(row(words, values["edgeward"], unit, bar, less=False, base=base))
    name = "FastAPI on uvicorn, in its own process"
    what = "function answer by the gateway, requests per CPU second of plane and workers"
    rows.append(row(what, through, "1/s", 8_000, less=False, base=(name, beside[0]) if beside else None))
    what = "function answer by the gateway, one at a time, p50"
    rows.append(row(what, own * 1000, "ms", 1.0, base=(name, beside[1] * 1000) if beside else None))
    what = f"requests answered during {changed} route changes under load"
    rows.append(row(what, kept, "%", 100, less=False, base=("without changes", calm)))
    return rows


HELLO = [
    {
        "apiVersion": "edgeward/v1", "kind": "Function", "metadata": {"name": "hello"},
        "spec": {
            "runtime": "python", "concurrency": 64,
            "source": {
                "inline": "def handler(event, context):\n"
                "    return {'hello': event.data.decode(), 'version': context.version}\n"
            },
        },
    },
    {
        "apiVersion": "edgeward/v1", "kind": "Route", "metadata": {"name": "hello"},
        "spec": {"path": "/hello", "to": {"function": "hello"}},
    },
]  # fmt: skip


def function(peer: tuple[int, int] | None) -> tuple[float, float, tuple[float, float] | None]:
    """The issue's hello on a whole node: ``(requests per CPU second, p50 of one at a time, FastAPI's two)``."""
    from urllib.parse import urlsplit

    paths = ["/hello=edge"]
    with system("up") as s:
        api = s.api()
        for doc in HELLO:
            api.call("POST", f"/api/v1/namespaces/default/{doc['kind'].lower()}s", doc)
        node = s.context["nodes"][0]
        port, pid = int(urlsplit(node["gateway_url"]).port or 0), int(node["pids"]["plane"])
        wait(lambda: not load(port, paths, 0.1, 1)["failed"])
        rates: list[list[float]] = [[], []]
        alone: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for n, (process, at) in enumerate([(pid, port), *([peer] if peer else [])]):
                load(at, paths, 0.3)
                rates[n].append(per_cpu(process, at, paths)[0])
                alone[n].append(load(at, paths, 1.0, 1)["p50"])
    own = statistics.median(rates[0]), statistics.median(alone[0])
    beside = (statistics.median(rates[1]), statistics.median(alone[1])) if peer else None
    return *own, beside


def answered(result: dict[str, Any]) -> float:
    """Percent of a load's requests."""
    return 100 * (1 - result["failed"] / result["requests"])


def changes(folder: Path, mine: tuple[int, int], target: int) -> tuple[int, float, float]:
    """Twenty changes while a load of cached and proxied requests runs: how many, percent answered, and without them."""
    calm = answered(load(mine[1], CACHED + PROXIED, 2.0))
    result: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: result.update(load(mine[1], CACHED + PROXIED, 6.0)))
    thread.start()
    time.sleep(0.5)  # the load runs
    for n in range(20):
        (folder / "plane.json").write_text(json.dumps(plane_config(mine[1], target, n + 1)))
        got = ask(folder, "reload")
        assert "digest" in got, got
        time.sleep(0.2)  # the changes are spread over the load
    thread.join()
    return 20, answered(result), calm


if __name__ == "__main__":
    for r in gateway():
        print(f"{r.name}: {r.value:g} {r.unit}  (bar {r.bar}, holds {r.holds}, {r.baseline}, ratio {r.ratio})")
