"""A tunnel beside ssh: bulk, small requests during bulk, new connections; direct and over an emulated 4g link.

The origin is one process "at the node". Edgeward's way is the product's own: `edgeward tunnel open`, hub, agent.
ssh's is Debian's sshd with a configuration and keys of its own on loopback: ``-R`` as the node would use it, taken at
the hub's machine (one encrypted hop), and ``-R`` with ``-L`` as an operator elsewhere needs (two hops, which is what a
tunnel by the hub always is). Both with AES-128-GCM, which is the fastest cipher of sshd here. Over 4g the lab's own
relay stands between node and hub for both. All in one run, in turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import PYTHON, Row, free_ports, percentile, process_tree, row, system, wait
from edgeward.core.daemon import memory_mb

ROUNDS = int(os.environ.get("EDGEWARD_BENCH_RUNS", "3"))
SMALL = 200
BULK = {"direct": 256 << 20, "4g": 6 << 20}
_SSHD, _TWO_HOPS = "/usr/sbin/sshd", "ssh -R -L"
#: Streams that nobody reads, and what each is asked for; seconds of a cut.
STALLED, MUCH, CUT = 64, 64 << 20, 5.0


# -- the origin ------------------------------------------------------------------------------------------------------


class _Origin(asyncio.Protocol):
    """``S``: 200 bytes. ``B<MiB>;``: so much. ``H``: for ever, to one who does not read."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.left = 0
        self.paused = False
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.rest += data
        while self.rest:
            if self.rest[:1] == b"S":
                self.rest = self.rest[1:]
                self.transport.write(bytes(SMALL))
            elif self.rest[:1] == b"B" and b";" in self.rest:
                size, _, self.rest = self.rest[1:].partition(b";")
                self.left += int(size)
                self.pump()
            else:
                return

    def pump(self) -> None:
        while self.left and not self.paused:
            n = min(self.left, 1 << 18)
            self.left -= n
            self.transport.write(_BLOCK[:n])

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.pump()


_BLOCK = os.urandom(1 << 18)


def _uvloop(main: Any) -> Any:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def origin(port: int) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(_Origin, "127.0.0.1", port, backlog=1024)
        async with server:
            await server.serve_forever()

    _uvloop(main)


def relay(profile: str, port: int, to: int) -> None:
    """The lab's own relay, for ssh; SIGUSR1 cuts its link, SIGUSR2 heals it."""
    from edgeward.lab.links import BUILTIN
    from edgeward.lab.relay import Relay

    async def main() -> None:
        way = Relay(("127.0.0.1", to), BUILTIN[profile], port=port)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, way.cut)
        loop.add_signal_handler(signal.SIGUSR2, way.heal)
        await way.open()
        await asyncio.Event().wait()

    _uvloop(main)


# -- what is measured ------------------------------------------------------------------------------------------------


