"""One declaration, many sites: what an App is at one of them. Pure.

In: an App with ``perSite`` (site to a merge patch of the spec, RFC 7396) and a site. Out: the App as that site has it,
without ``perSite``. The hub's fold, the quota, what a site is sent and the nodes all ask :func:`effective`, so all of
them mean the same App. A site that is not named has the plain spec: a new site is filled by that alone. A canary of one
site is an entry; :func:`promoted` makes it everybody's, :func:`dropped` takes it back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from edgeward.core.errors import Invalid, NotFound
from edgeward.core.misfit import invalid_from
from edgeward.core.registry import Ref
from edgeward.core.resource import CLUSTER, Resource, check_name, make_patch, merge_patch

#: Where an App is cannot differ by where it is, and what differs does not differ again.
FIXED = ("perSite", "placement")


def replicas_at(app: Resource, site: str) -> int:
    """Instances of ``app`` at ``site``, over its nodes there."""
    patch: Mapping[str, Any] = app.spec.perSite.get(site, {})
    return int(app.spec.replicas if "replicas" not in patch else 1 if patch["replicas"] is None else patch["replicas"])


def effective(app: Resource, site: str) -> Resource:
    """``app`` as ``site`` has it; itself where nothing is said of single sites.

    An entry that does not fit (another release has taken the spec) counts for nothing: the plain spec stands.
    """
    if not app.spec.perSite:
        return app
    plain = msgspec.structs.replace(app.spec, perSite={})
    spec = plain
    if patch := app.spec.perSite.get(site):
        try:
            spec = _merged(plain, patch)
        except msgspec.ValidationError:
            spec = plain
    return msgspec.structs.replace(app, spec=spec)


def _merged(plain: msgspec.Struct, patch: Mapping[str, Any]) -> Any:
    return msgspec.convert(merge_patch(msgspec.to_builtins(plain), patch), type(plain))


# -- for the kind's description ----------------------------------------------------------------------------------------


def checked(check: Callable[[Resource], None]) -> Callable[[Resource], None]:
    """``check`` of the App as each of its sites has it; an error names the field below ``$.spec.perSite``."""

    @functools.wraps(check)
    def everywhere(app: Resource) -> None:
        check(app)
        home = app.spec.placement.site
        for site, patch in app.spec.perSite.items():
            at = f"$.spec.perSite.{site}"
            check_name(site, at)
            if home and site != home:
                raise Invalid(
                    f"the App is placed at site {home!r} only", field=at, remedy="remove it, or $.spec.placement.site"
                )
            for name in FIXED:
                if name in patch:
                    raise Invalid("is the same for all sites", field=f"{at}.{name}", remedy="remove it")
            plain = msgspec.structs.replace(app.spec, perSite={})
            try:
                spec = _merged(plain, patch)
            except msgspec.ValidationError as e:
                whole = merge_patch(msgspec.to_builtins(plain), patch)
                raise invalid_from(e, type(plain), prefix=at, resource=str(app.key), doc=whole) from None
            try:
                check(msgspec.structs.replace(app, spec=spec))
            except Invalid as e:
                e.field = (e.field or "$.spec").replace("$.spec", at, 1)
                raise

    return everywhere


def with_sites(refs: Callable[[Resource], list[Ref]]) -> Callable[[Resource], list[Ref]]:
    """``refs`` of the App as each of its sites has it, and those sites."""

    @functools.wraps(refs)
    def everywhere(app: Resource) -> list[Ref]:
        found = list(refs(app))
        for site in app.spec.perSite:
            at = f"$.spec.perSite.{site}"
            found.append(Ref("Site", CLUSTER, site, at))
            known = {(r.kind, r.namespace, r.name) for r in found}
            for r in refs(effective(app, site)):
                if (r.kind, r.namespace, r.name) not in known:
                    found.append(Ref(r.kind, r.namespace, r.name, r.path.replace("$.spec", at, 1)))
        return found

    return everywhere


# -- a canary at one site ----------------------------------------------------------------------------------------------


def promoted(spec: Mapping[str, Any], site: str) -> dict[str, Any]:
    """A plain spec in which what ``site`` has is what all have; how many there are stays each site's own.

    Other sites keep their entries, without what is now said for all. Raises ``NotFound``.
    """
    sites = dict(_sites(spec, site))
    patch = dict(sites.pop(site))
    own = {"replicas": patch.pop("replicas")} if "replicas" in patch else {}
    plain = {k: v for k, v in spec.items() if k != "perSite"}
    made: dict[str, Any] = merge_patch(plain, patch)
    kept = {}
    for name, other in sites.items():
        if left := make_patch(made, merge_patch(made, other)):
            kept[name] = left
    if own:
        kept[site] = own
    return made | ({"perSite": kept} if kept else {})


def dropped(spec: Mapping[str, Any], site: str) -> dict[str, Any]:
    """A plain spec without what ``site`` has for itself. Raises ``NotFound``."""
    left = {k: v for k, v in _sites(spec, site).items() if k != site}
    return {k: v for k, v in spec.items() if k != "perSite"} | ({"perSite": left} if left else {})


def _sites(spec: Mapping[str, Any], site: str) -> Mapping[str, Any]:
    sites: Mapping[str, Any] = spec.get("perSite") or {}
    if site not in sites:
        raise NotFound(
            f"says nothing of site {site!r} alone",
            field="$.spec.perSite",
            remedy=f"sites: {', '.join(sorted(sites)) or 'none'}",
        )
    return sites
