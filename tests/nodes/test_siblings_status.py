"""What nodes of a site say of their objects is known at the others, over real meshes on the loopback."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.core.pair import until
from tests.nodes.meshes import Site

from edgeward.core import clock
from edgeward.core.errors import EdgewardError
from edgeward.core.resource import Key
from edgeward.nodes import siblings_status
from edgeward.nodes.siblings_status import Statuses, Told, _Held
from edgeward.nodes.wire import Status


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


class Nobody:
    def serve(self, verb: str, handler: Any) -> None: ...

    async def ask(self, peer: str, verb: str, data: bytes = b"", timeout: float = 10.0) -> bytes:
        return b""


def test_a_node_fills_no_others_memory(monkeypatch: Any) -> None:
    monkeypatch.setattr(siblings_status, "HELD", 1000)
    two, held = Statuses(Nobody(), 1, dict, lambda *_: None), _Held()

    def say(name: str, size: int, upto: int) -> None:
        two._take("a", held, Told(1, upto, False, [Status("App", "default", name, {"m": "x" * size})]))

    say("one", 900, 1)
    say("one", 950, 2)  # in the place of the former
    with pytest.raises(EdgewardError, match="too much"):
        say("two", 100, 3)
    say("one", 10, 3)
    say("two", 900, 4)
    assert held.upto == 4 and set(held.statuses) == {key("one"), key("two")}
