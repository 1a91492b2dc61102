"""The hub's blobs on a real nats-server: whole and right or not there, bounded, for whom they concern, backed up."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.functions.making import wheel
from tests.hub.test_backup import make, recovery
from tests.nodes.fleet import Fleet, fleet

from edgeward.core.api import build_app
from edgeward.core.authz import Principal, Rule, administrator
from edgeward.core.blobs import PIECE, BlobAsk, BlobPart, BundleAsk, BundleTold, Target
from edgeward.core.bus import Bus
from edgeward.core.errors import Invalid, NotFound, Refused, TooLarge
from edgeward.core.identity import HubIdentity
from edgeward.core.natsserver import HubSpec, NatsServer
from edgeward.core.resource import decode
from edgeward.functions.bundling import Source
from edgeward.functions.parts import lock_digest
from edgeward.functions.wheels import platforms
from edgeward.hub.blob_routes import BlobRoutes
from edgeward.hub.blobs import Blobs, Settings
from edgeward.hub.bundles import Bundles
from edgeward.hub.restore import restore

DATA = bytes(range(256)) * 5000  # in three pieces
HEX = hashlib.sha256(DATA).hexdigest()
TARGET = Target("3.11", platforms("x86_64", 28), {"sys_platform": "linux"})


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@asynccontextmanager
async def store(f: Fleet, tmp_path: Path, source: Source | None = None, **settings: Any) -> AsyncIterator[Any]:
    """(blobs, bundles), serving the fleet's nodes."""
    blobs = Blobs(f.hub, Settings(**settings))
    await blobs.open()
    revoked: set[str] = set()
    bundles = Bundles(
        f.store, f.hub, blobs, source or Source(), tmp_path, revoked=revoked.__contains__, leads=lambda: True
    )
    await bundles.open()
    bundles.revoked_here = revoked  # type: ignore[attr-defined]
    running = asyncio.create_task(bundles.run())
    try:
        yield blobs, bundles
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def function(site: str = "plant", **spec: Any) -> Any:
    doc: dict[str, Any] = {"apiVersion": "edgeward/v1", "kind": "Function", "metadata": {"name": "f"}}
    base = {"runtime": "python", "source": {"archive": {"digest": f"sha256:{HEX}"}}, "placement": {"site": site}}
    return decode(doc | {"spec": base | spec})


def app(site: str = "plant", **spec: Any) -> Any:
    doc: dict[str, Any] = {"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": "a"}}
    base = {"container": {"archive": f"sha256:{'3' * 64}"}, "placement": {"site": site}}
    return decode(doc | {"spec": base | spec})


def test_a_blob_is_taken_whole_and_right_or_not_at_all(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path / "hub") as f, store(f, tmp_path, largest=2 << 20) as (blobs, _):
            with pytest.raises(Invalid, match="not what they are called"):
                await blobs.put("default", "0" * 64, pieces(DATA), tmp_path, 1.0)
            with pytest.raises(TooLarge):
                await blobs.put("default", HEX, pieces(bytes(3 << 20)), tmp_path, 1.0)
            assert await blobs.held() == {}
            assert await blobs.put("default", HEX, pieces(DATA), tmp_path, 1.0) == len(DATA)
            got = b""
            while part := (await blobs.read("default", HEX, len(got), 300_000))[1]:
                got += part
            assert got == DATA
            with pytest.raises(NotFound):  # the name alone is no right
                await blobs.read("other", HEX, 0, PIECE)
            # what a namespace holds is bounded; what it holds already costs nothing more
            quota = len(DATA) + 10.0
            await blobs.put("default", HEX, pieces(DATA), tmp_path, 2.0, quota=quota)
            with pytest.raises(Refused, match=r"may hold .* of blobs"):
                await blobs.put("default", name(DATA[1:]), pieces(DATA[1:]), tmp_path, 2.0, quota=quota)
            await blobs.put("other", name(DATA[1:]), pieces(DATA[1:]), tmp_path, 2.0, quota=quota)
            assert sorted(await blobs.held("default")) == [("default", HEX)]

    asyncio.run(body())


def test_a_full_store_refuses_and_what_broke_off_goes(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path / "hub") as f, store(f, tmp_path, keep=2 << 20) as (blobs, _):
            await blobs.put("default", HEX, pieces(DATA), tmp_path, 1.0)
            await blobs.put("other", HEX, pieces(DATA), tmp_path, 1.0)  # the same bytes are there once
            with pytest.raises(Refused, match=r"blobs\.keep"):
                await blobs.put("default", name(DATA * 2), pieces(DATA * 2), tmp_path, 1.0)
            # an upload that its hub did not survive goes at the second sweep that finds it
            await f.hub.publish_acked(f"ew.blob.{'1' * 64}.p.0", b"x")
            assert [await blobs.sweep({("default", HEX)}, 1.0) for _ in range(3)] == [0, 1, 0]
            assert (await blobs.read("default", HEX, 0, 10))[1] == DATA[:10]

    asyncio.run(body())


