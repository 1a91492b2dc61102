"""What siblings have in common in their replicas: taken whole, checked, kept over restarts and releases."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.previous import environment, unpacked

from edgeward.agent.replica import Replica
from edgeward.core import clock
from edgeward.core.errors import Conflict
from edgeward.core.resource import Key, decode, to_stored
from edgeward.hub.kinds import load
from edgeward.nodes.siblings import LATEST, Answer, Finished, Lost, SiteChange
from edgeward.nodes.wire import HubObject

load()
A = Key("Config", "default", "a")


def doc(kind: str, name: str, spec: dict[str, Any], **meta: Any) -> Any:
    return decode({"apiVersion": "edgeward/v1", "kind": kind, "metadata": {"name": name, **meta}, "spec": spec})


def config(value: str, name: str = "a") -> Any:
    return doc("Config", name, {"data": {"k": value}})


def value(replica: Replica, key: Key = A) -> str | None:
    found = replica.find(key)
    return found.spec.data["k"] if found else None


def pulls(replica: Replica, *others: Replica) -> None:
    for other in others:
        replica.take(other.answer(replica.digest()))


def made(path: Path, *nodes: str) -> list[Replica]:
    found = [Replica(path / f"{n}.db", site="plant", node=n) for n in nodes]
    for r in found:
        r.apply_sync(
            [HubObject("Config", "default", "a", 7, to_stored(config("hub")))], revision=7, epoch="e", full=True
        )
    return found


def test_a_change_of_another_node_counts_here_and_is_not_ones_own(tmp_path: Path) -> None:
    async def body() -> None:
        one, two = made(tmp_path, "one", "two")
        one.actor = "ann"
        await one.put(config("1"))
        before = two.get(A).revision
        with two.watch() as changes:
            pulls(two, one)
            assert (await anext(aiter(changes))).key == A
        assert value(two) == "1"
        assert not two.pending(), "its origin sends it to the hub"
        ((origin, (sent,)),) = two.pending_of(["one"]).items()
        assert origin == ("one", one.store_id) and (sent.seq, sent.base, sent.actor) == (1, 7, "ann")
        with pytest.raises(Conflict):
            await two.put(config("stale"), expect=before)
        # on top of it, after a restart
        two.close()
        two = Replica(tmp_path / "two.db", site="plant", node="two")
        assert value(two) == "1" and two.digest().open == one.digest().open
        await two.put(config("2"), expect=two.get(A).revision)
        (mine,) = two.pending()
        assert mine.over == [("one", one.store_id, 1)] and mine.base == 7
        pulls(one, two)
        assert value(one) == "2" and not one.pending()
        await one.remove(A)
        pulls(two, one)
        assert value(two) is None and not two.pending()
        # the hub decided it at its origin: the other one hears so, with what the hub has now
        (last,) = one.pending()
        assert last.over == [("one", one.store_id, 1), ("two", two.store_id, mine.seq)]
        one.resolve(last.seq, HubObject("Config", "default", "a", 9, to_stored(config("hub stands"))))
        pulls(two, one)
        assert value(one) == value(two) == "hub stands"
        assert two.digest().open == []

    asyncio.run(body())


def test_a_change_is_later_than_what_it_was_made_on_whatever_the_clock_says(tmp_path: Path) -> None:
    async def body() -> None:
        one, two = made(tmp_path, "one", "two")
        one.hub_time, two.hub_time = lambda: 5e9, lambda: 1e9
        await one.put(config("1"))
        pulls(two, one)
        await two.put(config("2"))
        assert two.open_changes()[A].stamp > 5e9
        two.close()
        two = Replica(tmp_path / "two.db", site="plant", node="two")
        two.hub_time = lambda: 1e9
        await two.put(config("new", "b"))
        stamps = {k.name: c.stamp for k, c in two.open_changes().items()}
        assert stamps["b"] > stamps["a"] > 5e9, "nor than what was made here before"

    asyncio.run(body())


def test_who_loses_is_told_before_the_other_one_counts(tmp_path: Path) -> None:
    async def body() -> None:
        one, two, three = made(tmp_path, "one", "two", "three")
        one.hub_time, two.hub_time, three.hub_time = lambda: 1e9, lambda: 2e9, lambda: 3e9
        told: list[tuple[str, str | None]] = []

        def lost(lost: Lost, wanted: Any) -> None:
            told.append((lost.change.node, value(one)))

        one.on_lost = lost
        await one.put(config("1"))
        await two.put(config("2"))
        await three.put(config("2"))
        pulls(one, two)
        assert told == [("one", "1")] and value(one) == "2"
        pulls(one, three)
        assert len(told) == 1, "who wanted the same has lost nothing"
        pulls(two, one)
        pulls(three, one)
        assert one.digest().open == two.digest().open == three.digest().open

    asyncio.run(body())


def test_what_the_hub_would_refuse_is_not_taken_from_a_sibling_either(tmp_path: Path) -> None:
    one, two = made(tmp_path, "one", "two")
    good = SiteChange("two", two.store_id, 1, *_at(A), "put", 7, 1e9, "eve", to_stored(config("2")))
    change = msgspec.structs.replace
    node, other = doc("Node", "x", {"site": "plant"}), doc("App", "w", {"process": {"command": ["true"]}, "placement": {"site": "shop"}})  # fmt: skip  # noqa: E501
    bad = [
        change(good, kind="Node", namespace="_", name="x", stored=to_stored(node)),
        change(good, kind="App", name="w", stored=to_stored(other)),
        change(good, name="b"),
        change(good, op="other"),
        change(good, stored=None),
        change(good, name="../x", op="delete", stored=None),
        change(good, kind="Gadget", stored=None, op="delete"),
        change(good, store=""),
        change(good, seen={str(n): 1 for n in range(300)}),
    ]
    for n, each in enumerate(bad, 1):
        one.take(Answer("two", two.store_id, n, [n], [change(each, seq=n if each.seq else 0)]))
        assert value(one) == "hub" and not one.open_changes(), each
    assert ("App", "default", "w", "two", two.store_id, 2) in one.digest().open, "nor is it asked for again"
    one.take(Answer("two", two.store_id, 99, [99], [change(good, seq=99)]))
    assert value(one) == "2"


def _at(key: Key) -> tuple[str, str, str]:
    return key.kind, key.namespace, key.name


def test_what_is_finished_does_not_come_back_from_who_did_not_hear_it(tmp_path: Path) -> None:
    async def body() -> None:
        one, two, three = made(tmp_path, "one", "two", "three")
        await one.put(config("1"))
        pulls(two, one)
        pulls(three, one)
        # the node is silent: another one has its change decided
        ((_, (sent,)),) = two.pending_of(["one"]).items()
        now = HubObject("Config", "default", "a", 8, to_stored(config("1")))
        journal = {"outcome": "accept", "loser": ""}
        two.finish(Finished("one", one.store_id, sent.seq, *_at(A), now, "e", "accept", "why", journal))
        assert two.digest().open == [] and value(two) == "1"
        pulls(two, three)
        assert two.digest().open == [], "not from a third one"
        pulls(three, two)
        assert three.digest().open == []
        (mine,) = one.take(two.answer(one.digest()))
        assert (mine.outcome, mine.journal) == ("accept", journal), "its origin learns of it, and what for"
        assert not one.pending() and value(one) == "1"
        two.close()
        two = Replica(tmp_path / "two.db", site="plant", node="two")
        pulls(two, three)
        assert two.digest().open == []

    asyncio.run(body())


def test_a_siblings_word_of_the_hub_is_taken_for_what_the_site_may_write(tmp_path: Path) -> None:
    async def body() -> None:
        (one,) = made(tmp_path, "one")
        site = Key("Site", "_", "plant")
        one.apply_sync(
            [HubObject(*_at(site), 5, to_stored(doc("Site", "plant", {})))], revision=8, epoch="e", full=False
        )
        await one.put(doc("Site", "plant", {"displayName": "mine"}))
        (mine,) = one.pending()

        def say(now: Any, **more: Any) -> None:
            hub = HubObject(*_at(site), 99, to_stored(now))
            one.take(
                Answer("two", "x", finished=[Finished("one", one.store_id, mine.seq, *_at(site), hub, "e", **more)])
            )

        say(doc("Site", "plant", {}))
        assert len(one.pending()) == 1, "what became of it here only the hub knows better"
        say(doc("Site", "plant", {"addresses": ["192.0.2.66"]}), outcome="accept")
        assert not one.pending() and one.get(site).spec.addresses == [], "that is the hub's to say"
        theirs = to_stored(doc("Site", "plant", {"displayName": "theirs", "addresses": ["192.0.2.66"]}))
        one.take(Answer("two", "x", changes=[SiteChange("two", "x", 1, *_at(site), "put", 5, 1e9, "eve", theirs)]))
        assert (one.get(site).spec.displayName, one.get(site).spec.addresses) == ("theirs", [])
        await one.put(doc("Site", "plant", {"displayName": "again"}))
        (mine,) = one.pending()
        say(doc("Site", "plant", {"displayName": "again"}), outcome="accept")
        assert not one.pending() and one.get(site).spec.displayName == "again"

    asyncio.run(body())


def test_what_is_named_goes_up_before_what_names_it(tmp_path: Path) -> None:
    async def body() -> None:
        one, two = made(tmp_path, "one", "two")
        app = {"process": {"command": ["true"]}, "placement": {"site": "plant"}}
        web, service = Key("App", "default", "web"), Key("Service", "default", "s")
        await one.put(doc("App", "web", app))
        await one.put(doc("Service", "s", {"app": "web", "port": "http"}))
        await one.put(doc("App", "web", {**app, "replicas": 2}))
        assert [c.name for c in one.pending()] == ["web", "s"], "however often it was changed"
        pulls(two, one)
        await two.put(doc("App", "web", {**app, "replicas": 3}))
        pulls(one, two)
        assert [c.name for c in one.pending()] == ["s"]
        assert one.names_open(service) == one.names_open(service, foreign=True) == [web]
        assert two.names_open(service) == [web] and not two.names_open(service, foreign=True)
        (sent,) = two.pending()
        two.resolve(sent.seq, HubObject("App", "default", "web", 9, to_stored(doc("App", "web", app))))
        pulls(one, two)
        assert one.names_open(service) == [], "the hub knows it now"

    asyncio.run(body())


_OLD = """
import asyncio, sys
from edgeward.hub.kinds import load
load()
from edgeward.agent.replica import Replica
from edgeward.core import clock
from edgeward.core.resource import decode
r = Replica(sys.argv[1], site="plant")
if sys.argv[2:]:
    spec = {"data": {"k": sys.argv[2]}}
    doc = {"apiVersion": "edgeward/v1", "kind": "Config", "metadata": {"name": "a"}, "spec": spec}
    asyncio.run(r.put(decode(doc)))
