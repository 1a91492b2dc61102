"""Programs as functions: what they are told, what they answer, and what is said when one is not there."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.core.pair import until
from tests.functions.node import Node, function, looped

from edgeward.core.errors import Invalid
from edgeward.core.invocation import Call, CallFailed, Event, Http
from edgeward.functions import programs, stdio
from edgeward.functions.nursery import Ended
from edgeward.functions.origins import Programs
from edgeward.functions.versions import Config

PERL = Path(__file__).with_name("workers") / "worker.pl"


def command(name: str, *argv: str, code: str = "", files: dict[str, str] | None = None, **spec: Any) -> Config:
    source = {"inline": code} if code else {"files": files} if files else {}
    return function(name, "", runtime="command", source=source, **({"command": list(argv)} if argv else {}), **spec)


def needs_perl() -> None:
    if shutil.which("perl") is None:
        pytest.skip("there is no perl on this machine")


@looped
async def test_a_program_that_speaks_the_protocol_is_a_worker(tmp_path: Path) -> None:
    needs_perl()
    async with Node(tmp_path) as node:
        files = {"worker.pl": PERL.read_text(), "lib/note.txt": "own"}
        node.d.configure([command("f", "perl", "worker.pl", files=files, scale={"max": 1})])
        event = Event("1", "/test", "conformance.status", b"207")
        reply = await node.d.invoke(Call("default/f", event))
        assert (reply.status, dict(reply.headers)["x-conformance"]) == (207, "yes")
        event = Event("2", "/test", "conformance.stream", b"3")
        reply = await node.d.invoke(Call("default/f", event))
        assert reply.chunks is not None
        assert b"".join([piece async for piece in reply.chunks]) == b"piece 0\npiece 1\npiece 2\n"
        error = await node.fails("f")
        assert (error.kind, error.message) == ("error", "the handler raised Died; its log says where")
        assert node.status("f")["instances"] == 1, "one process for all of them"
        assert any("no test" in line for line in node.logged("f").splitlines())


@looped
async def test_with_stdio_each_call_is_a_process(tmp_path: Path) -> None:
    code = """#!/bin/sh
echo "$REQUEST_METHOD $PATH_INFO?$QUERY_STRING $HTTP_X_A $CE_TYPE $CE_TRACEPARENT $CONTENT_LENGTH $OWN $HTTP_PROXY"
echo "a line" >&2
cat
cat "$(dirname "$0")/main" | head -1
test "$CE_ID" = bad && exit 3
exit 0
"""
    async with Node(tmp_path) as node:
        node.d.configure([command("f", code=code, mode="stdio", env={"OWN": "o"}, scale={"max": 1})])
        http = Http("PUT", "/a", "q=1", [("x-a", "1"), ("x-a", "2"), ("proxy", "http://evil")], "192.0.2.1")
        event = Event("1", "/test", "test", b"data\n", extensions={"traceparent": "00"}, http=http)
        reply = await node.d.invoke(Call("default/f", event))
        assert reply.body == b"PUT /a?q=1 1, 2 test 00 5 o \ndata\n#!/bin/sh\n"
        assert dict(reply.headers)["content-type"].startswith("text/plain")
        with pytest.raises(CallFailed, match=r"ExitStatus\(3\)"):
            await node.d.invoke(Call("default/f", Event("bad", "/test", "test")))
        await until(lambda: node.logged("f").count("a line") == 2, 30)
        assert node.status("f")["instances"] == 1


@looped
async def test_a_program_may_leave_its_input_unread_and_answer_much(tmp_path: Path) -> None:
    code = "#!/bin/sh\nif [ $CE_ID = 2 ]; then cat; else head -c $CE_SUBJECT /dev/zero; fi\n"
    async with Node(tmp_path) as node:
        node.d.configure([command("f", code=code, mode="stdio", limits={"body": "1Mi", "timeout": "60s"})])
        data = os.urandom(1 << 20)
        reply = await node.d.invoke(Call("default/f", Event("1", "/test", "test", data, subject="700000")))
        assert reply.body == bytes(700_000)
        reply = await node.d.invoke(Call("default/f", Event("2", "/test", "test", data)))
        assert reply.body == data
        for much in ("1048577", "1000000000"):
            with pytest.raises(CallFailed) as e:
                await node.d.invoke(Call("default/f", Event("1", "/test", "test", subject=much)))
            assert e.value.kind == "too-large"


@looped
async def test_a_process_that_is_left_behind_holds_no_answer_up_and_is_ended_behind_it(tmp_path: Path) -> None:
    code = "#!/bin/sh\nsleep 600 &\necho $! $PPID\n"
    async with Node(tmp_path) as node:
        node.d.configure([command("f", code=code, mode="stdio", scale={"max": 1})])
        if "pids" not in (await node.d.probe()).enforced:
            pytest.skip("no groups here, so there is no mode stdio")
        seen = set()
        for _ in range(5):  # each has an instance that is whole
            pid, instance = map(int, (await node.call("f")).body.split())
            seen.add(instance)
            await until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 30)
        assert len(seen) == 5
        assert node.d.counters()["default/f"]["failed"] == {}


@looped
async def test_what_cannot_be_started_is_told_and_the_version_before_goes_on(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([command("f", code="#!/bin/sh\necho one\n", mode="stdio")])
        assert (await node.call("f")).body == b"one\n"
        for argv, why in (
            (["no-such-program"], "there is no program 'no-such-program' on this node"),
            (["/no/such/program"], "there is no program /no/such/program on this node"),
            (["sh", "-c", "echo the reason >&2; exit 7"], "its process ended with exit status 7: the reason"),
            (["sh", "-c", "exit 0"], "mode: stdio"),
        ):
            node.d.configure([command("f", *argv)])
            await until(lambda why=why: why in node.status("f").get("message", ""), 60)
            assert node.status("f")["phase"] == "Degraded"
            assert (await node.call("f")).body == b"one\n"
        node.d.configure([command("g", "./plain", files={"plain": "echo"})])
        await until(lambda: "begin it with #!" in node.status("g").get("message", ""), 60)


@looped
async def test_a_worker_that_ends_before_it_is_spoken_to_is_told_too(tmp_path: Path) -> None:
    class Dead:
        pid = 0

        def __init__(self) -> None:
            self.sock, theirs = socket.socketpair()
            theirs.close()
            read, write = os.pipe()
            os.close(write)
            self.output = os.fdopen(read, "rb", 0)
            self.ended = asyncio.get_running_loop().create_future()
            self.ended.set_result(Ended(5, False))

        def kill(self) -> None: ...

    class Origin(Programs):
        async def worker(self, version: Any, cage: Any, env: Any) -> Any:
            return Dead()

    async with Node(tmp_path) as node:
        node.d.origins["command"] = Origin(node.d.nursery)
        node.d.configure([command("f", "sh")])
        await until(lambda: "exit status 5" in node.status("f").get("message", ""), 30)


@looped
async def test_a_program_in_its_cage(tmp_path: Path) -> None:
    """Own files and its folder, other programs unless `require: [exec]`, no other file, no socket."""
    code = """#!/bin/sh
