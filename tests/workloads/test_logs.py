"""What instances wrote: read from the end, followed over new files, told apart."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.workloads import logs, pump


def test_a_missing_file_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "none.log"
    output = logs.Output(path)
    assert output.tail(5) == b""

    async def body() -> None:
        assert [piece async for piece in output.follow()] == []

    asyncio.run(body())
    assert not logs.changed_since(path, 1e9)


def test_changed_since(tmp_path: Path) -> None:
    path = tmp_path / "i.log"
    path.write_bytes(b"")
    assert logs.changed_since(path, 3600)
    old = path.stat().st_mtime - 7200
    os.utime(path, (old, old))
    assert not logs.changed_since(path, 3600)
    assert logs.changed_since(path, 10_000)


_LINES = st.lists(st.text(alphabet="ab\r", max_size=5).map(str.encode), max_size=8)


@settings(deadline=None)
@given(_LINES, st.integers(0, 60), st.booleans(), st.integers(0, 20))
def test_tail_is_the_end_of_both_files(written: list[bytes], cut: int, ended: bool, lines: int) -> None:
    """Whatever is in a line (the returns of a progress bar, too), wherever it was cut, and also while the last one is
    still being written."""
    text = b"".join(line + b"\n" for line in written) + (b"" if ended else b"half")
    before, now = text[:cut], text[cut:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "i.log"
        path.write_bytes(now)
        path.with_name("i.log.1").write_bytes(before)
        parts = (before + now).split(b"\n")
        whole = [p + b"\n" for p in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
        assert tail(path, lines) == b"".join(whole[-lines:] if lines else [])


def tail(path: Path, lines: int) -> bytes:
    output = logs.Output(path)
    try:
        return output.tail(lines)
    finally:
        output.close()


def test_tail_reads_far_back_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "i.log"
    long = [b"%d " % n + b"y" * 40_000 + b"\n" for n in range(8)]  # no line fits the boundaries of the pieces
    path.write_bytes(b"".join(long))
    for lines in (1, 2, 7, 8, 9):
        assert tail(path, lines) == b"".join(long[-lines:])


@contextlib.contextmanager
def written_by_a_pump(path: Path, cap: int) -> Iterator[Callable[[bytes], None]]:
    """Puts bytes into an instance's files as the pump does, here and now."""
    fifo = path.with_suffix(".pipe")
    os.mkfifo(fifo)
    source = pump.Source(str(fifo), path.stem, cap)
    with fifo.open("wb", buffering=0) as out:

        def write(data: bytes) -> None:
            for at in range(0, len(data), 4096):
                out.write(data[at : at + 4096])
                with contextlib.suppress(BlockingIOError):
                    while source.move():
                        pass

        yield write
    source.close()


_STEPS = st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=30)


