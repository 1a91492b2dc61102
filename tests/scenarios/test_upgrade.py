"""A hub and its nodes are upgraded one after the other, in both orders, on the data they have; in between they differ.

The other release is the wheel in tests/data/previous: real processes of it beside real ones of this release.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.previous import ROOT, environment, unpacked

from edgeward.core.natsserver import free_port
from edgeward.core.proc import find_by_env
from edgeward.lab.links import Profile
from edgeward.lab.publisher import Publisher
from edgeward.lab.relay import Relay

NEW = ROOT / "src"
SLEEP = [sys.executable, "-c", "import time; time.sleep(900)"]
#: A hub of this release that has one kind more, so that there is one that no agent knows.
LATER = """
import msgspec
from edgeward.core.registry import Kind, kinds
from edgeward.nodes.wire import LEVEL

class GadgetSpec(msgspec.Struct):
    text: str = ""

kinds.add(Kind("Gadget", "gadgets", GadgetSpec, scope="all", level=LEVEL))
from edgeward.hub.main import main
raise SystemExit(main())
"""


class Part:
    """A hub's or an agent's directory, and its process of whichever release."""

    def __init__(self, directory: Path, module: str) -> None:
        self.directory, self.module = directory, module
        self.log = directory.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, release: Path, program: str = "") -> None:
        what = ["-c", program] if program else ["-m", self.module]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, *what, "--data", str(self.directory)],
                stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=self.directory, env=environment(release),
            )  # fmt: skip

    @property
    def state(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            doc: dict[str, Any] = json.loads((self.directory / "run.json").read_text())
            return doc if self.process is not None and doc.get("pid") == self.process.pid else {}
        return {}

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)

    def close(self) -> None:
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            assert self.process is not None
            self.process.kill()
            self.process.wait(20)
        for name, value in (("EDGEWARD_NATS_DIR", self.directory / "nats"), ("EDGEWARD_DATA", self.directory)):
            for p in find_by_env(name, str(value)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(p.pid, signal.SIGKILL)


def app(name: str, backoff: str = "1s", conflict: str = "cloud") -> dict[str, Any]:
    spec = {"placement": {"site": "plant"}, "process": {"command": SLEEP}, "restart": {"backoff": backoff}}
    return document("App", name, spec, conflict=conflict)


def document(kind: str, name: str, spec: dict[str, Any], **meta: Any) -> dict[str, Any]:
    return {"apiVersion": "edgeward/v1", "kind": kind, "metadata": {"name": name, **meta}, "spec": spec}


class World:
    """One hub, one box behind a relay, and a machine at the box that publishes all the time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.old = unpacked(folder / "previous")
        self.hub = Part(folder / "hub", "edgeward.hub")
        self.box = Part(folder / "box", "edgeward.agent")
        self.parts = [self.hub, self.box]
        self.hub.directory.mkdir()
        self.port = free_port()
        self.relay: Relay | None = None
        self.publisher: Publisher | None = None
        self.pid = 0

    async def link(self, port: int = 0) -> None:
        self.relay = Relay(("127.0.0.1", self.port), Profile(), port=port)
        await self.relay.open()

    async def cut(self) -> int:
        assert self.relay is not None
        await self.relay.close()
        return self.relay.port

    async def until(self, what: str, ready: Callable[[], Awaitable[Any]], seconds: float = 120) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.HTTPError, KeyError, IndexError, FileNotFoundError):
                if got := await ready():
                    return got
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.logs()}"
            await asyncio.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"== {p.directory}\n{p.log.read_text()[-4000:]}" for p in self.parts if p.log.exists())

    async def up(self, part: Part) -> None:
        async def ready() -> bool:
            return bool(part.state.get("ready"))

        await self.until(f"{part.directory.name} is ready", ready)

    # -- the two APIs ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def api(self, box: Part | None = None) -> AsyncIterator[httpx.AsyncClient]:
        identity = self.hub.directory / "identity"
        if box is not None:
            transport = httpx.AsyncHTTPTransport(uds=box.state["api"])
            async with httpx.AsyncClient(transport=transport, base_url="http://box/api/v1", timeout=20) as client:
                yield client
            return
        headers = {"Authorization": f"Bearer {(identity / 'admin.token').read_text().strip()}"}
        verify = ssl.create_default_context(cafile=str(identity / "ca.crt"))
        base = f"https://127.0.0.1:{self.port}/api/v1"
        async with httpx.AsyncClient(verify=verify, headers=headers, base_url=base, timeout=20) as client:
            yield client

    async def get(self, path: str, box: Part | None = None) -> dict[str, Any]:
        async with self.api(box) as client:
            answer = await client.get(path)
            if answer.status_code in (404, 503):
                return {}
            assert answer.status_code == 200, answer.text
            doc: dict[str, Any] = answer.json()
            return doc

    async def put(self, doc: dict[str, Any], box: Part | None = None) -> None:
        plural = doc["kind"].lower() + "s"
        async with self.api(box) as client:
            answer = await client.put(f"/{plural}/{doc['metadata']['name']}", json=doc)
            if answer.status_code == 404:
                answer = await client.post(f"/{plural}", json=doc)
            assert answer.status_code < 300, answer.text

    async def readings(self) -> list[int]:
        async with self.api() as client:
            answer = await client.get("/streams/line1", params={"from": "0"})
            return [json.loads(line)["payload"]["id"] for line in answer.text.splitlines()]

    # -- what both releases must do together ---------------------------------------------------------------------

    async def online(self, node: str) -> None:
        async def there() -> bool:
            return bool((await self.get(f"/nodes/{node}"))["status"]["online"])

        await self.until(f"{node} is online", there)

    async def join(self, node: str, part: Part, release: Path, site: str = "plant") -> None:
        async with self.api() as client:
            issued = await client.post("/issue/jointoken", json={"node": node, "site": site})
            assert issued.status_code < 300, issued.text
        argv = [sys.executable, "-m", "edgeward", "join", issued.json()["token"], "--data", str(part.directory)]
        done = await asyncio.to_thread(
            subprocess.run, [*argv, "--enrol-only"], capture_output=True, text=True, env=environment(release),
            cwd=self.folder, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        part.start(release)
        await self.up(part)
        await self.online(node)

    async def runs(self, name: str) -> int:
        async def pid() -> int:
            found = [i for i in (await self.get(f"/apps/{name}"))["status"]["instances"] if i["node"] == "box"]
            return int(found[0]["pid"]) if found[0]["phase"] == "Running" and not found[0].get("stale") else 0

        return int(await self.until(f"{name} runs", pid))

    async def begin(self) -> None:
        """The system as the previous release leaves it."""
        await self.link()
        assert self.relay is not None
        config = {"port": self.port, "urls": [f"https://127.0.0.1:{self.relay.port}"]}
        (self.hub.directory / "hub.json").write_text(json.dumps(config))
        self.hub.start(self.old)
        await self.up(self.hub)
        where = subprocess.run(
            [sys.executable, "-c", "import edgeward; print(edgeward.__file__)"],
            capture_output=True, text=True, env=environment(self.old), cwd=self.folder,
        )  # fmt: skip
        assert str(self.old) in where.stdout, "the previous release is what runs"
        for site in ("plant", "shop"):
            await self.put(document("Site", site, {}))
        await self.join("box", self.box, self.old)
        export = {"from": {"mqtt": "sensors/#"}, "to": {"hub": {"stream": "line1"}}, "identity": "$.id"}
        await self.put(document("Export", "line1", export))
        for rule in ("cloud", "edge"):
            await self.put(app(f"by-{rule}", "1s", rule))

        async def taken() -> bool:
            return "box" in (await self.get("/exports/line1"))["status"]["nodes"]

        await self.until("the export is taken up", taken)
        state = self.box.state
        self.publisher = Publisher(state["mqtt_url"], state["mqtt_user"], state["mqtt_password"], rate=50)
        self.publisher.start()
        await self.put(app("steady"))
        self.pid = await self.runs("steady")

    async def works(self, stage: int) -> None:
        """An app comes up, a cut is lived through, both sides' changes are decided, readings arrive."""
        await self.put(app(f"made-{stage}"))
        await self.runs(f"made-{stage}")
        assert await self.runs("steady") == self.pid, "what ran goes on running"
        here, there = f"{stage}1s", f"{stage}2s"
        port = await self.cut()
        for rule in ("cloud", "edge"):
            await self.put(app(f"by-{rule}", here, rule), self.box)
            await self.put(app(f"by-{rule}", there, rule))
        await self.put(app(f"local-{stage}"), self.box)
        await self.link(port)
        wanted = {"by-cloud": there, "by-edge": here}

        async def decided() -> bool:
            for box in (None, self.box):
                found = {n: (await self.get(f"/apps/{n}", box))["spec"]["restart"]["backoff"] for n in wanted}
                if found != wanted:
                    return False
            return True

        await self.until("both sides have what the rules say", decided)
        journal = (await self.get("/journal"))["items"]
        lost = {(j["name"], j["loser"], j["lost"]["spec"]["restart"]["backoff"]) for j in journal if j.get("loser")}
        assert {("by-cloud", "edge", here), ("by-edge", "cloud", there)} <= lost
        await self.runs(f"local-{stage}")
        await self.arrived()

    async def arrived(self) -> None:
        publisher = self.publisher
        assert publisher is not None
        had = publisher.acked_count()

        async def more() -> bool:
            return publisher.acked_count() > had + 20

        await self.until("the broker takes readings", more)
        acked = publisher.acked()

        async def there() -> bool:
            return acked <= set(await self.readings())

        await self.until("every acknowledged reading is at the hub", there)
        got = await self.readings()
        assert len(got) == len(set(got)), "none twice"
        assert got == sorted(got), "in order"

    async def upgrade(self, part: Part, program: str = "") -> None:
        part.stop()
        part.start(NEW, program)
        await self.up(part)
        await self.online("box")

    def end(self) -> None:
        if self.publisher is not None:
            self.publisher.end()
        for part in reversed(self.parts):
            part.close()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["hub", "agent"])
