"""The rules that span resources, on a real store; every write leaves its audit record."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from edgeward.core.audit import Audit
from edgeward.core.errors import Conflict, Forbidden, Invalid, NotFound
from edgeward.core.resource import CLUSTER, Key, Resource, decode
from edgeward.core.resources import Resources, dependents
from edgeward.core.store import Entry
from edgeward.core.store_sqlite import SqliteStore
from edgeward.hub.kinds import load

load()


def make(kind: str, name: str, spec: dict[str, Any] | None = None, **meta: Any) -> Resource:
    doc = {"apiVersion": "edgeward/v1", "kind": kind, "metadata": {"name": name, **meta}, "spec": spec or {}}
    return decode(doc)


def config(name: str, *owners: str, value: str = "1", **meta: Any) -> Resource:
    refs = [{"kind": "Config", "name": o, "namespace": meta.get("namespace", "default")} for o in owners]
    return make("Config", name, {"data": {"k": value}}, **({"ownerReferences": refs} if refs else {}), **meta)


def key(name: str, namespace: str = "default") -> Key:
    return Key("Config", namespace, name)


def run(body: Callable[[Resources], Awaitable[None]]) -> None:
    async def main() -> None:
        store, audit = SqliteStore(), Audit()
        try:
            await body(Resources(store, audit))
        finally:
            store.close()
            audit.close()

    asyncio.run(main())


def outcomes(resources: Resources) -> list[tuple[str, str, str]]:
    return [(r["verb"], r["name"], r["outcome"].partition(":")[0]) for r in resources.audit.items()]


def again(resource: Resource, **meta: Any) -> Resource:
    """The document as a client sends it back."""
    return msgspec.structs.replace(resource, metadata=msgspec.structs.replace(resource.metadata, **meta))


def test_create_replace_and_who_was_first() -> None:
    async def body(r: Resources) -> None:
        a = await r.create(config("a"), actor="eve", source="10.0.0.1")
        with pytest.raises(Conflict, match="exists already"):
            await r.create(config("a"), actor="bob")
        b = await r.replace(config("a", value="2"), actor="eve")
        assert (b.metadata.generation, b.metadata.uid) == (2, a.metadata.uid)
        with pytest.raises(Conflict) as stale:
            await r.replace(config("a", value="3"), expect=a.revision, actor="bob")
        assert stale.value.field == "$.metadata.resourceVersion"
        with pytest.raises(NotFound) as missing:
            await r.replace(config("z"), actor="bob")
        assert (missing.value.resource, bool(missing.value.remedy)) == ("Config/z", True)
        assert r.store.get(key("a")).spec.data == {"k": "2"}
        assert outcomes(r) == [
            ("create", "a", "done"), ("create", "a", "Conflict"), ("replace", "a", "done"),
            ("replace", "a", "Conflict"), ("replace", "z", "NotFound"),
        ]  # fmt: skip
        first, third = r.audit.items()[0], r.audit.items()[2]
        assert (first["actor"], first["source"], first["after"]) == ("eve", "10.0.0.1", {"data": {"k": "1"}})
        assert (third["before"], third["after"]) == ({"data": {"k": "1"}}, {"data": {"k": "2"}})

    run(body)


def test_a_stale_document_sent_back_whole_is_a_conflict() -> None:
    async def body(r: Resources) -> None:
        old = await r.create(config("a"), actor="eve")
        await r.replace(config("a", value="2"), actor="bob")
        with pytest.raises(Conflict) as caught:
            await r.replace(again(old), actor="eve")
        assert caught.value.field == "$.metadata.resourceVersion"
        fresh = r.store.get(key("a"))
        assert (await r.replace(again(fresh, labels={"x": "y"}), actor="eve")).metadata.labels == {"x": "y"}

    run(body)


@pytest.mark.parametrize("version", ["x", "-1", "1.0", "²", "9" * 5000])
def test_no_revision(version: str) -> None:
    async def body(r: Resources) -> None:
        await r.create(config("a"), actor="eve")
        with pytest.raises(Invalid) as caught:
            await r.replace(config("a", resourceVersion=version), actor="eve")
        assert (caught.value.resource, caught.value.field) == ("Config/a", "$.metadata.resourceVersion")
        assert caught.value.remedy
        with pytest.raises(Invalid, match="different revisions"):
            await r.replace(config("a", resourceVersion="1"), expect=2, actor="eve")

    run(body)


@pytest.mark.parametrize("field", ["uid", "creationTimestamp", "deletionTimestamp"])
def test_what_the_system_writes_is_not_taken_from_people(field: str) -> None:
    async def body(r: Resources) -> None:
        stored = await r.create(config("a"), actor="eve")
        with pytest.raises(Invalid) as caught:
            await r.replace(again(stored, **{field: "2020-01-01T00:00:00.000Z"}), actor="eve")
        assert (caught.value.field, caught.value.remedy) == (f"$.metadata.{field}", "leave it out")
        assert r.store.get(key("a")) == stored

    run(body)


def test_references_and_namespaces_must_exist() -> None:
    async def body(r: Resources) -> None:
        with pytest.raises(Invalid) as ref:
            await r.create(make("Node", "n", {"site": "plant"}), actor="eve")
        e = ref.value
        assert (e.resource, e.field, e.remedy) == (
            "Node/n", "$.spec.site", "create the Site first, or correct the name",
        )  # fmt: skip
        with pytest.raises(Invalid) as home:
            await r.create(config("a", namespace="line-3"), actor="eve")
        e = home.value
        assert (e.resource, e.field) == ("Config/line-3/a", "$.metadata.namespace")
        assert e.remedy == "create it first: kind Namespace, name line-3"
        await r.create(make("Namespace", "line-3"), actor="eve")
        await r.create(config("a", namespace="line-3"), actor="eve")
        await r.create(make("Site", "plant"), actor="eve")
        await r.create(make("Site", "port"), actor="eve")
        await r.create(make("Node", "n", {"site": "plant"}), actor="eve")
        with pytest.raises(Invalid) as fixed:
            await r.replace(make("Node", "n", {"site": "port"}), actor="eve")
        e = fixed.value
        assert (e.resource, e.field, e.remedy) == ("Node/n", "$.spec.site", "delete it and create it anew")
        with pytest.raises(Conflict) as stays:
            await r.delete(Key("Site", CLUSTER, "plant"), actor="eve")
        assert "has nodes: n" in str(stays.value)
        assert stays.value.remedy == "delete its nodes first"
        await r.delete(Key("Node", CLUSTER, "n"), actor="eve")
        await r.delete(Key("Site", CLUSTER, "plant"), actor="eve")
        assert r.store.find(Key("Site", CLUSTER, "plant")) is None

    run(body)


def test_a_dry_run_says_the_same_and_leaves_no_trace() -> None:
    async def body(r: Resources) -> None:
        assert (await r.create(config("a"), actor="eve", dry_run=True)).metadata.name == "a"
        with pytest.raises(Invalid):
            await r.create(make("Node", "n", {"site": "plant"}), actor="eve", dry_run=True)
        assert (r.store.all(), r.audit.items()) == ([], [])
        a = await r.create(config("a"), actor="eve")
        for call in (
            r.create(config("a"), actor="eve", dry_run=True),
            r.replace(config("a"), expect=a.revision + 1, actor="eve", dry_run=True),
            r.delete(key("a"), expect=a.revision + 1, actor="eve", dry_run=True),
        ):
            with pytest.raises(Conflict):
                await call
        await r.delete(key("a"), actor="eve", dry_run=True)
        assert r.store.all() == [a]
        assert outcomes(r) == [("create", "a", "done")]

    run(body)


def test_a_secret_never_reaches_the_audit() -> None:
    async def body(r: Resources) -> None:
        await r.create(make("Secret", "s", {"data": {"p": "geheim"}}), actor="eve")
        await r.replace(make("Secret", "s", {"data": {"p": "geheim2"}}), actor="eve")
        await r.delete(Key("Secret", "default", "s"), actor="eve")
        assert len(r.audit.items()) == 3
        assert "geheim" not in repr(r.audit.items())

    run(body)


def test_owners_take_their_dependents_along() -> None:
    """A chain, a diamond (d is owned by b and c, both owned by a), and a stranger in another namespace."""

    async def body(r: Resources) -> None:
        await r.create(make("Namespace", "line-3"), actor="eve")
        for made in (
            config("a"), config("b", "a"), config("c", "a"), config("d", "a", "b", "c"), config("e", "d"), config("x"),
            config("a", namespace="line-3"), config("y", "a", namespace="line-3"),
        ):  # fmt: skip
            await r.create(made, actor="eve")
        assert [str(d.key) for d in dependents(r.store.all(), key("b"))] == ["Config/d"]
        gone = await r.delete(key("a"), actor="eve")
        assert gone.metadata.name == "a"
        assert [str(i.key) for i in r.store.items("Config")] == ["Config/x", "Config/line-3/a", "Config/line-3/y"]
        deleted = [(i["name"], i["outcome"]) for i in r.audit.items() if i["verb"] == "delete"]
        assert sorted(deleted) == [(n, "done") for n in "abcde"], "each once"
        assert all("with Config/" in i["actor"] for i in r.audit.items() if i["verb"] == "delete" and i["name"] != "a")

    run(body)


def test_what_another_owner_keeps_stays() -> None:
    async def body(r: Resources) -> None:
        for made in (config("a"), config("b"), config("c", "a", "b")):
            await r.create(made, actor="eve")
        await r.delete(key("a"), actor="eve")
        assert [str(i.key) for i in r.store.items("Config")] == ["Config/b", "Config/c"]
        await r.delete(key("b"), actor="eve")
        assert r.store.all() == []

    run(body)


def test_owners_in_a_ring_end_too() -> None:
    async def body(r: Resources) -> None:
        for made in (config("a", "b"), config("b", "a")):
            await r.create(made, actor="eve")
        await r.delete(key("a"), actor="eve")
        assert r.store.all() == []

    run(body)


def test_a_namespace_takes_everything_in_it_along_but_waits_for_finalizers() -> None:
    async def body(r: Resources) -> None:
        await r.create(make("Namespace", "line-3"), actor="eve")
        for made in (
            config("a", namespace="line-3"), config("b", "a", namespace="line-3"),
            config("held", namespace="line-3", finalizers=["ew/clean"]), config("a"),
        ):  # fmt: skip
            await r.create(made, actor="eve")
        home = Key("Namespace", CLUSTER, "line-3")
        await r.delete(home, actor="eve")
        held = r.store.get(key("held", "line-3"))
        assert [str(i.key) for i in r.store.items("Config")] == ["Config/a", "Config/line-3/held"]
        assert held.metadata.deletionTimestamp
        assert r.store.get(home).metadata.deletionTimestamp
        with pytest.raises(Invalid, match="is going"):
            await r.create(config("late", namespace="line-3"), actor="eve")
        await r.delete(home, actor="eve")  # again, while it goes: no harm
        with pytest.raises(Conflict, match="is being deleted"):
            await r.replace(again(held, finalizers=["ew/clean", "ew/more"]), actor="eve")
        await r.store.remove(held.key)
        await r.collect()
        assert [str(i.key) for i in r.store.all()] == ["Config/a"]
        await r.create(make("Namespace", "default"), actor="eve")
        with pytest.raises(Conflict, match="stays"):
            await r.delete(Key("Namespace", CLUSTER, "default"), actor="eve")

    run(body)


def test_the_last_finalizer_lets_it_go() -> None:
    async def body(r: Resources) -> None:
        await r.create(config("a", finalizers=["one", "two"]), actor="eve")
        await r.create(config("b", "a"), actor="eve")
        marked = await r.delete(key("a"), actor="eve")
        twice = await r.delete(key("a"), actor="eve")
        assert marked.metadata.deletionTimestamp == twice.metadata.deletionTimestamp
        one = await r.replace(again(twice, finalizers=["two"]), actor="cleaner")
        assert [c.metadata.name for c in r.store.items("Config")] == ["a", "b"]
        await r.replace(again(one, finalizers=[]), actor="cleaner")
        assert r.store.all() == []

    run(body)


def test_a_namespace_that_goes_lets_finalizers_come_off_and_leaves_nothing_behind() -> None:
    async def body(r: Resources) -> None:
        await r.create(make("Namespace", "line-3"), actor="eve")
        await r.create(config("held", namespace="line-3", finalizers=["ew/clean"]), actor="eve")
        home = Key("Namespace", CLUSTER, "line-3")
        assert (await r.delete(home, actor="eve")).metadata.deletionTimestamp, "it is not gone yet"
        # a write of the namespace (`apply` of its file) must not take it away from over what is still in it
        await r.replace(make("Namespace", "line-3"), actor="eve")
        assert r.store.get(home).metadata.deletionTimestamp
        with pytest.raises(Invalid) as refused:
            await r.create(config("late", namespace="line-3"), actor="eve")
        assert refused.value.remedy == "wait until it is gone, then create it anew"
        held = r.store.get(key("held", "line-3"))
        await r.replace(again(held, finalizers=[]), actor="cleaner")
        await r.collect()
        assert r.store.all() == []
        await r.create(make("Namespace", "line-3"), actor="eve")
        assert not (await r.delete(home, actor="eve")).metadata.deletionTimestamp, "gone at once"

    run(body)


class Gated(SqliteStore):
    """A store that takes its time with new Configs: what else happens, happens before them."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def put(self, resource: Resource, *, expect: int | None = None) -> Resource:
        if resource.kind == "Config" and not resource.metadata.deletionTimestamp:
            self.asked.set()
            await self.go.wait()
        return await super().put(resource, expect=expect)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("finalizers", [[], ["ew/clean"]])