@given(_STEPS, st.integers(0, 4))
def test_tail_and_follow_give_each_byte_once_over_new_files(steps: list[tuple[int, bool]], lines: int) -> None:
    """A reader that looks at least once while a file is the newest or the one before misses nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "i.log"
        with written_by_a_pump(path, 80) as write:
            write(b"a\nb\nc\n")
            output = logs.Output(path)
            got = output.tail(lines)
            written = b"".join([b"a\n", b"b\n", b"c\n"][3 - min(lines, 3) :])
            assert got == written
            unseen = 0
            for n, (count, look) in enumerate(steps):
                if look or unseen + count > 40:  # a file holds 40
                    unseen = 0
                    if n % 3 == 0 and (mark := output.mark()):  # the agent was ended meanwhile
                        output.close()
                        output = logs.Output(path)
                        assert output.resume(mark)
                    for _ in range(4):  # what is left of one file, the turn to the next, and that one's
                        got += output._next() or b""
                    assert got == written
                data = b"%d" % (n % 10) * count
                write(data)
                written, unseen = written + data, unseen + count
            output.close()


def test_what_comes_between_two_looks_is_read_before_the_next_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "i.log"
    same = logs._same
    with written_by_a_pump(path, 80) as write:
        output = logs.Output(path)
        assert output.tail(1) == b""
        late = [b"1" * 30 + b"2" * 20]

        def looked(file: BinaryIO, where: Path) -> bool:
            while late:  # right after it read and found nothing
                write(late.pop())
            return same(file, where)

        monkeypatch.setattr(logs, "_same", looked)
        assert [output._next() for _ in range(3)] == [b"1" * 30 + b"2" * 10, b"", b"2" * 10]
        output.close()


def test_who_reads_too_slowly_is_told(tmp_path: Path) -> None:
    path = tmp_path / "i.log"
    with written_by_a_pump(path, 80) as write:
        output = logs.Output(path)
        assert output.tail(9) == b""
        write(b"1" * 30)
        assert output._next() == b"1" * 30
        write(b"2" * 100)
        got = [output._next() or b"" for _ in range(6)]
        assert got[0] == b"\n" + logs.GAP
        assert b"".join(got[1:]) == b"2" * 50, "and goes on with what there is: 40 before, 10 of now"
        output.close()


def test_a_mark_of_what_is_gone_or_another_files(tmp_path: Path) -> None:
    path = tmp_path / "i.log"
    with written_by_a_pump(path, 80) as write:
        assert logs.Output(path).mark() == ""
        write(b"1" * 30)
        output = logs.Output(path)
        assert output.tail(1) == b"1" * 30
        mark = output.mark()
        assert output.mark(31) == ""
        inode, at, total = mark.split(".")
        mine = [f"{inode}.{at}.0", f"{inode}.31.{total}", f"{inode}.x.{total}"]
        for wrong in ("", "x", "1.2", "..", f"1.{at}.{total}", *mine):
            assert not output.resume(wrong)
            assert output._next() == b"1" * 30, "it begins with the oldest"
        assert output.resume(mark)
        assert output._next() == b""
        write(b"2" * 100)
        assert not output.resume(mark)
        assert output._next() == b"2" * 40
        assert [output._next(), output._next()] == [b"", b"2" * 10]
        output.close()


def test_follow_waits_for_more_until_the_files_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "i.log"

    async def body() -> None:
        output = logs.Output(path)
        with written_by_a_pump(path, 400_000) as write:
            write(b"skipped\n" + b"a" * 100_000)
            assert output.tail(0) == b""
            async with asyncio.timeout(90), contextlib.aclosing(output.follow()) as pieces:  # type: ignore[type-var]
                later = asyncio.create_task(anext(pieces))
                write(b"more")
                assert await later == b"more"
                os.truncate(path, 0)  # by an operator
                later = asyncio.create_task(anext(pieces))
                await asyncio.sleep(0)
                write(b"again")
                assert await later == b"again"
                path.rename(path.with_name("i.log.1"))  # and the pump was killed right here
                later = asyncio.create_task(anext(pieces))
                await asyncio.sleep(0)
                path.write_bytes(b"new")
                assert await later == b"new"
                path.unlink()
                path.with_name("i.log.1").unlink()
                assert await anext(pieces, None) is None, "files that are gone end it"
        output.close()

    asyncio.run(body())


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab\r\n", max_size=6).map(str.encode), max_size=12))
def test_marks_stand_before_lines_wherever_the_pieces_end(pieces: list[bytes]) -> None:
    """Lines of several sources are mixed; half a line never is."""
    marked = logs.Marked(b"> ")
    out = [marked.feed(piece) for piece in pieces] + [marked.rest(), marked.rest()]
    text = b"".join(pieces)
    lines = text.removesuffix(b"\n").split(b"\n") if text else []
    assert b"".join(out) == b"".join(b"> %b\n" % line for line in lines)
    assert all(o == b"" or o.endswith(b"\n") for o in out)
    plain = logs.Marked(b"")
    assert [plain.feed(piece) for piece in pieces] + [plain.rest()] == [*pieces, b""]


def test_a_line_without_an_end_is_not_kept_for_ever() -> None:
    marked = logs.Marked(b"> ")
    out = b"".join(marked.feed(b"x" * 10_000) for _ in range(20))
    assert len(out) > 100_000
    assert all(line.startswith(b"> ") for line in out.splitlines())
