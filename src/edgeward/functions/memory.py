"""What functions remember on this node: keys, values and revisions in one SQLite file, bounded for each function.

``functions/state.db`` is written by one thread, many changes in one transaction, each answered when it is on the disk
(synchronous=FULL): a handler that was told so finds it after a power cut, and it needs neither broker nor agent. Reads
are answered at once by a connection of their own. Revisions grow over all keys and are never given out twice, so that a
key that was deleted and made anew is not taken for the old one. (A bucket of the node's nats-server answers later and
is on the disk within a second only.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from edgeward.core.errors import Conflict, EdgewardError, Refused, TooLarge, Unreachable

if TYPE_CHECKING:
    import sqlite3

log = logging.getLogger("edgeward.functions")

#: What a key costs beside itself and its value.
OVERHEAD = 64
#: Keys that one question may bring.
MAX_KEYS = 20_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS state (
    function TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, revision INTEGER NOT NULL,
    PRIMARY KEY (function, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counter (last INTEGER NOT NULL);
INSERT INTO counter SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM counter);
"""


class _Change:
    """One write on its way. ``value`` None deletes; ``key`` None deletes all that the function has."""

    __slots__ = ("bound", "function", "future", "key", "revision", "value")

    def __init__(self, function: str, key: str | None, value: bytes | None, revision: int | None, bound: int) -> None:
        self.function, self.key, self.value = function, key, value
        self.revision, self.bound = revision, bound
        self.future: asyncio.Future[int] = asyncio.get_running_loop().create_future()


