"""Which resources concern a node: the least that it needs, and nothing of other sites.

Pure. In: the node, the nodes of its site, all resources. Out: the node's view. The hub cuts every sync by it; each
kind says its :data:`~edgeward.core.registry.Scope` once, in its description.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from edgeward.core.errors import Invalid, Refused
from edgeward.core.registry import Ref, kinds
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


def takes(resource: Resource, node: Resource) -> bool:
    """Whether the placement of ``resource`` takes this very node."""
    return matches(resource.spec.placement, NodeView(node.metadata.name, node.spec.site, (node.metadata.labels,)))


def site_of(resource: Resource) -> str:
    """The site that a resource of scope ``site`` names (a Site names itself)."""
    return resource.metadata.name if resource.kind == "Site" else str(getattr(resource.spec, "site", ""))


def for_site(resource: Resource, site: str) -> bool:
    """Whether a resource of scope ``sites`` is meant for the site."""
    sites: Iterable[str] = getattr(resource.spec, "sites", ())
    return site in sites or "*" in sites


def placed_sites(resource: Resource) -> str:
    """The one site a placement names, or "" when it may take several."""
    return str(getattr(getattr(resource.spec, "placement", None), "site", "") or "")


def refs_at(resource: Resource, site: str) -> list[Ref]:
    """What the resource refers to as the site has it: what another site has of it uses nothing here."""
    kind = kinds.get(resource.kind)
    return kind.refs(kind.at(resource, site))


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
            or (scope == "sites" and for_site(r, node.site))
            or (scope == "placed" and matches(getattr(r.spec, "placement", None), node))
        ):
            got[r.key] = r
        elif scope == "used":
            used[r.key] = r
        elif scope == "follows":
            follows.append(r)
    for r in follows:
        kind = kinds.get(r.kind)
        if node.site in kind.also(r) or any(Key(f.kind, f.namespace, f.name) in got for f in kind.refs(r)):
            got[r.key] = r
    for r in list(got.values()):
        for ref in refs_at(r, node.site):
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


def check_reach(resource: Resource, site: str, *, delete: bool = False) -> None:
    """Raises ``Invalid`` when a site may not write (or delete) the resource: it is the hub's or another site's.

    A site creates, changes and deletes what is its own. What other sites may share it changes for itself (an Override).
    """
    kind = kinds.get(resource.kind)
    named = site_of(resource) if kind.scope == "site" else placed_sites(resource)
    # an Override is made at the hub from a change of its target; giving it up is the site's
    own = ("Override",) if delete else ("Site",)
    verb = "delete" if delete else "write"
    if kind.scope == "hub" or kind.at_hub_only or (kind.scope == "site" and resource.kind not in own):
        a = "an" if resource.kind[0] in "AEIO" else "a"
        raise Invalid(
            f"a site cannot {verb} {a} {resource.kind}", resource=str(resource.key), remedy=f"{verb} it at the hub"
        )
    if named and named != site:
        place = "$.spec.site" if kind.scope == "site" else "$.spec.placement.site"
        raise Invalid(
            f"names site {named!r}, this is site {site!r}",
            resource=str(resource.key),
            field="$.metadata.name" if resource.kind == "Site" else place,
            remedy=f"{verb} it at the hub" + ("" if kind.scope == "site" else ", or place it at this site"),
        )


def hub_fields(resource: Resource, old: Resource | None) -> dict[str, Any]:
    """What the fields that only the hub writes must be: as they were, or as they are when nobody says anything."""
    names = kinds.get(resource.kind).hub_fields
    if not names:
        return {}
    if old is not None:
        return {n: getattr(old.spec, n) for n in names}
    fields = {f.name: f for f in msgspec.structs.fields(resource.spec) if f.name in names}
    return {n: f.default_factory() if callable(f.default_factory) else f.default for n, f in fields.items()}


def check_local(new: Resource | None, old: Resource | None, site: str) -> None:
    """Raises what the hub would refuse of a change made at a site, as far as the site can know it."""
    if new is not None:
        check_reach(new, site)
        for name, value in hub_fields(new, old).items():
            if getattr(new.spec, name) != value:
                raise Invalid(
                    "is the hub's to say, not the site's",
                    resource=str(new.key),
                    field=f"$.spec.{name}",
                    remedy="change it at the hub",
                )
    elif old is not None:
        check_reach(old, site, delete=True)
        if kinds.get(old.kind).scope in ("placed", "all") and not placed_sites(old):
            raise Refused(
                "is placed at every site: a site cannot delete it for the others",
                resource=str(old.key),
                remedy="delete it at the hub, or change it for this site alone (an App: replicas: 0)",
            )