def test_what_is_created_while_its_namespace_goes_does_not_stay(held: bool, finalizers: list[str]) -> None:
    """``held``: the namespace is still there, because something else in it waits for a finalizer."""

    async def main() -> None:
        store, audit = Gated(), Audit()
        r = Resources(store, audit)
        home = Key("Namespace", CLUSTER, "line-3")
        await r.create(make("Namespace", "line-3"), actor="eve")
        if held:
            store.go.set()
            await r.create(config("held", namespace="line-3", finalizers=["ew/clean"]), actor="eve")
            store.go.clear()
            store.asked.clear()
        late = config("late", namespace="line-3", finalizers=finalizers)
        creating = asyncio.create_task(r.create(late, actor="adam"))
        await asyncio.wait_for(store.asked.wait(), 60)
        await r.delete(home, actor="eve")
        assert (store.find(home) is not None) is held
        store.go.set()
        with pytest.raises(Invalid, match="is going" if held else "does not exist"):
            await asyncio.wait_for(creating, 60)
        assert store.find(key("late", "line-3")) is None
        assert outcomes(r)[-1] == ("create", "late", "Invalid")
        store.close()
        audit.close()

    asyncio.run(main())


def test_the_hub_takes_away_what_is_in_no_namespace() -> None:
    """A process that was killed between writing and looking again leaves such a thing."""

    async def body(r: Resources) -> None:
        await r.store.put(config("stray", namespace="gone"))
        await r.store.put(config("a"))
        await r.collect()
        assert r.store.find(key("stray", "gone")) is not None, "a node has not heard of every namespace"
        await r.collect(strays=True)
        assert [str(i.key) for i in r.store.all()] == ["Config/a"]

    run(body)


