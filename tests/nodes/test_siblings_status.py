"""What nodes of a site say of their objects is known at the others, over real meshes on the loopback."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.core.pair import until
from tests.nodes.meshes import Site

from edgeward.core import clock
from edgeward.core.resource import Key
from edgeward.nodes import siblings_status
from edgeward.nodes.siblings_status import Statuses


def key(name: str) -> Key:
    return Key("App", "default", name)


def test_statuses_are_told_once_in_parts_and_anew_after_a_restart(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(siblings_status, "PAGE", 3000)

    async def body() -> None:
        site = Site(tmp_path, "a", "b")
        said: dict[Key, dict[str, Any]] = {}
        told: list[set[Key]] = []
        ones = [Statuses(site.meshes["a"], 1, lambda: said, lambda *_: None)]
        two = Statuses(site.meshes["b"], 1, dict, lambda node, keys: told.append(keys))

        def say(name: str, status: dict[str, Any] | None) -> None:
            if status is None:
                del said[key(name)]
            else:
                said[key(name)] = status
            ones[-1].said(key(name))

        async with site.running():
            task = asyncio.create_task(two.asks.run())
            await site.linked()
            try:
                for n in range(20):
                    say(f"app{n}", {"message": "x" * 500})
                two.heard("a", ones[-1].told, clock.monotonic())
                await until(lambda: two.of(key("app19")) == {"a": {"message": "x" * 500}})
                assert set().union(*told) == {key(f"app{n}") for n in range(20)}
                assert two.fresh() == two.known() == {"a"}
                told.clear()
                say("app3", {"message": "new"})
                say("app4", None)
                two.heard("a", ones[-1].told, clock.monotonic())
                await until(lambda: two.of(key("app3")) == {"a": {"message": "new"}})
                assert told == [{key("app3"), key("app4")}] and not two.of(key("app4")), "only what is new"
                # another run counts anew; what it does not say is not there
                said.clear()
                ones.append(Statuses(site.meshes["a"], 2, lambda: said, lambda *_: None))
                say("app3", {"message": "again"})
                two.heard("a", ones[-1].told, clock.monotonic())
                await until(lambda: two.of(key("app3")) == {"a": {"message": "again"}})
                assert not two.of(key("app5"))
                two.forget("a")
                assert not two.of(key("app3")) and not two.known()
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    asyncio.run(body())
