"""Programs run for a session: what they say and how they end arrives, and nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from edgeward.core import proc
from edgeward.core.errors import EdgewardError, Invalid, Refused
from edgeward.tunnel import channels, child
from edgeward.tunnel.channels import Decoder, Exit
from edgeward.tunnel.exec import Exec, parse, told
from edgeward.tunnel.session import Open, Session, Stream, pair

PYTHON = sys.executable
LONG = 40.0


class Operator:
    """The operator's end, in words."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._decoder = Decoder(channels.FROM_NODE)
        self.out, self.err, self.credit = b"", b"", 0
        self.exit: Exit | None = None

    async def hear(self) -> bool:
        data = await self.stream.read()
        for kind, body in self._decoder.feed(data):
            if kind == channels.OUTPUT:
                self.out += body
            elif kind == channels.ERRORS:
                self.err += body
            elif kind == channels.CREDIT:
                self.credit += channels.read_credit(body)
            else:
                assert self.exit is None
                self.exit = channels.read_exit(body)
        return bool(data)

    async def until(self, words: bytes) -> None:
        while words not in self.out:
            assert await self.hear(), (words, self.out, self.err)

    async def all(self) -> Exit:
        while await self.hear():
            pass
        assert self.exit is not None
        return self.exit


class Site:
    """A node's services, and what they noted."""

    def __init__(self, **options: Any) -> None:
        self.notes: list[dict[str, Any]] = []
        self.services = Exec(note=self._keep, **options)
        self.tasks: list[asyncio.Task[None]] = []
        self.sessions: list[Session] = []

    async def _keep(self, note: dict[str, Any]) -> None:
        self.notes.append(note)

    def open(self, *argv: str, service: str = "exec", **args: Any) -> Operator:
        session, _ = pair(self._serve)
        self.sessions.append(session)
        asked = Open(service, {"argv": list(argv), **args}, who="alice", source="192.0.2.7")
        return Operator(session.open_for(asked))

    def _serve(self, stream: Stream) -> None:
        serve = self.services.exec if stream.purpose.service == "exec" else self.services.shell
        task = asyncio.create_task(serve(stream.purpose, stream))

        def over(done: asyncio.Task[None]) -> None:  # as the transport does it
            if not done.cancelled() and isinstance(e := done.exception(), EdgewardError):
                stream.fail(e)

        task.add_done_callback(over)
        self.tasks.append(task)

    async def over(self) -> None:
        """Until every session so far has ended and was noted."""
        _, open_ = await asyncio.wait(self.tasks, timeout=LONG)
        assert not open_


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "GRACE", 0.3)


@pytest.fixture
def site() -> Site:
    return Site()


@contextlib.asynccontextmanager
async def running(site: Site) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for task in site.tasks:
            task.cancel()
        await asyncio.gather(*site.tasks, return_exceptions=True)
        for session in site.sessions:
            session.close()


def script(text: str) -> tuple[str, str, str]:
    return PYTHON, "-c", text


async def test_output_errors_and_the_exit_code_come_apart(site: Site) -> None:
    async with running(site):
        op = site.open(*script("import sys; print('to out'); print('to err', file=sys.stderr); sys.exit(7)"))
        assert await op.all() == Exit(7)
        assert (op.out, op.err) == (b"to out\n", b"to err\n")


async def test_arguments_are_a_list_and_pass_no_shell(site: Site) -> None:
    words = ["$HOME", "a b", "; echo no", "`id`", "", "\u00e4\n"]
    async with running(site):
        op = site.open(*script("import sys; print(sys.argv[1:])"), *words)
        assert (await op.all()).code == 0
        assert op.out.decode().strip() == repr(words)


async def test_a_signal_that_ends_a_program_is_told_as_shells_do(site: Site) -> None:
    async with running(site):
        op = site.open("/bin/sh", "-c", "kill -TERM $$")
        assert await op.all() == Exit(143, "SIGTERM")


@pytest.mark.parametrize(("program", "code"), [("no-such-program", 127), ("/etc/passwd", 126), ("/", 126)])
async def test_what_cannot_be_started_says_so(site: Site, program: str, code: int) -> None:
    async with running(site):
        ended = await site.open(program).all()
        assert ended.code == code
        assert program in ended.error
        await site.over()
        assert site.notes[0]["detail"]["code"] == code


async def test_input_arrives_and_ends(site: Site) -> None:
    async with running(site):
        op = site.open("cat")
        data = os.urandom(1000) * 600
        sent = 0
        while sent < len(data):  # no more than the credit allows
            piece = data[sent : sent + min(channels.MOST, channels.INPUT_WINDOW + op.credit - sent)]
            if not piece:
                await op.hear()
                continue
            await op.stream.write(channels.record(channels.INPUT, piece))
            sent += len(piece)
            while len(op.out) < sent - channels.INPUT_WINDOW // 2:
                await op.hear()
        await op.stream.write(channels.record(channels.INPUT_END))
        assert await op.all() == Exit(0)
        assert op.out == data
        await site.over()
        assert site.notes[0]["detail"] | {"seconds": 0} == {
            "argv": ["cat"], "in": len(data), "out": len(data), "code": 0, "seconds": 0,
        }  # fmt: skip


