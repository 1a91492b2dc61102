"""The kinds Role and AccessToken.

Both are written at the hub only; what a site has of them is enough to go on without the link. Who a token stands for is
found in ``tokens.py``, what a rule allows in ``authz.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgeward.core import clock, passage
from edgeward.core.authz import ANY, BUILT_IN, HUB, TUNNEL, VERBS, WORK, Rule
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import CLUSTER, Metadata, Resource, check_name
from edgeward.core.selectors import parse_labels

_UTC = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z$(?!\n)"


class RoleSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What its bearers may do. Rules only allow; what no rule allows is refused."""

    rules: Annotated[list[Rule], Meta(description="Each allows something", max_length=32)] = []
    description: Annotated[str, Meta(description="For people", max_length=1024)] = ""


class AccessTokenSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A key to the API for a person or a program. Made by `edgeward token create --role`."""

    role: Annotated[str, Meta(description="The Role whose rules it has")]
    hash: Annotated[str, Meta(description="SHA-256 of the token, hex", pattern=r"^[0-9a-f]{64}$")]
    expires: Annotated[str, Meta(description="RFC 3339 in UTC; it is refused from then on", pattern=_UTC)]
    sites: Annotated[
        list[str],
        Meta(description="Sites whose nodes take it too, also while cut off; `*` is all", max_length=256),
    ] = []
    description: Annotated[str, Meta(description="Who has it, and what for", max_length=1024)] = ""


def _check_part(text: str, where: str) -> None:
    try:
        passage.parse(text)
    except EdgewardError as e:
        e.field = where
        raise


def _check_role(r: Resource) -> None:
    built_in = BUILT_IN.get(r.metadata.name)
    if built_in is not None and tuple(r.spec.rules) != built_in:
        raise Invalid("is built in and cannot be changed", field="$.spec.rules", remedy="make a Role of another name")
    for n, rule in enumerate(r.spec.rules):
        where = f"$.spec.rules[{n}]"
        for verb in rule.verbs:
            if verb.startswith(f"{TUNNEL}:"):
                _check_part(verb.removeprefix(f"{TUNNEL}:"), f"{where}.verbs")
            elif verb != ANY and verb not in VERBS:
                raise Invalid(f"there is no verb {verb[:40]!r}", field=f"{where}.verbs", remedy=", ".join(VERBS))
        for kind in rule.kinds:
            if kind not in (ANY, WORK, HUB):
                try:
                    kinds.get(kind)
                except EdgewardError as e:
                    e.field = f"{where}.kinds"
                    raise
        for namespace in rule.namespaces:
            if namespace not in (ANY, CLUSTER):
                check_name(namespace, f"{where}.namespaces")
        try:
            parse_labels(rule.labelSelector)
        except EdgewardError as e:
            e.field = f"{where}.labelSelector"
            raise


#: Who acts in the audit without an AccessToken; a token of such a name could pass for them there.
_RESERVED = frozenset({"admin", "local", "system", "hub"})


def _check_token(r: Resource) -> None:
    if r.metadata.name in _RESERVED:
        raise Invalid("is reserved", field="$.metadata.name", remedy="take another name")
    try:
        clock.parse_timestamp(r.spec.expires)
    except ValueError:
        raise Invalid("is no time", field="$.spec.expires", remedy="write 2027-01-31T12:00:00Z") from None
    for n, site in enumerate(r.spec.sites):
        if site != ANY:
            check_name(site, f"$.spec.sites[{n}]")


def _token_refs(r: Resource) -> list[Ref]:
    # the built-in ones are in every release's code and need not travel
    role = [] if r.spec.role in BUILT_IN else [Ref("Role", CLUSTER, r.spec.role, "$.spec.role")]
    return role + [Ref("Site", CLUSTER, s, f"$.spec.sites[{n}]") for n, s in enumerate(r.spec.sites) if s != ANY]


def last_used(status: Mapping[str, Any]) -> str:
    """When a token was last used, at the hub or at a site, as far as the hub has heard."""
    times = [str(status.get("lastUsed", "")), *(str(t) for t in status.get("nodes", {}).values())]
    return max(times) or "never"


def fold_token(token: Resource, nodes: list[Resource], reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A token's status: what the hub saw of it itself, and under each node's name what that one did."""
    used = {n: str(r["lastUsed"])[:32] for n, r in sorted(reports.items()) if r.get("lastUsed")}
    rest = {k: v for k, v in token.status.items() if k != "nodes"}
    return rest | ({"nodes": used} if used else {})


kinds.add(
    Kind(
        "Role",
        "roles",
        RoleSpec,
        doc="What its bearers may do. admin, operator and viewer are built in.",
        namespaced=False,
        scope="used",
        at_hub_only=True,
        level=1,
        check=_check_role,
        columns=(
            Column("RULES", lambda d: len(d["spec"].get("rules", []))),
            Column("DESCRIPTION", lambda d: d["spec"].get("description", "")),
        ),
        example="apiVersion: edgeward/v1\nkind: Role\nmetadata: {name: web-team}\n"
        "spec:\n  rules:\n"
        "  - {verbs: [get, list, watch, logs], kinds: ['@work'], namespaces: [web]}\n"
        "  - {verbs: [create, update, patch, delete], kinds: [App, Config], namespaces: [web]}\n",
    )
)
kinds.add(
    Kind(
        "AccessToken",
        "accesstokens",
        AccessTokenSpec,
        doc="A key to the API, bound to a Role; made by `edgeward token create --role ROLE`.",
        namespaced=False,
        scope="sites",
        at_hub_only=True,
        level=1,
        refs=_token_refs,
        check=_check_token,
        secret_fields=("hash",),
        columns=(
            Column("ROLE", lambda d: d["spec"]["role"]),
            Column("EXPIRES", lambda d: d["spec"]["expires"]),
            Column("LAST USED", lambda d: last_used(d.get("status", {}))),
            Column("SITES", lambda d: ",".join(d["spec"].get("sites", [])), wide=True),
        ),
    )
)


def built_in_roles() -> list[Resource]:
    """The built-in roles as objects, so that they can be listed and read."""
    return [
        Resource(kind="Role", metadata=Metadata(name=name), spec=RoleSpec(list(rules), "built in"))
        for name, rules in BUILT_IN.items()
    ]