def test_an_upload_while_it_is_swept_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with fleet(tmp_path / "hub") as f, store(f, tmp_path) as (blobs, _):
            await f.hub.publish_acked(f"ew.blob.{HEX}.p.0", b"x")  # broke off
            assert await blobs.sweep((), 1.0) == 0
            look, brought = blobs._subjects, []

            async def meanwhile(wanted: str) -> list[str]:
                if wanted == "ew.blob.>":  # who holds what is known by now
                    brought.append(asyncio.create_task(blobs.put("default", HEX, pieces(DATA), tmp_path, 1.0)))
                    await asyncio.wait(brought, timeout=1.0)  # it comes through, or has to wait
                found: list[str] = await look(wanted)
                return found

            monkeypatch.setattr(blobs, "_subjects", meanwhile)
            await blobs.sweep((), 1.0)
            await asyncio.gather(*brought)
            assert (await blobs.read("default", HEX, 0, 10))[1] == DATA[:10]

    asyncio.run(body())


def test_what_nothing_refers_to_goes_after_a_while(tmp_path: Path) -> None:
    async def body() -> None:
        day = 86400.0
        async with fleet(tmp_path / "hub") as f, store(f, tmp_path, after=7 * day) as (blobs, _):
            for data in (DATA, DATA[1:]):
                await blobs.put("default", name(data), pieces(data), tmp_path, 0.0)
            await blobs.add_bundle("default", "1" * 64, name(DATA[1:]), ["a-1-py3-none-any.whl"])
            used = {("default", HEX), ("default", "1" * 64)}
            for at in (0.0, 5 * day, 10 * day):
                assert await blobs.sweep(used, at) == 0
            assert len(await blobs.held()) == 2
            # the lock file is declared no more; seven days after it was last seen so, its bundle goes
            assert [await blobs.sweep({("default", HEX)}, at) for at in (16 * day, 18 * day, 18 * day)] == [0, 0, 1]
            assert list(await blobs.held()) == [("default", HEX)]
            assert await blobs.bundles("default", "1" * 64) == []

    asyncio.run(body())


def test_what_a_way_back_needs_is_in_use(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path / "hub") as f, store(f, tmp_path) as (_, bundles):
            await f.store.put(function("plant"))
            lock = "a==1 --hash=sha256:" + "9" * 64
            patch = {"source": {"archive": {"digest": f"sha256:{'2' * 64}"}}}
            target = {"kind": "Function", "name": "f", "namespace": "default"}
            spec = {"target": target, "site": "plant", "patch": patch}
            doc: dict[str, Any] = {"apiVersion": "edgeward/v1", "kind": "Override", "metadata": {"name": "o"}}
            await f.store.put(decode(doc | {"spec": spec}))
            bundles._kept = lambda: [("other", {"dependencies": {"lock": lock}})]
            used = {("default", HEX), ("default", "2" * 64), ("other", lock_digest(lock))}
            assert bundles.used() == used
            await f.store.put(app())
            patch = {"container": {"archive": f"sha256:{'4' * 64}"}}
            spec = {"target": target | {"kind": "App", "name": "a"}, "site": "plant", "patch": patch}
            await f.store.put(decode(doc | {"metadata": {"name": "p"}, "spec": spec}))
            assert bundles.used() == used | {("default", "3" * 64), ("default", "4" * 64)}

    asyncio.run(body())


def test_nodes_get_blobs_of_the_namespaces_whose_functions_they_have(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path / "hub") as f, store(f, tmp_path) as (blobs, bundles):
            await blobs.put("default", HEX, pieces(DATA), tmp_path, 1.0)
            await f.store.put(function("plant"))
            ask = BlobAsk("default", f"sha256:{HEX}", 600_000, 1000)
            part = await f.ask("plant-1", "blob", ask, BlobPart)
            assert (part.size, part.data) == (len(DATA), DATA[600_000 : 600_000 + len(part.data)]) and part.data
            refused = await f.ask("shop-1", "blob", ask, BlobPart)
            assert "has no function and no app of namespace" in refused.error and refused.again
            await f.store.put(app("shop"))
            assert (await f.ask("shop-1", "blob", ask, BlobPart)).data, "its app's image may be in an archive"
            assert (await f.ask("plant-1", "blob", BlobAsk("default", "../x"), BlobPart)).error
            assert (await f.ask("plant-1", "blob", BlobAsk("default", f"sha256:{'0' * 64}"), BlobPart)).again is False
            assert (await f.ask("plant-1", "blob", b"no message", BlobPart)).error
            bundles.revoked_here.add("plant-1")
            assert "revoked" in (await f.ask("plant-1", "blob", ask, BlobPart)).error

    asyncio.run(body())


async def _bundled(f: Fleet, node: str, lock: str) -> BundleTold:
    """What is said of it in the end."""
    async with asyncio.timeout(90):
        while True:
            told: BundleTold = await f.ask(node, "bundle", BundleAsk("default", lock_digest(lock), TARGET), BundleTold)
            if told.state != "making":
                return told
            await asyncio.sleep(0.1)  # the pace of asking


