"""The operator's end: this process's descriptors on one side, a session on the other."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tunnel.ends import ends, served

from edgeward.core.errors import Forbidden, Unreachable
from edgeward.tunnel import fds
from edgeward.tunnel.attach import Attached, Escape
from edgeward.tunnel.channels import Exit
from edgeward.tunnel.exec import Exec
from edgeward.tunnel.session import Open, Stream

PLAIN_LOOP = True
LONG = 30.0
PROMPT = b"$ " if os.geteuid() else b"# "


async def session(*argv: str, **args: Any) -> tuple[Stream, asyncio.Task[None]]:
    return await served(Exec().exec, Open("exec", {"argv": list(argv), **args}))


async def run(tmp_path: Path, stream: Stream, task: asyncio.Task[None], stdin: int) -> tuple[Exit, bytes, bytes]:
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        try:
            end = await Attached(stream, stdin=stdin, stdout=out.fileno(), stderr=err.fileno()).run()
        finally:
            await asyncio.wait({task}, timeout=LONG)
    return end, (tmp_path / "out").read_bytes(), (tmp_path / "err").read_bytes()


async def test_outputs_stay_apart_and_the_code_comes(tmp_path: Path) -> None:
    stream, task = await session("/bin/sh", "-c", "echo out; echo err >&2; exit 3")
    assert await run(tmp_path, stream, task, -1) == (Exit(3), b"out\n", b"err\n")


@pytest.mark.parametrize("kind", ["file", "pipe", "null"])
async def test_input_of_every_kind_arrives_whole(tmp_path: Path, kind: str) -> None:
    data = os.urandom(1000) * 900 if kind != "null" else b""
    (tmp_path / "in").write_bytes(data)
    stream, task = await session("cat")
    if kind == "pipe":
        with subprocess.Popen(["cat", str(tmp_path / "in")], stdout=subprocess.PIPE) as source:
            assert source.stdout is not None
            end, out, _ = await run(tmp_path, stream, task, source.stdout.fileno())
            assert os.get_blocking(source.stdout.fileno())  # the descriptor is others' as well
    else:
        with Path("/dev/null" if kind == "null" else tmp_path / "in").open("rb") as f:
            end, out, _ = await run(tmp_path, stream, task, f.fileno())
    assert end == Exit(0)
    assert out == data


async def test_a_program_that_wants_no_input_ends_though_more_is_there(tmp_path: Path) -> None:
    r, w = os.pipe()
    try:
        stream, task = await session("true")
        assert (await run(tmp_path, stream, task, r))[0] == Exit(0)
    finally:
        os.close(r)
        os.close(w)


async def test_a_signal_to_this_process_goes_to_the_program(tmp_path: Path) -> None:
    stream, task = await session("/bin/sh", "-c", "trap 'exit 9' INT; echo on; while :; do sleep 0.1; done")
    out = tmp_path / "out"

    async def interrupt() -> None:
        while not (out.exists() and b"on" in out.read_bytes()):  # noqa: ASYNC110 - a file says no word
            await asyncio.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    async with asyncio.TaskGroup() as group:
        group.create_task(interrupt())
        end, _, _ = await run(tmp_path, stream, task, -1)
    assert end == Exit(9)


async def test_a_session_that_breaks_off_is_no_success(tmp_path: Path) -> None:
    here, there = await ends()
    there.end()
    with pytest.raises(Unreachable):
        await Attached(here, stdin=-1, stdout=1, stderr=2).run()
    here, there = await ends()
    there.reset("forbidden", "the role was revoked")
    with pytest.raises(Forbidden, match="revoked"):
        await Attached(here, stdin=-1, stdout=1, stderr=2).run()


TERMINAL = """
import asyncio, sys
from edgeward.tunnel.attach import Attached, terminal_size
from edgeward.tunnel.exec import Exec
from edgeward.tunnel.session import pair
async def main():
    tasks = set()
    one, _ = pair(lambda stream: tasks.add(asyncio.ensure_future(Exec().shell(stream.purpose, stream))))
    args = {"argv": ["/bin/sh", "-i"], "tty": list(terminal_size(0)), "term": "vt100"}
    try:
        end = await Attached(one.open("shell", args), terminal=True).run()
        print(f"ended {end.code}")
    except Exception as e:
        print(f"broke off: {e}")
    await asyncio.wait(tasks)
asyncio.run(main())
"""


class Terminal:
    """A person at a terminal, before a program of ours."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        os.set_blocking(self.master, False)
        termios.tcsetwinsize(slave, (31, 91))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        argv = [sys.executable, "-c", TERMINAL]
        self.popen = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        self.seen = b""

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    async def until(self, words: bytes) -> None:
        while words not in self.seen:
            try:
                piece = await asyncio.wait_for(fds.take(self.master, 4096), LONG)
            except TimeoutError:
                piece = b""
            assert piece, self.seen
            self.seen += piece

    async def close(self) -> None:
        await asyncio.to_thread(self.popen.wait, LONG)
        assert termios.tcgetattr(self.slave) == self.before  # the terminal is as it was
        os.close(self.slave)
        os.close(self.master)


@pytest.fixture
def person() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.popen.kill()
    made.popen.wait(LONG)


async def test_a_terminal_is_raw_while_a_shell_runs_and_follows_its_window(person: Terminal) -> None:
    await person.until(PROMPT)
    person.type(b"stty size; echo o''n\n")
    await person.until(b"on\r\n")
    assert b"31 91" in person.seen
    person.type(b"sh -c 'echo st\"\"art; exec sleep 1000'\n")
    await person.until(b"start\r\n")
    person.seen = b""
    person.type(b"\x03")
    await person.until(PROMPT)
    person.type(b"echo ag''ain $?\n")
    await person.until(b"again 130")
    termios.tcsetwinsize(person.master, (44, 77))
    os.kill(person.popen.pid, signal.SIGWINCH)
    person.type(b"while [ \"$(stty size)\" != '44 77' ]; do sleep 0.05; done; echo wi''der\n")
    await person.until(b"wider")
    person.type(b"exit 6\n")
    await person.until(b"ended 6")
    await person.close()


async def test_a_session_that_hangs_is_left_by_its_keys(person: Terminal) -> None:
    await person.until(PROMPT)
    person.type(b"trap '' HUP INT; echo o''n; sleep 1000\n")
    await person.until(b"on\r\n")
    person.type(b"\r~.")
    await person.until(b"broke off")
    await person.close()


@given(st.binary(max_size=40), st.integers(1, 5))
def test_keys_reach_the_program_but_the_one_that_ends_it(data: bytes, step: int) -> None:
    escape, out = Escape(), b""
    for at in range(0, len(data), step):
        sent, end = escape.feed(data[at : at + step])
        out += sent
        if end:
            return
    if b"~" not in data:
        assert out == data


def test_a_tilde_counts_at_the_beginning_of_a_line() -> None:
    assert Escape().feed(b"~.") == (b"", True)
    assert Escape().feed(b"a~.b") == (b"a~.b", False)
    assert Escape().feed(b"a\r~.b") == (b"a\r", True)
    assert Escape().feed(b"~~.") == (b"~.", False)
    assert Escape().feed(b"~/bin") == (b"~/bin", False)
