"""How the nodes of a site share what the hub says to all: who asks the hub, and what of it may be passed on. Pure.

All nodes of a site have the same view (``views.py``), so one of them, the *carrier*, asks the hub for news and passes
the answers on, bit by bit as they came. The hub signs each for the site (:func:`to_sign`): a node takes from another
one only what the hub said, of this site, and newer than what it has. The carrier is whoever of those that reach the hub
and are heard has the first name; one that falls silent is passed over. What is lost by all of this is time, never
truth: each node's own beat still tells it what the hub's newest revision is. Time is an argument.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from cryptography import x509

from edgeward.core.certs import verify
from edgeward.nodes.wire import SyncAnswer, SyncAsk

#: Seconds between two words of the carrier; of silence after which it is passed over; between two words of others, and
#: how long those count.
CARRIER, SILENT, OTHERS, COUNTS = 1.3, 4.0, 10.0, 25.0
#: What is kept to be passed on: bytes, seconds.
KEPT, KEPT_FOR = 16 << 20, 300.0


class Word(msgspec.Struct, frozen=True, array_like=True):
    """What a node says of itself. ``carrier``: whom it takes for that; ``level``: of its release (``wire.py``)."""

    online: bool
    epoch: str
    revision: int
    level: int
    carrier: str


class Page(msgspec.Struct, array_like=True):
    """One answer of the hub to ``ask`` (packed), as it came, and the hub's signature."""

    ask: bytes
    answer: bytes
    proof: bytes


class Want(msgspec.Struct, array_like=True):
    """What a node has, and the revision that it knows there to be."""

    epoch: str
    since: int
    wanted: int
    level: int


def to_sign(site: str, ask: bytes, answer: bytes) -> bytes:
    """What the hub puts its name to. ``ask``: the :class:`SyncAsk` without ``share``, packed."""
    name = site.encode()
    parts = len(name).to_bytes(2, "big") + name, hashlib.sha256(ask).digest(), hashlib.sha256(answer).digest()
    return b"edgeward sync 1\0" + b"".join(parts)


def plain(ask: SyncAsk) -> bytes:
    """The ask as it is signed."""
    return msgspec.msgpack.encode(msgspec.structs.replace(ask, share=[]))


class Chain(msgspec.Struct, frozen=True):
    """All pages of one sync: what leads from ``since`` (0: from nothing) to ``revision``."""

    epoch: str
    since: int
    revision: int
    level: int
    pages: list[Page]
    at: float

    @property
    def size(self) -> int:
        return sum(len(p.answer) for p in self.pages)


class Kept:
    """The last syncs, oldest first, each going on where the one before ended."""

    def __init__(self) -> None:
        self._chains: deque[Chain] = deque()

    def add(self, chain: Chain) -> None:
        last = self._chains[-1] if self._chains else None
        goes_on = last is not None and (last.epoch, last.level) == (chain.epoch, chain.level)
        if not (goes_on and last is not None and chain.since <= last.revision <= chain.revision):
            self._chains.clear()
        self._chains.append(chain)
        self.tidy(chain.at)

    def tidy(self, now: float) -> None:
        while self._chains and (now - self._chains[0].at > KEPT_FOR or sum(c.size for c in self._chains) > KEPT):
            self._chains.popleft()

    def leading(self, want: Want) -> list[Chain]:
        """What brings a node from where it is to the newest; nothing where that is not known."""
        found: list[Chain] = []
        at = want.since
        for chain in self._chains:
            if (chain.epoch, chain.level) != (want.epoch, want.level) or chain.revision <= at:
                continue
            if chain.since > at:
                return []
            found.append(chain)
            at = chain.revision
        return found


def judged(
    pages: Sequence[Page], site: str, epoch: str, since: int, level: int, trusted: Iterable[x509.Certificate]
) -> list[SyncAnswer] | None:
    """The answers in ``pages``, if the hub gave them all, in this order, to a node of this site that was where we are,
    or behind; None otherwise. Raises ``msgspec.DecodeError`` for what is no answer."""
    cas = list(trusted)
    answers: list[SyncAnswer] = []
    after: tuple[str, str, str] | None = None
    began = 0, False
    for n, page in enumerate(pages):
        if not any(verify(ca, to_sign(site, page.ask, page.answer), page.proof) for ca in cas):
            return None
        ask = msgspec.msgpack.decode(page.ask, type=SyncAsk)
        answer = msgspec.msgpack.decode(page.answer, type=SyncAnswer)
        fits = ask.epoch == epoch == answer.epoch and ask.since <= since < answer.revision and ask.level == level
        if not fits or ask.after != after or answer.error or answer.more != (n < len(pages) - 1):
            return None
        # pages of one sync belong together: the store may have moved on in between, as for a node that asks by itself
        if answers and (ask.since, answer.full) != began:
            return None
        began = ask.since, answer.full
        if answer.more:
            last = answer.objects[-1].key if answer.objects else None
            after = (last.kind, last.namespace, last.name) if last is not None else None
        answers.append(answer)
    return answers or None


class Lead:
    """Who carries. :meth:`choose` is asked again whenever a word came or time passed."""

    def __init__(self, me: str, level: int) -> None:
        self.me, self._level = me, level
        self._expected, self._since = "", 0.0
        #: Passed over: what it said last when it was.
        self._passed: dict[str, float] = {}

    def choose(self, words: Mapping[str, tuple[Word, float]], online: bool, now: float) -> str:
        """``words``: of the others, and when they were heard. Empty: nobody reaches the hub."""
        for node, at in list(self._passed.items()):
            if node not in words or words[node][1] > at:
                del self._passed[node]
        there = {n for n, (w, at) in words.items() if w.online and w.level == self._level and now - at <= COUNTS}
        if online:
            there.add(self.me)
        for node in sorted(there):
            if node == self.me:
                self._expected = node
                return node
            if node in self._passed:
                continue
            at = words[node][1]
            if node != self._expected:
                self._expected, self._since = node, now
            if now - max(at, self._since) <= SILENT:
                return node
            self._passed[node] = at
        self._expected = ""
        return ""


def covered(words: Mapping[str, tuple[Word, float]], me: str, level: int, now: float) -> list[str]:
    """Who gets the hub's news from this node, by their own word."""
    return sorted(n for n, (w, at) in words.items() if w.carrier == me and w.level == level and now - at <= COUNTS)
