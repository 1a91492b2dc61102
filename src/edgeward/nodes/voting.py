"""What a site's nodes say of one another, and what their majority makes of it. Pure, time is an argument.

In come reports: each node signs, every few seconds, that it is there, whether it reaches the hub, and of whom it has no
news. They come from the node itself or are passed on by another one, so one path between two nodes is enough. Out go a
verdict for each node of the site, and what is to be said or passed on next. The shell (``verdicts.py``) carries and
signs.

*Alive* needs a proof: a report, signed by the node itself, newer than any before. Nobody's word can stand in for it, so
a liar cannot keep a dead node alive. *Dead* needs votes: more than half of all the site's nodes must miss the node,
each saying so in a report of its own that is not old, so a liar cannot kill, and a part of the site that is not the
majority decides nothing: to it all are *unknown*. Exactly half of them are enough where the hub cannot reach the
missing one either. What was decided stands until a majority decides otherwise.

Two clocks come in: ``now`` is this node's monotonic one; a report carries its sender's steady one, of which only the
advance is used: clocks may be wrong by any amount.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import msgspec

State = Literal["healthy", "wan-cut", "dead", "unknown"]
HEALTHY: Final = "healthy"
WAN_CUT: Final = "wan-cut"
DEAD: Final = "dead"
UNKNOWN: Final = "unknown"

#: Who brought a report that the hub fetched from its author just now. No node can be called so.
HUB = "(hub)"
#: Seconds that a report may run ahead of its sender's steady clock as it was known before.
AHEAD = 30.0
#: Nodes that one report answers; who asked and got none asks again.
_ANSWERS = 8
#: Shares that a report can say it holds, and Apps of which it can say for how long they run.
_HOLDS = 16
#: Seconds between two answers to one node, and between two questions to one that is silent.
_HURRY = 1.0
#: Patiences for which one who passes reports on is named, though others were quicker since.
_NAMED = 10
#: Others that hear such a question beside the silent one.
_BESIDE = 3


class Settings(msgspec.Struct, frozen=True):
    """Seconds."""

    dead_after: float = 10.0
    #: Patience with a node that was not heard yet since this one started: boxes do not boot equally fast.
    grace: float = 60.0

    def period(self, n: int) -> float:
        """Seconds between two reports of a node in a site of ``n``: what a site says grows with its square."""
        return max(2.0, n / 4)

    def patience(self, n: int) -> float:
        """Silence after which a node is missed. Of two nodes none hears by a third what a bad network lost."""
        return max(self.dead_after, 3 * self.period(n)) * (1.8 if n < 3 else 1.0)


class Report(msgspec.Struct, array_like=True):
    """``at``: the sender's steady clock. Other nodes are named by :func:`tag`.

    ``silent``: of whom nothing was heard lately (whoever has news of them passes it on); ``lost``: who is missed, which
    is the vote; ``parted``: whom the hub, asked, does not reach either; ``answers``: (who asked, epoch of its report);
    ``doubt``: the hub has not answered it lately; ``beat``: seconds until it asks the hub again, -1 if it does not.
    ``holds``: (what, whose): an App's share that it took over and keeps; ``runs``: (what, seconds) it has run that.
    """

    node: str
    site: str
    epoch: int
    seq: int
    at: float
    link: bool
    silent: list[int] = []
    lost: list[int] = []
    parted: list[int] = []
    answers: list[tuple[int, int]] = []
    doubt: bool = False
    beat: float = -1.0
    holds: list[tuple[int, int]] = []
    runs: list[tuple[int, int]] = []


class Told(msgspec.Struct, array_like=True, frozen=True):
    """A report as it goes over the mesh: its bytes, and its author's signature of them."""

    body: bytes
    signature: bytes


class Say(NamedTuple):
    """This node's report is to be said: to these, or (None) to all."""

    to: tuple[str, ...] | None


class PassOn(NamedTuple):
    to: str
    told: Told


