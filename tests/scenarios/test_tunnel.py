"""The tunnel of a running system: ports of a node from the cloud's side, who may, what is recorded, what flaps."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.scenarios.conftest import System

from edgeward.core.errors import EdgewardError, Forbidden, Refused, Unreachable
from edgeward.tunnel.client import Target, Tunnel, connect, tunnel
from edgeward.tunnel.link import Way, dial

PATIENT = 60.0
NODE = "plant-1"


class Digests:
    """A TCP server that reads to the end, answers with the SHA-256 of what came, and only then ends its side."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family)
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                taken, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(taken,), daemon=True).start()

    @staticmethod
    def _serve(taken: socket.socket) -> None:
        with taken, contextlib.suppress(OSError):
            digest = hashlib.sha256()
            while data := taken.recv(65536):
                digest.update(data)
            taken.sendall(digest.digest())

    def close(self) -> None:
        self.listener.close()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    made = System(tmp_path_factory.mktemp("tunnel") / "up", "up")
    yield made
    made.close()


@pytest.fixture
def digests() -> Iterator[Digests]:
    made = Digests()
    yield made
    made.close()


class Opened:
    """`edgeward tunnel open`, until the block ends."""

    def __init__(self, system: System, *args: str) -> None:
        env = {**os.environ, "EDGEWARD_CONTEXT": str(system.data / "context.json")}
        argv = [sys.executable, "-m", "edgeward", "tunnel", "open", *args]
        self.process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Opened:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), self.process.stderr.read()
        host, _, port = line.removeprefix("listening on ").strip().rpartition(":")
        self.address = (host.strip("[]"), int(port))
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=PATIENT)
        assert self.process.returncode == 0, err


def digest_over(address: tuple[str, int], data: bytes) -> bytes:
    """Sends, ends its side, and reads the answer: by half-close both ways."""
    with socket.create_connection(address, timeout=PATIENT) as s:
        s.settimeout(PATIENT)
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        got = b""
        while piece := s.recv(4096):
            got += piece
        return got


def target(system: System, token: str = "") -> Target:
    context = system.context
    parts = urlsplit(context["hub_url"])
    tls = ssl.create_default_context(cafile=context["ca_file"])
    return Target(Way(str(parts.hostname), parts.port or 443, tls), token or context["token"])


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    async def timed() -> Any:
        async with asyncio.timeout(PATIENT):
            return await body()

    return asyncio.run(timed())


def audit(system: System) -> list[dict[str, Any]]:
    items = json.loads(system.run("audit", "-o", "json"))
    return [r for r in (items["items"] if isinstance(items, dict) else items) if r["verb"] == "tunnel"]


def test_a_port_of_the_node_is_carried_both_ways_and_every_use_is_recorded(system: System, digests: Digests) -> None:
    data = os.urandom(3_000_000)
    with Opened(system, NODE, str(digests.port), "--listen", "127.0.0.1:0") as opened:
        assert digest_over(opened.address, data) == hashlib.sha256(data).digest()
        assert digest_over(opened.address, b"") == hashlib.sha256(b"").digest()
    use = f"tcp:{digests.port}"

    def recorded() -> list[dict[str, Any]]:
        return [r for r in audit(system) if r.get("detail", {}).get("use") == use and r["outcome"] == "ended"]

    (end,) = system.wait("the end's record", recorded)
    assert (end["actor"], end["kind"], end["name"]) == ("admin", "Node", NODE)
    assert (end["detail"]["streams"], end["detail"]["bytesToNode"], end["detail"]["bytesFromNode"]) == (
        2,
        3_000_000,
        64,
    )
    assert [r["outcome"] for r in audit(system) if r.get("detail", {}).get("use") == use] == ["opened", "ended"]


