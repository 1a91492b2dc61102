"""What follows on this node from its site's verdicts: whose apps move, which endpoints count, what Nodes show.

In come verdicts (``nodes/verdicts.py``) and what Apps say of lost nodes (``workloads/disconnect.py``); out go pokes for
the rooms, events, the status of Nodes at this node's own API, and, where this node speaks for its site, the site's word
for the hub. Every answer follows from the last decision of a majority, so a node that has none moves nothing.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from edgeward.agent.replica import Replica
from edgeward.core import clock
from edgeward.core.resource import CLUSTER, Key, Resource
from edgeward.nodes.edge import NodeEdge
from edgeward.nodes.mesh import Mesh
from edgeward.nodes.verdict_spec import Wish, wish_of
from edgeward.nodes.verdicts import Verdicts
from edgeward.nodes.voting import tag
from edgeward.workloads import disconnect
from edgeward.workloads.persite import effective
from edgeward.workloads.placement import share

Event = Callable[..., None]
#: Seconds between two looks at whose time has come, while a node is dead or this one is alone.
_LOOK = 1.0
#: Seconds after a start in which it is no news that the others are not heard yet.
_QUIET = 30.0
_KEEPING = ("keep-replacement", "longest-running")
_SAYS = {
    "healthy": ("Normal", "NodeHealthy", "the site hears it, and it reaches the hub"),
    "wan-cut": ("Warning", "NodeWanCut", "the site hears it; it does not reach the hub"),
    "dead": ("Warning", "NodeDead", "the site has lost it"),
    "unknown": ("Warning", "NodeUnknown", "the site cannot tell"),
}


class Standing:
    """``moved()``: Services may be elsewhere; ``poke(namespace, name)``: an App may have to start or stop;
    ``alive(namespace, name)``: whether any instance of it lives here."""

    def __init__(
        self,
        node: str,
        site: str,
        data: Path,
        *,
        mesh: Mesh,
        replica: Replica,
        link: NodeEdge,
        ask_hub: Callable[[str, bytes, float], Awaitable[bytes]],
        event: Event,
        moved: Callable[[], None],
        poke: Callable[[str, str], None],
        alive: Callable[[str, str], bool],
    ) -> None:
        self._node, self._site = node, site
        self._replica, self._link = replica, link
        self._event, self._moved, self._poke, self._alive = event, moved, poke, alive
        self._wish: tuple[Any, Wish] = (None, Wish())
        #: What was last told of each node; all were well before.
        self._told: dict[str, str] = {}
        self._started = clock.monotonic()
        #: App -> what of it follows from verdicts: whose share moves, whether it stops here.
        self._follows: dict[Key, tuple[frozenset[str], bool]] = {}
        self._dead: set[str] = set()
        self._look = asyncio.Event()
        self.verdicts = Verdicts(
            mesh,
            data / "verdicts.json",
            link=link,
            ask_hub=ask_hub,
            wish=self._wishes,
            names=self._names,
            changed=self._changed,
        )
        self._dead = set(self.verdicts.dead())
        kept = self._replica.meta("held")
        #: Apps and nodes whose share of them this one took over and keeps.
        self._held = set(msgspec.json.decode(kept, type=list[tuple[str, str]])) if kept else set()
        self.verdicts.council.holds = sorted((tag(a), tag(n)) for a, n in self._held)

    # -- what the rooms ask -------------------------------------------------------------------------------------------

    def gone(self, app: Resource) -> frozenset[str]:
        """The nodes whose share of an App others take, or took and keep."""
        spec = effective(app, self._site).spec
        lost = disconnect.gone(spec, self.verdicts.dead())
        if spec.disconnect.reconcile not in _KEEPING:
            return lost
        council = self.verdicts.council
        return lost | disconnect.kept(spec, tag(str(app.key)), council.held(), council.tags, council.ran)

    def stops(self, app: Resource) -> bool:
        """Whether this node has to be without an App that must never run twice.

        A run that has had no majority yet starts nothing of that sort: what goes on since before has its time.
        """
        fresh = not self.verdicts.joined() and not self._alive(app.metadata.namespace, app.metadata.name)
        alone = math.inf if fresh else self.verdicts.alone()
        return disconnect.stops(effective(app, self._site).spec, alone)

    def dead(self, node: str) -> bool:
        return node in self.verdicts.council.gone

    async def called(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        """The hub asks what this node says now, for nodes of the site that do not hear it."""
        yield self.verdicts.told()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs until cancelled."""
        for app in self._replica.items("App"):
            self._follows[app.key] = (self.gone(app), self.stops(app))
        async with asyncio.TaskGroup() as group:
            group.create_task(self.verdicts.run())
            while True:
                self._apply()
                council = self.verdicts.council
                busy = council.gone or not council.quorum or council.held() or council.runs
                self._look.clear()
                try:
                    async with asyncio.timeout(_LOOK if busy else None):
                        await self._look.wait()
                except TimeoutError:
                    continue

    def _wishes(self) -> Wish:
        site = self._replica.find(Key("Site", CLUSTER, self._site))
        said = site.spec.verdicts if site is not None else None
        if said is not self._wish[0]:
            self._wish = (said, wish_of(said))
        return self._wish[1]

    def _names(self) -> list[str]:
        nodes = (n for n in self._replica.items("Node") if n.spec.site == self._site)
        return [n.metadata.name for n in nodes if n.status.get("mesh") and not n.status.get("revoked")]

    def _keep(self) -> None:
        """Says which shares this node took over and keeps, and for how long it has run what may be compared."""
        nodes = [n for n in self._replica.items("Node") if n.spec.site == self._site]
        held: set[tuple[str, str]] = set()
        runs: list[tuple[int, int]] = []
        before = set() if self.verdicts.council.missed() else self._held
        for app in self._replica.items("App"):
            spec = effective(app, self._site).spec
            if spec.disconnect.reconcile not in _KEEPING:
                continue
            name = str(app.key)
            if ran := self._ran(app):
                runs.append((tag(name), ran))
            lost = disconnect.gone(spec, self.verdicts.dead())
            took = disconnect.takes_over(functools.partial(share, app, nodes, self._node), lost)
            still = {n for a, n in before if a == name and n not in lost} & set(self.gone(app))
            held |= {(name, n) for n in {*took, *still}}
        if held != self._held:
            self._held = held
            self._replica.set_meta("held", msgspec.json.encode(sorted(held)).decode())
        self.verdicts.keep(sorted((tag(a), tag(n)) for a, n in held), runs)

    def _ran(self, app: Resource) -> int:
        """Seconds for which the oldest instance here has run."""
        mine = [i for i in app.status.get("instances", []) if i.get("node") == self._node and i.get("startedAt")]
        now = clock.now()
        return max((int(now - clock.parse_timestamp(str(i["startedAt"]))) for i in mine), default=0)

    def _apply(self) -> None:
        """Has the Apps looked at whose placement is another one now."""
        self._keep()
        for app in self._replica.items("App"):
            now = (self.gone(app), self.stops(app))
            if self._follows.get(app.key, (frozenset(), False)) != now:
                self._poke(app.metadata.namespace, app.metadata.name)
            self._follows[app.key] = now
        for key in [k for k in self._follows if self._replica.find(k) is None]:
            del self._follows[key]

    def _changed(self, nodes: set[str]) -> None:
        for name in sorted(nodes):
            status = self.verdicts.status(name)
            self._replica.put_beside(Key("Node", CLUSTER, name), status)
            state = str(status.get("verdict", ""))
            if not state:  # it is no node of the site any more: whoever gets its name is another
                self._told.pop(name, None)
            if state and state != self._told.get(name, "healthy"):
                self._tell(name, state, status["evidence"])
        self._speak()
        if (dead := set(self.verdicts.council.gone)) != self._dead:
            self._dead = dead
            self._moved()
        self._look.set()

    def _tell(self, name: str, state: str, evidence: dict[str, Any]) -> None:
        """One node of those that hear one another says it; that nothing is known just after a start is no news."""
        if state in ("unknown", "wan-cut") and clock.monotonic() - self._started < _QUIET:
            return
        self._told[name] = state
        if self.verdicts.speaker() != self._node:
            return
        type_, reason, words = _SAYS[state]
        why = f" ({evidence['why']})" if evidence.get("why") else ""
        self._event(type_, reason, words + why, CLUSTER, name, "Node")

    def _speak(self) -> None:
        """The site's word for the hub, by the first node with a link that has a majority with it."""
        verdicts = self.verdicts.verdicts
        linked = [n for n in self.verdicts.council.present() if n in verdicts and verdicts[n].link]
        mine = bool(linked) and linked[0] == self._node and self.verdicts.council.quorum
        self._link.report_site({n: self.verdicts.status(n) for n in sorted(verdicts)} if mine else None)

    def link_changed(self) -> None:
        self.verdicts.hurry()
