"""The operator's end of ``exec`` and ``shell``: descriptors of this process on one side, a stream on the other.

What the program writes goes to the same descriptors here, apart; what is typed or piped in goes to the program within
the credit that the node gives. With a terminal this side's one is raw while the session lasts, so that every key
reaches the program, and the window's size follows. ``Enter ~ .`` ends a session whose other side says nothing more.
The descriptors' flags belong to the shell that we were started from and stay as they are: so this runs on Python's own
event loop (libuv would change them).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import termios
import tty
from collections.abc import Iterator

from edgeward.core.errors import Unreachable
from edgeward.tunnel import channels, fds
from edgeward.tunnel.channels import Exit
from edgeward.tunnel.flow import Stream

_PIECE = 32 * 1024


class Escape:
    """Finds ``~.`` at the beginning of a line in what is typed. Pure."""

    def __init__(self) -> None:
        self._start, self._tilde = True, False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What is to be sent, and whether the session is to end. ``~~`` is one tilde."""
        out = bytearray()
        for byte in data:
            if self._tilde:
                self._tilde = False
                if byte == ord("."):
                    return bytes(out), True
                if byte != ord("~"):
                    out += b"~"
            elif self._start and byte == ord("~"):
                self._tilde, self._start = True, False
                continue
            out.append(byte)
            self._start = byte in b"\r\n"
        return bytes(out), False


@contextlib.contextmanager
def raw(fd: int) -> Iterator[None]:
    """The terminal gives every key as it is; afterwards it is as it was."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)  # what was typed already is for the program, too
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def terminal_size(fd: int) -> tuple[int, int]:
    """Rows and columns; what terminals have been since ever where it cannot be told."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return 24, 80
    return size.lines, size.columns


class Attached:
    """One session. ``stdin`` -1: the program gets no input."""

    def __init__(
        self, stream: Stream, *, stdin: int = 0, stdout: int = 1, stderr: int = 2, terminal: bool = False
    ) -> None:
        self._stream = stream
        self._stdin, self._stdout, self._stderr = stdin, stdout, stderr
        self._terminal = terminal
        self._credit = channels.INPUT_WINDOW
        self._more = asyncio.Event()
        self._writing = asyncio.Lock()
        self._asked = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> Exit:
        """Until the program has ended. Raises what the stream raises, ``Unreachable`` when it ends without a word."""
        with contextlib.ExitStack() as stack:
            if self._terminal:
                stack.enter_context(raw(self._stdin))
            stack.enter_context(self._signals())
            feeding = asyncio.create_task(self._feed())
            hearing = asyncio.create_task(self._hear())
            try:
                await asyncio.wait({feeding, hearing}, return_when=asyncio.FIRST_COMPLETED)
                if feeding.done() and not hearing.done():
                    feeding.result()
                exit = await hearing
            finally:
                for task in (feeding, hearing, *self._tasks):
                    task.cancel()
                await asyncio.gather(feeding, hearing, *self._tasks, return_exceptions=True)
        self._stream.end()
        return exit

    # -- to the node ---------------------------------------------------------------------------------------------------

    async def _send(self, data: bytes) -> None:
        async with self._writing:
            await self._stream.write(data)

    async def _feed(self) -> None:
        if self._stdin < 0:
            await self._send(channels.record(channels.INPUT_END))
            return
        escape = Escape() if self._terminal else None
        while True:
            while self._credit <= 0:
                self._more.clear()
                await self._more.wait()
            data = await _typed(self._stdin, min(_PIECE, self._credit))
            end = not data
            if escape is not None:
                data, end = escape.feed(data) if data else (data, True)
            if data:
                self._credit -= len(data)
                await self._send(channels.record(channels.INPUT, data))
            if end and escape is not None:
                self._stream.reset("ended", "ended by ~. at the terminal")
            elif end:
                await self._send(channels.record(channels.INPUT_END))
            if end:
                return

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals to this process go to the program; who asks twice does not want to wait for it."""
        loop = asyncio.get_running_loop()
        handled: list[int] = []
        names = ["TERM", "HUP"] if self._terminal else ["INT", "TERM", "HUP", "QUIT", "USR1", "USR2"]
        try:
            for name in names:
                number = getattr(signal, f"SIG{name}")
                if signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                loop.add_signal_handler(number, self._pass_on, name)
                handled.append(number)
            if self._terminal:
                loop.add_signal_handler(signal.SIGWINCH, self._resized)
                handled.append(signal.SIGWINCH)
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def _pass_on(self, name: str) -> None:
        if name in ("INT", "TERM", "HUP", "QUIT"):
            self._asked += 1
        if self._terminal:  # a shell at a terminal ignores what asks it to end
            self._stream.reset("ended", f"ended by a signal ({name})")
            return
        if self._asked > 1:
            self._stream.reset("ended", f"ended by a second signal ({name})")
            return
        self._spawn(channels.record(channels.SIGNAL, name.encode()))

    def _resized(self) -> None:
        self._spawn(channels.size(*terminal_size(self._stdin)))

    def _spawn(self, data: bytes) -> None:
        task = asyncio.create_task(self._send(data))
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a stream that has ended says so where it is read

    # -- from the node -------------------------------------------------------------------------------------------------

    async def _hear(self) -> Exit:
        decoder = channels.Decoder(channels.FROM_NODE)
        while data := await self._stream.read():
            for kind, body in decoder.feed(data):
                if kind == channels.CREDIT:
                    self._credit += channels.read_credit(body)
                    self._more.set()
                elif kind == channels.EXIT:
                    return channels.read_exit(body)
                else:
                    await _written(self._stdout if kind == channels.OUTPUT else self._stderr, body)
        raise Unreachable(
            "the session broke off before the program had ended", remedy="its node's agent may have ended"
        )


async def splice(stream: Stream, stdin: int, stdout: int) -> None:
    """Bytes both ways, as a ``ProxyCommand`` of SSH does it, until the other side ends. Raises what ends the stream."""

    async def there() -> None:
        while data := await _typed(stdin, _PIECE):
            await stream.write(data)
        stream.end()

    async def back() -> None:
        while data := await stream.read():
            await _written(stdout, data)

    feeding = asyncio.create_task(there())
    hearing = asyncio.create_task(back())
    try:
        await asyncio.wait({feeding, hearing}, return_when=asyncio.FIRST_COMPLETED)
        if feeding.done() and not hearing.done():
            feeding.result()
        await hearing
    finally:
        for task in (feeding, hearing):
            task.cancel()
        await asyncio.gather(feeding, hearing, return_exceptions=True)


async def _typed(fd: int, n: int) -> bytes:
    """What is there to read, without changing the descriptor's flags; ``b""`` at the end."""
    try:
        await fds.wait_for(fd)
    except (PermissionError, ValueError):
        pass  # a file is always ready, and cannot be waited for
    try:
        return os.read(fd, n)
    except BlockingIOError:  # somebody set it so
        return await fds.take(fd, n)
    except OSError:
        return b""


async def _written(fd: int, data: bytes) -> None:
    """In a thread: a reader who stalls must not keep the link from saying that we are here."""
    await asyncio.to_thread(_write_all, fd, data)


def _write_all(fd: int, data: bytes) -> None:
    import select

    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


def has_terminal(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return os.isatty(fd)
    return False
