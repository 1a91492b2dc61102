"""A node's own policy: what its services refuse whoever asks; and sessions over the real transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from edgeward.agent.tunnel import tunnel_of, user_of
from edgeward.core.audit import Audit
from edgeward.core.errors import EdgewardError, Forbidden, Invalid
from edgeward.core.identity import NodeIdentity
from edgeward.core.store_sqlite import SqliteStore
from edgeward.tunnel.attach import Attached
from edgeward.tunnel.session import Session, pair

LONG = 60.0


class Node:
    def __init__(self, folder: Path, config: Any) -> None:
        self.audit = Audit()
        identity = NodeIdentity.open(folder / "identity")
        store = SqliteStore(folder / "store.db")
        edge, _ = tunnel_of("n", identity, list, config, data=folder, store=store, audit=self.audit)
        self.operator, self.session = pair(edge.serve)

    def records(self) -> list[tuple[str, str]]:
        return [(r["verb"], r["outcome"]) for r in self.audit.items()]


def run(folder: Path, config: Any, body: Callable[[Node], Coroutine[Any, Any, Any]]) -> None:
    async def timed() -> None:
        async with asyncio.timeout(LONG):
            await body(Node(folder, config))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(timed())


async def refused(session: Session, service: str, args: dict[str, Any]) -> EdgewardError:
    with pytest.raises(EdgewardError) as caught:
        await session.open(service, args).opened()
    return caught.value


PROGRAMS = (
    ("exec", {"argv": ["id"]}),
    ("exec", {"argv": ["id"], "app": "a/b"}),
    ("shell", {}),
    ("copy", {"path": "/etc/passwd"}),
)


@pytest.mark.parametrize("config", [False, {"exec": False}, {"allow": ["tcp:22"]}])
def test_a_node_that_refuses_programs_refuses_all_that_run_or_read(tmp_path: Path, config: Any) -> None:
    async def body(node: Node) -> None:
        for service, args in PROGRAMS:
            assert isinstance(await refused(node.operator, service, args), Forbidden)
        assert node.records() == []

    run(tmp_path, config, body)


def test_a_session_over_the_transport_gives_all_of_a_long_output_and_the_code(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        stream = node.operator.open("exec", {"argv": ["/bin/sh", "-c", "head -c 3000000 /dev/zero; exit 3"]})
        await stream.opened()
        with (tmp_path / "out").open("wb") as out:
            end = await Attached(stream, stdin=-1, stdout=out.fileno()).run()
        assert end.code == 3
        assert (tmp_path / "out").stat().st_size == 3_000_000
        await stream.wait_closed()
        assert node.records() == [("exec", "done")]

    run(tmp_path, None, body)


def test_a_session_that_ends_with_its_link_ends_its_program(tmp_path: Path) -> None:
    mark = tmp_path / "ended"

    async def body(node: Node) -> None:
        text = f"trap 'echo 1 >{mark}; exit' TERM; echo on; while :; do sleep 0.1; done"
        stream = node.operator.open("exec", {"argv": ["/bin/sh", "-c", text]})
        await stream.opened()
        await stream.read()
        node.operator.close()
        while not node.records():  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # the period of looking
        assert mark.exists()
        assert node.records()[0][1] != "done"

    run(tmp_path, True, body)


def test_a_user_that_is_no_name_is_no_policy() -> None:
    assert user_of(None) == user_of(True) == user_of({}) == ""
    assert user_of({"user": "operator"}) == "operator"
    with pytest.raises(Invalid):
        user_of({"user": 0})
