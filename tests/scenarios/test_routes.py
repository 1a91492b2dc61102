"""Every route of a real hub and a real agent says what it needs, and means it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from edgeward.agent.kinds import load as load_agent
from edgeward.agent.main import Agent
from edgeward.core.access import Action, action_of
from edgeward.core.authz import VERBS
from edgeward.core.gate import Gate
from edgeward.core.registry import kinds
from edgeward.core.resource import decode
from edgeward.core.roles import AccessTokenSpec
from edgeward.core.store import Store
from edgeward.core.tokens import make_token
from edgeward.hub.kinds import load as load_hub
from edgeward.hub.main import Hub

load_hub()
load_agent()

#: Routes for everybody: what they answer tells nothing, or they prove their caller by other means.
OPEN = {
    "/healthz", "/readyz", "/api/v1/ca", "/api/v1/nonce", "/api/v1/enrol", "/api/v1/renew", "/api/v1/leave",
    "/api/v1/oidc", "/api/v1/oidc/login", "/tunnel",
}  # fmt: skip
#: Routes for everybody who is known.
SIGNED = {"/openapi.json", "/api/v1/version", "/api/v1/whoami", "/api/v1/can", "/api/v1/logout"}


@asynccontextmanager
async def running(which: Any) -> AsyncIterator[Any]:
    """A hub or an agent in this process, ready."""
    stop = asyncio.Event()
    task = asyncio.create_task(which.run(stop))
    try:
        async with asyncio.timeout(60):
            while not which._ready:
                if task.done():
                    await task
                await asyncio.sleep(0.05)  # its readiness is a fact, not an event
        yield which
    finally:
        stop.set()
        await task


def system(what: str, folder: Path) -> Hub | Agent:
    folder.mkdir()
    if what == "hub":
        (folder / "hub.json").write_text(json.dumps({"port": 0}))
        return Hub(folder)
    (folder / "node.json").write_text(json.dumps({"node": "plant-1", "site": "plant", "onStop": "stop"}))
    return Agent(folder)


def store_of(which: Any) -> Store:
    found: Store = which.store if isinstance(which, Hub) else which.replica
    return found


def walk(app: Gate) -> list[tuple[str, str, Action | None]]:
    return [(r.path, m, action_of(r)) for r in app.routes for m in sorted(r.methods)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("what", ["hub", "agent"])
def test_every_route_declares_its_action(what: str, tmp_path: Path) -> None:
    async def body() -> None:
        async with running(system(what, tmp_path / what)) as which:
            routes = walk(which.app)
            assert len(routes) > 20
            undeclared = sorted({path for path, _, action in routes if action is None})
            assert not undeclared, "wrap the handler with needs(...), signed_in(...) or opened(...) of core/access.py"
            for path, _, action in routes:
                assert action is not None
                assert (action.how == "open") == (path in OPEN), f"{path}: say in this test why it is open"
                assert (action.how == "signed") == (path in SIGNED), f"{path}: say in this test why all may see it"
                if action.how not in ("open", "signed"):
                    assert action.verbs and set(action.verbs) <= set(VERBS), path

    asyncio.run(body())


@pytest.mark.parametrize("what", ["hub", "agent"])
def test_every_route_is_in_the_document_and_all_of_the_document_is_served(what: str, tmp_path: Path) -> None:
    async def body() -> None:
        async with running(system(what, tmp_path / what)) as which:
            served: set[tuple[str, str]] = set()
            for path, method, _ in walk(which.app):
                for kind in kinds if "{plural}" in path else [None]:
                    if method == "HEAD" or (kind is not None and "{ns}" in path and not kind.namespaced):
                        continue
                    real = path.replace("{plural}", kind.plural if kind else "").replace("{ns}", "{namespace}")
                    short = kind is not None and kind.namespaced and not real.startswith("/api/v1/namespaces/")
                    if short and ("{name}" in real or method == "POST"):
                        continue  # `default` may be left out of a path; the document says the whole one
                    served.add((real, method.lower()))
            transport = httpx.ASGITransport(which.app, client=("127.0.0.1", 1))
            token = which.identity.admin_token() if what == "hub" else None
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with httpx.AsyncClient(transport=transport, base_url="http://edgeward", headers=headers) as http:
                doc = (await http.get("/openapi.json")).json()
            said = {(p, m) for p, item in doc["paths"].items() for m in item if m != "parameters"}
            assert served - said == set(), "put @described of core/describe.py at the handler"
            assert said - served == set(), "not served"
            ids = [item[m]["operationId"] for item in doc["paths"].values() for m in item if m != "parameters"]
            assert len(ids) == len(set(ids))
            refs = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(doc)))
            assert refs <= set(doc["components"]["schemas"])
            opened = {p for p, item in doc["paths"].items() for m in item.values() if m == {} or "security" in m}
            assert opened == OPEN & {p for p, _ in said}

    asyncio.run(body())


@pytest.mark.parametrize("what", ["hub", "agent"])
def test_who_may_nothing_gets_403_everywhere(what: str, tmp_path: Path) -> None:
    """With a token without rules every route refuses; with none or a wrong one every route asks for one."""

    async def body() -> None:
        async with running(system(what, tmp_path / what)) as which:
            store = store_of(which)
            await store.put(decode({"apiVersion": "edgeward/v1", "kind": "Role", "metadata": {"name": "nothing"}}))
            token, digest = make_token("poor")
            spec = {"role": "nothing", "hash": digest, "expires": "2099-01-01T00:00:00Z", "sites": ["*"]}
            doc = {"apiVersion": "edgeward/v1", "kind": "AccessToken", "metadata": {"name": "poor"}, "spec": spec}
            poor = decode(doc)
            assert isinstance(poor.spec, AccessTokenSpec)
            await store.put(poor)
            # from another machine: metrics are open to this one's own scraper
            transport = httpx.ASGITransport(which.app, client=("192.0.2.7", 1234))
            async with httpx.AsyncClient(transport=transport, base_url="http://edgeward", timeout=30) as http:
                checked = 0
                for path, method, action in walk(which.app):
                    if action is None or action.how in ("open", "signed"):
                        continue
                    for kind in kinds if "{plural}" in path else [None]:
                        if kind is not None and "{ns}" in path and not kind.namespaced:
                            continue
                        if kind is not None and kind.name == "Namespace" and path.endswith("/status"):
                            continue  # reads as the list of a kind called status
                        real = path.replace("{ns}", "default").replace("{name}", "x")
                        real = real.replace("{plural}", kind.plural if kind else "")
                        got = await http.request(
                            method, real, headers={"authorization": f"Bearer {token}"}, content=b"{}"
                        )
                        assert got.status_code == 403, (method, real, got.status_code, got.text)
                        if method != "HEAD":
                            problem = got.json()
                            assert problem["title"] == "Forbidden" and problem["verb"] and problem["kind"], problem
                            if kind is not None:
                                assert problem["kind"] == kind.name
                        wrong = f"ew_poor_{'a' * 43}"
                        for headers in ({}, {"authorization": f"Bearer {wrong}"}) if what == "hub" else ():
                            got = await http.request(method, real, headers=headers, content=b"{}")
                            assert got.status_code in (401, 429), (method, real)
                        checked += 1
                assert checked > 50
            assert [r.key for r in store.items("Config")] == []

    asyncio.run(body())