def test_one_side_after_the_other(first: str, tmp_path: Path) -> None:
    async def body() -> None:
        world = World(tmp_path)
        try:
            await world.begin()
            await (hub_first if first == "hub" else agent_first)(world)
        finally:
            await asyncio.to_thread(world.end)
            if world.relay is not None:
                await world.relay.close()

    asyncio.run(body())


async def hub_first(world: World) -> None:
    await world.upgrade(world.hub, LATER)
    # kinds that the old agent does not know go past it; it is said at the node
    await world.put(document("Gadget", "g", {"text": "x"}))
    await world.put(document("Route", "news", {"path": "/news/", "to": {"upstream": "http://127.0.0.1:9"}}))
    code = {"inline": "def handler(event, context):\n    return 1\n"}
    await world.put(document("Function", "f", {"runtime": "python", "source": code, "placement": {"site": "shop"}}))
    later = {"box": ["Gadget/g", "Route/news"], "second": ["Function/f", "Gadget/g", "Route/news"]}
    second = Part(world.folder / "second", "edgeward.agent")
    world.parts.append(second)
    await world.join("second", second, world.old, "shop")
    await world.works(1)

    async def told(node: str) -> bool:
        return (await world.get(f"/nodes/{node}"))["status"].get("notTold") == later[node]

    for node in later:
        await world.until(f"what {node} is not told", lambda node=node: told(node))
    await world.upgrade(world.box)
    # this release's agent is told; one kind it does not know either, says so, and goes on
    await world.works(2)

    async def strange() -> bool:
        status = (await world.get("/nodes/box"))["status"]
        events = (await world.get("/events"))["items"]
        seen = {(e["reason"], e["resource"]) for e in events}
        return (
            status.get("notUnderstood") == ["Gadget/g"]
            and not status.get("notTold")
            and ("NotUnderstood", "Gadget/g") in seen
        )

    await world.until("what the box does not understand", strange)


async def agent_first(world: World) -> None:
    await world.upgrade(world.box)
    second = Part(world.folder / "second", "edgeward.agent")
    world.parts.append(second)
    await world.join("second", second, NEW, "shop")
    await world.works(1)
    await world.upgrade(world.hub)
    await world.works(2)
