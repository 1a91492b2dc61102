"""How many instances of an app belong on a node: pure, and the same answer on every node without asking anybody."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence

from edgeward.core.resource import Resource
from edgeward.core.scope import takes
from edgeward.workloads.persite import replicas_at


def _rank(app: Resource, node: Resource) -> bytes:
    # rendezvous hashing: a node that comes or goes moves only its own share
    text = f"{app.metadata.namespace}/{app.metadata.name}\0{node.metadata.name}"
    return hashlib.sha256(text.encode()).digest()


def share(app: Resource, nodes_of_site: Sequence[Resource], node: str, gone: Container[str] = ()) -> int:
    """Instances of ``app`` that ``node`` runs. ``replicas`` counts per site and is spread over its matching nodes.

    ``gone``: nodes that are lost (:func:`edgeward.workloads.disconnect.gone`), whose share the others take. Where all
    are, nobody is left to take it.
    """
    matching = sorted((n for n in nodes_of_site if takes(app, n)), key=lambda n: _rank(app, n))
    matching = [n for n in matching if n.metadata.name not in gone] or matching
    names = [n.metadata.name for n in matching]
    if node not in names:
        return 0
    each, rest = divmod(replicas_at(app, matching[0].spec.site), len(names))
    return each + (1 if names.index(node) < rest else 0)
