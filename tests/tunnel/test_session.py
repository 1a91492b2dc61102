"""Streams between two ends: bytes, half-close, errors, stalls, floods, and links that break in the middle."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from edgeward.core.errors import EdgewardError, Forbidden, Gone, Refused, TooMany
from edgeward.tunnel import framing, session
from edgeward.tunnel.credit import LARGEST
from edgeward.tunnel.flow import HIGH
from edgeward.tunnel.session import Session, Stream, pair

PATIENT = 60.0


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    async def timed() -> Any:
        async with asyncio.timeout(PATIENT):
            return await body()

    return asyncio.run(timed())


class Served:
    """Serves streams with a coroutine each."""

    def __init__(self, service: Callable[[Stream], Awaitable[None]]) -> None:
        self.service, self.tasks, self.streams = service, set[asyncio.Task[None]](), list[Stream]()

    def __call__(self, stream: Stream) -> None:
        self.streams.append(stream)
        task = asyncio.ensure_future(self.service(stream))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def echo(stream: Stream) -> None:
    try:
        stream.accept({"it": "echoes"})
        while data := await stream.read():
            await stream.write(data)
        stream.end()
    except EdgewardError:
        pass


async def _all(stream: Stream) -> bytes:
    parts = []
    while data := await stream.read():
        parts.append(data)
    return b"".join(parts)


async def _send(stream: Stream, data: bytes) -> None:
    for at in range(0, len(data), 50_000):
        await stream.write(data[at : at + 50_000])
    stream.end()


def test_bytes_go_both_ways_and_the_end_of_one_is_not_the_end_of_the_other() -> None:
    async def body() -> None:
        one, two = pair(Served(echo))
        stream = one.open("echo")
        data = random.Random(1).randbytes(3_000_000)
        sending = asyncio.ensure_future(_send(stream, data))
        assert await _all(stream) == data
        await sending
        assert (await stream.opened()) == {"it": "echoes"}
        await stream.wait_closed()
        assert not one.streams and not two.streams
        one.close()

    run(body)


def test_what_a_service_refuses_with_arrives_as_that_error() -> None:
    async def body() -> None:
        def refuse(stream: Stream) -> None:
            stream.fail(Forbidden("not you", resource="Node/n", remedy="ask"))

        one, two = pair(refuse)
        stream = one.open("tcp", {"port": 22})
        with pytest.raises(Forbidden, match="not you") as e:
            await stream.opened()
        assert e.value.resource == "Node/n" and e.value.remedy == "ask"
        with pytest.raises(Forbidden):
            await stream.read()
        with pytest.raises(Forbidden):
            await stream.write(b"x")
        assert not one.streams and not two.streams
        one.close()

    run(body)


def test_a_reader_that_stands_still_holds_one_window_and_stalls_nobody() -> None:
    async def body() -> None:
        held = asyncio.Event()

        async def service(stream: Stream) -> None:
            if stream.purpose.args.get("stall"):
                await held.wait()
            await echo(stream)

        served = Served(service)
        one, _ = pair(served)
        stalled = one.open("echo", {"stall": True})
        stuck = asyncio.ensure_future(_send(stalled, bytes(5_000_000)))
        for n in range(20):
            stream = one.open("echo")
            await _send(stream, bytes([n]) * 100_000)
            assert await _all(stream) == bytes([n]) * 100_000
        assert not stuck.done()
        assert served.streams[0].window.held <= LARGEST
        assert stalled.waiting <= HIGH + 50_000
        held.set()
        assert len(await _all(stalled)) == 5_000_000
        await stuck
        one.close()

    run(body)


def test_small_answers_do_not_stand_behind_bulk() -> None:
    """While a stream has megabytes to send, another one's byte is in the very next write."""

    async def body() -> None:
        class Slow:
            paused = True

            def __init__(self) -> None:
                self.writes: list[bytes] = []

            def send(self, pieces: list[bytes]) -> None:
                self.writes.append(b"".join(pieces))
                self.paused = True

            def close(self) -> None: ...

        link = Slow()
        one = Session("one", dials=True, serve=lambda s: None)
        one.attach(link, 0)
        bulk, small = one.open("bulk"), one.open("small")
        bulk.credit = 1 << 20
        bulk.send(bytes(1 << 20))
        link.paused = False
        one.resume(link)
        small.send(b"now")
        link.paused = False
        one.resume(link)
        frames = framing.Frames().feed(link.writes[-1])
        assert (framing.DATA, small.id, b"now") in frames
        before = sum(len(p) for k, s, p in frames[: frames.index((framing.DATA, small.id, b"now"))] if s == bulk.id)
        assert before <= 32 * 1024
        one.close()

    run(body)


def test_more_data_than_credit_ends_the_session() -> None:
    async def body() -> None:
        one, two = pair(lambda stream: None)
        stream = one.open("tcp")
        stream.credit = 10 << 20  # what no honest end does
        stream.send(bytes(2 << 20))
        await stream.wait_closed()
        assert isinstance(two.error, Refused)
        assert isinstance(one.error, Refused)

    run(body)


