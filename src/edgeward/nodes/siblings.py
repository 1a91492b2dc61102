"""What the nodes of a site tell one another of the changes that people made at them: pure decisions, no I/O.

A change made at one node is *open* until the hub decided it. It carries who made it where (a :class:`Dot`: node, store,
number), what it was made on top of (``seen``: the last number of each store whose changes of this object its writer had
before him), and a ``stamp``: the time by the hub's clock, but always later than that of whatever it was made on top of.
So a later change replaces the earlier one in silence, as on one node; of two that did not know of each other the one
with the higher (stamp, node, store, number) stands at every node alike, in whatever order they meet, and the other one
is lost, which is for the journal.

Nodes only pull. One asks with a :class:`Digest` of what it holds open; the other answers with what that one lacks, and
with what is open no more (:class:`Finished`) because its origin, or the hub, said so. Keeping it is the business of
``agent/shared.py``, carrying it of ``nodes/siblings_edge.py``; what the hub makes of it is in ``nodes/takeover.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from edgeward.core.resource import Key, Stored
from edgeward.nodes.wire import HubObject

#: Open changes that a digest names, bytes of changes in an answer, and stores that ``seen`` may name.
MOST, PAGE, SEEN_MOST = 4000, 1 << 20, 256
#: What a change's stamp is later than the one that it was made on top of, in seconds.
TICK = 0.001
#: The latest stamp (the year 5138) and the highest number that are believed. A node's own may go on from those.
LATEST, HIGHEST = 1e11, 1 << 53
#: Characters of a node's, a store's, a person's name.
LONGEST = 1024


class Dot(NamedTuple):
    """One change: the node and the replica that it was made at, and its number there."""

    node: str
    store: str
    seq: int

    @property
    def origin(self) -> str:
        return f"{self.node}/{self.store}"


class _Dotted(msgspec.Struct, omit_defaults=True):
    """A change of an object, by where it was made."""

    node: str
    store: str
    seq: int
    kind: str
    namespace: str
    name: str

    @property
    def key(self) -> Key:
        return Key(self.kind, self.namespace, self.name)

    @property
    def dot(self) -> Dot:
        return Dot(self.node, self.store, self.seq)


class SiteChange(_Dotted, omit_defaults=True):
    """A change of the site that the hub has not decided yet, as nodes pass it on. ``op``: put or delete."""

    op: str
    #: The hub's revision that the first of the changes that this one goes on from was made on.
    base: int
    #: Seconds since 1970 by the hub's clock, as far as the node knew it, and later than all that is ``seen``.
    stamp: float
    actor: str
    stored: Stored | None = None
    #: origin -> the last number of it, of this object, that this change replaces.
    seen: dict[str, int] = {}


class Finished(_Dotted, omit_defaults=True):
    """A change that is open no more: what the hub holds since, if known, and its decision, if it was asked for it."""

    #: In the numbers of the hub's store ``epoch``.
    now: HubObject | None = None
    epoch: str = ""
    #: Of the hub's decision; empty where the change was replaced or lost within the site.
    outcome: str = ""
    why: str = ""
    journal: dict[str, Any] | None = None


class Digest(msgspec.Struct, omit_defaults=True):
    """What a node holds open: (kind, namespace, name, node, store, seq) of each."""

    node: str
    store: str
    open: list[tuple[str, str, str, str, str, int]] = []


class Hold(msgspec.Struct, frozen=True, omit_defaults=True):
    """The site's last word on whether the hub's changes wait (``holding.py``): ``stamp`` in seconds since 1970; ``by``
    whom, at which ``node``. Before any: they do not."""

    held: bool = False
    stamp: float = 0.0
    node: str = ""
    by: str = ""

    def later(self, other: Hold) -> bool:
        """At the same time, and so at the last of times, whoever releases counts."""
        return (self.stamp, not self.held, self.node) > (other.stamp, not other.held, other.node)

    @property
    def sound(self) -> bool:
        """Whether a node may say so."""
        return 0 <= self.stamp <= LATEST and max(len(self.node), len(self.by)) <= LONGEST


class Answer(msgspec.Struct, omit_defaults=True):
    """``upto`` and ``mine``: all changes of the answering node up to that number are finished, but for these."""

    node: str
    store: str
    upto: int = 0
    mine: list[int] = []
    changes: list[SiteChange] = []
    finished: list[Finished] = []
    more: bool = False
    #: The site's last word on holding, as this node has it.
    hold: Hold = Hold()


class Horizon(msgspec.Struct):
    """What is known of an origin's changes, by its own word: those up to ``upto`` are finished but for ``open``."""

    upto: int
    open: list[int] = []

    def finished(self, seq: int) -> bool:
        return seq <= self.upto and seq not in self.open


