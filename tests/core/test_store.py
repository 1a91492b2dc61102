"""One interface, two stores: revisions, watches, tombstones, and a server that is killed in between."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edgeward.core.bus import Bus
from edgeward.core.errors import Conflict, EdgewardError
from edgeward.core.identity import HubIdentity
from edgeward.core.natsserver import HubSpec, NatsServer
from edgeward.core.resource import Key, decode
from edgeward.core.store import Store
from edgeward.core.store_nats import NatsStore
from edgeward.core.store_sqlite import SqliteStore, open_database
from edgeward.hub.kinds import load

load()


def config(name: str, value: str) -> Any:
    doc = {"apiVersion": "edgeward/v1", "kind": "Config", "metadata": {"name": name}, "spec": {"data": {"k": value}}}
    return decode(doc)


def key(name: str) -> Key:
    return Key("Config", "default", name)


@asynccontextmanager
async def nats_store(folder: Path) -> AsyncIterator[tuple[NatsStore, NatsServer, Bus]]:
    identity = HubIdentity.open(folder / "identity")
    server = NatsServer(folder / "nats", HubSpec(identity.operator_jwt, identity.system_account, identity.accounts))
    await server.start()
    keeper = asyncio.create_task(server.run())
    bus = await Bus.connect(server.url, name="test", user=identity.user, timeout=60)
    store = NatsStore(bus.client)
    await store.open()
    follower = asyncio.create_task(store.run())
    try:
        yield store, server, bus
    finally:
        follower.cancel()
        keeper.cancel()
        await asyncio.gather(follower, keeper, return_exceptions=True)
        await bus.close()
        await server.stop()


async def contract(store: Store) -> None:
    """What both stores promise."""
    a = await store.put(config("a", "1"), expect=0)
    assert a.metadata.uid
    assert a.metadata.generation == 1
    with pytest.raises(Conflict):
        await store.put(config("a", "2"), expect=0)
    b = await store.put(config("a", "2"), expect=a.revision)
    assert (b.metadata.generation, b.metadata.uid) == (2, a.metadata.uid)
    with pytest.raises(Conflict):
        await store.put(config("a", "3"), expect=a.revision)
    since = store.revision
    await store.put_status(key("a"), {"phase": "x"})
    assert store.get(key("a")).status == {"phase": "x"}
    assert store.get(key("a")).revision == b.revision, "a status moves no revision of the wish"
    await store.put(config("b", "1"))
    await store.remove(key("a"))
    assert store.find(key("a")) is None
    with store.watch(since) as changes:
        seen = changes.backlog()
    assert [(c.key.name, c.resource is None) for c in seen] == [("b", False), ("a", True)]
    again = await store.put(config("a", "9"), expect=0)
    assert again.metadata.uid != a.metadata.uid, "a new one, not the old one resurrected"
    assert again.status == {}
    assert [r.metadata.name for r in store.items("Config")] == ["a", "b"]


def test_sqlite_keeps_the_contract_and_its_data(tmp_path: Path) -> None:
    async def body() -> None:
        store = SqliteStore(tmp_path / "s.db")
        await contract(store)
        store.close()
        again = SqliteStore(tmp_path / "s.db")
        assert again.revision == store.revision
        assert again.get(key("a")).spec.data == {"k": "9"}

    asyncio.run(body())


def test_nats_keeps_the_contract(tmp_path: Path) -> None:
    async def body() -> None:
        async with nats_store(tmp_path) as (store, _, _):
            await contract(store)

    asyncio.run(body())


def test_two_hubs_share_one_truth_and_a_killed_server_loses_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with nats_store(tmp_path) as (one, server, bus):
            two = NatsStore(bus.client)
            await two.open()
            follower = asyncio.create_task(two.run())
            assert one.epoch == two.epoch
            await one.put(config("a", "1"), expect=0)
            with pytest.raises(Conflict):
                await two.put(config("a", "2"), expect=0)
            written = 0
            for n in range(60):
                if n == 20 and server.pid:
                    import os
                    import signal

                    os.kill(server.pid, signal.SIGKILL)
                async with asyncio.timeout(120):
                    while True:
                        try:
                            await one.put(config(f"c{n}", str(n)))
                            written += 1
                            break
                        except EdgewardError:
                            await asyncio.sleep(0.05)
            async with asyncio.timeout(120):
                while two.revision < one.revision:  # noqa: ASYNC110 - the other cache has no event of its own
                    await asyncio.sleep(0.02)
            assert [r.metadata.name for r in two.items("Config")] == [r.metadata.name for r in one.items("Config")]
            assert written == 60
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)

    asyncio.run(body())


def test_a_hub_that_starts_reads_all_of_a_large_store(tmp_path: Path) -> None:
    """More bytes than the server gives in one answer."""

    async def body() -> None:
        async with nats_store(tmp_path) as (one, _, bus):
            for n in range(15):
                await one.put(config(f"c{n}", "x" * 900_000))
            two = NatsStore(bus.client)
            await two.open()
            assert [r.metadata.name for r in two.items("Config")] == sorted(f"c{n}" for n in range(15))
            assert two.revision == one.revision

    asyncio.run(body())


def test_a_database_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        (tmp_path / "old.db").touch(0o644)
        for name in ("new.db", "old.db"):
            db = open_database(tmp_path / name)
            db.execute("CREATE TABLE t(x)")
            assert {p.stat().st_mode & 0o777 for p in tmp_path.glob(f"{name}*")} == {0o600}
            assert len(list(tmp_path.glob(f"{name}*"))) == 3, "the journal files too"
            db.close()
    finally:
        os.umask(old)


def test_a_write_whose_answer_is_late_is_sent_again_and_happens_once(tmp_path: Path) -> None:
    """The server stands still for longer than one try lasts: both tries reach it, and the second knows the first."""

    async def body() -> None:
        async with nats_store(tmp_path) as (store, server, bus):
            writer = NatsStore(bus.client)
            await writer.open()
            tries = 0
            publish = writer._js.publish

            async def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal tries
                tries += 1
                return await publish(*args, **kwargs)

            writer._js.publish = counted  # type: ignore[method-assign]
            pid = server.pid or 0
            os.kill(pid, signal.SIGSTOP)
            try:
                writing = asyncio.create_task(writer.put(config("b", "1"), expect=0))
                async with asyncio.timeout(60):
                    while tries < 2:  # noqa: ASYNC110 - a counter has no event
                        await asyncio.sleep(0.01)
            finally:
                os.kill(pid, signal.SIGCONT)
            made = await writing
            assert made.spec.data == {"k": "1"}
            async with asyncio.timeout(60):
                while store.find(key("b")) is None:  # noqa: ASYNC110 - the other cache has no event of its own
                    await asyncio.sleep(0.01)
            assert store.get(key("b")).revision == made.revision

    asyncio.run(body())


def test_a_write_is_read_back_though_nothing_follows_the_stream_yet(tmp_path: Path) -> None:
    """As while a hub process starts beside another one that writes."""

    async def body() -> None:
        async with nats_store(tmp_path) as (store, _, bus):
            late = NatsStore(bus.client)
            await late.open()  # and does not run
            await store.put(config("a", "1"))
            await late.put(config("b", "1"), expect=0)
            assert late.get(key("a")).spec.data == late.get(key("b")).spec.data == {"k": "1"}

    asyncio.run(body())


def test_a_controller_that_does_not_know_the_present_status_cannot_write_over_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with nats_store(tmp_path) as (store, _, bus):
            await store.put(config("a", "1"))
            stale = NatsStore(bus.client)
            await stale.open()  # and follows nothing from here on, as a process that stands still
            await store.put_status(key("a"), {"phase": "new"}, checked=True)
            with pytest.raises(Conflict):
                await stale.put_status(key("a"), {"phase": "stale"}, checked=True)
            assert store.get(key("a")).status == stale.get(key("a")).status == {"phase": "new"}, "it knows it now"
            await stale.put_status(key("a"), {"phase": "newer"}, checked=True)
            await stale.put_status(key("a"), {"phase": "newest"}, checked=True)

    asyncio.run(body())
