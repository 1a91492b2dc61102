"""Brings the kinds and the edge-side extensions that an agent needs into the registry."""

from __future__ import annotations

import importlib

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
    "edgeward.workloads.process",
    "edgeward.workloads.container",
)


def load() -> None:
    for module in _ROOMS:
        importlib.import_module(module)
