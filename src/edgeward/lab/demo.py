"""The main job, shown and measured: ``edgeward demo``.

A hub and two sites behind emulated links; a web answer at the edge against the same one across the WAN; readings by a
foreign MQTT client; then the link is cut, agent and broker are killed, people work at the site, the link is healed, and
every acknowledged reading is looked up in the hub's stream, one by one. Every number is measured in this run; a claim
that did not hold makes the exit status 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import os
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edgeward.cli.context import CONTEXT_ENV
from edgeward.core.daemon import memory_mb
from edgeward.core.errors import EdgewardError
from edgeward.core.natsserver import free_port
from edgeward.lab.emulated import Lab, open_lab
from edgeward.lab.publisher import Publisher
from edgeward.lab.topology import parse
from edgeward.lab.view import example, program

TOPOLOGY = "sites: [{name: plant, nodes: 1, link: 4g}, {name: shop, nodes: 1, link: bad-dsl}]"
EDGE_REQUESTS = 300
CLOUD_REQUESTS = 60
RATE = 120  #: readings per second
CUT_SECONDS = 8.0
MIN_SENT = 1000
#: What an App may limit.
LIMITS = ("cpu", "memory", "pids", "user")
MIN_OFFLINE_REQUESTS = 100
#: What ``--json`` tells, null where the run did not come so far.
FIELDS = (
    *("edge_p50_ms", "edge_p99_ms", "cloud_p50_ms", "cloud_p99_ms"),
    *("sent", "received", "duplicates", "lost", "out_of_order"),
    *("offline_requests", "offline_failures", "offline_restart_s", "backlog_first_s", "backlog_done_s"),
    *("local_change_applied", "hub_pss_mb", "agent_pss_mb", "nats_pss_mb", "enforced"),
)


class Show:
    """Progress for people: one line a fact on a terminal or a pipe alike."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)

    def step(self, title: str) -> None:
        self.console.print(f"\n[bold]{title}[/bold]", soft_wrap=True)

    def fact(self, text: str, ok: bool = True) -> None:
        self.console.print(f"  {'[green]✓[/green]' if ok else '[red]✗[/red]'} {text}", soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(f"  [dim]· {text}[/dim]", soft_wrap=True)


class Client:
    """One keep-alive HTTP connection, as a browser has it."""

    def __init__(self, port: int, timeout: float = 5.0) -> None:
        self._port, self._timeout = port, timeout
        self._c: http.client.HTTPConnection | None = None

    def get(self) -> dict[str, Any]:
        try:
            if self._c is None:
                self._c = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout)
            self._c.request("GET", "/")
            answer = self._c.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise http.client.HTTPException(f"status {answer.status}")
            doc: dict[str, Any] = json.loads(body)
            return doc
        except (OSError, http.client.HTTPException, ValueError):
            self.close()
            raise

    def close(self) -> None:
        if self._c is not None:
            self._c.close()
            self._c = None


def latencies(port: int, n: int) -> list[float]:
    """Milliseconds of ``n`` requests on one warm connection."""
    client = Client(port, 20.0)
    client.get()
    took = []
    for _ in range(n):
        t = time.perf_counter()
        client.get()
        took.append((time.perf_counter() - t) * 1000)
    client.close()
    return took


def percentile(values: list[float], p: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))]


class Asker(threading.Thread):
    """Asks the edge for an answer, again and again, and counts failures. The app's port may move with its version."""

    def __init__(self, port: Callable[[], int]) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._halt = threading.Event()
        self.requests = self.failures = 0
        self.greetings: list[str] = []
        self.errors: list[str] = []

    def run(self) -> None:
        client, at = None, 0
        while not self._halt.wait(0.03):
            try:
                port = self._port()
                if client is None or port != at:
                    client, at = Client(port, 2.0), port
                self.requests += 1
                greeting = str(client.get()["greeting"])
                if not self.greetings or self.greetings[-1] != greeting:
                    self.greetings.append(greeting)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as e:
                self.failures += 1
                self.errors.append(f"{type(e).__name__}: {e}")

    def end(self) -> None:
        self._halt.set()
        self.join(5)


