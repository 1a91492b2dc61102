"""Local changes of sites, sent as a node sends them: decided once, kept when they lose, and never beyond the site."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.core.pair import until
from tests.nodes.fleet import app, config, doc, fleet

from edgeward.core import store_nats
from edgeward.core.resource import CLUSTER, Key, Resource, to_stored
from edgeward.hub.kinds import load
from edgeward.nodes.wire import (
    LocalChange,
    PushAnswer,
    PushAsk,
    SyncAnswer,
)

load()


def names(answer: SyncAnswer) -> set[str]:
    return {f"{o.kind}/{o.name}" + ("" if o.stored else " gone") for o in answer.objects}


def test_a_nodes_own_changes_are_decided_once(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            made = await f.push("plant-1", app("mine", "plant"))
            assert (made.outcome, made.now.stored is not None) == ("accept", True)
            key = Key("App", "default", "mine")
            stored = f.store.get(key)
            assert made.now.revision == stored.revision
            # a change on the present revision, and the same answer again when only the answer was lost
            change = LocalChange(10, *_parts(key), "put", stored.revision, 1.0, "ann", to_stored(app("mine", "plant", replicas=3)))  # fmt: skip  # noqa: E501
            for outcome in ("accept", "same"):
                answer = await f.ask("plant-1", "push", PushAsk("replica", [change]), PushAnswer)
                assert [d.outcome for d in answer.decided] == [outcome]
                assert f.store.get(key).spec.replicas == 3
                assert f.store.get(key).metadata.generation == 2
            # a wiped node counts from 1 again: another store's numbers mean nothing
            change = msgspec.structs.replace(change, seq=1, base=f.store.get(key).revision,
                                             stored=to_stored(app("mine", "plant", replicas=4)))  # fmt: skip
            answer = await f.ask("plant-1", "push", PushAsk("wiped", [change]), PushAnswer)
            assert [d.outcome for d in answer.decided] == ["accept"]
            assert f.store.get(key).spec.replicas == 4
            f._seq = 100
            await f.push("plant-1", key, f.store.get(key).revision)
            assert f.store.find(key) is None
            await until(lambda: len(f.journal()) == 4)
            assert f.journal() == [("App/mine", "accept")] * 4

    asyncio.run(body())


def test_a_store_that_goes_silent_costs_no_local_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stands still while a change is taken over, for longer than the hub waits: the node sends it again."""
    monkeypatch.setattr(store_nats, "_TIMEOUT", 1.5)

    async def body() -> None:
        async with fleet(tmp_path) as f:
            key = Key("App", "default", "mine")
            takeover = f.nodes.takeover
            write, pid = takeover._write, f.server.pid or 0

            async def silent(*args: Any) -> None:
                os.kill(pid, signal.SIGSTOP)
                try:
                    await write(*args)
                finally:
                    os.kill(pid, signal.SIGCONT)

            async def push(*changes: LocalChange) -> list[str]:
                """As a node does: again while the hub has no word on them."""
                async with asyncio.timeout(120):
                    while (answer := await f.ask("plant-1", "push", PushAsk("r", list(changes)), PushAnswer)).error:
                        takeover._write = write
                return [d.outcome for d in answer.decided]

            def change(seq: int, replicas: int, first: int) -> LocalChange:
                stored = to_stored(app("mine", "plant", replicas=replicas))
                return LocalChange(seq, *_parts(key), "put", 0, 1.0, "ann", stored, first)

            takeover._write = silent
            # the same change again, be it that its first try came through or that it did not
            assert await push(change(1, 2, 1)) in (["accept"], ["same"])
            assert f.store.get(key).spec.replicas == 2
            # and one that replaces a change whose write did happen, unknown to anybody, is no conflict with that
            takeover._write = silent
            assert (await f.ask("plant-1", "push", PushAsk("r", [change(2, 3, 1)]), PushAnswer)).error
            takeover._write = write
            await until(lambda: f.store.get(key).spec.replicas == 3)
            assert await push(change(3, 4, 1)) == ["accept"]
            assert f.store.get(key).spec.replicas == 4
            # each in the journal, once
            await until(lambda: len(f.journal()) == 3)
            assert f.journal() == [("App/mine", "accept")] * 3

    asyncio.run(body())


def _parts(key: Key) -> tuple[str, str, str]:
    return key.kind, key.namespace, key.name


