"""Another wall clock for one process: for Python and for nats-server, and back."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from tests.skewing import skew

from edgeward.core.errors import NotFound
from edgeward.lab.skew import possible, set_skew

pytestmark = pytest.mark.skipif(bool(possible()), reason=possible() or "it can")

PROGRAM = """
import ctypes, sys, time
libc = ctypes.CDLL(None)
for line in sys.stdin:
    tv = (ctypes.c_long * 2)()
    libc.gettimeofday(tv, None)
    print(time.time(), libc.time(None), tv[0], time.clock_gettime(5), time.monotonic(), flush=True)
"""


def test_a_process_sees_another_wall_clock_by_every_call_and_no_other_monotonic_one() -> None:
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:

        def ask() -> list[float]:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            return [float(x) for x in child.stdout.readline().split()]

        ask()
        for seconds in (-3600, 86400, 100 - int(time.time()), 0):
            skew(child.pid, seconds)
            before, up = time.time(), time.monotonic()
            *walls, monotonic = ask()
            after = time.time()
            for wall in walls:  # whole seconds, or the last tick
                assert before + seconds - 1.1 < wall < after + seconds + 0.1
            assert up <= monotonic <= time.monotonic()
    finally:
        child.kill()
        child.communicate()
    with pytest.raises(NotFound):
        set_skew(child.pid, 1)


def test_only_that_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.time()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        skew(child.pid, -86400)
        assert time.time() >= before
        assert (
            subprocess.run(
                [sys.executable, "-c", "import time; print(time.time())"], capture_output=True, env=os.environ
            ).stdout
            > str(before).encode()
        )
    finally:
        child.communicate(b"\n")
