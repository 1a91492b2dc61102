"""The loop: one key at a time, everything folded, no failure lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.core.reconcile import Loop


@asynccontextmanager
async def running(loop: Loop[str]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(loop.run())
    try:
        async with asyncio.timeout(120):
            yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_what_comes_while_a_key_is_handled_becomes_one_more_call() -> None:
    async def body() -> None:
        calls: list[int] = []
        state, inside, gate = 0, asyncio.Event(), asyncio.Event()

        async def handler(_: str) -> None:
            calls.append(state)
            inside.set()
            await gate.wait()

        loop = Loop("t", handler)
        async with running(loop):
            loop.add("k")
            await inside.wait()
            for state in (1, 2, 3):  # noqa: B007 - the handler reads it
                loop.add("k")
            gate.set()
            await loop.settled()
            assert calls == [0, 3], "folded, and on the present state"

    asyncio.run(body())


@settings(max_examples=30, deadline=None)
@given(
    adds=st.lists(st.sampled_from("abcd"), max_size=30), workers=st.integers(1, 3), turns=st.lists(st.integers(0, 3))
)
def test_never_twice_at_once_never_forgotten(adds: list[str], workers: int, turns: list[int]) -> None:
    async def body() -> None:
        wanted, seen, busy, most = Counter[str](), Counter[str](), set[str](), 0
        waits, twice = iter(turns), list[str]()

        async def handler(key: str) -> None:
            nonlocal most
            twice.extend({key} & busy)
            busy.add(key)
            most = max(most, len(busy))
            now = wanted[key]
            for _ in range(next(waits, 1)):
                await asyncio.sleep(0)
            busy.discard(key)
            seen[key] = now

        loop = Loop("t", handler, workers=workers)
        async with running(loop):
            for key in adds:
                wanted[key] += 1
                loop.add(key)
                await asyncio.sleep(0)
            await loop.settled()
            assert seen == wanted, "the last call of a key came after its last add"
            assert not twice
            assert most <= workers

    asyncio.run(body())


def test_keys_do_not_wait_for_one_another_beyond_the_workers() -> None:
    async def body() -> None:
        inside: set[str] = set()
        two, gate = asyncio.Event(), asyncio.Event()

        async def handler(key: str) -> None:
            inside.add(key)
            if len(inside) == 2:
                two.set()
            await gate.wait()

        loop = Loop("t", handler, workers=2)
        async with running(loop):
            for key in "abc":
                loop.add(key)
            await two.wait()
            assert inside == {"a", "b"}, "in the order they came"
            gate.set()
            await loop.settled()
            assert inside == {"a", "b", "c"}

    asyncio.run(body())


@pytest.mark.parametrize("failure", [ValueError("x"), TimeoutError(), asyncio.CancelledError()])
def test_a_failure_is_tried_again_and_kills_no_worker(failure: BaseException) -> None:
    """A handler that awaits a task somebody cancelled raises CancelledError: that too is only its own failure."""

    async def body() -> None:
        calls: Counter[str] = Counter()
        done = asyncio.Event()

        async def handler(key: str) -> None:
            calls[key] += 1
            if key == "bad" and calls[key] < 5:
                raise failure
            if key == "bad":
                done.set()

        loop = Loop("t", handler, workers=1, backoff=(0.001, 0.002))
        async with running(loop) as task:
            loop.add("bad")
            loop.add("good")
            await done.wait()
            await loop.settled()
            assert calls == {"bad": 5, "good": 1}
            assert not task.done()

    asyncio.run(body())


def test_a_handler_that_hangs_is_ended_and_tried_again() -> None:
    async def body() -> None:
        calls = 0
        done = asyncio.Event()

        async def handler(_: str) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                await asyncio.Event().wait()
            done.set()

        loop = Loop("t", handler, workers=1, backoff=(0.001, 0.001), timeout=0.01)
        async with running(loop):
            loop.add("k")
            await done.wait()
            assert calls == 2

    asyncio.run(body())


def test_backoff_doubles_to_its_bound_and_starts_anew_after_a_success() -> None:
    async def body() -> None:
        delays: list[float] = []
        failing, calls = True, 0

        async def handler(_: str) -> None:
            nonlocal calls
            calls += 1
            if failing:
                raise ValueError("x")

        class Recorded(Loop[str]):
            def add_after(self, key: str, seconds: float) -> None:
                delays.append(seconds)

        loop = Recorded("t", handler, workers=1, backoff=(1.0, 8.0))
        async with running(loop):
            for _ in range(6):
                loop.add("k")
                await loop.settled()
            failing = False
            loop.add("k")
            await loop.settled()
            failing = True
            loop.add("k")
            await loop.settled()
        assert calls == 8
        for delay, middle in zip(delays, (1, 2, 4, 8, 8, 8, 1), strict=True):
            assert 0.8 * middle <= delay <= 1.2 * middle

    asyncio.run(body())


def test_a_number_asks_for_another_call_and_an_add_comes_before_it() -> None:
    async def body() -> None:
        calls, third = 0, asyncio.Event()

        async def handler(_: str) -> float | None:
            nonlocal calls
            calls += 1
            if calls == 3:
                third.set()
            return {1: 3600.0, 2: 0.001}.get(calls)

        loop = Loop("t", handler)
        async with running(loop):
            loop.add("k")
            await loop.settled()
            assert calls == 1, "timers do not count"
            loop.add("k")  # does not wait for the hour
            await third.wait()
            await loop.settled()
            assert calls == 3
            loop.add_after("k", 3600)
            loop.forget("k")
            loop.add("other")
            await loop.settled()
            assert calls == 4

    asyncio.run(body())