class Verdict(msgspec.Struct, frozen=True):
    """What the site says of a node. ``lost``: who votes that it is lost; ``heard``: how (directly, via whom)."""

    state: State
    group: int
    nodes: int
    link: bool | None = None
    heard: str = ""
    lost: tuple[str, ...] = ()
    why: str = ""


@functools.lru_cache(8192)
def tag(node: str) -> int:
    """Four bytes that stand for a node's name in a report."""
    return int.from_bytes(hashlib.sha256(node.encode()).digest()[:4])


class _Member(msgspec.Struct):
    """What is known of another node. ``best``: the most that its steady clock was seen ahead of ours (least delay)."""

    since: float
    report: Report | None = None
    told: Told | None = None
    heard: float = -math.inf
    direct: float = -math.inf
    #: When it was last heard by the site's own network, whoever passed it on.
    meshed: float = -math.inf
    #: Who brings its reports, and when that one did last.
    via: str = ""
    brought: float = -math.inf
    best: float = -math.inf
    #: Since when it was heard without a gap.
    streak: float = math.inf
    present: bool = False
    left: float = -math.inf
    #: It was here in this run, or was dead to the run before: its first word alone does not bring it back.
    known: bool = False
    hurried: float = -math.inf
    answered: float = -math.inf
    passed: dict[str, tuple[int, int]] = {}
    works: float | None = None


