"""The services ``exec`` and ``shell``: a program on the node, its input, outputs and end at the operator.

In comes a stream whose opening says what to run, as an argument list; out go the program's outputs, apart from one
another, and how it ended (``channels.py``). A shell is the same with a terminal, and the account's own shell as its
program. An operator that goes away, a role that is revoked, a link that is lost: whatever ends the stream ends the
program and all that it started. A reader that stalls stops the program, and nobody else. Whether somebody may do this
was decided before the stream came here; here the node's own word counts, and every use is noted.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import msgspec

from edgeward.core import clock, proc
from edgeward.core.errors import EdgewardError, Invalid, Refused
from edgeward.core.resource import Key
from edgeward.core.scrub import Scrubber
from edgeward.tunnel import channels, child, fds
from edgeward.tunnel.channels import Exit
from edgeward.tunnel.child import Child
from edgeward.tunnel.flow import Stream
from edgeward.tunnel.framing import Open
from edgeward.tunnel.inside import Places, account_of, app_of

#: Bounds of what may be asked for; the kernel's own are higher.
ARGS_MOST, BYTES_MOST, ENV_MOST = 4096, 48 * 1024, 256
#: Programs that run at once on one node.
AT_ONCE = 64
#: What an operator may send to a program.
SIGNALS = ("HUP", "INT", "QUIT", "TERM", "KILL", "USR1", "USR2", "WINCH", "TSTP", "CONT")
#: Of an argument list in the audit.
_TOLD_ARGS, _TOLD_BYTES = 64, 2048
_PIECE = 32 * 1024
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_TERM = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")


class ExecArgs(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a stream of ``exec`` or ``shell`` is opened with. ``argv`` of a shell may be empty: the account's own.

    ``tty``: [rows, columns] of the operator's terminal, or null. ``cwd``: an absolute path; empty: the account's home.
    ``app``: NAMESPACE/NAME, to run inside that App; ``instance``: inside this one of it, else any.
    """

    argv: list[str] = []
    env: dict[str, str] = {}
    cwd: str = ""
    tty: tuple[int, int] | None = None
    term: str = ""
    app: str = ""
    instance: str = ""


#: ``{verb, who, source, detail, outcome}`` of one use.
Note = Callable[[dict[str, Any]], Awaitable[None]]


def parse(args: Mapping[str, Any], *, login: bool) -> ExecArgs:
    """The bounded, checked arguments. Raises ``Invalid``."""
    try:
        found = msgspec.convert(dict(args), ExecArgs)
    except msgspec.ValidationError as e:
        raise Invalid(str(e), remedy="upgrade the older side") from None
    if not login and not found.argv:
        raise Invalid("no program is named", remedy="edgeward exec NODE -- PROGRAM ARGUMENTS")
    words = [*found.argv, *found.env.values(), found.cwd]
    if len(found.argv) > ARGS_MOST or sum(len(w.encode(errors="surrogatepass")) for w in words) > BYTES_MOST:
        raise Invalid(f"more than {ARGS_MOST} arguments or {BYTES_MOST // 1024} KiB", remedy="copy a file: edgeward cp")
    if any("\0" in w for w in words):
        raise Invalid("an argument has a zero byte in it")
    if found.argv and not found.argv[0]:
        raise Invalid("the program's name is empty")
    if len(found.env) > ENV_MOST or not all(_NAME.fullmatch(n) for n in found.env):
        raise Invalid("a variable's name is letters, digits and _", field="--env")
    if found.cwd and not PurePosixPath(found.cwd).is_absolute():
        raise Invalid("is no absolute path", field="--cwd", remedy="begin it with /")
    if found.term and not _TERM.fullmatch(found.term):
        raise Invalid("is no terminal's name", field="TERM")
    if (found.app or found.instance) and (login or found.env or found.cwd or not found.app):
        raise Invalid(
            "a program inside an App has the App's variables and folder",
            remedy="edgeward exec --app APP -- env NAME=VALUE PROGRAM",
        )
    if found.tty is not None and not all(0 <= n <= 65535 for n in found.tty):
        raise Invalid("is no size of a terminal")
    return found


