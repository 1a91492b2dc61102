"""Functions in WebAssembly on a real node: their contract, what they cannot do, where their machine code is kept."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import wasmtime
from tests.core.pair import until
from tests.functions.node import Node, function, looped
from tests.functions.wat import ECHO, LOOP, module, say, wasm

from edgeward.core.errors import Invalid
from edgeward.core.invocation import Call, CallFailed, Event, Http
from edgeward.functions import wasm as origin

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "06-wasm"


def _variable(name: str) -> str:
    """Answers with a variable's value."""
    size = f"(i32.const {len(name)})"
    text = f"(drop (call $put (i32.const 4096) (call $env (i32.const 1024) {size} (i32.const 4096) (i32.const 99))))"
    return module(text, data=name)


async def _logged(node: Node, name: str, text: str) -> dict[str, Any]:
    """The log's line with this text."""
    found: list[Any] = []

    def there() -> bool:
        path = node.log(name).path
        lines = path.read_text().splitlines() if path.exists() else []
        found[:] = [line for line in lines if text in line]
        return bool(found)

    await until(there, 30)
    return msgspec.json.decode(found[0])  # type: ignore[no-any-return]


async def _told(node: Node, name: str, why: str) -> None:
    """Its status says so."""
    await until(lambda: why in str(node.status(name).get("message")), 60)


