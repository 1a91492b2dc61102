"""The data plane of a node: the gateway's engine and the functions' dispatcher in one process, ``plane``.

It is started and watched by the agent (``keeper.py``) but lives on without it: it has its own session, what it shall do
is in the file ``plane.json``, and the next agent finds it again. The agent writes that file whole and then says
``reload`` on the control socket; every room makes its part ready first, and only when all could, all take it. What
cannot be taken is answered with the reason, and the configuration before goes on.

The control socket (``plane.sock``, 0600) takes one JSON line ``{"verb", "args"}`` on a connection and answers in JSON
lines; a line ``{"error": problem}`` is the last one. Verbs are ``hello``, ``reload``, ``follow`` (what the rooms
report, as it comes) and those of the rooms.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import functools
import hashlib
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from edgeward import __version__
from edgeward.core import daemon
from edgeward.core.errors import EdgewardError, Invalid, NotFound, TooMany
from edgeward.core.files import read_json
from edgeward.functions.plane import FunctionsPart
from edgeward.gateway.gate import Gate

if TYPE_CHECKING:
    from edgeward.core.vault import Vault

log = logging.getLogger("edgeward.plane")

#: A request's line: an event of 6 MiB in base64, and what is around it.
LINE_BYTES = 16 * 1024**2
#: Events that wait for an agent to listen; the oldest go first.
EVENTS = 256
#: Callers of the control socket at once.
CALLERS = 64
#: Of these for the agent itself: calls of functions that take long must not keep a new configuration away.
RESERVED = 8
DRAIN = 5.0

Verb = Callable[[dict[str, Any]], AsyncIterator[dict[str, Any]]]


class Part(Protocol):
    """One room's share of the plane."""

    @property
    def verbs(self) -> Mapping[str, Verb]: ...
    async def provision(self, section: dict[str, Any]) -> Any:
        """Makes a configuration ready without taking it. Raises ``EdgewardError``; then nothing has changed."""
        ...

    def commit(self, prepared: Any) -> None:
        """Takes it, at once."""
        ...

    async def run(self) -> None:
        """Until cancelled."""
        ...


