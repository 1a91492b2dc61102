"""Three seats over real meshes: the vote comes about, what is forged counts for nothing, a restart forgets nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from tests.core.pair import until
from tests.nodes.meshes import Site

from edgeward.core.errors import Unreachable
from edgeward.nodes import verdicts
from edgeward.nodes.verdict_spec import Wish
from edgeward.nodes.verdicts import TOPIC, Verdicts
from edgeward.nodes.voting import Report, Settings, Told
from edgeward.nodes.wire import ReachAnswer, ReachAsk

NAMES = ("a", "b", "c")


class Quick(Settings, frozen=True):
    """Reports four times as often as a site has them, so that a test sees in seconds what takes them long."""

    def period(self, n: int) -> float:
        return 0.5


class Link:
    """A hub's link, as a test has it."""

    def __init__(self) -> None:
        self.online, self.good, self.unanswered, self.silence, self.next_beat = True, True, 0.0, 0.0, 10.0
        self.hurried = self.excused = 0

    def beat_within(self, seconds: float) -> None:
        self.hurried += 1

    def excuse(self) -> None:
        self.excused += 1


class Seats:
    """The verdicts of a site's nodes; ``hub``: whom the hub reaches."""

    def __init__(self, site: Site, dead_after: float) -> None:
        self.site, self.wish = site, Wish(Quick(dead_after=dead_after, grace=30.0))
        self.links: dict[str, Link] = {}
        self.seats: dict[str, Verdicts] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.hub: set[str] = set()
        self.asked = 0

    def start(self, name: str) -> None:
        link = self.links[name] = Link()

        async def ask_hub(verb: str, data: bytes, timeout: float) -> bytes:
            if not link.online:
                raise Unreachable("no link")
            ask = msgspec.msgpack.decode(data, type=ReachAsk)
            self.asked += 1
            told = {n: self.seats[n].told() for n in ask.nodes if n in self.hub}
            return msgspec.msgpack.encode(ReachAnswer(told))

        seat = Verdicts(
            self.site.meshes[name], self.site.root / name / "verdicts.json", link=link, ask_hub=ask_hub,  # type: ignore[arg-type]
            wish=lambda: self.wish, names=lambda: list(NAMES), changed=lambda n: None,
        )  # fmt: skip
        self.seats[name] = seat
        self.site.start(name)
        self.tasks[name] = asyncio.create_task(seat.run())

    async def stop(self, name: str) -> None:
        task = self.tasks.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self.site.stop(name)

    def states(self, name: str) -> dict[str, str]:
        return {n: v.state for n, v in self.seats[name].verdicts.items()}


@asynccontextmanager
async def council(root: Path, dead_after: float = 2.5) -> AsyncIterator[Seats]:
    site = Site(root, *NAMES)
    seats = Seats(site, dead_after)
    for name in NAMES:
        seats.start(name)
    try:
        yield seats
    finally:
        for name in list(seats.tasks):
            await seats.stop(name)


async def all_say(seats: Seats, **expected: str) -> None:
    await until(lambda: all(seats.states(n) == expected for n in seats.tasks))


def test_a_vote_over_the_mesh(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with council(tmp_path) as seats:
            await all_say(seats, a="healthy", b="healthy", c="healthy")
            for name, link in seats.links.items():
                link.online = False
                seats.seats[name].hurry()
            await all_say(seats, a="wan-cut", b="wan-cut", c="wan-cut")
            assert seats.seats["a"].status("b")["evidence"]["link"] == "down"

            await seats.stop("c")
            await all_say(seats, a="wan-cut", b="wan-cut", c="dead")
            a = seats.seats["a"]
            assert "c" in a.dead()
            await until(lambda: a.status("c")["evidence"].get("lost") == ["a", "b"])

            # b's words in c's name, and c's own of before: nothing of it brings it back
            last = a.council._others["c"].told
            assert last is not None
            report = msgspec.msgpack.decode(last.body, type=Report)
            body = msgspec.msgpack.encode(msgspec.structs.replace(report, seq=report.seq + 1))
            forged = Told(body, seats.site.meshes["b"].sign(body))
            before = dict(a.council.counters)
            seats.site.meshes["b"].say(TOPIC, msgspec.msgpack.encode([last, forged]), ["a"])
            await until(lambda: a.council.counters["forged"] > before["forged"])
            await until(lambda: a.council.counters["replayed"] > before["replayed"])
            assert "c" in a.dead()

            # a restart knows who is dead and for how long nobody was heard, and moves nothing by itself
            await seats.stop("b")
            await until(lambda: set(seats.states("a").values()) == {"unknown"})
            alone = seats.seats["a"].alone()
            await seats.stop("a")
            seats.site.make("a")
            seats.start("a")
            await until(lambda: set(seats.states("a").values()) == {"unknown"})
            assert set(seats.seats["a"].dead()) == {"c"}
            assert seats.seats["a"].alone() >= alone > 0

            for name in ("b", "c"):
                seats.site.make(name)
                seats.start(name)
            for link in seats.links.values():
                link.online = False
            await all_say(seats, a="wan-cut", b="wan-cut", c="wan-cut")
            await until(lambda: not seats.seats["a"].dead() and seats.seats["a"].alone() == 0)

    asyncio.run(scenario())


def test_whom_the_hub_reaches_is_not_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """c is parted from its site's network, not from the hub."""

    monkeypatch.setattr(verdicts, "_ASK", 1.0)
    monkeypatch.setattr(verdicts, "_LOOK", 0.25)

    async def scenario() -> None:
        async with council(tmp_path, 5.0) as seats:
            await all_say(seats, a="healthy", b="healthy", c="healthy")
            seats.hub = {"c"}
            await seats.site.stop("c")
            await until(lambda: seats.seats["a"].status("c")["evidence"]["heard"] == "by the hub")
            # and so it stays: each of the two asks once a second, and it would be missed in five
            seen: set[str] = set()
            asked = seats.asked

            def still() -> bool:
                seen.update(seats.states(n)["c"] for n in ("a", "b"))
                return seats.asked >= asked + 12

            await until(still)
            assert "dead" not in seen and "healthy" in seen
            assert not seats.seats["a"].dead() and not seats.seats["b"].dead()
            seats.site.start("c")  # for its end

    asyncio.run(scenario())


def test_doubts_of_two_are_a_cut(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with council(tmp_path) as seats:
            await all_say(seats, a="healthy", b="healthy", c="healthy")
            seats.links["a"].unanswered = 5.0
            await until(lambda: seats.seats["b"].council.doubters() == 1)
            assert seats.states("a")["a"] == "healthy", "one alone may have lost a packet"
            seats.links["b"].silence = 9.0
            await until(lambda: seats.links["b"].hurried > 0)
            seats.links["b"].unanswered = 5.0
            await all_say(seats, a="wan-cut", b="wan-cut", c="healthy")
            assert seats.links["a"].excused
            seats.links["a"].unanswered = seats.links["b"].unanswered = 0.0
            await all_say(seats, a="healthy", b="healthy", c="healthy")

    asyncio.run(scenario())