print(*(f"{c.name}={c.stored.spec['data']['k']}" for c in r.pending()))
"""


def test_the_previous_release_opens_the_same_file(tmp_path: Path) -> None:
    old = environment(unpacked(tmp_path / "old"))

    def previous(*args: str) -> str:
        argv = [sys.executable, "-c", _OLD, str(tmp_path / "two.db"), *args]
        return subprocess.run(argv, env=old, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    async def body() -> None:
        assert previous("old") == "a=old"
        two, one = Replica(tmp_path / "two.db", site="plant", node="two"), Replica(":memory:", site="plant", node="one")
        assert value(two) == "old" and two.open_changes()[A].stamp > 0
        pulls(one, two)
        await one.put(config("new"))
        pulls(two, one)
        assert value(two) == "new" and not two.pending()
        two.close()
        assert previous() == "a=new", "put back, it sends what it finds"
        assert previous("again") == "a=again"
        two = Replica(tmp_path / "two.db", site="plant", node="two")
        (mine,) = two.pending()
        assert ("one", one.store_id, 2) in mine.over, "on top of what was there"
        assert two.open_changes()[A].stamp > one.open_changes()[A].stamp
        pulls(one, two)
        assert value(one) == "again" and not one.pending()

    asyncio.run(body())


LIES: list[dict[str, Any]] = [
    {"stamp": math.inf}, {"stamp": math.nan}, {"stamp": 1e300}, {"stamp": -1.0}, {"stamp": LATEST * 2},
    {"seq": 2**63}, {"seq": 2**63 - 1}, {"base": 2**63}, {"base": -1}, {"node": "x" * 5000}, {"store": "x" * 5000},
    {"actor": "x" * 5000}, {"seen": {"x" * 5000: 1}}, {"seen": {"one/s": 2**64 - 1}}, {"seen": {"one/s": -1}},
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: str(lie)[:30])
def test_numbers_that_no_node_has_stop_nothing_between_the_others(tmp_path: Path, lie: dict[str, Any]) -> None:
    async def body() -> None:
        one, two = made(tmp_path, "one", "two")
        told: list[str] = []
        one.on_lost = lambda lost, _: told.append(clock.timestamp(lost.change.stamp))  # as the journal has it
        await one.put(config("mine"))
        await two.put(config("other", "b"))
        good = SiteChange("liar", "s", 7, *_at(A), "put", 7, 1.0, "eve", to_stored(config("evil")))
        bad = msgspec.structs.replace(good, **lie)
        honest = two.open_changes().values()
        one.take(
            Answer("liar", "s", 9, [7], [*honest, bad, msgspec.structs.replace(bad, node="one", store=one.store_id)])
        )
        assert value(one) == "mine" and one.find(Key("Config", "default", "b")) is not None
        for n in range(2):
            await one.put(config(f"mine {n}"))
            pulls(two, one)
            assert value(two) == f"mine {n}"
        one.close()
        one = Replica(tmp_path / "one.db", site="plant", node="one")
        assert value(one) == "mine 1"

    asyncio.run(body())


@pytest.mark.parametrize("revision", [2**63, -1])
def test_a_revision_that_no_hub_has_is_not_kept(tmp_path: Path, revision: int) -> None:
    async def body() -> None:
        one, two = made(tmp_path, "one", "two")
        await two.put(config("1"))
        pulls(one, two)
        (dot,) = (c.dot for c in one.open_changes().values())
        now = HubObject("Config", "default", "a", revision, to_stored(config("evil")))
        one.take(Answer("two", two.store_id, 1, [], [], [Finished(*dot, *_at(A), now, one.epoch, "accept", "why")]))
        await one.put(config("2", "b"))
        one.close()
        one = Replica(tmp_path / "one.db", site="plant", node="one")
        assert value(one) != "evil"

    asyncio.run(body())


@pytest.mark.parametrize(
    "meta",
    [{"namespace": "../../../etc"}, {"namespace": ""}, {"labels": {"a b": "c"}}, {"updateTimestamp": "yesterday"},
     {"creationTimestamp": "9" * 5000}, {"deletionTimestamp": "0001-01-01T00:00:00Z"}],
    ids=str,
)  # fmt: skip
def test_a_name_or_time_that_is_none_comes_in_by_no_sibling(tmp_path: Path, meta: dict[str, Any]) -> None:
    async def body() -> None:
        one, two = made(tmp_path, "one", "two")
        said = to_stored(config("evil"))
        for name, each in meta.items():
            setattr(said.metadata, name, each)
        at = ("Config", said.metadata.namespace, "a")
        good = SiteChange("liar", "s", 7, *at, "put", 7, 1.0, "eve", said)
        delete = msgspec.structs.replace(good, op="delete", stored=None, seq=8, namespace="../../../etc")
        one.take(Answer("liar", "s", 9, [7, 8], [good, delete]))
        assert not one.open_changes() and len(one.refused) == 2
        await two.put(config("1"))
        pulls(one, two)
        (dot,) = (c.dot for c in one.open_changes().values())
        now = HubObject("Config", "default", "a", 8, said)
        one.take(Answer("two", two.store_id, 1, [], [], [Finished(*dot, *_at(A), now, one.epoch, "accept", "why")]))
        assert value(one) == "hub"
        await one.put(config("2"))

    asyncio.run(body())
