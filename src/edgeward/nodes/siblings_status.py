"""What the other nodes of a site say of the objects that they run: asked of each of them, kept while this agent runs.

Each node counts what it reports, to the hub and so to its site; the count travels with its word (``siblings_edge.py``).
Who sees another one asks for what is new since (``site.status``). A status is a node's own, never passed on: what is
held of a node that is silent is what it said last, and :meth:`Statuses.fresh` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from edgeward.core import clock
from edgeward.core.errors import EdgewardError
from edgeward.core.reconcile import Loop
from edgeward.core.resource import Key
from edgeward.nodes.wire import Status

VERB = "site.status"
#: Bytes of one answer; objects that are held of one node; seconds without a word after which a node's statuses are old.
PAGE, MOST, FRESH = 1 << 20, 10_000, 25.0
#: Bytes of statuses that are held of one node.
HELD = 16 << 20
_TIMEOUT = 10.0


class Ask(msgspec.Struct, array_like=True):
    """``run``: of the agent that is asked, as last heard; ``since``: what of it is known."""

    run: int = 0
    since: int = 0


class Told(msgspec.Struct, array_like=True):
    """What is new up to ``upto`` of the run; ``full``: what is not named is not there."""

    run: int
    upto: int
    full: bool
    statuses: list[Status] = []
    more: bool = False


class AskLike(Protocol):
    """What is needed of :class:`edgeward.nodes.mesh.Mesh`."""

    def serve(self, verb: str, handler: Callable[[str, bytes], Any]) -> None: ...
    async def ask(self, peer: str, verb: str, data: bytes = b"", timeout: float = 10.0) -> bytes: ...


class _Held(msgspec.Struct):
    run: int = 0
    upto: int = 0
    heard: float = float("-inf")
    statuses: dict[Key, dict[str, Any]] = {}
    sizes: dict[Key, int] = {}


class Statuses:
    """``run``: of this agent, another one after each start. ``own``: all that this node reports now.
    ``changed(node, keys)``: what another one says of these is new."""

    def __init__(
        self,
        mesh: AskLike,
        run: int,
        own: Callable[[], Mapping[Key, dict[str, Any]]],
        changed: Callable[[str, set[Key]], None],
    ) -> None:
        self._mesh, self._run, self._own, self._changed = mesh, run, own, changed
        self._count = 0
        #: The count at which each object was last told of anew, gone ones too.
        self._at: dict[Key, int] = {}
        self._held: dict[str, _Held] = {}
        self.asks: Loop[str] = Loop("site statuses", self._ask, backoff=(0.5, 10.0), timeout=_TIMEOUT * 2)
        mesh.serve(VERB, self._asked)

    # -- what this node says -------------------------------------------------------------------------------------------

    @property
    def told(self) -> tuple[int, int]:
        return self._run, self._count

    def said(self, key: Key) -> None:
        """This node reports something else of an object, or nothing any more."""
        self._count += 1
        self._at.pop(key, None)
        self._at[key] = self._count  # in the order of their counts
        own = self._own()
        while len(self._at) > MOST + len(own):  # those that are gone need not be told for ever
            gone = next((k for k in self._at if k not in own), None)
            if gone is None:
                break
            del self._at[gone]

    async def _asked(self, peer: str, data: bytes) -> bytes:
        ask = msgspec.msgpack.decode(data, type=Ask)
        full = ask.run != self._run or ask.since > self._count
        since, own = 0 if full else ask.since, self._own()
        told = Told(self._run, self._count, full)
        size = 0
        for key, at in self._at.items():
            if at <= since or (full and key not in own):
                continue
            status = Status(key.kind, key.namespace, key.name, own.get(key))
            size += len(msgspec.msgpack.encode(status))
            if told.statuses and size > PAGE:
                told.more = True
                break
            told.statuses.append(status)
            told.upto = at
        if not told.more:
            told.upto = self._count
        return msgspec.msgpack.encode(told)

    # -- what the others say -------------------------------------------------------------------------------------------

    def heard(self, node: str, told: tuple[int, int], at: float) -> None:
        """A node's word came: ``told`` is how far it has counted."""
        held = self._held.setdefault(node, _Held())
        held.heard = max(held.heard, at)
        if told[0] and told != (held.run, held.upto):
            self.asks.add(node)

    def forget(self, node: str) -> None:
        held = self._held.pop(node, None)
        if held is not None and held.statuses:
            self._changed(node, set(held.statuses))

    def fresh(self) -> set[str]:
        """The nodes that were heard lately."""
        now = clock.monotonic()
        return {n for n, held in self._held.items() if now - held.heard < FRESH}

    def of(self, key: Key) -> dict[str, dict[str, Any]]:
        """What each other node says of an object, by node."""
        return {n: held.statuses[key] for n, held in self._held.items() if key in held.statuses}

    def known(self) -> set[str]:
        """The nodes of which anything is known."""
        return {n for n, held in self._held.items() if held.run}

    async def _ask(self, node: str) -> float | None:
        held = self._held.get(node)
        if held is None:
            return None
        more = True
        while more:
            asked = msgspec.msgpack.encode(Ask(held.run, held.upto))
            told = msgspec.msgpack.decode(await self._mesh.ask(node, VERB, asked, _TIMEOUT), type=Told)
            more = told.more and told.upto > held.upto
            self._take(node, held, told)
        return None

    def _take(self, node: str, held: _Held, told: Told) -> None:
        named = {Key(s.kind, s.namespace, s.name): s.status for s in told.statuses}
        before = held.statuses
        now = {} if told.full else dict(before)
        for key, status in named.items():
            if status is None:
                now.pop(key, None)
            else:
                now[key] = status
        sizes = {} if told.full else {k: n for k, n in held.sizes.items() if k in now}
        sizes |= {k: len(msgspec.msgpack.encode(s)) for k, s in named.items() if s is not None}
        if len(now) > MOST or sum(sizes.values()) > HELD:
            raise EdgewardError(f"says too much: of {len(now)} objects", resource=f"Node/{node}")
        held.run, held.upto, held.statuses, held.sizes = told.run, told.upto, now, sizes
        touched = {k for k in before.keys() | now.keys() if before.get(k) != now.get(k)}
        if touched:
            self._changed(node, touched)