def test_what_goes_may_lose_its_finalizer_when_what_it_names_is_gone() -> None:
    async def body(r: Resources) -> None:
        await r.create(make("Site", "s"), actor="eve")
        spec = {"process": {"command": ["x"]}, "placement": {"site": "s"}}
        await r.create(make("App", "a", spec, finalizers=["ew/clean"]), actor="eve")
        going = await r.delete(Key("App", "default", "a"), actor="eve")
        await r.delete(Key("Site", CLUSTER, "s"), actor="eve")
        await r.replace(again(going, finalizers=[]), actor="cleaner")
        assert r.store.all() == []

    run(body)


class Slow(SqliteStore):
    """Lets others run inside a write, as the hub's store does while it waits for NATS."""

    async def _put(self, resource: Resource, old: Entry | None) -> Resource:
        await asyncio.sleep(0)
        if self.entry(resource.key) is not old:
            raise Conflict("changed meanwhile", resource=str(resource.key))
        return await super()._put(resource, old)

    async def remove(self, key: Key, *, expect: int | None = None) -> None:
        await asyncio.sleep(0)
        await super().remove(key, expect=expect)
        await asyncio.sleep(0)


def test_two_cascades_at_once_delete_everything_once() -> None:
    async def main() -> None:
        store, audit = Slow(), Audit()
        r = Resources(store, audit)
        await r.create(make("Namespace", "line-3"), actor="eve")
        for n in range(20):
            await r.create(config(f"c{n}", *([f"c{n - 1}"] if n % 2 else []), namespace="line-3"), actor="eve")
        home = Key("Namespace", CLUSTER, "line-3")
        await asyncio.gather(
            r.delete(key("c0", "line-3"), actor="eve"), r.collect(), r.delete(home, actor="eve"), r.collect()
        )
        assert store.all() == []
        deleted = [i["name"] for i in audit.items() if i["verb"] == "delete" and i["kind"] == "Config"]
        assert sorted(deleted) == sorted(f"c{n}" for n in range(20))
        assert {i["outcome"] for i in audit.items()} == {"done"}
        store.close()
        audit.close()

    asyncio.run(main())


