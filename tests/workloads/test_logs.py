"""Files with a hard cap: cut, read from the end, followed over a cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.workloads import logs


@pytest.mark.parametrize(("size", "cuts"), [(0, False), (50, False), (51, True), (1000, True)])
def test_it_cuts_above_half_of_the_cap_and_keeps_the_newest(tmp_path: Path, size: int, cuts: bool) -> None:
    path = tmp_path / "i.log"
    data = bytes(n % 251 for n in range(size))
    path.write_bytes(data)
    assert logs.rotate(path, 100) is cuts
    old = tmp_path / "i.log.1"
    if cuts:
        assert path.read_bytes() == b""
        assert old.read_bytes() == data[-50:]
    else:
        assert path.read_bytes() == data
        assert not old.exists()


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=30), st.integers(1, 400))
def test_file_and_predecessor_stay_within_the_cap(pieces: list[bytes], cap: int) -> None:
    """And together they are the end of what was written: nothing in between is lost."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "i.log"
        old = Path(folder) / "i.log.1"
        written = b""
        for piece in pieces:
            with path.open("ab") as f:
                f.write(piece)
            written += piece
            logs.rotate(path, cap)
            kept = (old.read_bytes() if old.exists() else b"") + path.read_bytes()
            assert len(kept) <= cap
            assert written.endswith(kept)
            assert written == kept or len(kept) >= cap // 2, "it forgets no more than it must"


def test_the_writer_goes_on_in_the_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "i.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"x" * 80)
        assert logs.rotate(path, 100)
        writer.write(b"after\n")
    assert path.read_bytes() == b"after\n", "no hole of zeros before it"


def test_what_cannot_be_copied_is_cut_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "i.log"
    path.write_bytes(b"x" * 80)
    (tmp_path / "i.log.1").symlink_to("/dev/full")
    assert logs.rotate(path, 100)
    assert path.stat().st_size == 0
    assert not (tmp_path / "i.log.1").is_symlink()


def test_a_missing_file_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "none.log"
    assert not logs.rotate(path, 100)
    assert logs.tail(path, 5) == b""
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
        assert logs.tail(path, lines) == b"".join(whole[-lines:] if lines else [])


def test_tail_reads_far_back_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "i.log"
    long = [b"%d " % n + b"y" * 40_000 + b"\n" for n in range(8)]  # no line fits the boundaries of the pieces
    path.write_bytes(b"".join(long))
    for lines in (1, 2, 7, 8, 9):
        assert logs.tail(path, lines) == b"".join(long[-lines:])


def test_follow_gives_each_byte_once_also_over_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "i.log"
    path.write_bytes(b"skipped" + b"a" * 100_000)

    async def body() -> None:
        async with asyncio.timeout(30), contextlib.aclosing(logs.follow(path, 7)) as pieces:  # type: ignore[type-var]
            got = b""
            while len(got) < 100_000:
                got += await anext(pieces)
            assert got == b"a" * 100_000
            with path.open("ab") as f:
                f.write(b"more")
            assert await anext(pieces) == b"more"
            assert logs.rotate(path, 1000)
            with path.open("ab") as f:
                f.write(b"again")
            assert await anext(pieces) == b"again"
            path.unlink()
            assert await anext(pieces, None) is None, "a file that is gone ends it"

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
