"""Quotas of a namespace: what is declared in it may add up to no more. Pure.

In: the namespace's quota, what is in it, and the resource that is to be written. Out: nothing, or a refusal that names
the field and the numbers. What one resource uses is said by its kind (:attr:`~edgeward.core.registry.Kind.usage`), so
nothing here knows an App. Replicas count per site, so sums are those of one site; where a resource is not the same at
all sites (:attr:`~edgeward.core.registry.Kind.at`), those of each site that one names are looked at. A quota that is
lowered below what is there ends nothing; it refuses growth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from edgeward.core.errors import Invalid, Refused
from edgeward.core.quantity import format_bytes
from edgeward.core.registry import kinds
from edgeward.core.resource import Resource

#: Used of each quota's field; None: as much as it likes, which a quota of that field does not allow.
Usage = Mapping[str, float | None]

_IN_BYTES = ("memory", "bytes")
_REMEDY = {
    "apps": "delete one, or ask for a higher quota",
    "cpu": "lower limits.cpu or replicas, or ask for a higher quota",
    "memory": "lower limits.memory or replicas, or ask for a higher quota",
    "bytes": "lower bounds.bytes, or ask for a higher quota",
}
_UNBOUNDED = {"cpu": "$.spec.limits.cpu", "memory": "$.spec.limits.memory"}


def used(resources: Iterable[Resource], site: str = "") -> dict[str, float]:
    """What resources use together at a site; ``""``: at one that none names."""
    total: dict[str, float] = {}
    for r in resources:
        if r.metadata.deletionTimestamp:
            continue
        kind = kinds.get(r.kind)
        for name, value in kind.usage(kind.at(r, site)).items():
            total[name] = total.get(name, 0.0) + (value or 0.0)
    return total


def check(namespace: str, quota: Mapping[str, float], present: Sequence[Resource], new: Resource) -> None:
    """Raises when ``new`` takes more than ``quota`` leaves. ``present``: all in the namespace, ``new`` too."""
    others = [r for r in present if r.key != new.key]
    before = [r for r in present if r.key == new.key]
    named = {s: None for r in (*present, new) for s in _sites(r)}
    # what is the same everywhere is counted once: there may be a thousand sites
    same = used(r for r in others if not _sites(r))
    differ = [r for r in others if _sites(r)]
    for site in ("", *sorted(named)):
        total = used(differ, site=site)
        total |= {name: total.get(name, 0.0) + value for name, value in same.items()}
        _check_at(site, namespace, quota, total, used(before, site=site), new)


def _sites(resource: Resource) -> Collection[str]:
    return kinds.get(resource.kind).sites(resource)


def _check_at(
    site: str,
    namespace: str,
    quota: Mapping[str, float],
    others: Mapping[str, float],
    before: Mapping[str, float],
    new: Resource,
) -> None:
    """``others``, ``before``: what is used there by all but ``new``, and by what it replaces."""
    kind = kinds.get(new.kind)
    wanted = kind.usage(kind.at(new, site))
    where = f" at site {site}" if site else ""
    asked = {name: value for name, value in wanted.items() if name in quota}
    if not asked:
        return
    for name, value in asked.items():
        if value is None:
            raise Invalid(
                f"is required{where}: namespace {namespace!r} has a quota of {name}",
                resource=str(new.key),
                field=_UNBOUNDED.get(name, "$.spec"),
                remedy="set it",
            )
        total = others.get(name, 0.0) + value
        if total > quota[name] and value > before.get(name, 0.0):
            raise Refused(
                f"namespace {namespace!r} may have {_shown(name, quota[name])} of {name}{where}, "
                f"it has {_shown(name, others.get(name, 0.0))} and this would take {_shown(name, value)}",
                resource=str(new.key),
                remedy=_REMEDY.get(name, "ask for a higher quota"),
            )


def _shown(name: str, value: float) -> str:
    return format_bytes(int(value)) if name in _IN_BYTES else f"{value:g}"
