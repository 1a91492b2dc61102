"""Watches: what comes into and leaves a selection, and what cannot be told any more."""

from __future__ import annotations

import asyncio

from tests.core.served import CONFIGS, Hub, config, namespace, run, watch


def test_a_watch_tells_what_comes_into_and_leaves_its_selection() -> None:
    async def body(hub: Hub) -> None:
        async def label(name: str, value: str) -> None:
            await hub.ask("PATCH", f"{CONFIGS}/{name}", {"metadata": {"labels": {"app": value}}})

        await hub.ask("POST", CONFIGS, config("a", labels={"app": "web"}))
        await hub.ask("POST", CONFIGS, config("b", labels={"app": "db"}))
        async with watch(hub, CONFIGS, labelSelector="app=web") as take:
            assert await take(1) == [("ADDED", "a")]
            await label("b", "web")
            await hub.ask("PUT", f"{CONFIGS}/b/status", {"phase": "x"})
            await label("a", "db")
            await label("a", "dc")  # outside, unseen
            await hub.ask("POST", "/api/v1/namespaces", namespace("n"))  # another kind, unseen
            await hub.ask("DELETE", f"{CONFIGS}/b")
            assert await take(4) == [("ADDED", "b"), ("MODIFIED", "b"), ("DELETED", "a"), ("DELETED", "b")]
            last = str(take.last)
        await hub.ask("POST", CONFIGS, config("c", labels={"app": "web"}))
        await hub.ask("DELETE", f"{CONFIGS}/c")
        await hub.ask("POST", CONFIGS, config("d", labels={"app": "web"}))
        for how in ({"resourceVersion": last}, {"headers": {"last-event-id": last}, "resourceVersion": "0"}):
            async with watch(hub, CONFIGS, labelSelector="app=web", **how) as take:
                (gone, there) = await take(2)
                assert gone == ("DELETED", "c")
                assert there[1] == "d"
        async with watch(hub, "/api/v1/namespaces/n/configs") as take:
            await hub.ask("POST", CONFIGS, config("e"))
            await hub.ask("POST", "/api/v1/namespaces/n/configs", config("f"))
            assert await take(1) == [("ADDED", "f")]

    run(body)


def test_a_watch_from_a_forgotten_revision_is_gone_one_from_none_is_not() -> None:
    async def body(hub: Hub) -> None:
        await hub.ask("POST", CONFIGS, config("a"))
        await hub.ask("POST", CONFIGS, config("b"))
        hub.store.compacted = 2  # what a store says that forgot its deletions
        status, _, remedy = await hub.refused("GET", CONFIGS, params={"watch": "1", "resourceVersion": "1"})
        assert (status, "list again" in remedy) == (410, True)
        async with watch(hub, CONFIGS) as take:
            assert await take(2) == [("ADDED", "a"), ("ADDED", "b")]

    run(body)


def test_watchers_that_leave_are_forgotten() -> None:
    async def body(hub: Hub) -> None:
        async with watch(hub, CONFIGS):
            assert hub.store.stats()["watchers"] == 1
        async with asyncio.timeout(120):
            while hub.store.stats()["watchers"]:
                await hub.ask("GET", "/healthz")  # the server takes its turns

    run(body)
