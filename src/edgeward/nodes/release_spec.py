"""Kind Release: which release of the agent nodes are to run. Pure.

It is of one namespace, so that whoever may write in others has no say in it: who may write there runs programs on all
nodes as the agent. A node takes the archive for its kind of machine, and a Rollout of that namespace moves a Release
from group to group as it does an App.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgeward.core.blobs import DIGEST
from edgeward.core.declared import Declared, Placement
from edgeward.core.errors import Invalid
from edgeward.core.quantity import DURATION_PATTERN, parse_duration
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import CLUSTER, Resource

#: The namespace of Releases.
HOME = "edgeward"
Duration = Annotated[str, Meta(pattern=DURATION_PATTERN)] | float | int


class ReleaseHealth(Declared):
    """How a release proves itself on a node."""

    window: Annotated[Duration, Meta(description="So long the agent must be ready")] = "60s"
    startup: Annotated[Duration, Meta(description="It must be ready within this")] = "3m"
    link: Annotated[
        Duration,
        Meta(description="It must reach the hub within this, where the release before did; 0: it need not"),
    ] = "10m"


class ReleaseSpec(Declared):
    """A release of the agent, for one or more kinds of machine."""

    version: Annotated[str, Meta(description="For people", min_length=1, max_length=64)]
    archives: Annotated[
        dict[str, Annotated[str, Meta(pattern=DIGEST)]],
        Meta(description="Kind of machine, e.g. linux-x86_64-cp311, to the digest of the archive of wheels"),
    ]
    health: Annotated[ReleaseHealth, Meta(description="How it proves itself on a node")] = msgspec.field(
        default_factory=ReleaseHealth
    )
    placement: Annotated[Placement, Meta(description="Which nodes take it")] = msgspec.field(default_factory=Placement)


def order_id(uid: str, hex: str, generation: int) -> str:
    """Names the wish of one version of a Release: tried once, and again only when the Release changes."""
    return hashlib.sha256(f"{uid}/{hex}/{generation}".encode()).hexdigest()[:16]


def _check(r: Resource) -> None:
    if r.metadata.namespace != HOME:
        raise Invalid(f"is not in namespace {HOME}", field="$.metadata.namespace", remedy=f"write namespace: {HOME}")
    if not r.spec.archives or len(r.spec.archives) > 32:
        raise Invalid("has 1 to 32 entries", field="$.spec.archives", remedy="see: edgeward release create")
    for name in ("window", "startup", "link"):
        try:
            parse_duration(getattr(r.spec.health, name))
        except ValueError as e:
            raise Invalid(str(e), field=f"$.spec.health.{name}") from None


def _refs(r: Resource) -> list[Ref]:
    site = r.spec.placement.site
    return [Ref("Site", CLUSTER, site, "$.spec.placement.site")] if site else []


def _running(d: dict[str, Any]) -> str:
    nodes: Mapping[str, Any] = d.get("status", {}).get("nodes") or {}
    return f"{sum(n.get('phase') == 'Running' for n in nodes.values())}/{len(nodes)}" if nodes else ""


kinds.add(
    Kind(
        "Release",
        "releases",
        ReleaseSpec,
        doc="Which release of the agent nodes run. Each tries it, and goes back by itself when it proves bad.",
        scope="placed",
        level=2,
        reported=True,
        at_hub_only=True,
        at_once=("placement",),
        check=_check,
        refs=_refs,
        columns=(
            Column("VERSION", lambda d: d["spec"].get("version", "")),
            Column("PHASE", lambda d: d.get("status", {}).get("phase", "Pending")),
            Column("NODES", _running),
            Column("MESSAGE", lambda d: d.get("status", {}).get("message", "")),
        ),
        example=(
            "apiVersion: edgeward/v1\nkind: Release\nmetadata: {name: agent, namespace: edgeward}\nspec:\n"
            "  version: 0.2.0\n  archives:\n"
            f"    linux-x86_64-cp311: sha256:{'0' * 64}\n"
        ),
    )
)

__all__ = ["HOME", "ReleaseHealth", "ReleaseSpec", "order_id"]
