"""Real workers: what goes wrong in one function stays in it, has a name, and the next call is answered."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
from pathlib import Path

import pytest
from tests.core.pair import until
from tests.functions.node import HELLO, Node, function, looped

from edgeward.core import cgroup
from edgeward.core.invocation import CallFailed
from edgeward.core.proc import alive, identify

ROOT = Path(__file__).parents[2]
#: Does what the event says, so that one function can misbehave once and be well again.
MOODS = """
import os, signal, time

def handler(event, context):
    mood = event.data.decode()
    if mood == "loop":
        while True:
            pass
    if mood == "hog":
        held = []
        while True:
            held.append(bytearray(1 << 20))
    if mood == "bomb":
        while True:
            if os.fork() == 0:
                time.sleep(1000)
    if mood == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mood == "exit":
        os._exit(3)
    if mood == "gigabyte":
        return b"x" * (1 << 30)
    if mood == "big":
        return b"x" * (7 << 20)
    if mood == "raise":
        raise ValueError("secret detail")
    return "well"
"""


@looped
async def test_a_call_is_answered_by_the_version_that_was_declared(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        config = function("hello", HELLO)
        node.d.configure([config])
        first = await node.call("hello", b"edge")
        assert (first.status, first.cold, first.version) == (200, True, config.version.digest)
        assert first.body == b'{"hello":"edge","version":"%b"}' % config.version.digest.encode()
        assert dict(first.headers) == {"content-type": "application/json"}
        second = await node.call("hello", b"edge")
        assert not second.cold
        assert second.invocation != first.invocation
        gone = await node.fails("nobody")
        assert (gone.status, gone.kind) == (404, "unknown")
        node.d.configure([])
        assert (await node.fails("hello")).kind == "unknown"


@pytest.mark.parametrize(
    ("mood", "kinds", "status", "limit"),
    [
        ("loop", {"timeout"}, 504, {"timeout": 1.0}),
        ("hog", {"memory"}, 502, {"memory": 64 << 20}),
        ("gigabyte", {"memory"}, 502, {"memory": 64 << 20}),
        ("big", {"too-large"}, 502, {"body": 6 << 20}),
        ("kill", {"crashed"}, 502, {}),
        ("exit", {"crashed"}, 502, {}),
        ("bomb", {"error", "memory", "timeout"}, 0, None),
        ("raise", {"error"}, 500, {}),
    ],
)
@looped
async def test_harm_is_contained_named_and_over(
    tmp_path: Path, mood: str, kinds: set[str], status: int, limit: dict[str, object] | None
) -> None:
    async with Node(tmp_path) as node:
        limits = {"timeout": "1s", "memory": "64Mi"}
        node.d.configure([function("moody", MOODS, limits=limits), function("sibling", HELLO)])
        assert (await node.call("sibling", b"a")).status == 200
        assert (await node.call("moody", timeout=20)).body == b"well"
        harm = asyncio.create_task(node.fails("moody", mood.encode()))
        while not harm.done():
            assert (await node.call("sibling", b"a")).status == 200, "a sibling is unharmed meanwhile"
        error = await harm
        assert error.kind in kinds
        doc = error.problem()
        assert doc["function"] == "default/moody"
        assert "secret detail" not in str(doc), "what the handler said is for its log"
        if limit is not None:
            assert doc["status"] == status
            assert doc.get("limit", {}) == limit
        assert (await node.call("moody")).body == b"well", "the next call is answered"
        assert node.status("moody")["phase"] == "Running"


@looped
async def test_a_start_that_was_made_ready_is_held_to_its_limits_as_any_other(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("moody", MOODS, limits={"timeout": "5s", "memory": "64Mi", "pids": 4})])
        assert (await node.call("moody", timeout=20)).body == b"well"
        first = node.status("moody")["enforced"]
        await until(lambda: node.d.nursery._spare is not None, 20)
        assert (await node.fails("moody", b"kill")).kind == "crashed"
        again = await node.call("moody", timeout=20)
        assert (again.body, again.cold) == (b"well", True)
        (link,) = node.d._functions["default/moody"].current.links  # type: ignore[union-attr]
        assert "spare" in link.child.cage.instance  # type: ignore[union-attr]
        assert node.status("moody")["enforced"] == first
        assert (await node.fails("moody", b"bomb")).kind == "error"
        error = await node.fails("moody", b"hog")
        assert (error.kind, error.limit) == ("memory", {"memory": 64 << 20})


@looped
async def test_a_worker_that_does_not_keep_to_the_protocol_is_ended(tmp_path: Path) -> None:
    code = """
