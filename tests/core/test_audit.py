"""Who wrote what: in order, refused writes too, without secrets, across restarts."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest

import edgeward.core.audit as audit_module
from edgeward.core.audit import Audit
from edgeward.core.chain import FORMAT, Head, check_export
from edgeward.core.errors import Invalid
from edgeward.core.records import SqliteRecords
from edgeward.core.resource import Key, Resource, decode
from edgeward.hub.kinds import load

load()


def make(kind: str, value: str, revision: str = "") -> Resource:
    meta = {"name": "a", "resourceVersion": revision}
    return decode({"apiVersion": "edgeward/v1", "kind": kind, "metadata": meta, "spec": {"data": {"k": value}}})


def test_an_override_of_a_secret_is_kept_without_it(tmp_path: Path) -> None:
    async def body() -> None:
        audit = Audit(tmp_path / "a.db")
        doc = {"apiVersion": "edgeward/v1", "kind": "Override", "metadata": {"name": "o", "namespace": "default"}}
        target = {"kind": "Secret", "namespace": "default", "name": "s"}
        o = decode(doc | {"spec": {"target": target, "site": "plant", "patch": {"data": {"k": "hunter2"}}}})
        await audit.write("create", o.key, actor="me", after=o)
        (record,) = audit.items()
        assert record["after"]["patch"] == {"data": {"k": "***"}}
        audit.close()

    asyncio.run(body())
    assert b"hunter2" not in b"".join(f.read_bytes() for f in tmp_path.iterdir())


def test_a_record_says_who_what_and_what_came_of_it(tmp_path: Path) -> None:
    async def body() -> None:
        key = Key("Config", "default", "a")
        audit = Audit(tmp_path / "audit.db")
        await audit.write("create", key, actor="eve", source="10.0.0.1", request="r1", after=make("Config", "1", "7"))
        await audit.write("replace", key, actor="bob", before=make("Config", "1", "7"), outcome="Conflict: changed")
        audit.close()

        audit = Audit(tmp_path / "audit.db")
        one, two = audit.items()
        named = {"kind": "Config", "namespace": "default", "name": "a"}
        assert {k: v for k, v in one.items() if k not in ("time", "seq")} == {
            **named, "actor": "eve", "verb": "create", "outcome": "done", "source": "10.0.0.1", "request": "r1",
            "revision": "7", "after": {"data": {"k": "1"}},
        }  # fmt: skip
        assert {k: v for k, v in two.items() if k not in ("time", "seq")} == {
            **named, "actor": "bob", "verb": "replace", "outcome": "Conflict: changed", "before": {"data": {"k": "1"}},
        }  # fmt: skip
        assert one["time"] <= two["time"]
        await audit.write("delete", key, actor="eve")
        assert [r["verb"] for r in audit.items(since=one["seq"])] == ["replace", "delete"]
        assert [r["verb"] for r in audit.items(limit=1)] == ["delete"], "the last ones"
        audit.close()

    asyncio.run(body())


def test_secret_values_are_not_on_the_disk_either(tmp_path: Path) -> None:
    async def body() -> None:
        audit = Audit(tmp_path / "audit.db")
        key = Key("Secret", "default", "a")
        await audit.write(
            "replace", key, actor="eve", before=make("Secret", "geheim1"), after=make("Secret", "geheim2")
        )
        record: dict[str, Any] = audit.items()[0]
        assert (record["before"], record["after"]) == ({"data": {"k": "***"}},) * 2
        audit.close()

    asyncio.run(body())
    written = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert b"***" in written
    assert b"geheim" not in written


def fill(path: Path, n: int) -> None:
    async def body() -> None:
        audit = Audit(path)
        for i in range(n):
            await audit.write("create", Key("Config", "default", f"c{i}"), actor="eve")
        audit.close()

    asyncio.run(body())


def forge(path: Path, sql: str, *values: Any) -> None:
    db = sqlite3.connect(path)
    with db:
        db.execute(sql, values)
    db.close()


def test_what_was_done_to_the_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    fill(path, 9)
    audit = Audit(path)
    head = audit.head()
    assert (audit.verify(head).broken, audit.verify(head).records, audit.verify(head).vouched) == (0, 9, 9)
    audit.close()
    copy = path.read_bytes()
    for sql, where in (
        ("UPDATE chain SET body=replace(body, 'eve', 'bob') WHERE seq=4", 4),
        ("DELETE FROM chain WHERE seq=5", 5),
        ("DELETE FROM chain WHERE seq>6", 7),
        ("DELETE FROM chain WHERE seq<3", 1),
        ("UPDATE chain SET body=x'00ff' WHERE seq=2", 2),
        ("DELETE FROM chain", 1),
    ):
        path.write_bytes(copy)
        forge(path, sql)
        audit = Audit(path)
        assert audit.verify(head).broken == where, sql
        assert len(audit.items()) <= 9, "a damaged record does not keep the others from being read"
        audit.close()


def test_the_oldest_go_and_the_head_elsewhere_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "KEEP", 20)
    monkeypatch.setattr(audit_module, "_SLACK", 5)
    monkeypatch.setattr(audit_module, "_PERIOD", 0.0)

    async def body() -> None:
        audit = Audit(tmp_path / "audit.db")
        kept: list[Head] = []

        async def keep(head: Head) -> None:
            assert audit.verify(head).broken == 0, "at every moment"
            kept.append(head)

        task = asyncio.create_task(audit.run(keep))
        for n in range(100):
            await audit.write("create", Key("Config", "default", f"c{n}"), actor="eve")
            for _ in range(3):
                await asyncio.sleep(0)
        async with asyncio.timeout(10):
            while kept[-1].seq < 100:  # noqa: ASYNC110 - turn by turn
                await asyncio.sleep(0)
        task.cancel()
        found = audit.verify(kept[-1])
        assert found.broken == 0 and found.last == 100 and 20 <= found.records <= 27
        assert audit.verify(kept[0]).broken > 0, "an older head does not vouch for what is gone since"
        audit.close()

    asyncio.run(body())


def test_what_an_earlier_release_wrote_is_the_chains_beginning(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"

    async def body() -> None:
        records = SqliteRecords(path)
        for n in range(3):
            await records.append("audit", {"actor": "eve", "verb": "create", "name": f"c{n}"})
        records.close()

    asyncio.run(body())
    for _ in range(2):
        audit = Audit(path)
        assert [i["name"] for i in audit.items()] == ["c0", "c1", "c2"]
        assert audit.verify(None).records == 3
        audit.close()


def test_labels_that_changed_are_kept() -> None:
    async def body() -> None:
        audit = Audit()
        one, two = make("Config", "1"), make("Config", "1")
        two.metadata.labels = {"team": "red"}
        await audit.write("patch", one.key, actor="eve", before=one, after=two)
        assert audit.items()[0]["labels"] == {"before": {}, "after": {"team": "red"}}

    asyncio.run(body())


def test_an_export_is_checked_without_the_system(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    fill(path, 5)
    audit = Audit(path)
    links = [msgspec.json.encode(one) for one in audit.links()]
    first = msgspec.json.encode({"format": FORMAT, "since": 0, "head": msgspec.to_builtins(audit.head())})
    assert check_export([first, *links]).vouched == 5
    assert check_export([first, *links[:-1]]).broken == 5
    assert check_export([first, links[0], links[1].replace(b"eve", b"bob"), *links[2:]]).broken == 2
    part = msgspec.json.encode({"format": FORMAT, "since": 2, "head": msgspec.to_builtins(audit.head())})
    assert check_export([part, *links[2:]]).broken == 0
    for bad in ([], [b"{}"], [b"no"], [links[0]], [first, b"{"], [first, b'{"seq": 1}']):
        with pytest.raises(Invalid):
            check_export(bad)
    audit.close()


def test_what_is_large_is_named_by_its_hash(tmp_path: Path) -> None:
    async def body() -> None:
        audit = Audit(tmp_path / "audit.db")
        large = make("Config", "x" * 100_000)
        await audit.write("create", large.key, actor="eve", after=large)
        kept = audit.items()[0]["after"]
        assert set(kept) == {"omitted", "sha256"} and kept["omitted"].startswith("1000")
        for n in range(2500):
            await audit.write("create", Key("Config", "default", f"c{n}"), actor="eve" if n % 100 else "bob")
        assert [i["name"] for i in audit.items(limit=2)] == ["c2498", "c2499"]
        few = audit.items(limit=3, seen=lambda r: r["actor"] == "bob")
        assert [i["name"] for i in few] == ["c2200", "c2300", "c2400"]
        assert len(audit.items(limit=5000, seen=lambda r: r["actor"] == "bob")) == 25
        assert audit.items(since=2500, limit=10)[0]["seq"] == 2501
        audit.close()

    asyncio.run(body())
