"""A site that holds: the hub's changes wait until the site says so, at every node of it. Pure.

The word is the site's own and never the hub's: it is kept at each node, and passed on between them with their changes;
the later one counts, by a stamp that is later than that of the word before. While a site holds it takes nothing of what
the hub changes, and sends nothing of its own, because the hub's decision on that may be the hub's own version. Who may
come in, and who is of the site, is the hub's to say at any time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edgeward.core.resource import Key
from edgeward.nodes.siblings import LATEST, TICK, Hold
from edgeward.nodes.wire import HubObject

#: Kinds that are taken all the same: a token that was ended, a node that was revoked, stays so.
PASSING = ("Role", "AccessToken", "Node")
#: Objects that are named of those that wait.
_NAMED = 20


def said(held: bool, before: Hold, now: float, node: str, by: str) -> Hold:
    """A person's word at a node."""
    return Hold(held, min(max(now, before.stamp + TICK), LATEST), node, by[:128])


def parted(objects: Iterable[HubObject]) -> tuple[list[HubObject], list[HubObject]]:
    """(what is taken, what waits) of what the hub sends."""
    taken: list[HubObject] = []
    waiting: list[HubObject] = []
    for o in objects:
        (taken if o.kind in PASSING else waiting).append(o)
    return taken, waiting


def status(hold: Hold, waiting: Iterable[Key], since: str) -> dict[str, Any]:
    """What a node says of it; ``since``: the stamp as people read it. Empty where the site does not hold."""
    if not hold.held:
        return {}
    names = sorted({str(k) for k in waiting})
    found: dict[str, Any] = {"since": since, "by": hold.by, "waiting": len(names)}
    if names:
        found["changes"] = [*names[:_NAMED], *([f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else [])]
    return found


def of_site(nodes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What the hub shows of a site whose nodes report these statuses: the word of the one with most that waits."""
    found = [s["hold"] for s in nodes if isinstance(s.get("hold"), dict) and s["hold"]]
    return max(found, key=lambda h: (int(h.get("waiting") or 0), str(h.get("since", ""))), default={})
