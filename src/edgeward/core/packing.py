"""Which of a queue's batches go into the hub's next message, and what that says of lost ones. Pure.

In: messages of the queue's stream in order, what the hub has, and what is known to have been lost. Out: a
:class:`Parcel`. What the hub has already is left out, what is too old is left out and counted, a hole in the running
totals is counted as lost. ``mover.py`` sends it; where a mover goes on after a doubt is decided in ``delivery.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from edgeward.core.delivery import AT, COUNT, SPAN, TO, TOTAL, Cursor, Mark, is_later, taken_over
from edgeward.core.jsread import Message, stamp_of

_decode_raw = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


class Sent(NamedTuple):
    """What a queue got rid of, in readings of its whole life. ``total``: up to which of them the hub has it, None while
    it was not asked; ``lost_full``, ``lost_age``: never sent, as the hub's last message says. ``aged``: dropped for age
    while it was not known what the hub has: part of the next gap."""

    total: int | None = None
    lost_full: int = 0
    lost_age: int = 0
    aged: int = 0


class Has(NamedTuple):
    """What the hub's stream has of a queue: its last message's number, cursor, and run of the machine."""

    seq: int = 0
    cursor: Cursor | None = None
    run: str = ""


class Parcel(NamedTuple):
    """One hub message. ``end``: where in the messages the next one begins; ``cursor``: None when there is nothing to
    send; ``sent``: the account once the hub has it."""

    parts: list[msgspec.Raw]
    end: int
    cursor: Cursor | None
    run: str
    sent: Sent


def pack(
    got: Sequence[Message],
    at: int,
    *,
    stream: str,
    lineage: str,
    boot: str,
    has: Has,
    sent: Sent,
    size: int,
    is_aged: Callable[[dict[str, str], int], bool],
) -> Parcel:
    """As many batches from ``got[at:]`` as fit into ``size`` bytes, all for the stream that the first one is for.

    ``stream``: the one of batches that name none; ``boot``: which run of the machine this is; ``is_aged``: of a
    message's headers and its time stamp in ns.
    """
    to = got[at][2].get(TO, stream)
    parts: list[msgspec.Raw] = []
    used, end, cursor, run = 0, at, None, ""
    total, lost_full, lost_age, unknown = sent
    while end < len(got):
        seq, _, headers, data = got[end]
        stamp = stamp_of(headers)
        count, running = int(headers.get(COUNT, 0)), int(headers.get(TOTAL, 0))
        if headers.get(TO, stream) != to:
            break
        mark = Mark.parse(headers.get(AT, ""))
        known = taken_over(has.cursor, lineage, seq, stamp)
        if not known or is_later(mark, has.run, boot):
            aged = is_aged(headers, stamp)
            if parts and (aged or len(parts) + count > SPAN or used + len(data) > size):
                break
            gap = running - count - (total or 0)
            if gap > 0:  # the bound or the age took away what was never sent
                by_age = min(gap, unknown)
                unknown -= by_age
                lost_age, lost_full = lost_age + by_age, lost_full + gap - by_age
            total = running
            if aged:
                lost_age += count
            else:
                parts += _decode_raw(data)
                used += len(data)
                cursor, run = Cursor(lineage, seq, stamp), mark.boot if mark else ""
        end += 1
    return Parcel(parts, end, cursor, run, Sent(total, lost_full, lost_age, unknown))
