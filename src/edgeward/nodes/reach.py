"""How far a node's word goes: its own site's objects, its own status, nothing of other sites. Pure.

A node that was broken into speaks with its own key, so what it sends is judged as if it did: in come a change or a
report and what the site's view holds, out comes what of it counts, or a refusal. That it can speak for no other node
is NATS's business (``identity.node_permissions``); which kinds a site may write at all is ``core/scope.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from edgeward.core.errors import Invalid
from edgeward.core.registry import kinds
from edgeward.core.resource import Key, Resource, from_stored, to_stored
from edgeward.core.scope import hub_fields, placed_sites, refs_at

#: Written by the hub into a Node's status; a node's word on them counts for nothing.
_HUBS = ("online", "since", "revoked", "notTold", "credentials", "verdict", "evidence")


def check_known(key: Key, site: str, *, there: bool, known: bool) -> None:
    """Refuses a change of an object of the hub that the site does not have. There or not: the same refusal."""
    if there and not known:
        raise Invalid(
            f"does not concern site {site}", resource=str(key), remedy="write it at the hub, or take another name"
        )


def check_refs(resource: Resource, site: str, known: Callable[[Key], bool], elsewhere: Callable[[Key], bool]) -> None:
    """Refuses what would bring the site something that it does not have, or bring itself to other sites.

    Else a node could have any Secret sent to it by an App of its own that uses it.
    """
    kind = kinds.get(resource.kind)
    for ref in refs_at(resource, site):
        key = Key(ref.kind, ref.namespace, ref.name)
        if not ref.must:
            continue  # it brings nothing, and what it says of others is the hub's to say
        if not known(key):
            raise Invalid(
                f"there is no {ref.kind} {ref.name!r} at site {site}",
                resource=str(resource.key),
                field=ref.path,
                remedy=f"have something at this site use it by a change at the hub, or make a {ref.kind} here",
            )
        if kind.scope == "follows" and elsewhere(key):
            raise Invalid(
                f"other sites have {key} too, and would get this with it",
                resource=str(resource.key),
                field=ref.path,
                remedy="write it at the hub",
            )


def pinned(local: Resource, hub: Resource | None, site: str) -> Resource:
    """The object as the site may have it written: what it places anew is placed at this site, not everywhere.

    Fields that are the hub's to say stay as the hub has them.
    """
    if kept := hub_fields(local, hub):
        local = msgspec.structs.replace(local, spec=msgspec.structs.replace(local.spec, **kept))
    if kinds.get(local.kind).scope != "placed" or placed_sites(local):
        return local
    mine = to_stored(local)
    if hub is not None and to_stored(hub).spec.get("placement") == mine.spec.get("placement"):
        return local
    mine.spec = {**mine.spec, "placement": {**(mine.spec.get("placement") or {}), "site": site}}
    return msgspec.structs.replace(local, spec=from_stored(mine).spec)


def own_status(reported: Mapping[str, Any]) -> dict[str, Any]:
    """What a node may say of itself."""
    return {k: v for k, v in reported.items() if k not in _HUBS}


def went_back(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[int, int] | None:
    """(from, to) when the node's audit has fewer records than it once had: its end was cut off, or it was wiped."""
    before, now = _last(old), _last(new)
    return (before, now) if now < before else None


def _last(status: Mapping[str, Any]) -> int:
    audit = status.get("audit")
    last = audit.get("last", 0) if isinstance(audit, Mapping) else 0
    return last if isinstance(last, int) else 0
