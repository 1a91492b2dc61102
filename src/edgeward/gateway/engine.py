"""nginx at work before the plane: tested, started, given new configurations, watched, and counted.

A configuration (``nginx.py``) is tried with ``nginx -t`` before anything changes; then it takes the place of the old
one, and nginx itself is asked whether it has it. If it has not, the old one stays and is written back. nginx is a child
of the plane and ends with it. What it answered by itself stands in its log, which is read once a second: the counters
and the access log are the plane's, whoever answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from edgeward.core import daemon
from edgeward.core.errors import EdgewardError
from edgeward.core.files import ensure_dir, write_atomic
from edgeward.gateway.match import Table
from edgeward.gateway.nginx import Where, render
from edgeward.gateway.rules import GatewayConfig, Listen, Rule

log = logging.getLogger("edgeward.gateway")

#: Seconds: for a test, until a configuration is in use, between two looks, for requests in progress at the end.
_TEST, _APPLY, _LOOK, _END = 30.0, 15.0, 0.05, 5.0
#: Between two readings of the log, and between two starts of an nginx that ends by itself.
_TICK, _AGAIN = 1.0, 2.0
_LOG_BYTES = 4 * 1024**2
_ERRORS_BYTES = 1024**2
_WORKERS = 4
#: What is counted stands at the end of a line, and most lines end alike.
_COUNTED = b'"status":'
_END_OF_LINE = re.compile(
    rb'"status":(\d+),"bytes":(\d+),"seconds":([0-9.]+),"route":"([^"]*)","target":"[^"]*","cache":"([^"]*)"}'
)

#: ``(route, status, seconds, bytes, cache, how often)``.
Counted = Callable[[str, int, float, int, str, int], None]


class Planned(NamedTuple):
    text: str
    digest: str
    listens: tuple[Listen, ...]


def binary() -> str | None:
    """nginx of this machine."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
    return os.environ.get("EDGEWARD_NGINX") or shutil.which("nginx", path=path)


