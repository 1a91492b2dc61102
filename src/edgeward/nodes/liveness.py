"""Whether a peer is there, and when to beat next: pure, time is an argument.

Beats (or any other sign of life) come in, the state goes out. *Down* needs ``down_after`` seconds of silence, *up*
needs ``up_after`` signs in a row with no longer gap than that. How long a silence must be depends on the link: over TCP
a lost packet is a late one, so a link that is seen to be late again and again gets more patience, and a good one none.

One small message each :data:`BEAT` seconds, answered, serves both directions; whatever else was asked and answered
meanwhile stands in for it.
"""

from __future__ import annotations

import msgspec

#: Seconds between two beats of a node. With its answer and TCP's acknowledgement one costs some 280 bytes on the link.
BEAT = 11.0
#: Seconds of silence after which a peer on a good link is not there.
DOWN = 14.5
#: ... and on the worst: a packet that is lost six times in a row at a round trip of 1.2 s is 76 s late.
DOWN_MOST = 120.0
#: Seconds between two looks at who is silent.
LOOK = 0.5

_WINDOW = 64
#: A beat that is less late than this is the scheduler's doing.
_EARLY = 0.5
_PER_LATE_SECOND = 25.0
#: One that is later than this is no lost packet but an outage, which says nothing of the link when it is there.
_OUTAGE = 8.0
#: A link whose round trip takes longer than this loses more by a lost packet.
_QUICK = 0.4
_PER_ROUND_TRIP = 20.0
#: ... and the same lateness says more of a slow link: what was lost once there may be lost twice.
_PER_SLOW = 3.0
#: A slow link gets the most patience until so many beats have shown what it is like.
_KNOWN = 32


class Liveness(msgspec.Struct):
    interval: float = BEAT
    down_after: float = DOWN
    most: float = DOWN_MOST
    up_after: int = 2
    online: bool = False
    #: When the state last flipped, and the last beat was heard (monotonic seconds).
    since: float = 0.0
    heard: float = float("-inf")
    streak: int = 0
    #: How late the last beats were that were due, newest last; the link's round trip in seconds, as far as it is known.
    late: list[float] = []
    rtt: float = 0.0
    #: The connection is a new one: the present gap says nothing of the link.
    excused: bool = False
    #: Beats that said something of the link, in all.
    seen: int = 0

    @property
    def patience(self) -> float:
        """Seconds of silence that this link may have: by the second worst of its last beats, for one is an accident."""
        if self.rtt > _QUICK and self.seen < _KNOWN:
            return self.most
        worst = sorted(self.late)[-2] if len(self.late) > 1 else 0.0
        slow = _PER_ROUND_TRIP * max(0.0, self.rtt - _QUICK)
        lossy = _PER_LATE_SECOND * worst * max(1.0, _PER_SLOW * self.rtt) if worst > _EARLY else 0.0
        return min(self.most, self.down_after + slow + lossy)

    def beat(self, now: float, *, certain: bool = False) -> bool:
        """A beat was heard; ``certain`` (a fresh start, say) counts as enough. True when that flipped the state."""
        gap = now - self.heard
        self.streak = self.streak + 1 if gap <= self.patience else 1
        # a gap that ended soon was no end: also when it was taken for one
        if self.interval / 2 < gap <= self.interval + _OUTAGE and not self.excused:
            self.late = [*self.late[1 - _WINDOW :], max(0.0, gap - self.interval)]
            self.seen += 1
        self.heard, self.excused = now, False
        if not self.online and (certain or self.streak >= self.up_after):
            self.online, self.since = True, now
            return True
        return False

    def forgive(self, seconds: float, now: float) -> None:
        """We did not listen for so long (this process or its machine stood still): that silence was our own."""
        self.heard = min(now, self.heard + seconds)

    def tick(self, now: float) -> bool:
        """Time passed. True when that flipped the state to offline."""
        if self.online and now - self.heard > self.patience:
            self.online, self.since, self.streak = False, now, 0
            return True
        return False


#: Seconds between two tries while there is no link: they end at the node's own nats-server and cost nothing.
_RETRY = 0.5
_LEAST_WAIT, _MOST_WAIT = 2.0, 5.0


class Pace(msgspec.Struct):
    """When a node beats next.

    A beat that is not answered in good time is followed by another: on a lossy link the second one makes TCP repeat the
    first at once. Each says whether it is ``sure``: the last one was answered, so an empty one says enough.
    """

    interval: float = BEAT
    #: Of the last beat, the last exchange of any sort (when its question was sent), the last refusal.
    sent: float = float("-inf")
    exchanged: float = float("-inf")
    refused: float = float("-inf")
    answered: bool = True
    #: When the first question that is not answered yet was asked.
    waiting: float = float("inf")
    #: The next beat comes by then, whatever its turn.
    pulled: float = float("inf")
    #: Seconds from a question to its answer on this link at its best.
    rtt: float = 0.0
    #: The link is new: the next beat comes early by chance, so that a fleet that came back together does not beat so.
    fresh: bool = True

    def ask(self, now: float) -> None:
        """A beat is sent."""
        self.fresh = self.fresh and not self.answered
        if self.waiting == float("inf"):
            self.waiting = now
        self.sent, self.answered, self.pulled = now, False, float("inf")

    def answer(self, now: float, asked: float) -> None:
        """Something that was asked at ``asked`` is answered."""
        took = min(30.0, max(0.0, now - asked))
        # what the link takes when nothing is lost: quick to fall, slow to rise; an answer to what was asked again
        # meanwhile tells of a loss or of an outage that ended
        if not self.rtt or took < self.rtt or asked >= self.sent:
            self.rtt = took if not self.rtt or took < self.rtt else self.rtt + (took - self.rtt) / 32
        self.exchanged = max(self.exchanged, asked)
        if asked >= self.sent:
            self.answered, self.waiting = True, float("inf")

    def refuse(self, now: float) -> None:
        """Nobody is there: the node's own server says so at once."""
        self.refused, self.answered, self.fresh = now, False, True

    def doubt(self) -> None:
        """Something happened to the link: what was answered before proves nothing now."""
        self.answered = False

    @property
    def sure(self) -> bool:
        return self.answered

    def due(self, *, online: bool, jitter: float) -> float:
        """When to beat next; ``jitter`` in [0, 1)."""
        if self.refused >= self.sent > float("-inf"):
            return self.refused + _RETRY * (0.8 + 0.4 * jitter)
        if not self.answered:
            wait = min(_MOST_WAIT, max(_LEAST_WAIT, 0.5 + 2 * self.rtt))
            return self.sent + wait * (0.9 + 0.2 * jitter)
        if not online:
            return self.sent + _RETRY * (0.8 + 0.4 * jitter)
        # early rather than late, so that a beat is not late by our own doing
        turn = max(self.sent, self.exchanged) + self.interval * (1 - (0.6 if self.fresh else 0.04) * jitter)
        return min(turn, self.pulled)
