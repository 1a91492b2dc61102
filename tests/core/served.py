"""The API over a real socket, for tests: a hub of its own, its documents, its streams of events."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.core.access import record_routes
from edgeward.core.api import build_app
from edgeward.core.audit import Audit
from edgeward.core.authz import Principal, administrator
from edgeward.core.errors import Unauthorized
from edgeward.core.records import SqliteRecords
from edgeward.core.resources import Resources
from edgeward.core.store_sqlite import SqliteStore
from edgeward.core.streaming import ndjson
from edgeward.hub.kinds import load

load()

CONFIGS = "/api/v1/configs"
Doc = dict[str, Any]


class Hub:
    def __init__(self, http: httpx.AsyncClient, resources: Resources, records: SqliteRecords) -> None:
        self.http, self.resources, self.store, self.records = http, resources, resources.store, records
        self.ready = True

    async def ask(self, method: str, path: str, doc: Any = None, **kw: Any) -> tuple[int, Any]:
        answer = await self.http.request(method, path, **({"json": doc} if doc is not None else {}), **kw)
        assert answer.headers["x-request-id"]
        body = answer.json() if answer.content else None
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json"
            assert body["status"] == answer.status_code
            assert body["title"]
            assert body["detail"]
        return answer.status_code, body

    async def refused(self, method: str, path: str, doc: Any = None, **kw: Any) -> tuple[int, str, str]:
        """(status, field, remedy)"""
        status, body = await self.ask(method, path, doc, **kw)
        assert status >= 400, body
        return status, body.get("field", ""), body.get("remedy", "")


def auth(token: str | None, _: Any) -> Principal:
    if token != "good":
        raise Unauthorized("no valid token", remedy="log in")
    return administrator("eve")


async def broken(_: Request) -> Response:
    raise RuntimeError("s3cret detail of the inside")


async def lines(_: Request) -> Response:
    async def items() -> AsyncIterator[Doc]:
        for n in range(3):
            yield {"n": n, "text": "a\nb"}

    return ndjson(items())


def run(body: Callable[[Hub], Awaitable[None]]) -> None:
    async def main() -> None:
        resources, records = Resources(SqliteStore(), Audit()), SqliteRecords()
        hub = Hub(httpx.AsyncClient(), resources, records)
        app = build_app(
            resources,
            resources.store,
            auth=auth,
            extra_routes=[
                *record_routes(records),
                Route("/api/v1/broken", broken),
                Route("/api/v1/lines", lines),
            ],
            health=lambda: (hub.ready, {"state": "ready" if hub.ready else "starting"}),
            metrics=lambda: "edgeward_up 1\n",
            info={"version": "1.2.3"},
        )
        async with serving(app) as url, asyncio.timeout(240):
            headers = {"authorization": "Bearer good"}
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as hub.http:
                await body(hub)

    asyncio.run(main())


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def config(name: str, value: str = "1", **meta: Any) -> Doc:
    return {
        "apiVersion": "edgeward/v1",
        "kind": "Config",
        "metadata": {"name": name, **meta},
        "spec": {"data": {"k": value}},
    }


def namespace(name: str) -> Doc:
    return {"apiVersion": "edgeward/v1", "kind": "Namespace", "metadata": {"name": name}}


Event = tuple[str, int, Any]


async def events(answer: httpx.Response) -> AsyncIterator[Event]:
    """(event, id, data) of a stream of server-sent events; a comment is ("", 0, its text)."""
    event: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if not line:
            if event:
                yield event.get("event", ""), int(event.get("id", 0)), json.loads(event["data"])
            event = {}
        elif line.startswith(":"):
            yield "", 0, line[2:]
        else:
            name, _, value = line.partition(": ")
            event[name] = value


@asynccontextmanager
async def watch(hub: Hub, path: str, headers: dict[str, str] | None = None, **params: Any) -> AsyncIterator[Any]:
    async with hub.http.stream("GET", path, params={"watch": "true", **params}, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        stream = events(answer)
        assert await anext(stream) == ("", 0, "watching")

        async def take(n: int) -> list[tuple[str, str]]:
            got = [await anext(stream) for _ in range(n)]
            take.last = got[-1][1]  # type: ignore[attr-defined]
            return [(event, doc["metadata"]["name"]) for event, _, doc in got]

        yield take
