"""A node keeps its Services closed by what its replica says, says whether it does, and cleans up behind itself."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.agent.test_desired import doc, replica

from edgeward.agent import closing
from edgeward.agent.closing import Closing, services
from edgeward.agent.desired import Desired
from edgeward.core.resource import Key, Resource, to_stored
from edgeward.gateway import nft
from edgeward.nodes.wire import HubObject

__all__ = ["Desired", "HubObject", "replica", "to_stored"]  # what the program below uses
WEB = Key("Service", "default", "web")
INSTANCES = [
    {"id": "1", "node": "plant-1", "phase": "Running", "ports": {"http": 8080}},
    {"id": "2", "node": "plant-1", "phase": "Starting", "ports": {"http": 8081, "admin": 1}},
    {"id": "3", "node": "plant-2", "phase": "Running", "ports": {"http": 8082}},
]
ENDPOINTS = [
    {"node": "plant-1", "site": "plant", "address": "10.1.0.2", "port": 8080},
    {"node": "plant-2", "site": "plant", "address": "10.1.0.3", "port": 8082},
    {"node": "shop-1", "site": "shop", "address": "10.2.0.2", "port": 8080},
]


def declared(scope: str = "site") -> list[Resource]:
    app = doc("App", "web", {"process": {"command": ["x"]}, "ports": [{"name": "http", "env": "PORT"}]})
    return [app, doc("Service", "web", {"app": "web", "port": "http", "scope": scope})]


STATUS: dict[str, dict[str, Any]] = {"App/web": {"instances": INSTANCES}, "Service/web": {"endpoints": ENDPOINTS}}


def test_what_is_here_and_what_is_elsewhere(tmp_path: Path) -> None:
    r = replica(tmp_path, *declared(), status=STATUS)
    asyncio.run(r.put_status(Key("App", "default", "web"), STATUS["App/web"]))
    found = services(Desired(r, "plant-1", "plant"), r, "plant")
    assert found == {WEB: closing.Closed("Service/web", "site", (8080, 8081), (("10.2.0.2", 8080),))}


def test_what_other_sites_nodes_say_stops_nothing(tmp_path: Path) -> None:
    odd = [{"site": "shop", "address": "10.2.0.2", "port": p} for p in ("x", -1, 65536, True, None, 1.5, [], 443)]
    odd += [{"site": "shop", "address": a, "port": 1} for a in (None, "", {}, "fe80::1%a } x")]
    r = replica(tmp_path, *declared(), status={"Service/web": {"endpoints": odd}})
    (found,) = services(Desired(r, "plant-1", "plant"), r, "plant").values()
    assert ("10.2.0.2", 443) in found.away
    wall, _ = closing.closed.build([found], closing.closed.Site(), "10.1.0.2")
    assert [(str(a), p) for a, p in wall.away] == [("10.2.0.2", 443)]


def test_a_failure_is_told_and_the_node_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[str, ...]:
        raise OSError("no descriptors")

    monkeypatch.setattr(closing, "links", broken)
    told: dict[Key, dict[str, Any] | None] = {}
    r = replica(tmp_path, *declared(), status=STATUS)
    one = Closing(
        "plant-1", "plant", "10.1.0.2", tmp_path,
        replica=r, desired=Desired(r, "plant-1", "plant"), status=told.__setitem__, event=lambda *_: None,
    )  # fmt: skip
    assert asyncio.run(one._step(True)) == "no descriptors"
    assert told == {WEB: {"enforced": False, "why": "no descriptors"}}


def test_a_node_that_may_not_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "unusable", lambda: "needs root (CAP_NET_ADMIN)")
    told: dict[Key, dict[str, Any] | None] = {}
    r = replica(tmp_path, *declared(), status=STATUS)

    async def main(address: str) -> None:
        one = Closing(
            "plant-1", "plant", address, tmp_path,
            replica=r, desired=Desired(r, "plant-1", "plant"), status=told.__setitem__, event=lambda *_: None,
        )  # fmt: skip
        assert await one._step(True) == ""
        assert await one.counted() == {}

    asyncio.run(main("10.1.0.2"))
    assert told == {WEB: {"enforced": False, "why": "needs root (CAP_NET_ADMIN)"}}
    asyncio.run(main("127.0.0.1"))
    assert "other sites on this machine" in str(told[WEB])
    assert not r.meta("closed_table"), "no table was made, none is to be removed"


_LIFE = """
import asyncio, sys
from pathlib import Path
from tests.agent import test_closing as t
from edgeward.agent import closing
from edgeward.gateway.nft import Nft

closing._LOOK = 0.2
folder = Path(sys.argv[1])

async def until(what, check):
    async with asyncio.timeout(60):
        while not await check():
            await asyncio.sleep(0.02)

async def main():
    r = t.replica(folder, *t.declared(), status=t.STATUS)
    await r.put_status(t.Key("App", "default", "web"), t.STATUS["App/web"])
    told, events = {}, []
    desired = t.Desired(r, "plant-1", "plant")
    make = lambda: closing.Closing("plant-1", "plant", "10.1.0.2", folder, replica=r, desired=desired,
                                   status=told.__setitem__, event=lambda *e: events.append(e))
    one = make()
    task = asyncio.create_task(one.run())
    name = one._nft.table
    other = Nft("edgeward_else")
    await other.apply(closing.Wall(site=(1,)))
    async def there(): return await one._nft.counted() is not None
    async def gone(): return await one._nft.counted() is None
    async def rules(): return (await Nft(name)._run("list", "table", "inet", name)).decode()
    await until("the table", there)
    async def said(): return told == {t.WEB: {"enforced": True}}
    await until("the word", said)
    text = await rules()
    assert "8080, 8081" in text and "10.2.0.2 . 8080" in text and "10.1.0.3" not in text.split("away")[1], text

    # somebody flushes the rules
    await one._nft.remove()
    await until("again", there)
    assert ("Warning", "TableGone") in [e[:2] for e in events], events

    # an instance moves
    new = {"id": "9", "phase": "Running", "ports": {"http": 9999}}
    desired.said(t.Key("App", "default", "web"), {"instances": [new]})
    one.poke()
    async def moved(): return "9999" in await rules()
    await until("the new port", moved)
    assert "8081" not in await rules()

    # the agent dies; the table stays, and the next one takes it away with the Service
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await there() and r.meta("closed_table") == name
    service = t.declared("any")[1]
    service.metadata.resourceVersion = ""
    free = t.HubObject("Service", "default", "web", 200, t.to_stored(service), None)
    r.apply_sync([free], revision=200, epoch="e", full=False)
    two = make()
    task = asyncio.create_task(two.run())
    await until("no table", gone)
    async def forgotten(): return r.meta("closed_table") == ""
    await until("no memory", forgotten)
    assert await other.counted() is not None, "another one's table is another one's"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

asyncio.run(main())
"""


@pytest.mark.root
def test_the_table_lives_and_goes_with_the_closed_services(tmp_path: Path) -> None:
    if why := nft.unusable():
        pytest.skip(f"nothing is enforced here: {why}")
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--net", "true"], check=False).returncode:
        pytest.skip("no network namespaces here")
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", _LIFE, str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