async def _bulk(port: int, size: int) -> float:
    """Bytes per second."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    began = time.monotonic()
    writer.write(b"B%d;" % size)
    left = size
    while left:
        data = await reader.read(1 << 20)
        if not data:
            raise ConnectionError(f"{left} bytes are missing")
        left -= len(data)
    took = time.monotonic() - began
    writer.close()
    return size / took


async def _small(port: int, until: asyncio.Event, pace: float) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took = []
    while not until.is_set():
        began = time.monotonic()
        writer.write(b"S")
        await reader.readexactly(SMALL)
        took.append(time.monotonic() - began)
        await asyncio.sleep(pace)
    writer.close()
    return took


async def during(port: int, size: int, pace: float) -> tuple[float, list[float]]:
    """Small requests on a connection of their own while a bulk one runs: bytes per second, seconds each."""
    done = asyncio.Event()
    small = asyncio.ensure_future(_small(port, done, pace))
    await asyncio.sleep(0.2)  # what is measured: some requests before the bulk, too
    rate = await _bulk(port, size)
    done.set()
    return rate, await small


async def connections(port: int, n: int) -> list[float]:
    """Seconds from the dial to the first answer."""
    took = []
    for _ in range(n):
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"S")
        await reader.readexactly(SMALL)
        took.append(time.monotonic() - began)
        writer.close()
    return took


async def active(port: int, n: int, requests: int, stalled: int) -> list[float]:
    """``n`` connections that ask in turn, beside ``stalled`` ones that ask for much and read nothing."""
    held = []
    for _ in range(stalled):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"B%d;" % MUCH)
        held.append(writer)
    await asyncio.sleep(0.5)  # their buffers fill

    async def one() -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        took = []
        for _ in range(requests):
            began = time.monotonic()
            writer.write(b"S")
            await reader.readexactly(SMALL)
            took.append(time.monotonic() - began)
            await asyncio.sleep(0.02)
        writer.close()
        return took

    got = await asyncio.gather(*(one() for _ in range(n)))
    for writer in held:
        writer.transport.abort()
    return [t for times in got for t in times]


def measure(port: int, link: str) -> dict[str, float]:
    async def main() -> dict[str, float]:
        size = BULK[link]
        pace = 0.002 if link == "direct" else 0.02
        await connections(port, 3)
        bulk = await _bulk(port, size)
        _, small = await during(port, size, pace)
        opened = await connections(port, 200 if link == "direct" else 30)
        return {
            "bulk": bulk / 1e6,
            "small": percentile(small, 99) * 1e3,
            "small50": percentile(small, 50) * 1e3,
            "open": percentile(opened, 50) * 1e3,
        }

    return _uvloop(main)


# -- the ways --------------------------------------------------------------------------------------------------------


@contextmanager
def child(*argv: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(argv, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextmanager
def _helper(what: str, *args: Any) -> Iterator[subprocess.Popen[bytes]]:
    root = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from benchmarks import tunnel; tunnel.{what}(*{args!r})"
    port = args[0] if what == "origin" else args[1]
    with child(PYTHON, "-c", code) as process:
        wait(lambda: _listens(port))
        yield process


def _key(folder: Path, name: str) -> Path:
    path = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


class Ssh(NamedTuple):
    """``ports``: of ``-R`` at the hub's machine, and of ``-R`` with ``-L`` at the operator's. ``relay``: its link,
    if it has one."""

    ports: dict[str, int]
    server: subprocess.Popen[bytes]
    clients: list[subprocess.Popen[bytes]]
    relay: subprocess.Popen[bytes] | None

    def pids(self) -> list[int]:
        return [*process_tree(self.server.pid), *(c.pid for c in self.clients)]


@contextmanager
def ssh(folder: Path, link: str, origin_port: int) -> Iterator[Ssh]:
    sshd_port, way, back, there = free_ports(4)
    host, user = _key(folder, "host"), _key(folder, "user")
    shutil.copy(f"{user}.pub", folder / "authorized")
    (folder / "authorized").chmod(0o600)
    config = folder / "sshd_config"
    config.write_text(
        f"Port {sshd_port}\nListenAddress 127.0.0.1\nHostKey {host}\nAuthorizedKeysFile {folder / 'authorized'}\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nStrictModes no\n"
        f"PidFile {folder / 'sshd.pid'}\nPermitRootLogin prohibit-password\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    common = ["ssh", "-N", "-F", "none", "-i", str(user), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"]
    common += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    common += ["-o", "ExitOnForwardFailure=yes", "-c", "aes128-gcm@openssh.com", "127.0.0.1"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(child(_SSHD, "-D", "-e", "-f", str(config), stderr=subprocess.DEVNULL))
        wait(lambda: _listens(sshd_port))
        relayed = None if link == "direct" else stack.enter_context(_helper("relay", link, way, sshd_port))
        port = sshd_port if relayed is None else way
        node = [*common, "-p", str(port), "-R", f"127.0.0.1:{back}:127.0.0.1:{origin_port}"]
        clients = [stack.enter_context(child(*node, stdin=subprocess.DEVNULL))]
        wait(lambda: _listens(back))
        operator = [*common, "-p", str(sshd_port), "-L", f"127.0.0.1:{there}:127.0.0.1:{back}"]
        clients.append(stack.enter_context(child(*operator, stdin=subprocess.DEVNULL)))
        wait(lambda: _listens(there))
        yield Ssh({"ssh -R": back, _TWO_HOPS: there}, server, clients, relayed)


@contextmanager
def ours(folder: Path, link: str, origin_port: int) -> Iterator[tuple[Any, int]]:
    topology = folder / "lab.yaml"
    topology.write_text(f"sites: [{{name: plant, nodes: 1, link: {'lan' if link == 'direct' else link}}}]")
    command = ("up",) if link == "direct" else ("lab", "up", "-f", str(topology))
    with system(*command) as running:
        env = {**os.environ, "EDGEWARD_CONTEXT": str(running.data / "context.json")}
        argv = [PYTHON, "-m", "edgeward", "tunnel", "open", "plant-1", str(origin_port)]
        with child(*argv, env=env, stdout=subprocess.PIPE) as opened:
            assert opened.stdout is not None
            line = opened.stdout.readline().decode()
            yield running, int(line.rsplit(":", 1)[1])


def compare(link: str) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Medians by way; and what stalled streams do, or a cut, to ours and to ssh's of as many hops."""
    got: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (port,) = free_ports(1)
        stack.enter_context(_helper("origin", port))
        peer = stack.enter_context(ssh(folder, link, port)) if Path(_SSHD).exists() else None
        running, own = stack.enter_context(ours(folder, link, port))
        ways = {**(peer.ports if peer is not None else {}), "edgeward": own}
        for _ in range(ROUNDS):
            for way, at in ways.items():
                got.setdefault(way, []).append(measure(at, link))
        more = stalled(running, own, peer) if link == "direct" else through_a_cut(running, own, peer)
    return {w: {k: percentile([r[k] for r in rs], 50) for k in rs[0]} for w, rs in got.items()}, more


