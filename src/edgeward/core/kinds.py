"""The kinds that every room stands on: Namespace, Config, Secret, Override."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgeward.core.errors import Invalid
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import CLUSTER, Resource


class NamespaceSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Where names are unique; deleting it deletes everything in it."""

    description: Annotated[str, Meta(description="What it is for", max_length=1024)] = ""


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


def _override_refs(r: Resource) -> list[Ref]:
    t = r.spec.target
    return [
        Ref(t.kind, t.namespace or CLUSTER, t.name, "$.spec.target.name"),
        Ref("Site", CLUSTER, r.spec.site, "$.spec.site"),
    ]


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
        columns=(Column("DESCRIPTION", lambda d: d["spec"].get("description", "")),),
        example="apiVersion: edgeward/v1\nkind: Namespace\nmetadata: {name: line-3}\n",
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
        columns=(
            Column("TARGET", lambda d: f"{d['spec']['target']['kind']}/{d['spec']['target']['name']}"),
            Column("SITE", lambda d: d["spec"]["site"]),
            Column("REASON", lambda d: d["spec"].get("reason", ""), wide=True),
        ),
    )
)