class Council:
    """One node's seat: what it heard, and the vote as it sees it.

    ``gone``: who is dead by the last decision of a majority; it stays so while there is none.
    """

    def __init__(self, me: str, site: str, epoch: int, now: float, *, gone: Iterable[str] = ()) -> None:
        self.me, self.site, self.epoch, self.seq = me, site, epoch, 0
        self.settings = Settings()
        self.link = False
        #: What is said of the link beside: see :class:`Report`.
        self.doubt, self.beat = False, -1.0
        #: What this node took over and keeps (what, whose), and for how many seconds it has run what may be compared.
        self.holds: list[tuple[int, int]] = []
        self.runs: list[tuple[int, int]] = []
        #: Something came that may change a verdict; whoever votes sets it back.
        self.stirred = True
        #: Whom the hub was asked for and does not reach.
        self.parted: set[str] = set()
        self.gone: set[str] = set(gone)
        self.counters = {"taken": 0, "replayed": 0, "future": 0, "stale": 0, "strange": 0, "unproven": 0, "forged": 0}
        self._started = now
        self._others: dict[str, _Member] = {}
        #: The names behind tags.
        self.tags: dict[int, str] = {tag(me): me}
        self._asked_me: dict[str, int] = {}
        self._said = -math.inf
        self._shown: dict[str, Verdict] = {}
        self.quorum = False
        #: When a majority was last with us.
        self.together = -math.inf

    # -- who is here -----------------------------------------------------------------------------------------------

    def members(self, names: Iterable[str], now: float) -> None:
        """The other nodes of the site that take part."""
        wanted = set(names) - {self.me}
        for name in self._others.keys() - wanted:
            del self._others[name]
            self._shown.pop(name, None)
        self.gone &= wanted
        self.parted &= wanted
        for name in wanted - self._others.keys():
            self._others[name] = _Member(now, known=name in self.gone)
        self.tags = {tag(n): n for n in (self.me, *self._others)}

    @property
    def size(self) -> int:
        return len(self._others) + 1

    @property
    def period(self) -> float:
        return self.settings.period(self.size)

    @property
    def patience(self) -> float:
        return self.settings.patience(self.size)

    def present(self) -> list[str]:
        """Who is heard, this node included."""
        return sorted([self.me, *(n for n, m in self._others.items() if m.present)])

    def missing(self) -> list[str]:
        """Who was heard of too long ago: whoever knows another way should try it."""
        return sorted(n for n, m in self._others.items() if not m.present)

    def unheard(self, now: float) -> list[str]:
        """Whom the site's own network has not brought for a while: for them the hub is one more way, as long as that
        lasts, also while it brings them."""
        late = 2.2 * self.period
        return sorted(n for n, m in self._others.items() if now - max(m.meshed, m.since) > late)

    def checked(self, node: str, works: float | None) -> None:
        """What the other checks say of a node: the part of all weight that answers, as :mod:`probing` counts it."""
        if node in self._others:
            self._others[node].works = works

    def linked(self, up: bool, *, doubt: bool = False, beat: float = -1.0) -> list[Say | PassOn]:
        """The hub is reached, or not any more, or that is doubted: all hear that at once."""
        self.beat = beat
        if (up, doubt) == (self.link, self.doubt):
            return []
        self.link, self.doubt, self.stirred = up, doubt, True
        if not up:
            self.parted.clear()
        return [Say(None)]

    # -- what comes in -----------------------------------------------------------------------------------------------

    def take(self, report: Report, told: Told, via: str, now: float, steady: float) -> list[Say | PassOn]:
        """A report whose signature was checked. ``via``: who brought it (the node itself, another one, :data:`HUB`)."""
        member = self._others.get(report.node)
        if member is None or report.site != self.site:
            self.counters["strange"] += 1
            return []
        if refused := self._refused(member, report, via, steady):
            self.counters[refused] += 1
            # who starts where nobody hears it directly proves itself when both have asked
            return self._answer(report, member, now) if refused == "unproven" else []
        self.counters["taken"] += 1
        known = member.report
        said = (report.link, report.lost, report.parted, report.doubt, report.holds)
        self.stirred |= (
            known is None
            or not member.present
            or said != (known.link, known.lost, known.parted, known.doubt, known.holds)
        )
        ahead = report.at - steady
        fresh = member.report is None or member.report.epoch != report.epoch
        member.best = ahead if fresh else max(member.best, ahead)
        heard = now - min(self.patience, max(0.0, member.best - ahead))
        if heard - member.heard > self.patience or (not member.present and member.streak == math.inf):
            member.streak = heard
        member.report, member.told, member.heard = report, told, max(member.heard, heard)
        # of several who pass it on one is named, as long as it is there: who was the first just now is no news
        named = self._others.get(member.via)
        there = named is not None and named.present and now - member.brought < _NAMED * self.patience
        if via in (member.via, report.node, HUB) or not there or member.via == report.node:
            member.via, member.brought = via, now
        if via == report.node:
            member.direct = now
        if via != HUB:
            member.meshed = now
        if not member.present and (now - member.streak >= self.period or not member.known):
            member.present = member.known = True
        return [*self._help(report, told), *self._answer(report, member, now)]

    def _refused(self, member: _Member, report: Report, via: str, steady: float) -> str:
        known = member.report
        if known is not None and (report.epoch, report.seq) <= (known.epoch, known.seq):
            return "replayed"
        if known is None or report.epoch != known.epoch:
            # a first word that another one brings may be an old one: the author must have heard of us since
            if via not in (report.node, HUB) and (tag(self.me), self.epoch) not in report.answers:
                return "unproven"
            return ""
        behind = member.best - (report.at - steady)
        if behind < -AHEAD:
            return "future"
        return "stale" if behind > self.patience else ""

    def _help(self, report: Report, told: Told) -> list[Say | PassOn]:
        """Passes this report on to whoever has no news of its author, and to its author what that one lacks."""
        acts: list[Say | PassOn] = []
        of = tag(report.node)
        for name, other in self._others.items():
            if name == report.node or other.report is None:
                continue
            if other.present and (of in other.report.silent or of in other.report.lost):
                acts += self._pass(self._others[report.node], told, name)
            lacks = tag(name) in report.silent or tag(name) in report.lost
            if lacks and other.told is not None:
                acts += self._pass(other, other.told, report.node)
        return acts

    @staticmethod
    def _pass(member: _Member, told: Told, to: str) -> list[PassOn]:
        which = (member.report.epoch, member.report.seq) if member.report is not None else None
        if which is None or member.passed.get(to) == which:
            return []
        member.passed = {**member.passed, to: which}
        return [PassOn(to, told)]

    def _answer(self, report: Report, member: _Member, now: float) -> list[Say | PassOn]:
        """Who has no news of us gets some at once, and a proof that it is new."""
        mine = tag(self.me)
        if mine not in report.silent and mine not in report.lost:
            self._asked_me.pop(report.node, None)
            return []
        before = self._asked_me.get(report.node, -1)
        new = report.epoch > before
        self._asked_me[report.node] = max(report.epoch, before)
        if now - member.answered < _HURRY / 2 and not new:
            return []
        member.answered = now
        # it may hear us by another one only, so all hear it
        return [Say(None)] if new else [Say((report.node,))]

    # -- what goes out -------------------------------------------------------------------------------------------------

    def report(self, now: float, steady: float, *, to_all: bool = True) -> Report:
        """What this node says now; the shell signs and says it."""
        self.seq += 1
        if to_all:
            self._said = now
        silent = [tag(n) for n in sorted(self._others) if self._is_silent(self._others[n], now)]
        lost = [tag(n) for n in sorted(self._others) if self._is_lost(n, now)]
        asked = [(tag(n), epoch) for n, epoch in sorted(self._asked_me.items())[:_ANSWERS]]
        parted = [tag(n) for n in sorted(self.parted)] if self.link else []
        silent = [t for t in silent if t not in lost]
        return Report(
            self.me,
            self.site,
            self.epoch,
            self.seq,
            steady,
            self.link,
            silent,
            lost,
            parted,
            asked,
            self.doubt,
            self.beat,
            self.holds[:_HOLDS],
            self.runs[:_HOLDS],
        )

    def tick(self, now: float) -> list[Say | PassOn]:
        """Time passed: who is missed now, and what is to be said."""
        changed = False
        hurry: list[str] = []
        for name, member in self._others.items():
            if member.present and now - member.heard > self.patience:
                member.present, member.left, member.streak = False, now, math.inf
                changed = self.stirred = True
            if self._is_silent(member, now) and now - member.hurried >= _HURRY and not self._is_lost(name, now):
                member.hurried = now
                hurry.append(name)
        if changed or now - self._said >= self.period:
            return [Say(None)]
        if not hurry:
            return []
        others = [n for n, m in sorted(self._others.items()) if m.present and n not in hurry]
        at = self.seq % max(1, len(others))  # in turn: one of them may have news
        return [Say((*hurry, *[*others[at:], *others[:at]][:_BESIDE]))]

    def forgive(self, seconds: float, now: float) -> None:
        """We did not listen for so long (this process or its machine stood still): that silence was our own."""
        for member in self._others.values():
            member.heard = min(now, member.heard + seconds)

    def due(self, now: float) -> float:
        """Seconds until :meth:`tick` is due."""
        return max(0.05, min(_HURRY, self._said + self.period - now))

    def _is_silent(self, member: _Member, now: float) -> bool:
        return now - max(member.heard, member.since) > 2.2 * self.period or member.report is None

    def _is_lost(self, name: str, now: float) -> bool:
        """This node's vote."""
        member = self._others[name]
        if member.works is not None:
            return member.works < 0.5 and (member.present or self._is_old(member, name, now))
        return not member.present and self._is_old(member, name, now)

    def _is_old(self, member: _Member, name: str, now: float) -> bool:
        if name in self.gone:
            return True
        patience = self.patience if member.report is not None else max(self.patience, self.settings.grace)
        return now - max(member.heard, member.since) > patience

    # -- the vote ------------------------------------------------------------------------------------------------------

    def votes(self, now: float) -> dict[str, tuple[str, ...]]:
        """For each node who votes that it is lost: those only whose own report is not old."""
        found: dict[str, tuple[str, ...]] = {}
        voters = {n: m.report for n, m in self._others.items() if m.present and m.report is not None}
        for name in (self.me, *self._others):
            mine = [self.me] if name != self.me and self._is_lost(name, now) else []
            theirs = [v for v, r in voters.items() if v != name and tag(name) in r.lost]
            found[name] = tuple(sorted(mine + theirs))
        return found

    def doubters(self) -> int:
        """Other nodes that doubt their link or have none: those only that had a link are a sign of a cut."""
        heard = (m.report for m in self._others.values() if m.present and m.report is not None)
        return sum(r.doubt for r in heard)

    def held(self) -> dict[str, list[tuple[int, int]]]:
        """What nodes that are heard took over and keep, this one among them."""
        found = {n: m.report.holds for n, m in self._others.items() if m.present and m.report is not None}
        return {n: holds for n, holds in {self.me: self.holds, **found}.items() if holds}

    def ran(self, node: str, what: int) -> int:
        """Seconds for which a node has run something, by its own word; 0 of what it does not name."""
        member = self._others.get(node)
        runs = self.runs if member is None else member.report.runs if member.present and member.report else []
        return max((seconds for named, seconds in runs if named == what), default=0)

    def missed(self) -> bool:
        """Whether another node that is heard misses this one: what it took over may have gone to others since."""
        mine = tag(self.me)
        return any(m.present and m.report is not None and mine in m.report.lost for m in self._others.values())

    def all_cut(self) -> bool:
        """Whether others are heard and none of them has a link."""
        links = [m.report.link for m in self._others.values() if m.present and m.report is not None]
        return bool(links) and not any(links)

    def beats(self, now: float) -> list[float]:
        """Seconds until those other nodes beat that stand before this one in the alphabet."""
        first = [m for n, m in self._others.items() if n < self.me and m.present]
        return [m.report.beat - (now - m.heard) for m in first if m.report is not None and m.report.beat >= 0]

    def _parted(self) -> set[int]:
        """Whom the hub does not reach: by our own question, else by those of the others."""
        if self.link:
            return {tag(n) for n in self.parted}
        reports = (m.report for m in self._others.values() if m.present and m.report is not None and m.report.link)
        return {t for r in reports for t in r.parted}

    def vote(self, now: float) -> dict[str, Verdict]:
        """The verdict on each node of the site, and (``gone``, ``quorum``) what follows for those who act on it."""
        group, n = self.present(), self.size
        votes, parted = self.votes(now), self._parted()
        absent = {tag(name) for name in self.missing()}
        self.quorum = 2 * len(group) > n or (2 * len(group) == n and absent <= parted)
        if self.quorum:
            self.together = now
        found = {name: self._judge(name, votes[name], parted, now) for name in (self.me, *self._others)}
        if self.quorum:
            alive = {name for name, v in found.items() if v.state in (HEALTHY, WAN_CUT)}
            self.gone = (self.gone | {name for name, v in found.items() if v.state == DEAD}) - alive
        self._shown = dict(found)  # who leaves the site leaves this one; whoever asked has to see that himself
        return found

    def _judge(self, name: str, lost: tuple[str, ...], parted: set[int], now: float) -> Verdict:
        member = self._others.get(name)
        group, n = len(self.present()), self.size
        link = self.link if member is None else (member.report.link if member.present and member.report else None)
        base = Verdict(UNKNOWN, group, n, link, self._how(member), lost)
        replace = msgspec.structs.replace
        if not self.quorum:
            return replace(base, why=f"{group} of {n} nodes are heard: no majority, nothing is decided")
        proof = member is None or (member.present and not self._is_lost(name, now))
        enough = 2 * len(lost) > n or (2 * len(lost) == n and tag(name) in parted)
        # without checks beside the agent's a proof is a proof, whoever says otherwise
        if enough and not (proof and (member is None or member.works is None)):
            return replace(base, state=DEAD, why=f"{len(lost)} of {n} nodes miss it")
        if proof:
            return replace(base, state=HEALTHY if link else WAN_CUT)
        if member is not None and name in self.gone:
            return replace(base, state=DEAD, why="it was found dead and was not heard again")
        shown = self._shown.get(name)
        if member is not None and shown is not None and now - member.left < self.patience / 2:
            return shown  # the others' votes are on their way
        return replace(base, why=f"it is not heard here, but only {len(lost)} of {n} nodes miss it")

    def _how(self, member: _Member | None) -> str:
        if member is None:
            return "itself"
        if not member.present:
            return "not" if member.report is not None else "never"
        if member.heard - member.direct <= self.patience:
            return "directly"
        return "by the hub" if member.via == HUB else f"via {member.via}"
