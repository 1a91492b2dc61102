"""What the hub keeps of a function's versions, in a real store."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.core.pair import until
from tests.nodes.fleet import fleet

from edgeward.core.resource import Resource, decode
from edgeward.functions.keeping import BesideAsk, BesideTold, CloudHistory


def function(code: str, **spec: Any) -> Resource:
    doc: dict[str, Any] = {"apiVersion": "edgeward/v1", "kind": "Function", "metadata": {"name": "f"}}
    return decode(doc | {"spec": {"runtime": "python", "source": {"inline": code}} | spec})


def test_a_node_is_told_what_a_canary_is_tried_beside(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path / "hub") as f:
            history = CloudHistory(f.store)
            await history.open(f.hub)
            following = asyncio.create_task(history.run())

            async def told(node: str, ask: object) -> dict[str, Any] | None:
                found: BesideTold = await f.ask(node, "beside", ask, BesideTold)
                return found.spec

            ask = BesideAsk("default", "f")
            assert await told("plant-1", ask) is None
            first = await f.store.put(function("a", placement={"site": "plant"}, env={"A": "1"}))
            await until(lambda: len(history.of("default", "f")) == 1)
            assert await told("plant-1", ask) is None, "there was none before"
            trial = function("b", placement={"site": "plant"}, canary={"weight": 5})
            await f.store.put(trial, expect=f.store.entry(first.key).revision)
            # also before the hub has noted the trial itself
            code = await told("plant-1", ask) or {}
            assert (code.get("source"), code.get("env")) == ({"inline": "a"}, {"A": "1"})
            assert "placement" not in code
            assert await told("shop-1", ask) is None, "of a function that it does not have"
            assert await told("plant-1", b"no message") is None
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    asyncio.run(body())


def test_the_hub_keeps_three_of_each_function_until_it_is_deleted(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path / "hub") as f:
            history = CloudHistory(f.store)
            # another process of the hub notes the same, and neither is in the other's way
            tasks = [asyncio.create_task(h.run()) for h in (history, CloudHistory(f.store))]

            def codes() -> str:
                return "".join(i["spec"]["source"]["inline"] for i in history.of("default", "f"))

            key = function("a").key
            for n, code in enumerate("abcde"):
                entry = f.store.entry(key)
                await f.store.put(function(code), expect=entry.revision if entry else 0)
                await until(lambda n=n: codes() == "abcde"[max(0, n - 2) : n + 1])  # type: ignore[misc]
            assert [spec["source"]["inline"] for _, spec in history.specs()] == ["c", "d", "e"]
            await f.store.put_status(key, {"nodes": {"plant-1": {"observedGeneration": 5, "version": "abc"}}})
            await until(lambda: history.of("default", "f")[-1]["version"] == "abc")
            await f.store.remove(key)
            await until(lambda: history.of("default", "f") == [])
            assert list(history.specs()) == []
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(body())
