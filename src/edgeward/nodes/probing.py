"""What a node checks of another one beside its reports: when to look, and what the looks add up to. Pure.

In come the checks that a Site declares (a port of an app, a ping, ...), and the results of looks; out go which look is
due, and for each node the part of all weight that answers. The node's own reports are the check ``agent`` with a weight
of its own. A check changes its mind after ``retries`` failures more than the first, and after two successes. The looks
themselves are extensions (``check/<type>`` in the registry), made in ``verdicts.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

#: Successes in a row that bring a check back.
_UP = 2
#: Seconds between the looks of a check that failed.
_AGAIN = 1.0


#: Seconds without an answer after which a node doubts its link, and after which it is cut if others doubt theirs.
DOUBT, CUT = 1.5, 3.0
#: Two nodes whose beats are nearer than this part of their even spacing are moved apart.
_NEAR = 0.5
#: Nodes of a site above which nothing is moved: chance has some beat soon, and with so many to keep apart each would
#: come before its time again and again (10 nodes: a tenth more beats for all, half as many more for the unluckiest).
_CROWD = 6


def linked(online: bool, good: bool, unanswered: float, others: int) -> bool:
    """Whether the hub counts as reached: a link that is good by nature and whose answers fail to come at two nodes of
    the site at once is cut, before the silence alone would say so. ``others``: nodes that doubt theirs."""
    return online and not (good and unanswered >= CUT and others > 0)


def pull(mine: float, before: Sequence[float], n: int, interval: float) -> float:
    """Seconds until a node's next beat, moved so that the beats of a site's ``n`` nodes come one after another: then
    the first that is not answered comes soon after a cut. ``before``: those of the nodes that need not move."""
    if n > _CROWD:
        return mine
    spacing = interval / n
    if mine > 1.0 and any(abs(mine - other) < _NEAR * spacing for other in before):
        return max(0.5, mine - spacing * len(before))  # each by its place, so that two that move do not meet again
    return mine


class Check(msgspec.Struct, frozen=True):
    """``type`` names the extension. Times in seconds."""

    type: str
    weight: float = 1.0
    port: int = 0
    interval: float = 5.0
    timeout: float = 2.0
    retries: int = 2


class Look(NamedTuple):
    """A look that is due: of ``check`` (its number) at ``node``."""

    node: str
    check: int


class _State(msgspec.Struct):
    due: float
    ok: bool | None = None
    streak: int = 0
    out: bool = False


class Probes:
    """All checks of one node against the others of its site."""

    def __init__(self) -> None:
        self.checks: Sequence[Check] = ()
        self.agent = 1.0
        self._states: dict[Look, _State] = {}

    def set(self, checks: Sequence[Check], agent: float, nodes: Iterable[str], now: float) -> None:
        """The checks of the site, the weight of a node's own reports, and the nodes."""
        if list(checks) != list(self.checks):
            self._states.clear()
            self.checks = tuple(checks)
        self.agent = agent
        wanted = [Look(node, n) for node in sorted(nodes) for n in range(len(self.checks))]
        self._states = {look: self._states.get(look) or _State(now) for look in wanted}

    def due(self, now: float) -> list[Look]:
        """The looks to make now; each is out until its :meth:`result`."""
        found = [look for look, s in self._states.items() if not s.out and s.due <= now]
        for look in found:
            self._states[look].out = True
        return found

    def next(self) -> float:
        """When the next look is due."""
        return min((s.due for s in self._states.values() if not s.out), default=math.inf)

    def result(self, look: Look, ok: bool, now: float) -> None:
        state = self._states.get(look)
        if state is None:
            return  # the checks were changed meanwhile
        check = self.checks[look.check]
        state.out = False
        if state.ok is None and ok:
            state.ok = True
        if ok == state.ok:
            state.streak = 0
        else:
            state.streak += 1
            if state.streak >= (_UP if ok else check.retries + 1):
                state.ok, state.streak = ok, 0
        state.due = now + (check.interval if state.ok is ok and ok else min(check.interval, _AGAIN))

    def works(self, node: str, heard: bool) -> float | None:
        """The part of all weight that answers at a node; None where only its reports count.

        A check that has no result yet counts for nothing.
        """
        if not self.checks:
            return None
        total, good = self.agent, self.agent if heard else 0.0
        for n, check in enumerate(self.checks):
            state = self._states.get(Look(node, n))
            if state is not None and state.ok is not None:
                total += check.weight
                good += check.weight if state.ok else 0.0
        return good / total if total else None

    def failing(self, node: str) -> list[str]:
        """Which checks of a node fail, for its evidence."""
        states = ((c, self._states.get(Look(node, n))) for n, c in enumerate(self.checks))
        return [f"{c.type}:{c.port}" if c.port else c.type for c, s in states if s is not None and s.ok is False]
