"""A node that was broken into, with its own valid key: what it gets and what it can do, over NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.core.pair import until
from tests.nodes.fleet import Fleet, app, config, doc, fleet

from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.identity import NodeIdentity
from edgeward.core.natsserver import AGENT_USER, HubSpec, NatsServer, NodeSpec
from edgeward.core.resource import CLUSTER, Key, Resource, to_stored
from edgeward.core.roles import AccessTokenSpec
from edgeward.nodes.reach import check_known, check_refs, own_status, pinned, went_back
from edgeward.nodes.wire import (
    LEVEL,
    LocalChange,
    Ok,
    PushAnswer,
    PushAsk,
    ReportAsk,
    Status,
    SyncAnswer,
    SyncAsk,
)

SECRET = "geheim-der-anderen"


# -- the rules -----


def test_what_a_site_places_anew_is_placed_there() -> None:
    everywhere, here = app("a"), app("a", "plant")
    assert pinned(everywhere, None, "plant").spec.placement.site == "plant"
    assert pinned(everywhere, here, "plant").spec.placement.site == "plant", "nor is it widened later"
    assert pinned(here, None, "plant") is here
    assert pinned(app("a", replicas=2), everywhere, "plant").spec.placement.site == "", "the hub has it everywhere"
    picky = app("a", placement={"nodeSelector": {"n": "1"}})
    wider = app("a", placement={"nodeSelector": {}})
    assert pinned(wider, picky, "plant").spec.placement.site == "plant"
    assert pinned(config("c", "1"), None, "plant").spec.data == {"k": "1"}


def test_nothing_is_brought_to_the_site_by_a_reference() -> None:
    uses = app("a", "plant", envFrom=[{"secret": "s"}])
    have = {Key("Site", CLUSTER, "plant"), Key("Secret", "default", "s")}
    check_refs(uses, "plant", have.__contains__, lambda _: False)
    with pytest.raises(Invalid) as caught:
        check_refs(uses, "plant", (have - {Key("Secret", "default", "s")}).__contains__, lambda _: False)
    assert caught.value.field.startswith("$.spec.envFrom")
    check_known(uses.key, "plant", there=False, known=False)
    check_known(uses.key, "plant", there=True, known=True)
    with pytest.raises(Invalid):
        check_known(uses.key, "plant", there=True, known=False)


def test_a_node_does_not_say_that_it_is_online_or_not_revoked() -> None:
    said = {"version": "1", "online": True, "revoked": False, "since": "x"}
    assert own_status(said) == {"version": "1"}
    assert went_back({"audit": {"last": 7}}, {"audit": {"last": 6}}) == (7, 6)
    assert went_back({"audit": {"last": 7}}, {}) == (7, 0)
    for old, new in (
        ({}, {"audit": {"last": 1}}),
        ({"audit": {"last": 7}}, {"audit": {"last": 7}}),
        ({"audit": 3}, {}),
    ):
        assert went_back(old, new) is None


# -- over NATS, with the node's own JWT -----


class Intruder:
    """Whoever sits on plant-1 and speaks with its key."""

    def __init__(self, f: Fleet, bus: Bus) -> None:
        self.f, self.bus, self.seq = f, bus, 0

    async def ask(self, verb: str, what: Any, answer: Any, node: str = "plant-1") -> Any:
        msg = await self.bus.request(f"ew.hub.{verb}.{node}", msgspec.msgpack.encode(what), timeout=3)
        return msgspec.msgpack.decode(msg.data, type=answer)

    async def push(self, what: Resource | Key, base: int = 0) -> Any:
        self.seq += 1
        key, stored = (what, None) if isinstance(what, Key) else (what.key, to_stored(what))
        op = "put" if stored else "delete"
        change = LocalChange(self.seq, key.kind, key.namespace, key.name, op, base, 4e9, "eve", stored)
        answer = await self.ask("push", PushAsk("replica", [change]), PushAnswer)
        assert not answer.error, answer.error
        (decided,) = answer.decided
        return decided

    async def sees(self) -> set[str]:
        answer = await self.ask("sync", SyncAsk(0, "", level=LEVEL), SyncAnswer)
        assert not answer.error
        return {str(o.key) for o in answer.objects if o.stored is not None}


@asynccontextmanager
async def broken_in(tmp_path: Path) -> AsyncIterator[Intruder]:
    async with fleet(tmp_path / "hub") as f:
        own = NodeIdentity.open(tmp_path / "identity")
        own.accept(f.identity.issue_node("plant-1", own.public_key), f.identity.ca_pem)
        # the other nodes are enrolled, too
        for name in ("plant-2", "shop-1"):
            other = NodeIdentity.open(tmp_path / name)
            f.identity.issue_node(name, other.public_key)
        await f.server.apply(HubSpec(f.identity.operator_jwt, f.identity.system_account, f.identity.accounts))
        port = f.server.ports["websocket"]
        spec = NodeSpec("plant-1", hub_url=f"ws://127.0.0.1:{port}", creds_file=own.creds_file)
        leaf = NatsServer(tmp_path / "leaf", spec)
        await leaf.start()
        try:
            bus = await Bus.connect(
                leaf.url, name="x", username=AGENT_USER, password=leaf.secret, inbox="_INBOX_plant-1"
            )
            intruder = Intruder(f, bus)
            async with asyncio.timeout(20):
                while True:
                    try:
                        await intruder.sees()
                        break
                    except EdgewardError:
                        await asyncio.sleep(0.1)  # until the leaf is up
            yield intruder
            await bus.close()
        finally:
            await leaf.stop()


async def scene(f: Fleet) -> None:
    """A shop with a secret of its own, and one that nobody uses yet."""
    await f.store.put(doc("Secret", "shop", {"data": {"p": SECRET}}))
    await f.store.put(doc("Secret", "unused", {"data": {"p": SECRET}}))
    await f.store.put(app("till", "shop", envFrom=[{"secret": "shop"}]))
    await f.store.put(app("press", "plant"))
    await f.store.put(app("both"))


def test_it_sees_nothing_of_other_sites(tmp_path: Path) -> None:
    async def body() -> None:
        async with broken_in(tmp_path) as eve:
            await scene(eve.f)
            seen = await eve.sees()
            assert {"App/press", "App/both", "Node/plant-1", "Site/plant"} <= seen
            assert not {s for s in seen if "shop" in s or "till" in s or "Secret" in s}
            # nor by writing: the answer to a change holds what the hub has
            for name in ("shop", "unused"):
                for sent in (doc("Secret", name, {"data": {"p": "x"}}), Key("Secret", "default", name)):
                    decided = await eve.push(sent)
                    assert decided.outcome == "invalid"
                    assert decided.now.stored is None
                    assert SECRET not in str(decided)
                # nor by an app of its own that uses it
                decided = await eve.push(app(f"thief-{name}", "plant", envFrom=[{"secret": name}]))
                assert (decided.outcome, "there is no Secret" in decided.why) == ("invalid", True)
                again = await eve.push(app(f"thief-{name}-2", "plant", envFrom=[{"secret": "no-such-thing"}]))
                assert again.why.replace("no-such-thing", name).replace("-2", "") == decided.why, (
                    "nor whether it is there"
                )
                # nor by making the app that it has use it
                old = eve.f.store.get(Key("App", "default", "press"))
                thief = app("press", "plant", envFrom=[{"secret": name}])
                assert (await eve.push(thief, old.revision)).outcome == "invalid"
                shared = eve.f.store.get(Key("App", "default", "both"))
                assert (await eve.push(app("both", envFrom=[{"secret": name}]), shared.revision)).outcome == "invalid"
            assert {s for s in await eve.sees() if s.startswith("Secret")} == set()
            for name in ("shop", "unused"):
                assert eve.f.store.get(Key("Secret", "default", name)).spec.data == {"p": SECRET}

    asyncio.run(body())


def test_it_speaks_for_no_other_node(tmp_path: Path) -> None:
    async def body() -> None:
        async with broken_in(tmp_path) as eve:
            for verb, what in (
                ("sync", SyncAsk(0, "")),
                ("report", ReportAsk([], True, {"version": "evil"})),
                ("push", PushAsk("x", [])),
            ):
                for other in ("shop-1", "plant-2", "*"):
                    with pytest.raises(EdgewardError):
                        await eve.ask(verb, what, Ok, node=other)
            # nor listens to what they get
            heard: list[str] = []

            async def hear(msg: Any) -> None:
                heard.append(msg.subject)

            for subject in ("ew.node.shop-1.>", "ew.hub.>", "$KV.>", "$JS.API.>", "_INBOX_shop-1.>"):
                await eve.bus.subscribe(subject, hear)
            await eve.bus.flush()
            await eve.f.hub.publish("ew.node.shop-1.poke", b"1")
            await eve.f.store.put(config("c", "1"))
            await eve.f.hub.flush()
            await eve.sees()
            assert [s for s in heard if "plant-1" not in s] == []

    asyncio.run(body())


def test_its_word_on_other_things_counts_for_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with broken_in(tmp_path) as eve:
            f = eve.f
            await scene(f)
            fake = {"phase": "Running", "instances": [{"id": "i", "node": "shop-1", "phase": "Running"}]}
            mine = {"phase": "Running", "instances": [{"id": "j", "node": "shop-1", "phase": "Running"}]}
            said = [Status("App", "default", "till", fake), Status("App", "default", "press", mine)]
            said += [Status("Node", CLUSTER, "shop-1", {"online": True}), Status("Secret", "default", "shop", {"x": 1})]
            told = {"version": "9", "revoked": True, "online": True, "since": "never", "audit": {"last": 9}}
            assert not (await eve.ask("report", ReportAsk(said, True, told), Ok)).error
            await until(lambda: bool(f.store.get(Key("App", "default", "press")).status.get("instances")), 20)
            await until(lambda: f.store.get(Key("Node", CLUSTER, "plant-1")).status.get("version") == "9", 20)
            press = f.store.get(Key("App", "default", "press")).status
            assert [i["node"] for i in press["instances"]] == ["plant-1"], "it speaks of its own instances"
            assert not f.store.get(Key("App", "default", "till")).status.get("instances")
            assert "online" not in f.store.get(Key("Node", CLUSTER, "shop-1")).status
            assert f.store.get(Key("Secret", "default", "shop")).status == {}
            own = f.store.get(Key("Node", CLUSTER, "plant-1")).status
            assert own["revoked"] is False and own["since"] != "never"
            # an audit whose end was cut off is seen
            assert not (await eve.ask("report", ReportAsk([], False, {"version": "9", "audit": {"last": 4}}), Ok)).error
            await until(lambda: any(e["reason"] == "AuditCut" for e in f.records.items("events")), 20)

    asyncio.run(body())


def test_what_it_writes_stays_at_its_site(tmp_path: Path) -> None:
    async def body() -> None:
        async with broken_in(tmp_path) as eve:
            f = eve.f
            await scene(f)
            decided = await eve.push(app("everywhere"))
            assert decided.outcome == "accept"
            assert f.store.get(Key("App", "default", "everywhere")).spec.placement.site == "plant"
            assert decided.now.stored.spec["placement"] == {"site": "plant"}
            decided = await eve.push(app("everywhere"), decided.now.revision)
            assert f.store.get(Key("App", "default", "everywhere")).spec.placement.site == "plant"
            assert (await eve.push(app("elsewhere", "shop"))).outcome == "invalid"
            # of what all have it changes its own site's
            shared = f.store.get(Key("App", "default", "both"))
            assert (await eve.push(app("both", replicas=7), shared.revision)).outcome == "override"
            assert f.store.get(Key("App", "default", "both")).spec.replicas != 7
            assert (await eve.push(Key("App", "default", "both"), shared.revision)).outcome == "reject"
            for key in (Key("App", "default", "till"), Key("Node", CLUSTER, "shop-1"), Key("Site", CLUSTER, "shop")):
                assert (await eve.push(key, f.store.get(key).revision)).outcome == "invalid"
                assert f.store.find(key) is not None
            # a Service of a shared app would come to all sites
            service = doc("Service", "spy", {"app": "both", "port": "http"})
            assert (await eve.push(service)).outcome == "invalid"
            # nobody is made an administrator by a node
            everything = doc("Role", "king", {"rules": [{"verbs": ["*"], "kinds": ["*"]}]})
            token = Resource(
                kind="AccessToken", metadata=doc("Role", "t", {}).metadata,
                spec=AccessTokenSpec("admin", "0" * 64, "2099-01-01T00:00:00Z"),
            )  # fmt: skip
            join = doc("Override", "o", {"target": {"kind": "App", "name": "both", "namespace": "default"},
                                         "site": "plant", "patch": {}})  # fmt: skip
            for sent in (everything, token, join, doc("Node", "extra", {"site": "plant"})):
                assert (await eve.push(sent)).outcome == "invalid", sent.kind
                assert f.store.find(sent.key) is None
            # a document under another's name
            change = LocalChange(99, "Config", "default", "a", "put", 0, 4e9, "eve", to_stored(app("b", "plant")))
            eve.seq = 99
            (decided,) = (await eve.ask("push", PushAsk("replica", [change]), PushAnswer)).decided
            assert decided.outcome == "invalid" and f.store.find(Key("App", "default", "b")) is None

    asyncio.run(body())


def test_what_it_made_itself_it_may_use_and_change(tmp_path: Path) -> None:
    """A Config that nothing uses yet is in nobody's view; its maker still goes on with it."""

    async def body() -> None:
        async with broken_in(tmp_path) as eve:
            made = await eve.push(config("mine", "1"))
            assert made.outcome == "accept" and made.now.stored.spec == {"data": {"k": "1"}}
            changed = await eve.push(config("mine", "2"), made.now.revision)
            assert changed.outcome == "accept"
            assert (await eve.push(app("web", "plant", config="mine"))).outcome == "accept"
            assert {"Config/mine", "App/web"} <= await eve.sees()
            assert (await eve.push(config("mine", "3"), changed.now.revision)).outcome == "accept"

    asyncio.run(body())


