"""Two sides of every object, and what survives."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgeward.agent.replica import Replica
from edgeward.core.errors import Conflict, Refused
from edgeward.core.resource import Key, Stored, decode, to_stored
from edgeward.core.scope import fingerprint
from edgeward.hub.kinds import load
from edgeward.nodes.ancestry import Ancestor
from edgeward.nodes.wire import HubObject

load()


def config(name: str, value: str) -> Any:
    doc = {"apiVersion": "edgeward/v1", "kind": "Config", "metadata": {"name": name}, "spec": {"data": {"k": value}}}
    return decode(doc)


def from_hub(name: str, value: str | None, revision: int) -> HubObject:
    stored: Stored | None = to_stored(config(name, value)) if value is not None else None
    return HubObject("Config", "default", name, revision, stored)


def key(name: str) -> Key:
    return Key("Config", "default", name)


def value(replica: Replica, name: str) -> str | None:
    found = replica.find(key(name))
    return found.spec.data["k"] if found else None


def test_a_sync_is_seen_and_survives(tmp_path: Path) -> None:
    r = Replica(tmp_path / "r.db", site="plant")
    r.apply_sync([from_hub("a", "1", 7)], revision=7, epoch="e", full=True)
    assert value(r, "a") == "1"
    r.close()
    again = Replica(tmp_path / "r.db", site="plant")
    assert value(again, "a") == "1"
    assert (again.hub_revision, again.epoch, again.store_id) == (7, "e", r.store_id)
    assert again.hub_view() == fingerprint([(key("a"), 7)])


def test_a_local_change_wins_here_until_the_hub_decides(tmp_path: Path) -> None:
    async def body() -> None:
        r = Replica(tmp_path / "r.db", site="plant")
        r.apply_sync([from_hub("a", "1", 7)], revision=7, epoch="e", full=True)
        await r.put(config("a", "mine"))
        r.apply_sync([from_hub("a", "cloud", 9)], revision=9, epoch="e", full=False)
        assert value(r, "a") == "mine"
        (change,) = r.pending()
        assert (change.base, change.op) == (7, "put")
        r.close()
        r = Replica(tmp_path / "r.db", site="plant")
        assert value(r, "a") == "mine", "not forgotten by a restart"
        r.resolve(change.seq, from_hub("a", "cloud", 9))
        assert value(r, "a") == "cloud"
        assert not r.pending()

    asyncio.run(body())


def test_a_change_made_while_the_hub_decided_stays_and_is_rebased() -> None:
    async def body() -> None:
        r = Replica(":memory:", site="plant")
        r.apply_sync([from_hub("a", "1", 7)], revision=7, epoch="e", full=True)
        await r.put(config("a", "first"))
        (first,) = r.pending()
        await r.put(config("a", "second"))
        r.resolve(first.seq, from_hub("a", "first", 9))
        (second,) = r.pending()
        assert value(r, "a") == "second"
        assert second.base == 9

    asyncio.run(body())


def test_deletes_do_not_resurrect() -> None:
    async def body() -> None:
        r = Replica(":memory:", site="plant")
        r.apply_sync([from_hub("a", "1", 7), from_hub("b", "1", 8)], revision=8, epoch="e", full=True)
        await r.remove(key("a"))
        assert value(r, "a") is None
        r.apply_sync([from_hub("a", "1", 7)], revision=8, epoch="e", full=False)
        assert value(r, "a") is None, "a sync does not undo a local delete"
        r.apply_sync([], revision=9, epoch="e", full=True)
        assert value(r, "b") is None
        await r.put(config("new", "x"))
        await r.remove(key("new"))
        assert [(c.name, c.op) for c in r.pending()] == [("a", "delete"), ("new", "delete")], (
            "also of what the hub never told of: it may have taken it over, and the answer was lost"
        )

    asyncio.run(body())


def test_stale_writes_are_refused() -> None:
    async def body() -> None:
        r = Replica(":memory:", site="plant")
        got = await r.put(config("a", "1"), expect=0)
        await r.put(config("a", "2"), expect=got.revision)
        with pytest.raises(Conflict):
            await r.put(config("a", "3"), expect=got.revision)
        with pytest.raises(Conflict):
            await r.put(config("a", "3"), expect=0)

    asyncio.run(body())


def test_an_override_changes_the_target_and_goes_away_with_its_deletion() -> None:
    async def body() -> None:
        r = Replica(":memory:", site="plant")
        doc = {
            "apiVersion": "edgeward/v1",
            "kind": "Override",
            "metadata": {"name": "o"},
            "spec": {
                "target": {"kind": "Config", "name": "a", "namespace": "default"},
                "site": "plant",
                "patch": {"data": {"k": "ours"}},
            },
        }
        override = HubObject("Override", "default", "o", 9, to_stored(decode(doc)))
        with r.watch() as changes:
            r.apply_sync([from_hub("a", "1", 7), override], revision=9, epoch="e", full=True)
            assert value(r, "a") == "ours"
            gone = HubObject("Override", "default", "o", 10)
            r.apply_sync([gone], revision=10, epoch="e", full=False)
            assert value(r, "a") == "1"
            names = [c.key.kind for c in [await anext(aiter(changes)) for _ in range(1)]]
            assert names

    asyncio.run(body())


@pytest.mark.parametrize("seed", range(30))
def test_a_torn_log_loses_the_last_write_or_nothing(tmp_path: Path, seed: int) -> None:
    """The database after a power cut: the write-ahead log is cut at any byte; what is left is a state that was."""

    async def body() -> None:
        rng = random.Random(seed)
        r = Replica(tmp_path / "r.db", site="plant")
        states = [{}]
        for n in range(12):
            await r.put(config(f"c{n % 4}", str(n)))
            states.append({k.name: e.resource.spec.data["k"] for k, e in r._entries.items()})  # type: ignore[arg-type]
        wal = (tmp_path / "r.db-wal").read_bytes()
        main = (tmp_path / "r.db").read_bytes()
        torn = tmp_path / "torn.db"
        torn.write_bytes(main)
        (tmp_path / "torn.db-wal").write_bytes(wal[: rng.randint(0, len(wal))])
        again = Replica(torn, site="plant")
        assert {k.name: e.resource.spec.data["k"] for k, e in again._entries.items()} in states
        r.close()

    asyncio.run(body())


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_full_disk_refuses_a_write_whole_and_takes_it_later(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")

    async def body() -> None:
        r = Replica(disk / "r.db", site="plant")
        r.apply_sync([from_hub("a", "1", 7)], revision=7, epoch="e", full=True)
        taken = []
        with pytest.raises(Refused, match=r"r\.db.*full.*free space"):
            for n in range(1000):
                await r.put(config(f"c{n}", "x" * 5000))
                taken.append(f"c{n}")
        assert len(taken) > 10
        assert value(r, f"c{len(taken)}") is None
        with pytest.raises(Refused):
            r.apply_sync([from_hub("a", "2" * 100_000, 8)], revision=8, epoch="e", full=False)
        assert (value(r, "a"), r.hub_revision) == ("1", 7)
        assert [c.key.name for c in r.pending()] == taken
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        await r.put(config("later", "1"))
        r.apply_sync([from_hub("a", "2", 8)], revision=8, epoch="e", full=False)
        r.close()
        again = Replica(disk / "r.db", site="plant")
        assert [c.key.name for c in again.pending()] == [*taken, "later"]
        assert (value(again, "a"), again.hub_revision) == ("2", 8)
        again.close()

    try:
        asyncio.run(body())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


# -- a hub that was restored from a backup -------------------------------------------------------------------------

LINE = [Ancestor("e", 100, 5_000)]


def test_what_is_newer_than_the_backup_stays_as_the_sites_own_change(tmp_path: Path) -> None:
    r = Replica(tmp_path / "r.db", site="plant")
    objects = [from_hub("old", "1", 80), from_hub("newer", "2", 140), from_hub("made-since", "1", 150)]
    r.apply_sync([*objects, from_hub("same", "1", 120)], revision=150, epoch="e", full=True)
    back = [from_hub("old", "1", 4_080), from_hub("newer", "1", 4_070), from_hub("same", "1", 4_075)]
    kept = r.apply_sync(back, revision=5_000, epoch="f", full=True, line=LINE)
    assert kept == ([key("made-since"), key("newer")], [])
    assert (value(r, "newer"), value(r, "made-since"), value(r, "old")) == ("2", "1", "1")
    assert [(c.name, c.op, c.base) for c in r.pending()] == [("made-since", "put", 150), ("newer", "put", 140)]
    assert r.hub_view() == fingerprint((key(o.name), o.revision) for o in back)
    # it is on the disk, and is not done twice
    r.close()
    r = Replica(tmp_path / "r.db", site="plant")
    assert (r.epoch, r.line) == ("f", LINE)
    assert r.apply_sync(back, revision=5_000, epoch="f", full=True, line=LINE) == ([], [])
    assert (value(r, "newer"), len(r.pending())) == ("2", 2)


def test_a_change_of_a_person_here_stays_theirs(tmp_path: Path) -> None:
    async def body() -> None:
        r = Replica(tmp_path / "r.db", site="plant")
        r.apply_sync([from_hub("a", "2", 140)], revision=140, epoch="e", full=True)
        r.actor = "ann"
        await r.put(config("a", "mine"))
        assert r.apply_sync([from_hub("a", "1", 4_080)], revision=5_000, epoch="f", full=True, line=LINE) == ([], [])
        (change,) = r.pending()
        assert (change.actor, change.base, value(r, "a")) == ("ann", 140, "mine")

    asyncio.run(body())


def test_only_the_hub_writes_what_is_the_hubs(tmp_path: Path) -> None:
    def node(labels: dict[str, str], revision: int) -> HubObject:
        doc = {"apiVersion": "edgeward/v1", "kind": "Node", "metadata": {"name": "plant-1", "labels": labels}}
        return HubObject("Node", "_", "plant-1", revision, to_stored(decode({**doc, "spec": {"site": "plant"}})))

    r = Replica(tmp_path / "r.db", site="plant")
    r.apply_sync([node({"new": "1"}, 140)], revision=140, epoch="e", full=True)
    kept = r.apply_sync([node({}, 4_080)], revision=5_000, epoch="f", full=True, line=LINE)
    assert kept == ([], [Key("Node", "_", "plant-1")])
    assert r.get(Key("Node", "_", "plant-1")).metadata.labels == {}


def test_an_override_that_the_hub_lost_is_made_again_from_what_it_did(tmp_path: Path) -> None:
    def app(backoff: str) -> Any:
        spec = {"process": {"command": ["true"]}, "restart": {"backoff": backoff}}
        return decode({"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": "a"}, "spec": spec})

    target = Key("App", "default", "a")
    patch = {"target": {"kind": "App", "name": "a", "namespace": "default"}, "site": "plant",
             "patch": {"restart": {"backoff": "7s"}}}  # fmt: skip
    override = decode({"apiVersion": "edgeward/v1", "kind": "Override", "metadata": {"name": "o"}, "spec": patch})
    r = Replica(tmp_path / "r.db", site="plant")
    base = HubObject("App", "default", "a", 80, to_stored(app("1s")))
    r.apply_sync([base, HubObject("Override", "default", "o", 140, to_stored(override))],
                 revision=140, epoch="e", full=True)  # fmt: skip
    assert r.get(target).spec.restart.backoff == "7s"
    base.revision = 4_080
    kept = r.apply_sync([base], revision=5_000, epoch="f", full=True, line=LINE)
    assert kept == ([target], [])
    assert r.get(target).spec.restart.backoff == "7s"
    assert [(c.kind, c.base) for c in r.pending()] == [("App", 80)]


def test_a_hub_that_was_made_anew_is_believed(tmp_path: Path) -> None:
    r = Replica(tmp_path / "r.db", site="plant")
    r.apply_sync([from_hub("a", "2", 140)], revision=140, epoch="e", full=True)
    assert r.apply_sync([from_hub("b", "1", 3)], revision=3, epoch="z", full=True) == ([], [])
    assert (value(r, "a"), value(r, "b")) == (None, "1")
    assert not r.pending()
