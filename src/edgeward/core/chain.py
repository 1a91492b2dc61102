"""A chain of records: each holds the hash of the one before it, so none can be changed, taken out or put in unseen.

Pure.

``hash = SHA-256(hash of the record before, its own number, its own bytes)``. What cannot be seen from the chain itself
is that its end was cut off, or that all of it was made anew: for that a :class:`Head` is kept elsewhere, which names a
record that was there, and where the chain began then (the oldest go).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from edgeward.core.errors import Invalid

#: The first line of an export names it.
FORMAT = "edgeward-audit/1"
#: What stands before the first record.
GENESIS = "0" * 64


class Link(msgspec.Struct, frozen=True):
    """One record: its number, the hash of the one before, its own, and its bytes (JSON)."""

    seq: int
    prev: str
    hash: str
    body: str


class Head(msgspec.Struct, frozen=True):
    """What is known elsewhere: the record ``seq`` had this hash, and ``first`` was the oldest one, behind ``prev``."""

    seq: int
    hash: str
    first: int
    prev: str
    time: str = ""


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """``broken``: the number of the first record that is not what it was; 0 when all are."""

    records: int
    first: int = 0
    last: int = 0
    broken: int = 0
    why: str = ""
    #: Up to which record somebody elsewhere vouches; behind it a cut end would not be seen.
    vouched: int = 0


def link_hash(prev: str, seq: int, body: str) -> str:
    return hashlib.sha256(bytes.fromhex(prev) + seq.to_bytes(8, "big") + body.encode()).hexdigest()


def link(prev: str, seq: int, body: str) -> Link:
    return Link(seq, prev, link_hash(prev, seq, body), body)


def check(links: Iterable[Link], head: Head | None = None) -> Verdict:
    """Whether the chain is what it was; ``links`` in order of their numbers."""
    count = first = last = 0
    before = ""
    vouched = 0

    def broken(seq: int, why: str) -> Verdict:
        return Verdict(count, first, last, seq, why, vouched)

    for one in links:
        if not count:
            first = one.seq
            if head is not None and one.seq > head.first:
                return broken(head.first, f"records {head.first} to {one.seq - 1} are gone")
            if one.seq == 1 and one.prev != GENESIS:
                return broken(1, "the first record names one before it")
        elif one.seq != last + 1:
            return broken(last + 1, "is gone" if one.seq > last + 1 else "is there twice, or out of order")
        elif one.prev != before:
            return broken(one.seq, "does not follow the record before it")
        if head is not None and one.seq == head.first and one.prev != head.prev:
            return broken(one.seq, "is not the record that the chain began with")
        try:
            right = link_hash(one.prev, one.seq, one.body)
        except (ValueError, OverflowError):
            right = ""
        if right != one.hash:
            return broken(one.seq, "was changed")
        if head is not None and one.seq == head.seq:
            if one.hash != head.hash:
                return broken(one.seq, "is not the record that is vouched for: the chain was made anew")
            vouched = one.seq
        count, last, before = count + 1, one.seq, one.hash
    if head is not None and head.seq > last:
        return broken(last + 1, f"the end is cut off: record {head.seq} was there at {head.time or 'some time'}")
    return Verdict(count, first, last, 0, "", vouched)


def check_export(lines: Iterable[bytes]) -> Verdict:
    """Whether an exported chain is what it was. Raises ``Invalid`` when it is no export."""
    numbered = iter(enumerate(lines, 1))
    try:
        first = msgspec.json.decode(next(numbered)[1])
        if not isinstance(first, dict) or first.get("format") != FORMAT:
            raise Invalid(f"is no {FORMAT} file", line=1)
        head = msgspec.convert(first["head"], Head) if first.get("head") else None
        if first.get("since"):
            head = None  # a part: only its inner order can be checked
    except (StopIteration, msgspec.DecodeError, msgspec.ValidationError):
        raise Invalid(f"is no {FORMAT} file", line=1, remedy="make one: edgeward audit export FILE") from None

    def links() -> Iterable[Link]:
        for n, line in numbered:
            if line.strip():
                try:
                    yield msgspec.json.decode(line, type=Link)
                except (msgspec.DecodeError, msgspec.ValidationError) as e:
                    raise Invalid(f"is damaged: {e}", line=n) from None

    return check(links(), head)
