"""Who wrote what: in order, refused writes too, without secrets, across restarts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from edgeward.core.audit import Audit
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
