"""TLS and HTTP/2 at the gateway: requests per CPU second of its process, and handshakes, beside nginx with the same
certificate.

HTTP/2 is asked for by h2load (Debian: nghttp2-client, or EDGEWARD_H2LOAD); without it these rows are left out.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import gateway
from benchmarks.common import PYTHON, Row, free_ports, process_tree, row
from edgeward.core.certs import Authority, check_csr, key_pem, make_csr, new_key, pem
from edgeward.core.clock import now
from edgeward.core.vault import Vault
from edgeward.gateway.listens import CertConfig, ListenerConfig, TlsConfig, place
from edgeward.gateway.pems import Pair, read_pair

Measure = Callable[[int], tuple[int, int]]


def paper(folder: Path) -> Pair:
    """A P-256 certificate for 127.0.0.1; its authority lies in ``ca.pem``."""
    authority, key = Authority(folder / "ca"), new_key()
    (folder / "ca.pem").write_text(authority.file.read_text())
    made = authority.node(check_csr(make_csr("n1", key), "n1"), "n1", now() + 86400, ["127.0.0.1"])
    (folder / "pair.pem").write_text(key_pem(key).decode() + pem(made))
    return read_pair(pem(made), key_pem(key).decode())


@contextlib.contextmanager
def plane(folder: Path, target: int, pair: Pair) -> Iterator[tuple[int, int, int]]:
    """``(pid, plain port, TLS port)``."""
    port, tls = free_ports(2)
    sealed = Vault.open(folder / "identity").seal(pair.pem.encode(), place("default/l", pair.digest))
    shown = CertConfig("Secret/x", ("127.0.0.1",), pair.digest, base64.b64encode(sealed).decode())
    config = gateway.plane_config(port, target)
    listener = ListenerConfig("default/l", "127.0.0.1", tls, TlsConfig((shown,)))
    config["gateway"]["listeners"] = [msgspec.to_builtins(listener)]
    (folder / "plane.json").write_text(json.dumps(config))
    with gateway.running([PYTHON, "-m", "edgeward.agent.plane", "--data", str(folder)], tls) as process:
        yield process.pid, port, tls


@contextlib.contextmanager
def nginx(folder: Path, target: int, pair_file: Path) -> Iterator[tuple[int, int] | None]:
    binary = os.environ.get("EDGEWARD_NGINX") or shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        yield None
        return
    port, plain = free_ports(2)
    user = "user root;" if os.geteuid() == 0 else ""
    text = gateway.NGINX.format(user=user, folder=folder, target=target, port=plain, site=folder)
    tls = (
        f"listen 127.0.0.1:{port} ssl http2; ssl_certificate {pair_file}; ssl_certificate_key {pair_file};\n"
        "    ssl_session_tickets on; http2_max_concurrent_streams 100;\n    listen "
    )
    (folder / "nginx.conf").write_text(text.replace("listen ", tls, 1))
    argv = [binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    with gateway.running(argv, port) as process:
        yield process.pid, port


def h2load() -> str | None:
    return os.environ.get("EDGEWARD_H2LOAD") or shutil.which("h2load")


def by_h2(port: int, paths: list[str]) -> tuple[int, int]:
    """``(answered, failed)`` by 8 connections with 16 streams each."""
    argv = [str(h2load()), "-D", str(int(gateway.SECONDS)), "-c", "8", "-m", "16"]
    urls = [f"https://127.0.0.1:{port}{p}" for p in paths]
    done = subprocess.run([*argv, *urls], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"(\d+) succeeded, (\d+) failed", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2])


def by_h1(port: int, paths: list[str]) -> tuple[int, int]:
    got = gateway.load(port, paths)
    return int(got["requests"]), int(got["failed"])


def by_handshake(port: int, paths: list[str]) -> tuple[int, int]:
    argv = [PYTHON, "-m", "benchmarks.gateway_peers", "shake", str(port), str(gateway.SECONDS), paths[0]]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    got: dict[str, Any] = json.loads(done.stdout)
    return int(got["requests"]), 0


#: What is measured: (words, how, paths, bar).
ROWS = (
    ("cached answer by the gateway over TLS, HTTP/1.1, requests per CPU second", by_h1, gateway.CACHED, 15_000.0),
    ("cached answer by the gateway over HTTP/2, requests per CPU second", by_h2, gateway.CACHED, 3_000.0),
    ("proxied answer by the gateway over HTTP/2, requests per CPU second", by_h2, gateway.PROXIED, 2_000.0),
    ("TLS handshakes (P-256, whole, with one request) per CPU second", by_handshake, gateway.CACHED, 500.0),
)


def gateway_tls() -> list[Row]:
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ew-tls-")))
        (target,) = free_ports(1)
        stack.enter_context(gateway.running([PYTHON, "-m", "benchmarks.gateway_peers", "target", str(target)], target))
        pair = paper(root)
        os.environ["EDGEWARD_BENCH_CA"] = str(root / "ca.pem")
        stack.callback(os.environ.pop, "EDGEWARD_BENCH_CA")
        for name in ("plane", "nginx"):
            (root / name).mkdir()
        pid, _, port = stack.enter_context(plane(root / "plane", target, pair))
        who = {"edgeward": (pid, port)}
        peer = stack.enter_context(nginx(root / "nginx", target, root / "pair.pem"))
        if peer is not None:
            who["nginx"] = peer
        for what, how, paths, bar in ROWS:
            if how is by_h2 and h2load() is None:
                continue
            found: dict[str, list[float]] = {}
            for _ in range(gateway.ROUNDS):
                for name, (process, at) in who.items():
                    pids = process_tree(process)
                    before = gateway.cpu(pids)
                    answered, failed = how(at, paths)
                    assert not failed, (name, what, failed)
                    found.setdefault(name, []).append(answered / max(gateway.cpu(pids) - before, 0.01))
            base = ("nginx", statistics.median(found["nginx"])) if "nginx" in found else None
            rows.append(row(what, statistics.median(found["edgeward"]), "1/s", bar, less=False, base=base))
    return rows


if __name__ == "__main__":
    for r in gateway_tls():
        print(f"{r.name}: {r.value:g} {r.unit}  (bar {r.bar}, holds {r.holds}, {r.baseline}, ratio {r.ratio})")
