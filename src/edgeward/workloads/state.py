"""What the agent must remember of apps across a SIGKILL: versions, instances, decisions. One SQLite file, FULL sync.

An instance's row is written before its process is started and completed after, so a kill in between leaves a row whose
process is found by its marker in the environment, or was never started. A version's snapshot (spec, settings, files) is
kept with it, so that a roll-back needs nobody.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from edgeward.core.store_sqlite import open_database
from edgeward.core.vault import Plain, Vault
from edgeward.workloads.plan import State

_SCHEMA = """
CREATE TABLE IF NOT EXISTS apps(namespace TEXT, name TEXT, doc BLOB, PRIMARY KEY(namespace, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS versions(namespace TEXT, name TEXT, digest TEXT, doc BLOB,
  PRIMARY KEY(namespace, name, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS instances(id TEXT PRIMARY KEY, namespace TEXT, name TEXT, doc BLOB) WITHOUT ROWID;
"""


_SEALED = b"\0"  # JSON never begins so


def _is_sealed(doc: bytes) -> bool:
    return doc[:1] == _SEALED


def _place(namespace: str, name: str, digest: str) -> str:
    return f"version/{namespace}/{name}/{digest}"


class Snapshot(msgspec.Struct):
    """Everything a version needs to be started, whatever happens to what it was made of."""

    spec: dict[str, Any]
    env: dict[str, str] = {}
    files: dict[str, str] = {}


class InstanceRow(msgspec.Struct):
    id: str
    namespace: str
    name: str
    version: str
    slot: int
    #: ``pid/start`` of :class:`edgeward.core.proc.ProcId`; empty while it is being started.
    process: str = ""
    ports: dict[str, int] = {}
    started_at: float = 0.0
    enforced: list[str] = []
    not_enforced: list[dict[str, str]] = []
    #: Its output goes through a pipe; instances of older releases write into the file themselves.
    piped: bool = False
    #: The digest of the image it was made of, where it was.
    image: str = ""


class WorkloadState:
    def __init__(self, path: Path | str, vault: Vault | None = None) -> None:
        self._vault = vault or Plain()
        self._db = open_database(path)
        self._db.executescript(_SCHEMA)
        rows = self._db.execute("SELECT namespace, name, digest, doc FROM versions").fetchall()
        for namespace, name, digest, doc in rows:
            if not _is_sealed(doc):  # from a release that kept them in plain
                self._db.execute(
                    "UPDATE versions SET doc=? WHERE namespace=? AND name=? AND digest=?",
                    (self._sealed(doc, namespace, name, digest), namespace, name, digest),
                )

    def _sealed(self, doc: bytes, namespace: str, name: str, digest: str) -> bytes:
        """A snapshot holds the values of Secrets, so all of it is sealed."""
        return _SEALED + self._vault.seal(doc, _place(namespace, name, digest))

    def close(self) -> None:
        self._db.close()

    def apps(self) -> dict[tuple[str, str], State]:
        rows = self._db.execute("SELECT namespace, name, doc FROM apps")
        return {(ns, name): msgspec.json.decode(doc, type=State) for ns, name, doc in rows}

    def save_app(self, namespace: str, name: str, state: State) -> None:
        self._db.execute("INSERT OR REPLACE INTO apps VALUES(?,?,?)", (namespace, name, msgspec.json.encode(state)))

    def remove_app(self, namespace: str, name: str) -> None:
        with self._db:  # commits, or rolls back
            self._db.execute("BEGIN IMMEDIATE")
            for table in ("apps", "versions", "instances"):
                self._db.execute(f"DELETE FROM {table} WHERE namespace=? AND name=?", (namespace, name))  # noqa: S608

    def save_version(self, namespace: str, name: str, digest: str, snapshot: Snapshot) -> None:
        row = (namespace, name, digest, self._sealed(msgspec.json.encode(snapshot), namespace, name, digest))
        self._db.execute("INSERT OR IGNORE INTO versions VALUES(?,?,?,?)", row)

    def version(self, namespace: str, name: str, digest: str) -> Snapshot | None:
        row = self._db.execute(
            "SELECT doc FROM versions WHERE namespace=? AND name=? AND digest=?", (namespace, name, digest)
        ).fetchone()
        if row is None:
            return None
        doc = self._vault.unseal(row[0][1:], _place(namespace, name, digest)) if _is_sealed(row[0]) else row[0]
        return msgspec.json.decode(doc, type=Snapshot)

    def versions(self) -> set[tuple[str, str, str]]:
        """(namespace, name, digest) of all that are kept."""
        return set(self._db.execute("SELECT namespace, name, digest FROM versions").fetchall())

    def trim_versions(self, namespace: str, name: str, keep: set[str]) -> None:
        rows = self._db.execute(
            "SELECT digest FROM versions WHERE namespace=? AND name=?", (namespace, name)
        ).fetchall()
        for (digest,) in rows:
            if digest not in keep:
                self._db.execute(
                    "DELETE FROM versions WHERE namespace=? AND name=? AND digest=?", (namespace, name, digest)
                )

    def instances(self) -> list[InstanceRow]:
        return [msgspec.json.decode(doc, type=InstanceRow) for (doc,) in self._db.execute("SELECT doc FROM instances")]

    def save_instance(self, row: InstanceRow) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO instances VALUES(?,?,?,?)",
            (row.id, row.namespace, row.name, msgspec.json.encode(row)),
        )

    def remove_instance(self, instance: str) -> None:
        self._db.execute("DELETE FROM instances WHERE id=?", (instance,))
