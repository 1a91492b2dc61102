"""Brings every room's kinds and cloud-side extensions into the registry."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from edgeward.core.registry import extensions, kinds
from edgeward.core.resource import Resource

_ROOMS = (
    "edgeward.core.kinds",
    "edgeward.nodes.spec",
    "edgeward.nodes.release_spec",
    "edgeward.workloads.spec",
    "edgeward.workloads.rollout_spec",
    "edgeward.streams.spec",
    "edgeward.functions.spec",
    "edgeward.gateway.spec",
    "edgeward.gateway.listener_spec",
)


def load() -> None:
    for module in _ROOMS:
        importlib.import_module(module)
    if "App" not in extensions.names("fold"):
        from edgeward.core.roles import fold_token
        from edgeward.functions.cloud import fold as fold_function
        from edgeward.gateway.cloud import fold_route
        from edgeward.streams.cloud import fold_export
        from edgeward.workloads.cloud import fold, fold_service

        extensions.add("fold", "App", fold)
        extensions.add("fold", "Service", fold_service)
        extensions.add("fold", "Function", fold_function)
        extensions.add("fold", "Release", lambda *given: _but(fold_function(*given), "instances"))
        extensions.add("fold", "Export", fold_export)
        extensions.add("fold", "AccessToken", fold_token)
        extensions.add("fold", "Route", fold_route)
        extensions.add("fold", "Listener", fold_route)


def _but(status: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in status.items() if k != name}


def fold_by_node(resource: Resource, nodes: list[Resource], reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The plainest fold: each node's report under its name."""
    return {"nodes": {n: dict(r) for n, r in sorted(reports.items())}}


__all__ = ["fold_by_node", "kinds", "load"]
