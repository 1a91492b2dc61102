"""What an older release is not told of, and what it does not undo."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.nodes.fleet import app, config, doc, fleet

from edgeward.agent.replica import Replica
from edgeward.core.errors import Refused
from edgeward.core.registry import Kind, kinds
from edgeward.core.resource import Key, Resource, Stored, to_stored
from edgeward.nodes.older import check_level, left_out, put_back, trimmed, unknown_fields
from edgeward.nodes.wire import LEVEL

OLD = LEVEL - 1


class GadgetSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    site: str = ""
    text: str = ""


@pytest.fixture
def newer() -> Iterator[None]:
    """A kind of this release, and a field that a kind got in it."""
    added = kinds.add(Kind("Gadget", "gadgets", GadgetSpec, scope="all", level=LEVEL))
    before = {name: kinds.get(name) for name in ("Namespace", "App")}
    for name, fields in (("Namespace", ("description", "quota.apps")), ("App", ("replicas", "restart.backoff"))):
        kinds._kinds[name] = dataclasses.replace(before[name], newer=dict.fromkeys(fields, LEVEL))
    try:
        yield
    finally:
        kinds._kinds |= before
        del kinds._kinds[added.name]
        for alias in ("gadget", "gadgets"):
            del kinds._alias[alias]


def namespace(**spec: Any) -> Resource:
    return doc("Namespace", "web", spec)


def test_a_part_that_says_nothing_is_nothing_that_an_older_hub_does_not_know() -> None:
    """Every App has parts that are written though they are empty; one that is new keeps no App from an older hub."""
    plain = app("web")
    empty = [name for name, value in to_stored(plain).spec.items() if value == {}]
    assert set(kinds.get("App").newer) & set(empty) == {"disconnect"}
    check_level(plain, plain.key, OLD)
    assert left_out([plain], OLD) == []
    assert "disconnect" not in trimmed(to_stored(plain), OLD).spec, "it is not sent all the same"
    with pytest.raises(Refused, match="does not know this field"):
        check_level(app("web", disconnect={"lostAfter": "5s"}), plain.key, OLD)


@pytest.mark.usefixtures("newer")
def test_fields_are_left_out_and_put_back() -> None:
    new = namespace(description="d", quota={"apps": 2, "cpu": 4.0})
    assert unknown_fields(to_stored(new), OLD) == ["$.spec.description", "$.spec.quota.apps"]
    assert unknown_fields(to_stored(new), LEVEL) == []
    old = trimmed(to_stored(new), OLD)
    assert old.spec == {"quota": {"cpu": 4.0}}
    assert trimmed(to_stored(new), LEVEL).spec == to_stored(new).spec
    changed = msgspec.structs.replace(old, spec={"quota": {"cpu": 5.0}})
    assert put_back(changed, new, OLD).spec == {"description": "d", "quota": {"apps": 2, "cpu": 5.0}}
    assert put_back(changed, new, LEVEL) is changed, "who knows a field may remove it"
    assert put_back(changed, None, OLD) is changed
    gadget = doc("Gadget", "g", {})
    assert left_out([new, gadget, config("c", "1")], OLD) == [
        "Gadget/g", "Namespace/web $.spec.description", "Namespace/web $.spec.quota.apps",
    ]  # fmt: skip
    assert left_out([new, gadget], LEVEL) == []
    assert left_out([doc("Gadget", f"g{i:02}", {}) for i in range(30)], OLD)[-2:] == ["Gadget/g19", "and 10 more"]


@pytest.mark.usefixtures("newer")
def test_a_newer_node_refuses_what_its_hub_could_not_read() -> None:
    for new in (doc("Gadget", "g", {}), namespace(description="d")):
        with pytest.raises(Refused, match="upgrade the hub first"):
            check_level(new, new.key, OLD)
        check_level(new, new.key, LEVEL)
    check_level(namespace(quota={"cpu": 1}), Key("Namespace", "_", "web"), OLD)
    check_level(None, Key("Config", "default", "c"), OLD)


@pytest.mark.usefixtures("newer")
def test_the_hub_leaves_out_what_an_older_node_cannot_read_and_says_so(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            await f.store.put(doc("Gadget", "g", {}))
            await f.store.put(app("web", "plant", replicas=2, restart={"backoff": "1s"}))
            got = await f.sync("plant-1", level=OLD)
            specs = {str(o.key): o.stored.spec for o in got.objects if o.stored}
            assert specs["App/web"] == to_stored(app("web", "plant", restart={})).spec
            assert "Gadget/g" not in specs
            old = Replica(":memory:", site="plant")
            old.apply_sync(got.objects, revision=got.revision, epoch=got.epoch, full=True, level=got.level)
            assert old.hub_view() == got.view and got.level == LEVEL

            async def told(wanted: list[str] | None) -> None:
                async with asyncio.timeout(20):
                    while f.store.get(Key("Node", "_", "plant-1")).status.get("notTold") != wanted:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)

            await told(["App/web $.spec.replicas", "App/web $.spec.restart.backoff", "Gadget/g"])
            # what it does not know it does not remove
            web = Key("App", "default", "web")
            changed = app("web", "plant", dependsOn=["db"])
            decided = await f.push("plant-1", changed, f.store.get(web).revision)
            assert decided.outcome == "accept", decided.why
            assert decided.now.stored and decided.now.stored.spec == to_stored(changed).spec | {"restart": {}}
            whole = to_stored(app("web", "plant", dependsOn=["db"], replicas=2, restart={"backoff": "1s"})).spec
            assert to_stored(f.store.get(web)).spec == whole
            # upgraded, it gets all of it, and nothing is left to say
            new = {str(o.key): o.stored.spec for o in (await f.sync("plant-1")).objects if o.stored}
            assert new["App/web"] == whole
            assert new["Gadget/g"] == {}
            await told(None)

    asyncio.run(body())


def strange(name: str, revision: int) -> Any:
    from edgeward.nodes.wire import HubObject

    stored = Stored("Gadget", doc("Config", name, {}).metadata, {})
    return HubObject("Gadget", "default", name, revision, stored)


def later(name: str, revision: int) -> Any:
    """A Config with a field of a later release."""
    from edgeward.nodes.wire import HubObject

    stored = Stored("Config", doc("Config", name, {}).metadata, {"data": {"k": "2"}, "immutable": True})
    return HubObject("Config", "default", name, revision, stored)


def test_what_a_node_cannot_read_stops_nothing_and_stays_as_it_was(tmp_path: Path) -> None:
    from edgeward.core.scope import fingerprint
    from edgeward.nodes.wire import HubObject

    async def body() -> None:
        r = Replica(tmp_path / "r.db", site="plant")
        a, b = Key("Config", "default", "a"), Key("Config", "default", "b")
        g = Key("Gadget", "default", "g")
        r.apply_sync([HubObject(*_at(a), 5, to_stored(config("a", "1")))], revision=5, epoch="e", full=True)
        r.apply_sync(
            [later("a", 7), strange("g", 8), HubObject(*_at(b), 9, to_stored(config("b", "1")))],
            revision=9, epoch="e", full=False,
        )  # fmt: skip
        assert r.find(b) is not None, "the others are taken"
        assert r.get(a).spec.data == {"k": "1"}, "as it was last understood"
        assert set(r.strange()) == {a, g}
        assert "immutable" in r.strange()[a]
        assert r.hub_view() == fingerprint({a: 7, b: 9, g: 8}.items()), "the hub sees that the node has heard of it"
        assert set(r.hub_keys()) == {a, b, g}
        # a change made here is a change of what was understood: the hub's rule decides
        await r.put(config("a", "mine"))
        assert [c.base for c in r.pending()] == [5]
        r.close()
        # the same release started again asks for all, and knows what it has not understood
        again = Replica(tmp_path / "r.db", site="plant")
        assert set(again.strange()) == {a, g}
        assert (again.hub_revision, again.epoch) == (0, "e")
        again.apply_sync([HubObject(*_at(b), 9, to_stored(config("b", "1")))], revision=12, epoch="e", full=True)
        assert not again.strange(), "gone at the hub"
        assert again.hub_view() == fingerprint([(b, 9)])
        again.close()
        assert Replica(tmp_path / "r.db", site="plant").hub_revision == 12

    asyncio.run(body())


def _at(key: Key) -> tuple[str, str, str]:
    return key.kind, key.namespace, key.name


def test_an_agent_that_was_put_back_leaves_a_newer_ones_rows_for_the_next(tmp_path: Path) -> None:
    async def body() -> None:
        with_kind = kinds.add(Kind("Gadget", "gadgets", GadgetSpec, scope="all", level=LEVEL + 1))
        try:
            r = Replica(tmp_path / "r.db", site="plant")
            r.apply_sync([strange("g", 8)], revision=9, epoch="e", full=True)
            assert r.find(Key("Gadget", "default", "g")) is not None
            await r.put(doc("Gadget", "local", {"text": "x"}))
            r.set_meta("level", str(LEVEL + 1))
            r.close()
        finally:
            del kinds._kinds[with_kind.name]
            for alias in ("gadget", "gadgets"):
                del kinds._alias[alias]
        old = Replica(tmp_path / "r.db", site="plant")
        assert old.hub_revision == 0
        assert set(old.strange()) == {Key("Gadget", "default", "g")}
        old.apply_sync([strange("g", 8)], revision=9, epoch="e", full=True)
        assert not old.pending()
        old.close()
        kinds.add(Kind("Gadget", "gadgets", GadgetSpec, scope="all", level=LEVEL + 1))
        try:
            new = Replica(tmp_path / "r.db", site="plant")
            assert [c.name for c in new.pending()] == ["local"], "nothing that waited is lost"
        finally:
            del kinds._kinds["Gadget"]
            for alias in ("gadget", "gadgets"):
                del kinds._alias[alias]

    asyncio.run(body())


def _add_size(spec: dict[str, Any]) -> dict[str, Any]:
    return {"text": spec["words"]} if "words" in spec else spec


def test_what_an_older_schema_stored_is_read_and_written_in_the_new_form(tmp_path: Path) -> None:
    async def body() -> None:
        kind = Kind("Gadget", "gadgets", GadgetSpec, scope="all", level=LEVEL, schema=2, upgrades={1: _add_size})
        kinds.add(kind)
        try:
            async with fleet(tmp_path) as f:
                stored = Stored("Gadget", doc("Config", "g", {}).metadata, {"words": "old"})
                subject = "$KV.resources.r.Gadget.default.g"
                await f.hub.client.jetstream().publish(subject, msgspec.json.encode(stored))
                g = Key("Gadget", "default", "g")
                async with asyncio.timeout(20):
                    while f.store.find(g) is None:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                assert f.store.get(g).spec.text == "old"
                got = await f.sync("plant-1")
                replica = Replica(tmp_path / "r.db", site="plant")
                replica.apply_sync(got.objects, revision=got.revision, epoch=got.epoch, full=True)
                assert replica.get(g).spec.text == "old" and not replica.strange()
                at = f.store.get(g).revision
                assert (await f.push("plant-1", doc("Gadget", "h", {"text": "h"}))).outcome == "accept"
                new = f.store.get(g)
                new = msgspec.structs.replace(new, spec=GadgetSpec(text="new"))
                await f.store.put(new, expect=at)
                raw = await f.hub.client.jetstream().get_last_msg("KV_resources", subject)
                again = msgspec.json.decode(raw.data or b"", type=Stored)
                assert (again.schema, again.spec) == (2, {"text": "new"})
        finally:
            del kinds._kinds[kind.name]
            for alias in ("gadget", "gadgets"):
                del kinds._alias[alias]

    asyncio.run(body())
