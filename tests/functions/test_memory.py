"""What functions remember is on the disk when they are told so, and bounded for each."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from tests.functions.node import looped

from edgeward.core.errors import Conflict, TooLarge, Unreachable
from edgeward.functions.memory import OVERHEAD, Memory


@looped
async def test_what_is_told_is_in_the_file(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "state.db")
    assert memory.get("a", "k") is None
    assert await memory.keys("a") == []
    assert not await memory.delete("a", "k")
    assert not (tmp_path / "state.db").exists()  # made at the first write
    revision = await memory.set("a", "k", b"v", None, 1000)
    other = sqlite3.connect(tmp_path / "state.db")  # somebody who comes after a kill
    assert other.execute("SELECT value, revision FROM state").fetchall() == [(b"v", revision)]
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert memory._writer is not None
    assert memory._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    other.close()
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600
    await memory.close()


@looped
async def test_writes_that_come_together_are_one_transaction_and_each_has_its_own_answer(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "state.db")
    got = await asyncio.gather(
        *(memory.set("a", f"k{n % 3}", b"v%d" % n, 0, 1000) for n in range(9)),
        memory.set("b", "k", b"x" * 500, None, 100),
        return_exceptions=True,
    )
    assert sum(isinstance(g, Conflict) for g in got) == 6
    assert isinstance(got[-1], TooLarge)
    assert await memory.keys("a") == ["k0", "k1", "k2"]
    assert memory.size("a") == 3 * (2 + 2 + OVERHEAD)
    await memory.close()


@looped
async def test_what_is_counted_is_what_is_there_after_a_restart(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "state.db")
    await memory.set("a", "k", b"x" * 50, None, 150)
    last = await memory.set("a", "gone", b"1", None, 250)
    assert await memory.delete("a", "gone")
    await memory.close()
    memory = Memory(tmp_path / "state.db")
    assert await memory.set("c", "k", b"", None, 150) > last  # no revision is given out twice
    with pytest.raises(TooLarge, match="at most 150"):
        await memory.set("a", "l", b"x" * 50, None, 150)
    await memory.keep({"c"})
    assert await memory.keys("a") == []
    assert await memory.set("a", "l", b"x" * 50, None, 150)
    await memory.close()


@looped
async def test_a_disk_that_takes_nothing_is_said_and_nothing_is_half_written(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "no" / "state.db")
    with pytest.raises(Unreachable, match="cannot be written"):
        await memory.set("a", "k", b"v", None, 1000)
    (tmp_path / "no").mkdir()
    assert await memory.set("a", "k", b"v", None, 1000) == 1
    memory._writer.execute("PRAGMA max_page_count = 1")  # type: ignore[union-attr]
    with pytest.raises(Unreachable, match="free disk space"):
        await memory.set("a", "big", b"v" * 100_000, None, 1 << 20)
    memory._writer.execute("PRAGMA max_page_count = 100000")  # type: ignore[union-attr]
    assert memory.size("a") == 1 + 1 + OVERHEAD
    assert await memory.keys("a") == ["k"]
    assert await memory.set("a", "k", b"w", 1, 1000) == 2
    await memory.close()


@looped
async def test_keys_by_their_beginning_and_not_too_many_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeward.functions.memory.MAX_KEYS", 5)
    memory = Memory(tmp_path / "state.db")
    for key in ("a", "a/1", "a/2", "a~", "b", "~"):
        await memory.set("f", key, b"", None, 10_000)
        await memory.set("g", key + "!", b"", None, 10_000)
    assert await memory.keys("f", "a") == ["a", "a/1", "a/2", "a~"]
    assert await memory.keys("f", "a/") == ["a/1", "a/2"]
    assert await memory.keys("f", "~") == ["~"]
    assert await memory.keys("f", "c") == []
    with pytest.raises(TooLarge, match="more than 5 keys begin with ''"):
        await memory.keys("f")
    await memory.close()
