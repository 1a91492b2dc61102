"""Makes the kinds of all rooms known to this process.

The command line decodes, sorts and prints resources of every room, but belongs to none: it imports each room's
`spec.py`, which registers its kinds by being imported.
"""

from __future__ import annotations

import importlib

from edgeward.core.registry import Kind, Kinds, kinds

#: Modules that register kinds, in no special order.
KIND_MODULES = ("edgeward.core.kinds", "edgeward.nodes.spec", "edgeward.workloads.spec", "edgeward.streams.spec")


def load_kinds() -> Kinds:
    """The registry with the kinds of every room in it."""
    for name in KIND_MODULES:
        importlib.import_module(name)
    return kinds


def find_kind(word: str) -> Kind:
    """The kind a person means by ``app``, ``apps``, ``App`` or a short name; raises ``NotFound``."""
    return load_kinds().find(word)
