"""The node's API for its gateway: what would answer a request, and purges of its cache. The plane does the work."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.agent.keeper import Keeper
from edgeward.core.access import needs
from edgeward.core.api import parse_body, read_body
from edgeward.core.describe import described
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.streaming import json, only
from edgeward.gateway.stats import HELP

_BODY = 16 * 1024


class Purge(msgspec.Struct):
    """Exactly one of url, prefix, tag; ``host`` narrows it."""

    url: str = ""
    prefix: str = ""
    tag: str = ""
    host: str = ""


class Purged(msgspec.Struct):
    purged: int


class GatewayRoutes:
    def __init__(self, plane: Keeper) -> None:
        self._plane = plane

    def routes(self) -> list[Route]:
        return [
            Route("/api/v1/gateway/explain", needs("get", "Route")(self.explain), methods=["GET"]),
            Route("/api/v1/gateway/purge", needs("update", "Route")(self.purge), methods=["POST"]),
        ]

    @described(
        "What the gateway would do with a request, and why",
        query={
            "url": ("string", "A URL or a path"),
            "method": ("string", "GET if left out"),
            "header": ("string", "NAME:VALUE; may be given several times"),
        },
    )
    async def explain(self, request: Request) -> Response:
        """``?url=&method=&header=NAME:VALUE`` (several): what the gateway would do, and why."""
        only(request, "url", "method", "header")
        query = request.query_params
        headers = {}
        for text in query.getlist("header"):
            name, colon, value = text.partition(":")
            if not colon:
                raise Invalid(f"{text[:60]!r} is no header field", field="?header", remedy="write NAME:VALUE")
            headers[name.strip()] = value.strip()
        args: dict[str, Any] = {"url": query.get("url", ""), "method": query.get("method", "GET"), "headers": headers}
        if not args["url"]:
            raise Invalid("is required", field="?url", remedy="write e.g. /hello or http://host/hello")
        return json(await self._plane.one("gateway.explain", **args))

    @described("Makes the gateway forget stored answers", body=Purge, answer=Purged)
    async def purge(self, request: Request) -> Response:
        """``{url | prefix | tag, host}`` -> ``{purged}``."""
        doc = parse_body(await read_body(request, _BODY), request.headers.get("content-type", "application/json"))
        if not isinstance(doc, dict) or not all(isinstance(v, str) for v in doc.values()):
            raise Invalid("expected an object of texts", field="$", remedy='send {"prefix": "/news/"}')
        if unknown := sorted(set(doc) - {"url", "prefix", "tag", "host"}):
            raise Invalid("unknown field", field=f"$.{unknown[0][:60]}", remedy="url, prefix, tag, host")
        return json(await self._plane.one("gateway.purge", **doc))

    async def metrics(self) -> tuple[dict[str, float], dict[str, str]]:
        """The gateway's numbers and what they mean; none when the plane does not answer."""
        try:
            doc: dict[str, Any] = await self._plane.one("gateway.stats", timeout=2.0)
        except EdgewardError:
            return {}, {}
        return {str(k): float(v) for k, v in doc["metrics"].items()}, dict(HELP)