import contextlib, os, time
from edgeward.core.invocation import Head, Log, Ready, frame

def handler(event, context):
    if event.data == b"well":
        return "well"
    said = {
        b"long": (1 << 30).to_bytes(4, "big"), b"garbage": b"\\0\\0\\0\\1\\xc1",
        b"twice": frame(Head(context.invocation, 200, [])) * 2,
        b"start": frame(Ready(1, "again")),
        b"fields": frame(Log("", 20, 0.0, "", {"a": "a" * 100000})) * 200,
        b"no text": b"\\0\\0\\0\\x0d\\x96\\x17\\xa1\\xff\\x14\\xcb" + bytes(8),
        b"deep": (3008).to_bytes(4, "big") + b"\\x96\\x17\\xa0\\x14\\x00\\xa0\\x81\\xa0" + b"\\x91" * 3000,
    }[event.data]
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            while said:
                said = said[os.write(fd, said):]
    time.sleep(1000)
"""
    async with Node(tmp_path) as node:
        node.d.configure([function("liar", code)])
        assert (await node.call("liar", b"well")).body == b"well"
        assert (await node.fails("liar", b"long")).kind == "too-large"
        for lie in (b"garbage", b"start", b"fields", b"no text", b"deep"):
            error = await node.fails("liar", lie)
            assert (error.kind, "protocol" in error.message) == ("crashed", True), lie
        twice = await node.call("liar", b"twice")
        assert twice.chunks is not None
        with pytest.raises(CallFailed, match="a second answer"):
            await anext(twice.chunks)  # who reads the first is not left waiting
        assert (await node.call("liar", b"well")).body == b"well"


@looped
async def test_a_call_whose_caller_went_away_does_not_wait_on(tmp_path: Path) -> None:
    code = "import time\ndef handler(e, c):\n    time.sleep(1000 if e.data == b'long' else 0)\n    return 'done'"
    async with Node(tmp_path) as node:
        node.d.configure([function("one", code, scale={"max": 1}, limits={"timeout": "60s"})])
        assert (await node.call("one")).body == b"done"
        long = asyncio.create_task(node.call("one", b"long"))
        waiting = [asyncio.create_task(node.call("one", bytes(1000))) for _ in range(3)]
        pool = node.d._functions["default/one"].current
        assert pool is not None
        await until(lambda: len(pool.queue) == 3)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert not pool.queue, "their events are not kept until the deadline"
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)


@looped
async def test_where_no_worker_can_be_made_calls_fail_and_later_ones_do_not(tmp_path: Path) -> None:
    """A disk without room is such a place: when there is room again nothing has to be started anew."""
    async with Node(tmp_path) as node:
        room = node.d.tmp
        node.d.tmp = tmp_path / "no" / "room"
        node.d.configure([function("one", HELLO)])
        await node.phase("one", "Failed")
        error = await node.fails("one", b"a")
        assert (error.kind, "cannot be made" in error.message) == ("unavailable", True)
        node.d.tmp = room
        await node.phase("one", "Running")
        assert (await node.call("one", b"a")).status == 200


@looped
async def test_code_that_hangs_while_it_loads_fails_with_that_reason(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        hangs = function("hangs", "import time\ntime.sleep(1000)\ndef handler(e, c): ...", limits={"startup": "300ms"})
        node.d.configure([hangs, function("sibling", HELLO)])
        assert (await node.call("sibling", b"a")).status == 200
        await node.phase("hangs", "Failed")
        assert "did not load within 0.3 s" in node.status("hangs")["message"]
        error = await node.fails("hangs")
        assert (error.status, error.kind) == (503, "unavailable")
        assert error.retry_after > 0


@looped
async def test_over_its_bound_a_call_is_answered_busy(tmp_path: Path) -> None:
    code = "import time\ndef handler(e, c):\n    time.sleep(1000)"
    async with Node(tmp_path) as node:
        node.d.configure([function("slow", code, concurrency=2, scale={"max": 1}, limits={"timeout": "1s"})])
        calls = [asyncio.create_task(node.fails("slow")) for _ in range(2)]
        await until(lambda: node.d.counters()["default/slow"]["in_hand"] == 2, 20)
        busy = await node.fails("slow")
        assert (busy.status, busy.kind, busy.limit) == (503, "busy", {"concurrency": 2})
        assert dict(busy.headers())["retry-after"] == "1"
        assert {e.kind for e in await asyncio.gather(*calls)} == {"timeout"}, "the one that waited, too"


@looped
async def test_no_call_fails_while_versions_follow_one_another(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:

        def version(n: int) -> str:
            return f"def handler(e, c):\n    return '{n}'"

        node.d.configure([function("f", version(0))])
        seen: list[bytes] = []
        over = asyncio.Event()

        async def caller() -> None:
            while not over.is_set():
                seen.append((await node.call("f")).body)

        callers = [asyncio.create_task(caller()) for _ in range(16)]
        await until(lambda: len(seen) > 200, 30)
        for n in range(1, 6):
            config = function("f", version(n))
            node.d.configure([config])
            await until(lambda d=config.version.digest: node.status("f").get("version") == d, 30)
            before = len(seen)
            await until(lambda b=before: len(seen) > b + 200, 30)
        over.set()
        await asyncio.gather(*callers)
        assert {int(b) for b in seen} == set(range(6))
        assert node.d.counters()["default/f"]["failed"] == {}
        # in order: once a version has answered behind the switch, no older one begins a call (those begun may end)
        assert seen[-1] == b"5"
        await until(lambda: node.status("f")["instances"] <= 4, 20)


@looped
async def test_a_version_that_does_not_load_or_check_leaves_the_old_one_in_its_place(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        good = function("f", HELLO)
        node.d.configure([good])
        await node.call("f", b"a")
        for bad in (
            function("f", "def other(e, c): ..."),
            function("f", "import nothing_like_it\n" + HELLO),
            function("f", "def handler(e, c):\n    raise KeyError", check={"data": "a"}),
            function("f", "import os\nos._exit(1)"),
        ):
            node.d.configure([bad])
            await until(lambda d=bad.version.digest: f"version {d} failed" in node.status("f").get("message", ""), 30)
            status = node.status("f")
            assert (status["phase"], status["version"]) == ("Degraded", good.version.digest)
            assert status["wanted"] == bad.version.digest
            assert (await node.call("f", b"a")).version == good.version.digest
        assert node.good == [good.version.digest]
        node.d.configure([good])
        assert node.status("f")["phase"] == "Running"
        assert "message" not in node.status("f")


@looped
async def test_a_version_whose_first_calls_all_fail_is_taken_back(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        good = function("f", HELLO)
        bad = function("f", "import os\ndef handler(e, c):\n    os._exit(7)")
        node.d.configure([good])
        await node.call("f", b"a")
        node.d.configure([bad])
        await until(lambda: node.status("f").get("version") == bad.version.digest, 30)
        for _ in range(5):
            assert (await node.fails("f")).kind == "crashed"
        assert (await node.call("f", b"a")).version == good.version.digest
        status = node.status("f")
        assert (status["phase"], status["version"]) == ("Degraded", good.version.digest)
        assert "taken back" in status["message"]
        node.d.configure([bad])  # another function has changed: this is no reason to try it again
        assert (await node.call("f", b"a")).version == good.version.digest
        assert node.good[-1] == good.version.digest


@looped
async def test_without_calls_nothing_runs_and_the_next_call_starts_it(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", HELLO, scale={"idle": "50ms"}), function("warm", HELLO, scale={"min": 2})])
        await node.call("f", b"a")
        await until(lambda: node.status("f")["instances"] == 0, 20)
        assert (await node.call("f", b"a")).cold
        await until(lambda: node.status("warm")["instances"] == 2, 20)


@looped
async def test_an_answer_in_pieces_comes_as_it_is_made_and_ends_with_its_deadline(tmp_path: Path) -> None:
    code = """
