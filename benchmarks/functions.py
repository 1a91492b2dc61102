"""Functions: a warm call, a cold one, many idle ones, one that loops for ever, an update under load.

All through the node's dispatcher in this process, as the gateway calls it; workers are real, in their sandbox.
Baselines: an echo over a unix socket by two processes that do nothing else, a bare interpreter's start, processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import uvloop

from benchmarks.common import PYTHON, Row, percentile, row
from benchmarks.functions_peers import peers
from edgeward.core import kinds as _kinds  # noqa: F401
from edgeward.core.invocation import Call, CallFailed, Event, Frames, frame
from edgeward.core.natsserver import NatsServer, NodeSpec
from edgeward.core.proc import usage
from edgeward.core.resource import decode
from edgeward.functions import spec as _spec  # noqa: F401
from edgeward.functions.dispatcher import Dispatcher
from edgeward.functions.intake import Intake
from edgeward.functions.triggers import Reach
from edgeward.functions.versions import Config, config_of

HELLO = 'def handler(event, context):\n    return {"hello": event.data.decode(), "version": context.version}\n'
#: The same in WebAssembly: reads the event, answers with it.
WASM = """(module
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1) (data (i32.const 1024) "hello ")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 1030)) (i32.store (i32.const 4) (i32.const 4096))
    (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
    (i32.store (i32.const 0) (i32.const 1024))
    (i32.store (i32.const 4) (i32.add (i32.const 6) (i32.load (i32.const 8))))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"""
EVENT = Event("1", "/bench", "bench", b"edge")
#: Reads frames, answers each with a frame: what a worker does at the least.
ECHO = """
import socket, sys
from edgeward.core.invocation import Frames, frame
sock = socket.socket(fileno=int(sys.argv[1]))
frames = Frames()
while data := sock.recv(262144):
    sock.sendall(b"".join(len(p).to_bytes(4, "big") + p for p in frames.feed(data)))
"""


def config(name: str, code: str, **spec: Any) -> Config:
    doc = {"apiVersion": "edgeward/v1", "kind": "Function", "metadata": {"name": name}}
    return config_of(decode(doc | {"spec": {"runtime": "python", "source": {"inline": code}} | spec}), {}, {}, [])


@contextlib.asynccontextmanager
async def dispatcher() -> AsyncIterator[Dispatcher]:
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder:
        d = Dispatcher(Path(folder), "bench", "bench")
        task = asyncio.create_task(d.run())
        try:
            yield d
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def call(d: Dispatcher, name: str, event: Event = EVENT) -> Any:
    return await d.invoke(Call(f"default/{name}", event))


async def until(held: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not held():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def one_by_one(work: Callable[[], Coroutine[Any, Any, Any]], n: int) -> float:
    """The median, in microseconds."""
    took = []
    for _ in range(n):
        began = time.perf_counter()
        await work()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


async def in_flight(work: Callable[[], Coroutine[Any, Any, Any]], n: int, at_once: int = 64) -> float:
    """Calls a second."""
    left = iter(range(n))

    async def caller() -> None:
        for _ in left:
            await work()

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    return n / (time.perf_counter() - began)


class Echo(asyncio.Protocol):
    """The caller's side of the bare echo: futures in the order of their calls."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []
        self.frames = Frames()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        for _ in self.frames.feed(data):
            self.waiting.pop(0).set_result(None)

    async def call(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        self.transport.write(frame(EVENT))
        await future


async def bare_echo(n: int) -> tuple[float, float]:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([PYTHON, "-c", ECHO, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    ours.setblocking(False)
    transport, echo = await asyncio.get_running_loop().create_unix_connection(Echo, sock=ours)
    try:
        await one_by_one(echo.call, 500)
        return await one_by_one(echo.call, n), await in_flight(echo.call, n * 4)
    finally:
        transport.close()
        await asyncio.to_thread(process.wait, 10)


async def _warm() -> list[Row]:
    async with dispatcher() as d:
        d.configure([config("hello", HELLO, scale={"max": 2})])
        work = lambda: call(d, "hello")  # noqa: E731
        await in_flight(work, 2000)
        best_p50, best_rate, echo_p50, echo_rate = 1e9, 0.0, 1e9, 0.0
        for _ in range(3):  # in turn, so that a neighbour's noise meets both
            best_p50 = min(best_p50, await one_by_one(work, 4000))
            best_rate = max(best_rate, await in_flight(work, 16_000))
            p50, rate = await bare_echo(4000)
            echo_p50, echo_rate = min(echo_p50, p50), max(echo_rate, rate)
    warm = row("warm python function, p50 of 4000, best of 3", best_p50, "us", 150,
               base=("bare unix-socket echo, msgpack frames", echo_p50))  # fmt: skip
    warm.baseline = f"{warm.baseline}; {await peers()}"
    return [
        warm,
        row("python function, 64 in flight, best of 3", best_rate, "calls/s", 15_000, less=False,
            base=("bare unix-socket echo, 64 in flight", echo_rate)),
    ]  # fmt: skip


async def _wasm() -> list[Row]:
    async with dispatcher() as d:
        d.configure([config("hello", HELLO, scale={"max": 2}), config("wasm", WASM, runtime="wasm", scale={"max": 2})])
        work, beside = lambda: call(d, "wasm"), lambda: call(d, "hello")
        for one in (work, beside):
            await in_flight(one, 2000)
        p50, rate, python_p50, python_rate = 1e9, 0.0, 1e9, 0.0
        for _ in range(3):
            p50, rate = min(p50, await one_by_one(work, 2000)), max(rate, await in_flight(work, 8000))
            python_p50 = min(python_p50, await one_by_one(beside, 2000))
            python_rate = max(python_rate, await in_flight(beside, 8000))
    return [
        row("warm wasm function, an instance for each call, p50 of 2000, best of 3", p50, "us", 150,
            base=("a python function, which has one for all", python_p50)),
        row("wasm function, an instance for each call, 64 in flight, best of 3", rate, "calls/s", 5_000, less=False,
            base=("a python function, 64 in flight", python_rate)),
    ]  # fmt: skip


async def _cold(what: str, bar: float, code: str, **spec: Any) -> list[Row]:
    took, bare = [], []
    async with dispatcher() as d:
        d.configure([config("cold", code, scale={"idle": "1ms"}, **spec)])
        await call(d, "cold")
        for _ in range(50):
            await until(lambda: not (d.status("default/cold") or {}).get("instances"))
            began = time.perf_counter()
            reply = await call(d, "cold")
            assert reply.cold
            took.append((time.perf_counter() - began) * 1e3)
            began = time.perf_counter()
            subprocess.run([PYTHON, "-c", "pass"], check=True)
            bare.append((time.perf_counter() - began) * 1e3)
    base = ("a bare interpreter's start and end", percentile(bare, 50))
    return [row(f"cold start of a sandboxed {what} function, p50 of 50", percentile(took, 50), "ms", bar, base=base)]


async def _colds() -> list[Row]:
    return await _cold("python", 30, HELLO) + await _cold("wasm", 1, WASM, runtime="wasm")


def _pss(pids: list[int]) -> float:
    return sum(u.memory for u in map(usage, pids) if u is not None) / 1e6


async def _idle(n: int = 200, processes: int = 20) -> list[Row]:
    async with dispatcher() as d:
        d.configure([config(f"f{i}", HELLO, scale={"min": 1}) for i in range(n)])
        for i in range(n):
            await call(d, f"f{i}")
        pids = [link.child.pid for f in d._functions.values() for link in f.current.links]  # type: ignore[union-attr]
        assert len(pids) == n
        value = _pss([*pids, d.nursery.pid])
    code = "import asyncio, json, logging, msgspec, sys; print(1, flush=True); sys.stdin.read()"
    argv = [PYTHON, "-c", code]
    running = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(processes)]
    try:
        for p in running:
            assert p.stdout
            p.stdout.readline()  # it has imported
        each = _pss([p.pid for p in running]) / processes
    finally:
        for p in running:
            p.communicate()
    base = (f"{n} processes ({processes} measured)", each * n)
    return [row(f"{n} idle python functions with their zygote, PSS", value, "MB", 600, base=base)]


NODE_HELLO = "export const handler = (event, context) => ({ hello: event.text(), version: context.version });"
PERL = Path(__file__).parent.parent / "tests/functions/workers/worker.pl"


async def _starts(wanted: Config, bare: list[str], event: Event = EVENT, n: int = 30) -> tuple[float, float, float]:
    """Medians: a cold call and the bare program's start and end, in turn, ms; an idle instance's PSS, MB."""
    took, alone, size = [], [], []
    async with dispatcher() as d:
        d.configure([wanted])
        await call(d, wanted.version.name, event)
        for _ in range(n):
            size.append(_pss([link.child.pid for f in d._functions.values() for link in f.current.links]))  # type: ignore[union-attr]
            await until(lambda: not (d.status(wanted.version.key) or {}).get("instances"))
            began = time.perf_counter()
            assert (await call(d, wanted.version.name, event)).cold
            took.append((time.perf_counter() - began) * 1e3)
            began = time.perf_counter()
            subprocess.run(bare, check=True, stdout=subprocess.DEVNULL)
            alone.append((time.perf_counter() - began) * 1e3)
    return percentile(took, 50), percentile(alone, 50), percentile([s for s in size if s], 50)


async def _programs() -> list[Row]:
    rows = []
    scale = {"idle": "100ms"}  # long enough to look at it
    if shutil.which("node"):
        wanted = config("node", NODE_HELLO, runtime="node", scale=scale)
        cold, bare, size = await _starts(wanted, ["node", "-e", "0"])
        alone = subprocess.Popen(["node", "-e", "console.log(1); process.stdin.resume()"], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)  # fmt: skip
        try:
            assert alone.stdout
            alone.stdout.readline()
            plain = _pss([alone.pid])
        finally:
            alone.communicate()
        rows += [
            row("cold start of a sandboxed node function, p50 of 30", cold, "ms", 150,
                base=("a bare Node's start and end", bare)),
            row("an idle node function, PSS", size, "MB", 80, base=("a bare idle Node", plain)),
        ]  # fmt: skip
    if shutil.which("perl"):
        source = {"files": {"worker.pl": PERL.read_text()}}
        wanted = config("perl", "", runtime="command", source=source, command=["perl", "worker.pl"], scale=scale)
        cold, bare, size = await _starts(wanted, ["perl", "-e", "0"], Event("1", "/", "conformance.echo", b"x"))
        rows.append(row("cold start of a sandboxed command (a worker in Perl), p50 of 30", cold, "ms", 40,
                        base=("a bare Perl's start and end", bare)))  # fmt: skip
    async with dispatcher() as d:
        d.configure([config("cat", "", runtime="command", source={}, command=["cat"], mode="stdio")])
        try:
            await call(d, "cat")
        except CallFailed as e:  # without cgroups there is no mode stdio
            print(f"no row for mode: stdio here: {e.message}")
            return rows
        each = await one_by_one(lambda: call(d, "cat"), 300)
        alone = []
        for _ in range(300):
            began = time.perf_counter()
            subprocess.run(["cat"], input=EVENT.data, stdout=subprocess.PIPE, check=True)
            alone.append((time.perf_counter() - began) * 1e3)
    rows.append(row("a call of a command with mode: stdio (cat), p50 of 300", each / 1e3, "ms", 10,
                    base=("subprocess.run of the same", percentile(alone, 50))))  # fmt: skip
    return rows


async def _loop() -> list[Row]:
    code = "def handler(e, c):\n    while e.data == b'loop': ...\n    return 'well'"
    late, again, usual = [], [], []
    async with dispatcher() as d:
        d.configure([config("loop", code, limits={"timeout": "500ms"}), config("hello", HELLO)])
        await call(d, "loop")
        for _ in range(10):
            began = time.perf_counter()
            await call(d, "loop")
            usual.append((time.perf_counter() - began) * 1e3)
        for _ in range(10):
            began = time.perf_counter()
            try:
                await call(d, "loop", Event("1", "/", "t", b"loop"))
            except CallFailed as e:
                assert e.kind == "timeout"
            stopped = time.perf_counter()
            late.append((stopped - began - 0.5) * 1e3)
            await call(d, "loop")
            again.append((time.perf_counter() - stopped) * 1e3)
    timers = []
    for _ in range(10):
        began = time.perf_counter()
        await asyncio.sleep(0.5)
        timers.append((time.perf_counter() - began - 0.5) * 1e3)
    return [
        row("endless loop stopped after its deadline, worst of 10", max(late), "ms", 50, base=("a timer", max(timers))),
        row("the next call after an endless loop, worst of 10", max(again), "ms", 100,
            base=("a call after a call, worst of 10", max(usual))),
    ]  # fmt: skip


async def _update(n: int = 10_000) -> list[Row]:
    async with dispatcher() as d:
        d.configure([config("f", "def handler(e, c):\n    return '0'", scale={"max": 2})])
        await call(d, "f")
        done, failed, versions = 0, 0, set[bytes]()

        async def caller() -> None:
            nonlocal done, failed
            while done < n:
                done += 1
                try:
                    versions.add((await call(d, "f")).body)
                except CallFailed:
                    failed += 1

        await asyncio.gather(*(caller() for _ in range(32)))
        calm = 100 * (1 - failed / n)
        done = failed = 0
        callers = [asyncio.create_task(caller()) for _ in range(32)]
        for version in range(1, 6):
            await until(lambda v=version: done >= n * v // 6)  # type: ignore[misc]
            d.configure([config("f", f"def handler(e, c):\n    return '{version}'", scale={"max": 2})])
        await asyncio.gather(*callers)
    assert len(versions) > 1
    kept = 100 * (1 - failed / n)
    return [row(f"calls of {n} answered during 5 updates", kept, "%", 100, less=False, base=("without updates", calm))]


async def _triggered(n: int = 5000) -> list[Row]:
    """Messages that wait at the node's broker: called one by one, beside a subscriber that only takes them."""
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as name:
        folder = Path(name)
        server = NatsServer(folder / "nats", NodeSpec("bench", mqtt_users={"edge": "pw"}, plane_password="pw"))
        await server.start()
        try:
            rates = [await _drained(folder, server, n) for _ in range(3)]
        finally:
            await server.stop()
    return [
        row("MQTT QoS 1 messages answered by a function, 16 at once, best of 3", max(r for r, _ in rates), "calls/s",
            2000, less=False, base=("paho subscriber of a persistent session", max(b for _, b in rates))),
    ]  # fmt: skip


async def _drained(folder: Path, server: NatsServer, n: int) -> tuple[float, float]:
    ports = server.ports
    key, spec = "default/f", {"triggers": [{"mqtt": {"topic": "bench", "concurrency": 16}}], "scale": {"max": 2}}
    made = config("f", "def handler(e, c): ...", **spec)
    reach = Reach(server.url, "pw", "127.0.0.1", ports["mqtt"])
    taken = asyncio.Event()
    count = 0

    def arrived(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == n:
            loop.call_soon_threadsafe(taken.set)

    def device(id: str) -> mqtt.Client:
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=id, clean_session=False)
        client.username_pw_set("edge", "pw")
        client.max_inflight_messages_set(500)
        client.on_message = arrived
        client.connect("127.0.0.1", ports["mqtt"])
        client.loop_start()
        return client

    loop = asyncio.get_running_loop()
    async with dispatcher() as d:
        d.configure([made])
        await call(d, "f")
        intake = Intake("bench", folder / "listening", d.invoke)
        task = asyncio.create_task(intake.run())
        wanted = {key: made.policy.takings}
        intake.configure(wanted, {key}, reach)
        await until(lambda: all(t["connected"] for t in intake.status(key)))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        subscriber = device("sub")
        subscriber.subscribe("bench", 1)
        sender = device("send")
        for info in [sender.publish("bench", b"x" * 100, 1) for _ in range(n)][-1:]:
            await asyncio.to_thread(info.wait_for_publish, 60)
        await asyncio.wait_for(taken.wait(), 60)  # it was there: this was no measure
        subscriber.disconnect()
        subscriber.loop_stop()
        count = 0
        taken.clear()
        for info in [sender.publish("bench", b"x" * 100, 1) for _ in range(n)][-1:]:
            await asyncio.to_thread(info.wait_for_publish, 60)
        sender.disconnect()
        sender.loop_stop()
        before = d.counters()[key]["calls"]
        intake = Intake("bench", folder / "listening", d.invoke)
        task = asyncio.create_task(intake.run())
        began = time.perf_counter()
        intake.configure(wanted, {key}, reach)
        await until(lambda: d.counters()[key]["calls"] >= before + 2 * n)
        rate = 2 * n / (time.perf_counter() - began)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        began = time.perf_counter()
        subscriber = device("sub")
        await asyncio.wait_for(taken.wait(), 60)
        plain = n / (time.perf_counter() - began)
        subscriber.disconnect()
        subscriber.loop_stop()
    return rate, plain


def functions() -> list[Row]:
    rows: list[Row] = []
    for work in (_warm, _wasm, _colds, _programs, _idle, _loop, _update, _triggered):
        rows += uvloop.run(work())
    return rows
