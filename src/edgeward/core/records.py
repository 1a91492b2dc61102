"""Append-only records that people read: events, the journal of decided conflicts.

A record is a plain mapping with ``time`` (RFC 3339); what comes back has ``seq`` too. Bounded: the oldest go. At the
edge they live in SQLite, at the hub in a JetStream stream, so that hubs share them.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import StorageType, StreamConfig

from edgeward.core import clock
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.jsread import read_batch
from edgeward.core.store_sqlite import open_database

Record = dict[str, Any]
#: Records kept per name.
KEEP = 10_000


class Records(abc.ABC):
    """Named, bounded lists of records."""

    def __init__(self) -> None:
        self._followers: dict[str, set[asyncio.Queue[Record]]] = {}

    @abc.abstractmethod
    async def append(self, name: str, record: Record, *, unique: str = "") -> None:
        """Keeps a record; ``time`` is stamped where missing.

        ``unique`` drops a repeated append at the hub, within JetStream's two minutes; SQLite's one writer repeats none.
        """

    @abc.abstractmethod
    def items(self, name: str, *, since: int = 0, limit: int = 1000) -> list[Record]:
        """The last ``limit`` records with ``seq`` > ``since``, oldest first."""

    def _tell(self, name: str, record: Record) -> None:
        for queue in tuple(self._followers.get(name, ())):
            if queue.full():
                queue.get_nowait()  # a follower that sleeps loses the oldest; its next list shows them
            queue.put_nowait(record)

    async def follow(self, name: str, *, since: int = 0, limit: int = 100) -> AsyncIterator[Record]:
        """The last records, then new ones as they come."""
        queue: asyncio.Queue[Record] = asyncio.Queue(1000)
        self._followers.setdefault(name, set()).add(queue)
        try:
            last = since
            for record in self.items(name, since=since, limit=limit):
                last = record["seq"]
                yield record
            while True:
                record = await queue.get()
                if record["seq"] > last:
                    yield record
        finally:
            self._followers[name].discard(queue)


class SqliteRecords(Records):
    def __init__(self, path: Path | str = ":memory:") -> None:
        super().__init__()
        self._db = open_database(path)
        # events may lose their last second on a power cut; the journal and the audit commit with the writes' fsync
        self._db.executescript(
            "CREATE TABLE IF NOT EXISTS records(seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, doc BLOB);"
            "CREATE INDEX IF NOT EXISTS by_name ON records(name, seq);"
        )
        self._appended: dict[str, int] = {}

    async def append(self, name: str, record: Record, *, unique: str = "") -> None:
        self.keep(name, record)

    def keep(self, name: str, record: Record) -> None:
        """:meth:`append` for who must not be interrupted before it is kept."""
        record = {"time": clock.timestamp(), **record}
        cur = self._db.execute("INSERT INTO records(name, doc) VALUES(?,?)", (name, msgspec.json.encode(record)))
        appended = self._appended.get(name, 0)
        self._appended[name] = appended + 1
        if appended % 500 == 0:  # the first one too: a process that restarts often must prune as well
            self._db.execute(
                "DELETE FROM records WHERE name=? AND seq <= "
                "(SELECT seq FROM records WHERE name=? ORDER BY seq DESC LIMIT 1 OFFSET ?)",
                (name, name, KEEP),
            )
        self._tell(name, {**record, "seq": cur.lastrowid})

    def items(self, name: str, *, since: int = 0, limit: int = 1000) -> list[Record]:
        rows = self._db.execute(
            "SELECT seq, doc FROM records WHERE name=? AND seq>? ORDER BY seq DESC LIMIT ?", (name, since, limit)
        ).fetchall()
        return [{**msgspec.json.decode(doc), "seq": seq} for seq, doc in reversed(rows)]

    def first_after(self, name: str, since: int, limit: int) -> list[Record]:
        """The *oldest* ``limit`` records behind ``since``: what a sender forwards next."""
        rows = self._db.execute(
            "SELECT seq, doc FROM records WHERE name=? AND seq>? ORDER BY seq LIMIT ?", (name, since, limit)
        ).fetchall()
        return [{**msgspec.json.decode(doc), "seq": seq} for seq, doc in rows]

    def close(self) -> None:
        self._db.close()


class StreamRecords(Records):
    """Records in the hub's stream ``RECORDS``, subject ``ew.rec.<name>``; the last ones are cached for reading."""

    def __init__(self, client: Client, *, replicas: int = 1) -> None:
        super().__init__()
        self._replicas = replicas
        self._nc = client
        self._js = client.jetstream()
        self._cache: dict[str, deque[Record]] = {}
        self._last = 0
        self._wake = asyncio.Event()

    async def open(self) -> None:
        try:
            await self._js.stream_info("RECORDS")
        except nats.js.errors.NotFoundError:
            await self._js.add_stream(
                StreamConfig(
                    name="RECORDS",
                    subjects=["ew.rec.*"],
                    storage=StorageType.FILE,
                    num_replicas=self._replicas,
                    max_msgs_per_subject=KEEP,
                    allow_direct=True,
                )
            )

        async def woken(_: object) -> None:
            self._wake.set()

        await self._nc.subscribe("ew.rec.*", cb=woken)
        await self._follow()

    async def _follow(self) -> None:
        while True:
            got = await read_batch(self._nc, "$JS.API", "RECORDS", self._last + 1, "ew.rec.*", 500)
            for seq, subject, _, data in got:
                if seq <= self._last:
                    continue
                self._last = seq
                name = subject.removeprefix("ew.rec.")
                record = {**msgspec.json.decode(data), "seq": seq}
                self._cache.setdefault(name, deque(maxlen=KEEP)).append(record)
                self._tell(name, record)
            if not got:  # a short answer is not the end: the bytes of one are bounded too
                return

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5.0):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self._follow()
            except (Unreachable, nats.errors.Error):
                await asyncio.sleep(0.5)  # the pace of asking while the server is away
                self._wake.set()

    async def append(self, name: str, record: Record, *, unique: str = "") -> None:
        record = {"time": clock.timestamp(), **record}
        headers = {"Nats-Msg-Id": unique} if unique else None
        try:
            await self._js.publish(f"ew.rec.{name}", msgspec.json.encode(record), timeout=5.0, headers=headers)
        except (nats.errors.Error, TimeoutError) as e:
            raise EdgewardError(f"cannot keep the record: {e or type(e).__name__}") from e

    def items(self, name: str, *, since: int = 0, limit: int = 1000) -> list[Record]:
        return [r for r in self._cache.get(name, ()) if r["seq"] > since][-limit:]