@looped
async def test_a_program_reads_the_event_and_writes_the_answer(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([wasm("echo", ECHO)])
        reply = await node.call("echo", b"edge")
        assert (reply.status, reply.body) == (200, b"edge")
        assert reply.headers == [("content-type", "text/plain; charset=utf-8")]
        reply = await node.call("echo", b"\xff\x00")
        assert reply.body == b"\xff\x00"
        assert reply.headers == [("content-type", "application/octet-stream")]
        assert (await node.call("echo")).body == b""


@looped
async def test_a_binary_module_and_an_archive_are_the_same_program(tmp_path: Path) -> None:
    binary = bytes(wasmtime.wat2wasm(ECHO))
    folder = tmp_path / "code" / ("0" * 64)
    folder.mkdir(parents=True)
    (folder / "main.wasm").write_bytes(binary)
    text = base64.b64encode(binary).decode()
    packed = wasm("packed", ECHO)
    packed.version.files, packed.version.code = {}, "0" * 64
    async with Node(tmp_path) as node:
        node.d.configure([function("bin", "", runtime="wasm", source={"files": {"main.wasm": text}}), packed])
        assert (await node.call("bin", b"a")).body == b"a"
        assert (await node.call("packed", b"b")).body == b"b"


@looped
async def test_a_program_in_c_runs_as_its_compiler_made_it(tmp_path: Path) -> None:
    made = (EXAMPLE / "module" / "main.wasm").read_bytes()
    text = base64.b64encode(made).decode()
    source = {"files": {"main.wasm": text}}
    async with Node(tmp_path) as node:
        node.d.configure([function("words", "", runtime="wasm", source=source, env={"GREETING": "hi"})])
        reply = await node.call("words", b"the quick\n brown fox")
        assert msgspec.json.decode(reply.body) == {"greeting": "hi", "words": 4, "bytes": 20}
        assert reply.headers == [("content-type", "application/json")]
        assert (await node.call("words")).status == 400
        assert msgspec.json.decode((await node.call("words", b"a " * 1_000_000)).body)["words"] == 1_000_000
        assert (await _logged(node, "words", "counted 4"))["level"] == "info"
        assert "there are files" not in node.log("words").path.read_text()


@looped
async def test_the_answer_has_a_status_headers_and_pieces(tmp_path: Path) -> None:
    body = (
        "(drop (call $status (i32.const 404))) (drop (call $status (i32.const 99)))"
        f"(drop (call $header (i32.const 1024) (i32.const 6) (i32.const 1030) (i32.const 4))) {say(1, 3, 1034)}"
    )
    pieces = f"{body} (drop (call $flush)) {say(1, 2, 1037)} (drop (call $status (i32.const 500)))"
    async with Node(tmp_path) as node:
        data = "X-Kindtheronetw"
        node.d.configure([wasm("whole", module(body, data=data)), wasm("pieces", module(pieces, data=data))])
        reply = await node.call("whole")
        assert (reply.status, reply.body) == (404, b"one")
        assert ("x-kind", "ther") in reply.headers
        reply = await node.call("pieces")
        assert reply.chunks is not None
        assert (reply.status, [c async for c in reply.chunks]) == (404, [b"one", b"tw"])
        assert (await node.call("whole")).status == 404


@looped
async def test_the_environment_is_the_request_as_cgi_has_it(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        env = {"HTTP_X_MINE": "declared"}
        wanted = {
            "PATH_INFO": b"/shop/1",
            "HTTP_X_KIND": b"a, b",
            "HTTP_X_MINE": b"declared",
            "CE_SOURCE": b"/gate",
            "EDGEWARD_NODE": b"n1",
        }
        node.d.configure([wasm(f"f{n}", _variable(name), env=env) for n, name in enumerate(wanted)])
        headers = [("x-kind", "a"), ("x-kind", "b"), ("x-mine", "sent")]
        event = Event("1", "/gate", "t", http=Http("GET", "/shop/1", "", headers, "10.0.0.1"))
        for n, value in enumerate(wanted.values()):
            assert (await node.d.invoke(Call(f"default/f{n}", event))).body == value


@looped
async def test_what_it_writes_to_its_errors_is_its_log(tmp_path: Path) -> None:
    lines = r"plain\n<3>wrong\n<7>fine\nrest"
    async with Node(tmp_path) as node:
        node.d.configure([wasm("f", module(say(2, 27), data=lines))])
        await node.call("f")
        assert (await _logged(node, "f", "plain"))["level"] == "info"
        assert (await _logged(node, "f", "wrong"))["level"] == "error"
        assert (await _logged(node, "f", "rest"))["message"] == "rest"
        assert "fine" not in node.log("f").path.read_text()


@looped
async def test_each_call_has_an_instance_of_its_own(tmp_path: Path) -> None:
    # counts in a global and in memory, and answers with the sum as a character
    body = (
        "(global.set $n (i32.add (global.get $n) (i32.const 1))) "
        "(i32.store (i32.const 2048) (i32.add (i32.load (i32.const 2048)) (global.get $n))) "
        "(i32.store8 (i32.const 1024) (i32.add (i32.const 48) (i32.load (i32.const 2048)))) " + say(1, 1)
    )
    async with Node(tmp_path) as node:
        node.d.configure([wasm("f", module(body), scale={"max": 1})])
        assert [(await node.call("f")).body for _ in range(3)] == [b"1", b"1", b"1"]


@looped
async def test_a_module_without_start_has_the_handler_called(tmp_path: Path) -> None:
    prelude = '(func (export "_initialize") (i32.store8 (i32.const 1024) (i32.const 65)))'
    async with Node(tmp_path) as node:
        node.d.configure(
            [
                wasm("f", module(say(1, 2), data="xb", start="answer", more=prelude), handler="answer"),
                wasm("none", module("", start="other")),
                wasm("takes", '(module (func (export "handler") (param i32)))'),
            ]
        )
        assert (await node.call("f")).body == b"Ab"
        await _told(node, "none", "no function 'handler' and no _start; it has: other")
        await _told(node, "takes", "must take nothing")


@looped
async def test_failures_have_the_names_that_they_have_in_every_tier(tmp_path: Path) -> None:
    deep = "(func $f (param i32) (result i32) (i32.add (i32.const 1) (call $f (i32.add (local.get 0) (i32.const 1)))))"
    grow = "(loop $l (br_if $l (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))) unreachable"
    flood = f"(loop $l {say(1, 32768)} (br $l))"
    small = {"memory": "16Mi", "body": "1Mi"}
    async with Node(tmp_path) as node:
        node.d.configure(
            [
                wasm("trap", module("unreachable")),
                wasm("exit", module(f"{say(1, 4)} (call $exit (i32.const 3))", data="half")),
                wasm("calm", module(f"{say(1, 4)} (call $exit (i32.const 0))", data="half")),
                wasm("bounds", module("(drop (i32.load (i32.const 100000000)))")),
                wasm("deep", module("(drop (call $f (i32.const 0)))", more=deep)),
                wasm("grow", module(grow), limits=small),
                wasm("flood", module(flood), limits=small),
                wasm("echo", ECHO),
            ]
        )
        for name, kind, status, why in (
            ("trap", "error", 500, "unreachable"),
            ("exit", "error", 500, "exit code 3"),
            ("bounds", "error", 500, "out of bounds"),
            ("deep", "error", 500, "stack"),
            ("grow", "memory", 502, "over its memory"),
            ("flood", "too-large", 502, "1048576"),
        ):
            error = await node.fails(name)
            assert (name, error.kind, error.status) == (name, kind, status)
            assert why in error.message, (name, error.message)
        assert (await node.fails("grow")).limit == {"memory": 16 << 20}
        assert (await node.call("calm")).body == b"half"
        assert (await node.call("echo", b"well")).body == b"well"
        # none of them cost more than the instance: the process that served it serves on
        assert node.d.counters()["default/trap"]["cold"] == 1
        assert (await _logged(node, "trap", "unreachable"))["level"] == "error"


@looped
async def test_an_endless_loop_is_ended_and_its_siblings_are_not(tmp_path: Path) -> None:
    sleep = (
        '(module (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))'
        '(memory (export "memory") 1) (func (export "_start") (i64.store (i32.const 24) (i64.const 3600000000000))'
        "(drop (call $poll (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 128)))))"
    )
    ignore = "(loop $l (drop (memory.grow (i32.const 1))) (br $l))"
    short = {"timeout": "2s"}
    async with Node(tmp_path) as node:
        node.d.configure(
            [
                wasm("loop", LOOP, limits=short),
                wasm("sleep", sleep, limits=short),
                wasm("ignore", module(ignore), limits=short),
                wasm("echo", ECHO),
            ]
        )
        for name in ("loop", "sleep", "ignore", "echo"):
            await node.phase(name, "Running")
        ended = [asyncio.create_task(node.fails(name, b"x")) for name in ("loop", "sleep", "ignore", "loop")]
        while not all(task.done() for task in ended):
            assert (await node.call("echo", b"here")).body == b"here"
            await asyncio.wait(ended, timeout=0.05)
        for task in ended:
            assert (task.result().kind, task.result().limit) == ("timeout", {"timeout": 2.0})

        async def well() -> bool:
            with contextlib.suppress(CallFailed):  # a machine with much to do may take longer than its limit
                return (await node.call("loop")).body == b"well"
            return False

        await until(well, 60)


@looped
async def test_what_cannot_be_loaded_says_why_and_the_old_version_stays(tmp_path: Path) -> None:
    hang = '(module (func $s (loop $l (br $l))) (start $s) (func (export "_start")))'
    async with Node(tmp_path) as node:
        node.d.configure(
            [
                wasm("hang", hang, limits={"startup": "300ms"}),
                wasm("import", '(module (import "env" "gone" (func)) (func (export "_start")))'),
                wasm("files", '(module (import "wasi_snapshot_preview1" "fd_read" (func)) (func (export "_start")))'),
                wasm("text", "(module (nonsense))"),
                wasm("large", module("", pages="400"), limits={"memory": "16Mi"}),
                wasm("kept", ECHO),
            ]
        )
        for name, why in (
            ("hang", "not ready within 0.3 s"),
            ("import", "unknown import: `env::gone`"),
            ("files", "incompatible import type"),
            ("text", "cannot be compiled"),
            ("large", "limits.memory is 16777216 bytes"),
        ):
            await _told(node, name, why)
        await node.phase("kept", "Running")
        node.d.configure([wasm("kept", "(module)")])
        await node.phase("kept", "Degraded")
        assert (await node.call("kept", b"old")).body == b"old"


@looped
async def test_an_update_under_load_loses_no_call(tmp_path: Path) -> None:
    def version(n: int) -> Any:
        return wasm("f", module(say(1, 1), data=str(n)), scale={"max": 2})

    async with Node(tmp_path) as node:
        node.d.configure([version(0)])
        seen: set[bytes] = set()
        last = b"3"

        async def caller() -> None:
            while last not in seen:
                seen.add((await node.call("f", timeout=60)).body)

        callers = [asyncio.create_task(caller()) for _ in range(8)]
        for n in range(1, 4):
            await until(lambda n=n: str(n - 1).encode() in seen, 60)  # type: ignore[misc]
            node.d.configure([version(n)])
        await asyncio.gather(*callers)
        assert seen == {b"0", b"1", b"2", b"3"}


@looped
async def test_instances_count_together_in_what_the_node_keeps(tmp_path: Path) -> None:
    key = "(i32.const 1024) (i32.const 1) (i32.const 2048) (i32.const 1)"
    # none is 0; one more, unless another was faster; then answers with it
    count = (
        f"(loop $l (i32.store8 (i32.const 2048) (i32.const 64)) (drop (call $get {key})) "
        "(i32.store8 (i32.const 2048) (i32.add (i32.const 1) (i32.load8_u (i32.const 2048)))) "
        f"(br_if $l (i32.eq (call $set {key} (call $revision)) (i32.const -3)))) {say(1, 1, 2048)}"
    )
    rest = (
        "(drop (call $put (i32.const 4096) (call $keys (i32.const 0) (i32.const 0) (i32.const 4096) (i32.const 9)))) "
        "(if (i32.ne (call $delete (i32.const 1024) (i32.const 1) (i64.const -1)) (i32.const 1)) (then unreachable)) "
        "(if (i32.ne (call $delete (i32.const 1024) (i32.const 1) (i64.const -1)) (i32.const 0)) (then unreachable)) "
        f"(if (i32.ne (call $get {key}) (i32.const -1)) (then unreachable)) "
        "(if (i32.ne (call $set (i32.const 1024) (i32.const 1) (i32.const 0) (i32.const 262145) (i64.const -1)) "
        "(i32.const -4)) (then unreachable))"
    )
    async with Node(tmp_path) as node:
        node.d.configure([wasm("f", module(count, data="n"))])
        first = await asyncio.gather(*(node.call("f") for _ in range(12)))
        assert sorted(r.body for r in first) == [bytes([65 + n]) for n in range(12)]
        later = wasm("f", module(rest, data="n", pages="8"))
        node.d.configure([later])
        await until(lambda: node.status("f").get("version") == later.version.digest, 60)
        assert (await node.call("f")).body == b"n"


@looped
async def test_a_guest_has_its_secrets_and_publishes_only_what_is_declared(tmp_path: Path) -> None:
    asks = (
        "(drop (call $put (i32.const 4096) (call $secret (i32.const 1024) (i32.const 2) (i32.const 1026) (i32.const 3) "
        "(i32.const 4096) (i32.const 32)))) "
        "(if (i32.ne (call $secret (i32.const 1024) (i32.const 2) (i32.const 1024) (i32.const 2) (i32.const 0) "
        "(i32.const 0)) (i32.const -1)) (then unreachable)) "
        "(if (i32.ne (call $publish (i32.const 1024) (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 1)) "
        "(i32.const -2)) (then unreachable)) "
        "(drop (call $sample (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 1) (f64.const nan)))"
    )
    config = wasm("f", module(asks, data="dbkey"))
    config.version.secrets = {"db": {"key": "s3cret"}}
    async with Node(tmp_path) as node:
        node.d.configure([config])
        assert (await node.call("f")).body == b"s3cret"


def _code(folder: Path) -> list[Path]:
    return sorted((folder / "wasm").iterdir())


@looped
async def test_machine_code_is_kept_and_only_taken_with_the_nodes_mark(tmp_path: Path) -> None:
    async def answer(text: str) -> bytes:
        async with Node(tmp_path) as node:
            node.d.configure([wasm("f", text)])
            return (await node.call("f")).body

    right, other = module(say(1, 5), data="right"), module(say(1, 5), data="wrong")
    assert await answer(other) == b"wrong"
    [forged] = _code(tmp_path)
    assert await answer(right) == b"right"
    [mine] = [p for p in _code(tmp_path) if p != forged]
    made = mine.stat().st_ino
    assert await answer(right) == b"right"
    assert mine.stat().st_ino == made, "what was kept is used again"
    good = mine.read_bytes()

    for bad in (forged.read_bytes(), good[:-1] + bytes([good[-1] ^ 1]), good[:100], b""):
        mine.write_bytes(bad)
        assert await answer(right) == b"right"
        assert mine.read_bytes() == good, "it was made again"
    mine.unlink()
    mine.symlink_to(forged)
    assert await answer(right) == b"right"
    assert not mine.is_symlink()
    assert (tmp_path / "wasm").stat().st_mode & 0o777 == 0o700
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in (*_code(tmp_path), tmp_path / "wasm.key"))


@looped
async def test_a_node_without_wasmtime_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    async with Node(tmp_path) as node:
        node.d.configure([wasm("f", ECHO)])
        await node.phase("f", "Refused")
        assert "pip install wasmtime" in node.status("f")["message"]
        assert (await node.fails("f")).kind == "refused"


@looped
async def test_an_engine_that_cannot_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fake" / "wasmtime"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise RuntimeError('no library for this machine')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(fake.parent), os.environ.get("PYTHONPATH", "")]))
    async with Node(tmp_path / "node") as node:
        node.d.configure([wasm("f", ECHO), function("py", "def handler(e, c):\n    return 'well'")])
        await _told(node, "f", "no library for this machine")
        assert (await node.call("py")).body == b"well"


@looped
async def test_the_cage_is_as_tight_as_any(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([wasm("f", ECHO), function("py", "def handler(e, c):\n    return 'well'")])
        await node.call("f")
        await node.call("py")
        enforced = set(node.status("f")["enforced"])
        assert enforced >= set(node.status("py")["enforced"]) - {"tmp"}
        assert "files" not in enforced or "tmp" in enforced


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"handler": "a:b"}, "$.spec.handler"),
        ({"limits": {"network": "all"}}, "$.spec.limits.network"),
        ({"source": {"files": {"main.py": "x"}}}, "$.spec.source.files"),
        ({"source": {"files": {"main.wasm": "AGFzbQ==", "b.wasm": "x"}}}, "$.spec.source.files"),
        ({"source": {"files": {"main.wasm": "bm90"}}}, "$.spec.source.files.main.wasm"),
        ({"source": {"files": {"main.wasm": "%%%"}}}, "$.spec.source.files.main.wasm"),
    ],
)
def test_what_is_no_module_is_refused_when_it_is_declared(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as e:
        wasm("f", ECHO, **spec)
    assert e.value.field == field


def test_compiling_is_bounded() -> None:
    assert origin._MEMORY <= 1 << 30
    assert origin._TIME <= 120
