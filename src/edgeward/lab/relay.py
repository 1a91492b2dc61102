"""A TCP relay that behaves like a WAN link: no root, any system.

A connection comes in on loopback, the target is dialled, and every byte between them pays the link's delay, jitter,
bandwidth and losses (a lost segment is a retransmission's wait, since TCP hides it). What the link is like is decided
in :class:`edgeward.lab.links.Shaper`; all connections of a site share one. A cut holds bytes back and answers nobody,
as a cut does: nothing is reset, and after the heal what was held goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

from edgeward.lab.links import Counts, Draws, Profile, Shaper

_IN_FLIGHT = 1024 * 1024
_CONNECT_TIMEOUT = 30.0


class Link:
    """One site's link in both directions; relays of its nodes share it."""

    def __init__(self, profile: Profile, seed: int = 1) -> None:
        self.profile = profile
        self.up, self.down = Shaper(profile, "up"), Shaper(profile, "down")
        self._rng = random.Random(seed)  # noqa: S311 - an emulation, repeatable by its seed
        self._open = asyncio.Event()
        self._cut = False
        self.set_profile(profile)

    def set_profile(self, profile: Profile) -> None:
        self.profile = profile
        self.up.set_profile(profile)
        self.down.set_profile(profile)
        self._decide()

    def cut(self) -> None:
        self._cut = True
        self._decide()

    def heal(self) -> None:
        self._cut = False
        self._decide()

    def _decide(self) -> None:
        if self._cut or self.profile.silent:
            self._open.clear()
        else:
            self._open.set()

    @property
    def is_cut(self) -> bool:
        return not self._open.is_set()

    async def passable(self) -> None:
        await self._open.wait()

    def draws(self) -> Draws:
        r = self._rng.random
        return Draws(r(), r(), r())


class _Pipe:
    """One direction of one connection: reads, waits for room, and delivers in order when the link says."""

    def __init__(
        self, link: Link, shaper: Shaper, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: Counts
    ) -> None:
        self._link, self._shaper, self._reader, self._writer, self._counts = link, shaper, reader, writer, counts
        self._flight: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._flying = 0
        self._room = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._deliver())
            await self._take()

    async def _take(self) -> None:
        behind = 0.0
        while True:
            data = await self._reader.read(self._shaper.chunk_bytes)
            now = time.monotonic()
            if data:
                room = self._shaper.room_at(now, len(data))
                if room > now:
                    await asyncio.sleep(room - now)  # the link's queue is full
                fate = self._shaper.carry(time.monotonic(), len(data), self._link.draws())
                behind = max(behind, fate.at + fate.late)
                self._flying += len(data)
            self._flight.put_nowait((behind, data))  # bounded by _IN_FLIGHT below
            if not data:
                return
            while self._flying > _IN_FLIGHT:
                self._room.clear()
                await self._room.wait()

    async def _deliver(self) -> None:
        while True:
            at, data = await self._flight.get()
            wait = at - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)  # the way through the link
            await self._link.passable()
            if not data:
                with contextlib.suppress(OSError):
                    if self._writer.can_write_eof():
                        self._writer.write_eof()
                return
            self._writer.write(data)
            await self._writer.drain()
            self._flying -= len(data)
            self._counts.arrived(len(data), 0)
            self._room.set()


class Relay:
    """Listens on a port of loopback and relays to a target over a link. Use :meth:`open` and :meth:`close`."""

    def __init__(
        self, target: tuple[str, int], link: Link | Profile, *, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.link = link if isinstance(link, Link) else Link(link)
        self._target, self._host = target, host
        self.port = port
        self.up, self.down = Counts(), Counts()
        self.connections = self.active = self.refused = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accepted, self._host, self.port, limit=_IN_FLIGHT)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self.link.cut()

    def heal(self) -> None:
        self.link.heal()

    def set_profile(self, profile: Profile) -> None:
        self.link.set_profile(profile)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.active += 1
        other: asyncio.StreamWriter | None = None
        try:
            await self.link.passable()
            await asyncio.sleep(self.link.profile.rtt)  # SYN and SYN-ACK cross the link
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                far, other = await asyncio.open_connection(*self._target, limit=_IN_FLIGHT)
            async with asyncio.TaskGroup() as group:
                group.create_task(_Pipe(self.link, self.link.up, reader, other, self.up).run())
                group.create_task(_Pipe(self.link, self.link.down, far, writer, self.down).run())
        except* (OSError, TimeoutError):
            self.refused += other is None
        finally:
            self.active -= 1
            for w in (writer, other):
                if w is not None:
                    w.close()