class Nginx:
    """``say(reason, text)``: an event. ``lines``: what goes to the access log as it is."""

    def __init__(
        self, data: Path, front: Path, say: Callable[[str, str], None], counted: Counted, lines: Callable[[bytes], None]
    ) -> None:
        self._folder = data / "nginx"
        self._say, self._counted, self._lines = say, counted, lines
        own = daemon.socket_path(data, "nginx.sock")
        kept = _in_memory(data) or self._folder / "kept"
        self.where = Where(
            str(self._folder), str(front), str(own), str(self._folder / "requests.log"), str(kept),
            workers=max(1, min(_WORKERS, (os.cpu_count() or 1) // 2)), user="root" if os.geteuid() == 0 else "",
        )  # fmt: skip
        self._config = self._folder / "nginx.conf"
        self._process: subprocess.Popen[bytes] | None = None
        self._now: Planned | None = None
        self._wanted: Planned | None = None
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._fd: int | None = None
        self._old_fd: int | None = None
        self._rest = b""
        self._apply_time = _APPLY
        self.starts = self.reloads = self.refused = 0

    # -- configurations ------------------------------------------------------------------------------------------------

    async def plan(self, config: GatewayConfig, table: Table[Rule], listens: Iterable[Listen]) -> Planned:
        """A configuration that nginx takes. Raises ``EdgewardError``; then nothing has changed."""
        ports = tuple(listens)
        try:
            text = render(config, table, ports, self.where)
        except ValueError as e:
            raise _wrong(str(e)) from None
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        planned = Planned(text.replace("@DIGEST@", digest), digest, ports)
        if self._now is None or digest != self._now.digest:
            await self._test(planned)
        return planned

    async def _test(self, planned: Planned) -> None:
        ensure_dir(self._folder)
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
            ensure_dir(self._folder / name)
        ensure_dir(Path(self.where.kept))
        tried = self._folder / "next.conf"
        write_atomic(tried, planned.text.encode())
        # its own pid file and sockets are those of the nginx that runs: -t leaves them alone
        process = await asyncio.create_subprocess_exec(
            self._program(), "-t", "-q", *self._args(tried), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env=_ENV,
        )  # fmt: skip
        try:
            async with asyncio.timeout(_TEST):
                _, said = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise _wrong(f"nginx -t has not ended within {_TEST:g} s") from None
        if process.returncode:
            raise _wrong(_reason(said))

    async def begin(self, planned: Planned) -> None:
        """Starts it, where it does not run, with its first configuration. Raises ``EdgewardError``."""
        if self._process is not None:
            return
        for listen in planned.listens:
            _free(listen)
        await self._start(planned)

    def commit(self, planned: Planned) -> None:
        """From now on by this one."""
        if self._now is None or planned.digest != self._now.digest or self._wanted is not None:
            self._wanted = planned
            self._settled.clear()
            self._changed.set()

    async def settled(self) -> None:
        """Until what was committed last is in use, or was refused."""
        await self._settled.wait()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK):
                    await self._changed.wait()
            self._changed.clear()
            if self._process is not None and self._process.poll() is not None:
                await self._ended(self._process.returncode)
            if (planned := self._wanted) is not None:
                await self._apply(planned)
                if self._wanted is planned:
                    self._wanted = None
                    self._settled.set()
                else:
                    self._changed.set()
            self.read()

    async def _apply(self, planned: Planned) -> None:
        before = self._now
        if self._process is None or before is None or planned.digest == before.digest:
            return
        write_atomic(self._config, planned.text.encode())
        self._process.send_signal(signal.SIGHUP)
        self.reloads += 1
        if await self._has(planned):
            self._now = planned
            return
        self.refused += 1
        write_atomic(self._config, before.text.encode())
        self._process.send_signal(signal.SIGHUP)
        self._say("EngineRefused", f"nginx did not take a configuration and goes on by the one before: {self._error()}")

    async def _has(self, planned: Planned) -> bool:
        """Whether nginx answers by this configuration, within a time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._apply_time):
                while self._process is not None and self._process.poll() is None:
                    if await self._digest() == planned.digest:
                        return True
                    await asyncio.sleep(_LOOK)  # the pace of asking
        return False

    async def _digest(self) -> str:
        """What nginx says that it has; empty when it does not answer."""
        try:
            reader, writer = await asyncio.open_unix_connection(self.where.own)
        except OSError:
            return ""
        try:
            writer.write(b"GET /digest HTTP/1.0\r\n\r\n")
            async with asyncio.timeout(_LOOK * 20):
                return (await reader.read()).rpartition(b"\r\n\r\n")[2].decode("ascii", "replace").strip()
        except (OSError, TimeoutError):
            return ""
        finally:
            writer.close()

    # -- the process ---------------------------------------------------------------------------------------------------

    def _program(self) -> str:
        found = binary()
        if found is None:
            raise _wrong("there is no nginx on this machine")
        return found

    def _args(self, config: Path) -> list[str]:
        return ["-e", "stderr", "-p", str(self._folder), "-c", str(config)]

    async def _start(self, planned: Planned) -> None:
        write_atomic(self._config, planned.text.encode())
        Path(self.where.own).unlink(missing_ok=True)
        Path(self.where.log).unlink(missing_ok=True)
        with (self._folder / "error.log").open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a fork and an exec; it must be this thread's child
                [self._program(), *self._args(self._config)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=errors, env=_ENV, process_group=0, preexec_fn=daemon.die_with_parent,  # noqa: PLW1509 - one call of the kernel
            )  # fmt: skip
        self.starts += 1
        if not await self._has(planned):
            why = self._error()
            await self.stop()
            raise _wrong(f"nginx does not start: {why}")
        self._now = planned
        self._fd = self._reopened()

    async def _ended(self, code: int) -> None:
        """It ended by itself: again, with what it had."""
        planned, group, self._process = self._now, self._process.pid if self._process else 0, None
        if group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)  # workers that are left have the ports
        self.read()
        self._close_log()
        self._say("EngineEnded", f"nginx ended with status {code} and is started again: {self._error()}")
        while planned is not None:
            try:
                await self._start(planned)
                return
            except EdgewardError as e:
                log.warning("%s", e)
                await asyncio.sleep(_AGAIN)  # the back-off between two starts

    async def stop(self) -> None:
        """Requests in progress may end, for a moment."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            for sign, patience in ((signal.SIGQUIT, _END), (signal.SIGTERM, _END), (signal.SIGKILL, _END)):
                process.send_signal(sign)
                if await _gone(process, patience):
                    break
        self.read()
        self._close_log()
        self._now = None
        shutil.rmtree(self.where.kept, ignore_errors=True)

    def kill(self) -> None:
        """At once, without waiting: the plane ends."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        self._close_log()
        shutil.rmtree(self.where.kept, ignore_errors=True)

    def _error(self) -> str:
        try:
            return _reason((self._folder / "error.log").read_bytes()[-4096:])
        except OSError:
            return "it says nothing"

    # -- what it did by itself -----------------------------------------------------------------------------------------

    def read(self) -> None:
        """Counts what stands in its log by now."""
        if self._old_fd is not None:
            self._take(self._old_fd)
            os.close(self._old_fd)
            self._old_fd = None
        if self._fd is None:
            return
        at = self._take(self._fd)
        if at > _LOG_BYTES and self._process is not None:
            # the file goes away under its hands; what it still writes into it is read at the next look
            Path(self.where.log).unlink(missing_ok=True)
            self._process.send_signal(signal.SIGUSR1)
            self._old_fd, self._fd = self._fd, self._reopened()
        with contextlib.suppress(OSError):
            errors = self._folder / "error.log"
            if errors.stat().st_size > _ERRORS_BYTES:
                os.truncate(errors, 0)

    def _reopened(self) -> int:
        """The new file, made by whoever is first."""
        return os.open(self.where.log, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _take(self, fd: int) -> int:
        """Reads to the end; gives how far that is."""
        while data := os.read(fd, 4 * 1024**2):
            data = self._rest + data
            end = data.rfind(b"\n") + 1
            whole, self._rest = data[:end], data[end:]
            if whole:
                self._lines(whole)
            ends = Counter([line[line.rfind(_COUNTED) :] for line in whole.split(b"\n")])
            for end_of_line, n in ends.items():
                if match := _END_OF_LINE.fullmatch(end_of_line):
                    status, size, seconds, route, cache = match.groups()
                    self._counted(route.decode(), int(status), float(seconds), int(size), cache.decode(), n)
        return os.lseek(fd, 0, os.SEEK_CUR)

    def _close_log(self) -> None:
        for fd in (self._fd, self._old_fd):
            if fd is not None:
                os.close(fd)
        self._fd = self._old_fd = None
        self._rest = b""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None


_ENV = {"TZ": "UTC", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def _wrong(why: str) -> EdgewardError:
    return EdgewardError(
        f"the engine nginx: {why}", field="$.gateway.engine",
        remedy='install nginx (Debian: nginx-light), or take "engine" out of the gateway of node.json',
    )  # fmt: skip


def _reason(said: bytes) -> str:
    """The first complaint of nginx, without its dates."""
    lines = said.decode("utf-8", "replace").splitlines()
    for line in lines:
        if "[emerg]" in line or "[crit]" in line or "[alert]" in line:
            return re.sub(r"^.*?\[\w+\]\s*(\d+#\d+:\s*)?", "", line)[:400]
    return lines[-1][:400] if lines else "it says nothing"


def _free(listen: Listen) -> None:
    """Raises as the plane does when somebody else has the port; nginx would try again and again."""
    kind = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(kind) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((listen.host, listen.port))
        except OSError as e:
            raise EdgewardError(
                f"the gateway cannot listen: {listen.host}:{listen.port} {e.strerror or e}",
                field="$.gateway.listen",
                remedy="name another address in node.json: gateway: {listen: ADDRESS:PORT}",
            ) from None


async def _gone(process: subprocess.Popen[bytes], patience: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience):
            while process.poll() is None:  # noqa: ASYNC110 - a child that has no event
                await asyncio.sleep(_LOOK)
            return True
    return process.poll() is not None


def _in_memory(data: Path) -> Path | None:
    """A folder of our own in the machine's memory; None where there is none."""
    root = Path("/dev/shm")  # noqa: S108 - made 0700, and checked
    made = root / f"edgeward-{os.getuid()}-{hashlib.sha256(os.fsencode(data)).hexdigest()[:16]}"
    try:
        made.mkdir(mode=0o700, exist_ok=True)
        found = made.stat(follow_symlinks=False)
    except OSError:
        return None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return made if private else None
