"""What becomes of a local change when it meets the hub: pure decisions, no I/O.

In: the rule (`metadata.conflict`), what the hub holds now, what the site changed and on which revision. Out: one of
*accept* (write it), *override* (it is shared with other sites: it stays this site's), *same* (nothing to do) or
*reject* (the hub's state stands), and which side lost, if any. See "Local control" in docs/concepts.md.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edgeward.core.resource import ConflictRule

Outcome = Literal["accept", "override", "same", "reject"]
Loser = Literal["", "cloud", "edge"]


class Side(msgspec.Struct, frozen=True):
    """One side's state of an object: ``revision`` 0 and ``exists`` False when it is not there."""

    exists: bool
    revision: int = 0
    time: float = 0.0


class Decision(msgspec.Struct, frozen=True):
    outcome: Outcome
    loser: Loser
    why: str


def decide(
    *, rule: ConflictRule, base: int, hub: Side, edge: Side, same: bool, shared: bool, hub_tombstone: int = 0
) -> Decision:
    """Decides one local change.

    ``base``: the hub revision the site had when it made its first unsent change (0: it knew of none).
    ``same``: both sides want the same. ``shared``: other sites use the object too.
    ``hub_tombstone``: the revision of the hub's deletion, when it was deleted.
    """
    if same or (not hub.exists and not edge.exists):
        return Decision("same", "", "both sides want the same")
    keep: Outcome = "override" if shared and edge.exists and hub.exists else "accept"
    hub_now = hub.revision if hub.exists else hub_tombstone
    changed_at_hub = hub.exists != (base > 0) or (hub.exists and hub.revision != base)
    if not hub.exists and base == 0:
        # created at the site, unknown to the hub; a tombstone from before is no change that the site missed
        changed_at_hub = False
    if shared and not edge.exists and hub.exists:
        return Decision("reject", "edge", "other sites use it: a site cannot delete it, only override it")
    if not changed_at_hub:
        return Decision(keep, "", "changed at the site only")
    what = "deleted" if not hub.exists else "changed"
    if rule == "cloud":
        return Decision("reject", "edge", f"{what} at the hub too (revision {hub_now}); the rule is cloud")
    if rule == "edge":
        loser: Loser = "" if keep == "override" else "cloud"
        return Decision(keep, loser, f"{what} at the hub too (revision {hub_now}); the rule is edge")
    if edge.time > hub.time:
        return Decision(
            keep, "" if keep == "override" else "cloud", f"{what} at the hub too, the site's change is newer"
        )
    return Decision("reject", "edge", f"{what} at the hub too, and later; the rule is newest")