def test_an_older_release_does_not_get_kinds_that_it_cannot_read(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path) as f:
            await f.store.put(doc("Role", "reader", {"rules": [{"verbs": ["get"], "kinds": ["App"]}]}))
            spec: dict[str, Any] = {"role": "reader", "hash": "0" * 64, "expires": "2099-01-01T00:00:00Z"}
            await f.store.put(doc("AccessToken", "here", spec | {"sites": ["plant"]}))
            await f.store.put(doc("AccessToken", "all", spec | {"sites": ["*"], "role": "viewer"}))
            await f.store.put(doc("AccessToken", "hub-only", spec))
            await f.store.put(doc("AccessToken", "there", spec | {"sites": ["shop"]}))

            async def keys(level: int, node: str = "plant-1") -> tuple[set[str], str]:
                got = await f.ask(node, "sync", SyncAsk(0, "", level=level), SyncAnswer)
                found = {str(o.key) for o in got.objects}
                return {k for k in found if k.startswith(("Role", "AccessToken"))}, got.view

            new, new_print = await keys(LEVEL)
            assert new == {"Role/reader", "AccessToken/here", "AccessToken/all"}
            old, old_print = await keys(0)
            assert old == set() and old_print != new_print
            assert (await keys(LEVEL, "shop-1"))[0] == {"Role/reader", "AccessToken/there", "AccessToken/all"}

    asyncio.run(body())
