"""Exactly once by a cursor: every crash between two steps, lost tails and wiped stores."""

from __future__ import annotations

import random

import pytest

from edgeward.core.delivery import Bucket, Cursor, Mark, ack_timeout, age, batch_size, is_later, start_at, taken_over


def test_the_age_of_a_batch_does_not_depend_on_who_sets_the_clock() -> None:
    now, day = 1_790_000_000.0, 86400.0
    here = Mark("run2", 5000.0)
    assert Mark.parse(str(here)) == here
    for text in ("", "x", "run:", "run:-1", ":5", "run:nan", "run:1e9"):
        assert Mark.parse(text) is None
    ten_ago = Mark("run2", 4990.0)
    for wall in (100.0, now - day, now, now + 400 * day):
        for stamp in (100.0, now - day, now, now + 400 * day):
            assert age(stamp, ten_ago, wall, here) == 10
    before = Mark("run1", 9e6)
    assert age(now - day, before, now, here) == day, "the machine was off: the wall clock tells"
    assert age(100.0, before, now, here) == 5000, "stamped by a clock that was never set: at least since the start"
    assert age(now - day, before, 100.0, here) == 5000, "the clock is not set yet"
    assert age(now - day, None, now, here) == day


def test_a_message_of_this_run_is_not_in_a_cursor_of_an_earlier_one() -> None:
    now = Mark("run2", 5.0)
    assert is_later(now, "run1", "run2"), "whatever its number and its time stamp are"
    assert not is_later(now, "run2", "run2")
    assert not is_later(Mark("run1", 5.0), "run1", "run2")
    assert not is_later(now, "", "run2"), "a cursor of an earlier release"
    assert not is_later(None, "run1", "run2")


class Simulation:
    """A source stream, a destination whose last message carries the cursor, and a mover that may die anywhere."""

    def __init__(self) -> None:
        self.lineage = "L1"
        self.source: list[tuple[int, int, str]] = []  # seq, stamp, payload
        self.first = 1
        self.clock = 1000
        self.destination: list[str] = []
        self.cursor: Cursor | None = None
        self.serial = 0

    def publish(self) -> str:
        self.serial += 1
        self.clock += 10
        seq = self.source[-1][0] + 1 if self.source else self.first
        self.source.append((seq, self.clock, f"m{self.serial}"))
        return f"m{self.serial}"

    def move(self, rng: random.Random, most: int = 5) -> None:
        """One session of a mover: reads the cursor, moves batches, and ends (is killed) at any point."""
        last = self.source[-1][0] if self.source else self.first - 1
        at = {s: t for s, t, _ in self.source}
        stamp = at.get(self.cursor.seq) if self.cursor else None
        position = start_at(self.cursor, self.lineage, self.first, last, stamp)
        queue = [m for m in self.source if m[0] >= position]
        while queue:
            if rng.random() < 0.2:
                return
            batch, queue = queue[:most], queue[most:]
            fresh = [m for m in batch if not taken_over(self.cursor, self.lineage, m[0], m[1])]
            if fresh:
                # the destination takes batch and cursor together; the mover may never learn of it
                self.destination += [m[2] for m in fresh]
                self.cursor = Cursor(self.lineage, fresh[-1][0], fresh[-1][1])
                if rng.random() < 0.2:
                    return

    def lose_tail(self, n: int) -> list[str]:
        """A power cut takes the last messages; their numbers will be given out again. Returns what was lost unsent."""
        lost = self.source[-n:] if n else []
        self.source = self.source[: len(self.source) - n]
        return [p for _, _, p in lost]

    def trim(self) -> None:
        """Takes away what was delivered, but the last."""
        while len(self.source) > 1 and taken_over(self.cursor, self.lineage, *self.source[0][:2]):
            self.source = self.source[1:]
            self.first = self.source[0][0]

    def wipe(self) -> None:
        self.lineage += "x"
        self.source, self.first = [], 1


@pytest.mark.parametrize("seed", range(300))
def test_every_message_arrives_exactly_once_in_order(seed: int) -> None:
    rng = random.Random(seed)
    s = Simulation()
    sent: list[str] = []
    for _ in range(40):
        for _ in range(rng.randint(0, 6)):
            sent.append(s.publish())
        s.move(rng)
        if rng.random() < 0.3:
            s.trim()
        if rng.random() < 0.15 and len(s.source) > 3:
            lost = s.lose_tail(rng.randint(1, 2))
            arrived = set(s.destination)
            sent = [m for m in sent if m not in lost or m in arrived]
        if rng.random() < 0.05:
            gone = {p for _, _, p in s.source}
            arrived = set(s.destination)
            sent = [m for m in sent if m not in gone or m in arrived]
            s.wipe()
    for _ in range(2000):
        s.move(rng)
    assert s.destination == sent


def test_a_clock_set_back_loses_nothing() -> None:
    cursor = Cursor("L", 10, 5000)
    assert not taken_over(cursor, "L", 11, 4000)


def test_a_reused_number_is_known_by_its_later_stamp() -> None:
    cursor = Cursor("L", 10, 5000)
    assert taken_over(cursor, "L", 10, 5000)
    assert not taken_over(cursor, "L", 10, 6000)


def test_another_lineage_is_all_new() -> None:
    assert start_at(Cursor("old", 900, 1), "new", 1, 5, 1) == 1
    assert not taken_over(Cursor("old", 900, 10**9), "new", 3, 5)


@pytest.mark.parametrize("text", ["", "a", "a:b:c", "a:1", "a:1:2:3", "a:-1:2"])
def test_foreign_headers_are_no_cursor(text: str) -> None:
    assert Cursor.parse(text) is None


def test_cursor_round_trip() -> None:
    cursor = Cursor("abc", 12, 34)
    assert Cursor.parse(str(cursor)) == cursor


def test_batches_follow_the_link() -> None:
    slow = 256 * 1024
    for _ in range(10):
        slow = batch_size(slow, slow / 32_000, slow)  # 256 kbit/s
    assert slow == 16 * 1024
    fast = 16 * 1024
    for _ in range(12):
        fast = batch_size(fast, 0.01, fast)
    assert fast == 1024 * 1024
    assert ack_timeout(0) == 30
    assert ack_timeout(1024 * 1024) > 60


def test_the_bucket_paces() -> None:
    bucket = Bucket(1000.0)
    assert bucket.delay(0.0, 500) == 0.0
    assert bucket.delay(0.0, 500) == 0.5
    assert Bucket(0.0).delay(0.0, 10**9) == 0.0