import time
from edgeward.functions.sdk import Response

def pieces(n):
    for i in range(n):
        yield f"{i},"
    if n > 3:
        time.sleep(1000)

def handler(event, context):
    return Response(pieces(int(event.data)), 203, {"X-A": "b"})
"""
    async with Node(tmp_path) as node:
        node.d.configure([function("s", code, limits={"timeout": "1s"})])
        reply = await node.call("s", b"3", timeout=20)
        assert reply.chunks is not None
        assert (reply.status, dict(reply.headers)["x-a"]) == (203, "b")
        assert b"".join([p async for p in reply.chunks]) == b"0,1,2,"
        reply = await node.call("s", b"4")
        assert reply.chunks is not None
        got = b""
        with pytest.raises(CallFailed) as caught:
            async for piece in reply.chunks:
                got += piece
        assert (got, caught.value.kind) == (b"0,1,2,3,", "timeout")
        assert b"".join([p async for p in (await node.call("s", b"2")).chunks or ()]) == b"0,1,"  # type: ignore[union-attr]


@looped
async def test_a_reader_that_is_slow_or_goes_away_costs_no_memory_and_no_worker(tmp_path: Path) -> None:
    code = "def handler(e, c):\n    while True:\n        yield b'x' * 100_000"
    async with Node(tmp_path) as node:
        node.d.configure([function("s", code, scale={"max": 1}), function("f", HELLO)])
        reply = await node.call("s")
        assert reply.chunks is not None
        stream = next(iter(node.d._functions["default/s"].current.links)).job.stream  # type: ignore[union-attr]
        await until(lambda: stream._bytes > 256 * 1024, 20)
        await node.call("f", b"a")
        assert stream._bytes < 2 << 20
        async for _ in reply.chunks:
            break
        await reply.chunks.aclose()  # type: ignore[attr-defined]
        again = await node.call("s", timeout=20)
        assert again.cold
        await again.chunks.aclose()  # type: ignore[union-attr]


@looped
async def test_what_was_made_before_the_deadline_can_be_read_behind_it(tmp_path: Path) -> None:
    code = "import time\ndef handler(e, c):\n    for _ in range(9):\n        yield b'x' * 100_000\n    time.sleep(1000)"
    async with Node(tmp_path) as node:
        node.d.configure([function("s", code, limits={"timeout": "1s"})])
        reply = await node.call("s")
        assert reply.chunks is not None
        await until(lambda: node.d.counters()["default/s"]["failed"] == {"timeout": 1}, 20)
        got = 0
        with pytest.raises(CallFailed, match="did not answer within 1 s"):
            async for piece in reply.chunks:
                got += len(piece)
        assert 256 * 1024 < got <= 900_000


@looped
async def test_what_is_required_and_not_enforced_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        probed = await node.d.probe()
        probed.enforced = [e for e in probed.enforced if e != "network"]
        probed.refused["network"] = "not today"
        node.d.configure([function("f", HELLO, require=["network"]), function("g", HELLO, require=[])])
        await node.phase("f", "Refused")
        assert "network (not today)" in node.status("f")["message"]
        error = await node.fails("f")
        assert (error.status, error.kind, error.limit) == (503, "refused", {"require": ["network"]})
        await node.call("g", b"a")
        assert {"what": "network", "why": "not today"} in node.status("g")["notEnforced"]
        assert "network" not in node.status("g")["enforced"]


@looped
async def test_one_function_reads_nothing_of_another(tmp_path: Path) -> None:
    keeper = """
