"""Each site's view of the hub's state, and what changed in it since a revision: pure.

Changes of the store come in, the sites that each of them concerns go out, and a view is made again only when somebody
asks for it after such a change. What a view holds is decided by :func:`edgeward.core.scope.view`; here is only the
index that keeps it from looking at a thousand other sites' objects. A view remembers what left it and what came into it
late, so that a node that was away gets the difference and never hears a name of another site's object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from edgeward.core.registry import kinds
from edgeward.core.resource import Key, Resource
from edgeward.core.scope import NodeView, fingerprint, placed_sites, refs_at, site_of, view
from edgeward.core.store import Entry

#: Kinds whose status is made at the hub and needed at the nodes.
STATUS_DOWN = ("Service", "Site", "Node", "Rollout")
#: Leavings and late comings that a view remembers; a node that was away for more is told the names of all it may keep.
REMEMBERED = 512

_ANY = ""


class Difference(msgspec.Struct):
    """What a node at ``since`` lacks. ``names``: all keys of the view, when what left it is not known any more."""

    changed: list[Key]
    gone: dict[Key, int]
    names: list[Key] | None = None


@dataclass
class SiteView:
    """One site's view as it was last made."""

    #: key -> (desired revision, revision of the status that travels)
    entries: dict[Key, tuple[int, int]] = field(default_factory=dict)
    print: str = ""
    #: The store's revision at which this view last changed.
    changed: int = 0
    #: What is remembered reaches back to this revision.
    floor: int = 0
    left: dict[Key, int] = field(default_factory=dict)
    came: dict[Key, int] = field(default_factory=dict)

    def since(self, revision: int) -> Difference:
        """The difference between what a node had at ``revision`` and now."""
        changed = [k for k, (desired, status) in self.entries.items() if desired > revision or status > revision]
        known = set(changed)
        changed += [k for k, at in self.came.items() if at > revision and k not in known and k in self.entries]
        if revision < self.floor:
            return Difference(changed, {}, sorted(self.entries))
        return Difference(changed, {k: at for k, at in self.left.items() if at > revision})

    def take(self, entries: dict[Key, tuple[int, int]], now: int, *, first: bool) -> None:
        """The view is this from now on."""
        if first:
            self.floor = self.changed = now  # nobody knows what changed before
        elif entries != self.entries:
            self.changed = now
            for key in self.entries.keys() - entries.keys():
                self.left[key] = now
                self.came.pop(key, None)
            for key in entries.keys() - self.entries.keys():
                self.came[key] = now
                self.left.pop(key, None)
            for memory in (self.left, self.came):
                while len(memory) > REMEMBERED:
                    self.floor = max(self.floor, memory.pop(next(iter(memory))))
        if first or entries != self.entries:
            self.print = fingerprint((k, desired) for k, (desired, _) in entries.items())
        self.entries = entries


def _tag(resource: Resource, scope: str) -> str | None:
    """The one site that a resource can concern; _ANY: it may be several; None: none."""
    if scope == "site":
        return site_of(resource)
    if scope == "placed":
        return placed_sites(resource)
    if scope == "sites":
        sites: list[str] = list(resource.spec.sites)
        return None if not sites else sites[0] if len(sites) == 1 and sites[0] != "*" else _ANY
    return _ANY


