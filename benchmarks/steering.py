"""Steering's DNS: answers with client subnet per CPU second of the server's process, beside knot and dnspython.

200 sites with a network each; every query says one of the networks as its client subnet, and every answer is looked at.
What counts is the CPU time of the server's own process (from /proc). ``first`` asks each question once: the name's case
is another one each time, as resolvers do against forgers, so that no answer that is kept helps. knot (with its geoip
module) is taken where it is installed, or unpacked at EDGEWARD_KNOT; dnspython reads and writes message by message.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import PYTHON, Row, free_ports, row
from benchmarks.gateway import cpu, running

ROUNDS = int(os.environ.get("EDGEWARD_BENCH_RUNS", "3"))
SECONDS = 3.0
NETWORKS = 200
WINDOW = 64
ZONE, HOST = "edge.example.org", b"\3app\4edge\7example\3org\0"


def network(n: int) -> bytes:
    return bytes([10, n // 100, n % 100])


def address(n: int) -> bytes:
    return bytes([192, 0, 2 + n // 200, n % 200 + 1])


def dotted(data: bytes) -> str:
    return ".".join(map(str, data.ljust(4, b"\0")))


def edges() -> list[Any]:
    from edgeward.gateway.steer import Edge

    return [
        Edge(f"s{n:03}", (f"{dotted(network(n))}/24",), (n % 90, n % 180), (dotted(address(n)),))
        for n in range(NETWORKS)
    ]


def edgeward(port: int) -> None:
    """The hub's own responder and sockets in a process of their own, on uvloop as the hub."""
    import asyncio

    import uvloop

    from edgeward.gateway.dnszone import Zone
    from edgeward.gateway.steer import Steering
    from edgeward.hub.responder import DnsServer, Responder

    known = Steering.of(edges())

    async def main() -> None:
        server = DnsServer(Responder(Zone(ZONE, ("app",)), lambda: known, 1e6))
        await server.open("127.0.0.1", port)
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def dnspython(port: int) -> None:
    """The plain way: dnspython reads and writes each message, the prefix is looked up in a dict."""
    import socket

    import dns.edns
    import dns.message
    import dns.rrset

    table = {network(n): dotted(address(n)) for n in range(NETWORKS)}
    tcp = socket.create_server(("127.0.0.1", port))  # only says that it is there
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", port))
    while tcp:
        data, peer = udp.recvfrom(4096)
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        (ecs,) = [o for o in query.options if isinstance(o, dns.edns.ECSOption)]
        found = table[bytes(map(int, ecs.address.split(".")[:3]))]
        answer.answer.append(dns.rrset.from_text(query.question[0].name, 10, "IN", "A", found))
        answer.use_edns(0, options=[dns.edns.ECSOption(ecs.address, ecs.srclen, 24)])
        udp.sendto(answer.to_wire(), peer)


def load(port: int, first: bool) -> None:
    """Keeps :data:`WINDOW` queries on their way; prints how many were answered, wrong, lost; of how many networks."""
    import socket

    rng = random.Random(1)
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect(("127.0.0.1", port))
    s.settimeout(0.2)
    tails = []
    for n in range(NETWORKS):
        ecs = struct.pack("!HHHBB", 8, 7, 1, 24, 0) + network(n)
        opt = b"\0" + struct.pack("!HHIH", 41, 1232, 0, len(ecs)) + ecs
        tails.append(b"\0\1\0\1" + opt)
    head = struct.pack("!5H", 0x0100, 1, 0, 0, 1)
    letters = [i for i, c in enumerate(HOST) if chr(c).isalpha()]
    asked: dict[int, int] = {}
    serial = answered = wrong = lost = 0
    right: set[int] = set()
    end = time.monotonic() + SECONDS
    while (now := time.monotonic()) < end or (asked and now < end + 0.5):
        while len(asked) < WINDOW and now < end:
            serial += 1
            n = serial % NETWORKS if serial > NETWORKS else serial - 1
            name = HOST
            if first:
                mixed, bits = bytearray(HOST), rng.getrandbits(len(letters))
                for k, at in enumerate(letters):
                    if bits >> k & 1:
                        mixed[at] ^= 0x20
                name = bytes(mixed)
            asked[serial & 0xFFFF] = n
            s.send((serial & 0xFFFF).to_bytes(2, "big") + head + name + tails[n])
        try:
            data = s.recv(4096)
        except TimeoutError:
            lost += len(asked)
            asked.clear()
            continue
        n = asked.pop(int.from_bytes(data[:2], "big"), -1)
        if n < 0:
            continue
        answered += 1
        behind = 12 + len(HOST) + 4
        answer = data[behind : behind + 16]
        at = data.find(struct.pack("!HHHBB", 8, 7, 1, 24, 24) + network(n), behind)
        if data[7] == 1 and answer[2:4] == b"\0\1" and answer[12:16] == address(n) and at > 0:
            right.add(n)
        else:
            wrong += 1
    print(json.dumps({"answered": answered, "wrong": wrong, "lost": lost, "right": len(right)}))