import os
open("secret", "w").write("treasure")
def handler(e, c):
    return os.path.abspath("secret")
"""
    thief = """
import os
def handler(e, c):
    path = e.data.decode()
    got = []
    for attempt in (lambda: open(path).read(), lambda: os.listdir(os.path.dirname(path)), lambda: open(path, "w"),
                    lambda: os.listdir(os.path.dirname(os.path.dirname(path))), lambda: open("/etc/passwd").read(),
                    lambda: open("/proc/1/environ").read(), lambda: os.symlink(path, "link") or open("link").read()):
        try:
            got.append(repr(attempt()))
        except OSError:
            pass
    return got
"""
    async with Node(tmp_path) as node:
        probed = await node.d.probe()
        if "files" not in probed.enforced:
            pytest.skip(f"files: {probed.refused['files']}; status says so")
        node.d.configure([function("keeper", keeper), function("thief", thief)])
        path = (await node.call("keeper")).body
        assert (await node.call("thief", path)).body == b"[]"


@looped
async def test_lines_are_kept_with_their_call_and_below_their_cap(tmp_path: Path) -> None:
    code = """
def handler(event, context):
    print("printed")
    context.logger.warning("n=%s", 1, extra={"fields": {"a": 1}})
    context.logger.debug("not kept")
    if event.data == b"flood":
        for _ in range(5000):
            print("x" * 100)
    if event.data == b"raise":
        raise ValueError("detail")