class Lost(NamedTuple):
    """A change that another one, which did not know of it, stands against."""

    change: SiteChange
    winner: SiteChange


class Meeting(NamedTuple):
    """``take``: theirs is what counts here from now on. ``seen``: of whichever counts, both together."""

    take: bool
    seen: dict[str, int]
    lost: Lost | None = None


def rank(change: SiteChange) -> tuple[float, str, str, int]:
    """By this, changes of one object that did not know of each other stand against each other, at every node alike."""
    return (change.stamp, *change.dot)


def covers(change: SiteChange, other: SiteChange) -> bool:
    """Whether ``change`` was made on top of ``other``, or is it."""
    if change.dot.origin == other.dot.origin:
        return change.seq >= other.seq
    return change.seen.get(other.dot.origin, 0) >= other.seq


def together(seen: Mapping[str, int], *more: Mapping[str, int]) -> dict[str, int]:
    found = dict(seen)
    for other in more:
        for origin, seq in other.items():
            found[origin] = max(seq, found.get(origin, 0))
    return found


def meet(mine: SiteChange | None, theirs: SiteChange) -> Meeting:
    """What becomes of an open change that comes from another node, where ``mine`` is held of the same object."""
    if mine is None:
        return Meeting(True, theirs.seen)
    if mine.dot == theirs.dot:
        return Meeting(False, together(mine.seen, theirs.seen))
    seen = together(mine.seen, theirs.seen)
    if covers(mine, theirs) or covers(theirs, mine):
        take = not covers(mine, theirs)
        lost = None
    else:
        take = rank(theirs) > rank(mine)
        lost = Lost(mine, theirs) if take else Lost(theirs, mine)
    gone = mine if take else theirs
    return Meeting(take, together(seen, {gone.dot.origin: gone.seq}), lost)


def answer(
    ask: Digest,
    upto: int,
    mine: Mapping[Key, SiteChange],
    gone: Callable[[Dot, Key], Finished | None],
    me: tuple[str, str],
) -> Answer:
    """What the asking node lacks of ``mine``. ``gone``: what is known of a change that is finished, None of another."""
    held = {Key(*entry[:3]): Dot(*entry[3:]) for entry in ask.open}
    got = Answer(*me, upto, sorted(c.seq for c in mine.values() if (c.node, c.store) == me))
    got.finished = [f for key, dot in held.items() if (f := gone(dot, key)) is not None]
    size = 0
    for key in sorted(mine):
        change = mine[key]
        theirs = held.get(key)
        if theirs is not None and theirs.origin == change.dot.origin and theirs.seq >= change.seq:
            continue
        size += len(msgspec.msgpack.encode(change))
        if got.changes and size > PAGE:
            got.more = True
            break
        got.changes.append(change)
    return got


def record(lost: Lost, site: str, doc: dict[str, Any] | None, at: str) -> dict[str, Any]:
    """The journal's entry of a loss. ``doc``: the lost document without secrets; ``at``: when it was made, RFC 3339."""
    change, winner = lost
    entry: dict[str, Any] = {
        "resource": str(change.key), "kind": change.kind, "namespace": change.namespace, "name": change.name,
        "site": site, "node": change.node, "actor": change.actor, "op": change.op, "madeAt": at,
        "outcome": "replaced", "loser": "edge", "rule": "newest",
        "why": f"{winner.actor} changed it at {winner.node} too, and later, while the two did not hear each other",
    }  # fmt: skip
    if doc is not None:
        entry["lost"] = doc
    return entry
