"""Kinds Site and Node: the places where things run."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgeward.core.errors import Invalid
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import CLUSTER, Resource


class Coordinates(msgspec.Struct, forbid_unknown_fields=True):
    """WGS 84, degrees."""

    lat: Annotated[float, Meta(description="Latitude", ge=-90, le=90)]
    lon: Annotated[float, Meta(description="Longitude", ge=-180, le=180)]


class SiteSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Nodes that share a local network: the unit of autonomy, traffic and data residency."""

    displayName: Annotated[str, Meta(description="For people", max_length=256)] = ""
    coordinates: Annotated[Coordinates | None, Meta(description="Where it is")] = None
    prefixes: Annotated[list[str], Meta(description="Networks of the site in CIDR form")] = []


class NodeSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One edge machine: an agent and its nats-server."""

    site: Annotated[str, Meta(description="The site it stands in", min_length=1)]


def _check_site(r: Resource) -> None:
    for n, prefix in enumerate(r.spec.prefixes):
        try:
            ipaddress.ip_network(prefix)
        except ValueError as e:
            raise Invalid(str(e), field=f"$.spec.prefixes[{n}]", remedy="write a network as 10.1.0.0/16") from None


def _node_refs(r: Resource) -> list[Ref]:
    return [Ref("Site", CLUSTER, r.spec.site, "$.spec.site")]


def _state(d: dict[str, Any]) -> str:
    return {True: "online", False: "offline"}.get(d.get("status", {}).get("online"), "never seen")


kinds.add(
    Kind(
        "Site",
        "sites",
        SiteSpec,
        doc="Nodes that share a local network.",
        namespaced=False,
        scope="site",
        check=_check_site,
        columns=(
            Column("DISPLAY", lambda d: d["spec"].get("displayName", "")),
            Column("PREFIXES", lambda d: ",".join(d["spec"].get("prefixes", [])), wide=True),
        ),
        example="apiVersion: edgeward/v1\nkind: Site\nmetadata: {name: plant}\nspec: {displayName: Plant North}\n",
    )
)
kinds.add(
    Kind(
        "Node",
        "nodes",
        NodeSpec,
        doc="One edge machine, running one agent.",
        namespaced=False,
        scope="site",
        short=("no",),
        refs=_node_refs,
        columns=(
            Column("SITE", lambda d: d["spec"]["site"]),
            Column("STATE", _state),
            Column("VERSION", lambda d: d.get("status", {}).get("version", "")),
            Column("SYSTEM", lambda d: d.get("status", {}).get("system", ""), wide=True),
            Column("ADDRESS", lambda d: d.get("status", {}).get("address", ""), wide=True),
        ),
        example="apiVersion: edgeward/v1\nkind: Node\nmetadata: {name: plant-1}\nspec: {site: plant}\n",
    )
)
