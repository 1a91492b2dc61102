"""Makes the kinds of all rooms known to this process.

The command line decodes, sorts and prints resources of every room, but belongs to none: it imports each room's
`spec.py`, which registers its kinds by being imported.
"""

from __future__ import annotations

import importlib

from edgeward.core.errors import NotFound
from edgeward.core.registry import Kind, Kinds, kinds

#: Modules that register kinds, in no special order.
KIND_MODULES = (
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


def load_kinds() -> Kinds:
    """The registry with the kinds of every room in it."""
    for name in KIND_MODULES:
        importlib.import_module(name)
    return kinds


#: What people ask `get` for and has a command of its own.
_COMMANDS = {
    "event": "events", "events": "events", "ev": "events", "journal": "journal", "audit": "audit", "log": "logs APP",
    "logs": "logs APP", "stream": "stream list", "streams": "stream list", "all": "get apps,services,configs",
}  # fmt: skip


def find_kind(word: str) -> Kind:
    """The kind a person means by ``app``, ``apps``, ``App`` or a short name; raises ``NotFound``."""
    try:
        return load_kinds().find(word)
    except NotFound as e:
        if command := _COMMANDS.get(word.lower()):
            e.remedy = f"it is no resource; see: edgeward {command}"
        raise
