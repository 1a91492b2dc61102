"""Who leads among processes that hear one another say that they are there. No I/O; ``now`` never steps back.

The one that has been there longest leads. One that was not heard of for :data:`GONE` seconds is not there. One that
could not say for :data:`LEASE` seconds that *it* is there (it stood still, or its connection was gone) takes itself for
gone before the others do, and does nothing as a leader from then on: what it knows is of then. It comes back as the
youngest, and listens for :data:`QUIET` seconds before it may lead again.

That is a lease in memory and not a lock: two that cannot hear one another both lead for a while, and one that stands
still between asking whether it leads and writing writes late. What leaders do must bear that: they write by revision
what anybody would compute from the same state.
"""

from __future__ import annotations

#: Seconds of silence after which a process is gone.
GONE = 4.0
#: Seconds for which a process may act as leader after it last said that it is there; less than GONE.
LEASE = 3.0
#: Seconds for which a process that was away, or just began, only listens.
QUIET = 2.0


def leader(members: dict[str, tuple[float, float]], now: float) -> str:
    """Of members (id to time of birth, time last heard of) the one that leads; "" when none is there."""
    there = [(born, id) for id, (born, heard) in members.items() if now - heard <= GONE]
    return min(there)[1] if there else ""


class Lease:
    """One process's view. ``several``: it is known that there are others, so it listens first."""

    def __init__(self, id: str, born: float, now: float, *, several: bool = False) -> None:
        self.id = id
        #: Seconds since 1970. A clock that is wrong makes another one lead, no more.
        self.born = born
        self.members: dict[str, tuple[float, float]] = {}
        self._several = several
        self._said = now
        self._quiet_until = now + QUIET if several else now
        self._back = now - QUIET
        #: Who leads; "" while that is not known.
        self.leader = "" if several else id

    def leads(self, now: float) -> bool:
        """Whether it may act as leader at this moment."""
        return self.leader == self.id and not self._lapsed(now)

    def _lapsed(self, now: float) -> bool:
        return self._several and now - self._said > LEASE

    def away(self, now: float) -> bool:
        """Whether it stands still, as it were, or did until a moment ago: what reaches it now may be old."""
        return self._lapsed(now) or now < self._back + QUIET

    def alone(self, now: float) -> bool:
        return not any(now - heard <= GONE for _, heard in self.members.values())

    def said(self, now: float) -> None:
        """It has just said that it is there; :meth:`look` first."""
        self._said = now

    def heard(self, id: str, born: float, now: float) -> bool:
        """Another one said so. True when that is news."""
        new = id not in self.members
        self.members[id] = born, now
        self._several = True
        return new

    def look(self, now: float, wall: float) -> list[str]:
        """Decides anew who leads; gives who is gone. ``wall``: seconds since 1970."""
        if self._lapsed(now) and now >= self._quiet_until:
            self.born, self._back, self._quiet_until = wall, now, now + QUIET
        gone = [i for i, (_, heard) in self.members.items() if now - heard > GONE]
        for id in gone:
            del self.members[id]
        self.leader = leader({**self.members, self.id: (self.born, now)}, now)
        if self.leader == self.id and not self.members and now < self._quiet_until:
            self.leader = ""  # the others may be there and were not heard yet
        return gone
