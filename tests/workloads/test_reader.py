"""What an app wrote, of all its instances: chosen, told apart, followed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest
from tests.core.pair import until

from edgeward.agent.kinds import load
from edgeward.core.errors import EdgewardError, NotFound
from edgeward.core.resource import Resource, decode
from edgeward.workloads.edge import AppsEdge

load()


class _Wish:
    """Two instances of one App, and nothing else."""

    def __init__(self, script: str) -> None:
        process = {"command": ["sh", "-c", script]}
        spec = {"process": process, "replicas": 2, "stop": {"grace": "1s"}}
        doc = {"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": "web"}, "spec": spec}
        self._app = decode(doc)

    def apps(self) -> dict[tuple[str, str], tuple[Resource, int]]:
        return {("default", "web"): (self._app, 2)}

    def config(self, namespace: str, name: str) -> dict[str, str] | None:
        return None

    def secret(self, namespace: str, name: str) -> dict[str, str] | None:
        return None

    def service_env(self, namespace: str) -> dict[str, str]:
        return {}


def test_the_lines_of_several_instances_and_a_reader_that_takes_its_time(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    script = f"printf 'one\\ntw'; touch $EDGEWARD_INSTANCE.up; read x < {fifo}; printf 'o\\n'; exec sleep 1000"
    os.mkfifo(fifo)

    async def body() -> None:
        apps = AppsEdge(
            node="plant-1",
            site="plant",
            data_dir=tmp_path / "data",
            source=_Wish(script),
            report=lambda *_: None,
            event=lambda *_: None,
        )
        running = asyncio.create_task(apps.run())
        try:
            async with asyncio.timeout(180):
                with pytest.raises(NotFound, match=r"App/none: wrote nothing on this node \(see: "):
                    [p async for p in apps.logs.read("default", "none")]
                await until(lambda: len(list((tmp_path / "data").rglob("*.up"))) == 2)
                await until(lambda: all(p.stat().st_size == 6 for p in (tmp_path / "data").rglob("*.log")))
                ids = sorted(p.stem for p in (tmp_path / "data").rglob("*.up"))
                now = b"".join([p async for p in apps.logs.read("default", "web")]).splitlines()
                assert sorted(now) == [f"[{i}] {x}".encode() for i in ids for x in ("one", "tw")]
                one = b"".join([p async for p in apps.logs.read("default", "web", tail=1, instance=ids[0])])
                assert one == b"tw", "one alone is given as it wrote"
                with pytest.raises(EdgewardError, match=r"\?since: 'soon' is no duration"):
                    [p async for p in apps.logs.read("default", "web", since="soon")]
                got, fd = b"", -1
                followed = apps.logs.read("default", "web", follow=True)
                async with contextlib.aclosing(followed):  # type: ignore[type-var]
                    async for piece in followed:
                        got += piece
                        if got.count(b"one") == 2 and fd < 0:
                            fd = os.open(fifo, os.O_RDWR)
                            os.write(fd, b"1\n2\n")
                        if b"two" in got:
                            await asyncio.sleep(1.3)  # longer than the look for new instances
                        if got.count(b"two\n") == 2:
                            break
                os.close(fd)
                assert sorted(got.splitlines()) == [f"[{i}] {x}".encode() for i in ids for x in ("one", "two")]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await apps.shutdown(leave=False)

    asyncio.run(body())
