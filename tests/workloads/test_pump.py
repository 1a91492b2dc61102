"""The pump with real pipes and processes: a cap that holds, and not a byte lost, whoever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.pair import until

from edgeward.core import proc
from edgeward.workloads import pump
from edgeward.workloads.pipes import Pipes


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[bytes]]]:
    """What a test started; ended whatever happens."""
    found: list[subprocess.Popen[bytes]] = []
    yield found
    for one in found:
        one.kill()
        one.wait()


@contextlib.asynccontextmanager
async def kept(pipes: Pipes) -> AsyncIterator[asyncio.Task[None]]:
    """An agent's part in it. At the end the pump is ended too."""
    task = asyncio.create_task(pipes.run())
    try:
        async with asyncio.timeout(150):
            yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await pipes.close(leave=False)


async def pump_of(pipes: Pipes) -> proc.ProcId:
    found: list[proc.ProcId] = []

    async def there() -> bool:
        living = await pipes._living()
        found[:] = [living[0]] if living else []
        return bool(found)

    await until(there)
    return found[0]


def start(pipes: Pipes, log: Path, cap: int, *argv: str) -> subprocess.Popen[bytes]:
    out = pipes.make(log, cap)
    try:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    finally:
        os.close(out)


def text(log: Path) -> bytes:
    old = log.with_name(log.name + ".1")
    return (old.read_bytes() if old.exists() else b"") + log.read_bytes()


