"""The nodes of a site keep one another's open changes, by asking each other over the mesh.

Each node says by datagram what it holds open, as a short print: when that changes, and every :data:`SAY` seconds. Who
hears another print than its own asks that node (``site.changes``), and has what it lacks within a round trip; a lost
datagram costs until the next one. So the site is one for everybody who works on it, with the hub or without. What the
hub takes from a node, it takes from its origin; in the name of one that has no link, or is not heard of any more,
another node of the site has its changes decided. What is decided here is in ``siblings.py``.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec

from edgeward.core import clock
from edgeward.core.errors import EdgewardError
from edgeward.core.reconcile import Loop
from edgeward.core.records import SqliteRecords
from edgeward.core.resource import Key, Resource
from edgeward.nodes.siblings import Answer, Digest, Finished, Hold, Lost, record
from edgeward.nodes.siblings_status import Statuses
from edgeward.nodes.wire import Decided, LocalChange

log = logging.getLogger("edgeward.nodes")

TOPIC, VERB = "site", "site.changes"
#: Seconds between two words of what is held; from an unanswered question to the next; and until changes of a node that
#: is silent, or has no link, are sent to the hub by another one.
SAY, TIMEOUT, PATIENCE = 10.0, 10.0, 15.0
#: Changes that are sent to the hub at once, and the hub's level from which on it takes them in another's name.
_PUSH, _LEVEL = 50, 2


class HeardLike(Protocol):
    """When a word came, by the monotonic clock."""

    at: float


class MeshLike(Protocol):
    """What is needed of :class:`edgeward.nodes.mesh.Mesh`."""

    on_peers: list[Callable[[], None]]

    def peers(self) -> Mapping[str, Any]: ...
    def say(self, topic: str, data: bytes, peers: Iterable[str] | None = None) -> int: ...
    def hear(self, topic: str, fn: Callable[[str, bytes, Any], None]) -> None: ...
    def serve(self, verb: str, handler: Callable[[str, bytes], Awaitable[bytes]]) -> None: ...
    async def ask(self, peer: str, verb: str, data: bytes = b"", timeout: float = 10.0) -> bytes: ...


class Shared(Protocol):
    """What is needed of the replica."""

    epoch: str
    hub_level: int | None
    open_version: int
    on_lost: Callable[[Lost, Resource | None], None]

    def digest(self) -> Digest: ...
    def answer(self, ask: Digest) -> Answer: ...
    def take(self, got: Answer) -> list[Finished]: ...
    def finish(self, known: Finished) -> None: ...
    def pending_of(self, nodes: Iterable[str]) -> dict[tuple[str, str], list[LocalChange]]: ...
    def foreign(self) -> set[str]: ...
    def names_open(self, key: Key, *, foreign: bool = False) -> list[Key]: ...


class LinkLike(Protocol):
    """What is needed of the link to the hub."""

    @property
    def online(self) -> bool: ...

    sendable: Callable[[list[LocalChange]], list[LocalChange]]

    async def push_for(self, node: str, store: str, changes: list[LocalChange]) -> list[Decided]: ...
    def wake_events(self) -> None: ...
    def wake_push(self) -> None: ...


class HoldLike(Protocol):
    """Whether the site has the hub's changes wait, and its own."""

    hold: Hold

    def take(self, hold: Hold) -> bool: ...


class Word(msgspec.Struct, array_like=True):
    """What a node says of itself: the print of what it holds open, whether the hub answers it, and how far it has
    counted what it says of its objects (``siblings_status.py``)."""

    print: bytes
    online: bool
    told: tuple[int, int] = (0, 0)