def test_more_streams_than_may_be_are_refused_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MOST_STREAMS", 5)

    async def body() -> None:
        one, _ = pair(Served(echo))
        good = [one.open("echo") for _ in range(5)]
        with pytest.raises(TooMany):
            await one.open("echo").opened()
        for stream in good:
            await _send(stream, b"still")
            assert await _all(stream) == b"still"
        await one.open("echo").opened()  # there is room again
        one.close()

    run(body)


@pytest.mark.parametrize(
    "data",
    [
        framing.frame(framing.OPEN, 2, b"\x80"),  # an even number is the acceptor's
        framing.frame(framing.OPEN, 1, b"\xc1"),
        framing.frame(framing.CREDIT, 77, b"\0\0\0\1"),
        framing.frame(framing.DATA, 77, b"x"),
        framing.frame(framing.ACK, 0, b"\xff" * 8),
        framing.frame(framing.PING, 0, b"short"),
        b"\xee" * 8,
    ],
)
def test_garbage_ends_the_session_with_its_reason(data: bytes) -> None:
    async def body() -> None:
        one, two = pair(lambda stream: None)
        assert two.link is not None
        two.received(two.link, data)
        assert isinstance(two.error, Refused)
        one.close()

    run(body)


def test_a_flood_of_asks_that_takes_no_answers_ends_the_session() -> None:
    async def body() -> None:
        two = Session("two", dials=False, serve=lambda s: s.reset("refused", "no"))

        class Full:
            paused = True

            def send(self, pieces: list[bytes]) -> None: ...

            def close(self) -> None: ...

        link = Full()
        two.attach(link, 0)
        number = 1
        while two.error is None and number < 20_000:
            two.received(link, framing.frame(framing.OPEN, number, b"\x81\xa7service\xa1x"))
            number += 2
        assert isinstance(two.error, TooMany)

    run(body)


class Cut:
    """A link in memory that loses all from some byte on, in the middle of a frame, and says so later."""

    def __init__(self, rng: random.Random) -> None:
        self.paused, self.other, self.session = False, None, None
        self.left = rng.randrange(1, 400_000)
        self.loop = asyncio.get_running_loop()
        self.broken = asyncio.Event()

    def send(self, pieces: list[bytes]) -> None:
        data = b"".join(pieces)[: self.left]
        self.left -= len(data)
        if data:
            self.loop.call_soon(self._arrive, data)
        if self.left == 0:
            self.broken.set()

    def _arrive(self, data: bytes) -> None:
        assert self.other is not None and self.other.session is not None
        self.other.session.received(self.other, data)

    def close(self) -> None: ...


@pytest.mark.parametrize("seed", range(5))
def test_streams_go_on_byte_for_byte_over_links_that_break_anywhere(seed: int) -> None:
    async def body() -> None:
        rng = random.Random(seed)
        one = Session("one", dials=True, serve=lambda s: None)
        two = Session("two", dials=False, serve=Served(echo))

        async def links() -> None:
            while one.error is None:
                a, b = Cut(rng), Cut(rng)
                a.session, b.session, a.other, b.other = one, two, b, a
                at_one, at_two = one.received_bytes, two.received_bytes
                one.attach(a, at_two)
                two.attach(b, at_one)
                _, rest = await asyncio.wait(
                    [asyncio.ensure_future(a.broken.wait()), asyncio.ensure_future(b.broken.wait())],
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in rest:
                    task.cancel()
                await asyncio.sleep(0)  # what was sent before the cut arrives
                one.detach(a)
                two.detach(b)

        flapping = asyncio.ensure_future(links())
        data = [rng.randbytes(700_000) for _ in range(4)]
        streams = [one.open("echo") for _ in data]
        sending = [asyncio.ensure_future(_send(s, d)) for s, d in zip(streams, data, strict=True)]
        for stream, expected in zip(streams, data, strict=True):
            assert await _all(stream) == expected
        await asyncio.gather(*sending)
        flapping.cancel()
        one.close()
        two.close()

    run(body)


def test_a_link_that_does_not_come_back_resets_what_went_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_LOOK", 0.05)

    async def body() -> None:
        one = Session("one", dials=True, serve=lambda s: None, patience=0.1)
        stream = one.open("tcp")
        with pytest.raises(EdgewardError, match="did not come back"):
            await stream.read()

    run(body)


def test_a_session_whose_other_end_knows_less_than_is_kept_is_gone() -> None:
    async def body() -> None:
        one, two = pair(Served(echo))
        stream = one.open("echo")
        await asyncio.gather(_send(stream, bytes(2_000_000)), _all(stream))
        link = one.link
        assert link is not None
        with pytest.raises(Gone):
            one.attach(link, 0)
        one.close()
        two.close()

    run(body)