def size(folder: Path) -> int:
    """Bytes of the files in a folder; a file that is renamed meanwhile may be counted twice, never missed."""
    total = 0
    for path in folder.glob("*.log*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("splices", [True, False])
@settings(deadline=None, max_examples=40)
@given(st.lists(st.binary(min_size=1, max_size=90), max_size=30), st.integers(20, 200))
def test_the_newest_bytes_within_the_cap(splices: bool, pieces: list[bytes], cap: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fifo, log = Path(folder) / "i.pipe", Path(folder) / "i.log"
        os.mkfifo(fifo)
        source = pump.Source(str(fifo), "i", cap)
        source._copies = not splices
        written = b""
        with fifo.open("wb", buffering=0) as out:
            for piece in pieces:
                out.write(piece)
                written += piece
                with contextlib.suppress(BlockingIOError):
                    while source.move():
                        assert len(text(log)) <= cap
                kept = text(log)
                assert written.endswith(kept)
                assert written == kept or len(kept) >= cap // 2, "it forgets no more than it must"
        assert source.move() == 0, "nobody can write any more: it is over"
        source.close()


def test_what_a_full_disk_did_not_take_is_counted(tmp_path: Path) -> None:
    """A folder in the file's place stands for the disk: nothing can be written."""
    fifo, log = tmp_path / "i.pipe", tmp_path / "i.log"
    os.mkfifo(fifo)
    log.mkdir()
    source = pump.Source(str(fifo), "i", 4096)
    with fifo.open("wb", buffering=0) as out:
        out.write(b"x" * 10_000)
        assert source.move() == 10_000, "the writer does not wait"
        out.write(b"y" * 5)
        assert source.move() == 5
        log.rmdir()
        out.write(b"again\n")
        assert source.move() == 6
        assert text(log) == b"\n[edgeward: 10005 bytes of output were lost: Is a directory]\nagain\n"
        # and an operator who cuts the file leaves no hole
        os.truncate(log, 0)
        out.write(b"more\n")
        assert source.move() == 5
        assert text(log) == b"more\n"
    source.close()


def test_a_pump_that_starts_on_a_full_disk_keeps_no_app_waiting(
    tmp_path: Path, running: list[subprocess.Popen[bytes]]
) -> None:
    """A limit of no byte in any file stands for the disk: not even who it is can the pump write into its lock."""

    async def body() -> None:
        pipes = Pipes(tmp_path)
        log = tmp_path / "ns" / "app" / "i.log"
        lock = tmp_path / ".pump.lock"
        none, most = 0, resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (none, most[1]))
        try:  # the pump that is started here has the limit
            app = start(pipes, log, 4096, "/bin/sh", "-c", "head -c 1000000 /dev/zero; sleep 600")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
        running.append(app)
        last = start(pipes, log.with_name("j.log"), 4096, "/bin/sh", "-c", "head -c 1000000 /dev/zero")
        running.append(last)

        async def ended() -> bool:
            return last.poll() == 0

        await until(ended)
        assert log.read_bytes() == b""
        async with kept(pipes):
            living = await pump_of(pipes)
            assert lock.read_bytes() == b""
            # there is room again, and it is told something: then it says who it is
            resource.prlimit(living.pid, resource.RLIMIT_FSIZE, most)

            async def signed() -> bool:
                pipes.poke()
                return lock.read_text().startswith(f"{living.pid} ")

            await until(signed)
            assert pipes.restarts == 0
        assert not proc.alive(living)

    asyncio.run(body())


def test_who_cannot_look_after_the_pump_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        monkeypatch.setattr("edgeward.workloads.pipes._BACKOFF", (0.1, 0.1))
        pipes = Pipes(tmp_path / "logs")
        (tmp_path / "logs" / ".pump.lock").mkdir(parents=True)  # it cannot be opened
        seen: list[None] = []
        lock = pipes._lock

        def asked() -> object:
            seen.append(None)
            return lock()

        monkeypatch.setattr(pipes, "_lock", asked)
        async with kept(pipes) as task:

            async def twice() -> bool:
                return task.done() or len(seen) > 1

            await until(twice)
            assert not task.done()
            (tmp_path / "logs" / ".pump.lock").rmdir()

    asyncio.run(body())


def test_a_reader_that_has_the_oldest_file_open_keeps_no_bytes_on_the_disk(tmp_path: Path) -> None:
    fifo, log = tmp_path / "i.pipe", tmp_path / "i.log"
    os.mkfifo(fifo)
    source = pump.Source(str(fifo), "i", 8192)
    with fifo.open("wb", buffering=0) as out:
        out.write(b"a" * 4096 + b"b" * 4096)
        source.move(), source.move()
        with log.with_name("i.log.1").open("rb") as reader:
            out.write(b"c")
            source.move()
            assert os.fstat(reader.fileno()).st_blocks == 0
        assert text(log) == b"b" * 4096 + b"c"
    source.close()


@pytest.mark.skipif(not hasattr(os, "splice"), reason="a copying pump that is killed loses what it has in its hands")
def test_no_byte_is_lost_while_the_pump_is_killed(tmp_path: Path, running: list[subprocess.Popen[bytes]]) -> None:
    log, part = tmp_path / "d" / "a" / "i.log", 250_000
    expected = b"".join(b"%d\n" % n for n in range(1, 6 * part + 1))
    # each part when it is told to: a fast machine would be done with all before the last kill
    script = (
        'a=1; for n in 1 2 3 4 5 6; do until [ -e "$0/go.$n" ]; do sleep 0.02; done; '
        f"seq $a $((a + {part - 1})); a=$((a + {part})); done"
    )

    async def main() -> None:
        pipes = Pipes(tmp_path)
        async with kept(pipes):
            writer = start(pipes, log, 24 << 20, "sh", "-c", script, str(tmp_path))  # both files hold all of it
            running.append(writer)
            for n in range(1, 6):
                before = size(log.parent)
                (tmp_path / f"go.{n}").touch()
                await until(lambda before=before: size(log.parent) > before + 100_000)  # type: ignore[misc]
                victim = await pump_of(pipes)
                os.kill(victim.pid, signal.SIGKILL)
                await until(lambda: not proc.alive(victim))  # noqa: B023 - awaited here
            (tmp_path / "go.6").touch()
            await until(lambda: not pipes.needed())
            assert writer.wait(30) == 0, "it never noticed"
            assert text(log) == expected

    asyncio.run(main())


def test_the_cap_holds_and_the_writer_lives_whoever_dies(
    tmp_path: Path, running: list[subprocess.Popen[bytes]]
) -> None:
    log, cap = tmp_path / "d" / "a" / "i.log", 1 << 20
    sizes: list[int] = []

    def moved() -> str:
        sizes.append(size(log.parent))
        return Path(f"/proc/{writer.pid}/io").read_text().splitlines()[1]  # wchar: what it wrote in its life

    async def main() -> None:
        nonlocal writer
        pipes = Pipes(tmp_path)
        async with kept(pipes) as agent:
            writer = start(pipes, log, cap, "yes")
            running.append(writer)
            await until(lambda: moved() != "" and log.with_name("i.log.1").exists())
            before = moved()
            await until(lambda: moved() != before)
            # no agent: the pump goes on
            agent.cancel()
            await asyncio.gather(agent, return_exceptions=True)
            await pipes.close(leave=True)
            first = await pump_of(pipes)
            before = moved()
            await until(lambda: moved() != before)
            # no pump either: it waits, and is not ended
            os.kill(first.pid, signal.SIGKILL)
            await until(lambda: not proc.alive(first))
            state = Path(f"/proc/{writer.pid}/stat")
            await until(lambda: moved() != "" and state.read_text().rsplit(")", 1)[1].split()[0] == "S")
            # the next agent's pump takes it on
            async with kept(next_agent := Pipes(tmp_path)):
                next_agent.adopt(log)
                second = await pump_of(next_agent)
                assert second != first
                before = moved()
                await until(lambda: moved() != before)
                for _ in range(50):
                    moved()
                    await asyncio.sleep(0.002)
            assert writer.poll() is None

    writer: subprocess.Popen[bytes]
    asyncio.run(main())
    assert max(sizes) <= cap
    assert size(log.parent) <= cap
    assert size(log.parent) >= cap // 2


def test_last_words_wait_for_the_next_pump(tmp_path: Path) -> None:
    log = tmp_path / "d" / "a" / "i.log"

    async def main() -> None:
        pipes = Pipes(tmp_path)
        out = pipes.make(log, 4096)
        first = await pump_of(pipes)
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: not proc.alive(first))
        done = subprocess.run(["echo", "last words"], stdout=out, check=True)
        os.close(out)
        assert done.returncode == 0
        assert text(log) == b""
        async with kept(pipes):
            await until(lambda: text(log) == b"last words\n")
            await until(lambda: not pipes.needed())
            pipes.make(log.with_name("next.log"), 4096)
            assert len(pipes._held) == 1, "what was taken is not held any more"

    asyncio.run(main())


