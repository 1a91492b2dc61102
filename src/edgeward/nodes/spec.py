"""Kinds Site, Node and JoinToken: the places where things run, and what lets a box become one of them."""

from __future__ import annotations

import ipaddress
import re
from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgeward.core.errors import Invalid
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import CLUSTER, Resource, check_name
from edgeward.core.spans import is_address
from edgeward.nodes import checks as _checks  # what `verdicts.checks` may name
from edgeward.nodes.verdict_spec import Verdicts, check_verdicts


class Coordinates(msgspec.Struct, forbid_unknown_fields=True):
    """WGS 84, degrees."""

    lat: Annotated[float, Meta(description="Latitude", ge=-90, le=90)]
    lon: Annotated[float, Meta(description="Longitude", ge=-180, le=180)]


class SiteSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Nodes that share a local network: the unit of autonomy, traffic and data residency."""

    displayName: Annotated[str, Meta(description="For people", max_length=256)] = ""
    coordinates: Annotated[Coordinates | None, Meta(description="Where it is")] = None
    prefixes: Annotated[list[str], Meta(description="Networks of the site in CIDR form")] = []
    addresses: Annotated[
        list[str],
        Meta(
            description="Where clients of the site find its gateway, e.g. 192.0.2.1, [2001:db8::1]:8443, host:80; "
            "steering tells them so",
            max_length=16,
        ),
    ] = []
    verdicts: Annotated[Verdicts | None, Meta(description="How its nodes judge one another")] = None


class NodeSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One edge machine: an agent and its nats-server."""

    site: Annotated[str, Meta(description="The site it stands in", min_length=1)]


class JoinTokenSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Lets one box take one name at one site, once. Made by `edgeward token create`, which shows the token itself."""

    node: Annotated[str, Meta(description="The name that the box gets")]
    site: Annotated[str, Meta(description="The site it stands in", min_length=1)]
    expires: Annotated[str, Meta(description="When it ends unused, e.g. 2026-11-25T10:00:00Z")]
    hash: Annotated[str, Meta(description="SHA-256 of the token's public key, hex", pattern="^[0-9a-f]{64}$")]
    replace: Annotated[bool, Meta(description="May take the name from the box that has or had it")] = False


def _check_site(r: Resource) -> None:
    check_verdicts(r.spec.verdicts, "$.spec.verdicts")
    for n, prefix in enumerate(r.spec.prefixes):
        try:
            ipaddress.ip_network(prefix)
        except ValueError as e:
            raise Invalid(str(e), field=f"$.spec.prefixes[{n}]", remedy="write a network as 10.1.0.0/16") from None

    for n, address in enumerate(r.spec.addresses):
        if not _is_address(address):
            raise Invalid(
                f"{address[:60]!r} is no address",
                field=f"$.spec.addresses[{n}]",
                remedy="write an IP address or a host name, with a port if need be: 192.0.2.1:80, [2001:db8::1]:80",
            )


_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.I)


def _is_address(text: str) -> bool:
    """An IPv4 or IPv6 address or a host name, each with or without a port (IPv6 then in brackets)."""
    host, port = text, "1"
    if text.startswith("["):
        host, _, port = text[1:].partition("]:")
        if ":" not in host:
            return False
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        return False
    return is_address(host) or (_HOST.fullmatch(host) is not None and not host.rpartition(".")[2].isdigit())


def _node_refs(r: Resource) -> list[Ref]:
    return [Ref("Site", CLUSTER, r.spec.site, "$.spec.site")]


def _check_token(r: Resource) -> None:
    check_name(r.spec.node, "$.spec.node")
    try:
        ends = datetime.fromisoformat(r.spec.expires.replace("Z", "+00:00"))
    except ValueError:
        ends = None
    if ends is None or ends.tzinfo is None:
        raise Invalid(
            f"{r.spec.expires[:40]!r} is no time", field="$.spec.expires", remedy="write it as 2026-11-25T10:00:00Z"
        )


def _token_refs(r: Resource) -> list[Ref]:
    return [Ref("Site", CLUSTER, r.spec.site, "$.spec.site")]


def _state(d: dict[str, Any]) -> str:
    if d.get("status", {}).get("revoked"):
        return "revoked"
    if d.get("status", {}).get("verdict") in ("dead", "wan-cut"):  # newer than the hub's last word at a cut site
        return "offline"
    return {True: "online", False: "offline"}.get(d.get("status", {}).get("online"), "never seen")


kinds.add(
    Kind(
        "Site",
        "sites",
        SiteSpec,
        doc="Nodes that share a local network.",
        namespaced=False,
        scope="site",
        newer={"addresses": 2, "verdicts": 2},
        # by these clients are led to a site: one that was broken into must not draw in other sites' clients
        hub_fields=("coordinates", "prefixes", "addresses"),
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
        reported=True,
        doc="One edge machine, running one agent.",
        namespaced=False,
        scope="site",
        short=("no",),
        refs=_node_refs,
        columns=(
            Column("SITE", lambda d: d["spec"]["site"]),
            Column("STATE", _state),
            Column("VERDICT", lambda d: d.get("status", {}).get("verdict", "")),
            Column("VERSION", lambda d: d.get("status", {}).get("version", "")),
            Column("SYSTEM", lambda d: d.get("status", {}).get("system", ""), wide=True),
            Column("ADDRESS", lambda d: d.get("status", {}).get("address", ""), wide=True),
        ),
        example="apiVersion: edgeward/v1\nkind: Node\nmetadata: {name: plant-1}\nspec: {site: plant}\n",
    )
)
kinds.add(
    Kind(
        "JoinToken",
        "jointokens",
        JoinTokenSpec,
        doc="Lets one box join, once.",
        namespaced=False,
        check=_check_token,
        refs=_token_refs,
        secret_fields=("hash",),
        columns=(
            Column("NODE", lambda d: d["spec"]["node"]),
            Column("SITE", lambda d: d["spec"]["site"]),
            Column("EXPIRES", lambda d: d["spec"]["expires"]),
            Column("USED", lambda d: d.get("status", {}).get("usedAt", "")),
            Column("FROM", lambda d: d.get("status", {}).get("usedFrom", ""), wide=True),
        ),
    )
)

__all__ = ["Coordinates", "JoinTokenSpec", "NodeSpec", "SiteSpec", "_checks"]
