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
from tests.core.pair import until

from edgeward.agent.kinds import load
from edgeward.core.errors import EdgewardError, NotFound
from edgeward.core.resource import Resource, decode
from edgeward.workloads import logs
from edgeward.workloads.edge import AppsEdge

load()


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


@settings(deadline=None)
@given(st.floats(1, 1e9), st.integers(4096, 1 << 30))
def test_the_faster_it_grows_the_sooner_it_is_looked_at(rate: float, cap: int) -> None:
    """A steady writer is above its cap by no more than it writes between two of the soonest looks."""
    growth = logs.Growth()
    now, size, kept, warm = 1.0, 0.0, 0.0, 0
    for _ in range(200):
        pause = growth.look_in(now, int(size), cap)
        assert logs.SOONEST <= pause <= logs.LATEST
        if warm:  # after the first two looks its rate is known
            assert size + kept <= cap + rate * logs.SOONEST + 1, "before it is cut"
        if size > cap // 2:
            kept, size, warm = cap // 2, 0.0, warm + 1
            growth.cut()
        now += pause
        size += rate * pause


def test_a_quiet_file_is_looked_at_seldom_and_a_pause_is_not_trusted() -> None:
    growth = logs.Growth()
    assert growth.look_in(1.0, 0, 1 << 20) == logs.LATEST
    assert growth.look_in(2.0, 0, 1 << 20) == logs.LATEST
    assert growth.look_in(2.1, 400_000, 1 << 20) == logs.SOONEST
    assert growth.look_in(2.2, 400_000, 1 << 20) < logs.LATEST, "it may go on where it left off"


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
        async with asyncio.timeout(90), contextlib.aclosing(logs.follow(path, 7)) as pieces:  # type: ignore[type-var]
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


class _Wish:
    """Two instances of one App, and nothing else."""

    def __init__(self, script: str) -> None:
        process = {"command": ["sh", "-c", script]}
        spec = {"process": process, "replicas": 2, "stop": {"grace": "1s"}}
        doc = {"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": "web"}, "spec": spec}
        self._app = decode(doc)

    def apps(self) -> dict[tuple[str, str], tuple[Resource, int]]:
        return {("default", "web"): (self._app, 2)}

    def config(self, namespace: str, name: str) -> dict[str, str] | None:
        return None

    def secret(self, namespace: str, name: str) -> dict[str, str] | None:
        return None

    def service_env(self, namespace: str) -> dict[str, str]:
        return {}


def test_the_lines_of_several_instances_and_a_reader_that_takes_its_time(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    script = f"printf 'one\\ntw'; touch $EDGEWARD_INSTANCE.up; read x < {fifo}; printf 'o\\n'; exec sleep 1000"
    os.mkfifo(fifo)

    async def body() -> None:
        apps = AppsEdge(
            node="plant-1",
            site="plant",
            data_dir=tmp_path / "data",
            source=_Wish(script),
            report=lambda *_: None,
            event=lambda *_: None,
        )
        running = asyncio.create_task(apps.run())
        try:
            async with asyncio.timeout(180):
                with pytest.raises(NotFound, match=r"App/none: wrote nothing on this node \(see: "):
                    [p async for p in apps.logs("default", "none")]
                await until(lambda: len(list((tmp_path / "data").rglob("*.up"))) == 2)
                ids = sorted(p.stem for p in (tmp_path / "data").rglob("*.up"))
                now = b"".join([p async for p in apps.logs("default", "web")]).splitlines()
                assert sorted(now) == [f"[{i}] {x}".encode() for i in ids for x in ("one", "tw")]
                one = b"".join([p async for p in apps.logs("default", "web", tail=1, instance=ids[0])])
                assert one == b"tw", "one alone is given as it wrote"
                with pytest.raises(EdgewardError, match=r"\?since: 'soon' is no duration"):
                    [p async for p in apps.logs("default", "web", since="soon")]
                got, fd = b"", -1
                followed = apps.logs("default", "web", follow=True)
                async with contextlib.aclosing(followed):  # type: ignore[type-var]
                    async for piece in followed:
                        got += piece
                        if got.count(b"one") == 2 and fd < 0:
                            fd = os.open(fifo, os.O_RDWR)
                            os.write(fd, b"1\n2\n")
                        if b"two" in got:
                            await asyncio.sleep(1.3)  # longer than the look for new instances
                        if got.count(b"two\n") == 2:
                            break
                os.close(fd)
                assert sorted(got.splitlines()) == [f"[{i}] {x}".encode() for i in ids for x in ("one", "two")]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await apps.shutdown(leave=False)

    asyncio.run(body())