async def test_the_environment_is_made_here(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTS_SECRET", "x")
    async with running(site):
        op = site.open(*script("import os; print(sorted(os.environ)); print(os.getcwd())"), env={"MINE": "1"})
        assert (await op.all()).code == 0
        names, folder = op.out.decode().splitlines()
        assert "AGENTS_SECRET" not in names
        assert "MINE" in names
        assert Path(folder).samefile(pwd.getpwuid(os.geteuid()).pw_dir)


async def test_no_descriptor_of_the_agent_is_inherited(site: Site) -> None:
    async with running(site):
        with Path("/etc/passwd").open() as f:
            os.set_inheritable(f.fileno(), True)
            op = site.open(*script("import os; print(sorted(os.listdir('/proc/self/fd'), key=int))"))
            assert (await op.all()).code == 0
            assert len(eval(op.out)) == 4  # noqa: S307 - three, and the listing's own


async def gone(*pids: int) -> None:
    for pid in pids:
        if found := proc.identify(pid):
            assert await proc.wait_exit(found, LONG), pid


TREE = """
import os, subprocess, sys, time
a = subprocess.Popen(['sleep', '1000'])
b = subprocess.Popen(['sleep', '1000'], start_new_session=True)
c = subprocess.Popen(['sleep', '1000'], env={})
print(os.getpid(), a.pid, b.pid, c.pid, flush=True)
"""


@pytest.mark.parametrize("how", ["reset", "cancel"])
async def test_all_that_a_session_started_ends_with_its_stream(site: Site, how: str) -> None:
    """Its group, and what left the group; one that does not want to end as well."""
    async with running(site):
        op = site.open(*script("import signal; signal.signal(15, signal.SIG_IGN)\n" + TREE + "time.sleep(1000)"))
        await op.until(b"\n")
        pids = [int(p) for p in op.out.split()]
        if how == "reset":
            op.stream.reset("gone", "the operator went away")
        else:
            site.tasks[0].cancel()
        await site.over()
        await gone(*pids)
        assert site.notes[0]["outcome"].startswith("Gone" if how == "reset" else "cut")


async def test_nothing_outlives_the_program_and_its_end_is_told_at_once(site: Site) -> None:
    async with running(site):
        op = site.open(*script(TREE))
        assert (await op.all()).code == 0
        *marked, bare = [int(p) for p in op.out.split()]
        for pid in marked:  # already, when the end is told
            assert (found := proc.identify(pid)) is None or not proc.alive(found)
        await gone(bare)


async def test_a_stalled_reader_stops_the_program_and_not_the_next_one(site: Site) -> None:
    async with running(site):
        stalled = site.open("/bin/sh", "-c", "yes & echo $!; wait")
        await stalled.until(b"\n")
        # the agent holds a bounded part of it: what the pipe, one record, the stream's buffer and the window take
        assert (await site.open("echo", "here").all()).code == 0
        writer = int(stalled.out.split(b"\n")[0])
        before = -1
        for _ in range(200):
            written = int(Path(f"/proc/{writer}/io").read_text().split("wchar: ")[1].split()[0])
            if written == before:
                break
            before = written
            await asyncio.sleep(0.05)  # the period of looking whether it still writes
        else:
            pytest.fail("it was never stopped")
        assert before < 1 << 20


async def test_a_signal_reaches_a_program_whose_input_and_output_are_both_stuck(site: Site) -> None:
    async with running(site):
        op = site.open("/bin/sh", "-c", "trap 'exit 9' INT; echo ready; yes & wait")
        await op.until(b"ready")
        for r in channels.records(channels.INPUT, b"x" * 100_000):
            await asyncio.wait_for(op.stream.write(r), LONG)
        await op.stream.write(channels.record(channels.SIGNAL, b"INT"))
        assert (await op.all()).code in (9, 130)


async def test_a_peer_that_gives_more_than_the_credit_is_cut(site: Site) -> None:
    async with running(site):
        op = site.open("sleep", "1000")
        with pytest.raises(Refused, match="credit"):
            for _ in range(10):
                await op.stream.write(channels.record(channels.INPUT, b"x" * channels.MOST))
            await op.all()
        await site.over()


async def test_a_peer_that_speaks_garbage_is_cut(site: Site) -> None:
    async with running(site):
        op = site.open("sleep", "1000")
        await op.stream.write(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(Refused, match="form"):
            await op.all()


async def test_a_shell_has_a_terminal_of_the_operator_s_size(site: Site) -> None:
    async with running(site):
        op = site.open("/bin/sh", "-i", service="shell", tty=[33, 111], term="xterm-256color")
        await op.stream.write(
            channels.record(channels.INPUT, b"stty size; tty; echo $TERM; exec 3</dev/tty; echo [$?]\n")
        )
        await op.until(b"[0]")
        assert b"33 111" in op.out
        assert b"/dev/pts/" in op.out
        assert b"xterm-256color" in op.out
        await op.stream.write(channels.size(40, 120))
        await op.stream.write(channels.record(channels.INPUT, b"stty size\n"))
        await op.until(b"40 120")
        await op.stream.write(channels.record(channels.INPUT, b"exit 5\n"))
        assert (await op.all()).code == 5


async def test_a_key_interrupts_what_runs_in_the_shell_and_not_the_shell(site: Site) -> None:
    async with running(site):
        op = site.open("/bin/sh", "-i", service="shell")
        await op.stream.write(channels.record(channels.INPUT, b"sh -c 'echo st\"\"art; exec sleep 1000'\n"))
        await op.until(b"start\r\n")
        op.out = b""
        await op.stream.write(channels.record(channels.INPUT, b"\x03"))
        await op.until(b"$ " if os.geteuid() else b"# ")  # a key that interrupts drops what was typed
        await op.stream.write(channels.record(channels.INPUT, b"echo st''ill\n"))
        await op.until(b"still")
        await op.stream.write(channels.record(channels.INPUT, b"exit\n"))
        await op.all()


async def test_a_shell_ends_with_its_stream(site: Site) -> None:
    async with running(site):
        op = site.open("/bin/sh", "-i", service="shell")
        await op.stream.write(channels.record(channels.INPUT, b"sleep 1000 & echo [$$-$!]\n"))
        while not (found := re.search(rb"\[(\d+)-(\d+)\]", op.out)):
            assert await op.hear()
        site.tasks[0].cancel()
        await site.over()
        await gone(int(found[1]), int(found[2]))


async def test_an_agent_that_was_killed_left_programs_and_the_next_one_ends_them(tmp_path: Path) -> None:
    who = child.account("")
    env = child.environment(who, "s1", {}, data=str(tmp_path))
    started = child.start(["sleep", "1000"], env, who, "s1", "/")
    await Exec(data=str(tmp_path)).sweep()
    assert await started.wait() == -9
    started.close()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("service", ["exec", "shell"])
async def test_a_session_runs_as_the_user_that_the_node_names(service: str) -> None:
    site = Site(user="nobody")
    async with running(site):
        op = site.open("/bin/sh", "-c", "id -un; id -Gn; : </dev/tty && echo tty", service=service)
        assert (await op.all()).code == (0 if service == "shell" else 1) or service == "exec"
        assert op.out.split()[0] == b"nobody"
        assert b"root" not in op.out
        assert (b"tty" in op.out.split()) == (service == "shell")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_a_program_begins_in_no_folder_that_its_user_cannot_go_to() -> None:
    site = Site(user="nobody")
    with tempfile.TemporaryDirectory(dir="/tmp") as root:  # others may go there, unlike to pytest's
        closed, inner = Path(root), Path(root) / "inner"
        inner.mkdir()
        (inner / "secret").write_text("of root")
        await _begins(site, closed, inner)


async def _begins(site: Site, closed: Path, inner: Path) -> None:
    async with running(site):
        for folder in (inner, closed):
            op = site.open("/bin/cat", "secret", "inner/secret", cwd=str(folder))
            assert (await op.all()).code == 126
            assert b"of root" not in op.out
        closed.chmod(0o711)  # may be passed, not read
        op = site.open("/bin/cat", "inner/secret", cwd=str(closed))
        assert (await op.all()).code == 0 and op.out == b"of root"


async def test_a_user_that_is_not_there_is_refused() -> None:
    site = Site(user="no-such-user")
    async with running(site):
        with pytest.raises(Refused, match="no such user"):
            await site.open("id").all()


async def test_only_so_many_run_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeward.tunnel.exec.AT_ONCE", 1)
    async with running(site):
        op = site.open("/bin/sh", "-c", "echo on; cat")
        await op.until(b"on")
        with pytest.raises(Refused, match="already"):
            await site.open("true").all()
        op.stream.end()
        assert (await op.all()).code == 0
        await site.over()
        assert (await site.open("true").all()).code == 0


def test_what_is_asked_is_bounded() -> None:
    for args in (
        {}, {"argv": []}, {"argv": [""]}, {"argv": ["a\0b"]}, {"argv": "ls"}, {"argv": ["x"] * 5000},
        {"argv": ["x" * 200_000]}, {"argv": ["x"], "env": {"A=B": "1"}}, {"argv": ["x"], "cwd": "here"},
        {"argv": ["x"], "tty": [1, 70000]}, {"argv": ["x"], "term": "a b"}, {"argv": ["x"], "user": "root"},
    ):  # fmt: skip
        with pytest.raises((Invalid, Refused)):
            parse(args, login=False)
    assert parse({}, login=True).argv == []


def test_the_audit_keeps_a_bounded_argument_list_without_secrets() -> None:
    doc = told("exec", {"argv": ["mysql", "--password", "hunter2", "-e", "x" * 5000], "env": {"TOKEN": "t"}})
    assert doc["argv"][:4] == ["mysql", "--password", "(hidden)", "-e"]
    assert len(str(doc)) < 3000
    assert doc["env"] == ["TOKEN"]
    assert told("exec", {"argv": ["x"] * 100})["more"] == 36
