"""Nothing listens on all interfaces by default: what the kernel says of every process of a running system."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

EVERYWHERE = "0.0.0.0"  # noqa: S104 - looked for, and bound once to see that the look finds it
APP = {
    "kind": "App",
    "metadata": {"name": "web"},
    "spec": {
        "placement": {"site": "plant"},
        "process": {"command": ["python3", "-m", "http.server", "${PORT}", "--bind", "127.0.0.1"]},
        "ports": [{"name": "http", "env": "PORT"}],
        "health": {"http": {"port": "http", "path": "/"}},
    },
}
EXPORT = {
    "kind": "Export",
    "metadata": {"name": "line1"},
    "spec": {"from": {"mqtt": "sensors/#"}, "to": {"hub": {"stream": "line1"}}},
}


class Listener(NamedTuple):
    protocol: str
    address: str
    port: int


def address(text: str) -> str:
    """An address of /proc/net: 32-bit words in the machine's order."""
    raw = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    return str(ipaddress.ip_address(raw))


def sockets_of(pids: set[int]) -> set[str]:
    found = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = str(fd.readlink())
            except OSError:
                continue
            if match := re.fullmatch(r"socket:\[(\d+)\]", target):
                found.add(match[1])
    return found


def by_proc(pids: set[int]) -> set[Listener]:
    inodes = sockets_of(pids)
    found = set()
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{protocol}").read_text().splitlines()[1:]:
            fields = line.split()
            host, port = fields[1].split(":")
            listening = fields[3] == "0A" if protocol.startswith("tcp") else fields[2].endswith(":0000")
            if listening and fields[9] in inodes:
                found.add(Listener(protocol[:3], address(host), int(port, 16)))
    return found


def by_ss(pids: set[int]) -> set[Listener]:
    done = subprocess.run(["ss", "-Hlntup"], capture_output=True, text=True, check=True, timeout=30)
    found = set()
    for line in done.stdout.splitlines():
        fields = line.split()
        if {int(p) for p in re.findall(r"pid=(\d+)", line)} & pids:
            host, _, port = fields[4].rpartition(":")
            host = host.strip("[]").partition("%")[0]
            found.add(Listener(fields[0], EVERYWHERE if host == "*" else host, int(port)))
    return found


def descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from descendants(int(child))


def processes(up: Any) -> set[int]:
    context = up.context
    named = [*context["pids"].values(), *(p for n in context["nodes"] for p in n["pids"].values())]
    roots = {up.process.pid, *(int(p) for p in named if p), *up.processes()}
    return {pid for root in roots for pid in descendants(root)}


def test_the_look_sees_what_is_open_to_all() -> None:
    with socket.create_server((EVERYWHERE, 0)) as server:
        port = server.getsockname()[1]
        assert Listener("tcp", EVERYWHERE, port) in by_proc({os.getpid()})
        if shutil.which("ss"):
            assert Listener("tcp", EVERYWHERE, port) in by_ss({os.getpid()})


@pytest.mark.parametrize("look", [by_proc, by_ss])
def test_nothing_listens_on_all_interfaces(
    systems: Callable[..., Any], look: Callable[[set[int]], set[Listener]]
) -> None:
    if look is by_ss and shutil.which("ss") is None:
        pytest.skip("no ss here")
    up = systems("a", "up")
    up.apply([APP, EXPORT], "--wait")
    up.wait("the capture", lambda: "plant-1" in up.get("export", "line1")["status"].get("nodes", {}))
    found = look(processes(up))
    ports = {one.port for one in found}
    context = up.context
    wanted = {int(u.rsplit(":", 1)[1]) for u in (context["hub_url"], context["nodes"][0]["mqtt_url"])}
    wanted.add(up.get("app", "web")["status"]["instances"][0]["ports"]["http"])
    assert wanted <= ports, "the look missed some"
    assert len(found) >= 7, found  # hub, its NATS' three, the node's NATS' two, the app
    assert [one for one in found if not ipaddress.ip_address(one.address).is_loopback] == []