def test_many_connections_at_once_and_one_that_nobody_reads(system: System, digests: Digests) -> None:
    async def body() -> None:
        async with tunnel(target(system), NODE) as made:
            stuck = made.open("tcp", {"port": digests.port})
            stuck.send(bytes(2_000_000))  # and its digest is never read: it never ends its side

            async def one(n: int) -> None:
                stream = made.open("tcp", {"port": digests.port})
                data = bytes([n]) * 200_000
                await stream.write(data)
                stream.end()
                assert await stream.readexactly(32) == hashlib.sha256(data).digest()
                assert await stream.read() == b""

            async with asyncio.TaskGroup() as group:
                for n in range(40):
                    group.create_task(one(n))

    run(body)


def test_a_port_where_nothing_listens_and_a_machine_behind_the_node_are_refused_in_words(system: System) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def body() -> None:
        with pytest.raises(Unreachable, match="nothing answers at port"):
            async with connect(target(system), NODE, "tcp", {"port": port}):
                pass
        with pytest.raises(Forbidden, match=r"own policy does not let tcp:192\.0\.2\.1:80 through"):
            async with connect(target(system), NODE, "tcp", {"host": "192.0.2.1", "port": 80}):
                pass
        with pytest.raises(Refused, match="serves no nonsense"):
            async with connect(target(system), NODE, "nonsense", {}):
                pass
        with pytest.raises(EdgewardError, match="not found"):
            async with tunnel(target(system), "nobody"):
                pass

    run(body)


def token_of(system: System, role: str, *verbs: str) -> str:
    rules = [{"verbs": list(verbs), "kinds": ["Node"]}]
    system.apply({"kind": "Role", "metadata": {"name": role}, "spec": {"rules": rules}})
    out = system.run("token", "create", "--role", role, "--ttl", "1h", "-o", "json")
    return str(json.loads(out)["token"])


def test_a_role_may_use_what_it_names_and_a_refusal_is_recorded(system: System, digests: Digests) -> None:
    other = Digests()
    narrow = token_of(system, "narrow", "get", f"tunnel:tcp:{digests.port}")
    viewer = json.loads(system.run("token", "create", "--role", "viewer", "--ttl", "1h", "-o", "json"))["token"]

    async def body() -> None:
        async with tunnel(target(system, narrow), NODE) as made:
            stream = made.open("tcp", {"port": digests.port})
            stream.end()
            assert await stream.readexactly(32) == hashlib.sha256(b"").digest()
            for service, args in (
                ("tcp", {"port": other.port}),
                ("tcp", {"port": digests.port, "host": "10.0.0.1"}),
                ("http", {"port": digests.port}),
                ("reverse", {"port": 0}),
                ("exec", {"argv": ["id"]}),
            ):
                with pytest.raises(Forbidden, match=r"narrow.* may not tunnel Node plant-1"):
                    await made.open(service, args).opened()
        with pytest.raises(Forbidden):
            async with tunnel(target(system, viewer), NODE):
                pass
        with pytest.raises(EdgewardError, match="token is wrong"):
            async with tunnel(target(system, "ew_narrow_" + "x" * 43), NODE):
                pass

    run(body)
    other.close()
    refused = [r for r in audit(system) if r["outcome"].startswith("Forbidden")]
    assert any(f"for tcp:{other.port}" in r["outcome"] for r in refused)
    assert any("viewer" in r["outcome"] for r in refused)


def test_a_role_that_loses_the_port_ends_its_running_connections(system: System, digests: Digests) -> None:
    both = token_of(system, "both", "get", "tunnel")

    async def body() -> None:
        async with tunnel(target(system, both), NODE) as made:
            stream = made.open("tcp", {"port": digests.port})
            await stream.opened()
            await asyncio.to_thread(token_of, system, "both", "get", "tunnel:tcp:1")
            with pytest.raises(Forbidden, match="your role has changed"):
                await stream.read()
            assert made.session.error is None  # there is something left that it may
            system.run("delete", "role", "both")
            await made.ended.wait()
            assert isinstance(made.session.error, Forbidden)

    run(body)


def test_a_port_of_the_node_that_leads_here(system: System, digests: Digests) -> None:
    with Opened(system, NODE, "0", "--reverse", f"127.0.0.1:{digests.port}") as opened:
        data = os.urandom(500_000)
        assert digest_over(opened.address, data) == hashlib.sha256(data).digest()
    with pytest.raises(OSError):
        digest_over(opened.address, b"")