class Reader:
    """Follows the hub's stream and keeps when each reading arrived."""

    def __init__(self, url: str, ca_file: str, token: str, stream: str) -> None:
        self._args = (url, ca_file, token, stream)
        self.arrived: dict[int, float] = {}
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        at = 0
        while not self._halt.is_set():
            try:
                for doc in read_stream(*self._args, start=at, follow=True, timeout=2.0):
                    at = doc["seq"] + 1
                    self.arrived.setdefault(int(doc["payload"]["id"]), time.monotonic())
                    if self._halt.is_set():
                        return
            except (OSError, http.client.HTTPException, ValueError, EdgewardError):
                self._halt.wait(0.1)

    def end(self) -> None:
        self._halt.set()
        self._thread.join(5)


def read_stream(
    url: str, ca_file: str, token: str, stream: str, *, start: int = 0, follow: bool = False, timeout: float = 30.0
) -> Any:
    """The messages of a hub stream, decoded, one by one."""
    import ssl
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    context = ssl.create_default_context(cafile=ca_file)
    c = http.client.HTTPSConnection(str(parts.hostname), parts.port, timeout=timeout, context=context)
    try:
        path = f"/api/v1/streams/{stream}?from={start}" + ("&follow=true" if follow else "")
        c.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        answer = c.getresponse()
        if answer.status == 404:
            return
        if answer.status != 200:
            raise EdgewardError(f"the hub answered {answer.status} for the stream")
        for line in answer:
            yield json.loads(line)
    finally:
        c.close()


