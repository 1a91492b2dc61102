"""The node's API for its gateway: what would answer a request, and purges of its cache. The plane does the work."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.agent.keeper import Keeper
from edgeward.core.access import needs
from edgeward.core.body import parse_body
from edgeward.core.describe import described
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.streaming import json, only, read_body
from edgeward.gateway.relay import BODY, EXPLAIN, Purge, Purged, explain_args, purge_args
from edgeward.gateway.stats import HELP


class GatewayRoutes:
    def __init__(self, plane: Keeper) -> None:
        self._plane = plane

    def routes(self) -> list[Route]:
        return [
            Route("/api/v1/gateway/explain", needs("get", "Route")(self.explain), methods=["GET"]),
            Route("/api/v1/gateway/purge", needs("update", "Route")(self.purge), methods=["POST"]),
        ]

    @described("What the gateway would do with a request, and why", query=EXPLAIN)
    async def explain(self, request: Request) -> Response:
        only(request, *EXPLAIN)
        query = request.query_params
        args = explain_args(query.get("url", ""), query.get("method", ""), query.getlist("header"))
        return json(await self._plane.one("gateway.explain", **args))

    @described("Makes the gateway forget stored answers", body=Purge, answer=Purged)
    async def purge(self, request: Request) -> Response:
        doc = parse_body(await read_body(request, BODY), request.headers.get("content-type", "application/json"))
        return json(await self._plane.one("gateway.purge", **purge_args(doc)))

    async def called(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        """The hub asks for somebody who may."""
        verb, asked = args.get("verb"), args.get("args")
        if verb not in ("explain", "purge") or not isinstance(asked, dict):
            raise Invalid(f"the gateway knows no call {str(verb)[:40]!r}")
        yield msgspec.json.encode(await self._plane.one(f"gateway.{verb}", **asked))

    async def metrics(self) -> tuple[dict[str, float], dict[str, str]]:
        """The gateway's numbers and what they mean; none when the plane does not answer."""
        try:
            doc: dict[str, Any] = await self._plane.one("gateway.stats", timeout=2.0)
        except EdgewardError:
            return {}, {}
        return {str(k): float(v) for k, v in doc["metrics"].items()}, dict(HELP)