class Memory:
    """All functions' state of one node. The file is made at the first write."""

    def __init__(self, file: Path) -> None:
        self._file, self._there = file, file.exists()
        self._opening = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._scanner: sqlite3.Connection | None = None
        self._scanning = asyncio.Lock()
        self._waiting: list[_Change] = []
        self._writing: asyncio.Task[None] | None = None
        #: Bytes that each function has, as the writer knows them.
        self._sizes: dict[str, int] = {}
        self._last = 0

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self) -> sqlite3.Connection | None:
        if self._reader is None and (self._writer is not None or self._there):
            self._open()  # the tables are there before anybody looks
            self._reader = _connect(self._file)
        return self._reader

    # sqlite is a megabyte that a node whose functions remember nothing does not need: imported where it is used

    def get(self, function: str, key: str) -> tuple[bytes, int] | None:
        """The value and its revision. Raises ``Unreachable`` when the file cannot be read."""
        import sqlite3

        try:
            db = self._read()
            if db is None:
                return None
            row = db.execute("SELECT value, revision FROM state WHERE function = ? AND key = ?", (function, key))
            found = row.fetchone()
        except sqlite3.Error as e:
            raise Unreachable(f"the state cannot be read: {e}") from e
        return None if found is None else (bytes(found[0]), int(found[1]))

    async def keys(self, function: str, prefix: str = "") -> list[str]:
        """The keys that begin so (visible ASCII), sorted. Raises ``TooLarge`` for more than :data:`MAX_KEYS`.

        A function that asks again and again for many keys holds up nobody but itself: they are read beside the loop,
        for one asker at a time.
        """
        import sqlite3

        try:
            if self._read() is None:
                return []
            async with self._scanning:
                found = await asyncio.to_thread(self._scan, function, prefix)
        except sqlite3.Error as e:
            raise Unreachable(f"the state cannot be read: {e}") from e
        if len(found) > MAX_KEYS:
            raise TooLarge(f"more than {MAX_KEYS} keys begin with {prefix[:40]!r}", remedy="ask for a longer beginning")
        return found

    def _scan(self, function: str, prefix: str) -> list[str]:
        db = self._scanner = self._scanner or _connect(self._file)
        # from the first that may begin so: the table is sorted, so what lies outside is not looked at
        rows = db.execute(
            "SELECT key FROM state WHERE function = ? AND key >= ? AND key < ? ORDER BY key LIMIT ?",
            (function, prefix, prefix + "\U0010ffff", MAX_KEYS + 1),
        )
        return [str(row[0]) for row in rows]

    # -- writing ---------------------------------------------------------------------------------------------------

    async def set(self, function: str, key: str, value: bytes, revision: int | None, bound: int) -> int:
        """The new revision, once it is on the disk. ``bound``: bytes that the function may have in all.

        Raises ``Conflict`` (another revision), ``TooLarge`` (over the bound), ``Unreachable`` (no disk).
        """
        return await self._change(_Change(function, key, value, revision, bound))

    async def delete(self, function: str, key: str, revision: int | None = None) -> bool:
        """Whether it was there. Raises ``Conflict``, ``Unreachable``."""
        if self._read() is None:
            return False
        return await self._change(_Change(function, key, None, revision, 0)) > 0

    async def keep(self, functions: Collection[str]) -> None:
        """Forgets what functions had that are no more."""
        import sqlite3

        try:
            db = self._read()
            found = db.execute("SELECT DISTINCT function FROM state").fetchall() if db is not None else []
            for (function,) in found:
                if function not in functions:
                    await self._change(_Change(function, None, None, None, 0))
        except (sqlite3.Error, EdgewardError) as e:
            log.warning("the state of functions that are gone stays: %s", e)  # until the next change

    async def _change(self, change: _Change) -> int:
        self._waiting.append(change)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        return await change.future

    async def _write(self) -> None:
        """What waits, in one transaction; then what came meanwhile."""
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    outcomes = await asyncio.to_thread(self._commit, batch)
                except EdgewardError as e:
                    outcomes = [e] * len(batch)
                for change, outcome in zip(batch, outcomes, strict=True):
                    if change.future.done():
                        continue
                    if isinstance(outcome, EdgewardError):
                        change.future.set_exception(outcome)
                    else:
                        change.future.set_result(outcome)
        finally:
            self._writing = None

    def _commit(self, batch: list[_Change]) -> list[int | EdgewardError]:
        import sqlite3

        sizes, last = dict(self._sizes), self._last
        try:
            db = self._open()
            sizes, last = dict(self._sizes), self._last
            db.execute("BEGIN IMMEDIATE")
            outcomes = [self._apply(db, change) for change in batch]
            db.execute("UPDATE counter SET last = ?", (self._last,))
            db.execute("COMMIT")
        except (sqlite3.Error, OSError) as e:
            if self._writer is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
                self._sizes, self._last = sizes, last
            log.error("functions' state is not written: %s", e)
            raise Unreachable(f"the state cannot be written: {e}", remedy="free disk space") from e
        return outcomes

    def _open(self) -> sqlite3.Connection:
        with self._opening:
            return self._writer or self._opened()

    def _opened(self) -> sqlite3.Connection:
        db = _connect(self._file)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.executescript(_SCHEMA)
            sizes = db.execute(
                "SELECT function, sum(length(key) + length(value) + ?) FROM state GROUP BY 1", (OVERHEAD,)
            )
            self._sizes = {str(f): int(n) for f, n in sizes}
            self._last = int(db.execute("SELECT last FROM counter").fetchone()[0])
        except BaseException:
            db.close()
            raise
        self._writer = db
        return db

    def _apply(self, db: sqlite3.Connection, change: _Change) -> int | EdgewardError:
        """The new revision; of a deletion 1 when it was there, else 0."""
        function, key = change.function, change.key
        if key is None:
            db.execute("DELETE FROM state WHERE function = ?", (function,))
            self._sizes.pop(function, None)
            return 1
        at = (function, key)
        row = db.execute("SELECT length(value), revision FROM state WHERE function = ? AND key = ?", at).fetchone()
        present = int(row[1]) if row else 0
        if change.revision is not None and change.revision != present:
            has = f"is at revision {present}" if present else "is not there"
            return Conflict(f"{key!r} {has}, not at {change.revision}")
        had = len(key) + int(row[0]) + OVERHEAD if row else 0
        if change.value is None:
            db.execute("DELETE FROM state WHERE function = ? AND key = ?", at)
            self._sizes[function] = self._sizes.get(function, 0) - had
            return 1 if row else 0
        size = self._sizes.get(function, 0) - had + len(key) + len(change.value) + OVERHEAD
        if size > change.bound and size > self._sizes.get(function, 0):
            return TooLarge(f"the state would have {size} bytes; at most {change.bound} are allowed")
        self._last += 1
        db.execute("INSERT OR REPLACE INTO state VALUES (?, ?, ?, ?)", (*at, change.value, self._last))
        self._sizes[function] = size
        return self._last

    def size(self, function: str) -> int:
        """Bytes that the function has, as far as this process has written."""
        return self._sizes.get(function, 0)

    async def close(self) -> None:
        if self._writing is not None:
            await self._writing
        async with self._scanning:
            for db in (self._reader, self._writer, self._scanner):
                if db is not None:
                    db.close()
            self._reader = self._writer = self._scanner = None


def _connect(file: Path) -> sqlite3.Connection:
    import sqlite3  # a megabyte that a node whose functions remember nothing does not need

    file.touch(mode=0o600)
    db = sqlite3.connect(file, timeout=5.0, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA cache_size = -512")
    return db


def word(error: EdgewardError) -> str:
    """What the worker protocol calls it."""
    kinds: tuple[tuple[type[EdgewardError], str], ...] = (
        (Conflict, "conflict"),
        (TooLarge, "too-large"),
        (Refused, "refused"),
    )
    return next((name for kind, name in kinds if isinstance(error, kind)), "unavailable")
