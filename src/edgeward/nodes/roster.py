"""Where each node stands, and what it may see of the hub's state, in the form that its release reads.

In: nodes as they come, move and go. Out: the view of a node's site (``views.py``) and its objects, encoded once for all
nodes that get the same. A node of an earlier release gets what that knows (``older.py``). Nothing here talks to a node:
what is sent when is decided in ``cloud.py``.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edgeward.core.errors import Invalid
from edgeward.core.registry import kinds, whole_status
from edgeward.core.resource import (
    CLUSTER,
    Key,
    Resource,
    to_stored,
)
from edgeward.core.scope import fingerprint
from edgeward.core.store import Entry
from edgeward.core.store_nats import NatsStore
from edgeward.nodes.ancestry import Ancestor
from edgeward.nodes.older import trimmed
from edgeward.nodes.views import STATUS_DOWN, SiteView, Views
from edgeward.nodes.wire import (
    LEVEL,
    HubObject,
)

#: Bytes of encoded objects kept for the next node that needs the same ones.
_ENCODED = 16 << 20


class Roster:
    """The nodes of one hub process, by site."""

    def __init__(self, store: NatsStore) -> None:
        self._store = store
        self.views = Views(store.entry)
        self.site_of: dict[str, str] = {}
        self.nodes_at: dict[str, set[str]] = {}
        #: The stores that this one was restored from.
        self.line: list[Ancestor] = []
        #: node -> the level of its release, where it is older than this one's (``nodes/older.py``)
        self.levels: dict[str, int] = {}
        #: node -> what it is not told for that
        self.untold: dict[str, list[str]] = {}
        #: node -> the revision of its view that an answer to a beat named last
        self.told: dict[str, int] = {}
        #: node -> its status as its site is told of it
        self._shown: dict[str, dict[str, Any]] = {}
        self._encoded: dict[tuple[Key, int, int, int, frozenset[str]], bytes] = {}
        self._encoded_size = 0

    def node(self, name: str) -> Resource:
        """The node of this name; ``Invalid`` where there is none."""
        node = self._store.find(Key("Node", CLUSTER, name))
        if node is None:
            raise Invalid("the hub knows no such node", resource=f"Node/{name}", remedy="enrol it again")
        return node

    def place(self, node: str, site: str | None) -> None:
        """Which site a node stands in; None: it is gone."""
        old = self.site_of.pop(node, None)
        if old is not None and old != site:
            self.told.pop(node, None)
        if old is not None:
            self.nodes_at.get(old, set()).discard(node)
        if site is not None:
            self.site_of[node] = site
            self.nodes_at.setdefault(site, set()).add(node)

    def view(self, node: str) -> SiteView:
        """What the node's site has of the hub's state now."""
        return self.views.of(self.node(node).spec.site, self._store.revision)

    def object(self, key: Key, resource: Resource | None, revision: int, site: str, level: int = LEVEL) -> HubObject:
        """An object, or its absence, as a node of this site and level is told of it."""
        if resource is None:
            return HubObject(key.kind, key.namespace, key.name, revision)
        status = resource.status if key.kind in STATUS_DOWN and resource.status else None
        if status is not None and key.kind == "Node":
            status = _without_word(status)
        if status is not None:
            status = kinds.get(key.kind).told(status, self.nodes_at.get(site, ()))
        stored = trimmed(to_stored(resource), level)
        return HubObject(key.kind, key.namespace, key.name, revision, stored, status)

    def packed(self, key: Key, entry: Entry, site: str, level: int) -> bytes:
        """A present object as it goes over the link; nodes of one site, and all for what is everywhere, share it."""
        travels = key.kind in STATUS_DOWN
        own = travels and kinds.get(key.kind).told is not whole_status  # each site has its own
        nodes = frozenset(self.nodes_at.get(site, ())) if own else frozenset[str]()
        which = (key, entry.revision, entry.seen if travels else 0, level, nodes)
        data = self._encoded.get(which)
        if data is None:
            data = msgspec.msgpack.encode(self.object(key, entry.resource, entry.revision, site, level))
            if self._encoded_size > _ENCODED:
                self._encoded.clear()
                self._encoded_size = 0
            self._encoded[which] = data
            self._encoded_size += len(data)
        return data

    def news(self, node: str, resource: Resource | None) -> bool:
        """Whether a new status of a Node says anything new to its site, which had said the rest itself."""
        if resource is None:
            self._shown.pop(node, None)
            return True
        before, now = self._shown.get(node), _without_word(resource.status)
        self._shown[node] = now
        return before != now

    @staticmethod
    def newer(level: int) -> set[str]:
        """Kinds that a release of this level does not know."""
        return {k.name for k in kinds if k.level > level}

    @staticmethod
    def print(view: SiteView, newer: set[str]) -> str:
        """The fingerprint of a view, without the kinds that its node does not know."""
        if not any(k.kind in newer for k in view.entries):
            return view.print
        return fingerprint((k, desired) for k, (desired, _) in view.entries.items() if k.kind not in newer)


def _without_word(status: dict[str, Any]) -> dict[str, Any]:
    """A Node's status without what its site says of it: the site knows that better."""
    return {k: v for k, v in status.items() if k not in ("verdict", "evidence")}
