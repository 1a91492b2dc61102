"""Canaries on real workers: shares, stickiness, promotion, and the node taking a bad one back by itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path

from tests.core.pair import until
from tests.functions.node import HELLO, Node, function, looped

from edgeward.core.invocation import CallFailed
from edgeward.functions.canary import gets_canary

KEY = "default/f"
#: Fails as its environment says.
BRITTLE = """
import os, time
from edgeward.functions.sdk import Response

def handler(event, context):
    how = os.environ.get("HOW", "")
    if how == "raise":
        raise ValueError("no")
    if how == "kill":
        os._exit(1)
    if how == "500":
        return Response("no", 500)
    if how == "slow":
        time.sleep(0.02)
    return context.version
"""


async def with_canary(node: Node, weight: float = 20, how: str = "", **more: object) -> tuple[str, str]:
    """The digests of the stable version and of its canary, both answering."""
    stable = function("f", BRITTLE)
    node.d.configure([stable])
    await node.call("f", timeout=30)
    await node.phase("f", "Running")
    canary = function("f", BRITTLE, env={"HOW": how, "NEW": "1"}, canary={"weight": weight, **more})
    node.d.configure([canary])
    await until(lambda: "canary" in node.status("f"), 30)
    digests = stable.version.digest, canary.version.digest
    assert node.status("f")["canary"] == {"version": digests[1], "weight": weight}
    assert (node.status("f")["version"], node.status("f")["phase"]) == (digests[0], "Running")
    assert "wanted" not in node.status("f")
    return digests


@looped
async def test_a_canary_gets_its_share_and_a_key_stays_where_it_is(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        stable, canary = await with_canary(node, 20)
        got = Counter([(await node.call("f")).version for _ in range(100)])
        assert got == {stable: 80, canary: 20}
        for key in ("anna", "bert", "carl", "10.0.0.7", "10.0.0.8", ""):
            mine = canary if gets_canary(key, KEY, 20) else stable
            assert {(await node.call("f", key=key)).version for _ in range(3)} == {mine}
        assert node.good == [stable], "a canary is no way back"
        # an alias and a digest choose, whatever the key says
        for version, answers in (("stable", stable), ("canary", canary), (canary, canary), (stable[:8], stable)):
            assert (await node.call("f", version=version, key="anna")).version == answers
        assert (await node.fails("f", version=canary[:7])).kind == "unknown"
        assert (await node.fails("f", version="elsewhere")).kind == "unknown"


@looped
async def test_weights_change_and_a_promotion_starts_nothing_anew(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        stable, canary = await with_canary(node, 0)
        assert {(await node.call("f")).version for _ in range(20)} == {stable}
        assert (await node.call("f", version="canary")).version == canary
        worker = next(iter(node.d._functions[KEY].canary.links))  # type: ignore[union-attr]
        more = function("f", BRITTLE, env={"HOW": "", "NEW": "1"}, canary={"weight": 100})
        assert more.version.digest == canary, "a weight makes no version"
        node.d.configure([more])
        assert {(await node.call("f")).version for _ in range(20)} == {canary}
        node.d.configure([function("f", BRITTLE, env={"HOW": "", "NEW": "1"})])
        status = node.status("f")
        assert (status["version"], status["phase"], status.get("canary")) == (canary, "Running", None)
        assert next(iter(node.d._functions[KEY].current.links)) is worker  # type: ignore[union-attr]
        assert node.good == [stable, canary]
        assert (await node.call("f", version="canary")).version == canary, "the alias is never without a version"
        # back to what was: the canary ends, and nothing else happens
        node.d.configure([function("f", BRITTLE, canary={"weight": 50})])
        await until(lambda: "canary" in node.status("f"), 30)
        node.d.configure([function("f", BRITTLE, env={"HOW": "", "NEW": "1"})])
        assert node.status("f").get("canary") is None
        assert {(await node.call("f")).version for _ in range(5)} == {canary}


@looped
async def test_no_call_fails_under_load_with_a_canary_in_between(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        new = HELLO + "# new\n"
        node.d.configure([function("f", HELLO, concurrency=1000)])
        await node.call("f", timeout=30)
        seen: Counter[str] = Counter()
        steps = [
            function("f", new, concurrency=1000, canary={"weight": 10}),
            function("f", new, concurrency=1000, canary={"weight": 60}),
            function("f", HELLO, concurrency=1000),  # rolled back
            function("f", new, concurrency=1000, canary={"weight": 30}),
            function("f", new, concurrency=1000),  # promoted
        ]
        left, changed = [10_000], asyncio.Event()

        async def caller(n: int) -> None:
            while left[0] > 0 or not changed.is_set():
                left[0] -= 1
                seen[(await node.call("f", b"x", timeout=60, key=f"{n}-{left[0]}" if n % 2 else None)).version] += 1

        async def changes() -> None:
            for n, config in enumerate(steps):
                await until(lambda n=n: left[0] <= 9000 - n * 1500, 60)  # type: ignore[misc]
                node.d.configure([config])
                if config.policy.canary is not None:
                    await until(lambda: "canary" in node.status("f"), 30)
            changed.set()

        async with asyncio.TaskGroup() as group:
            for n in range(32):
                group.create_task(caller(n))
            group.create_task(changes())
        assert seen.total() >= 10_000
        assert set(seen) == {steps[0].version.digest, steps[2].version.digest}
        assert node.d.counters()[KEY]["failed"] == {}


async def outcome(node: Node, canary: str, **more: str) -> Counter[str]:
    """Calls until the canary is taken back: how often which version failed."""
    failed: Counter[str] = Counter()
    for _ in range(400):
        try:
            reply = await node.call("f", timeout=30, **more)  # type: ignore[arg-type]
            failed[reply.version] += reply.status >= 500
        except CallFailed as e:
            failed[e.version] += 1
        if node.status("f").get("takenBack") == canary:
            return failed
    raise AssertionError(f"still there: {node.status('f')}, {failed}")


@looped
async def test_a_canary_that_fails_is_taken_back_by_the_node(tmp_path: Path) -> None:
    for how in ("raise", "kill", "500"):
        async with Node(tmp_path / how) as node:
            stable, canary = await with_canary(node, 20, how)
            failed = await outcome(node, canary)
            assert set(+failed) == {canary}
            assert failed[canary] <= 5
            status = node.status("f")
            assert (status["phase"], status["version"], status["wanted"]) == ("Degraded", stable, canary)
            assert f"version {canary} was taken back: " in status["message"]
            assert [t.partition(" ")[0] for t in node.told] == ["CanaryStarted", "CanaryTakenBack"]
            assert {(await node.call("f", key=str(n))).version for n in range(50)} == {stable}
            assert (await node.call("f", version="canary")).version == stable


@looped
async def test_what_was_taken_back_does_not_come_back_by_itself(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        _, canary = await with_canary(node, 50, "raise")
        await outcome(node, canary)
        for weight in (50, 90):  # what is declared again, or with another weight, is no reason
            env = {"HOW": "raise", "NEW": "1"}
            node.d.configure([function("f", BRITTLE, env=env, canary={"weight": weight})])
            assert node.d._functions[KEY].trying is None
            assert node.status("f")["takenBack"] == canary
        node.d.configure([function("f", BRITTLE, env=env)])
        await until(lambda: node.status("f")["version"] == canary, 30)
        assert "takenBack" not in node.status("f"), "somebody wants it for all calls: it is tried"


@looped
async def test_slow_calls_count_where_it_was_declared(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        _, canary = await with_canary(node, 50, "slow", latency="10ms")
        # the stable version's may be slow too on a machine that is busy, so only the canary is called
        node.d._functions[KEY].tallies[0].calls = 1000
        await outcome(node, canary, version="canary")


@looped
async def test_a_canary_that_does_not_start_leaves_all_calls_to_stable(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", BRITTLE)])
        first = await node.call("f", timeout=30)
        node.d.configure([function("f", "import nothing_like_it", canary={"weight": 50})])
        await node.phase("f", "Degraded")
        assert {(await node.call("f")).version for _ in range(20)} == {first.version}


@looped
async def test_a_first_version_has_all_calls_whatever_its_weight(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", BRITTLE, canary={"weight": 1})])
        versions = {(await node.call("f", timeout=30, key=str(n))).version for n in range(5)}
        assert versions == {node.status("f")["version"]}


@looped
async def test_calls_that_wait_for_a_canary_that_goes_are_answered_by_stable(tmp_path: Path) -> None:
    slow = "import time\ndef handler(event, context):\n    time.sleep(0.3)\n    return context.version"
    async with Node(tmp_path) as node:
        node.d.configure([function("f", BRITTLE)])
        await node.call("f", timeout=30)
        node.d.configure([function("f", slow, scale={"max": 1}, canary={"weight": 0})])
        await until(lambda: "canary" in node.status("f"), 30)
        canary = node.status("f")["canary"]["version"]
        calls = [asyncio.ensure_future(node.call("f", timeout=30, version="canary")) for _ in range(5)]
        await asyncio.sleep(0)  # each has run to where it waits
        assert len(node.d._functions[KEY].canary.queue) == 4  # type: ignore[union-attr]
        node.d.configure([function("f", BRITTLE)])
        versions = [(await c).version for c in calls]
        assert versions[0] == canary, "what was begun is finished"
        assert set(versions[1:]) == {node.status("f")["version"]}
        with contextlib.suppress(CallFailed):
            await node.call("f")


@looped
async def test_calls_that_wait_for_stable_move_to_what_is_promoted(tmp_path: Path) -> None:
    slow = "import time\ndef handler(event, context):\n    time.sleep(0.3)\n    return context.version"
    async with Node(tmp_path) as node:
        old, new = function("f", slow, scale={"max": 1}), {"scale": {"max": 1}, "canary": {"weight": 0}}
        node.d.configure([old])
        await node.call("f", timeout=30)
        node.d.configure([function("f", BRITTLE, **new)])
        await until(lambda: "canary" in node.status("f"), 30)
        calls = [asyncio.ensure_future(node.call("f", timeout=30)) for _ in range(5)]
        await asyncio.sleep(0)  # each has run to where it waits
        assert len(node.d._functions[KEY].current.queue) == 4  # type: ignore[union-attr]
        node.d.configure([function("f", BRITTLE, scale={"max": 1})])
        versions = [(await c).version for c in calls]
        assert versions[0] == old.version.digest
        assert set(versions[1:]) == {node.status("f")["version"]} != {old.version.digest}
