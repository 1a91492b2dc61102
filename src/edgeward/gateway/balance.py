"""Where a request goes, whether it may go again, and which endpoint is left alone. Pure; time is an argument (seconds).

Endpoints take turns, those of this node before those of the site. A retry needs two things: that it cannot do a request
twice, and that the budget has room, so that a target in trouble gets few requests more, not twice as many.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from edgeward.gateway.http1 import IDEMPOTENT


class Endpoint(msgspec.Struct, frozen=True):
    host: str
    port: int
    tls: bool = False
    #: On this very node.
    here: bool = False
    #: Another site's gateway: by TLS it may show a certificate of our hub's.
    ours: bool = False
    #: The name of another site's node, which its certificate must be for; it is asked by our own certificate.
    node: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Budget:
    """Repeats in proportion to requests: each request earns ``ratio`` of a repeat, up to ``burst`` saved ones."""

    def __init__(self, ratio: float, burst: float = 10.0) -> None:
        self._ratio, self._burst = ratio, burst
        self._saved = burst if ratio else 0.0

    def earn(self) -> None:
        self._saved = min(self._burst, self._saved + self._ratio)

    def spend(self) -> bool:
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True


class Circuit:
    """One endpoint's record: closed (all go), open (none), half-open (one tries)."""

    __slots__ = ("failures", "limit", "open_until", "pause", "trying")

    def __init__(self, limit: int, pause: float) -> None:
        self.limit, self.pause = limit, pause
        self.failures = 0
        self.open_until = 0.0
        self.trying = False

    def ready(self, now: float) -> bool:
        return not self.limit or self.failures < self.limit or (now >= self.open_until and not self.trying)

    def took(self) -> None:
        """A request goes there."""
        if self.limit and self.failures >= self.limit:
            self.trying = True

    def good(self) -> None:
        self.failures, self.trying = 0, False

    def bad(self, now: float) -> bool:
        """True when it opens by this."""
        self.failures += 1
        self.trying = False
        if self.limit and self.failures >= self.limit:
            self.open_until = now + self.pause
            return self.failures == self.limit
        return False

    def dropped(self) -> None:
        """The request said nothing about the endpoint: its client went away."""
        self.trying = False

    def state(self, now: float) -> str:
        if not self.limit or self.failures < self.limit:
            return "closed"
        return "open" if now < self.open_until else "half-open"


class Balance:
    """The endpoints of one target. Records of those that stay survive a change of the others."""

    def __init__(self, endpoints: Sequence[Endpoint], failures: int, pause: float, old: Balance | None = None) -> None:
        self.endpoints = tuple(endpoints)
        known: dict[Endpoint, Circuit] = old.circuits if old is not None else {}
        self.circuits: dict[Endpoint, Circuit] = {}
        for e in self.endpoints:
            circuit = known.get(e) or Circuit(failures, pause)
            circuit.limit, circuit.pause = failures, pause
            self.circuits[e] = circuit
        self._turn = 0

    def pick(self, now: float, tried: Sequence[Endpoint] = ()) -> Endpoint | None:
        """The next endpoint that may be asked; one that was tried already only when there is no other."""
        if len(self.endpoints) == 1:
            only = self.endpoints[0]
            return only if self.circuits[only].ready(now) else None
        if not tried:
            self._turn += 1  # a repeat takes no turn: else the endpoint that fails would be first each time
        best: Endpoint | None = None
        rank = (9, 9)
        n = len(self.endpoints)
        for i in range(n):
            e = self.endpoints[(self._turn + i) % n]
            if self.circuits[e].ready(now):
                mine = (e in tried, not e.here)
                if mine < rank:
                    best, rank = e, mine
        return best


def may_repeat(method: str, *, sent: bool, answered: bool, replayable: bool) -> bool:
    """Whether a failed request may be sent again: never when an answer began, and a method that is not idempotent only
    when nothing of it was sent. ``replayable``: its body, as far as it was read, is still there."""
    if answered or not replayable:
        return False
    return not sent or method in IDEMPOTENT