def test_when_both_sides_changed_it_the_rule_decides_and_the_loser_is_kept(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            for rule, winner in (("cloud", "hub"), ("edge", "site")):
                await f.store.put(app(f"uses-{rule}", "plant", config=rule))
                old = await f.store.put(config(rule, "old", conflict=rule))
                await f.store.put(config(rule, "hub", conflict=rule))
                decided = await f.push("plant-1", config(rule, "site", conflict=rule), old.revision)
                assert f.store.get(old.key).spec.data == {"k": winner}
                assert decided.now.stored is not None and decided.now.stored.spec["data"] == {"k": winner}
                assert decided.journal is not None
                loser = "site" if winner == "hub" else "hub"
                assert decided.journal["lost"]["spec"] == {"data": {"k": loser}}
            # the secret that lost is not written into the journal
            await f.store.put(app("uses", "plant", envFrom=[{"secret": "s"}]))
            old = await f.store.put(doc("Secret", "s", {"data": {"p": "old"}}))
            await f.store.put(doc("Secret", "s", {"data": {"p": "hub"}}))
            decided = await f.push("plant-1", doc("Secret", "s", {"data": {"p": "hunter2"}}), old.revision)
            assert decided.outcome == "reject"
            assert "hunter2" not in str(decided.journal)

    asyncio.run(body())


def test_what_other_sites_use_too_becomes_an_override(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            shared = await f.store.put(app("web", replicas=1))
            decided = await f.push("plant-1", app("web", replicas=5), shared.revision)
            assert decided.outcome == "override"
            assert f.store.get(shared.key).spec.replicas == 1, "nobody else notices"
            override = f.store.get(Key("Override", "default", "app-web-plant"))
            assert (override.spec.site, override.spec.patch) == ("plant", {"replicas": 5})
            assert override.metadata.ownerReferences[0].uid == shared.metadata.uid
            assert "Override/app-web-plant" in names(await f.sync("plant-2"))
            assert "Override/app-web-plant" not in names(await f.sync("shop-1"))
            gone = await f.push("plant-1", shared.key, shared.revision)
            assert gone.outcome == "reject"
            assert f.store.find(shared.key) is not None
            assert (await f.push("plant-1", override.key, override.revision)).outcome == "accept"
            assert f.store.find(override.key) is None, "a site may give its own override up"

    asyncio.run(body())


def test_a_site_reaches_nothing_of_others(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            override = await f.store.put(
                doc("Override", "o", {"target": {"kind": "Site", "name": "shop"}, "site": "shop", "patch": {}})
            )
            tries: list[Resource | Key] = [
                app("x", "shop"),
                doc("Node", "shop-1", {"site": "plant"}),
                doc("Node", "plant-1", {"site": "plant"}, labels={"x": "y"}),
                doc("Site", "shop", {"displayName": "taken"}),
                doc("Override", "p", {"target": {"kind": "Site", "name": "shop"}, "site": "plant", "patch": {}}),
                Key("Node", CLUSTER, "shop-1"),
                Key("Node", CLUSTER, "plant-2"),
                Key("Site", CLUSTER, "shop"),
                override.key,
            ]
            before = [(r.key, r.revision) for r in f.store.all()]
            for what in tries:
                key = what if isinstance(what, Key) else what.key
                old = f.store.find(key)
                decided = await f.push("plant-1", what, old.revision if old else 0)
                assert decided.outcome == "invalid", key
                assert "refused by the hub" in decided.why and str(key) in decided.why, decided.why
                assert "it at the hub" in decided.why
            assert [(r.key, r.revision) for r in f.store.all()] == before
            # its own Site it may name, but not say whose clients come to it
            taking = {"displayName": "P", "prefixes": ["0.0.0.0/0"], "addresses": ["192.0.2.66"]}
            key = Key("Site", CLUSTER, "plant")
            assert (
                await f.push("plant-1", doc("Site", "plant", taking), f.store.get(key).revision)
            ).outcome == "accept"
            spec = f.store.get(key).spec
            assert (spec.displayName, spec.prefixes, spec.addresses) == ("P", [], [])

    asyncio.run(body())


def change(seq: int, replicas: int | None, base: int = 0, name: str = "mine", **more: Any) -> LocalChange:
    stored = to_stored(app(name, "plant", replicas=replicas)) if replicas is not None else None
    op = "put" if stored else "delete"
    return LocalChange(seq, "App", "default", name, op, base, 1.0, "ann", stored, **more)


def test_a_change_on_top_of_another_nodes_is_no_conflict_with_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            key = Key("App", "default", "mine")

            async def push(node: str, store: str, what: LocalChange) -> str:
                answer = await f.ask(node, "push", PushAsk(store, [what]), PushAnswer)
                assert not answer.error, answer.error
                return str(answer.decided[0].outcome)

            assert await push("plant-1", "one", change(1, 2)) == "accept"
            # it had the base that the first one had, and says that it was made on top of it
            assert await push("plant-2", "two", change(1, 3, over=[("plant-1", "one", 1)])) == "accept"
            assert f.store.get(key).spec.replicas == 3
            # the first node goes on from there, as long as nothing else happened
            over = [("plant-1", "one", 1), ("plant-2", "two", 1)]
            assert await push("plant-1", "one", change(2, None, over=over)) == "accept"
            assert f.store.find(key) is None
            over[0] = ("plant-1", "one", 2)
            assert await push("plant-2", "two", change(2, 4, over=over)) == "accept"
            # who did not know of it meets a conflict, and so does whoever missed what the hub did since
            assert await push("plant-1", "one", change(3, 5, over=[("plant-2", "two", 1)], base=1)) == "reject"
            await f.store.put(app("mine", "plant", replicas=6))
            assert await push("plant-1", "one", change(4, 7, over=[("plant-2", "two", 2)])) == "reject"
            # nodes of other sites, and replicas that nobody has, stand for nothing
            assert await push(
                "plant-1", "one", change(5, 7, over=[("shop-1", "x", 9), ("plant-2", "new", 9)], base=1)
            ) == ("reject")
            assert f.store.get(key).spec.replicas == 6

    asyncio.run(body())


def test_a_node_has_the_changes_of_a_silent_one_decided(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            key = Key("App", "default", "mine")

            async def push(node: str, *what: LocalChange, of: str = "", store: str = "one") -> list[str]:
                answer = await f.ask(node, "push", PushAsk(store, list(what), of), PushAnswer)
                assert not answer.error, answer.error
                return [d.outcome for d in answer.decided]

            mine, other = change(2, 2), change(1, 9, name="other")
            assert await push("plant-2", mine, of="plant-1") == ["accept"]
            assert await push("plant-2", mine, of="plant-1") == ["same"], "only the answer was lost"
            await until(lambda: f.journal() == [("App/mine", "accept")])
            (said,) = f.records.items("journal")
            assert (said["node"], said["sentBy"]) == ("plant-1", "plant-2")
            # the hub goes on; the silent node comes back with all that it had
            theirs = app("mine", "plant", replicas=3)
            theirs.metadata.conflict = "edge"
            await f.store.put(theirs)
            assert await push("plant-1", other, mine) == ["accept", "same"], "what came before it is not taken for done"
            assert f.store.get(key).spec.replicas == 3
            # a number that somebody else took for another change is decided on its own
            assert await push("plant-2", change(3, 4), of="plant-1") == ["accept"], "the rule is edge"
            assert await push("plant-1", change(3, 5, base=f.store.get(key).revision)) == ["accept"]
            # a replica that the node does not have any more
            assert await push("plant-2", change(1, 8, name="old"), of="plant-1", store="former") == ["accept"]
            assert await push("plant-1", change(3, 5)) == ["same"]

            # nobody speaks for nodes of other sites, nor for one that was revoked
            assert await push("shop-1", change(9, 9, name="far"), of="plant-1") == ["invalid"]
            f.nodes.takeover.revoked = lambda node: node == "plant-1"
            assert await push("plant-2", change(10, 9, name="far"), of="plant-1") == ["invalid"]
            assert f.store.find(Key("App", "default", "far")) is None
            await until(lambda: f.journal()[-2:] == [("App/far", "invalid")] * 2)

    asyncio.run(body())


@pytest.mark.parametrize(
    "lie",
    [{"name": "../../../etc"}, {"namespace": "../../../etc"}, {"labels": {"a b": "c"}}, {"labels": {"a": "x" * 5000}},
     {"creationTimestamp": "yesterday"}, {"uid": "x" * 5000}],
    ids=lambda lie: str(lie)[:40],
)  # fmt: skip
def test_a_name_or_label_that_nobody_could_give_is_taken_from_no_node(tmp_path: Path, lie: dict[str, Any]) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            stored = to_stored(app("mine", "plant"))
            for field, value in lie.items():
                setattr(stored.metadata, field, value)
            at = ("App", stored.metadata.namespace, stored.metadata.name)
            change = LocalChange(1, *at, "put", 0, 1.0, "eve", stored)
            answer = await f.ask("plant-1", "push", PushAsk("replica", [change]), PushAnswer)
            held = f.store.find(Key(*at))
            assert [d.outcome for d in answer.decided] == ["invalid"]
            assert held is None

    asyncio.run(body())