cat /etc/passwd || echo no file
ls / > /dev/null || echo no program
true > here || echo no writing
echo x > "$TMPDIR/x" && echo tmp
"""
    async with Node(tmp_path) as node:
        probed = await node.d.probe()
        if not {"files", "user", "tmp"} <= set(probed.enforced):
            pytest.skip(f"not enforced here: {probed.refused}")
        node.d.configure([
            command("any", code=code, mode="stdio"),
            command("own", code=code, mode="stdio", require=["exec", "files", "network", "memory", "tmp"]),
        ])  # fmt: skip
        assert (await node.call("any")).body == b"no file\nno program\nno writing\ntmp\n", "ls has no right to read /"
        assert (await node.call("own")).body == b"no file\nno program\nno writing\ntmp\n"
        await until(lambda: "cat: Permission denied" in node.logged("own"), 30)
        assert "exec" in node.status("own")["enforced"]
        assert [one["what"] for one in node.status("any")["notEnforced"]] == ["exec"]
        assert sorted(p.name for p in (tmp_path / "tmp").iterdir() if p.name.endswith(".code")), "they run"
        node.d.configure([])
        await until(lambda: not any(p.name.endswith(".code") for p in (tmp_path / "tmp").iterdir()), 30)


def test_what_a_program_needs_to_be_started() -> None:
    shell = os.path.realpath("/bin/sh")
    found = programs.needs("/bin/sh")
    assert found[0] == shell and len(found) >= 1
    if (loader := programs.needs("/bin/sh")[1:]) != []:
        assert all(Path(p).exists() for p in loader)
    assert programs.interpreters("#!/bin/sh -e\n")[0] == shell
    assert shell in programs.interpreters("#!/usr/bin/env sh\n")
    assert programs.interpreters("echo") == programs.interpreters("") == programs.interpreters("#!") == []


def test_what_is_no_command_is_refused() -> None:
    for spec, field in (
        ({}, "$.spec.source"),
        ({"source": {"inline": "echo"}}, "$.spec.command"),
        ({"command": ["a"], "handler": "f"}, "$.spec.handler"),
        ({"command": [""]}, "$.spec.command[0]"),
        ({"command": ["../a"]}, "$.spec.command[0]"),
        ({"command": ["a", "b\0"]}, "$.spec.command[1]"),
        ({"command": ["a"] * 65}, "$.spec.command"),
        ({"runtime": "python", "source": {"inline": "x"}, "command": ["a"]}, "$.spec.command"),
        ({"runtime": "node", "source": {"inline": "x"}, "mode": "stdio"}, "$.spec.mode"),
        ({"runtime": "node", "source": {"inline": "x"}, "handler": "../a:b"}, "$.spec.handler"),
        ({"runtime": "node", "source": {"files": {"a.js": "x"}}}, "$.spec.handler"),
    ):
        with pytest.raises(Invalid) as e:
            function("f", "", **({"runtime": "command", "source": {}} | spec))
        assert e.value.field == field, spec


def test_headers_of_a_request_are_bounded_for_a_program() -> None:
    headers = [("x-long", "v" * 10_000), *((f"x-{n}", "v") for n in range(1000)), ("a=b", "v")]
    told = stdio.environment(
        "f", "v", "i", 1.0, Event("1", "s", "t", extensions={"n": "a\0b"}, http=Http(headers=headers))
    )
    assert "HTTP_X_LONG" not in told and sum(k.startswith("HTTP_") for k in told) <= 200
    assert told["CE_N"] == "ab" and told["CONTENT_LENGTH"] == "0"