"""
    async with Node(tmp_path) as node:
        node.d.configure([function("f", code, logs={"bytes": "64Ki"})])
        reply = await node.call("f")
        file = node.log("f")
        lines = file.lines(lambda line: True, 100)
        assert [(line.level, line.message, line.fields) for line in lines] == [
            ("info", "printed", {}),
            ("warning", "n=1", {"a": 1}),
        ]
        assert {line.invocation for line in lines} == {reply.invocation}
        error = await node.fails("f", b"raise")
        lines = node.log("f").lines(lambda line: line.invocation == error.invocation, 100)
        assert "ValueError: detail" in lines[-1].message
        assert 'File "main.py", line 10' in lines[-1].message
        for _ in range(4):
            await node.call("f", b"flood")
        await until(lambda: "4002 more lines were dropped" in node.log("f").lines(lambda line: True, 1)[0].message, 20)
        file = node.log("f")
        size = sum(p.stat().st_size for p in file.path.parent.iterdir())
        assert 32 * 1024 < size <= 64 * 1024


@looped
async def test_a_zygote_that_dies_is_replaced(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", HELLO)])
        await node.call("f", b"a")
        old = node.d.nursery.pid
        os.kill(old, signal.SIGKILL)
        await until(lambda: node.status("f")["instances"] == 0, 20)

        async def answers() -> bool:
            try:
                return (await node.call("f", b"a")).status == 200
            except CallFailed as e:
                assert e.kind == "unavailable"
                return False

        await until(answers, 30)
        assert node.d.nursery.pid not in (0, old)


@looped
async def test_a_start_that_was_made_ready_ends_with_its_zygote_too(tmp_path: Path) -> None:
    """Nobody could end it any more, and it may become a worker."""
    async with Node(tmp_path) as node:
        node.d.configure([function("f", HELLO)])
        await node.call("f", b"a")
        await until(lambda: node.d.nursery._spare is not None, 20)
        ended = os.pidfd_open(node.d.nursery._spare.pid)  # type: ignore[union-attr]
        try:
            os.kill(node.d.nursery.pid, signal.SIGKILL)
            # the loop stands still meanwhile, so it is not the nursery that ends it
            assert select.select([ended], [], [], 30)[0]
        finally:
            os.close(ended)


@looped
async def test_nothing_is_left_when_it_ends(tmp_path: Path) -> None:
    code = "import os\ndef handler(e, c):\n    return str(os.getpid())"
    async with Node(tmp_path) as node:
        node.d.configure([function("f", code), function("loop", "def handler(e, c):\n    while True: ...")])
        worker = identify(int((await node.call("f")).body))
        zygote = identify(node.d.nursery.pid)
        going_on = asyncio.create_task(node.fails("loop"))
        await until(lambda: node.status("loop").get("instances") == 1, 20)
        assert worker
        assert zygote
    assert (await going_on).kind == "unavailable"
    await until(lambda: not alive(worker) and not alive(zygote), 20)
    assert list((tmp_path / "tmp").iterdir()) == []


@looped
async def test_what_a_killed_dispatcher_left_goes_though_it_ends_only_after_the_next_one_came(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        prefix = node.d._prefix
    instance = f"{prefix}0-late"
    cgroup.prepare("n1", instance, cgroup.Limits(64 << 20, None, 8))
    if not (doors := cgroup.doors("n1", instance)):
        pytest.skip("no groups here")
    late = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        for door in doors:
            Path(door).write_text(str(late.pid))
        async with Node(tmp_path) as node:
            # it was in its groups when this one began: these could not go at once
            assert instance in node.d._left
            await until(lambda: cgroup.leftovers("n1", prefix) == [], 60)
            node.d.configure([function("f", HELLO)])
            await node.call("f", b"a")
    finally:
        with contextlib.suppress(ProcessLookupError):
            late.kill()
        await late.wait()


LOGS_ODDLY = """
import contextlib, os
import msgspec
from edgeward.core.invocation import Log, frame