def stalled(running: Any, port: int, peer: Ssh | None) -> dict[str, float]:
    def p99(n: int) -> float:
        return percentile(_uvloop(lambda: active(port, 50, 60, n)), 99) * 1e3

    p99(0)
    alone, beside = zip(*((p99(0), p99(1)) for _ in range(ROUNDS)), strict=True)  # in turns
    files = (running.data / "hub" / "run.json", running.data / "nodes" / "plant-1" / "run.json")
    found = {"alone": percentile([*alone], 50), "beside": percentile([*beside], 50)}
    found["memory"] = held([json.loads(f.read_text())["pid"] for f in files], port)
    if peer is not None:
        found["peer_memory"] = held(peer.pids(), peer.ports[_TWO_HOPS])
    return found


def held(pids: list[int], port: int) -> float:
    """MiB that the process that takes most holds for each stream that nobody reads."""
    before = [memory_mb(p) for p in pids]
    sockets = []
    try:
        for _ in range(STALLED):
            s = socket.create_connection(("127.0.0.1", port))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.sendall(b"B%d;" % MUCH)
            sockets.append(s)
        time.sleep(5)  # what is measured: all have sent what they may, and nobody reads
        return max((memory_mb(p) - b) / STALLED for p, b in zip(pids, before, strict=True))
    finally:
        for s in sockets:
            s.close()


def through_a_cut(running: Any, port: int, peer: Ssh | None) -> dict[str, float]:
    """Medians of how soon an open connection goes on."""
    mine = [resumed(port, lambda verb: running.lab(verb, site="plant")) for _ in range(ROUNDS)]
    found = {"resume": percentile(mine, 50)}
    if peer is not None and (way := peer.relay) is not None:
        signals = {"cut": signal.SIGUSR1, "heal": signal.SIGUSR2}
        theirs = [resumed(peer.ports[_TWO_HOPS], lambda verb: way.send_signal(signals[verb])) for _ in range(ROUNDS)]
        found["peer_resume"] = percentile(theirs, 50)
    return found


def resumed(port: int, link: Callable[[str], object]) -> float:
    """Seconds from the end of a cut until a connection that was open before is answered. ``link``: takes cut, heal."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(b"S")
        s.recv(SMALL, socket.MSG_WAITALL)
        link("cut")
        s.sendall(b"S")
        time.sleep(CUT)  # what is measured
        link("heal")
        began = time.monotonic()
        if len(s.recv(SMALL, socket.MSG_WAITALL)) != SMALL:
            raise ConnectionError("the connection did not go on")
        return time.monotonic() - began


def _peer(more: dict[str, float], what: str) -> tuple[str, float] | None:
    return (_TWO_HOPS, more[what]) if what in more else None


def tunnel() -> list[Row]:
    rows = []
    for link in ("direct", "4g"):
        ways, more = compare(link)
        mine = ways.pop("edgeward")
        for what, unit, less in (("bulk", "MB/s", False), ("small", "ms", True), ("open", "ms", True)):
            title = {
                "bulk": "tunnel: bulk",
                "small": "tunnel: p99 of a small request during bulk",
                "open": "tunnel: a new connection's first answer, p50",
            }[what]
            for way, base in ways.items():
                rows.append(
                    row(
                        f"{title}, {link}, beside {way}",
                        mine[what],
                        unit,
                        base[what],
                        less=less,
                        base=(way, base[what]),
                    )
                )
        if "resume" in more:
            rows.append(
                row(
                    f"tunnel: a connection goes on after a cut of {CUT:g} s, 4g", more["resume"], "s", 3,
                    base=_peer(more, "peer_resume"),
                )
            )  # fmt: skip
        else:
            rows += [
                row(
                    f"tunnel: memory of a stalled stream, {STALLED} of them", more["memory"], "MiB", 1,
                    base=_peer(more, "peer_memory"),
                ),
                row(
                    "tunnel: p99 of 50 active streams beside a stalled one", more["beside"], "ms", more["alone"] * 1.2,
                    base=("without the stalled one", more["alone"]),
                ),
            ]  # fmt: skip
    return rows


if __name__ == "__main__":
    for link in sys.argv[1:] or ["direct", "4g"]:
        found, also = compare(link)
        for way, values in found.items():
            print(link, f"{way:10}", {k: round(v, 2) for k, v in values.items()})
        print(link, also)
