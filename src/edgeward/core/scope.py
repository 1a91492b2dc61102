"""Which resources concern a node: the least that it needs, and nothing of other sites.

Pure. In: the node, the nodes of its site, all resources. Out: the node's view. The hub cuts every sync by it; each
kind says its :data:`~edgeward.core.registry.Scope` once, in its description.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from edgeward.core.registry import kinds
from edgeward.core.resource import Key, Resource


class NodeView(msgspec.Struct, frozen=True):
    """A node and the labels of all nodes of its site (its own among them)."""

    name: str
    site: str
    labels: tuple[Mapping[str, str], ...] = ()


def matches(placement: object, node: NodeView) -> bool:
    """Whether a ``placement {site, nodeSelector}`` takes any node of the site."""
    site = getattr(placement, "site", "") or ""
    if site and site != node.site:
        return False
    selector: Mapping[str, str] = getattr(placement, "nodeSelector", None) or {}
    if not selector:
        return True
    return any(all(labels.get(k) == v for k, v in selector.items()) for labels in node.labels)


def site_of(resource: Resource) -> str:
    """The site that a resource of scope ``site`` names (a Site names itself)."""
    return resource.metadata.name if resource.kind == "Site" else str(getattr(resource.spec, "site", ""))


def placed_sites(resource: Resource) -> str:
    """The one site a placement names, or "" when it may take several."""
    return str(getattr(getattr(resource.spec, "placement", None), "site", "") or "")


def view(node: NodeView, resources: Iterable[Resource]) -> dict[Key, Resource]:
    """The resources that concern ``node``, by key."""
    got: dict[Key, Resource] = {}
    used: dict[Key, Resource] = {}
    follows: list[Resource] = []
    for r in resources:
        scope = kinds.get(r.kind).scope
        if (
            scope == "all"
            or (scope == "site" and site_of(r) == node.site)
            or (scope == "placed" and matches(getattr(r.spec, "placement", None), node))
        ):
            got[r.key] = r
        elif scope == "used":
            used[r.key] = r
        elif scope == "follows":
            follows.append(r)
    for r in follows:
        if any(Key(ref.kind, ref.namespace, ref.name) in got for ref in kinds.get(r.kind).refs(r)):
            got[r.key] = r
    for r in list(got.values()):
        for ref in kinds.get(r.kind).refs(r):
            key = Key(ref.kind, ref.namespace, ref.name)
            if key in used:
                got[key] = used[key]
    return got


def fingerprint(revisions: Iterable[tuple[Key, int]]) -> str:
    """A short hash of keys and revisions: equal at hub and node when they hold the same view."""
    h = hashlib.sha256()
    for key, revision in sorted(revisions):
        h.update(f"{key.kind}/{key.namespace}/{key.name}@{revision}\n".encode())
    return h.hexdigest()[:32]