def test_ipv6_at_both_ends(system: System) -> None:
    try:
        six = Digests("::1")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with Opened(system, NODE, str(six.port), "--listen", "[::1]:0") as opened:
        assert opened.address[0] == "::1"
        assert digest_over(opened.address, b"six") == hashlib.sha256(b"six").digest()
    six.close()


def test_a_stranger_does_not_pass_for_a_node_and_garbage_ends_only_its_own_session(
    system: System, digests: Digests
) -> None:
    way = target(system).way

    async def body() -> None:
        forged = {
            "Edgeward-Node": NODE,
            "Edgeward-Session": "f" * 32,
            "Edgeward-Nonce": "x",
            "Edgeward-Attempt": "0",
            "Edgeward-Received": "0",
            "Edgeward-Signature": "AAAA",
        }
        with pytest.raises(Forbidden, match="signature is wrong"):
            await dial(way, "/tunnel", forged)
        with pytest.raises(Refused, match="is a WebSocket"):
            await asyncio.to_thread(_plain_get, system)
        async with tunnel(target(system), NODE) as good:
            bad = Tunnel(target(system), NODE)
            await bad.connect()
            assert bad.session.link is not None
            bad.session.link.send([b"\xee" * 64])
            await bad.ended.wait()
            assert isinstance(bad.session.error, Refused)
            stream = good.open("tcp", {"port": digests.port})
            stream.end()
            assert await stream.readexactly(32) == hashlib.sha256(b"").digest()

    run(body)


def _plain_get(system: System) -> None:
    from edgeward.cli.client import Api

    context = system.context
    with Api(context["hub_url"], token=context["token"], ca_file=context["ca_file"]) as api:
        api.request("GET", f"/api/v1/nodes/{NODE}/tunnel")


def test_the_end_of_a_node_is_the_end_of_its_tunnel(system: System, digests: Digests) -> None:
    """The last test with this system: its node does not come back."""

    async def body() -> None:
        async with tunnel(target(system), NODE) as made:
            stream = made.open("tcp", {"port": digests.port})
            await stream.opened()
            await asyncio.to_thread(system.run, "node", "revoke", NODE)
            with pytest.raises(EdgewardError, match=r"revoked|not connected|another box"):
                await stream.read()
        with pytest.raises(EdgewardError):
            async with connect(target(system), NODE, "tcp", {"port": digests.port}):
                pass

    run(body)


def test_a_connection_goes_on_over_a_link_that_was_cut_and_new_ones_after_the_agent_died(
    lab: Callable[[str], System], digests: Digests
) -> None:
    system = lab("sites: [{name: plant, nodes: 1, link: 4g}]")
    data = os.urandom(400_000)
    with (
        Opened(system, NODE, str(digests.port)) as opened,
        socket.create_connection(opened.address, timeout=PATIENT) as s,
    ):
        s.sendall(data)
        system.run("lab", "cut", "plant")
        s.sendall(data)
        system.wait("the node to be missed", lambda: not system.get("node", NODE)["status"]["online"])
        system.run("lab", "heal", "plant")
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        assert s.recv(4096) == hashlib.sha256(data * 3).digest()
        # the agent is killed: what went over it is reset, and the next connection is served by its next run
        with socket.create_connection(opened.address, timeout=PATIENT) as held:
            held.sendall(b"x")
            system.run("lab", "kill", NODE)
            system.run("lab", "start", NODE)
            system.wait("the node is there", lambda: system.get("node", NODE)["status"]["online"])

            def served() -> bool:
                with contextlib.suppress(OSError):
                    return digest_over(opened.address, b"again") == hashlib.sha256(b"again").digest()
                return False

            system.wait("a new connection is served", served)
            with contextlib.suppress(ConnectionResetError):
                assert held.recv(4096) == b""


def test_help_names_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeward", "tunnel", "open", "--help"], capture_output=True, text=True
    )
    assert "listening on ADDRESS" in done.stdout
