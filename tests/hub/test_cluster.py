"""A hub of three servers: its folders, and that two processes serve one fleet while any one is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Invalid, Refused
from edgeward.core.identity import HubIdentity
from edgeward.core.natsserver import free_port
from edgeward.core.proc import find_by_env
from edgeward.hub.cluster import Member, check_members, config_of, parse_member, prepare
from edgeward.nodes.enrol import decode_token
from edgeward.nodes.enrol_edge import join
from edgeward.nodes.wire import Ok, ReportAsk, Status

A, B = Member("a", "10.0.0.1", 443, 7422), Member("b", "10.0.0.2", 443, 7422)
C = Member("c", "10.0.0.3", 0, 7422, witness=True)


def test_members_are_read_and_checked() -> None:
    assert parse_member("a=10.0.0.1:443:7422") == A
    assert parse_member("c=10.0.0.3:7422", witness=True) == C
    for bad in ("a", "a=", "a=h:1", "a=h:1:x", "a=h:0:1", "a=h:70000:1", "A=h:1:2"):
        with pytest.raises(Invalid):
            parse_member(bad)
    check_members([A, B, C])
    for members, why in (
        ([A, B], "3 servers, these are 2"),
        ([A, B, B], "one name"),
        ([A, B, Member("d", "10.0.0.1", 444, 7422)], "one address"),
        ([A, C, Member("d", "10.0.0.4", 0, 7422, witness=True)], "only one of them serves"),
    ):
        with pytest.raises(Invalid, match=why):
            check_members(members)


def test_each_has_the_same_keys_and_its_own_place(tmp_path: Path) -> None:
    made = prepare(tmp_path, [A, B, C])
    docs = [json.loads((d / "hub.json").read_text()) for d in made]
    assert docs[1] == config_of(B, [A, B, C], "")
    assert docs[1]["urls"] == ["https://10.0.0.2:443", "https://10.0.0.1:443"]
    assert docs[2]["witness"] and docs[2]["cluster"]["routes"] == ["10.0.0.1:7422", "10.0.0.2:7422"]
    for name in ("nats.json", "ca.crt", "vault.key", "admin.token"):
        assert len({(d / "identity" / name).read_bytes() for d in made}) == 1, name
    assert all(stat.S_IMODE(f.stat().st_mode) & 0o077 == 0 for d in made for f in d.rglob("*.key"))
    with pytest.raises(Refused, match="not empty"):
        prepare(tmp_path, [A, B, C])


class Process:
    """One of the hub's, or a node's agent."""

    def __init__(self, directory: Path, module: str) -> None:
        self.directory, self.module = directory, module
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [sys.executable, "-m", self.module, "--data", str(self.directory)]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    @property
    def state(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            doc: dict[str, Any] = json.loads((self.directory / "run.json").read_text())
            return doc
        return {}

    def kill(self) -> None:
        """Its nats-server too (and a node's plane), as a machine's end does."""
        of_node = [p.pid for p in find_by_env("EDGEWARD_DATA", str(self.directory))]
        for pid in (self.process.pid if self.process else None, self.state.get("nats"), *of_node):
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait(20)
        (self.directory / "run.json").unlink(missing_ok=True)

    def close(self) -> None:
        self.kill()


class Cloud:
    """Two processes that serve, a witness, and calls to either."""

    def __init__(self, root: Path) -> None:
        ports = [free_port()]
        for _ in range(4):
            ports.append(free_port(taken=ports))
        members = [
            Member("a", "127.0.0.1", ports[0], ports[1]),
            Member("b", "127.0.0.1", ports[2], ports[3]),
            Member("c", "127.0.0.1", 0, ports[4], witness=True),
        ]
        self.hubs = {d.name: Process(d, "edgeward.hub") for d in prepare(root, members)}
        self.urls = {m.name: f"https://127.0.0.1:{m.port}/api/v1" for m in members if not m.witness}
        identity = root / "a" / "identity"
        self.token = (identity / "admin.token").read_text().strip()
        self.ca = identity / "ca.crt"
        self.agents: list[Process] = []

    def client(self) -> httpx.AsyncClient:
        import ssl

        context = ssl.create_default_context(cafile=str(self.ca))
        return httpx.AsyncClient(verify=context, headers={"Authorization": f"Bearer {self.token}"}, timeout=8)

    async def begin(self, client: httpx.AsyncClient) -> None:
        """Every process runs, and those that serve are ready."""
        for process in self.hubs.values():
            process.start()
        for name in self.urls:
            await self.until(f"{name} is ready", lambda name=name: self.ready(client, name))

    async def ready(self, client: httpx.AsyncClient, name: str) -> bool:
        return (await client.get(self.urls[name].replace("/api/v1", "/readyz"))).status_code == 200

    async def node(self, client: httpx.AsyncClient, directory: Path) -> Process:
        """A box joins by one process, as n1 of site s; its agent runs, and the other process sees it as well."""
        site = {"apiVersion": "edgeward/v1", "kind": "Site", "metadata": {"name": "s"}}
        await client.post(f"{self.urls['a']}/sites", json=site)
        issued = await client.post(f"{self.urls['a']}/issue/jointoken", json={"node": "n1", "site": "s"})
        assert issued.status_code < 300, issued.text
        agent = Process(directory, "edgeward.agent")
        directory.mkdir()
        await asyncio.to_thread(join, directory, decode_token(issued.json()["token"]))
        self.agents.append(agent)
        agent.start()
        for name in self.urls:
            await self.until(f"the node is online at {name}", lambda name=name: self.online(client, name))
        return agent

    async def online(self, client: httpx.AsyncClient, name: str) -> bool:
        node = (await client.get(f"{self.urls[name]}/nodes/n1")).json()
        return bool(node.get("status", {}).get("online"))

    def logs(self) -> str:
        return "\n".join(f"== {p.directory}\n{p.log.read_text()[-3000:]}" for p in (*self.hubs.values(), *self.agents))

    async def until(self, what: str, ready: Callable[[], Awaitable[Any]], seconds: float = 90) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.HTTPError, EdgewardError):
                if got := await ready():
                    return got
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.logs()}"
            await asyncio.sleep(0.05)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "cloud")
    yield made
    for process in (*made.agents, *made.hubs.values()):
        process.close()


def config(n: int) -> dict[str, Any]:
    return {
        "apiVersion": "edgeward/v1",
        "kind": "Config",
        "metadata": {"name": f"c{n}"},
        "spec": {"data": {"n": str(n)}},
    }


@pytest.mark.slow
def test_any_one_may_die_and_nothing_acknowledged_is_lost(cloud: Cloud, tmp_path: Path) -> None:
    async def body() -> None:
        async with cloud.client() as client:
            await cloud.begin(client)
            await cloud.node(client, tmp_path / "n1")

            async def answers(name: str) -> bool:
                """The node itself, by its link, not what is remembered of it."""
                top = (await client.get(f"{cloud.urls[name]}/top")).json()
                return any(n["name"] == "n1" and n.get("agentMB") for n in top["nodes"])

            acknowledged: list[int] = []
            stop = asyncio.Event()

            async def write() -> None:
                """One write after the other, at whichever process answers; a doubtful one is not counted."""
                n = 0
                while not stop.is_set():
                    for name in ("a", "b"):
                        with contextlib.suppress(httpx.HTTPError):
                            answer = await client.post(f"{cloud.urls[name]}/configs", json=config(n))
                            if answer.status_code == 201:
                                acknowledged.append(n)
                            n += 1

            writing = asyncio.create_task(write())
            for victim in ("a", "c", "b"):
                had = len(acknowledged)
                await cloud.until("writes are taken", lambda had=had: _grown(acknowledged, had + 10))
                cloud.hubs[victim].kill()
                had = len(acknowledged)
                await cloud.until(f"writes without {victim}", lambda had=had: _grown(acknowledged, had + 10))
                if victim != "c":
                    other = "b" if victim == "a" else "a"
                    await cloud.until(f"the node answers without {victim}", lambda other=other: answers(other))
                    revision = (await client.get(f"{cloud.urls[other]}/configs?limit=1")).json()["metadata"]
                    assert int(revision["resourceVersion"]) > 0
                cloud.hubs[victim].start()
                if victim != "c":
                    await cloud.until(f"{victim} is back", lambda victim=victim: cloud.ready(client, victim))
                else:
                    await cloud.until("the witness is back", lambda: _state(cloud.hubs["c"]))
            stop.set()
            await writing
            assert len(acknowledged) > 60
            for name in ("a", "b"):

                async def all_there(name: str = name) -> bool:
                    found: set[str] = set()
                    more = ""
                    while True:
                        page = (await client.get(f"{cloud.urls[name]}/configs", params={"continue": more})).json()
                        found |= {c["metadata"]["name"] for c in page["items"]}
                        more = page["metadata"].get("continue", "")
                        if not more:
                            return {f"c{n}" for n in acknowledged} <= found

                await cloud.until(f"{name} has every acknowledged write", all_there)

    asyncio.run(body())


@pytest.mark.slow
def test_a_leader_that_stood_still_spreads_nothing_of_what_it_knew(cloud: Cloud) -> None:
    """SIGSTOP for longer than the lease: another leads and goes on leading; what waited for the old one is refused."""

    def leads(name: str) -> str:
        said = [
            json.loads(x)["message"] for x in cloud.hubs[name].log.read_text().splitlines() if x.endswith('leads"}')
        ]
        return said[-1] if said else ""

    async def one() -> str:
        names = [n for n in ("a", "b") if leads(n) == "this hub process leads"]
        return names[0] if len(names) == 1 and leads("b" if names[0] == "a" else "a") else ""

    async def node(name: str) -> Bus:
        """A connection as the node's, to the server beside this process; either process may get what it asks."""
        ports = json.loads((cloud.hubs[name].directory / "nats" / "ports.json").read_text())
        identity = HubIdentity.open(cloud.hubs[name].directory / "identity")
        url = f"nats://127.0.0.1:{ports['client']}"
        return await Bus.connect(url, name="n1", user=identity.user, inbox="_INBOX_n1", timeout=60)

    async def report(bus: Bus, phase: str) -> str:
        status = Status("App", "default", "web", {"phase": phase, "instances": [{"node": "n1", "phase": phase}]})
        ask = msgspec.msgpack.encode(ReportAsk([status], False, None, []))
        msg = await bus.request("ew.hub.report.n1", ask, timeout=100)
        return msgspec.msgpack.decode(msg.data, type=Ok).error

    async def body() -> None:
        for process in cloud.hubs.values():
            process.start()
        async with cloud.client() as client:

            async def ready() -> bool:
                urls = [u.replace("/api/v1", "/readyz") for u in cloud.urls.values()]
                return all([(await client.get(u)).status_code == 200 for u in urls])

            async def put(name: str, what: str, doc: dict[str, Any]) -> httpx.Response:
                return await client.put(f"{cloud.urls[name]}/{what}", json={"apiVersion": "edgeward/v1", **doc})

            async def shown(name: str, phase: str) -> bool:
                got = await client.get(f"{cloud.urls[name]}/apps/web")
                instances = got.json()["status"].get("instances") if got.status_code == 200 else None
                return bool(instances and instances[0].get("phase") == phase)

            await cloud.until("both are ready", ready)
            old = await cloud.until("one leads", one)
            new = "b" if old == "a" else "a"
            post = {"kind": "Site", "metadata": {"name": "s"}}, {"kind": "Node", "metadata": {"name": "n1"}}
            app: dict[str, Any] = {"kind": "App", "metadata": {"name": "web"}}
            app["spec"] = {"placement": {"site": "s"}, "process": {"command": ["true"]}}
            config = {"kind": "Config", "metadata": {"name": "c"}, "spec": {"data": {"k": "1"}}}
            for what, doc in (
                ("sites", post[0]),
                ("nodes", {**post[1], "spec": {"site": "s"}}),
                ("apps", app),
                ("configs", config),
            ):
                made = await client.post(f"{cloud.urls[new]}/{what}", json={"apiVersion": "edgeward/v1", **doc})
                assert made.status_code == 201, made.text
            first = made.json()
            bus = await node(new)
            await cloud.until("the first report is taken", lambda: taken(bus, "first"))
            await cloud.until("the first report shows", lambda: shown(old, "first"))

            process = cloud.hubs[old].process
            assert process is not None
            process.send_signal(signal.SIGSTOP)
            try:
                await cloud.until("the other leads", lambda: _is(leads(new), "this hub process leads"))
                waiting: set[asyncio.Task[str]] = set()
                while not waiting:  # NATS gives each to either process; those of the one that stands still wait for it
                    asked = {asyncio.create_task(report(bus, "stale")) for _ in range(8)}
                    await asyncio.wait(asked, timeout=1)
                    while True:
                        newer = asyncio.create_task(report(bus, "newer"))
                        if (await asyncio.wait({newer}, timeout=1))[0]:
                            break
                        asked.add(newer)
                    waiting = {t for t in asked if not t.done()}
                await cloud.until("the newer report shows", lambda: shown(new, "newer"))
                changed = await put(new, "configs/c", {**config, "spec": {"data": {"k": "2"}}})
                assert changed.status_code == 200, changed.text
                terms = cloud.hubs[new].log.read_text().count(' leads"}')
            finally:
                process.send_signal(signal.SIGCONT)
            refused = await put(old, "configs/c", first)
            assert refused.status_code == 409, refused.text
            assert any("stood still" in said for said in await asyncio.gather(*waiting))
            await cloud.until("the old one follows", one_is(new))
            # whoever makes a status now makes it of the newer report
            again = await put(new, "apps/web", {**app, "metadata": {"name": "web", "labels": {"x": "y"}}})
            assert again.status_code == 200, again.text
            await cloud.until("the newest report is taken", lambda: taken(bus, "newest"))
            for name in (old, new):
                await cloud.until("the newest report shows", lambda name=name: shown(name, "newest"))
            assert cloud.hubs[new].log.read_text().count(' leads"}') == terms, "it led all the time"
            await bus.close()

    async def taken(bus: Bus, phase: str) -> bool:
        return not await report(bus, phase)

    def one_is(name: str) -> Callable[[], Awaitable[bool]]:
        async def look() -> bool:
            other = "b" if name == "a" else "a"
            return leads(name) == "this hub process leads" and leads(other).startswith("hub process ")

        return look

    asyncio.run(body())


async def _grown(items: list[int], size: int) -> bool:
    return len(items) >= size


async def _is(one: str, other: str) -> bool:
    return one == other


async def _state(process: Process) -> bool:
    return bool(process.state.get("ready"))