@contextmanager
def knot(port: int) -> Iterator[subprocess.Popen[bytes] | None]:
    """knot with one worker and its geoip module; None where it is not there."""
    root = Path(os.environ.get("EDGEWARD_KNOT", "/"))
    binary = shutil.which("knotd", path=f"{root}/usr/sbin")
    modules = list(root.glob("usr/lib/*/knot/modules*/geoip.so"))
    if binary is None or not modules:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="edgeward-knot-") as text:
        folder = Path(text)
        nets = "".join(f"  - net: {dotted(network(n))}/24\n    A: {dotted(address(n))}\n" for n in range(NETWORKS))
        (folder / "geo").write_text(f"app.{ZONE}:\n{nets}")
        (folder / "zone").write_text(
            f"$ORIGIN {ZONE}.\n$TTL 10\n@ SOA ns hostmaster 1 3600 600 86400 10\n"
            "@ NS ns\nns A 127.0.0.1\napp A 192.0.2.254\n"
        )
        (folder / "conf").write_text(
            f"server:\n  listen: 127.0.0.1@{port}\n  rundir: {folder}\n  udp-workers: 1\n  tcp-workers: 1\n"
            f"  background-workers: 1\n  edns-client-subnet: on\n"
            f"database:\n  storage: {folder}\n"
            f"module:\n  - id: mod-geoip\n    file: {modules[0]}\n"
            f"mod-geoip:\n  - id: geo\n    config-file: {folder}/geo\n    ttl: 10\n    mode: subnet\n"
            f"zone:\n  - domain: {ZONE}\n    file: {folder}/zone\n    module: mod-geoip/geo\n"
        )
        libraries = ":".join(str(p) for p in {m.parents[2] for m in modules})
        env = {"LD_LIBRARY_PATH": libraries} if str(root) != "/" else {}
        with running([binary, "-c", str(folder / "conf")], port, env) as process:
            yield process


def measure(process: subprocess.Popen[bytes], port: int, first: bool = False) -> tuple[float, dict[str, int]]:
    """Answers per CPU second of the process."""
    before = cpu([process.pid])
    argv = [PYTHON, "-m", "benchmarks.steering", "load", str(port), "first" if first else "again"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    got: dict[str, int] = json.loads(done.stdout)
    return got["answered"] / max(cpu([process.pid]) - before, 0.01), got


def steering() -> list[Row]:
    ports = free_ports(3)
    rates: dict[str, list[float]] = {"ours": [], "first": [], "dnspython": [], "knot": []}
    right = {"ours": NETWORKS, "dnspython": NETWORKS, "knot": NETWORKS}
    itself = [PYTHON, "-m", "benchmarks.steering"]
    with (
        running([*itself, "edgeward", str(ports[0])], ports[0]) as ours,
        running([*itself, "dnspython", str(ports[1])], ports[1]) as plain,
        knot(ports[2]) as best,
    ):
        for _ in range(ROUNDS):
            for what, process, port in (
                ("ours", ours, ports[0]),
                ("first", ours, ports[0]),
                ("dnspython", plain, ports[1]),
                ("knot", best, ports[2]),
            ):
                if process is None:
                    continue
                rate, got = measure(process, port, first=what == "first")
                rates[what].append(rate)
                print(f"{what}: {rate:,.0f} per CPU second, {got}", file=sys.stderr)
                server = "ours" if process is ours else what
                right[server] = min(right[server], got["right"] if not got["wrong"] else 0)
    middle = {k: statistics.median(v) for k, v in rates.items() if v}
    base = ("knot" if "knot" in middle else "dnspython", middle.get("knot", middle["dnspython"]))
    unit = "q/s per CPU second"
    return [
        row("DNS answers with client subnet", middle["ours"], unit, 20_000, less=False, base=base),
        row(
            "DNS answers, each question new",
            middle["first"],
            unit,
            20_000,
            less=False,
            base=("dnspython", middle["dnspython"]),
        ),
        row(
            "networks answered rightly and with the right scope",
            right["ours"],
            "of 200",
            NETWORKS,
            less=False,
            base=(base[0], right[base[0]]),
        ),
    ]


if __name__ == "__main__":
    what, port = sys.argv[1], int(sys.argv[2])
    if what == "load":
        load(port, sys.argv[3] == "first")
    else:
        {"edgeward": edgeward, "dnspython": dnspython}[what](port)
