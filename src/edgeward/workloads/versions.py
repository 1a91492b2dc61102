"""The versions of an App that a node keeps, and the way back to one of them. Pure.

A node keeps what it ran last, whole; so going back needs neither the hub nor the file that somebody applied. What is
no part of a version (how many, where, after whom, when) stays as it is now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgeward.core.errors import NotFound
from edgeward.workloads.plan import State
from edgeward.workloads.spec import AT_ONCE
from edgeward.workloads.state import Snapshot

_SHOWN = 12


def kept(state: State, find: Callable[[str], Snapshot | None]) -> list[dict[str, Any]]:
    """The versions, the present one last: ``{version, state, message, spec}``. ``find``: a digest's snapshot."""
    known = dict.fromkeys(state.bad, "failed")
    known |= dict.fromkeys(reversed(state.history), "kept")
    for digest, what in ((state.candidate, "candidate"), (state.current, "serves")):
        known.pop(digest, None)  # it comes last
        known |= {digest: what} if digest else {}
    return [
        {"version": d[:_SHOWN], "state": what, "message": state.bad.get(d, ""), "spec": snapshot.spec}
        for d, what in known.items()
        if (snapshot := find(d)) is not None
    ]


def before(items: list[dict[str, Any]], to: str, name: str) -> dict[str, Any]:
    """The version to go back to: the one whose digest begins with ``to``, else the newest that served before the
    present one. Raises ``NotFound``."""
    resource = f"App/{name}"
    if not items:
        raise NotFound(
            "is not kept here", resource=resource, remedy="ask a node that runs it: edgeward get app -o wide"
        )
    if not to:
        past = [i for i in items if i["state"] == "kept"]
        if past:
            return past[-1]
        raise NotFound("has no version before this one", resource=resource, remedy="apply what it should be")
    found = [i for i in items if str(i["version"]).startswith(to[:_SHOWN]) and i["state"] != "serves"]
    if len(found) == 1:
        return found[0]
    known = ", ".join(str(i["version"]) for i in items)
    what = "is one of several versions" if found else "is no version to go back to"
    raise NotFound(f"{to[:64]!r} {what}", resource=resource, remedy=f"see: edgeward app versions {name} ({known})")


def put_back(spec: Mapping[str, Any], past: Mapping[str, Any]) -> dict[str, Any]:
    """The App's spec with that version's program."""
    return {**past["spec"], **{k: v for k, v in spec.items() if k in AT_ONCE}}