def test_nobody_makes_up_what_nodes_report() -> None:
    async def body(r: Resources) -> None:
        await r.create(make("App", "a", {"process": {"command": ["x"]}}), actor="eve")
        app = Key("App", "default", "a")
        with pytest.raises(Forbidden, match="nodes report"):
            await r.status(app, {"phase": "Running"}, actor="eve")
        assert r.store.get(app).status == {}
        assert outcomes(r)[-1] == ("status", "a", "Forbidden")
        await r.create(config("c"), actor="eve")
        assert (await r.status(key("c"), {"seen": 1}, actor="controller")).status == {"seen": 1}

    run(body)


def test_collect_finishes_what_a_killed_process_left() -> None:
    async def body(r: Resources) -> None:
        a = await r.create(config("a"), actor="eve")
        owner = {"kind": "Config", "name": "a", "namespace": "default", "uid": a.metadata.uid}
        await r.create(make("Config", "b", ownerReferences=[owner]), actor="eve")
        await r.create(config("c", "a", "other"), actor="eve")
        await r.create(config("d", "b"), actor="eve")
        await r.collect()
        assert len(r.store.all()) == 4, "whoever has an owner stays"
        await r.store.remove(key("a"))  # as if killed right after
        await r.create(config("a"), actor="eve")  # the same name, another one
        await r.collect()
        assert [i.metadata.name for i in r.store.all()] == ["a", "c"]
        await r.store.remove(key("a"))
        await r.collect()
        assert r.store.all() == []
        assert {i["actor"].partition(" ")[0] for i in r.audit.items() if i["verb"] == "delete"} == {"system"}

    run(body)


def test_a_refused_delete_is_audited_and_changes_nothing() -> None:
    async def body(r: Resources) -> None:
        a = await r.create(config("a"), actor="eve")
        with pytest.raises(Conflict):
            await r.delete(key("a"), expect=a.revision + 1, actor="bob")
        with pytest.raises(NotFound):
            await r.delete(key("z"), actor="bob")
        assert r.store.all() == [a]
        assert outcomes(r)[-1] == ("delete", "a", "Conflict")
        assert (await r.status(key("a"), {"phase": "x"}, actor="c")).status == {"phase": "x"}
        with pytest.raises(NotFound):
            await r.status(key("z"), {}, actor="c")

    run(body)