class Views:
    """The index. ``find`` gives an entry of the store, by key."""

    def __init__(self, find: Callable[[Key], Entry | None]) -> None:
        self._find = find
        #: site -> keys that can only concern it; "" -> keys that may concern any.
        self._at: dict[str, dict[Key, None]] = {}
        self._tag: dict[Key, str] = {}
        #: what is referred to -> those that follow it
        self._followers: dict[Key, set[Key]] = {}
        self._follows: dict[Key, list[Key]] = {}
        #: site -> what it gets of these besides, and the other way round
        self._besides: dict[str, set[Key]] = {}
        self._also: dict[Key, set[str]] = {}
        #: what is used -> sites with something that refers to it, whether it is there or not
        self._users: dict[Key, set[str]] = {}
        self._uses: dict[str, set[Key]] = {}
        self._views: dict[str, SiteView] = {}
        self._stale: set[str] = set()

    # -- changes -----------------------------------------------------------------------------------------------------

    def load(self, resources: Iterable[Resource]) -> None:
        for r in resources:
            self.change(r.key, r)

    def change(self, key: Key, resource: Resource | None, *, status_only: bool = False) -> set[str] | None:
        """The sites whose view may have changed by it; None: any site's.

        A site that was named before and has not asked for its view since may be left out.
        """
        if status_only and key.kind not in STATUS_DOWN:
            return set()
        scope = kinds.get(key.kind).scope
        if scope == "hub":
            return set()
        if scope == "used":
            touched: set[str] | None = set(self._users.get(key, ()))
        elif scope == "follows":
            touched = self._move_follower(key, resource)
        else:
            touched = self._move(key, resource)  # what follows it comes and goes with it, at the same sites
        if touched is None:
            self._stale.update(self._views)
        else:
            self._stale.update(touched & self._views.keys())
        return touched

    def _where(self, key: Key) -> set[str] | None:
        tag = self._tag.get(key)
        return set() if tag is None else None if tag == _ANY else {tag}

    def _move(self, key: Key, resource: Resource | None) -> set[str] | None:
        old = self._tag.get(key)
        new: str | None = None
        if resource is not None:
            scope = kinds.get(key.kind).scope
            new = _tag(resource, scope)
        if old is not None and old != new:
            self._at.get(old, {}).pop(key, None)
        if new is None:
            self._tag.pop(key, None)
        else:
            self._tag[key] = new
            self._at.setdefault(new, {})[key] = None
        tags = {t for t in (old, new) if t is not None}
        return None if _ANY in tags else tags

    def _move_follower(self, key: Key, resource: Resource | None) -> set[str] | None:
        old = self._follows.pop(key, [])
        for target in old:
            self._followers.get(target, set()).discard(key)
        new: list[Key] = []
        if resource is not None:
            new = [Key(r.kind, r.namespace, r.name) for r in kinds.get(key.kind).refs(resource)]
            self._follows[key] = new
            for target in new:
                self._followers.setdefault(target, set()).add(key)
        touched = self._also.pop(key, set())
        for site in touched:
            self._besides.get(site, set()).discard(key)
        if resource is not None and (also := set(kinds.get(key.kind).also(resource))):
            self._also[key] = also
            for site in also:
                self._besides.setdefault(site, set()).add(key)
            touched = touched | also
        for target in (*old, *new):
            where = self._where(target)
            if where is None:
                return None
            touched = touched | where
        return touched

    def reaching(self) -> list[Key]:
        """What is at other sites besides: who of them may ask for it follows from their nodes."""
        return sorted(self._also)

    # -- views -------------------------------------------------------------------------------------------------------

    def of(self, site: str, now: int) -> SiteView:
        """The site's view at the store's revision ``now``."""
        known = self._views.get(site)
        if known is not None and site not in self._stale:
            return known
        first = known is None
        got = known or SiteView()
        got.take(self._make(site), now, first=first)
        self._views[site] = got
        self._stale.discard(site)
        return got

    def resources(self, site: str) -> dict[Key, Resource]:
        """What :func:`~edgeward.core.scope.view` says of a node of this site."""
        mine: list[Resource] = []
        for key in (*self._at.get(site, ()), *self._at.get(_ANY, ())):
            entry = self._find(key)
            if entry is not None:
                mine.append(entry.resource)
        labels = tuple(r.metadata.labels for r in mine if r.kind == "Node" and r.spec.site == site)
        node = NodeView("", site, labels)
        got = view(node, mine)
        keys = dict.fromkeys(f for k in got for f in sorted(self._followers.get(k, ())))
        keys |= dict.fromkeys(sorted(self._besides.get(site, ())))
        follows = [e.resource for f in keys if (e := self._find(f))]
        uses = {
            Key(ref.kind, ref.namespace, ref.name)
            for r in (*got.values(), *follows)
            for ref in refs_at(r, site)
            if kinds.get(ref.kind).scope == "used"
        }
        for key in self._uses.get(site, set()) - uses:
            self._users.get(key, set()).discard(site)
        for key in uses - self._uses.get(site, set()):
            self._users.setdefault(key, set()).add(site)
        self._uses[site] = uses
        used = [e.resource for k in sorted(uses) if (e := self._find(k))]
        return view(node, [*got.values(), *follows, *used]) if follows or used else got

    def _make(self, site: str) -> dict[Key, tuple[int, int]]:
        made: dict[Key, tuple[int, int]] = {}
        for key in self.resources(site):
            entry = self._find(key)
            if entry is not None:
                made[key] = (entry.revision, entry.seen if key.kind in STATUS_DOWN else 0)
        return made

    def followers(self, key: Key) -> list[Key]:
        """What is where ``key`` is (an App's Services)."""
        return sorted(self._followers.get(key, ()))

    def elsewhere(self, key: Key, site: str, sites: Iterable[str], now: int) -> bool:
        """Whether any of ``sites`` but ``site`` has ``key`` in its view."""
        tag = self._tag.get(key)
        if tag is not None and tag != _ANY:
            return tag != site
        return any(key in self.of(s, now).entries for s in sites if s != site)
