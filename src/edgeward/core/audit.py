"""Who wrote what, and what came of it: every write through the API, refused ones too.

Secrets are blanked before they come here. Bounded; the oldest go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeward.core.records import SqliteRecords
from edgeward.core.resource import Key, Resource

NAME = "audit"


class Audit:
    def __init__(self, path: Path | str = ":memory:") -> None:
        self._records = SqliteRecords(path)

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
    ) -> None:
        """Keeps one write; ``outcome`` is ``done`` or the reason of the refusal."""
        record: dict[str, Any] = {
            "actor": actor,
            "verb": verb,
            "kind": key.kind,
            "namespace": key.namespace,
            "name": key.name,
            "outcome": outcome,
        }
        if source:
            record["source"] = source
        if request:
            record["request"] = request
        if after is not None:
            record["revision"] = after.metadata.resourceVersion
            record["after"] = after.document(show_secrets=False)["spec"]
        if before is not None:
            record["before"] = before.document(show_secrets=False)["spec"]
        await self._records.append(NAME, record)

    def items(self, *, since: int = 0, limit: int = 500) -> list[dict[str, Any]]:
        return self._records.items(NAME, since=since, limit=limit)

    def close(self) -> None:
        self._records.close()
