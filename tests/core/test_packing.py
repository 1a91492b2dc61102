"""What goes into one hub message, and what is counted as lost."""

from __future__ import annotations

from typing import Any

import msgspec

from edgeward.core.delivery import AT, COUNT, SPAN, TO, TOTAL, Cursor, Mark
from edgeward.core.jsread import Message
from edgeward.core.packing import Has, Parcel, Sent, pack


def batch(seq: int, count: int, total: int, **headers: str) -> Message:
    """A batch of ``count`` readings after which the queue had taken ``total``; its number is its time, in seconds."""
    data = msgspec.msgpack.encode([("t", b"x", n) for n in range(count)])
    stamp = {"Nats-Time-Stamp": f"1970-01-01T00:00:{seq:02}Z"}
    return seq, "ew.out.q", {COUNT: str(count), TOTAL: str(total), **stamp, **headers}, data


def packed(got: list[Message], at: int = 0, **kw: Any) -> Parcel:
    given: dict[str, Any] = {
        "stream": "s", "lineage": "l", "boot": "b", "has": Has(), "sent": Sent(0), "size": 1 << 20,
        "is_aged": lambda headers, stamp: False,
    }  # fmt: skip
    return pack(got, at, **{**given, **kw})


GOT = [batch(1, 2, 2), batch(2, 3, 5), batch(3, 1, 6)]


def test_all_that_fits_goes_and_the_cursor_is_the_last_one() -> None:
    parcel = packed([batch(1, 2, 2), batch(2, 3, 5, **{AT: str(Mark("b", 7.0))})])
    assert (len(parcel.parts), parcel.end, parcel.run, parcel.sent) == (5, 2, "b", Sent(5))
    assert parcel.cursor == Cursor("l", 2, 2_000_000_000)


def test_a_message_is_bounded_and_has_one_batch_at_least() -> None:
    assert packed(GOT, size=1).end == 1
    assert packed(GOT, 1, size=1, sent=Sent(2)).end == 2
    both = len(GOT[0][3]) + len(GOT[1][3])
    assert [packed(GOT, size=s).end for s in (both - 1, both)] == [1, 2]
    assert packed([batch(1, SPAN - 1, SPAN - 1), batch(2, 2, SPAN + 1)]).end == 1


def test_batches_of_another_stream_wait_for_the_next() -> None:
    assert packed([batch(1, 2, 2), batch(2, 3, 5, **{TO: "other"})]).end == 1
    assert packed([batch(1, 2, 2), batch(2, 3, 5, **{TO: "s"})]).end == 2, (
        "the declared one is meant where none is named"
    )


def test_what_the_hub_has_is_not_sent_again() -> None:
    parcel = packed(GOT, has=Has(9, Cursor("l", 2, 2_000_000_000)), sent=Sent(5))
    assert (len(parcel.parts), parcel.end, parcel.sent) == (1, 3, Sent(6))
    nothing = packed(GOT, has=Has(9, Cursor("l", 3, 3_000_000_000)), sent=Sent(6))
    assert (nothing.parts, nothing.cursor, nothing.end, nothing.sent) == ([], None, 3, Sent(6))


def test_a_hole_in_the_totals_is_counted_for_age_first_as_far_as_that_is_known() -> None:
    parcel = packed([batch(8, 2, 12)], sent=Sent(3, 1, 1, aged=4))
    assert parcel.sent == Sent(12, 1 + 3, 1 + 4, 0)


def test_what_is_too_old_is_counted_and_ends_a_message_that_has_begun() -> None:
    def old(headers: dict[str, str], stamp: int) -> bool:
        return stamp == 2_000_000_000

    begun = packed(GOT, is_aged=old)
    assert (begun.end, begun.sent) == (1, Sent(2))
    rest = packed(GOT, 1, is_aged=old, sent=begun.sent)
    assert (rest.end, len(rest.parts), rest.sent) == (3, 1, Sent(6, 0, 3))