class Voice:
    """What the rooms say to the agent: the last status of each object, and the events that nobody heard yet."""

    def __init__(self) -> None:
        self.statuses: dict[tuple[str, str, str], dict[str, Any] | None] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._news = asyncio.Event()
        self._changed: dict[tuple[str, str, str], None] = {}

    def report(self, kind: str, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        key = (kind, namespace, name)
        if key in self.statuses and self.statuses[key] == status:
            return
        self.statuses[key] = status
        self._changed[key] = None
        self._news.set()

    def event(self, type: str, reason: str, message: str, namespace: str, name: str, kind: str) -> None:
        self.events.append(
            {"type": type, "reason": reason, "message": message, "namespace": namespace, "name": name, "kind": kind}
        )
        self._news.set()

    async def follow(self, _: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Everything once, then what changes. One listener: the agent."""
        self._changed = dict.fromkeys(self.statuses)
        self._news.set()
        while True:
            await self._news.wait()
            self._news.clear()
            changed, self._changed = self._changed, {}
            for key in changed:
                status = self.statuses.get(key)
                if status is None:
                    self.statuses.pop(key, None)
                yield {"status": status, "kind": key[0], "namespace": key[1], "name": key[2]}
            while self.events:
                yield {"event": self.events[0]}
                self.events.popleft()  # only now: a listener that went away has not heard it


@functools.cache
def code() -> str:
    """Names the code that a plane runs: an agent of another one starts it anew."""
    root = Path(__file__).parents[1]
    h = hashlib.sha256(__version__.encode())
    for room in ("agent", "core", "gateway", "functions"):
        for file in sorted((root / room).glob("*.py")):
            stat = file.stat()
            h.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return h.hexdigest()[:16]


class Plane:
    def __init__(self, data: Path) -> None:
        self.data = data
        self.config_file = data / "plane.json"
        self.socket = daemon.socket_path(data, "plane.sock")
        self.run_file = daemon.RunFile(data / "plane.run.json")
        self.voice = Voice()
        self.parts: dict[str, Part] = {}
        self.digest = ""
        self._callers = 0
        self._reloading = asyncio.Lock()
        self._verbs: dict[str, Verb] = {"hello": self._hello, "reload": self._reload, "follow": self.voice.follow}

    async def run(self, stop: asyncio.Event) -> int:
        config = read_json(self.config_file, {})
        self.parts, gate = parts(self.data, str(config.get("node", "")), str(config.get("site", "")), self.voice)
        for part in self.parts.values():
            self._verbs |= part.verbs
        try:
            await self.load()
        except EdgewardError as e:
            log.error("the configuration is not taken: %s", e)  # the agent hears it when it says reload
        self.socket.unlink(missing_ok=True)
        old = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._caller, str(self.socket), limit=LINE_BYTES)
        finally:
            os.umask(old)
        async with server:
            self.run_file.write(code=code())
            log.info("plane %s ready", __version__)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(p.run()) for p in self.parts.values()]
                await stop.wait()
                await gate.drain(DRAIN)  # what is in progress may end first
                for task in tasks:
                    task.cancel()
        self.run_file.remove()
        self.socket.unlink(missing_ok=True)
        return 0

    async def load(self) -> None:
        """Takes the configuration of the file, whole or not at all."""
        async with self._reloading:
            raw = self.config_file.read_bytes() if self.config_file.exists() else b"{}"
            digest = hashlib.sha256(raw).hexdigest()
            if digest == self.digest:
                return
            try:
                config = msgspec.json.decode(raw, type=dict[str, dict[str, Any] | str])
            except msgspec.DecodeError as e:
                raise Invalid(f"is no configuration: {e}", file=str(self.config_file)) from None
            prepared = []
            for name, part in self.parts.items():
                section = config.get(name)
                prepared.append((part, await part.provision(section if isinstance(section, dict) else {})))
            for part, made in prepared:
                part.commit(made)
            self.digest = digest

    async def _hello(self, _: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"pid": os.getpid(), "code": code(), "version": __version__, "digest": self.digest}

    async def _reload(self, _: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        await self.load()
        yield {"digest": self.digest}

    # -- control socket ------------------------------------------------------------------------------------------------

    async def _caller(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._callers += 1
        try:
            if self._callers > CALLERS:
                raise TooMany(f"the data plane has {CALLERS} callers already", remedy="try again in a moment")
            async with asyncio.timeout(30):
                line = await reader.readline()
            await self._serve(line, reader, writer)
        except EdgewardError as e:
            await self._say(writer, {"error": e.problem()})
        except (ConnectionError, TimeoutError, ValueError) as e:
            log.info("a caller was left: %s", e or type(e).__name__)
        finally:
            self._callers -= 1
            writer.close()

    async def _serve(self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            doc = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError:
            raise Invalid("a call is one line of JSON", remedy='send {"verb": ..., "args": {...}}') from None
        verb = self._verbs.get(str(doc.get("verb")))
        if verb is None:
            raise NotFound(f"there is no verb {str(doc.get('verb'))[:40]!r}", remedy=", ".join(sorted(self._verbs)))
        if doc["verb"] not in ("hello", "reload", "follow") and self._callers > CALLERS - RESERVED:
            most = CALLERS - RESERVED
            raise TooMany(f"the data plane has {most} callers already", remedy="try again in a moment")
        args = doc.get("args")
        answering = asyncio.create_task(self._answers(verb, args if isinstance(args, dict) else {}, writer))
        leaving = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await answering
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answers(self, verb: Verb, args: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        async with aclosing(verb(args)) as docs:  # type: ignore[type-var]
            async for doc in docs:
                await self._say(writer, doc)

    @staticmethod
    async def _say(writer: asyncio.StreamWriter, doc: dict[str, Any]) -> None:
        writer.write(msgspec.json.encode(doc) + b"\n")
        async with asyncio.timeout(30):
            await writer.drain()


class Unsealer:
    """The node's vault, opened when it is needed: it costs some megabytes."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._vault: Vault | None = None

    def __call__(self, sealed: bytes, place: str) -> bytes:
        if self._vault is None:
            from edgeward.core.vault import Vault

            self._vault = Vault.open(self._data / "identity")
        return self._vault.unseal(sealed, place)


def parts(data: Path, node: str, site: str, voice: Voice) -> tuple[dict[str, Part], Gate]:
    """The rooms' shares of this plane; the gateway last: it calls the others."""
    functions = FunctionsPart(data=data, node=node, site=site, voice=voice)
    gate = Gate(node=node, log_file=data / "access.log", voice=voice, invoker=functions, unseal=Unsealer(data))
    return {"functions": functions, "gateway": gate}, gate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgeward.agent.plane", description="Runs one node's data plane.")
    parser.add_argument("--data", type=Path, required=True, help="the node's directory")
    data = parser.parse_args().data.absolute()
    daemon.set_up_logging(os.environ.get("EDGEWARD_LOG", "INFO"))
    with (data / "plane.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log.error("another plane of this node runs")
            return 3
        daemon.raise_file_limit()

        async def run(stop: asyncio.Event) -> int:
            return await Plane(data).run(stop)

        with contextlib.suppress(KeyboardInterrupt):
            return daemon.run(run)
    return 130


if __name__ == "__main__":
    raise SystemExit(main())
