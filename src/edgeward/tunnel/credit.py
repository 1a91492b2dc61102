"""How much a sender may have under way on one stream, and what a session keeps until it is known to have arrived. Pure.

:class:`Window` is the receiver's: it is told what came and what was taken out of its hands, and says how much more the
other side may send. It follows what the stream carries in a round trip, by the shortest round trip that was seen: on a
slow link a bulk stream so fills the link and not the queues before it, where everybody else's small requests wait; on
a fast one the window opens. A reader that stands still has at most one window in its hands (:data:`LARGEST`).

:class:`Kept` is the sender's: the bytes of a session's frames that the other side has not confirmed, for a link that
comes back after a flap.
"""

from __future__ import annotations

from collections import deque

from edgeward.tunnel.framing import FIRST

SMALLEST, LARGEST = 64 * 1024, 768 * 1024
#: Seconds beside the round trip in which a process may be busy with others.
_BUSY = 0.008
#: The window over what a round trip carries. Over an emulated 4g link (10 Mbit/s, 70 ms, 0.2 % lost) 2 fills 80 % of
#: the link, 3.5 as much as ssh with its 2 MiB, while a small request waits a third of the time that it waits there.
_FACTOR = 3.5
#: Bytes that a session may have under way without a confirmation.
UNCONFIRMED = 8 << 20


class Window:
    """The receiver's side of a stream."""

    __slots__ = ("_begin", "_took", "allowed", "held", "size")

    def __init__(self, now: float) -> None:
        self.size = FIRST
        #: What the other side may still send.
        self.allowed = FIRST
        #: What came and was not taken.
        self.held = 0
        self._begin, self._took = now, 0

    def received(self, n: int) -> bool:
        """False: the other side sent more than it may."""
        self.allowed -= n
        self.held += n
        return self.allowed >= 0

    def consumed(self, n: int, now: float, rtt: float) -> int:
        """What the other side may be told to send more; 0: nothing worth a frame. ``rtt``: the shortest seen."""
        self.held -= n
        self._took += n
        period = now - self._begin
        if period >= rtt + _BUSY:
            want = int(_FACTOR * self._took / period * (rtt + _BUSY))
            # one slow turn (a loss, a reader that paused) says little of the link: it shrinks slowly
            want = min(max(want, self.size * 15 // 16), self.size * 2)
            self.size = min(max(want, SMALLEST), LARGEST)
            self._begin, self._took = now, 0
        more = self.size - self.allowed - self.held
        if more < self.size // 4:
            return 0
        self.allowed += more
        return more


class Kept:
    """The bytes that were sent and not confirmed."""

    __slots__ = ("_first", "_pieces", "sent", "size")

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        #: Bytes sent in all.
        self.sent = 0
        self.size = 0
        self._first = 0

    @property
    def full(self) -> bool:
        return self.size >= UNCONFIRMED

    def add(self, data: bytes) -> None:
        self._pieces.append(data)
        self.sent += len(data)
        self.size += len(data)

    def confirm(self, received: int) -> bool:
        """The other side has so many bytes. False: it cannot."""
        if not self._first <= received <= self.sent:
            return received < self._first
        while self._pieces and self._first + len(self._pieces[0]) <= received:
            piece = self._pieces.popleft()
            self._first += len(piece)
            self.size -= len(piece)
        return True

    def behind(self, received: int) -> list[bytes] | None:
        """What is to be sent again to one who has so many bytes; None when that is not here any more."""
        if not self._first <= received <= self.sent:
            return None
        skip, again = received - self._first, []
        for piece in self._pieces:
            if skip >= len(piece):
                skip -= len(piece)
                continue
            again.append(piece[skip:] if skip else piece)
            skip = 0
        return again
