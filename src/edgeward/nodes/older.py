"""A hub and nodes of different releases: what an older side is not told, and what it must not undo. Pure.

Every kind and field says from which *level* on it is known (:attr:`~edgeward.core.registry.Kind.level`,
:attr:`~edgeward.core.registry.Kind.newer`); a node says its level when it syncs, and the hub says its own. An older
release reads neither a kind nor a field that it does not know, and one such object would stop its whole sync. So the
hub leaves them out, and says so (:func:`left_out`). What a node cannot know it cannot mean to remove, either: a change
that comes from it keeps these fields as the hub has them (:func:`put_back`). A newer node with an older hub refuses
locally what the hub could not take (:func:`check_level`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from edgeward.core.errors import Refused
from edgeward.core.registry import kinds
from edgeward.core.resource import Key, Resource, Stored, to_stored

#: What a hub knows that does not say its level.
UNSAID = 1
#: Left out of a node's status beyond this many.
_MOST = 20


def _paths(kind: str, level: int) -> list[list[str]]:
    known = kinds.named(kind)
    return [path.split(".") for path, since in (known.newer if known else {}).items() if since > level]


def _get(spec: Any, path: list[str]) -> Any:
    for part in path:
        spec = spec.get(part) if isinstance(spec, Mapping) else None
    return spec


def _set(spec: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy with ``value`` at ``path``; None takes it away."""
    head, *rest = path
    if rest:
        inner = spec.get(head)
        return {**spec, head: _set(inner if isinstance(inner, Mapping) else {}, rest, value)}
    return {k: v for k, v in spec.items() if k != head} | ({} if value is None else {head: value})


def unknown_fields(stored: Stored, level: int) -> list[str]:
    """The fields of a document that a release of ``level`` does not know, as ``$.spec.x``; a part of which nothing is
    said (``{}``, as each App has some) is none that it could miss."""
    return ["$.spec." + ".".join(p) for p in _paths(stored.kind, level) if _get(stored.spec, p) not in (None, {}, [])]


def trimmed(stored: Stored, level: int) -> Stored:
    """The document as a release of ``level`` can read it."""
    spec = stored.spec
    for path in _paths(stored.kind, level):
        if _get(spec, path) is not None:
            spec = _set(spec, path, None)
    return stored if spec is stored.spec else msgspec.structs.replace(stored, spec=spec)


def put_back(change: Stored, hub: Resource | None, level: int) -> Stored:
    """What a node of ``level`` sends, with the fields that it was not told of as the hub has them."""
    if hub is None or hub.kind != change.kind:
        return change
    had, spec = to_stored(hub).spec, change.spec
    for path in _paths(change.kind, level):
        value = _get(had, path)
        if value is not None and _get(spec, path) is None:
            spec = _set(spec, path, value)
    return change if spec is change.spec else msgspec.structs.replace(change, spec=spec)


def left_out(resources: Iterable[Resource], level: int) -> list[str]:
    """What of a site's objects a node of ``level`` is not told, in words for people; the first of many."""
    found: list[str] = []
    for r in resources:
        kind = kinds.named(r.kind)
        if kind is not None and kind.level > level:
            found.append(str(r.key))
        elif kind is not None and kind.newer:
            found += [f"{r.key} {field}" for field in unknown_fields(to_stored(r), level)]
    found.sort()
    more = len(found) - _MOST
    return found[:_MOST] + ([f"and {more} more"] if more > 0 else [])


def check_level(new: Resource | None, key: Key, level: int) -> None:
    """Raises ``Refused`` for what a hub of ``level`` could not read: it would be lost there."""
    kind = kinds.named(key.kind)
    fields = unknown_fields(to_stored(new), level) if new is not None else []
    if (kind is not None and kind.level > level) or fields:
        raise Refused(
            f"the hub is of an earlier release that does not know {'this field' if fields else key.kind}",
            resource=str(key),
            field=fields[0] if fields else "",
            remedy="upgrade the hub first",
        )