class Demo:
    def __init__(self, lab: Lab, show: Show) -> None:
        self.lab = lab
        self.show = show
        self.result: dict[str, Any] = dict.fromkeys(FIELDS)
        self.failed: list[str] = []
        self._cloud: asyncio.subprocess.Process | None = None
        self._port = 0

    def hold(self, ok: bool, text: str) -> None:
        """States a fact; one that does not hold fails the demo."""
        self.show.fact(text, ok)
        if not ok:
            self.failed.append(text)

    # -- helpers ------------------------------------------------------------------------------------------------------

    async def cli(self, *args: str, timeout: float = 60.0) -> str:
        """The real program, as a user types it."""
        context = str(self.lab.cluster.data / "context.json")
        argv = [sys.executable, "-m", "edgeward", *args]
        p = await asyncio.create_subprocess_exec(
            *argv,
            env={**os.environ, "EDGEWARD_CONTEXT": context, "NO_COLOR": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(timeout):
            out, err = await p.communicate()
        if p.returncode:
            raise EdgewardError(f"`edgeward {' '.join(args)}` failed ({p.returncode}): {err.decode().strip()}")
        return out.decode()

    async def app(self, *at: str) -> dict[str, Any]:
        doc: dict[str, Any] = json.loads(await self.cli("get", "app", "hello", "-o", "json", *at))
        return doc

    async def running_port(self, *at: str) -> int:
        for instance in (await self.app(*at))["status"].get("instances", []):
            port = instance.get("ports", {}).get("http")
            if instance.get("phase") == "Running" and port and not instance.get("stale"):
                return int(port)
        return 0

    async def wait_for(self, what: str, ready: Callable[[], Awaitable[Any]], seconds: float = 30.0) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            got = await ready()
            if got:
                return got
            if time.monotonic() > deadline:
                raise EdgewardError(f"{what} did not happen within {seconds:.0f} s")
            await asyncio.sleep(0.05)  # looking again

    def node_port(self) -> int:
        """The port that serves now, from the node's own API (its unix socket, no WAN)."""
        return self._port

    async def follow_port(self) -> None:
        """Keeps :meth:`node_port` true: what a gateway does for clients (the gateway is a later capability)."""
        while True:
            with contextlib.suppress(EdgewardError, OSError, KeyError, ValueError):
                doc = await asyncio.to_thread(self.lab.node_api, "plant-1", "/api/v1/namespaces/default/apps/hello")
                ports = [
                    i["ports"]["http"]
                    for i in doc["status"].get("instances", [])
                    if i.get("phase") == "Running" and i.get("ports", {}).get("http")
                ]
                if ports:
                    self._port = int(ports[0])
            await asyncio.sleep(0.05)  # the period of looking

    # -- the acts -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self.show.step("Starting a hub and two edge sites behind emulated links")
        t = time.monotonic()
        await self.lab.up()
        self.hold(True, f"hub, plant-1 and shop-1 are ready after {time.monotonic() - t:.1f} s")
        self.show.note(f"links: {self.lab.describe()}")
        await self.cli("apply", "-f", str(example()), "--wait", "--timeout", "30s")
        self._port = await self.wait_for("hello running", self.running_port)
        self.hold(True, "examples/01 is applied and runs at site plant")
        # the export's first message must find its capture in place; its status says when it does
        await self.wait_for("export line1 ready", self._export_ready)

    async def _export_ready(self) -> bool:
        doc = json.loads(await self.cli("get", "export", "line1", "-o", "json"))
        return "plant-1" in doc["status"].get("nodes", {})

    async def latency(self) -> None:
        self.show.step("1. The same request, answered at the edge and by the cloud")
        edge = await asyncio.to_thread(latencies, self._port, EDGE_REQUESTS)
        cloud_port = await self._cloud_copy()
        relay = await self.lab.wan_relay("plant", cloud_port)
        cloud = await asyncio.to_thread(latencies, relay, CLOUD_REQUESTS)
        for name, values in (("edge", edge), ("cloud", cloud)):
            self.result[f"{name}_p50_ms"] = round(statistics.median(values), 2)
            self.result[f"{name}_p99_ms"] = round(percentile(values, 99), 2)
        r = self.result
        self.hold(
            r["edge_p50_ms"] < r["cloud_p50_ms"],
            f"edge p50 {r['edge_p50_ms']} ms, p99 {r['edge_p99_ms']} ms;"
            f" cloud p50 {r['cloud_p50_ms']} ms, p99 {r['cloud_p99_ms']} ms",
        )

    async def _cloud_copy(self) -> int:
        """The same program beside the hub: what answers where there is no edge."""
        import yaml

        docs = list(yaml.safe_load_all((example() / "app.yaml").read_text()))
        code = next(d for d in docs if d["kind"] == "Config")["spec"]["data"]["server.py"]
        port = free_port()
        self._cloud = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, env={**os.environ, "PORT": str(port)}, stdout=asyncio.subprocess.DEVNULL
        )

        async def answers() -> bool:
            try:
                return bool(await asyncio.to_thread(Client(port, 1.0).get))
            except (OSError, http.client.HTTPException):
                return False

        await self.wait_for("the cloud's copy answering", answers)
        return port

    async def readings(self) -> None:
        self.show.step("2. A foreign MQTT client publishes readings at the edge; they arrive at the hub in order")
        node = next(n for n in self.lab.cluster.context()["nodes"] if n["name"] == "plant-1")
        self.publisher = Publisher(node["mqtt_url"], node["mqtt_user"], node["mqtt_password"], rate=RATE)
        context = self.lab.cluster.context()
        self.stream_args = (context["hub_url"], context["ca_file"], context["token"], "line1")
        self.reader = Reader(*self.stream_args)
        self.publisher.start()
        self.reader.start()

        async def some() -> bool:
            return len(self.reader.arrived) >= 200

        await self.wait_for("200 readings at the hub", some)
        ids = list(self.reader.arrived)
        self.hold(ids == sorted(ids), f"{len(ids)} readings arrived so far, in order")

    async def cut(self) -> None:
        self.show.step("3. The WAN is cut")
        await self.lab.cut("plant")
        self._cut_at = time.monotonic()
        follow = asyncio.create_task(self.follow_port())
        asker = Asker(self.node_port)
        asker.start()
        try:
            await self.cli(
                "apply", "--at", "plant-1", "-f", str(self._changed_app("hello from a cut-off site")), "--wait"
            )
            self.show.note("applied a change at the site's own API")

            async def changed() -> bool:
                return "hello from a cut-off site" in asker.greetings

            try:
                await self.wait_for("the local change", changed, 20.0)
                self.result["local_change_applied"] = True
            except EdgewardError:
                self.result["local_change_applied"] = False
            self.hold(self.result["local_change_applied"], "an `apply` on the site's local API took effect while cut")
            # the cloud changes the same object meanwhile: the declared rule must decide
            doc = await self.app()
            doc["spec"]["process"]["env"]["GREETING"] = "hello from the cloud"
            await self.cli("apply", "-f", str(self._file(doc, "cloud.json")))
            await self._kill_and_return(asker)
            left = CUT_SECONDS - (time.monotonic() - self._cut_at)
            if left > 0:
                await asyncio.sleep(left)  # the outage itself
        finally:
            asker.end()
            follow.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await follow
        self.result["offline_requests"] = asker.requests
        self.result["offline_failures"] = asker.failures
        self.hold(
            asker.failures == 0 and asker.requests >= MIN_OFFLINE_REQUESTS,
            f"{asker.requests} requests answered at the edge while cut, {asker.failures} failed"
            + (f" ({asker.errors[0]})" if asker.errors else ""),
        )

    async def _kill_and_return(self, asker: Asker) -> None:
        child = self.lab.cluster.nodes["plant-1"]
        victims = [p for p in (child.pid, child.state().get("nats")) if p]
        acked = self.publisher.acked_count()
        t = time.monotonic()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

        async def back() -> bool:
            return child.ready() and child.pid not in victims and self.publisher.acked_count() > acked + 5

        await self.wait_for("the return of agent and broker", back, 40.0)
        await self.wait_for("hello running", lambda: self.running_port("--at", "plant-1"))
        self.result["offline_restart_s"] = round(time.monotonic() - t, 2)
        self.hold(
            len(victims) == 2,
            f"agent and nats-server killed (SIGKILL), back with everything after {self.result['offline_restart_s']} s",
        )

    def _changed_app(self, greeting: str) -> Path:
        import yaml

        docs = list(yaml.safe_load_all((example() / "app.yaml").read_text()))
        app = next(d for d in docs if d["kind"] == "App")
        app["spec"]["process"]["env"]["GREETING"] = greeting
        return self._file(app, "local.json")

    def _file(self, doc: dict[str, Any], name: str) -> Path:
        path = self.lab.cluster.data / name
        doc = {k: v for k, v in doc.items() if k != "status"}
        meta = doc["metadata"]
        doc["metadata"] = {k: meta[k] for k in ("name", "namespace", "labels", "conflict") if k in meta}
        path.write_text(json.dumps(doc))
        return path

    async def heal(self) -> None:
        self.show.step("4. The WAN is healed")
        waiting = self.publisher.acked() - set(self.reader.arrived)
        healed = time.monotonic()
        await self.lab.heal("plant")

        async def first() -> bool:
            return any(t > healed for t in list(self.reader.arrived.values()))

        async def done() -> bool:
            return waiting <= set(self.reader.arrived)

        await self.wait_for("the first reading of the backlog", first, 30)
        self.result["backlog_first_s"] = round(
            min(t for t in list(self.reader.arrived.values()) if t > healed) - healed, 2
        )
        await self.wait_for("the backlog", done, 60)
        self.result["backlog_done_s"] = round(
            max([self.reader.arrived[i] for i in waiting], default=healed) - healed, 2
        )
        self.hold(
            True,
            f"{len(waiting)} waiting readings: the first after {self.result['backlog_first_s']} s,"
            f" all after {self.result['backlog_done_s']} s",
        )

        async def enough() -> bool:
            return self.publisher.acked_count() >= MIN_SENT

        await self.wait_for(f"{MIN_SENT} acknowledged readings", enough, 60)
        await asyncio.to_thread(self.publisher.end)

        async def complete() -> bool:
            return self.publisher.acked() <= set(self.reader.arrived)

        with contextlib.suppress(EdgewardError):
            await self.wait_for("the last readings", complete, 20)
        self.reader.end()
        await self._count()
        await self._reconciled()

    async def _count(self) -> None:
        """What the hub's stream holds, message by message, against the publisher's own list."""
        acked = self.publisher.acked()
        docs = await asyncio.to_thread(lambda: list(read_stream(*self.stream_args)))
        ids = [int(d["payload"]["id"]) for d in docs]
        counts: dict[int, int] = {}
        for i in ids:
            counts[i] = counts.get(i, 0) + 1
        self.result["sent"] = len(acked)
        self.result["received"] = sum(1 for i in acked if i in counts)
        self.result["duplicates"] = sum(n - 1 for n in counts.values())
        self.result["lost"] = sum(1 for i in acked if i not in counts)
        self.result["out_of_order"] = sum(1 for a, b in itertools.pairwise(ids) if b < a)
        r = self.result
        self.hold(
            r["sent"] >= MIN_SENT and r["lost"] == 0 and r["duplicates"] == 0 and r["out_of_order"] == 0,
            f"{r['sent']} readings acknowledged, {r['received']} in the hub's stream:"
            f" {r['lost']} lost, {r['duplicates']} twice, {r['out_of_order']} out of order",
        )

    async def _reconciled(self) -> None:
        async def decided() -> bool:
            greeting = (await self.app())["spec"]["process"]["env"]["GREETING"]
            return bool(greeting == "hello from a cut-off site")

        try:
            await self.wait_for("the reconciliation", decided, 20)
            ok = True
        except EdgewardError:
            ok = False
        self.hold(ok, "both sides changed the app; its rule is `edge`, so the site's change stands at the hub too")
        journal = json.loads(await self.cli("journal", "-o", "json"))["items"]
        mine = [j for j in journal if j.get("name") == "hello" and j.get("loser") == "cloud"]
        self.hold(bool(mine), f"the journal shows it: {mine[-1]['why']}" if mine else "the journal shows nothing of it")

    def memory(self) -> None:
        context = self.lab.cluster.context()
        node = next(n for n in context["nodes"] if n["name"] == "plant-1")
        self.result["hub_pss_mb"] = round(memory_mb(context["pids"]["hub"]), 1)
        self.result["agent_pss_mb"] = round(memory_mb(node["pids"]["agent"]), 1)
        self.result["nats_pss_mb"] = round(memory_mb(node["pids"]["nats"]), 1)

    async def enforced(self) -> None:
        node = json.loads(await self.cli("get", "node", "plant-1", "-o", "json"))
        self.result["enforced"] = list(node["status"].get("enforced", []))

    async def end(self) -> None:
        if self._cloud is not None and self._cloud.returncode is None:
            self._cloud.kill()
            await self._cloud.wait()
        for part in ("publisher", "reader"):
            if hasattr(self, part):
                await asyncio.to_thread(getattr(self, part).end)

    async def run(self) -> None:
        await self.start()
        await self.latency()
        await self.readings()
        await self.cut()
        await self.heal()
        self.memory()
        await self.enforced()

    def table(self) -> None:
        r = self.result
        enforced = [what.rpartition(".")[2] for what in r["enforced"] or []]
        table = Table(title="What was measured", title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        rows = [
            ("answered at the edge, p50 / p99", f"{r.get('edge_p50_ms')} / {r.get('edge_p99_ms')} ms"),
            ("answered by the cloud over 4g, p50 / p99", f"{r.get('cloud_p50_ms')} / {r.get('cloud_p99_ms')} ms"),
            ("readings acknowledged / at the hub", f"{r.get('sent')} / {r.get('received')}"),
            ("lost / twice / out of order", f"{r.get('lost')} / {r.get('duplicates')} / {r.get('out_of_order')}"),
            ("requests while cut / failed", f"{r.get('offline_requests')} / {r.get('offline_failures')}"),
            ("agent and broker back after SIGKILL, cut off", f"{r.get('offline_restart_s')} s"),
            ("backlog after the heal: first / all", f"{r.get('backlog_first_s')} / {r.get('backlog_done_s')} s"),
            (
                "memory: hub / agent / its nats-server",
                f"{r.get('hub_pss_mb')} / {r.get('agent_pss_mb')} / {r.get('nats_pss_mb')} MB",
            ),
            ("limits enforced on this machine", ", ".join(enforced) or "none"),
        ]
        for row in rows:
            table.add_row(*row)
        self.show.console.print()
        self.show.console.print(table)
        missing = [what for what in LIMITS if what not in enforced]
        if r["enforced"] is not None and missing:
            self.show.console.print(
                f"\nNot enforced here: {', '.join(missing)} (needs root and cgroups).", soft_wrap=True
            )


async def run_demo(
    *,
    data: Path | None,
    port: int,
    ready_file: Path | None,
    keep: bool,
    as_json: bool,
    stop: asyncio.Event,
    seed: int = 1,
) -> int:
    """Runs it all; 0 when everything held."""
    show = Show()
    directory = data.absolute() if data else Path(tempfile.mkdtemp(prefix="edgeward-demo-"))
    topology = parse(TOPOLOGY, file="demo")
    demo: Demo | None = None
    told = False

    def tell() -> None:
        nonlocal told
        if as_json and demo is not None and not told:
            print(json.dumps(demo.result), flush=True)
            told = True

    started = time.monotonic()
    code = 1
    try:
        async with open_lab(directory, topology, port=port, ready_file=ready_file, seed=seed) as lab:
            demo = Demo(lab, show)
            work = asyncio.create_task(demo.run())
            stopped = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    work.result()
                else:
                    demo.failed.append("interrupted")
            except EdgewardError as e:
                demo.hold(False, str(e))
            except Exception as e:  # noqa: BLE001 - whatever broke it, the claims behind it did not hold
                demo.hold(False, f"{type(e).__name__}: {e}")
            finally:
                for task in (work, stopped):
                    task.cancel()
                await asyncio.gather(work, stopped, return_exceptions=True)
                await demo.end()
            demo.table()
            took = time.monotonic() - started
            if demo.failed:
                show.console.print(f"\n[bold red]This did not hold[/bold red] (after {took:.0f} s):")
                for text in demo.failed:
                    show.fact(text, False)
            else:
                code = 0
                show.console.print(f"\n[bold green]Everything held[/bold green], in {took:.0f} s.")
            if keep and not stop.is_set():
                called, context = program(), shlex.quote(str(lab.cluster.data / "context.json"))
                show.console.print(
                    f"\nLeft running (--keep). In another terminal:\n  export {CONTEXT_ENV}={context}\n"
                    f"  {called} get nodes\n  {called} stream read line1 --from 0\n  {called} lab cut plant\n"
                    + ("Ctrl-C ends it." if data else "Ctrl-C ends it and removes its state."),
                    soft_wrap=True,
                )
                tell()  # who reads it wants it now, not after Ctrl-C
                waiting = asyncio.create_task(lab.run())
                await stop.wait()
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
    finally:
        if data is None and (demo is None or not demo.failed):
            shutil.rmtree(directory, ignore_errors=True)
        elif data is None and not told:
            show.console.print(f"Its logs are in {directory}")
    tell()
    return code
