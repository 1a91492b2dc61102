"""What a node knows of its hub's clock, which is the fleet's: pure.

In: what the hub said of its time, and when it was asked and answered by a clock of the node that does not step
(:func:`edgeward.core.clock.steady`). Out: how far the node's own wall clock is ahead, and the best guess of the true
time. Since the measure is against the steady clock, it is as good after the wall clock was set as before.
"""

from __future__ import annotations

from typing import Any

import msgspec

#: Seconds that two clocks may differ before anybody is told.
AGREE = 5.0
#: A wall clock so far behind what the hub has said already is certainly wrong: no certificate can be judged by it.
CERTAINLY = 86400.0


class HubClock(msgspec.Struct):
    #: The hub's clock minus the node's steady one, and how wrong that may be: half of the round trip. Seconds.
    offset: float | None = None
    slack: float = 0.0

    def heard(self, hub: float, asked: float, answered: float) -> None:
        """The hub's time was ``hub`` at some moment between the two."""
        offset, slack = hub - (asked + answered) / 2, max(0.0, answered - asked) / 2
        if self.offset is None or slack < self.slack or abs(offset - self.offset) > slack + self.slack + 1.0:
            self.offset, self.slack = offset, slack

    def ahead(self, wall: float, steady: float) -> float | None:
        """Seconds that the node's wall clock is ahead of the hub's; None when the hub was not heard yet."""
        return None if self.offset is None else wall - (steady + self.offset)

    def status(self, wall: float, steady: float) -> dict[str, Any]:
        """What the Node's status says: empty when nothing is known. In whole seconds: a report costs bytes."""
        ahead = self.ahead(wall, steady)
        if ahead is None:
            return {}
        agrees = abs(ahead) <= AGREE + self.slack
        return {"agrees": True} if agrees else {"agrees": False, "aheadSeconds": round(ahead)}

    def best(self, wall: float, steady: float, least: float = 0.0) -> float:
        """The time by the hub's clock; by the node's, but not before ``least``, when the hub was not heard yet."""
        return max(least, wall) if self.offset is None else max(least, steady + self.offset)

    def of(self, when: float, steady: float, up: float) -> float:
        """A steady time ``when`` by the hub's clock; 0 when not known. ``up``: seconds since the machine started.

        What is from before that start, or from one after which the clock was set back, is of another steady clock.
        """
        return 0.0 if self.offset is None or not steady - up <= when <= steady else when + self.offset


def untold(wall: float, issued: float) -> bool:
    """Whether the wall clock is before the hub's word of ``issued``: it was never set since the machine was started."""
    return wall < issued - CERTAINLY


def made_at(said: float, now: float) -> float:
    """When a node says that a change was made, by the hub's clock: nothing was made later than ``now``."""
    return said if said <= now else now
