"""Where a store of the hub comes from, and what that means for who was ahead of it: pure decisions.

A hub restored from a backup is a new *epoch* of its store: its objects get new revisions, all above any that were ever
given out, and each remembers the revision it had before. The *line* of a store lists the epochs before it, and up to
which revision each of them is in it. With that a node sees what it holds that the restored hub does not know (it keeps
that, and sends it as a change of its own), and the hub sees whether what it holds is what such a change was made on.
Nobody's numbers go back: a lower revision is always an older epoch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

#: Epochs that a store remembers.
LINE_MOST = 32


class Ancestor(msgspec.Struct, frozen=True):
    """An epoch that a store was restored from."""

    epoch: str
    #: The last revision of that epoch that is in the backup.
    revision: int
    #: The last revision that restoring wrote: what is above was changed after it.
    first: int


def newer_than(epoch: str, line: Sequence[Ancestor], hub_epoch: str, hub_line: Sequence[Ancestor]) -> int | None:
    """The revision above which a node of ``epoch`` (with its ``line``) holds what the hub's store does not have.

    None: nothing of it, because it is the same store, or because the two have nothing in common (the hub was made
    anew: what it says stands). Lines are oldest first.
    """
    if not epoch or epoch == hub_epoch:
        return None
    for ancestor in reversed(hub_line):
        if ancestor.epoch == epoch:
            return ancestor.revision
    # both were restored from the same store, or the hub is the very one that this node's was restored from
    common = {a.epoch for a in hub_line} | {hub_epoch}
    if line and any(a.epoch in common for a in line):
        return line[-1].first
    return None


def base_now(base: int, line: Sequence[Ancestor], *, revision: int, was: int, deleted: int) -> int:
    """A change's base, made in an earlier epoch, in the numbers of the restored store.

    ``revision``: what the hub holds now (0: no such object), ``was``: the revision that it had in the backup (0: it
    was written since), ``deleted``: the revision at which it was last deleted (0: never that anybody knew). The answer
    equals ``revision`` when the hub's object is the one that the change was made on, or an older one; else the change
    met another one of the hub's, and the object's own rule decides.
    """
    if not line or not base or base > line[-1].first:
        return base
    if revision:
        return revision if was and was <= base else base
    # not in the backup, but known at the node: it was made after the backup, so nobody else ever changed it here
    return 0 if base > line[-1].revision and deleted <= line[-1].first else base
