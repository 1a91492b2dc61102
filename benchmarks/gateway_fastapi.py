"""What a developer writes with FastAPI for the gateway's work: answers from a dictionary, and a proxy by httpx."""

import time
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response

from benchmarks.gateway_peers import BODY


def app_for(target_port: int) -> Any:
    app = FastAPI()
    stored = {f"/cached/{n}": (BODY, time.time()) for n in range(1000)}
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{target_port}", limits=httpx.Limits(max_connections=256))

    @app.get("/cached/{name}")
    async def cached(request: Request, name: str) -> Response:
        body, at = stored[request.url.path]
        headers = {"age": str(int(time.time() - at)), "cache-status": "app; hit"}
        return Response(body, headers=headers, media_type="text/plain")

    @app.get("/proxied/{name}")
    async def proxied(request: Request, name: str) -> Response:
        got = await client.get(request.url.path)
        return Response(got.content, got.status_code, media_type=got.headers["content-type"])

    @app.post("/hello")
    async def hello(request: Request) -> dict[str, str]:
        return {"hello": (await request.body()).decode(), "version": "1"}

    return app
