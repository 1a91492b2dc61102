"""Every promise of a cage is tried from inside; one that is not kept is taken back."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import struct
from pathlib import Path

import pytest
from tests.functions.node import Node, function, looped

from edgeward.core import cgroup
from edgeward.functions import landlock
from edgeward.functions.sandbox import PROMISES, Cage, Verdict, attempts
from edgeward.functions.seccomp import ARCH, CONNECTING, asking, program

_DENY, _ALLOW = 0x00050000, 0x7FFF0000


def _run(code: bytes, machine: str, nr: int, *args: int, arch: int | None = None) -> int:
    """A seccomp filter's answer: an interpreter of the few BPF instructions that are used."""
    told = [*args, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<iIQ6Q", nr, ARCH[machine][0] if arch is None else arch, 0, *told)
    lines = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
    at = value = 0
    while True:
        op, yes, no, k = lines[at]
        at += 1
        if op == 0x06:
            return k
        if op == 0x20:
            value = struct.unpack_from("<I", data, k)[0]
        elif op == 0x54:
            value &= k
        else:
            held = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[op]
            at += yes if held else no


@pytest.mark.parametrize("machine", sorted(ARCH))
def test_the_filter_denies_what_it_lists_and_allows_the_rest(machine: str) -> None:
    numbers = ARCH[machine][1]
    closed = program(network=False, may_fork=False, machine=machine)
    opened = program(network=True, may_fork=True, machine=machine)
    for name, nr in numbers.items():
        if name not in ("clone", "socket", "fork", "vfork", "prctl"):
            assert _run(closed, machine, nr) & 0xFFFF0000 == _run(opened, machine, nr) & 0xFFFF0000 == _DENY, name
    assert _run(closed, machine, 435) == _DENY | 38, "clone3: not there, so that clone is used"
    assert _run(closed, machine, 425) & _DENY, "io_uring would go round the filter"
    for allowed in (0 if machine == "x86_64" else 63, 1 if machine == "x86_64" else 64, 262, 228):
        assert _run(closed, machine, allowed) in (_ALLOW, _DENY | 1)
    assert _run(closed, machine, 0 if machine == "x86_64" else 63) == _ALLOW, "read"
    clone, socket_ = numbers["clone"], numbers["socket"]
    thread, process = 0x3D0F00, 17
    assert _run(closed, machine, clone, thread) == _ALLOW
    assert _run(closed, machine, clone, process) & _DENY
    assert _run(opened, machine, clone, process) == _ALLOW
    for namespace in (0x10000000, 0x20000, 0x40000000):
        assert _run(opened, machine, clone, thread | namespace) & _DENY
    assert [_run(closed, machine, socket_, family) & _DENY for family in (1, 2, 10, 16)] == [_DENY] * 4
    assert [_run(opened, machine, socket_, family) == _ALLOW for family in (1, 2, 10, 16, 17, 38, 40)] == [
        False, True, True, False, False, False, False,
    ]  # fmt: skip
    death, name_of_thread = 1, 15
    assert _run(opened, machine, numbers["prctl"], death) & _DENY, "it would live on without its zygote"
    assert _run(opened, machine, numbers["prctl"], name_of_thread) == _ALLOW
    assert _run(opened, machine, 0, arch=0x40000003) & _DENY, "another machine's way to call"
    if machine == "x86_64":
        assert _run(opened, machine, 0x40000000 + 1) & _DENY, "x32"


@pytest.mark.parametrize("machine", sorted(CONNECTING))
def test_what_names_an_address_is_asked_for(machine: str) -> None:
    code, numbers, notify = asking(machine), CONNECTING[machine], 0x7FC00000

    def run(name: str, *args: int) -> int:
        return _run(code, machine, numbers[name], *args)

    assert run("connect") == run("sendmsg") == run("bind") == notify
    assert run("sendto", 3, 99, 5, 0, 0, 0) == _ALLOW, "no address"
    for address in (1, 1 << 32, 0x7FFF_0000_0000, 0xFFFF_FFFF):
        assert run("sendto", 3, 99, 5, 0, address, 16) == notify
    for name in ("listen", "accept", "accept4"):
        assert run(name) == _DENY | 1
    assert run("sendmmsg") == _DENY | 38
    nonblocking, cloexec = 0x800, 0x80000
    for kind in (1, 2, 1 | nonblocking, 2 | nonblocking | cloexec):
        assert run("socket", 2, kind, 0) == run("socket", 10, kind, 6) == run("socket", 2, kind, 17) == _ALLOW
        assert run("socket", 2, kind, 1) & _DENY and run("socket", 2, kind, 132) & _DENY, "ICMP, SCTP"
    assert all(run("socket", 2, kind, 0) == _DENY | 1 for kind in (0, 3, 4, 5, 10)), "raw, packet"
    assert _run(code, machine, 0) == _ALLOW


def test_of_a_machine_whose_numbers_are_not_known_nothing_is_promised() -> None:
    with pytest.raises(OSError, match="not known"):
        program(network=False, may_fork=True, machine="vax")


def test_promises_that_can_be_broken_are_taken_back(tmp_path: Path) -> None:
    """No cage at all, and a verdict that claims one: what is tried from inside shows it."""
    names = sorted(set(PROMISES) - {"exec"})
    parent, child = os.pipe()
    pid = os.fork()
    if pid == 0:
        verdict = attempts(Cage("i", str(tmp_path)), Verdict(list(names)))
        os.write(child, " ".join(verdict.enforced).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    still = set(os.read(parent, 4096).decode().split())
    assert not still & {"files", "network", "tmp", "signals"}
    if os.geteuid() == 0:
        assert not still & {"user", "kernel"}


@looped
async def test_what_this_machine_gives_is_enforced_and_the_rest_has_a_reason(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        probed = await node.d.probe()
    assert set(probed.enforced) | set(probed.refused) >= set(PROMISES)
    assert not set(probed.enforced) & set(probed.refused)
    assert all(probed.refused.values())
    if landlock.abi() >= 1:
        assert "files" in probed.enforced
    if platform.machine() in ARCH:
        assert {"network", "exec", "kernel"} <= set(probed.enforced)
    if os.geteuid() == 0:
        assert {*cgroup.available(), "tmp"} <= set(probed.enforced)


@looped
async def test_memory_and_processes_are_bounded_without_groups_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node whose agent is not root: by rlimits and seccomp."""
    code = """
import os

def handler(event, context):
    if event.data == b"fork":
        return str(os.fork())
    held = []
    while True:
        held.append(bytearray(1 << 20))
"""
    monkeypatch.setattr(cgroup, "prepare", lambda *_: cgroup.Verdict([], {"memory": "no groups", "pids": "no groups"}))
    async with Node(tmp_path) as node:
        node.d.configure([function("f", code, limits={"memory": "64Mi"})])
        error = await node.fails("f", timeout=20)
        assert (error.kind, error.limit) == ("memory", {"memory": 64 << 20})
        error = await node.fails("f", b"fork")
        assert error.kind == "error"
        assert "memory" in node.status("f")["enforced"]
        refused = {r["what"]: r["why"] for r in node.status("f")["notEnforced"]}
        assert "no process" in refused["pids"]


@looped
async def test_a_network_that_is_open_gives_the_internet_and_no_local_socket(tmp_path: Path) -> None:
    code = """
import socket

def handler(event, context):
    got = []
    for family in (socket.AF_INET, socket.AF_UNIX):
        try:
            with socket.socket(family) as s:
                s.connect(("127.0.0.1", int(event.data)) if family == socket.AF_INET else "/nothing")
            got.append("open")
        except PermissionError:
            got.append("refused")
        except OSError as e:
            got.append(type(e).__name__)
    return got
"""
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    port = str(server.sockets[0].getsockname()[1]).encode()
    async with server, Node(tmp_path) as node:
        probed = await node.d.probe()
        if "network" not in probed.enforced:
            pytest.skip(f"network: {probed.refused['network']}")
        node.d.configure([function("shut", code), function("open", code, limits={"network": "all"})])
        assert (await node.call("shut", port)).body == b'["refused","refused"]'
        assert (await node.call("open", port)).body == b'["open","refused"]'
        assert {"what": "network", "why": "limits.network is open"} in node.status("open")["notEnforced"]


@looped
async def test_a_function_has_no_descriptor_but_its_own(tmp_path: Path) -> None:
    """What rules were made with stays behind, and what is the same for all was made before the fork."""
    code = """
import os

def handler(event, context):
    found = []
    for fd in range(64):
        try:
            os.fstat(fd)
        except OSError:
            continue
        found.append(fd)
    return found
"""
    async with Node(tmp_path) as node:
        node.d.configure([function("f", code)])
        found = json.loads((await node.call("f")).body)
        assert found[:3] == [0, 1, 2] and len(found) == 4, "and its socket"
