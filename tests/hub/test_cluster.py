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
import pytest

from edgeward.core.errors import EdgewardError, Invalid, Refused
from edgeward.core.natsserver import free_port
from edgeward.core.proc import find_by_env
from edgeward.hub.cluster import Member, check_members, config_of, parse_member, prepare

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
        for process in cloud.hubs.values():
            process.start()
        async with cloud.client() as client:

            async def ready(name: str) -> bool:
                return (await client.get(cloud.urls[name].replace("/api/v1", "/readyz"))).status_code == 200

            for name in ("a", "b"):
                await cloud.until(f"{name} is ready", lambda name=name: ready(name))
            # a node joins by one process and is seen by the other
            await client.post(
                f"{cloud.urls['a']}/sites",
                json={"apiVersion": "edgeward/v1", "kind": "Site", "metadata": {"name": "s"}},
            )
            issued = await client.post(f"{cloud.urls['a']}/issue/jointoken", json={"node": "n1", "site": "s"})
            assert issued.status_code < 300, issued.text
            agent = Process(tmp_path / "n1", "edgeward.agent")
            agent.directory.mkdir()
            from edgeward.nodes.enrol import decode_token
            from edgeward.nodes.enrol_edge import join

            await asyncio.to_thread(join, agent.directory, decode_token(issued.json()["token"]))
            cloud.agents.append(agent)
            agent.start()

            async def online(name: str) -> bool:
                node = (await client.get(f"{cloud.urls[name]}/nodes/n1")).json()
                return bool(node.get("status", {}).get("online"))

            for name in ("a", "b"):
                await cloud.until(f"the node is online at {name}", lambda name=name: online(name))

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
                    await cloud.until(f"{victim} is back", lambda victim=victim: ready(victim))
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


async def _grown(items: list[int], size: int) -> bool:
    return len(items) >= size


async def _state(process: Process) -> bool:
    return bool(process.state.get("ready"))
