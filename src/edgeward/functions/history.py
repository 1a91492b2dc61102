"""The last versions that were declared of a function: what hub and node keep so that there is a way back. Pure.

What is kept is the *code* of a Function: all of its fields but those that say how much, where and how it is looked
after (``spec.POLICY``). Going back writes that code into the Function as it is now, by the ordinary way: with its
rights, its audit and its rules for conflicts; at a cut site it is a change like any other. Digests are what nodes
reported of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from edgeward.core.errors import NotFound
from edgeward.functions.spec import POLICY

#: Versions that are kept, the present one among them.
KEPT = 3
_DIGESTS = 8


class Past(msgspec.Struct, omit_defaults=True):
    """One version. ``first`` and ``last``: the generations of the Function that had this code, the last time."""

    spec: dict[str, Any]
    first: int
    last: int
    #: When it was last declared, RFC 3339.
    at: str
    #: The generation that last declared it for all calls; 0: it was only a canary.
    stood: int = 0
    digests: list[str] = []

    def shown(self) -> dict[str, Any]:
        """As the API gives it."""
        return {
            "version": self.digests[-1] if self.digests else "",
            "digests": self.digests,
            "generation": self.last,
            "declared": self.at,
            "stood": self.stood,
            "spec": self.spec,
        }


def code_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec that make its version."""
    return {k: v for k, v in spec.items() if k not in POLICY}


def declared(known: Sequence[Past], spec: Mapping[str, Any], generation: int, at: str) -> list[Past]:
    """What is to be kept once ``spec`` is declared; the last one is the present."""
    code, stood = code_of(spec), generation if spec.get("canary") is None else 0
    found = next((p for p in known if p.spec == code), None)
    if found is not None and found is known[-1]:
        now = msgspec.structs.replace(found, last=max(generation, found.last), stood=stood or found.stood)
        return [*known[:-1], now]
    now = Past(code, generation, generation, at, stood)
    if found is not None:
        now = msgspec.structs.replace(now, stood=stood or found.stood, digests=found.digests)
    return _bounded([*(p for p in known if p is not found), now])


def _bounded(kept: list[Past]) -> list[Past]:
    """What was only a canary goes first, then the oldest: a row of canaries leaves the way back."""
    while len(kept) > KEPT:
        kept.remove(min(kept[:-1], key=lambda p: (p.stood, p.last)))
    return kept


def reported(known: Sequence[Past], told: Iterable[tuple[int, str]]) -> list[Past]:
    """With what nodes say: the digest of what was declared, by generation."""
    if not known:
        return []
    now, new = known[-1], list[str]()
    for generation, digest in told:
        if digest and now.first <= generation <= now.last and digest not in now.digests + new:
            new.append(digest)
    if not new:
        return list(known)
    return [*known[:-1], msgspec.structs.replace(now, digests=(now.digests + new)[-_DIGESTS:])]


def told_by(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[int, str]]:
    """From nodes' statuses: generation, and the digest of what was declared with it."""
    found = []
    for _, r in sorted(reports.items()):
        digest = r.get("wanted") or (r.get("canary") or {}).get("version") or r.get("version") or ""
        found.append((int(r.get("observedGeneration") or 0), str(digest)))
    return found


def back_of(known: Sequence[Past], spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """The code that last had all calls, of what is kept but ``spec`` itself; None where there is none."""
    past = _back(known, spec)
    return past.spec if past is not None else None


def _back(known: Sequence[Past], spec: Mapping[str, Any]) -> Past | None:
    code = code_of(spec)
    past = max((p for p in known if p.spec != code), key=lambda p: p.stood, default=None)
    return past if past is not None and past.stood else None


def back_is(known: Sequence[Past], spec: Mapping[str, Any], digest: str) -> list[Past]:
    """With the digest of :func:`back_of`'s, when it is known."""
    past = _back(known, spec)
    if past is None or not digest or digest in past.digests:
        return list(known)
    named = msgspec.structs.replace(past, digests=[*past.digests, digest][-_DIGESTS:])
    return [named if p is past else p for p in known]


def before(items: list[dict[str, Any]], to: str, name: str) -> dict[str, Any]:
    """The version to go back to, of those that the API gives: the one with the digest ``to`` (its first digits), else
    the newest before the present that had all calls. Raises ``NotFound``."""
    resource = f"Function/{name}"
    if not to:
        past = max(items[:-1], key=lambda p: int(p["stood"]), default=None)
        if past is not None and past["stood"]:
            return past
        raise NotFound("has no version before this one here", resource=resource, remedy="apply what it should be")
    found = [p for p in items if any(str(d).startswith(to) for d in p.get("digests", []))]
    if len(found) == 1:
        return found[0]
    kept = ", ".join(str(p["version"]) for p in items if p.get("version"))
    what = "is one of several versions" if found else "is no version that is kept"
    raise NotFound(f"{to[:64]!r} {what}", resource=resource, remedy=f"see: edgeward functions versions ({kept})")


def state_of(item: Mapping[str, Any], status: Mapping[str, Any], *, last: bool) -> str:
    """What a kept version is now, by the Function's status: stable, canary, taken back, declared or kept."""
    digests = set(item.get("digests", []))
    trying = str((status.get("canary") or {}).get("version", ""))
    for state, told in (
        ("canary", trying),
        ("stable", str(status.get("version", ""))),
        ("taken back", str(status.get("takenBack", ""))),
    ):
        if digests & set(told.split(",")):
            return state
    return "declared" if last else "kept"


def put_back(spec: Mapping[str, Any], past: Mapping[str, Any]) -> dict[str, Any]:
    """The Function's spec with the code of that version for all calls."""
    policy = {k: v for k, v in spec.items() if k in POLICY and k != "canary"}
    return {**past["spec"], **policy}
