"""Small pieces of HTTP that the hub and the agent share: a body, numbers of a query, lines and events as they come.

Handlers raise :class:`~edgeward.core.errors.EdgewardError`; the API turns those into problem documents.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from edgeward.core.errors import Invalid, TooLarge, TooSlow
from edgeward.core.resource import MAX_DOCUMENT

#: A JSON object a line.
NDJSON = "application/x-ndjson"
#: Seconds that a body may take.
BODY_TIME = 60.0


class Piece(bytes):
    """A piece of a stream that can be asked for again from behind it, by its ``mark``."""

    mark: dict[str, str]

    def __new__(cls, data: bytes, mark: dict[str, str]) -> Piece:
        made = super().__new__(cls, data)
        made.mark = mark
        return made


async def read_body(request: Request, limit: int = MAX_DOCUMENT) -> bytes:
    """The body, refused as soon as it is known to be too large."""
    remedy = f"at most {limit} bytes"
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise TooLarge(f"the body has {length} bytes", remedy=remedy)
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_TIME):
            async for piece in request.stream():
                data += piece
                if len(data) > limit:
                    raise TooLarge(f"the body has more than {limit} bytes", remedy=remedy)
    except TimeoutError:
        raise TooSlow(f"the body was not there within {BODY_TIME:g} s", remedy="send it again, faster") from None
    return bytes(data)


def number(request: Request, name: str, default: int, *, low: int = 0, high: int = 2**53) -> int:
    """A bounded number of the query string."""
    text = request.query_params.get(name)
    if text is None or text == "":
        return default
    try:
        value = int(text)
    except ValueError:
        raise Invalid(f"{text[:40]!r} is no number", field=f"?{name}", remedy=f"{low} to {high}") from None
    if not low <= value <= high:
        raise Invalid(f"{value} is out of range", field=f"?{name}", remedy=f"{low} to {high}")
    return value


def flag(request: Request, name: str, *also: str) -> bool:
    """A switch of the query string. What it does not know it refuses: ``dryRun=ture`` must not write."""
    text = request.query_params.get(name)
    if text is None or text.lower() in ("0", "false", "no"):
        return False
    if text.lower() in ("1", "true", "yes", *also):
        return True
    raise Invalid(f"{text[:40]!r} is neither true nor false", field=f"?{name}", remedy="write true, or leave it out")


def only(request: Request, *names: str) -> None:
    """Refuses parameters that mean nothing here: a misspelt ``dryRun`` or ``labelSelector`` does not pass for none."""
    for name in request.query_params:
        if name not in names:
            near = difflib.get_close_matches(name.lower(), {n.lower(): n for n in names}, n=1, cutoff=0.6)
            hint = next((f"did you mean {n!r}?" for n in names if near and n.lower() == near[0]), "")
            known = f"known: {', '.join(names)}" if names else "none is taken here"
            raise Invalid("unknown parameter", field=f"?{name[:60]}", remedy=hint or known)


def json(doc: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(doc), status, media_type="application/json")


async def _sse(items: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    yield b": following\n\n"
    async for item in items:
        yield b"id: %d\ndata: %b\n\n" % (item.get("seq", 0), msgspec.json.encode(item))


def follow(items: AsyncIterator[dict[str, Any]]) -> Response:
    """Records by server-sent events."""
    return StreamingResponse(_sse(items), media_type="text/event-stream", headers={"cache-control": "no-store"})


async def _lines(items: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    encoder = msgspec.json.Encoder()
    async for item in items:
        yield encoder.encode(item) + b"\n"


def ndjson(items: AsyncIterator[dict[str, Any]]) -> Response:
    return StreamingResponse(_lines(items), media_type=NDJSON)


async def sifted(items: AsyncIterator[dict[str, Any]], seen: Callable[[dict[str, Any]], bool]) -> AsyncIterator[Any]:
    async with aclosing(items):  # type: ignore[type-var]
        async for item in items:
            if seen(item):
                yield item
