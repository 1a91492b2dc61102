"""Exactly once without a window: the decisions of a mover between two streams. Pure.

A mover reads a source stream in order and writes batches to a destination. Every batch carries the *cursor*: the
source's lineage, and sequence and time stamp of the last source message in it. The destination's last message of a
subject therefore says what was taken over, atomically with the data itself, however long ago that was. After any doubt
the mover reads it and goes on behind it. These functions say where that is, also when a power cut took the source's
tail and its numbers were given out again, or when the source was made anew.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SRC = "Ew-Src"
COUNT = "Ew-Count"
TOTAL = "Ew-Total"
#: Readings that were never sent, up to this batch: ``<for want of room>,<for their age>``.
LOST = "Ew-Lost"
#: The hub's stream that was declared when a batch was taken in.
TO = "Ew-To"
#: When a batch was taken in, by a clock that does not step: :class:`Mark`.
AT = "Ew-At"
#: At the hub: the run of the node's machine in which the cursor's message was taken in.
RUN = "Ew-Run"
#: A clock that says less was never set: no release of Edgeward is older (seconds since 1970).
NEVER_SET = 1_760_000_000.0
_NUMBER = re.compile(r"\d{1,12}(\.\d+)?")
#: Readings in one batch at most; a reading's public number is ``sequence * SPAN + index``.
SPAN = 4096


class Cursor(NamedTuple):
    """The last source message that a destination took over. ``stamp`` is nanoseconds of the source's clock."""

    lineage: str
    seq: int
    stamp: int

    def __str__(self) -> str:
        return f"{self.lineage}:{self.seq}:{self.stamp}"

    @classmethod
    def parse(cls, text: str) -> Cursor | None:
        """None for what is no cursor (a message of somebody else's)."""
        parts = text.split(":")
        if len(parts) != 3 or not parts[1].isdigit() or not parts[2].isdigit():
            return None
        return cls(parts[0], int(parts[1]), int(parts[2]))


class Mark(NamedTuple):
    """A moment of one run of a machine: which run, and seconds since its start."""

    boot: str
    up: float

    def __str__(self) -> str:
        return f"{self.boot}:{self.up:.1f}"

    @classmethod
    def parse(cls, text: str) -> Mark | None:
        boot, _, up = text.rpartition(":")
        return cls(boot, float(up)) if boot and _NUMBER.fullmatch(up) else None


def taken_over(cursor: Cursor | None, lineage: str, seq: int, stamp: int) -> bool:
    """Whether the destination has this source message already.

    The number alone is not enough: after a power cut a new message may carry a number that was given out before; its
    time stamp is then later than the cursor's. The time stamp alone is not enough: a clock may be set back.
    """
    return cursor is not None and cursor.lineage == lineage and seq <= cursor.seq and stamp <= cursor.stamp


def is_later(mark: Mark | None, cursor_run: str, here: str) -> bool:
    """Whether a source message is of this run of the machine (``here``) and the cursor of an earlier one: it is new.

    A power cut takes a tail whose numbers are given out again, and without a battery the new time stamps are older.
    """
    return mark is not None and mark.boot == here and cursor_run not in ("", here)


def start_at(cursor: Cursor | None, lineage: str, first: int, last: int, stamp_at_cursor: int | None) -> int:
    """The source sequence to read from. ``stamp_at_cursor``: the time stamp of the source's message with the cursor's
    number, None when there is none. What is read must still pass :func:`taken_over`."""
    if cursor is None or cursor.lineage != lineage:
        return first
    if cursor.seq < first:
        return first
    if cursor.seq <= last and stamp_at_cursor == cursor.stamp:
        return cursor.seq + 1
    # the tail was lost: what is there with the cursor's numbers may be new
    return first


def age(stamp: float, mark: Mark | None, wall: float, here: Mark) -> float:
    """Seconds since a batch was taken in, at the moment ``here`` with the wall clock ``wall``.

    Within one run of the machine whoever sets the clock changes nothing. Of an earlier run only the wall clock tells
    (``stamp``), if it was right then and is now; if not, the batch is at least as old as this run.
    """
    if mark is not None and mark.boot == here.boot:
        return max(0.0, here.up - mark.up)
    if mark is None:  # from a release that did not mark
        return wall - stamp
    return max(here.up, wall - stamp) if stamp >= NEVER_SET else here.up


def batch_size(now: int, seconds: float, sent: int, *, low: int = 16 * 1024, high: int = 1024 * 1024) -> int:
    """The next batch's size in bytes, so that one takes about half a second on the link, given the last one's."""
    if seconds <= 0:
        return high
    ideal = int(sent / seconds * 0.5)
    grown = min(ideal, now * 2)
    return max(low, min(high, grown if ideal > now else ideal))


def parse_lost(text: str) -> tuple[int, int]:
    """(for want of room, for their age) of a ``LOST`` header; zeros for none."""
    full, _, age = text.partition(",")
    return (int(full), int(age)) if full.isdigit() and age.isdigit() else (0, 0)


def ack_timeout(size: int) -> float:
    """Seconds after which ``size`` bytes without a receipt count as lost, on a link of 8 kB/s or better."""
    return 30.0 + size / 8192


class Bucket:
    """A token bucket, over bytes or readings; time is an argument."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._free_at = 0.0

    def delay(self, now: float, size: float) -> float:
        """Seconds to wait before ``size`` bytes may go; books them."""
        if self.rate <= 0:
            return 0.0
        start = max(now, self._free_at)
        self._free_at = start + size / self.rate
        return start - now

    def book(self, now: float, size: float) -> float:
        """Books what has gone already; seconds until more may go."""
        self.delay(now, size)
        return max(0.0, self._free_at - now)
