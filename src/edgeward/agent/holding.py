"""`edgeward site hold` and `release` at this node: the word on the disk, what waits, and the routes for people.

In: a person's word, or a later one of another node (``nodes/siblings_edge.py`` brings it). Out: whether the link takes
what the hub sends (``nodes/edge.py`` asks), and what is shown. The rule is in ``nodes/holding.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.agent.replica import Replica
from edgeward.core import clock
from edgeward.core.access import actor_of, needs
from edgeward.core.audit import Audit
from edgeward.core.context import correlation
from edgeward.core.describe import described
from edgeward.core.errors import NotFound
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.streaming import json
from edgeward.nodes.holding import PASSING, parted, said, status
from edgeward.nodes.siblings import Hold
from edgeward.nodes.wire import HubObject

_META = "hold"


class Holding:
    """``changed()``: the word is another one, or more waits; ``event(type, reason, message)``."""

    def __init__(
        self,
        node: str,
        site: str,
        replica: Replica,
        audit: Audit,
        *,
        changed: Callable[[], None],
        event: Callable[[str, str, str], None],
    ) -> None:
        self._node, self._key = node, Key("Site", CLUSTER, site)
        self._replica, self._audit = replica, audit
        self._changed, self._event = changed, event
        self.hold = msgspec.json.decode(replica.meta(_META) or "{}", type=Hold)
        self._waiting: set[Key] = set()

    def held_back(self, objects: list[HubObject], full: bool) -> bool:
        """The hub sent these (``full``: what is not among them is gone). True: they wait, but for what passes."""
        if not self.hold.held:
            return False
        taken, rest = parted(objects)
        # what was said before waits still: another node may pass on only what came after it
        waiting = set() if full else self._waiting - {o.key for o in rest}
        waiting |= {o.key for o in rest if self._replica.hub_revision_of(o.key) != (o.revision if o.stored else 0)}
        if full:
            gone = set(self._replica.hub_keys()) - {o.key for o in objects}
            taken += [HubObject(k.kind, k.namespace, k.name, 0) for k in gone if k.kind in PASSING]
            waiting |= {k for k in gone if k.kind not in PASSING}
        self._replica.apply_passing(taken)
        if waiting != self._waiting:
            self._waiting = waiting
            self._changed()
        return True

    def take(self, hold: Hold) -> bool:
        """Another node's word. True when it counts."""
        if not hold.sound or not hold.later(self.hold):
            return False
        was, self.hold = self.hold, hold
        self._replica.set_meta(_META, msgspec.json.encode(hold).decode())
        if was.held != hold.held:
            what = "holds: the hub's changes wait" if hold.held else "takes the hub's changes again"
            reason = "SiteHeld" if hold.held else "SiteReleased"
            self._event("Normal", reason, f"the site {what} ({hold.by} at {hold.node})")
        if not hold.held:
            self._waiting = set()
        self._changed()
        return True

    def status(self) -> dict[str, Any]:
        return status(self.hold, self._waiting, clock.timestamp(self.hold.stamp))

    # -- for people ------------------------------------------------------------------------------------------------

    def routes(self) -> list[Route]:
        path = "/api/v1/sites/{name}"
        return [
            Route(f"{path}/hold", needs("get", "Site", "object")(self._shown), methods=["GET"]),
            Route(f"{path}/hold", needs("update", "Site", "object")(self._hold), methods=["POST"]),
            Route(f"{path}/release", needs("update", "Site", "object")(self._release), methods=["POST"]),
        ]

    @described("Whether this node's site holds: since when, by whom, how many of the hub's changes wait; else empty")
    async def _shown(self, request: Request) -> Response:
        self._here(request)
        return json(self.status())

    @described("Have the hub's changes wait until the site is released, at all its nodes")
    async def _hold(self, request: Request) -> Response:
        return await self._say(request, held=True)

    @described("Take the hub's changes again")
    async def _release(self, request: Request) -> Response:
        return await self._say(request, held=False)

    def _here(self, request: Request) -> None:
        if request.path_params["name"] != self._key.name:
            raise NotFound(
                f"this is a node of site {self._key.name}", resource=f"Site/{request.path_params['name'][:63]}",
                remedy="ask a node of that site",
            )  # fmt: skip

    async def _say(self, request: Request, *, held: bool) -> Response:
        self._here(request)
        who = actor_of(request)
        if held != self.hold.held:
            self.take(said(held, self.hold, self._replica.hub_time(), self._node, who["actor"]))
            await self._audit.write(
                "update", self._key, actor=who["actor"], source=who["source"], request=correlation.get(),
                detail={"hold": held},
            )  # fmt: skip
        return json(self.status())
