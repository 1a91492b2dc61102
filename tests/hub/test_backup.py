"""Backups of a store that is written to, and what a restore makes of them; on a real nats-server."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.hub.doors import open_hub
from tests.nodes.fleet import Fleet, app, config, doc, fleet

from edgeward.core.api import build_app
from edgeward.core.audit import Audit
from edgeward.core.authz import administrator
from edgeward.core.errors import EdgewardError, Invalid, Refused
from edgeward.core.files import write_json
from edgeward.core.records import StreamRecords
from edgeward.core.resource import Key
from edgeward.core.seal import RecoveryKey, Sealer
from edgeward.core.store_nats import NatsStore
from edgeward.core.vault import Plain, Vault
from edgeward.hub import rebuild
from edgeward.hub import restore as restoring
from edgeward.hub.archive import FORMAT, Data, End, Entry, File, Meta, Msg, Stream, encode
from edgeward.hub.backup import RECOVERY_KEY, VAULT_KEY, Listing, backup_routes, files_of, sealed, sealing_key
from edgeward.hub.rebuild import first_revision
from edgeward.hub.restore import entries, offline_server, restore, unused, verify
from edgeward.hub.revoked import Revoked
from edgeward.nodes.wire import SyncAnswer


def recovery(folder: Path) -> RecoveryKey:
    return RecoveryKey.parse((folder / RECOVERY_KEY).read_text())


async def make(f: Fleet, folder: Path, *, readings: bool = False) -> Path:
    path = folder.parent / "backup"
    key = sealing_key(folder)
    pieces = [p async for p in sealed(f.hub.client, folder, key, Plain(), readings=readings)]
    path.write_bytes(b"".join(pieces))
    return path


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[tuple[NatsStore, StreamRecords]]:
    async with offline_server(folder) as client:
        store, records = NatsStore(client), StreamRecords(client)
        await store.open()
        await records.open()
        yield store, records


def value(store: Any, name: str) -> str:
    found: str = store.get(Key("Config", "default", name)).spec.data["k"]
    return found


def test_a_restored_store_has_all_of_it_in_a_new_epoch_with_higher_revisions(tmp_path: Path) -> None:
    async def body() -> None:
        hub, new = tmp_path / "one", tmp_path / "two"
        hub.mkdir()
        write_json(hub / "hub.json", {"port": 1})
        async with fleet(hub) as f:
            await f.store.put(config("a", "1"))
            await f.store.put(app("web", "plant"))
            await f.store.put_status(Key("Config", "default", "a"), {"phase": "Running"})
            await f.store.put(config("gone", "1"))
            await f.store.remove(Key("Config", "default", "gone"))
            await f.store.set_fact("pushed.plant-1", b"{}")
            await f.records.append("events", {"reason": "Before"})
            await f.hub.client.publish("$KV.resources.r.JoinToken._.t", b"{}")
            await f.hub.client.flush()
            backup = await make(f, hub)
            old = {r.key: r.revision for r in f.store.all()}
            epoch, highest = f.store.epoch, f.store.revision
            await f.store.put(config("a", "2"))
        assert (hub / "hub.json").exists()
        key = recovery(hub)
        report = await restore(backup, new, key)
        assert Path(report.directory) == new
        async with opened(new) as (store, records):
            assert {r.key for r in store.all()} == set(old)
            assert value(store, "a") == "1"
            assert store.get(Key("Config", "default", "a")).status == {"phase": "Running"}
            assert store.fact("pushed.plant-1") == b"{}"
            assert store.epoch == report.epoch != epoch
            assert min(r.revision for r in store.all()) > highest + 2**39
            assert {r.key: store.was[r.key] for r in store.all()} == old
            assert [e["reason"] for e in records.items("events")] == ["Before", "HubRestored"]
            assert store.revision >= report.revision
            written = await store.put(config("a", "3"))
            assert written.revision > report.revision
            assert written.key not in store.was
        # the same backup once more: its numbers are other ones
        again = await restore(backup, new, key)
        assert again.revision > report.revision
        assert Path(again.moved).is_dir()

    asyncio.run(body())


def test_what_is_written_meanwhile_leaves_no_key_out(tmp_path: Path) -> None:
    """All keys are rewritten all the time; a reader that took one's old place and missed its new one would lose it."""

    async def body() -> None:
        hub = tmp_path / "hub"
        async with fleet(hub) as f:
            for i in range(40):
                await f.store.put(config(f"c{i}", "0"))
            stop = asyncio.Event()
            written = 0

            async def write() -> None:
                nonlocal written
                while not stop.is_set():
                    i = written % 40
                    await f.store.put(config(f"c{i}", str(written // 40)))
                    written += 1

            task = asyncio.create_task(write())
            try:
                for _ in range(5):
                    begun = written
                    backup = await make(f, hub)
                    assert written > begun, "nothing was written meanwhile: this test shows nothing"
                    found = {
                        m.subject: m
                        for m in entries(backup, recovery(hub))
                        if isinstance(m, Msg) and m.subject.startswith("$KV.resources.r.Config.")
                    }
                    assert len(found) == 40
                    # as of one moment: written in turn, two keys are never more than one round apart
                    rounds = {int(msgspec.json.decode(m.data)["spec"]["data"]["k"]) for m in found.values()}
                    assert max(rounds) - min(rounds) <= 1
            finally:
                stop.set()
                await task

    asyncio.run(body())


def test_a_database_that_is_written_to_is_copied_whole(tmp_path: Path) -> None:
    async def body() -> None:
        hub = tmp_path / "hub"
        async with fleet(hub) as f:
            audit = Audit(hub / "audit.db")
            for _ in range(50):
                await audit.write("create", Key("Config", "default", "a"), actor="ann")  # stays in the WAL
            backup = await make(f, hub)
            audit.close()
        new = tmp_path / "new"
        await restore(backup, new, recovery(hub))
        db = sqlite3.connect(new / "audit.db")
        assert db.execute("SELECT count(*) FROM chain").fetchone() == (50,)
        db.close()

    asyncio.run(body())


def test_what_belongs_to_a_run_or_a_machine_stays_out(tmp_path: Path) -> None:
    sealing_key(tmp_path)
    for name in ("hub.log", "run.json", "a.pid", "audit.db-wal", "x.sock", ".hidden", "nats/jetstream/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in ("identity/ca.key", "identity/nodes/a.json", "new-thing/deep/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link").symlink_to("/etc/passwd")
    found = [str(p.relative_to(tmp_path)) for p in files_of(tmp_path)]
    assert found == ["identity/ca.key", "identity/nodes/a.json", "new-thing/deep/x", "recovery/seal.json"]
    # the private half is in neither half that stays
    private = recovery(tmp_path).private
    assert all(private not in p.read_bytes() for p in files_of(tmp_path))


def test_a_vault_key_from_elsewhere_is_in_the_backup(tmp_path: Path) -> None:
    async def body() -> None:
        hub = tmp_path / "hub"
        vault = Vault(os.urandom(32), "kernel keyring")
        async with fleet(hub) as f:
            pieces = [p async for p in sealed(f.hub.client, hub, sealing_key(hub), vault)]
        assert not (hub / VAULT_KEY).exists()
        (tmp_path / "b").write_bytes(b"".join(pieces))
        new = tmp_path / "new"
        await restore(tmp_path / "b", new, recovery(hub))
        assert (new / VAULT_KEY).read_text().strip() == vault.export()
        assert (new / VAULT_KEY).stat().st_mode & 0o777 == 0o600

    asyncio.run(body())


def test_changes_from_before_a_restore_meet_what_they_were_made_on(tmp_path: Path) -> None:
    """A node that was cut sends changes in the old numbers; whether the hub had changed the object is still known."""

    async def body() -> None:
        hub = tmp_path / "hub"
        bases: dict[str, int] = {}
        async with fleet(hub) as f:
            for name in ("quiet", "hub-before", "hub-after", "deleted-after"):
                bases[name] = (await f.store.put(app(name, "plant"))).revision
            await f.store.put(app("hub-before", "plant", restart={"backoff": "2s"}))  # while the node is cut
            backup = await make(f, hub)
            bases["ahead"] = (await f.store.put(app("ahead", "plant"))).revision
            bases["newer"] = bases["quiet"]
            answer: SyncAnswer = await f.sync("plant-1")
            assert answer.line == []
            epoch = f.store.epoch
        await restore(backup, hub, recovery(hub))
        async with fleet(hub) as f:
            await f.store.put(app("hub-after", "plant", restart={"backoff": "2s"}))
            await f.store.remove(Key("App", "default", "deleted-after"))
            outcomes = {}
            for name in ("quiet", "hub-before", "hub-after", "deleted-after", "ahead"):
                change = app(name, "plant", restart={"backoff": "9s"})
                outcomes[name] = (await f.push("plant-1", change, bases[name])).outcome
            assert outcomes == {
                "quiet": "accept",
                "hub-before": "reject",
                "hub-after": "reject",
                "deleted-after": "reject",
                "ahead": "accept",
            }
            answer = await f.sync("plant-1", 5, epoch)
            assert answer.full
            assert [a.epoch for a in answer.line] == [epoch]
            # who has the present epoch already is not told again
            assert (await f.sync("plant-1", answer.revision, answer.epoch)).line == []

    asyncio.run(body())


def write_sealed(folder: Path, found: list[Entry]) -> Path:
    sealer = Sealer(sealing_key(folder), {})
    path = folder / "made"
    path.write_bytes(b"".join(sealer.update(encode(e)) for e in found) + sealer.finish())
    return path


META = Meta(FORMAT, "1", "now", "e", 1, "hub", False)


@pytest.mark.parametrize(
    ("found", "error", "words"),
    [
        ([Meta(FORMAT + 1, "7.0", "now", "e", 1, "hub", False), End(0, 0, 0)], Refused, "format 2"),
        ([META, File("../evil", 0o600, 1), Data(b"x"), End(1, 0, 0)], Invalid, "leave the folder"),
        ([META, End(0, 0, 0)], Invalid, "no streams"),
        ([META, File("a", 0o600, 1), Data(b"x"), Stream("s", {}, 0)], Invalid, "ends too early"),
    ],
)
def test_a_file_that_is_well_sealed_and_wrong_inside(
    tmp_path: Path, found: list[Entry], error: type[Exception], words: str
) -> None:
    path = write_sealed(tmp_path, found)
    target = tmp_path / "sub" / "target"
    target.mkdir(parents=True)
    (target / "kept").write_text("x")
    assert verify(path).read is False
    with pytest.raises(error, match=words):
        asyncio.run(restore(path, target, recovery(tmp_path)))
    assert [p.name for p in target.parent.rglob("*")] == ["target", "kept"]
    assert not (tmp_path / "evil").exists()


def test_a_restore_that_is_broken_off_changes_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        hub = tmp_path / "hub"
        async with fleet(hub) as f:
            await f.store.put(config("a", "1"))
            backup = await make(f, hub)
        before = {p: p.stat().st_mtime_ns for p in hub.rglob("*") if p.is_file()}
        for steps in ("files", "resources, events and streams"):
            seen = asyncio.Event()

            def say(what: str, steps: str = steps, seen: asyncio.Event = seen) -> None:
                if what == steps:
                    seen.set()

            task = asyncio.create_task(restore(backup, hub, recovery(hub), say=say))
            await seen.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert {p: p.stat().st_mtime_ns for p in hub.rglob("*") if p.is_file()} == before
            assert [p.name for p in tmp_path.iterdir() if "restore" in p.name] == []

    asyncio.run(body())


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        hub = tmp_path / "hub"
        async with fleet(hub) as f:
            backup = await make(f, hub)
            with pytest.raises(Refused, match="nats-server is running"):
                await restore(backup, hub, recovery(hub))
        with unused(tmp_path, hub), pytest.raises(Refused, match="running"), unused(tmp_path, hub):
            pass

    asyncio.run(body())


def test_over_http_one_at_a_time(tmp_path: Path) -> None:
    async def body() -> None:
        hub = tmp_path / "hub"
        async with fleet(hub) as f:
            app = build_app(
                f.resources, f.store, auth=lambda token, client: administrator("root"), info={},
                extra_routes=backup_routes(f.hub.client, hub, sealing_key(hub), Plain()),
                health=lambda: (True, {}), metrics=lambda: "",
            )  # fmt: skip
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://hub") as client:
                for _ in range(2):  # the second shows that the first let go
                    answer = await client.get("/api/v1/backup")
                    (tmp_path / "b").write_bytes(answer.content)
                    assert verify(tmp_path / "b", recovery(hub)).read
                two = await asyncio.gather(client.get("/api/v1/backup"), client.get("/api/v1/backup"))
                assert sorted(a.status_code for a in two) == [200, 400]
                assert (await client.get("/api/v1/backup")).status_code == 200

    asyncio.run(body())


def test_numbers_go_up_and_fit_a_double() -> None:
    now = 1_795_600_000.0  # 2026
    assert first_revision(10, now) > 10 + 2**40
    assert first_revision(10, now + 1) > first_revision(10, now) + 10**6
    assert first_revision(10, 0.0) == 10 + 2**40  # a clock at 1970
    assert first_revision(first_revision(10, now), now) > first_revision(10, now) + 2**39
    assert first_revision(2**52, 3_700_000_000.0) < 2**53


@pytest.mark.root
def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")

    async def body() -> None:
        hub = tmp_path / "hub"
        async with fleet(hub) as f:
            for i in range(8):
                await f.store.put(config(f"c{i}", "x" * 900_000))
            backup = await make(f, hub)
        key = recovery(hub)
        await restore(backup, disk / "hub", key)
        before = sorted(disk.rglob("*"))
        filler = disk / "somebody-else"
        filler.write_bytes(bytes(44 << 20))
        with pytest.raises(Refused, match="MiB free"):  # seen before anything is written
            await restore(backup, disk / "hub", key)
        monkeypatch.setattr(restoring, "check_room", lambda *_: None)  # somebody fills it meanwhile
        filler.write_bytes(bytes(52 << 20))
        monkeypatch.setattr(rebuild, "_TAKE", 3.0)
        with pytest.raises((EdgewardError, OSError)):
            await restore(backup, disk / "hub", key)
        filler.unlink()
        assert sorted(disk.rglob("*")) == before
        told = await restore(backup, disk / "hub", key)  # with room again it works
        async with opened(disk / "hub") as (store, _):
            assert len(store.items("Config")) == 8
        assert Path(told.moved).is_dir()

    try:
        asyncio.run(body())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("pages", "whole"),
    [
        ([{"total": 2, "streams": ["a", "b"]}], True),
        ([{"total": 3, "streams": ["a", "b"]}, {"total": 3, "streams": ["c"]}], True),
        ([{"total": 2, "streams": ["a"], "missing": ["b"]}], False),
        ([{"total": 3, "streams": ["a"], "missing": ["b"]}, {"total": 3, "streams": ["c"]}], False),
        ([{"total": 2, "streams": ["a"]}, {"total": 2, "streams": ["a"]}], False),
        ([{"total": 2, "streams": ["a"]}, {"total": 2, "streams": None}], False),
        ([{"total": 0}], True),
    ],
)
def test_a_list_that_leaves_streams_out_is_not_taken_for_whole(pages: list[dict[str, Any]], whole: bool) -> None:
    """What a cluster answers of streams that have no leader at the moment."""
    listing = Listing()
    for page in pages:
        assert not listing.done
        listing.take({**page, "streams": [{"config": {"name": s}} for s in page.get("streams") or ()]})
    assert listing.done
    assert listing.whole is whole


def test_what_lets_somebody_in_does_not_come_back_by_itself(tmp_path: Path) -> None:
    """In the same folder its own audit is the witness; elsewhere a file is."""

    async def body() -> None:
        hub, elsewhere, spec = tmp_path / "one", tmp_path / "two", {"hash": "0" * 64, "expires": "2099-01-01T00:00:00Z"}

        def holders(r: Any) -> dict[str, bool]:
            return {n: r.enrolment.is_revoked(n) for n in ("a", "b", "c")}

        async with open_hub(hub) as h:
            for name in ("a", "b", "c"):
                await h.join(await h.token(name), tmp_path / "boxes" / name)
            for name in ("ci", "gone"):
                await h.fleet.store.put(doc("AccessToken", name, {"role": "viewer", **spec}))
            backup = await make(h.fleet, hub)
            audit = Audit(hub / "audit.db")  # as the hub process keeps it
            await h.enrolment.revoke("a", "ann")
            await audit.write("revoke", Key("Node", "_", "a"), actor="ann")
            await audit.write("delete", Key("AccessToken", "_", "gone"), actor="ann")
            audit.close()
        key = recovery(hub)
        listed = lambda since: Revoked({"c", "nobody"})  # noqa: E731
        told = await restore(backup, elsewhere, key, revoked=listed, with_tokens=True)
        assert (told.nodes, told.revoked) == (["a", "b"], ["c"])
        assert (told.tokens, told.left_out) == (["ci", "gone"], [])
        assert not told.witnesses
        told = await restore(backup, hub, key, with_tokens=True)
        assert (told.nodes, told.revoked) == (["b", "c"], ["a"])
        assert (told.tokens, told.left_out) == (["ci"], ["gone"])
        assert told.witnesses
        told = await restore(backup, hub, key)
        assert (told.tokens, told.left_out) == ([], ["ci", "gone"])
        assert told.revoked == ["a"], "a second restore knows what the first one knew"
        await restore(backup, hub, key, revoked=listed)
        async with open_hub(hub) as h:
            assert holders(h) == {"a": True, "b": False, "c": True}
            assert not h.fleet.store.items("AccessToken")
            (event,) = [e for e in h.fleet.records.items("events") if e["reason"] == "HubRestored"]
            assert "revoked since: 2; access tokens good again: 0, left out: 2" in event["message"]
            # a second start does not revoke again what was replaced meanwhile
            await h.join(await h.token("c", replace=True), tmp_path / "boxes" / "another")
        async with open_hub(hub) as h:
            assert holders(h)["c"] is False

    asyncio.run(body())