def told(service: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """What an audit keeps of such a call: the argument list, bounded, what looks like a secret taken out. Pure."""
    scrubbed = Scrubber()
    if service not in ("exec", "shell"):
        bare = {k: v for k, v in args.items() if k not in ("host", "port") and isinstance(v, str | int | bool)}
        return {str(k)[:64]: str(v)[:256] for k, v in list(bare.items())[:16]}
    argv = [str(a) for a in args.get("argv") or []] if isinstance(args.get("argv"), list | tuple) else []
    kept: list[str] = []
    room = _TOLD_BYTES
    for word in scrubbed.document(argv[:_TOLD_ARGS]):
        kept.append(word if len(word) <= room else word[:room] + "...")
        room -= len(kept[-1])
        if room <= 0:
            break
    doc: dict[str, Any] = {"argv": kept}
    if len(kept) < len(argv):
        doc["more"] = len(argv) - len(kept)
    if isinstance(args.get("env"), Mapping) and args["env"]:
        doc["env"] = sorted(str(n)[:128] for n in args["env"])[:_TOLD_ARGS]
    for name in ("cwd", "app", "instance"):
        if args.get(name):
            doc[name] = str(args[name])[:256]
    return doc


class Exec:
    """Runs programs for sessions. ``user``: whom node.json names, else the agent's own account. ``data``: the node's
    folder, by which :meth:`sweep` knows what an earlier run of the agent left behind. ``places``: those of Apps."""

    def __init__(
        self, *, user: str = "", data: str = "", note: Note | None = None, places: Places | None = None
    ) -> None:
        self._user, self._data, self._note, self._places = user, data, note, places
        self.running = 0

    async def sweep(self) -> None:
        """Ends programs of sessions of an agent that was killed."""
        if self._data:
            await asyncio.to_thread(child.sweep, child.MARK_ALL, self._data)

    async def exec(self, open: Open, stream: Stream) -> None:
        await self._serve(open, stream, login=False)

    async def shell(self, open: Open, stream: Stream) -> None:
        await self._serve(open, stream, login=True)

    async def _serve(self, open: Open, stream: Stream, *, login: bool) -> None:
        began = clock.monotonic()
        use = _Use()
        outcome = "done"
        try:
            if self.running >= AT_ONCE:
                raise Refused(f"{AT_ONCE} sessions run on this node already", remedy="end some of them")
            self.running += 1
            try:
                await self._run(parse(open.args, login=login), stream, use, login=login)
            finally:
                self.running -= 1
        except asyncio.CancelledError:
            outcome = "cut: the session was ended"
            raise
        except EdgewardError as e:
            outcome = f"{e.reason}: {e.message}"
            raise
        finally:
            if self._note is not None:
                detail = (
                    told(open.service, open.args) | use.document() | {"seconds": round(clock.monotonic() - began, 3)}
                )
                record = {"verb": open.service, "who": open.who, "source": open.source}
                await self._note({**record, "detail": detail, "outcome": outcome})

    async def _run(self, args: ExecArgs, stream: Stream, use: _Use, *, login: bool) -> None:
        size = args.tty if args.tty is not None else (24, 80) if login else None
        try:
            started, who, instance = self._start(args, size)
        except child.NotStarted as e:
            use.code = e.code
            stream.accept()
            await stream.write(channels.ended(Exit(e.code, error=e.message)))
            stream.end()
            return
        bound = asyncio.create_task(_end_with(instance, started)) if instance is not None else None
        try:
            stream.accept({"user": who})
            await _Pump(started, stream, use).run()
        finally:
            if bound is not None:
                bound.cancel()
                await asyncio.gather(bound, return_exceptions=True)
            try:
                await started.end()
            finally:
                started.close()

    def _start(self, args: ExecArgs, size: tuple[int, int] | None) -> tuple[Child, str, proc.ProcId | None]:
        """The program, whom it runs as, and what it must not outlive."""
        session, term = clock.new_id(16), (args.term or "dumb") if size else ""
        if (app := app_of("exec", {"app": args.app})) is not None:
            return self._start_inside(app, args, session, term, size)
        who = child.account(self._user)
        env = child.environment(who, session, args.env, data=self._data, term=term)
        return (
            child.start(args.argv or [who.shell], env, who, session, args.cwd or child.home(who), size),
            who.name,
            None,
        )

    def _start_inside(
        self, app: Key, args: ExecArgs, session: str, term: str, size: tuple[int, int] | None
    ) -> tuple[Child, str, proc.ProcId | None]:
        if self._places is None:
            raise Refused("this node runs no Apps")
        marks = {child.MARK: session} | ({child.MARK_ALL: self._data} if self._data else {})
        place = self._places(
            app.namespace, app.name, args.argv, args.instance, stdin=True, tty=size is not None, marks=marks
        )
        who = account_of(place.user)
        env = place.env | ({"TERM": term} if term else {})
        started = child.start(place.argv, env, who, session, str(place.folder), size)
        started.apart = place.apart
        if place.enter is not None:
            try:
                place.enter(started.process)
            except OSError as e:
                proc.kill_group(started.process, signal.SIGKILL)
                child.sweep(child.MARK, session)
                started.popen.wait(5)
                started.close()
                raise Refused(f"it cannot be put below the limits of its App: {e.strerror or e}") from None
        return started, who.name, place.instance


async def _end_with(instance: proc.ProcId, started: Child) -> None:
    """What was run inside an instance ends when that does."""
    await proc.wait_exit(instance)
    await started.end()


class _Use:
    """What a session came to."""

    code: int | None = None
    received = sent = 0

    def document(self) -> dict[str, Any]:
        doc: dict[str, Any] = {"in": self.received, "out": self.sent}
        return doc if self.code is None else doc | {"code": self.code}


class _Pump:
    """Moves bytes between one program and one stream until the program has ended and all that it wrote is gone."""

    def __init__(self, started: Child, stream: Stream, use: _Use) -> None:
        self._child, self._stream, self._use = started, stream, use
        self._writing = asyncio.Lock()
        self._input, self._no_more = bytearray(), False  # bounded by the credit
        self._came = asyncio.Event()
        self._credit = channels.INPUT_WINDOW

    async def run(self) -> None:
        side = [asyncio.create_task(self._records()), asyncio.create_task(self._feed())]
        main = asyncio.create_task(self._output())
        try:
            # only the reader of records may end it early: by the stream's reset, or by what does not keep to the form
            while not main.done():
                waiting = {main, *(t for t in side if not t.done())}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in side:
                    if task.done():
                        task.result()
            await main
        finally:
            for task in (*side, main):
                task.cancel()
            await asyncio.gather(*side, main, return_exceptions=True)

    async def _output(self) -> None:
        started = self._child
        outputs = [asyncio.create_task(self._outward(started.stdout, channels.OUTPUT))]
        if started.stderr >= 0:
            outputs.append(asyncio.create_task(self._outward(started.stderr, channels.ERRORS)))
        try:
            code = await started.wait()
            await started.end()  # what it started does not outlive it, and holds no pipe open
            await asyncio.gather(*outputs)
        finally:
            for task in outputs:
                task.cancel()
            await asyncio.gather(*outputs, return_exceptions=True)
        exit = _exit(code)
        self._use.code = exit.code
        await self._send(channels.ended(exit))
        self._stream.end()

    async def _outward(self, fd: int, kind: bytes) -> None:
        while data := await fds.take(fd, _PIECE, self._child.over):
            await self._send(channels.record(kind, data))
            self._use.sent += len(data)

    async def _send(self, data: bytes) -> None:
        async with self._writing:
            await self._stream.write(data)

    async def _records(self) -> None:
        decoder = channels.Decoder(channels.TO_NODE)
        while data := await self._stream.read():
            for kind, body in decoder.feed(data):
                self._take(kind, body)
        self._close_input()  # an operator that says no more gives no more input

    def _take(self, kind: bytes, body: bytes) -> None:
        if kind == channels.INPUT:
            self._credit -= len(body)
            if self._credit < 0:
                raise channels.broken("more input than there was credit for")
            self._input += body
            self._came.set()
        elif kind == channels.INPUT_END:
            self._close_input()
        elif kind == channels.SIZE:
            self._child.resize(*channels.read_size(body))
        else:
            name = body.decode("ascii", "replace")
            if name not in SIGNALS:
                raise channels.broken(f"a signal {name[:20]!r}")
            self._child.signal(getattr(signal, f"SIG{name}"))

    def _close_input(self) -> None:
        self._no_more = True
        self._came.set()

    async def _next_input(self) -> bytes:
        while not self._input and not self._no_more:
            self._came.clear()
            await self._came.wait()
        data = bytes(self._input[:_PIECE])
        del self._input[:_PIECE]
        return data

    async def _feed(self) -> None:
        """Input to the program; what it took becomes new credit. What one that reads no more is given, is dropped."""
        started, open_ = self._child, True
        while data := await self._next_input():
            if open_:
                try:
                    await fds.put(started.stdin, data)
                except BrokenPipeError:
                    open_ = False
                    started.close_stdin()
            self._use.received += len(data)
            self._credit += len(data)
            await self._send(channels.credit(len(data)))
        if started.tty:
            with contextlib.suppress(BrokenPipeError):
                await fds.put(started.stdout, b"\x04")  # so a terminal says that no more comes
        started.close_stdin()


def _exit(code: int) -> Exit:
    if code >= 0:
        return Exit(code)
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return Exit(128 - code, name)
