"""The kinds that every room stands on: Namespace, Config, Secret, Override (and Role, AccessToken of ``roles.py``)."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgeward.core import roles as _roles
from edgeward.core.errors import Invalid
from edgeward.core.quantity import BYTES_PATTERN, parse_bytes
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import CLUSTER, Resource

Size = Annotated[str, Meta(pattern=BYTES_PATTERN)] | int


class Quota(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a namespace may add up to at a site; what is left out is not bounded."""

    apps: Annotated[Annotated[int, Meta(ge=0)] | None, Meta(description="Apps")] = None
    cpu: Annotated[
        Annotated[float, Meta(ge=0)] | None, Meta(description="Processors: the sum of limits.cpu times replicas")
    ] = None
    memory: Annotated[Size | None, Meta(description="The sum of limits.memory times replicas, e.g. 2Gi")] = None
    messages: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Readings a second that its Exports take on one node; more wait in the node's broker"),
    ] = None
    bytes: Annotated[Size | None, Meta(description="The sum of its Exports' bounds.bytes, e.g. 1Gi")] = None
    blobs: Annotated[
        Size | None, Meta(description="What it may hold at the hub of archives and packages, e.g. 500Mi")
    ] = None

    def limits(self) -> dict[str, float]:
        """Field to number, of those that admission checks."""
        values = {"apps": self.apps, "cpu": self.cpu, "memory": self.memory, "bytes": self.bytes, "blobs": self.blobs}
        return {k: parse_bytes(v) if isinstance(v, str) else float(v) for k, v in values.items() if v is not None}


class NamespaceSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Where names are unique; deleting it deletes everything in it."""

    description: Annotated[str, Meta(description="What it is for", max_length=1024)] = ""
    quota: Annotated[Quota | None, Meta(description="What it may use at most")] = None


class ConfigSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Settings and small files that apps use."""

    data: Annotated[dict[str, str], Meta(description="Key to text; a key may be put into an app as a file")] = {}


class SecretSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Values that only the nodes whose apps use them get, and that are never printed."""

    data: Annotated[dict[str, str], Meta(description="Key to secret text")] = {}


class Target(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The object that an Override changes at one site."""

    kind: Annotated[str, Meta(description="Its kind")]
    name: Annotated[str, Meta(description="Its name")]
    namespace: Annotated[str, Meta(description="Its namespace; empty for kinds without one")] = ""


class OverrideSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What one site has otherwise than the others: made when a shared object is changed at a site."""

    target: Annotated[Target, Meta(description="The object that it changes")]
    site: Annotated[str, Meta(description="The site where it holds")]
    patch: Annotated[dict[str, Any], Meta(description="RFC 7396 merge patch of the target's spec")]
    base: Annotated[int, Meta(description="The target's revision it was made on", ge=0)] = 0
    reason: Annotated[str, Meta(description="Who made it and why", max_length=1024)] = ""


def _check_namespace(r: Resource) -> None:
    try:
        if r.spec.quota is not None:
            r.spec.quota.limits()
    except ValueError as e:
        raise Invalid(str(e), field="$.spec.quota") from None


def quota_of(namespace: Resource | None) -> dict[str, float]:
    """The quota that admission checks; {} for a namespace without one."""
    quota = namespace.spec.quota if namespace is not None else None
    return quota.limits() if quota is not None else {}


def _override_refs(r: Resource) -> list[Ref]:
    t = r.spec.target
    return [
        Ref(t.kind, t.namespace or CLUSTER, t.name, "$.spec.target.name"),
        Ref("Site", CLUSTER, r.spec.site, "$.spec.site"),
    ]


def _check_override(r: Resource) -> None:
    target = next((k for k in kinds if k.name == r.spec.target.kind), None)
    if target is not None and (target.at_hub_only or target.name == "Override"):
        raise Invalid(
            f"a site cannot have a {target.name} of its own", field="$.spec.target.kind", remedy="change it for all"
        )


def _check_data(r: Resource) -> None:
    for key in r.spec.data:
        if not key or "/" in key or "\0" in key or key in (".", "..") or len(key) > 253:
            raise Invalid(
                f"{key[:60]!r} is no valid key", field="$.spec.data", remedy="use letters, digits, '-', '_' and '.'"
            )


kinds.add(
    Kind(
        "Namespace",
        "namespaces",
        NamespaceSpec,
        doc="Where names are unique.",
        namespaced=False,
        scope="all",
        short=("ns",),
        newer={"quota.blobs": 2},
        check=_check_namespace,
        columns=(Column("DESCRIPTION", lambda d: d["spec"].get("description", "")),),
        example=(
            "apiVersion: edgeward/v1\nkind: Namespace\nmetadata: {name: line-3}\n"
            "spec: {quota: {apps: 20, memory: 2Gi}}\n"
        ),
    )
)
kinds.add(
    Kind(
        "Config",
        "configs",
        ConfigSpec,
        doc="Settings and small files for apps.",
        scope="used",
        short=("cm",),
        check=_check_data,
        columns=(Column("KEYS", lambda d: len(d["spec"].get("data", {}))),),
        example="apiVersion: edgeward/v1\nkind: Config\nmetadata: {name: web}\nspec: {data: {index.html: hello}}\n",
    )
)
kinds.add(
    Kind(
        "Secret",
        "secrets",
        SecretSpec,
        doc="Secret values; they reach only the nodes whose apps use them.",
        scope="used",
        check=_check_data,
        secret_fields=("data",),
        columns=(Column("KEYS", lambda d: len(d["spec"].get("data", {}))),),
        example="apiVersion: edgeward/v1\nkind: Secret\nmetadata: {name: db}\nspec: {data: {password: change-me}}\n",
    )
)
kinds.add(
    Kind(
        "Override",
        "overrides",
        OverrideSpec,
        doc="What one site has otherwise than the others.",
        scope="site",
        refs=_override_refs,
        check=_check_override,
        columns=(
            Column("TARGET", lambda d: f"{d['spec']['target']['kind']}/{d['spec']['target']['name']}"),
            Column("SITE", lambda d: d["spec"]["site"]),
            Column("REASON", lambda d: d["spec"].get("reason", ""), wide=True),
        ),
    )
)

__all__ = ["ConfigSpec", "NamespaceSpec", "OverrideSpec", "SecretSpec", "Target", "_roles"]
