"""The node's API beside the resources, and what the hub may ask the node: logs, calls of functions, present use.

Both ways give the same answers: a route for people at the site, whom ``core/access.py`` lets in, and a call for the
hub, which has asked who may. The routes of the gateway are in ``doors.py``.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from edgeward.agent.doors import GatewayRoutes
from edgeward.agent.keeper import Keeper
from edgeward.agent.replica import Replica
from edgeward.core import daemon
from edgeward.core.access import Action, declare, object_route, record_routes, top_sift
from edgeward.core.describe import LOGS, described
from edgeward.core.errors import NotFound
from edgeward.core.invocation import MAX_BODY
from edgeward.core.records import SqliteRecords
from edgeward.core.resource import Key
from edgeward.core.streaming import NDJSON, flag, json, number, read_body
from edgeward.functions.edge import read_logs, read_samples
from edgeward.functions.keeping import EdgeHistory
from edgeward.functions.relay import (
    INVOKE,
    LETTERS,
    LONGEST,
    SAMPLES,
    SILENCE,
    answer,
    call_args,
    doing,
    letter_args,
    letters_of,
    log_args,
    pieces_of,
    sample_args,
    to_plane,
)
from edgeward.functions.relay import LOGS as FUNCTION_LOGS
from edgeward.gateway.relay import CALL
from edgeward.nodes.calls import Handler
from edgeward.workloads.edge import AppsEdge


class AgentRoutes:
    """``link_use``: the nats-server's process id, and what the link used; ``hurry``: renews the node's credentials."""

    def __init__(
        self,
        node: str,
        site: str,
        data: Path,
        *,
        replica: Replica,
        records: SqliteRecords,
        apps: AppsEdge,
        plane: Keeper,
        doors: GatewayRoutes,
        link_use: Callable[[], tuple[int | None, dict[str, Any]]],
        hurry: Callable[[], None],
        history: EdgeHistory,
    ) -> None:
        self._node, self._site, self._data = node, site, data
        self._replica, self._records = replica, records
        self._apps, self._plane, self._doors = apps, plane, doors
        self._link_use, self._hurry, self._history = link_use, hurry, history

    def routes(self) -> list[Route]:
        return [
            object_route("App", "logs", "logs", self._logs_route),
            object_route("App", "versions", "get", self._versions_route),
            object_route("Function", "logs", "logs", self._function_logs_route),
            object_route("Function", "samples", "logs", self._function_samples_route),
            object_route("Function", "metrics", "get", self._function_metrics_route),
            object_route("Function", "versions", "get", self._function_versions_route),
            object_route("Function", "invoke", "invoke", self._invoke_route, "POST"),
            object_route("Function", "deadletters", "logs", self._letters_route),
            object_route("Function", "deadletters", "invoke", self._letters_done_route, "POST"),
            Route("/api/v1/top", declare(self._top_route, Action("own", ("top",), "Node")), methods=["GET"]),
            *self._doors.routes(),
            *record_routes(self._records),
        ]

    def calls(self) -> dict[str, Handler]:
        """What the hub may ask this node."""
        return {
            "logs": self._logs,
            "app-versions": self._versions,
            "usage": self._usage,
            "renew": self._renew,
            "invoke": self._invoke,
            CALL: self._doors.called,
            "function-deadletters": self._letters,
            "function-logs": lambda args: read_logs(self._data / "functions", args, self._node),
            "function-samples": lambda args: read_samples(self._data / "functions", args),
            "function-metrics": self._function_numbers,
        }

    def _function_known(self, request: Request) -> tuple[str, str]:
        namespace, name = request.path_params["ns"], request.path_params["name"]
        if self._replica.find(Key("Function", namespace, name)) is None:
            raise NotFound("not found", resource=f"Function/{name}")
        return namespace, name

    @described(
        "Call a function on this node: the body is the event's data, the answer is the function's own",
        query=INVOKE,
        media="*/*",
    )
    async def _invoke_route(self, request: Request) -> Response:
        namespace, name = self._function_known(request)
        data = await read_body(request, MAX_BODY)
        return await answer(self._invoke(call_args(namespace, name, data, request.query_params, request.headers)))

    def _invoke(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        return pieces_of(self._plane.ask("invoke", timeout=LONGEST + SILENCE, **to_plane(args)))

    @described("Messages that no call of a function answered, on this node, a JSON object a line", media=NDJSON)
    async def _letters_route(self, request: Request) -> Response:
        args = letter_args(*self._function_known(request), "list")
        return StreamingResponse(self._letters(args), media_type=NDJSON)

    @described("Call a function again with its dead letters, or drop them", query=LETTERS, media=NDJSON)
    async def _letters_done_route(self, request: Request) -> Response:
        args = letter_args(*self._function_known(request), doing(request))
        return StreamingResponse(self._letters(args), media_type=NDJSON)

    def _letters(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        args = letter_args(str(args["namespace"]), str(args["name"]), str(args.get("do", "list")))
        return letters_of(self._plane.ask("functions.deadletters", timeout=LONGEST + SILENCE, **args), self._node)

    @described("What a function wrote, on this node", query=FUNCTION_LOGS, media="text/plain")
    async def _function_logs_route(self, request: Request) -> Response:
        args = log_args(*self._function_known(request), request)
        lines = read_logs(self._data / "functions", args, self._node)
        return StreamingResponse(lines, media_type="text/plain; charset=utf-8")

    @described("Samples of a function on this node, one JSON object a line", query=SAMPLES, media=NDJSON)
    async def _function_samples_route(self, request: Request) -> Response:
        args = sample_args(*self._function_known(request), request)
        return StreamingResponse(read_samples(self._data / "functions", args), media_type=NDJSON)

    @described("How a function does on this node since its plane started: calls, failures, latencies, instances")
    async def _function_metrics_route(self, request: Request) -> Response:
        namespace, name = self._function_known(request)
        return json({"nodes": [await self._numbers({"namespace": namespace, "name": name})]})

    async def _numbers(self, args: dict[str, Any]) -> dict[str, Any]:
        key = f"{args.get('namespace')}/{args.get('name')}"
        return {"node": self._node, **await self._plane.one("functions.numbers", timeout=10.0, key=key)}

    async def _function_numbers(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        yield msgspec.json.encode(await self._numbers(args))

    @described("The versions of a function that this node keeps, the present one last")
    async def _function_versions_route(self, request: Request) -> Response:
        return json({"items": self._history.of(*self._function_known(request))})

    @described("The versions of an App that this node keeps, the present one last")
    async def _versions_route(self, request: Request) -> Response:
        namespace, name = request.path_params["ns"], request.path_params["name"]
        if self._replica.find(Key("App", namespace, name)) is None:
            raise NotFound("not found", resource=f"App/{name}")
        return json({"items": self._apps.kept(namespace, name)})

    async def _versions(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        yield msgspec.json.encode(self._apps.kept(str(args["namespace"]), str(args["name"])))

    @described("What an app wrote, on this node", query=LOGS, media="text/plain")
    async def _logs_route(self, request: Request) -> Response:
        args = {
            "namespace": request.path_params["ns"],
            "name": request.path_params["name"],
            "tail": number(request, "tail", 200, high=100_000),
            "follow": flag(request, "follow"),
            "since": request.query_params.get("since", ""),
            "instance": request.query_params.get("instance", ""),
        }
        if self._replica.find(Key("App", args["namespace"], args["name"])) is None:
            raise NotFound("not found", resource=f"App/{args['name']}")
        return StreamingResponse(self._logs(args), media_type="text/plain; charset=utf-8")

    async def _logs(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        pieces = self._apps.logs.read(
            str(args["namespace"]),
            str(args["name"]),
            tail=int(args.get("tail", 200)),
            follow=bool(args.get("follow")),
            since=str(args.get("since", "")),
            instance=str(args.get("instance", "")),
            after={str(k): str(v) for k, v in dict(args.get("after") or {}).items()},
        )
        async for piece in pieces:
            yield piece

    @described("What this node and its apps use now")
    async def _top_route(self, request: Request) -> Response:
        node_seen, app_seen = top_sift(request)
        use = self._use()
        return json({"nodes": list(filter(node_seen, use["nodes"])), "apps": list(filter(app_seen, use["apps"]))})

    async def _renew(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        self._hurry()
        yield b"{}"

    async def _usage(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        yield msgspec.json.encode(self._use())

    def _use(self) -> dict[str, Any]:
        load1 = os.getloadavg()[0]
        nats, wan = self._link_use()
        return {
            "nodes": [
                {
                    "name": self._node,
                    "site": self._site,
                    "online": True,
                    "load1": round(load1, 2),
                    "cpus": os.cpu_count() or 1,
                    "agentMB": round(daemon.memory_mb(os.getpid()), 1),
                    "planeMB": round(daemon.memory_mb(self._plane.pid), 1),
                    "natsMB": round(daemon.memory_mb(nats), 1),
                    "wan": wan,
                }
            ],
            "apps": self._apps.usage(),
        }
