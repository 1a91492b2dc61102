"""What a site wants of its hub is asked for once: news of the desired state, and blobs.

One node of those that reach the hub carries for the others (``shares.py``): it asks, keeps the hub's signed answers
for a while and says that there is news; the others get it over the mesh. Whoever gets nothing in time, or nothing that
the hub signed, asks the hub itself. With no mesh, or alone at a site, all is as if this were not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
from cryptography import x509

from edgeward.core import clock
from edgeward.core.blobs import BlobAsk, BlobPart
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.throttle import Throttle
from edgeward.nodes.mesh_wire import Heard, PeerInfo
from edgeward.nodes.shares import (
    CARRIER,
    KEPT,
    OTHERS,
    Chain,
    Kept,
    Lead,
    Page,
    Want,
    Word,
    covered,
    judged,
    plain,
)
from edgeward.nodes.shelf import NoRoom, Shelf
from edgeward.nodes.wire import LEVEL, SyncAnswer, SyncAsk

log = logging.getLogger("edgeward.share")

TOPIC, NEWS, BLOB = "share", "share.news", "share.blob"
#: Seconds: between two looks at who carries; that a node waits for news from another; that a carrier waits for its own;
#: to gather those that come to be carried; between two looks for what nobody needs;
#: and that one counts for nothing who passed on what the hub did not say.
_LOOK, _WAIT, _OWN, _GATHER, _TIDY, _LIAR = 0.5, 6.0, 3.0, 2.0, 60.0, 600.0
#: Blobs that are remembered to have come from another node.
_BEGUN = 256


class MeshLike(Protocol):
    def peers(self) -> Mapping[str, PeerInfo]: ...
    def say(self, topic: str, data: bytes, peers: Iterable[str] | None = None) -> int: ...
    def hear(self, topic: str, fn: Callable[[str, bytes, Heard], None]) -> None: ...
    def serve(self, verb: str, handler: Callable[[str, bytes], Awaitable[bytes] | AsyncIterator[bytes]]) -> None: ...
    async def ask(self, peer: str, verb: str, data: bytes = b"", timeout: float = 10.0) -> bytes: ...
    def stream(self, peer: str, verb: str, data: bytes = b"", timeout: float = 10.0) -> AsyncIterator[bytes]: ...


class LinkLike(Protocol):
    @property
    def online(self) -> bool: ...
    def there_is(self, revision: int) -> None: ...
    def look(self) -> None: ...


class ReplicaLike(Protocol):
    hub_revision: int
    epoch: str


class _Piece(msgspec.Struct, array_like=True):
    """One page, and where its sync began and ended."""

    since: int
    revision: int
    page: Page
    last: bool


class Sharing:
    def __init__(
        self,
        node: str,
        site: str,
        *,
        mesh: MeshLike,
        link: LinkLike,
        replica: ReplicaLike,
        trusted: Callable[[], list[x509.Certificate]],
        ask: Callable[[str, bytes, float], Awaitable[bytes]],
        folder: Path,
    ) -> None:
        """``ask``: (verb, message, seconds) to the hub's answer. ``folder``: for blobs on their way."""
        self.node, self._site = node, site
        self._mesh, self._link, self._replica, self._trusted, self._ask = mesh, link, replica, trusted, ask
        self.shelf = Shelf(folder, ask)
        self._words: dict[str, tuple[Word, float]] = {}
        self._lead = Lead(node, LEVEL)
        #: Who carries; empty: nobody reaches the hub.
        self.carrier = ""
        self._kept = Kept()
        self._pages: list[Page] = []
        self._said: tuple[Word | None, float] = (None, 0.0)
        self._told: list[str] = []
        self._cover_at: float | None = None
        #: Blobs of which the site gave something; False: it is not to be asked for that one again.
        self._begun: OrderedDict[str, bool] = OrderedDict()
        self._liars: dict[str, float] = {}
        #: Of one node: news that it says there are, and that the hub or the site is asked for.
        self._asks_hub, self._asks_site = Throttle(burst=10, rate=0.5), Throttle(burst=50, rate=5)
        self._wake, self._moved = asyncio.Event(), asyncio.Event()
        self._running = False
        self.counters = {"had": 0, "given": 0, "refused": 0}
        mesh.hear(TOPIC, self._heard)
        mesh.serve(NEWS, self._give_news)
        mesh.serve(BLOB, self._give_blob)

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        self._running = True
        tidied = 0.0
        try:
            while True:
                now = clock.monotonic()
                self._look(now)
                if now - tidied > _TIDY:
                    tidied = now
                    self._kept.tidy(now)
                    await asyncio.to_thread(self.shelf.tidy, now, clock.now())
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK if self._words else OTHERS / 2):
                        await self._wake.wait()
        finally:
            self._running = False
            await self.shelf.stop()

    def _look(self, now: float) -> None:
        """Who carries now, and what is to be said of that."""
        linked = {n for n, p in self._mesh.peers().items() if p.linked}
        for node in self._words.keys() - linked:
            del self._words[node]
        carrier = self._lead.choose(self._words, self._link.online, now)
        if carrier != self.carrier:
            log.info("%s asks the hub for this site", carrier or "nobody")
            self.carrier = carrier
        if carrier == self.node:
            self._cover(now)
        else:
            self._told, self._cover_at = [], None
        word = Word(self._link.online, self._replica.epoch, self._replica.hub_revision, LEVEL, carrier)
        said, at = self._said
        if linked and (word != said or now - at >= (CARRIER if carrier == self.node else OTHERS)):
            self._said = word, now
            self._mesh.say(TOPIC, msgspec.msgpack.encode(word))

    def _cover(self, now: float) -> None:
        """Those that came to be carried: the hub hears of them with the next question."""
        if set(self.shared()) <= {self.node, *self._told}:
            self._cover_at = None
        elif self._cover_at is None:
            self._cover_at = now + _GATHER
        elif now >= self._cover_at:
            self._cover_at = now + 10 * _GATHER
            self._link.look()

    def _heard(self, peer: str, data: bytes, heard: Heard) -> None:
        word = msgspec.msgpack.decode(data, type=Word)
        if self._liars.get(peer, 0.0) > heard.at:
            return
        before = self._words.get(peer)
        self._words[peer] = word, heard.at
        if before is None or before[0] != word:
            self._wake.set()
        if before is None:
            self._said = None, 0.0  # it does not know of us
        if word.epoch == self._replica.epoch:
            self._there_is(peer, word.revision, heard.at)

    def _there_is(self, peer: str, revision: int, now: float) -> None:
        """A node says that the hub has something newer. It is looked for, but nobody has us ask all the time."""
        asks = self._asks_hub if self.carrier == self.node else self._asks_site
        if revision > self._replica.hub_revision and asks.take(peer, now) <= 0:
            self._link.there_is(revision)

    # -- what the link asks (``edge.py``) ----------------------------------------------------------------------------

    def carried(self) -> bool:
        return self._running and self.carrier not in ("", self.node)

    def shared(self) -> list[str]:
        """This node and those that get from it what the hub says; none where another one carries, or it is alone."""
        if not self._running or self.carrier != self.node or not self._words:
            return []
        return [self.node, *covered(self._words, self.node, LEVEL, clock.monotonic())]

    def passes_on(self, ask: SyncAsk, answer: SyncAnswer) -> SyncAnswer:
        """The answer that is in a signed one; kept for the others when it is whole."""
        inside = msgspec.msgpack.decode(answer.signed, type=SyncAnswer)
        self._told = [n for n in ask.share if n != self.node]
        if ask.after is None:
            self._pages = []
        self._pages.append(Page(plain(ask), answer.signed, answer.proof))
        if not inside.more and inside.epoch == ask.epoch:
            since = 0 if inside.full else ask.since
            self._keep(Chain(inside.epoch, since, inside.revision, LEVEL, self._pages, clock.monotonic()))
        return inside

    def _keep(self, chain: Chain) -> None:
        if chain.size <= KEPT:
            self._kept.add(chain)

    def moved(self) -> None:
        """The replica has something new."""
        self._moved.set()
        self._moved = asyncio.Event()
        self._wake.set()

    async def news(self, epoch: str, since: int, wanted: int) -> list[list[SyncAnswer]]:
        """What another node has that is newer than ``since``: syncs, each with its pages."""
        peer = self._best(epoch, since)
        if not self._running or not peer or self.carrier == self.node:
            return []
        want = msgspec.msgpack.encode(Want(epoch, since, wanted, LEVEL))
        found: list[list[SyncAnswer]] = []
        pages: list[Page] = []
        try:
            async with asyncio.timeout(_WAIT), contextlib.aclosing(self._pieces(peer, want)) as pieces:
                async for piece in pieces:
                    pages.append(piece.page)
                    if not piece.last:
                        continue
                    answers = judged(pages, self._site, epoch, since, LEVEL, self._trusted())
                    if answers is None:
                        self._lies(peer)
                        return found
                    self._keep(Chain(epoch, piece.since, answers[-1].revision, LEVEL, pages, clock.monotonic()))
                    found.append(answers)
                    since, pages = answers[-1].revision, []
                    self.counters["had"] += 1
        except (EdgewardError, TimeoutError, msgspec.MsgspecError) as e:
            log.info("no news from node %s: %s", peer, e or type(e).__name__)
        return found

    def _lies(self, peer: str) -> None:
        """It passed on what the hub did not say: it is not asked for a while, and the hub is asked at once."""
        self.counters["refused"] += 1
        log.warning("node %s passes on what the hub did not say", peer)
        self._liars[peer] = clock.monotonic() + _LIAR
        self._words.pop(peer, None)
        self.carrier = ""
        self._wake.set()

    def _best(self, epoch: str, since: int) -> str:
        """Whom to ask: the carrier, else whoever has the newest."""
        if self.carrier in self._words:
            return self.carrier
        newer = [(w.revision, n) for n, (w, _) in self._words.items() if (w.epoch, w.level) == (epoch, LEVEL)]
        revision, node = max(newer, default=(0, ""))
        return node if revision > since else ""

    async def _pieces(self, peer: str, want: bytes) -> AsyncGenerator[_Piece, None]:
        size = 0
        async with contextlib.aclosing(self._mesh.stream(peer, NEWS, want, _WAIT)) as stream:  # type: ignore[type-var]
            async for data in stream:
                size += len(data)
                if size > 2 * KEPT:
                    raise Unreachable("sends without an end")
                yield msgspec.msgpack.decode(data, type=_Piece)

    # -- what others ask ---------------------------------------------------------------------------------------------

    async def _give_news(self, peer: str, data: bytes) -> AsyncIterator[bytes]:
        want = msgspec.msgpack.decode(data, type=Want)
        if want.epoch != self._replica.epoch or want.level != LEVEL:
            return
        if want.wanted > self._replica.hub_revision and self.carrier == self.node:
            self._there_is(peer, want.wanted, clock.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_OWN):
                    while self._replica.hub_revision < want.wanted:
                        await self._moved.wait()
        for chain in self._kept.leading(want):
            for page in chain.pages:
                yield msgspec.msgpack.encode(_Piece(chain.since, chain.revision, page, page is chain.pages[-1]))
            self.counters["given"] += 1

    async def _give_blob(self, peer: str, data: bytes) -> bytes:
        ask = msgspec.msgpack.decode(data, type=BlobAsk)
        try:
            part = await self.shelf.part(ask, 30.0)
        except EdgewardError as e:
            part = BlobPart(error=str(e), again=isinstance(e, Unreachable))
        return msgspec.msgpack.encode(part)

    # -- blobs -------------------------------------------------------------------------------------------------------

    async def ask(self, verb: str, data: bytes, timeout: float) -> bytes:
        """The hub's answer, which may come from the site. Raises what the hub's would."""
        if verb != "blob" or not self._running or not self._words:
            return await self._ask(verb, data, timeout)
        ask = msgspec.msgpack.decode(data, type=BlobAsk)
        if self.carrier == self.node:
            return await self._own(ask, data, timeout)
        if ask.offset == 0 and ask.digest in self._begun:
            self._begun[ask.digest] = False  # what came was not right: the hub gives it
        got = await self._from_carrier(ask, data, timeout)
        return got if got is not None else await self._ask(verb, data, timeout)

    async def _own(self, ask: BlobAsk, data: bytes, timeout: float) -> bytes:
        """What this node, the carrier, wants itself: kept for the others as well, where there is room for that."""
        if self._begun.get(ask.digest, True):
            try:
                return msgspec.msgpack.encode(await self.shelf.part(ask, timeout))
            except NoRoom as e:
                log.info("%s is not kept for other nodes: %s", ask.digest, e)
                self._remember(ask.digest, good=False)
        return await self._ask("blob", data, timeout)

    def _remember(self, digest: str, *, good: bool) -> None:
        self._begun[digest] = good
        while len(self._begun) > _BEGUN:
            self._begun.popitem(last=False)

    async def _from_carrier(self, ask: BlobAsk, data: bytes, timeout: float) -> bytes | None:
        """What the carrier has of a blob; None: ask the hub."""
        for last in (False, True):
            if not self.carrier or not self._begun.get(ask.digest, True):
                return None
            try:
                got = await self._mesh.ask(self.carrier, BLOB, data, min(timeout, 40.0))
                part = msgspec.msgpack.decode(got, type=BlobPart)
            except (EdgewardError, msgspec.MsgspecError) as e:
                log.info("nothing of %s from node %s: %s", ask.digest, self.carrier, e)
                if not last:  # too many may have come at once
                    await asyncio.sleep(random.uniform(0.1, 1.0))  # noqa: S311 - jitter
                continue
            if not part.error or not part.again:
                self._remember(ask.digest, good=not part.error)
            return None if part.error else got
        return None
