"""Process identity: a recycled pid is never trusted, a zombie is dead, groups outlive their leaders."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeward.core.proc import (
    ProcId,
    alive,
    capable,
    ending,
    even_chance,
    find_by_env,
    group_pids,
    identify,
    kill_group,
    spawn_detached,
    terminate,
    usage,
    wait_exit,
    wait_exit_blocking,
)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def until(check: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not check():  # type: ignore[operator]
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def test_identity_of_ourselves_and_text_form() -> None:
    me = identify(os.getpid())
    assert me is not None and alive(me)
    assert ProcId.parse(str(me)) == me
    with pytest.raises(ValueError, match="identity"):
        ProcId.parse("17")


def test_a_recycled_pid_is_a_stranger() -> None:
    proc, popen = spawn_detached(SLEEP)
    other = ProcId(proc.pid, "1.0")
    assert not alive(other)
    assert not kill_group(other, signal.SIGKILL)
    assert alive(proc)
    assert kill_group(proc, signal.SIGKILL)
    popen.wait(60)
    assert identify(proc.pid) is None
    assert not kill_group(proc, signal.SIGKILL)


def test_a_zombie_is_dead() -> None:
    proc, popen = spawn_detached(["/bin/sh", "-c", "exit 3"])
    assert wait_exit_blocking(proc, 60)
    assert not alive(proc)
    assert popen.wait(60) == 3


def test_wait_exit_sees_the_end_at_once() -> None:
    async def go() -> None:
        proc, popen = spawn_detached(SLEEP)
        assert not await wait_exit(proc, 0.05)
        waiter = asyncio.create_task(wait_exit(proc, 60))
        await asyncio.sleep(0)
        popen.kill()
        assert await waiter
        popen.wait(60)
        assert await wait_exit(proc, 60)

    asyncio.run(go())


def test_wait_exit_without_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)

    async def go() -> None:
        proc, popen = spawn_detached(SLEEP)
        asyncio.get_running_loop().call_later(0.05, popen.kill)
        assert await wait_exit(proc, 60)
        popen.wait(60)

    asyncio.run(go())


@linux
def test_the_group_is_killed_when_its_leader_is_dead(tmp_path: Path) -> None:
    child = tmp_path / "pid"
    proc, popen = spawn_detached(["/bin/sh", "-c", f"sleep 60 & echo $! > {child}; exit 0"])
    popen.wait(60)
    until(lambda: child.exists() and child.read_text().strip())
    orphan = identify(int(child.read_text()))
    assert orphan is not None and alive(orphan)
    assert group_pids(proc) == [orphan.pid]
    assert kill_group(proc, signal.SIGKILL)
    assert wait_exit_blocking(orphan, 60)
    assert group_pids(proc) == []


@linux
def test_terminate_kills_what_ignores_the_signal(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, 'w').close(); time.sleep(600)"
    proc, popen = spawn_detached([sys.executable, "-c", code])
    until(ready.exists)
    assert asyncio.run(terminate(proc, grace=0.1))
    assert popen.wait(60) == -signal.SIGKILL


@linux
def test_detached_has_own_session_log_and_no_descriptors(tmp_path: Path) -> None:
    secret = os.open(tmp_path / "secret", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(secret, True)
    log = tmp_path / "log"
    log.write_text("before\n")
    code = "import os, sys; print(os.getsid(0) == os.getpid(), sorted(os.listdir('/proc/self/fd'))[:4]); print('e', file=sys.stderr)"  # noqa: E501
    _, popen = spawn_detached([sys.executable, "-c", code], {"A": "b"}, tmp_path, log)
    assert popen.wait(60) == 0
    os.close(secret)
    lines = log.read_text().splitlines()
    assert lines[0] == "before" and "e" in lines
    assert "True ['0', '1', '2', '3']" in lines  # 3 is listdir's own


@linux
def test_it_is_found_by_its_environment_as_soon_as_it_is_started() -> None:
    """The kernel shows no environment for a moment of the exec; whoever looked then missed the process."""
    mark = f"soon-{os.getpid()}"
    for n in range(50):
        proc, popen = spawn_detached(["sleep", "600"], {"EDGEWARD_TEST_MARK": f"{mark}-{n}", "PATH": os.defpath})
        try:
            assert find_by_env("EDGEWARD_TEST_MARK", f"{mark}-{n}") == [proc]
        finally:
            popen.kill()
            popen.wait(60)


@linux
def test_found_by_the_environment_and_measured() -> None:
    mark = f"xyz-{os.getpid()}"  # another run of the tests may be under way
    proc, popen = spawn_detached(SLEEP, {"EDGEWARD_TEST_MARK": mark + "1"})
    try:
        assert find_by_env("EDGEWARD_TEST_MARK", mark + "1") == [proc]
        assert find_by_env("EDGEWARD_TEST_MARK", mark) == []
        # The kernel counts a page a thread at a time: a program just started may still show almost none of its own.
        deadline = time.monotonic() + 60
        while (used := usage(proc.pid)) is None or used.memory <= 100_000:
            assert time.monotonic() < deadline, f"a running Python shows {used}"
            time.sleep(0.01)
    finally:
        popen.kill()
        popen.wait(60)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        spawn_detached(["/no/such/program"])
    assert isinstance(subprocess.DEVNULL, int)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "ended with exit status 0"),
        (3, "ended with exit status 3"),
        (-9, "was ended by SIGKILL"),
        (-63, "was ended by signal 63"),
    ],
)
def test_how_a_process_ended_in_words(status: int, text: str) -> None:
    assert ending(status) == text


@linux
def test_what_a_process_may_is_read_from_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    monkeypatch.setattr("edgeward.core.proc._PROC", tmp_path)
    assert capable(12) is None, "nothing is said"
    (tmp_path / "self" / "status").write_text("Name:\tx\nCapEff:\t0000000000001000\n")
    assert (capable(12), capable(24)) == (True, False)


@linux
def test_a_child_of_an_agent_that_is_spared_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("edgeward.core.proc._PROC", tmp_path)
    even_chance(7)  # it ended meanwhile
    (tmp_path / "7").mkdir()
    score = tmp_path / "7" / "oom_score_adj"
    for before, after in (("-900\n", "0"), ("300\n", "300\n")):
        score.write_text(before)
        even_chance(7)
        assert score.read_text() == after
