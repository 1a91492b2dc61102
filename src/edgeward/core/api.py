"""The HTTP API of hub and agent: the same shape on both, made from the registry.

``/api/v1/<plural>[/<name>]`` and ``/api/v1/namespaces/<ns>/<plural>[/<name>]``: list with selectors and pages, get,
create, replace, merge patch, delete, watch by server-sent events, status. Here the routes are put together. Every call
passes the gate (``gate.py``) with a token (on the agent's unix socket, which is its owner's, it may lack) and is
decided by the caller's rules (``access.py``); every error is a problem document (``problems.py``). What happens to
resources is in ``resource_routes.py``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from edgeward.core.access import Action, access_routes, action_of, closed, declare, needs, opened, signed_in
from edgeward.core.audit_routes import audit_routes
from edgeward.core.chain import Head
from edgeward.core.describe import described
from edgeward.core.gate import Auth, Gate
from edgeward.core.problems import HANDLERS
from edgeward.core.resource_routes import Api
from edgeward.core.resources import Resources
from edgeward.core.store import Store
from edgeward.core.streaming import json


def build_app(
    resources: Resources,
    store: Store,
    *,
    auth: Auth,
    extra_routes: Sequence[Route] = (),
    health: Callable[[], tuple[bool, dict[str, Any]]],
    metrics: Callable[[], str | Awaitable[str]],
    info: dict[str, Any],
    audit_head: Callable[[], Head | None] | None = None,
) -> Gate:
    """The whole API as an ASGI app. ``audit_head``: the audit's head as it is kept elsewhere."""
    api = Api(resources, store)

    @described("Whether the process lives")
    async def healthz(_: Request) -> Response:
        return json({"state": "alive"})

    @described("Whether it does its work", more={"503": "Not ready"})
    async def readyz(_: Request) -> Response:
        ok, doc = health()
        return json(doc, 200 if ok else 503)

    @described("Prometheus metrics; open on loopback", media="text/plain")
    async def metric(_: Request) -> Response:
        text = metrics()
        if not isinstance(text, str):
            text = await text
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @described("Role and version")
    async def version(_: Request) -> Response:
        return json(info)

    @described("This document")
    async def openapi(_: Request) -> Response:
        from edgeward.core.openapi import document

        return json(document(str(info.get("version", "")), routes))

    async def namespace_status(request: Request) -> Response:
        """Else ``namespaces/x/status`` would be the list of a kind called status."""
        request.scope["path_params"] = {**request.path_params, "plural": "namespaces"}
        return await api.status(request)

    base = "/api/v1"
    reading = ["GET", "HEAD"]
    routes = [
        Route("/healthz", opened(healthz)),
        Route("/readyz", opened(readyz)),
        Route("/metrics", needs("metrics", "Hub")(metric)),
        Route("/openapi.json", signed_in(openapi)),
        Route(f"{base}/version", signed_in(version)),
        *audit_routes(resources.audit, audit_head or (lambda: None)),
        Route(
            f"{base}/namespaces/{{name}}/status",
            declare(namespace_status, Action("own", ("get", "status"))),
            methods=[*reading, "PUT", "PATCH"],
        ),
        *access_routes(resources, issue=info.get("role") != "agent"),
        *(closed(route) for route in extra_routes),
    ]
    for prefix in (f"{base}/namespaces/{{ns}}/{{plural}}", f"{base}/{{plural}}"):
        routes += [
            Route(
                f"{prefix}/{{name}}/status",
                declare(api.status, Action("own", ("get", "status"))),
                methods=[*reading, "PUT", "PATCH"],
            ),
            Route(
                f"{prefix}/{{name}}",
                declare(api.one, Action("own", ("get", "update", "patch", "delete"))),
                methods=[*reading, "PUT", "PATCH", "DELETE"],
            ),
            Route(
                prefix, declare(api.collection, Action("own", ("list", "watch", "create"))), methods=[*reading, "POST"]
            ),
        ]
    # /api/v1/namespaces/default is the kind Namespace, not a list of kinds in it: two parts behind namespaces decide
    app = Starlette(routes=_ordered(routes), exception_handlers=HANDLERS)
    app.state.store = store
    return Gate(app, auth, _open_paths(routes), resources.audit)


def _open_paths(routes: Sequence[Route]) -> frozenset[str]:
    """Paths that need no token. Only whole ones: a pattern would be matched by other eyes than the router's."""
    found = [r.path for r in routes if (action := action_of(r)) is not None and action.how == "open"]
    for path in found:
        if "{" in path:
            raise ValueError(f"an open route has no parameters in its path: {path}")
    return frozenset(found)


def _ordered(routes: list[Route]) -> list[Route]:
    """Fixed paths before those with parameters, so that ``nodes/x/enrol`` is no sub-resource lookup."""
    return sorted(routes, key=lambda r: r.path.count("{"))