def test_the_bundle_of_a_declared_lock_file_is_made_once(tmp_path: Path) -> None:
    async def body() -> None:
        lock = wheel(tmp_path / "w", "tiny", {"tiny.py": ""})
        other = wheel(tmp_path / "w", "native", {"n.so": b"x"}, tag="cp311-cp311-manylinux_2_17_aarch64")
        source = Source(find_links=str(tmp_path / "w"))
        async with fleet(tmp_path / "hub") as f, store(f, tmp_path, source) as (blobs, _):
            await f.store.put(function("plant"))
            assert (await _bundled(f, "plant-1", lock)).state == "unknown", "nobody declared it"
            await f.store.put(function("plant", dependencies={"lock": lock}))
            told = await _bundled(f, "plant-1", lock)
            assert told.state == "ready", told
            assert [b.wheels for b in await blobs.bundles("default", lock_digest(lock))] == [
                ["tiny-1.0-py3-none-any.whl"]
            ]
            # made already, by whomever: the same for every node that it fits
            (tmp_path / "w" / "tiny-1.0-py3-none-any.whl").unlink()
            assert (await _bundled(f, "plant-2", lock)).digest == told.digest
            assert len(await blobs.held("default")) == 1
            await f.store.put(function("plant", dependencies={"lock": other}))
            told = await _bundled(f, "plant-1", other)
            assert told.state == "failed" and "native 1.0 has no wheel for Python 3.11" in told.message

    asyncio.run(body())


def test_who_may_create_functions_brings_blobs_and_who_sees_them_sees_which(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path / "hub") as f, store(f, tmp_path) as (blobs, bundles):
            one = Rule(verbs=["list"], kinds=["Function"], namespaces=["default"])
            people = {
                "admin": administrator("admin"),
                "reader": Principal("reader", "x", rules=(one,)),
                "nobody": Principal("nobody", "x", rules=()),
            }
            routes = BlobRoutes(f.store, blobs, bundles, f.resources.audit, tmp_path).routes()
            app = build_app(
                f.resources, f.store, auth=lambda token, _: people[str(token)], extra_routes=routes,
                health=lambda: (True, {}), metrics=lambda: "", info={},
            )  # fmt: skip
            transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://edgeward") as http:

                async def call(who: str, method: str, path: str, **more: Any) -> httpx.Response:
                    headers = {"authorization": f"Bearer {who}"}
                    return await http.request(method, f"/api/v1/namespaces/{path}", headers=headers, **more)

                path = f"default/blobs/sha256:{HEX}"
                assert (await call("reader", "PUT", path, content=DATA)).status_code == 403
                assert (await call("admin", "GET", path)).status_code == 404
                assert (await call("admin", "PUT", path, content=DATA[1:])).status_code == 422
                got = await call("admin", "PUT", path, content=DATA)
                assert (got.status_code, got.json()) == (200, {"digest": f"sha256:{HEX}", "size": len(DATA)})
                assert (await call("reader", "GET", path)).json()["size"] == len(DATA)
                assert (await call("reader", "GET", "default/blobs")).json()["items"] == [got.json()]
                assert (await call("nobody", "GET", path)).status_code == 403
                assert (await call("admin", "PUT", f"nowhere/blobs/sha256:{HEX}", content=DATA)).status_code == 404
                assert (await call("admin", "PUT", "default/blobs/sha256:x", content=DATA)).status_code == 422
                bundle = {"digest": f"sha256:{HEX}", "wheels": ["tiny-1.0-py3-none-any.whl"]}
                path = f"default/bundles/sha256:{'1' * 64}"
                assert (await call("reader", "PUT", path, json=bundle)).status_code == 403
                assert (await call("admin", "PUT", path, json=bundle | {"wheels": ["x.tar.gz"]})).status_code == 422
                assert (await call("admin", "PUT", path, json=bundle)).status_code == 200
                assert [b.digest for b in await blobs.bundles("default", "1" * 64)] == [f"sha256:{HEX}"]
            written = [a for a in f.resources.audit.items() if a["kind"] == "Blob"]
            assert [(a["verb"], a["name"], a["actor"]) for a in written] == [("create", HEX, "admin")]

    asyncio.run(body())


def test_a_backup_brings_blobs_back(tmp_path: Path) -> None:
    async def body() -> None:
        hub, new = tmp_path / "hub", tmp_path / "new"
        async with fleet(hub) as f, store(f, tmp_path) as (blobs, _):
            await blobs.put("default", HEX, pieces(DATA), tmp_path, 1.0)
            backup = await make(f, hub)
        await restore(backup, new, recovery(hub))
        identity = HubIdentity.open(new / "identity")
        spec = HubSpec(identity.operator_jwt, identity.system_account, identity.accounts)
        server = NatsServer(new / "nats", spec)
        await server.start()
        try:
            bus = await Bus.connect(server.url, name="test", user=identity.user, timeout=60)
            restored = Blobs(bus, Settings())
            await restored.open()
            got = b""
            while part := (await restored.read("default", HEX, len(got), PIECE))[1]:
                got += part
            assert got == DATA
            await bus.close()
        finally:
            await server.stop()

    asyncio.run(body())
