"""The audit over HTTP: list, verify, export.

An export is a file of lines: one that says what it is and what head is vouched for elsewhere, then the chain, record by
record, so that whoever has the file can check it without the system (:func:`check_export`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.core.access import Action, declare, needs, sift_records
from edgeward.core.audit import KEEP, Audit
from edgeward.core.authz import ANY, HUB
from edgeward.core.chain import Head, Link, Verdict, check
from edgeward.core.errors import Invalid
from edgeward.core.streaming import json, ndjson, number

FORMAT = "edgeward-audit/1"


def audit_routes(audit: Audit, anchored: Callable[[], Head | None]) -> list[Route]:
    """``anchored``: the head that is kept elsewhere."""

    async def items(request: Request) -> Response:
        seen = sift_records(request, "audit")
        limit = number(request, "limit", 500, low=1, high=10_000)
        found = audit.items(since=number(request, "since", 0), limit=2 * KEEP)
        return json({"items": [i for i in found if seen(i)][-limit:]})

    async def verify(request: Request) -> Response:
        return json(audit.verify(anchored()))

    async def export(request: Request) -> Response:
        since = number(request, "since", 0)

        async def lines() -> AsyncIterator[dict[str, Any]]:
            head = anchored()
            yield {"format": FORMAT, "since": since, "head": msgspec.to_builtins(head) if head else None}
            for link in audit.links(since):
                yield msgspec.to_builtins(link)

        return ndjson(lines())

    base = "/api/v1/audit"
    return [
        Route(base, declare(items, Action("own", ("audit",))), methods=["GET"]),
        Route(f"{base}/verify", needs("audit", HUB)(verify), methods=["GET"]),
        Route(f"{base}/export", needs("audit", ANY)(export), methods=["GET"]),
    ]


def check_export(lines: Iterable[bytes]) -> Verdict:
    """Whether an exported chain is what it was. Raises ``Invalid`` when it is no export."""
    numbered = iter(enumerate(lines, 1))
    try:
        first = msgspec.json.decode(next(numbered)[1])
        if not isinstance(first, dict) or first.get("format") != FORMAT:
            raise Invalid(f"is no {FORMAT} file", line=1)
        head = msgspec.convert(first["head"], Head) if first.get("head") else None
        if first.get("since"):
            head = None  # a part: only its inner order can be checked
    except (StopIteration, msgspec.DecodeError, msgspec.ValidationError):
        raise Invalid(f"is no {FORMAT} file", line=1, remedy="make one: edgeward audit export FILE") from None

    def links() -> Iterable[Link]:
        for n, line in numbered:
            if line.strip():
                try:
                    yield msgspec.json.decode(line, type=Link)
                except (msgspec.DecodeError, msgspec.ValidationError) as e:
                    raise Invalid(f"is damaged: {e}", line=n) from None

    return check(links(), head)
