"""Errors as HTTP answers: every one a problem document (RFC 9457), none with anything of the inside.

In: an :class:`~edgeward.core.errors.EdgewardError`, or what Starlette raises of itself. Out: the answer with the
headers that go with it. What failed without being an ``EdgewardError`` is told by the request's number only; the log
has the rest, and ``gate.py`` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from edgeward.core.context import correlation
from edgeward.core.errors import EdgewardError, NotFound, Refused, TooMany, Unauthorized


def problem(e: EdgewardError, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(e.problem()), e.status, media_type="application/problem+json", headers=headers)


def failed_inside() -> Response:
    return problem(EdgewardError("failed inside", remedy=f"the log says why, under request {correlation.get()}"))


def refused(e: EdgewardError) -> Response:
    """The problem document of an error, with the headers that go with it."""
    headers = {}
    if isinstance(e, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(e, TooMany):
        headers["Retry-After"] = str(math.ceil(e.after))
    return problem(e, headers or None)


async def _refused(request: Request, exc: Exception) -> Response:
    request.scope["refusal"] = exc  # the gate keeps it in the audit
    return refused(exc if isinstance(exc, EdgewardError) else EdgewardError("failed inside"))


async def _failed(request: Request, exc: Exception) -> Response:
    """Else Starlette answers in plain text; the exception still reaches the gate, which logs it."""
    return failed_inside()


async def _not_found(request: Request, exc: Exception) -> Response:
    return problem(NotFound(f"there is no {request.url.path[:200]}", remedy="see /openapi.json"))


async def _not_allowed(request: Request, exc: Exception) -> Response:
    allow = (getattr(exc, "headers", None) or {}).get("Allow", "")
    e = Refused(f"{request.method} is not taken at {request.url.path[:200]}", remedy=f"it takes: {allow}")
    doc = {**e.problem(), "status": 405}
    return Response(
        msgspec.json.encode(doc),
        405,
        media_type="application/problem+json",
        headers={"Allow": allow} if allow else None,
    )


#: By what Starlette catches: what it answers with.
HANDLERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    EdgewardError: _refused,
    404: _not_found,
    405: _not_allowed,
    Exception: _failed,
}