def test_one_pump_and_one_of_this_release(tmp_path: Path, running: list[subprocess.Popen[bytes]]) -> None:
    log = tmp_path / "d" / "a" / "i.log"

    async def main() -> None:
        old = Pipes(tmp_path)
        old._code = "older"
        running.append(start(old, log, 4096, "sh", "-c", "echo one; read x < go; echo two; exec sleep 1000"))
        for _ in range(5):
            Pipes(tmp_path).poke()
        first = await pump_of(old)
        assert proc.find_by_env("EDGEWARD_PUMP", str(tmp_path)) == [first]
        await old.close(leave=True)
        assert proc.alive(first), "it is needed"
        async with kept(pipes := Pipes(tmp_path)):
            await until(lambda: not proc.alive(first))
            second = await pump_of(pipes)
            assert proc.find_by_env("EDGEWARD_PUMP", str(tmp_path)) == [second]
            await until(lambda: text(log).startswith(b"one\n"))

    asyncio.run(main())


def test_it_ends_when_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "LINGER", 0.02)
    app = tmp_path / "d" / "a"
    app.mkdir(parents=True)
    os.mkfifo(tmp_path / ".pump")
    os.mkfifo(app / "i.4096.pipe")  # of an instance that ended while there was no pump
    (app / "j.4096.pipe.txt").touch()
    (app / "k.x.pipe").touch()
    one = pump.Pump(str(tmp_path))
    one.run()
    assert sorted(p.name for p in app.iterdir()) == ["i.log", "j.4096.pipe.txt", "k.x.pipe"]


def test_a_file_of_an_older_release_is_cut(tmp_path: Path, running: list[subprocess.Popen[bytes]]) -> None:
    log = tmp_path / "d" / "a" / "i.log"
    log.parent.mkdir(parents=True)

    async def main() -> None:
        pipes = Pipes(tmp_path)
        with log.open("ab") as out:
            script = "while :; do head -c 30000 /dev/zero | tr '\\0' x; echo; sleep 0.01; done"
            writer = subprocess.Popen(["sh", "-c", script], stdout=out, start_new_session=True)
        running.append(writer)
        async with kept(pipes):
            pipes.cut(log, 256 << 10, writer.pid)
            old = log.with_name("i.log.1")
            await until(lambda: old.exists() and old.stat().st_size == 128 << 10)
            writer.kill()
            writer.wait()
            await until(lambda: not pipes.needed())

    asyncio.run(main())
    cut = pump.Cut("", str(log)[:-4], 100, os.getpid())
    log.write_bytes(b"x" * 80)
    with contextlib.suppress(FileNotFoundError):
        log.with_name("i.log.1").unlink()
    log.with_name("i.log.1").symlink_to("/dev/full")
    assert cut.look(), "it grew"
    assert log.stat().st_size == 0, "what cannot be copied is cut all the same"
    assert not log.with_name("i.log.1").is_symlink()