def handler(event, context):
    times = (float("nan"), float("inf"), -1e18, 1e300)
    said = b"".join(frame(Log(context.invocation, 30, at, "at", {})) for at in times)
    said += frame(Log(context.invocation, 30, 0.0, "ext", {"a": msgspec.msgpack.Ext(5, b"x")}))
    said += frame(Log(context.invocation, 30, 0.0, "key", {"a": {(1, 2): 3}}))
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            while said:
                said = said[os.write(fd, said):]
    return "well"
"""


@looped
async def test_a_line_with_a_time_or_fields_that_cannot_be_written_costs_neither_the_line_nor_the_call(
    tmp_path: Path,
) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("odd", LOGS_ODDLY)])
        assert (await node.call("odd")).body == b"well"
        lines = node.log("odd").lines(lambda line: True, 100)
        assert [line.message for line in lines] == ["at"] * 4 + ["ext", "key"]
        assert all("2020" < line.time[:4] < "2096" for line in lines)
        assert lines[-1].fields == {"fields": "{'a': {(1, 2): 3}}"}


@looped
async def test_a_dispatcher_that_is_killed_leaves_no_worker_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.functions.driver", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p] + [str(ROOT)])}
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, env=env, cwd=ROOT)
    assert process.stdout
    async with asyncio.timeout(60):
        pids = [int(n) for n in (await process.stdout.readline()).split()]
    known = [identify(pid) for pid in pids]
    process.kill()
    await process.wait()
    await until(lambda: not any(p and alive(p) for p in known), 20)
    async with Node(tmp_path) as node:
        assert list((tmp_path / "tmp").iterdir()) == []
        # what it had ready was not in `known` and may be ending still: then its groups go when it has
        await until(lambda: cgroup.leftovers("n1", node.d._prefix) == [], 60)
        node.d.configure([function("f", HELLO)])
        await node.call("f", b"a")
    assert cgroup.leftovers("n1", node.d._prefix) == []
