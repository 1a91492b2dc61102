"""Samples of real calls, and how a function does in numbers."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from tests.core.pair import until
from tests.functions.node import Node, function, looped

from edgeward.core.invocation import CallFailed
from edgeward.core.invocation import Sample as Offer
from edgeward.functions.edge import read_samples
from edgeward.functions.measure import with_memory
from edgeward.functions.picks import SamplePlan
from edgeward.functions.samples import SampleFile, of_offer, wanted_lines
from edgeward.functions.stats import BUCKETS, added, metrics, quantile

CODE = """
from edgeward.functions.sdk import Response

def handler(event, context):
    text = event.data
    if text == b"raise":
        raise ValueError("no")
    if text == b"500":
        return Response(b"sorry", 500)
    if text.startswith(b"score"):
        return str(context.sample(text, "label", score=float(text[5:]), tags={"camera": "3"}))
    if text == b"stream":
        return (piece for piece in (b"a", b"b"))
    return text
"""


async def kept(folder: Path, **args: Any) -> list[dict[str, Any]]:
    lines = [json.loads(line) async for line in read_samples(folder, {"namespace": "default", "name": "f"} | args)]
    return [{k: v for k, v in line.items() if k not in ("time", "node", "version", "type")} for line in lines]


async def call(node: Node, *data: bytes) -> list[str]:
    """Ids of the calls."""
    ids = []
    for one in data:
        with contextlib.suppress(CallFailed):
            reply = await node.call("f", one, timeout=30)
            ids.append(reply.invocation)
            if reply.chunks is not None:
                assert [c async for c in reply.chunks] == [b"a", b"b"]
    return ids


@looped
async def test_nothing_is_kept_of_what_is_not_declared(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", CODE)])
        await call(node, b"a", b"raise", b"500", b"score0.1")
        assert await kept(tmp_path) == []
        assert not (tmp_path / "samples").exists()


@looped
async def test_errors_scores_and_a_share_of_calls_are_kept_with_their_input_and_output(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", CODE, samples={"errors": True, "score": {"below": 0.6}})])
        ids = await call(node, b"a", b"raise", b"500", b"score0.1", b"score0.9")
        raised, answered, scored = await kept(tmp_path)
        assert raised.pop("invocation")
        assert raised == {"why": "error", "input": "raise", "status": 500, "error": "error"}
        assert answered == {"why": "error", "input": "500", "output": "sorry", "status": 500, "invocation": ids[1]}
        assert scored == {
            "why": "score", "input": "score0.1", "output": "label", "score": 0.1, "tags": {"camera": "3"},
            "invocation": ids[2],
        }  # fmt: skip
        node.d.configure([function("f", CODE, samples={"rate": 1})])
        (odd, _) = await call(node, b"\xff", b"stream")
        binary, stream = (await kept(tmp_path, why="rate"))[:2]
        assert (binary["input"], binary["encoded"], binary["invocation"]) == ("/w==", ["input", "output"], odd)
        assert (stream["input"], stream.get("output")) == ("stream", None)
        assert [s["input"] for s in await kept(tmp_path, limit=1)] == ["stream"]
        assert wanted_lines(tmp_path / "samples/default/f.jsonl", "9999", "", 9) == []
        assert len(await kept(tmp_path, since="1h")) == 5
        numbers = metrics(node.d.counters())
        assert numbers['edgeward_function_samples_total{function="default/f"}'] == 5
        node.d.configure([])
        assert not list((tmp_path / "samples").glob("*/*")), "gone with the function"


@looped
async def test_a_budget_holds_over_restarts_and_what_has_no_room_is_counted(tmp_path: Path) -> None:
    config = function("f", CODE, samples={"rate": 1, "perDay": 2000})
    for _ in range(2):
        async with Node(tmp_path) as node:
            node.d.configure([config])
            await call(node, *[b"x" * 300] * 10, b"y" * 3000)
            counters = node.d.counters()["default/f"]
    lines = await kept(tmp_path)
    assert 1 <= len(lines) <= 2
    assert counters["samples"] == 0
    assert counters["samples_dropped"] == 11
    assert (tmp_path / "samples/default/f.jsonl").stat().st_size <= 2000


def test_what_is_told_kept_is_in_the_file_and_a_full_one_loses_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "default" / "f.jsonl"
    file = SampleFile(path, SamplePlan(keep=65536, per_day=1 << 30))
    for n in range(300):
        assert file.keep(of_offer(f"2026-01-0{1 + n % 2}T", "n1", "i", Offer("i", n, b"%d" % n * 100, b""), "v"))
        assert path.read_bytes().splitlines()[-1].count(str(n).encode() * 100) == 1
    assert sum(p.stat().st_size for p in path.parent.iterdir()) <= 65536
    assert not file.keep(of_offer("2026-01-03T", "n1", "i", Offer("i", 0, b"x" * 40_000, b""), "v"))
    assert (file.kept, file.dropped) == (300, 1)


@looped
async def test_numbers_tell_of_failures_instances_and_both_arms_of_a_canary(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", CODE)])
        await call(node, b"a", b"raise")
        node.d.configure([function("f", CODE + "\n", canary={"weight": 50, "calls": 1000})])
        await until(lambda: "canary" in node.status("f"), 30)
        await call(node, *[b"a"] * 10)
        numbers = with_memory(node.d.numbers("default/f"))
        assert numbers["failed"] == {"error": 1}
        judged = {arm: (j["calls"], j["failed"]) for arm, j in numbers["judged"].items()}
        assert judged == {"stable": (5, 0), "canary": (5, 0)}
        assert {r["version"] for r in numbers["running"]} == {j["version"] for j in numbers["judged"].values()}
        assert all(r["memory"] > 1 << 18 for r in numbers["running"])
        assert numbers["cold"] == 2
        canary = numbers["judged"]["canary"]["version"]
        assert (
            metrics(node.d.counters())[f'edgeward_function_canary_percent{{function="default/f",version="{canary}"}}']
            == 50
        )
        node.d.configure([function("f", CODE + "\n")])
        await call(node, b"a")
        assert node.d.counters()["default/f"]["cold"] == 2, "what is gone stays counted"


def test_quantiles_are_read_off_the_histogram() -> None:
    latency = [0] * (len(BUCKETS) + 1)
    assert quantile(latency, 0.5) == 0.0
    latency[3] = 100  # between 2.5 and 5 ms
    assert quantile(latency, 0.5) == 0.00375
    assert quantile(latency, 1.0) == 0.005
    latency[-1] = 100
    assert quantile(latency, 0.99) == BUCKETS[-1]
    one = {"node": "a", "calls": 3, "failed": {"error": 1}, "latency": latency, "seconds": 1.0, "running": [1]}
    both = added([one, one])
    assert (both["calls"], both["failed"], both["latency"][3], both["running"]) == (6, {"error": 2}, 200, [1, 1])
