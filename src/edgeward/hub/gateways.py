"""The hub's way to a node's gateway: `gateway explain` and `gateway purge` for those who are not at the site."""

from __future__ import annotations

from typing import Any

import msgspec
from nats.aio.client import Client
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.core.access import needs
from edgeward.core.body import parse_body
from edgeward.core.describe import described
from edgeward.core.errors import Unreachable
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.store import Store
from edgeward.core.streaming import json, only, read_body
from edgeward.gateway.relay import BODY, CALL, EXPLAIN, Purge, Purged, explain_args, purge_args
from edgeward.nodes.calls import call
from edgeward.nodes.cloud import NodesCloud


class GatewayRelay:
    def __init__(self, store: Store, client: Client, nodes: NodesCloud) -> None:
        self._store, self._nc, self._nodes = store, client, nodes

    def routes(self) -> list[Route]:
        base = "/api/v1/nodes/{name}/gateway"
        return [
            Route(f"{base}/explain", needs("get", "Route")(self.explain), methods=["GET"]),
            Route(f"{base}/purge", needs("update", "Route")(self.purge), methods=["POST"]),
        ]

    @described("What the node's gateway would do with a request, and why", query=EXPLAIN)
    async def explain(self, request: Request) -> Response:
        only(request, *EXPLAIN)
        query = request.query_params
        args = explain_args(query.get("url", ""), query.get("method", ""), query.getlist("header"))
        return await self._ask(request, "explain", args)

    @described("Makes the node's gateway forget stored answers", body=Purge, answer=Purged)
    async def purge(self, request: Request) -> Response:
        doc = parse_body(await read_body(request, BODY), request.headers.get("content-type", "application/json"))
        return await self._ask(request, "purge", purge_args(doc))

    async def _ask(self, request: Request, verb: str, args: dict[str, Any]) -> Response:
        name = request.path_params["name"]
        self._store.get(Key("Node", CLUSTER, name))
        if not self._nodes.is_online(name):
            raise Unreachable(
                f"node {name} is not connected", resource=f"Node/{name}", remedy="ask it at the site: --at"
            )
        pieces = [p async for p in call(self._nc, name, CALL, {"verb": verb, "args": args})]
        return json(msgspec.json.decode(b"".join(pieces)))
