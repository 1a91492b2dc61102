"""The audit over HTTP: list, verify, export.

An export is a file of lines: one that says what it is and what head is vouched for elsewhere, then the chain, record by
record, so that whoever has the file can check it without the system (:func:`~edgeward.core.chain.check_export`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.core.access import Action, declare, needs, sift_records
from edgeward.core.audit import Audit
from edgeward.core.authz import ANY, HUB
from edgeward.core.chain import FORMAT, Head, Verdict
from edgeward.core.describe import RECORDS, described
from edgeward.core.streaming import json, ndjson, number


def audit_routes(audit: Audit, anchored: Callable[[], Head | None]) -> list[Route]:
    """``anchored``: the head that is kept elsewhere."""

    @described("Who wrote what, and every call that was refused", query=RECORDS)
    async def items(request: Request) -> Response:
        seen = sift_records(request, "audit")
        limit = number(request, "limit", 500, low=1, high=10_000)
        return json({"items": audit.items(since=number(request, "since", 0), limit=limit, seen=seen)})

    @described("Whether the audit is as it was written", answer=Verdict)
    async def verify(request: Request) -> Response:
        return json(audit.verify(anchored()))

    @described(
        "The audit's chain, a JSON object a line", query={"since": RECORDS["since"]}, media="application/x-ndjson"
    )
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
