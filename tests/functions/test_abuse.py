"""Harm, tried in every tier: contained, named, and a sibling in the same tier does not even notice.

Where this machine cannot enforce what stands against it, the check is left out, as the function's status says.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.core.pair import until
from tests.functions.node import Node, function, looped

from edgeward.core.invocation import CallFailed
from edgeward.functions.versions import Config

WORKERS = Path(__file__).with_name("workers")
PIDS = 16


def _spec(tier: str) -> dict[str, Any]:
    text = {end: (WORKERS / f"abuse.{end}").read_text() for end in ("py", "mjs", "pl", "sh")}
    # the worker of the conformance suite, but for its handler
    head, rest = (WORKERS / "worker.pl").read_text().split("sub handler {", 1)
    text["pl"] = head + text["pl"] + "sub result {" + rest.split("sub result {", 1)[1]
    return {
        "python": {"runtime": "python", "source": {"inline": text["py"]}},
        "node": {"runtime": "node", "source": {"inline": text["mjs"]}},
        "worker": {"runtime": "command", "source": {"files": {"w.pl": text["pl"]}}, "command": ["perl", "w.pl"]},
        "stdio": {"runtime": "command", "source": {"inline": text["sh"]}, "mode": "stdio"},
    }[tier]


def _function(tier: str, name: str, **more: Any) -> Config:
    limits = {"timeout": "60s", "memory": "96Mi", "pids": PIDS, "body": "1Mi"}
    return function(name, "", **_spec(tier), limits=limits, scale={"max": 1, "min": 1}, **more)


async def _kind(node: Node, what: str, timeout: float = 60) -> str:
    """How a call that does harm ends: the kind of its failure, or ``answer: ...``."""
    try:
        reply = await node.call("bad", what.encode(), timeout=timeout)
    except CallFailed as e:
        assert e.function == "default/bad" and e.message
        return e.kind
    return f"answer: {reply.body[:60].decode()}"


@pytest.mark.parametrize("tier", ["python", "node", "worker", "stdio"])
def test_harm_is_contained_and_named_and_siblings_do_not_notice(tmp_path: Path, tier: str) -> None:
    needed = {"node": "node", "worker": "perl", "stdio": "perl"}.get(tier)
    if needed and shutil.which(needed) is None:
        pytest.skip(f"there is no {needed} on this machine (scripts/system-packages.sh)")
    _harm(tmp_path, tier)


@looped
async def _harm(tmp_path: Path, tier: str) -> None:
    async with Node(tmp_path / "data") as node:
        node.d.configure([_function(tier, "bad"), _function(tier, "good")])
        await node.phase("bad", "Running")
        await node.phase("good", "Running")
        held = set(node.status("bad")["enforced"])
        if tier == "stdio" and "pids" not in held:
            pytest.skip("no groups here, so there is no mode stdio")
        sibling = (await node.call("good", b"pid")).body

        if "memory" in held:
            assert await _kind(node, "memory") == "memory"
        assert await _kind(node, "loop", 0.5) == "timeout"
        assert await _kind(node, "kill") == "crashed"
        assert await _kind(node, "huge") in ("memory", "too-large")
        if "pids" in held:
            ended = await _kind(node, "fork")
            if ended.startswith("answer: ") and tier != "stdio":
                assert int(ended.removeprefix("answer: ")) < PIDS
            else:  # what could not be started took the worker with it
                assert ended.removeprefix("answer: ") in ("", "memory", "crashed", "error", "timeout")
        await _reaches_nothing(node, tmp_path, held, int(sibling))
        # the bomb's children go with their instance, and the next call has an instance that is whole
        await until(lambda: _answers(node, "bad"), 60)
        assert (await node.call("good", b"pid")).body == sibling, "it was never ended"
        assert node.d.counters()["default/good"]["failed"] == {}
        assert {"timeout", "crashed"} <= set(node.d.counters()["default/bad"]["failed"])


async def _answers(node: Node, name: str) -> bool:
    try:
        return (await node.call(name, b"pid", timeout=30)).status == 200
    except CallFailed:
        return False


async def _reaches_nothing(node: Node, tmp_path: Path, held: set[str], sibling: int) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of another")
    secret.chmod(0o644)
    got: list[bytes] = []

    class Listener(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            got.append(data)

    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(lambda r, w: got.append(b"connected"), "127.0.0.1", 0)
    udp, _ = await loop.create_datagram_endpoint(Listener, local_addr=("127.0.0.1", 0))
    try:
        tries = {
            "files": [
                f"read {secret}", f"read /proc/{sibling}/environ", f"read /proc/{os.getpid()}/environ",
                "read /etc/passwd", f"write {secret}", f"write {tmp_path}/new",
                "write /var/tmp/edgeward-abuse", "write /dev/shm/edgeward-abuse",
            ],
            "network": [
                f"tcp {server.sockets[0].getsockname()[1]}", f"udp {udp.get_extra_info('sockname')[1]}",
            ],
            "signals": [f"signal {sibling}"],
        }  # fmt: skip
        if os.geteuid() != 0:
            tries[
                "signals"
            ] = []  # it is the agent's user: only Landlock stands between, and the test's own parent would go
        for promise, whats in tries.items():
            for what in whats if promise in held else []:
                ended = await _kind(node, what)
                assert ended.startswith("answer: refused"), (what, ended)
        assert got == [] and secret.read_text() == "of another"
    finally:
        server.close()
        udp.close()


@pytest.mark.parametrize("tier", ["python", "node", "command"])
def test_code_that_hangs_while_it_is_loaded_is_ended_and_named(tmp_path: Path, tier: str) -> None:
    if tier == "node" and shutil.which("node") is None:
        pytest.skip("there is no node on this machine (scripts/system-packages.sh)")
    _hangs(tmp_path, tier)


@looped
async def _hangs(tmp_path: Path, tier: str) -> None:
    code = {
        "python": "while True: pass",
        "node": "for (;;);\nexport {};",
        "command": "#!/bin/sh\nwhile :; do :; done\n",
    }[tier]
    async with Node(tmp_path) as node:
        node.d.configure([function("f", code, runtime=tier, limits={"startup": "300ms"})])
        await until(lambda: "did not load within 0.3 s" in node.status("f").get("message", ""), 60)
        assert node.status("f")["phase"] == "Failed"


@looped
async def test_programs_end_when_the_zygote_does(tmp_path: Path) -> None:
    """They are not its forks any more, but the kernel still ties their lives to it."""
    async with Node(tmp_path) as node:
        node.d.configure([function("f", "#!/bin/sh\necho $PPID\nsleep 0\n", runtime="command", mode="stdio"),
                          *([_function("node", "g")] if shutil.which("node") else [])])  # fmt: skip
        pids = []
        if "pids" not in (await node.d.probe()).enforced and not shutil.which("node"):
            pytest.skip("nothing to look at here")
        if "pids" in node.d.probed.enforced:  # type: ignore[union-attr]
            pids.append(int((await node.call("f")).body))
        if shutil.which("node"):
            pids.append(int((await node.call("g", b"pid")).body))
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        os.kill(node.d.nursery.pid, 9)
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60)
