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
import json
import os
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from edgeward.cli.context import CONTEXT_ENV
from edgeward.core.daemon import memory_mb
from edgeward.core.errors import EdgewardError
from edgeward.core.natsserver import free_port
from edgeward.lab.asker import Asker, Client, latencies
from edgeward.lab.emulated import Lab, open_lab
from edgeward.lab.publisher import Publisher
from edgeward.lab.reader import Reader, read_stream
from edgeward.lab.show import Show
from edgeward.lab.stage import Stage
from edgeward.lab.tally import percentile, tally
from edgeward.lab.topology import parse
from edgeward.lab.view import example, program

TOPOLOGY = "sites: [{name: plant, nodes: 1, link: 4g}, {name: shop, nodes: 1, link: bad-dsl}]"
EDGE_REQUESTS = 300
CLOUD_REQUESTS = 60
RATE = 120  #: readings per second
CUT_SECONDS = 8.0
MIN_SENT = 1000
MIN_OFFLINE_REQUESTS = 100


class Demo(Stage):
    """The acts, in their order; :meth:`run` plays them, :meth:`end` leaves nothing of theirs behind."""

    def __init__(self, lab: Lab, show: Show) -> None:
        super().__init__(lab, show)
        self._cloud: asyncio.subprocess.Process | None = None

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
        self.result |= tally(acked, [int(d["payload"]["id"]) for d in docs])
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
            show.table(demo.result)
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
