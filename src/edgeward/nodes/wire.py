"""What hub and node say to one another over the link (msgpack; subjects in docs/architecture.md). Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from edgeward.core.resource import Key, Stored
from edgeward.nodes.ancestry import Ancestor


class HubObject(msgspec.Struct, omit_defaults=True):
    """The hub's side of an object in a sync; ``stored`` None says that it is gone for this node."""

    kind: str
    namespace: str
    name: str
    revision: int
    stored: Stored | None = None
    status: dict[str, Any] | None = None

    @property
    def key(self) -> Key:
        return Key(self.kind, self.namespace, self.name)


class LocalChange(msgspec.Struct, omit_defaults=True):
    """A change made at the node that the hub has not decided yet. ``op``: put or delete.

    ``base``: the hub's revision that the node knew when it made change ``first``.
    """

    seq: int
    kind: str
    namespace: str
    name: str
    op: str
    base: int
    time: float
    actor: str
    stored: Stored | None = None
    #: The first change that this one goes on from without an answer; 0 from nodes that do not say.
    first: int = 0
    #: ``time`` by the hub's clock, as the node knows it; 0: it does not.
    made: float = 0.0
    #: Changes of the site's nodes that this one was made on top of: (node, store, seq), the last one of each store.
    over: list[tuple[str, str, int]] = []

    @property
    def key(self) -> Key:
        return Key(self.kind, self.namespace, self.name)


#: The level of this release, one more whenever the kinds or their fields become more: what was added names it
#: (``Kind.level``, ``Kind.newer``). 1: Role, AccessToken. 2: all that came after the release in tests/data.
LEVEL = 2


class SyncAsk(msgspec.Struct, omit_defaults=True):
    """``since``/``epoch``: what the node has. ``after``: continue a paged answer behind this key.

    ``level``: kinds and fields up to this level are known to the node (:attr:`edgeward.core.registry.Kind.level`).
    ``share``: this node and those of the site that get the answer from it, so it comes signed and they are not poked.
    """

    since: int
    epoch: str
    after: tuple[str, str, str] | None = None
    level: int = 0
    share: list[str] = []


class SyncAnswer(msgspec.Struct, omit_defaults=True):
    """``view`` is the fingerprint of all the node should hold after applying this (last page only).

    ``line``: which stores this one was restored from, for a node that comes from another epoch.
    ``names``: the keys of all it may keep, when the hub does not know any more what left its view (last page only).
    ``level``: the hub's; 0 of a release that does not say. ``signed`` stands for all else where it is to be shared: an
    encoded answer, with the hub's signature of it for the site (``shares.py``).
    """

    epoch: str = ""
    revision: int = 0
    full: bool = False
    objects: list[HubObject] = []
    more: bool = False
    view: str = ""
    error: str = ""
    line: list[Ancestor] = []
    names: list[tuple[str, str, str]] | None = None
    level: int = 0
    signed: bytes = b""
    proof: bytes = b""


class PushAsk(msgspec.Struct, omit_defaults=True):
    store: str  #: id of the node's replica, so that a wiped node's sequence numbers mean nothing
    changes: list[LocalChange]
    #: The node of the same site that made them, when another one sends them in its name. From level 2 on.
    of: str = ""


class Decided(msgspec.Struct, omit_defaults=True):
    seq: int
    outcome: str  #: accept | override | same | reject | invalid
    why: str
    now: HubObject
    journal: dict[str, Any] | None = None


class PushAnswer(msgspec.Struct, omit_defaults=True):
    decided: list[Decided] = []
    error: str = ""


class Status(msgspec.Struct, omit_defaults=True):
    kind: str
    namespace: str
    name: str
    status: dict[str, Any] | None


class ReportAsk(msgspec.Struct, omit_defaults=True):
    """Reported state: deltas, or all of it (``full``). ``events``: records with the node's own ``seq``."""

    statuses: list[Status]
    full: bool = False
    node: dict[str, Any] | None = None
    events: list[dict[str, Any]] = []
    #: What the site's majority says of each of its nodes (``verdict``, ``evidence``); only from who speaks for it.
    site: dict[str, dict[str, Any]] | None = None


class BeatAsk(msgspec.Struct, omit_defaults=True):
    """The first beat of a run, and the first after any doubt. An empty message says: as before, nothing new."""

    n: int
    start: str = ""  #: id of this run of the agent
    view: str = ""  #: fingerprint of what the node holds of the hub's state
    rtt: float = 0.0  #: seconds that an answer takes on this node's link, to half a second


class BeatAnswer(msgspec.Struct, omit_defaults=True):
    """The answer to a beat that says something. An empty message says: as before, nothing new."""

    revision: int = 0  #: above the node's own: it should sync
    hub: str = ""  #: id of this run of the hub: a new one wants a full report
    epoch: str = ""
    error: str = ""
    sync: bool = False  #: what the node holds is not what it should hold
    short: bool = False  #: this hub takes empty beats
    spread: float = 0.0  #: seconds over which the fleet should spread what a new hub wants of it
    now: float = 0.0  #: the hub's time, seconds since 1970


class Ok(msgspec.Struct, omit_defaults=True):
    error: str = ""
    now: float = 0.0  #: the hub's time: reports stand in for beats


class ReachAsk(msgspec.Struct, omit_defaults=True):
    """``ew.hub.reach.<node>``: whether the hub reaches these nodes of the asker's site."""

    nodes: list[str]


class ReachAnswer(msgspec.Struct, omit_defaults=True):
    """What each of them says now (a packed :class:`~edgeward.nodes.voting.Told`); who is not named was not reached."""

    told: dict[str, bytes] = {}
    error: str = ""
