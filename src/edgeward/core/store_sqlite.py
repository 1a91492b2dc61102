"""A store in one SQLite file: WAL, synchronous=FULL, so that what was acknowledged is on the disk.

It is the plain form (one writer, this process). The agent's replica builds on the same file with the hub's state
beside the local one; see ``agent/replica.py``. ``:memory:`` gives the store that tests of other parts use.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core.errors import EdgewardError, Refused
from edgeward.core.resource import Key, Resource, decode_stored, encode_stored
from edgeward.core.store import Entry, Store

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects(
  kind TEXT, namespace TEXT, name TEXT, revision INTEGER, seen INTEGER, stored BLOB, status BLOB,
  PRIMARY KEY (kind, namespace, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta(k TEXT PRIMARY KEY, v TEXT) WITHOUT ROWID;
"""


class Database(sqlite3.Connection):
    """A connection that says ``Refused``, with the file's name, when the disk does not take a write."""

    path = ""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        try:
            return super().execute(sql, parameters)
        except sqlite3.OperationalError as e:
            raise Refused(
                f"the database does not take it: {e}", resource=self.path, remedy="free space on the disk"
            ) from e


def open_database(path: Path | str) -> Database:
    """A connection whose commits survive SIGKILL and power loss; raises ``EdgewardError`` with the file's name.

    The file is its owner's alone whatever the umask: replicas hold Secrets. SQLite gives its ``-wal`` and ``-shm`` the
    same mode.
    """
    try:
        if str(path) != ":memory:":
            # never opened here when it exists: closing a second descriptor would drop SQLite's own locks
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            Path(path).chmod(0o600)
        db = sqlite3.connect(str(path), isolation_level=None, check_same_thread=False, factory=Database)
        db.path = str(path)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA busy_timeout=5000")
        db.execute("PRAGMA wal_autocheckpoint=400")
        db.execute("PRAGMA journal_size_limit=4194304")
        db.execute("PRAGMA secure_delete=ON")  # what was replaced does not stay readable in free pages
    except (sqlite3.Error, OSError, Refused) as e:
        raise EdgewardError(
            f"cannot open the database: {e}", resource=str(path), remedy="check the disk and the folder's owner"
        ) from e
    return db


class SqliteStore(Store):
    def __init__(self, path: Path | str = ":memory:") -> None:
        super().__init__()
        self._db = open_database(path)
        self._db.executescript(_SCHEMA)
        for kind, ns, name, revision, seen, stored, status in self._db.execute("SELECT * FROM objects"):
            key = Key(kind, ns, name)
            self.revision = max(self.revision, seen)
            if stored is None:
                self._tombs[key] = seen
                continue
            resource = decode_stored(stored, msgspec.json.decode(status) if status else {})
            resource.metadata.resourceVersion = str(revision)
            self._entries[key] = Entry(resource, revision, seen)
            self._by_kind.setdefault(kind, {})[key] = self._entries[key]

    def close(self) -> None:
        self._db.close()

    def _write(self, key: Key, revision: int, seen: int, stored: bytes | None, status: bytes | None) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO objects VALUES(?,?,?,?,?,?,?)",
            (key.kind, key.namespace, key.name, revision, seen, stored, status),
        )

    async def _put(self, resource: Resource, old: Entry | None) -> Resource:
        key, revision = resource.key, self.revision + 1
        status = old.resource.status if old else {}
        self._write(key, revision, revision, encode_stored(resource), msgspec.json.encode(status))
        resource.status = status
        self._changed(revision, key, resource)
        return resource

    async def put_status(self, key: Key, status: dict[str, Any]) -> None:
        self.get(key)
        entry = self._entries[key]
        if entry.resource.status == status:
            return
        seen = self.revision + 1
        self._write(key, entry.revision, seen, encode_stored(entry.resource), msgspec.json.encode(status))
        self._changed(seen, key, msgspec.structs.replace(entry.resource, status=status), status_only=True)

    async def remove(self, key: Key, *, expect: int | None = None) -> None:
        self.get(key)
        self.check_expected(key, self._entries.get(key), expect)
        revision = self.revision + 1
        self._write(key, revision, revision, None, None)
        self._changed(revision, key, None)
