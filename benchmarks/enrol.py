"""Enrolment: a thousand boxes from one batch, and how long a revoked one stays connected.

The batch's peer is the `openssl` program making as many keys, requests and certificates: what a shop without enrolment
would script. Revocation's is the same nats-server told by a reload of its configuration, with as many accounts in it.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import PYTHON, Row, row, system
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError
from edgeward.core.identity import HubIdentity, NodeIdentity, inbox_prefix
from edgeward.core.natsserver import AGENT_USER, HubSpec, NatsServer, NodeSpec
from edgeward.hub.front import Links, front_protocol
from edgeward.nodes.enrol import decode_token
from edgeward.nodes.enrol_edge import join

BOXES = 1000
AT_ONCE = 8
REVOKED = 20


def enrol() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder, system("up") as up:
        root = Path(folder)
        api = up.api()
        api.call("POST", "/api/v1/sites", {"apiVersion": "edgeward/v1", "kind": "Site", "metadata": {"name": "s"}})
        (root / "boxes").write_text("".join(f"b-{n} s\n" for n in range(BOXES)))
        cli = [PYTHON, "-m", "edgeward", "--context", str(up.data / "context.json")]
        made = subprocess.run(
            [*cli, "token", "create", "--batch", str(root / "boxes")], stdout=subprocess.PIPE, check=True
        )
        (root / "tokens").write_bytes(made.stdout)
        began = time.monotonic()
        joining = [PYTHON, "-m", "edgeward", "join", "--batch", str(root / "tokens"), "--data", str(root / "fleet")]
        done = subprocess.run([*joining, "--at-once", str(AT_ONCE)], stdout=subprocess.PIPE, check=True)
        took = time.monotonic() - began
        assert done.stdout.count(b" joined") == BOXES
        revoked = asyncio.run(_revocations(api, up.context["hub_url"], root / "cut"))
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder:
        by_reload = asyncio.run(_by_reload(Path(folder)))
    return [
        row(f"{BOXES} joins from one batch", took, "s", 60.0, base=("openssl, as many certificates", _openssl())),
        row(
            f"revoked to cut off, among {BOXES}, worst of {REVOKED}", max(revoked), "s", 2.0,
            base=("by a reload of nats-server, worst of 5", max(by_reload)),
        ),
    ]  # fmt: skip


def _openssl() -> float:
    """Seconds for as many keys, requests and certificates by the program, as many at once."""
    program = shutil.which("openssl")
    if program is None:
        return 0.0
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder:
        ca = [
            program,
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            "/CN=ca",
        ]
        subprocess.run([*ca, "-keyout", "ca.key", "-out", "ca.crt"], cwd=folder, check=True, capture_output=True)

        def one(n: int) -> None:
            ask = [program, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
            ask += ["-subj", f"/CN=b-{n}", "-keyout", f"{n}.key", "-out", f"{n}.csr"]
            sign = [program, "x509", "-req", "-in", f"{n}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-out", f"{n}.crt"]
            sign += ["-set_serial", str(n + 2), "-days", "90"]
            for argv in (ask, sign):
                subprocess.run(argv, cwd=folder, check=True, capture_output=True)

        began = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one, range(BOXES)))
        return time.monotonic() - began


async def _answered(bus: Bus, node: str) -> bool:
    try:
        await bus.request(f"ew.hub.beat.{node}", b"", timeout=0.25)
    except EdgewardError:
        return False
    return True


async def _until(what: Any, wanted: bool) -> None:
    async with asyncio.timeout(30):
        while await what() is not wanted:  # noqa: ASYNC110 - another process is looked at
            await asyncio.sleep(0.001)


async def _leaf(directory: Path, node: str, url: str) -> tuple[NatsServer, Bus]:
    identity = NodeIdentity.open(directory / "identity")
    server = NatsServer(directory / "nats", NodeSpec(node, url, identity.creds_file, identity.trust_file))
    await server.start()
    bus = await Bus.connect(
        server.url, name=node, username=AGENT_USER, password=server.secret, inbox=inbox_prefix(node)
    )
    await _until(lambda: _answered(bus, node), True)
    return server, bus


async def _revocations(api: Any, hub_url: str, folder: Path) -> list[float]:
    """From the call until the node's own server has no way to the hub any more."""
    times = []
    for n in range(REVOKED):
        node = f"cut-{n}"
        got = await asyncio.to_thread(api.call, "POST", "/api/v1/issue/jointoken", {"node": node, "site": "s"})
        await asyncio.to_thread(join, folder / node, decode_token(got["token"]))
        server, bus = await _leaf(folder / node, node, hub_url.replace("https", "wss"))
        began = time.monotonic()
        await asyncio.to_thread(api.call, "POST", f"/api/v1/nodes/{node}/revoke")
        await _until(lambda bus=bus, node=node: _answered(bus, node), False)
        times.append(time.monotonic() - began)
        await bus.close()
        await server.stop()
    return times


class InMemory(HubSpec):
    """The server's plainest resolver: every account in the configuration file."""

    def settings(self, directory: Path, ports: Mapping[str, int], secret: str) -> dict[str, Any]:
        return {**super().settings(directory, ports, secret), "resolver": "MEMORY"}


async def _by_reload(folder: Path) -> list[float]:
    identity = HubIdentity.open(folder / "identity")
    boxes = [NodeIdentity.open(folder / f"cut-{n}" / "identity") for n in range(5)]
    for n in range(BOXES):
        identity.issue_node(f"b-{n}", boxes[0].public_key)
    for n, box in enumerate(boxes):
        box.accept(identity.issue_node(f"cut-{n}", box.public_key), identity.ca_pem)

    def spec() -> HubSpec:
        return InMemory(identity.operator_jwt, identity.system_account, identity.accounts)

    server = NatsServer(folder / "nats", spec())
    await server.start()
    hub = await Bus.connect(server.url, name="hub", user=identity.user)

    async def answer(_: Any) -> bytes:
        return b"x"

    await hub.serve("ew.hub.>", answer)
    links = Links(lambda: ("127.0.0.1", server.ports["websocket"]))

    from edgeward.core import daemon

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        return None

    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    tls = str(identity.tls_file)
    times = []
    async with daemon.http_server(
        nothing, host="127.0.0.1", port=port, ssl_certfile=tls, ssl_keyfile=tls, http=front_protocol(links)
    ):
        for n, box in enumerate(boxes):
            leaf, bus = await _leaf(folder / f"cut-{n}", f"cut-{n}", f"wss://127.0.0.1:{port}")
            began = time.monotonic()
            identity.revoke_node(f"cut-{n}", box.public_key)
            await server.apply(spec())
            await _until(lambda bus=bus, n=n: _answered(bus, f"cut-{n}"), False)
            times.append(time.monotonic() - began)
            await bus.close()
            await leaf.stop()
        links.close()
    await hub.close()
    await server.stop()
    return times
