"""Who wrote what, and what came of it: every write through the API, and every call that was refused.

Secrets are blanked before they come here. The records are a chain (``chain.py``) in one SQLite file: a changed, missing
or added one is found, and named. The chain's head goes to another place within a second (:meth:`Audit.run`), at the hub
into its store, at a node into its replica and from there to the hub, so that a cut end is seen as well. Bounded; the
oldest go, and the head says where the chain begins now.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core import clock
from edgeward.core.chain import GENESIS, Head, Link, Verdict, check, link
from edgeward.core.errors import EdgewardError
from edgeward.core.resource import CLUSTER, Key, Resource
from edgeward.core.store_sqlite import open_database

log = logging.getLogger("edgeward.audit")

#: Records kept; this many more may be there before the oldest go.
KEEP, _SLACK = 10_000, 500
#: Bytes of a spec that are kept.
_LARGEST = 8192
_SCHEMA = """
CREATE TABLE IF NOT EXISTS chain(seq INTEGER PRIMARY KEY, prev TEXT NOT NULL, hash TEXT NOT NULL, body TEXT NOT NULL);
"""
#: Seconds between two heads written elsewhere.
_PERIOD = 1.0


class Audit:
    def __init__(self, path: Path | str = ":memory:") -> None:
        self._db = open_database(path)
        self._db.executescript(_SCHEMA)
        row = self._db.execute("SELECT seq, hash FROM chain ORDER BY seq DESC LIMIT 1").fetchone()
        self._seq: int = row[0] if row else 0
        self._hash: str = row[1] if row else GENESIS
        if not self._seq:
            self._take_over()
        self._moved = asyncio.Event()

    def _take_over(self) -> None:
        """The records of a release that kept no chain become its beginning."""
        if self._db.execute("SELECT 1 FROM sqlite_master WHERE name='records'").fetchone() is None:
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            rows = self._db.execute("SELECT doc FROM records WHERE name='audit' ORDER BY seq").fetchall()
            for (doc,) in rows:
                self._add(doc.decode() if isinstance(doc, bytes) else str(doc))
            self._db.execute("DROP TABLE records")
            self._db.execute("COMMIT")
        except BaseException:
            self._db.rollback()
            raise

    def _add(self, body: str) -> int:
        new = link(self._hash, self._seq + 1, body)
        self._db.execute("INSERT INTO chain VALUES(?,?,?,?)", (new.seq, new.prev, new.hash, new.body))
        self._seq, self._hash = new.seq, new.hash
        return new.seq

    async def write(
        self,
        verb: str,
        key: Key,
        *,
        actor: str,
        source: str = "",
        request: str = "",
        before: Resource | None = None,
        after: Resource | None = None,
        outcome: str = "done",
        detail: dict[str, Any] | None = None,
    ) -> None:
        """Keeps one write; ``outcome`` is ``done`` or the reason of the refusal, ``detail`` is more."""
        record: dict[str, Any] = {
            "time": clock.timestamp(),
            "actor": actor,
            "verb": verb,
            "kind": key.kind,
            "namespace": "" if key.namespace == CLUSTER else key.namespace,
            "name": key.name,
            "outcome": outcome,
        }
        if detail:
            record["detail"] = detail
        if source:
            record["source"] = source
        if request:
            record["request"] = request
        if after is not None:
            record["revision"] = after.metadata.resourceVersion
            record["after"] = _bounded(after.document(show_secrets=False)["spec"])
        if before is not None:
            record["before"] = _bounded(before.document(show_secrets=False)["spec"])
        if before is not None and after is not None and before.metadata.labels != after.metadata.labels:
            record["labels"] = {"before": before.metadata.labels, "after": after.metadata.labels}
        self._add(msgspec.json.encode(record).decode())
        self._moved.set()

    def items(
        self, *, since: int = 0, limit: int = 500, seen: Callable[[dict[str, Any]], bool] | None = None
    ) -> list[dict[str, Any]]:
        """The last ``limit`` records behind ``since`` that ``seen`` takes, oldest first."""
        found: list[dict[str, Any]] = []
        before = self._seq + 1
        while len(found) < limit:
            rows = self._db.execute(
                "SELECT seq, body FROM chain WHERE seq>? AND seq<? ORDER BY seq DESC LIMIT ?",
                (since, before, min(limit, 1000)),
            ).fetchall()
            if not rows:
                break
            before = rows[-1][0]
            read = ({**_read(body), "seq": seq} for seq, body in rows)
            found += [r for r in read if seen is None or seen(r)]
        return found[:limit][::-1]

    def links(self, since: int = 0, batch: int = 500) -> Iterator[Link]:
        """The chain as it lies there, behind ``since``."""
        while True:
            rows = self._db.execute(
                "SELECT seq, prev, hash, body FROM chain WHERE seq>? ORDER BY seq LIMIT ?", (since, batch)
            ).fetchall()
            if not rows:
                return
            for seq, prev, hash_, body in rows:
                yield Link(seq, str(prev), str(hash_), body if isinstance(body, str) else repr(body))
            since = rows[-1][0]

    def head(self, first: int = 0) -> Head:
        """The chain's present end, and its beginning: ``first`` or the oldest record there is."""
        row = self._db.execute("SELECT seq, prev FROM chain WHERE seq>=? ORDER BY seq LIMIT 1", (first,)).fetchone()
        begin, prev = row or (self._seq + 1, self._hash)
        return Head(self._seq, self._hash, begin, prev, clock.timestamp())

    def verify(self, head: Head | None) -> Verdict:
        return check(self.links(), head)

    async def run(self, anchor: Callable[[Head], Awaitable[None]]) -> None:
        """Has the head kept elsewhere after each change, and lets the oldest records go."""
        if self._seq:
            self._moved.set()
        while True:
            await self._moved.wait()
            self._moved.clear()
            with contextlib.suppress(EdgewardError):
                await self._anchor(anchor)
            await asyncio.sleep(_PERIOD)

    async def _anchor(self, anchor: Callable[[Head], Awaitable[None]]) -> None:
        head = self.head()
        cut = self._seq - KEEP + 1
        if cut - head.first < _SLACK:
            await anchor(head)
            return
        # first it is said elsewhere that the chain begins later now: a crash in between leaves too much, not too little
        await anchor(self.head(cut))
        self._db.execute("DELETE FROM chain WHERE seq<?", (cut,))

    def close(self) -> None:
        self._db.close()


def _bounded(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec, or where it is too large to be kept ten thousand times, what proves that it was that one."""
    data = msgspec.json.encode(spec)
    if len(data) <= _LARGEST:
        return spec
    return {"omitted": f"{len(data)} bytes", "sha256": hashlib.sha256(data).hexdigest()}


def _read(body: Any) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body)
        if isinstance(found, dict):
            return found
    except (msgspec.DecodeError, TypeError):
        pass
    return {"outcome": "this record was damaged; see: edgeward audit verify"}
