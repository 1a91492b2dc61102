"""What every long-running process of Edgeward shares: logs, signals, its ``run.json``, its HTTP server.

``run.json`` is written when the process is ready and whenever what it says changes; supervisors and tests read it, so
"ready" is a fact on disk and not a guess by time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeward.core import clock, proc
from edgeward.core.context import correlation
from edgeward.core.files import write_json

if TYPE_CHECKING:
    import uvicorn


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the correlation id where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        doc: dict[str, Any] = {
            "time": clock.timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = correlation.get()
        if request:
            doc["request"] = request
        if record.exc_info:
            doc["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(doc).decode()


def local(bind: str) -> str:
    """The address by which a process of this machine reaches what listens on ``bind``."""
    return "127.0.0.1" if bind in ("0.0.0.0", "") else bind  # noqa: S104 - compared, not bound


def set_up_logging(level: str = "INFO") -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("asyncio", "uvicorn.access", "nats"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def die_with_parent() -> None:
    """SIGTERM to us when our parent ends, however it ends (Linux; elsewhere the supervisor's own stop must do)."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)


def raise_file_limit() -> int:
    """As many open files as this process may have at all: a hub holds two for each node. Gives the number."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems have a hard limit that they do not take
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft


class RunFile:
    """The process's ``run.json``; written only when it says something new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        me = proc.identify(os.getpid())
        self._fixed = {"pid": os.getpid(), "start": me.start if me else "", "startedAt": clock.timestamp()}
        self._last: dict[str, Any] = {}

    def write(self, **facts: Any) -> None:
        doc = {**self._fixed, **facts}
        if doc != self._last:
            try:
                write_json(self._path, doc)
            except OSError as e:  # a disk that is full ends nobody; it is said again with the next change
                logging.getLogger("edgeward.daemon").warning("%s cannot be written: %s", self._path, e.strerror or e)
                return
            self._last = doc

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def http_server(app: Any, **options: Any) -> AsyncIterator[uvicorn.Server]:
    """An HTTP server that listens inside the block. Raises ``OSError`` when the address is taken."""
    import uvicorn  # here: not every process serves an API, and each byte of an idle node counts

    from edgeward.core.http_guard import GuardedProtocol

    class Server(uvicorn.Server):
        """uvicorn without its signal handling: the process has its own."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app,
        http=options.pop("http", GuardedProtocol),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # whoever connects by a relay on this machine could name any address as its own
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=65536,
        **options,
    )
    server = Server(config)
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:
            if task.done():
                raise OSError(f"the HTTP server did not start on {options.get('uds') or options.get('port')}")
            await asyncio.sleep(0.01)  # uvicorn has no event for "listening"
        yield server
    finally:
        server.should_exit = True
        # streams that would never end by themselves (watch, follow) end with the process
        with contextlib.suppress(TimeoutError, asyncio.CancelledError, SystemExit):
            async with asyncio.timeout(5):
                await task


def run(main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Runs ``main(stop)`` on uvloop where it is there; SIGTERM and SIGINT set ``stop``."""

    async def body() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, stop.set)
        return await main(stop)

    try:
        import uvloop
    except ImportError:
        return asyncio.run(body())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(body())


async def until(stop: asyncio.Event, *works: Callable[[], Awaitable[Any]]) -> None:
    """Runs the works together until ``stop``; one that fails ends all with its error."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_named(w)) for w in works]
        await stop.wait()
        for task in tasks:
            task.cancel()


async def _named(work: Callable[[], Awaitable[Any]]) -> None:
    await work()


def memory_mb(pid: int | None) -> float:
    """What a process takes, in MB of 2**20 bytes (PSS where the kernel tells it); 0.0 for none."""
    usage = proc.usage(pid) if pid else None
    return usage.memory / 2**20 if usage else 0.0


def metrics_text(values: dict[str, float], help_texts: dict[str, str] | None = None) -> str:
    """Prometheus text exposition; names may carry labels (``name{a="b"}``), what ends in ``_total`` is a counter.

    Numbers are written in full: a counter cut to six digits stands still and then jumps.
    """
    out: list[str] = []
    seen: set[str] = set()
    for name in sorted(values):
        base = name.partition("{")[0]
        if base not in seen:
            seen.add(base)
            if help_texts and base in help_texts:
                out.append(f"# HELP {base} {help_texts[base]}")
            out.append(f"# TYPE {base} {'counter' if base.endswith('_total') else 'gauge'}")
        value = values[name]
        out.append(f"{name} {int(value) if value.is_integer() else repr(value)}")
    return "\n".join(out) + "\n"


STARTED = time.monotonic()


def socket_path(directory: Path, name: str) -> Path:
    """Where a unix socket of ``directory`` lives: in it, or in a private folder of /tmp when the path is too long.

    Systems allow about 104 bytes for a socket's path, and data directories may be deep.
    """
    import hashlib

    path = directory / name
    if len(os.fsencode(path)) <= 100:
        return path
    private = Path("/tmp") / f"edgeward-{os.getuid()}"  # noqa: S108 - created 0700 and checked below
    private.mkdir(mode=0o700, exist_ok=True)
    stat = private.stat(follow_symlinks=False)
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        raise PermissionError(f"{private} belongs to somebody else or is open to others; remove it")
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return private / f"{digest}-{name}"
