"""Whether a peer is there, with separate thresholds up and down: pure, time is an argument.

Beats (or their answers) come in, the state goes out. One lost beat never flips it: *down* needs ``down_after`` seconds
of silence, *up* needs ``up_after`` beats in a row with no longer gap than that.
"""

from __future__ import annotations

import msgspec

#: Seconds between two beats of a node.
BEAT = 4.0


class Liveness(msgspec.Struct):
    down_after: float = 3 * BEAT
    up_after: int = 2
    online: bool = False
    #: When the state last flipped, and the last beat was heard (monotonic seconds).
    since: float = 0.0
    heard: float = float("-inf")
    streak: int = 0

    def beat(self, now: float, *, certain: bool = False) -> bool:
        """A beat was heard; ``certain`` (a fresh sync, say) counts as enough. True when that flipped the state."""
        self.streak = self.streak + 1 if now - self.heard <= self.down_after else 1
        self.heard = now
        if not self.online and (certain or self.streak >= self.up_after):
            self.online, self.since = True, now
            return True
        return False

    def tick(self, now: float) -> bool:
        """Time passed. True when that flipped the state to offline."""
        if self.online and now - self.heard > self.down_after:
            self.online, self.since, self.streak = False, now, 0
            return True
        return False