class Siblings:
    """One node's part in keeping the site's changes."""

    def __init__(
        self, node: str, site: str, *, replica: Shared, records: SqliteRecords, link: LinkLike, mesh: MeshLike
    ) -> None:
        self.node, self._site = node, site
        self._replica, self._records, self._link, self._mesh = replica, records, link, mesh
        replica.on_lost = self._lost
        link.sendable = self._sendable
        mesh.hear(TOPIC, self._heard)
        mesh.serve(VERB, self._asked)
        mesh.on_peers.append(self._met)
        self._pulls: Loop[str] = Loop("siblings", self._pull, backoff=(0.5, SAY), timeout=TIMEOUT * 2)
        self._news = asyncio.Event()
        self._print: tuple[tuple[int, Hold], bytes] = (-1, Hold()), b""
        self._words: dict[str, tuple[Word, float]] = {}
        self._began = clock.monotonic()
        #: Open changes of other nodes that those of this node wait for, and since when.
        self._waited: dict[Key, float] = {}
        self.statuses: Statuses | None = None
        self.holding: HoldLike | None = None
        self.counters = {"asked": 0, "answered": 0, "lost": 0, "sent_for": 0}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pulls.run())
            if self.statuses is not None:
                group.create_task(self.statuses.asks.run())
            group.create_task(self._say())
            group.create_task(self._push_others())

    # -- what is held --------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Something of what this node holds, or whom it reaches, is new: say it."""
        self._news.set()

    def print(self) -> bytes:
        """Equal at nodes that hold the same open."""
        hold = self._hold()
        version = self._replica.open_version, hold
        if self._print[0] != version:
            text = msgspec.json.encode([sorted(self._replica.digest().open), hold.stamp, hold.node])
            self._print = version, hashlib.sha256(text).digest()[:8]
        return self._print[1]

    def _hold(self) -> Hold:
        return self.holding.hold if self.holding is not None else Hold()

    async def _say(self) -> None:
        said = b""
        while True:
            word = self._word()
            if word != said:
                self._mesh.say(TOPIC, word)
                said = word
            self._news.clear()
            try:
                async with asyncio.timeout(SAY):
                    await self._news.wait()
            except TimeoutError:
                said = b""

    def _met(self) -> None:
        """Somebody came, or can be spoken with now: he hears the present word. Of one who is gone nothing is held."""
        for gone in self._words.keys() - self._mesh.peers().keys():
            del self._words[gone]
            if self.statuses is not None:
                self.statuses.forget(gone)
        self._mesh.say(TOPIC, self._word())

    def _word(self) -> bytes:
        told = self.statuses.told if self.statuses is not None else (0, 0)
        return msgspec.msgpack.encode(Word(self.print(), self._link.online, told))

    def _heard(self, peer: str, data: bytes, heard: HeardLike) -> None:
        word = msgspec.msgpack.decode(data, type=Word)
        self._words[peer] = word, heard.at
        if word.print != self.print():
            self._pulls.add(peer)
        if self.statuses is not None:
            self.statuses.heard(peer, word.told, heard.at)

    # -- asking and answering ------------------------------------------------------------------------------------------

    async def _asked(self, peer: str, data: bytes) -> bytes:
        ask = msgspec.msgpack.decode(data, type=Digest)
        self.counters["answered"] += 1
        answer = self._replica.answer(ask)
        answer.hold = self._hold()
        return msgspec.msgpack.encode(answer)

    async def _pull(self, peer: str) -> float | None:
        if peer not in self._mesh.peers():
            return None
        before = self.print()
        await self.pull(peer)
        if self.print() != before:
            self.changed()
            self._link.wake_push()  # what waited for it goes up
        return None

    async def pull(self, peer: str) -> None:
        """Takes what another node has. Raises ``Unreachable``."""
        more = True
        while more:
            digest = self._replica.digest()
            asked = msgspec.msgpack.encode(digest)
            got = msgspec.msgpack.decode(await self._mesh.ask(peer, VERB, asked, TIMEOUT), type=Answer)
            self.counters["asked"] += 1
            if got.node != peer:
                raise EdgewardError("answers in another's name", resource=f"Node/{peer}")
            if self.holding is not None:
                self.holding.take(got.hold)
            if self._link.online:
                # this node hears from the hub itself what became of its own changes, and answers twice are one: so a
                # sibling's word that it decided them, which may be a lie, does away with none of them
                mine = digest.node, digest.store
                got.finished = [f for f in got.finished if not f.outcome or (f.node, f.store) != mine]
            before = self._replica.open_version
            for known in self._replica.take(got):
                self._decided(known)
            more = got.more and self._replica.open_version != before

    # -- what people are told ------------------------------------------------------------------------------------------

    def _lost(self, lost: Lost, wanted: Resource | None) -> None:
        """Called before the other change is taken: what is in no document any more is in the journal."""
        doc = wanted.document(show_secrets=False) if wanted is not None else None
        entry = record(lost, self._site, doc, clock.timestamp(lost.change.stamp))
        self._records.keep("journal", entry)
        self.counters["lost"] += 1
        if lost.change.node == self.node:
            self._event("Warning", "LocalChangeLost", entry["resource"], f"replaced: {entry['why']}")

    def _decided(self, known: Finished) -> None:
        """A change of this node's that another one had the hub decide."""
        if known.journal is not None:
            self._records.keep("journal", known.journal)
        lost = known.journal is not None and known.journal.get("loser") == "edge"
        reason = "LocalChangeLost" if lost else "LocalChangeTakenOver"
        self._event("Warning" if lost else "Normal", reason, str(known.key), f"{known.outcome}: {known.why}")

    def _event(self, type: str, reason: str, resource: str, message: str) -> None:
        record = {"type": type, "reason": reason, "resource": resource, "message": message, "node": self.node}
        self._records.keep("events", record)
        self._link.wake_events()

    # -- towards the hub -----------------------------------------------------------------------------------------------

    def _sendable(self, changes: list[LocalChange]) -> list[LocalChange]:
        """Changes of this node, none while the site holds. Up to the first one that names what another node's open
        change makes: that goes first. Its origin sends it; if it does not, this node does."""
        if self._hold().held:
            return []
        for n, change in enumerate(changes):
            if names := self._replica.names_open(change.key, foreign=True):
                self._waited = {k: self._waited.get(k, clock.monotonic()) for k in names}
                return changes[:n]
        self._waited = {}
        return changes

    async def _push_others(self) -> None:
        while True:
            await asyncio.sleep(PATIENCE / 3)  # the pace of looking at who is silent
            now = clock.monotonic()
            late = {k for k, since in self._waited.items() if now - since > PATIENCE}
            try:
                await self.push_for(self._unable(), late)
            except EdgewardError as e:
                log.info("changes of other nodes are not sent yet: %s", e)

    def _unable(self) -> set[str]:
        """Nodes with open changes here that cannot have them decided themselves, for all that is known."""
        now = clock.monotonic()
        able = {n for n, (word, at) in self._words.items() if word.online and now - at < PATIENCE}
        return self._replica.foreign() - able if now - self._began > PATIENCE else set()

    async def push_for(self, nodes: Iterable[str], keys: Iterable[Key] = ()) -> None:
        """Has the hub decide what other nodes changed, and what others changed of ``keys``, in their names.
        Raises ``Unreachable`` and what the hub says."""
        unable, late = set(nodes), set(keys)
        if self._hold().held:
            return
        sent = self._link.online and (self._replica.hub_level or 0) >= _LEVEL and bool(unable or late)
        while sent:
            sent = False
            for (node, store), changes in self._replica.pending_of(self._replica.foreign()).items():
                wanted = [c for c in changes if node in unable or c.key in late]
                part = {c.seq: c for c in wanted if not self._replica.names_open(c.key)}
                part = dict(list(part.items())[:_PUSH])
                if not part:
                    continue
                for decided in await self._link.push_for(node, store, list(part.values())):
                    change = part.get(decided.seq)
                    if change is not None:
                        self.counters["sent_for"] += 1
                        self._finish(node, store, change, decided)
                        sent = True
        self._link.wake_push()

    def _finish(self, node: str, store: str, change: LocalChange, decided: Decided) -> None:
        if decided.journal is not None and decided.outcome != "same":
            self._records.keep("journal", decided.journal)
        at = (change.kind, change.namespace, change.name)
        said = (decided.outcome, decided.why, decided.journal)
        self._replica.finish(Finished(node, store, change.seq, *at, decided.now, self._replica.epoch, *said))
        self.changed()
