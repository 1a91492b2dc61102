"""One node's data plane in this process, for somebody who writes a function: the real gateway, dispatcher and sandbox.

In come resources (Functions, and the Routes, Configs and Secrets around them) and the archives they name, out go
answers, the node's own words about versions, and log lines. Nothing is declared anywhere: no hub, no agent.
:meth:`Workbench.take` may be called again and again: a new version takes over as it would on a node.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import msgspec

from edgeward.agent.plane import Part, Voice, parts
from edgeward.core import kinds as _core_kinds  # noqa: F401
from edgeward.core.blobs import Target, hex_of
from edgeward.core.errors import EdgewardError, Invalid, NotFound
from edgeward.core.files import ensure_dir
from edgeward.core.invocation import Call, CallFailed, Reply
from edgeward.core.natsserver import free_port
from edgeward.core.resource import Resource
from edgeward.core.vault import Vault
from edgeward.functions import archive, stock
from edgeward.functions import edge as functions
from edgeward.functions import spec as _functions_spec  # noqa: F401
from edgeward.functions.bundling import Source, make
from edgeward.functions.parts import lock_digest
from edgeward.functions.plane import FunctionsPart
from edgeward.functions.shelves import CODE, PACKAGES, code_folder, packages_folder
from edgeward.functions.stock import Missing
from edgeward.gateway import edge as gateway
from edgeward.gateway import spec as _gateway_spec  # noqa: F401
from edgeward.gateway.rules import Listen
from edgeward.lab.cases import Case, Outcome

NODE, SITE = "local", "local"
#: What a manifest may declare for a workbench; other kinds need a system around them.
KINDS = ("Function", "Route", "Config", "Secret")
#: Not watched: what is no part of an archive, and packages, which are thousands of files that nobody writes by hand.
_UNWATCHED = archive.IGNORED | {"node_modules"}
#: Files that are watched, at most.
WATCHED = 2000
#: Seconds until a version has either taken over or failed.
READY = 60.0
_DONE = ("Running", "Failed", "Refused", "Degraded")


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """What lies there, so that a change can be seen: path to (ns of its last change, size). Raises ``Invalid``."""
    found: dict[str, tuple[int, int]] = {}
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in _UNWATCHED]
        for path in (Path(folder) / f for f in files if not f.endswith(".pyc")):
            with contextlib.suppress(OSError):  # an editor replaces files
                stat = path.stat()
                found[str(path)] = (stat.st_mtime_ns, stat.st_size)
        if len(found) > WATCHED:
            raise Invalid(f"has more than {WATCHED} files", resource=str(root), remedy="name a folder of its own")
    return found


class _Shelf:
    """What lies on the workbench's own shelves; nobody fetches anything."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def code(self, namespace: str, hex: str) -> Missing | None:
        return None if code_folder(self._folder, hex).is_dir() else Missing("Degraded", "its archive is at a hub only")

    def packages(self, namespace: str, lock: str) -> Missing | None:
        there = packages_folder(self._folder, lock_digest(lock)).is_dir()
        return None if there else Missing("Degraded", "its packages are not here")

    def settle(self) -> None:
        pass


class Workbench:
    """``say``: called with what the node would report as events."""

    def __init__(self, data: Path, *, port: int = 0, say: Callable[[str], None] = lambda _: None) -> None:
        self._data = ensure_dir(data)
        self._folder = ensure_dir(data / "functions")
        self._port, self._say = port, say
        self._serial = 0
        self._voice = Voice()
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._parts: dict[str, Part] = {}
        self.resources: list[Resource] = []

    async def __aenter__(self) -> Workbench:
        self._vault = Vault.open(self._data / "identity")
        self._sections = functions.Sections(
            self._values("Config"), self._values("Secret"), self._vault, _Shelf(self._folder)
        )
        self._parts, self._gate = parts(self._data, NODE, SITE, self._voice)
        self._functions = cast(FunctionsPart, self._parts["functions"])
        self._port = self._port or free_port("127.0.0.1")
        self._group = await asyncio.TaskGroup().__aenter__()  # what fails in there ends whoever works here
        self._tasks = [self._group.create_task(p.run()) for p in self._parts.values()]
        self._tasks.append(self._group.create_task(self._listen()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._gate.drain(1.0)
        for task in self._tasks:
            task.cancel()
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            await self._group.__aexit__(kind, e, at)  # by a part that failed, perhaps: then that is raised
        else:
            await self._group.__aexit__(None, None, None)  # an error of whoever worked here is raised as it is

    def _values(self, kind: str) -> functions.Lookup:
        def look(namespace: str, name: str) -> tuple[dict[str, str], str] | None:
            for r in self.resources:
                if (r.kind, r.metadata.namespace, r.metadata.name) == (kind, namespace, name):
                    return dict(r.spec.data), str(self._serial)
            return None

        return look

    async def _listen(self) -> None:
        async for doc in self._voice.follow({}):
            if event := doc.get("event"):
                self._say(f"{event['reason']} {event['name']}: {event['message']}")
            async with self._changed:
                self._changed.notify_all()

    # -- what should be ------------------------------------------------------------------------------------------------

    async def take(
        self, resources: Iterable[Resource], blobs: Iterable[tuple[str, bytes]] = ()
    ) -> dict[str, dict[str, Any]]:
        """Makes the plane be this, and waits until each function's version has taken over or failed.

        ``blobs``: archives that the resources name, by digest.

        The statuses by ``namespace/name``. Raises ``EdgewardError`` when the plane does not take it; then what was
        there before goes on.
        """
        resources = list(resources)
        await self._put(resources, blobs)
        before, self.resources = self.resources, resources
        self._serial += 1
        for r in self.resources:
            r.metadata.generation = self._serial
        declared = [r for r in self.resources if r.kind == "Function"]
        keys = self.functions()
        routes = [r for r in self.resources if r.kind == "Route"]
        listen = [Listen("127.0.0.1", self._port)]
        try:
            sections: dict[str, dict[str, Any]] = {
                "functions": self._sections.section(declared),
                "gateway": gateway.section(NODE, routes, lambda *_: None, {"accessLog": "off"}, listen, keys),
            }
            prepared = [(p, await p.provision(sections.get(name, {}))) for name, p in self._parts.items()]
        except EdgewardError:
            self.resources = before
            raise
        for part, made in prepared:
            part.commit(made)
        try:
            async with asyncio.timeout(READY), self._changed:
                await self._changed.wait_for(lambda: all(self._settled(k) for k in keys))
        except TimeoutError:
            pass  # the statuses say what it waits for
        return {k: self.status(k) for k in sorted(keys)}

    async def _put(self, resources: Iterable[Resource], blobs: Iterable[tuple[str, bytes]]) -> None:
        """Unpacks what is not unpacked yet; packages are fetched, as the hub would do it."""
        with tempfile.TemporaryDirectory(dir=self._data) as scratch:
            file = Path(scratch) / "blob"
            for digest, data in blobs:
                target = code_folder(self._folder, hex_of(digest))
                if not target.is_dir():
                    file.write_bytes(data)
                    await stock.place(CODE, file, target)
            for r in resources:
                if r.kind != "Function" or r.spec.dependencies is None:
                    continue
                lock = r.spec.dependencies.lock
                target = packages_folder(self._folder, lock_digest(lock))
                if not target.is_dir():
                    here = msgspec.convert(await stock.run_unpack("target"), Target)
                    await make(lock, here, Source(), file)
                    await stock.place(PACKAGES, file, target, lock)

    def status(self, key: str) -> dict[str, Any]:
        namespace, _, name = key.partition("/")
        return self._voice.statuses.get(("Function", namespace, name)) or {"phase": "Pending"}

    def functions(self) -> set[str]:
        """The Functions that are taken, by ``namespace/name``."""
        return {f"{r.metadata.namespace}/{r.metadata.name}" for r in self.resources if r.kind == "Function"}

    def _settled(self, key: str) -> bool:
        status = self.status(key)
        if status["phase"] == "Pending" and status.get("message"):
            return True  # it waits for something that is not in the manifest
        return status["phase"] in _DONE and status.get("observedGeneration") == self._serial

    def urls(self) -> Mapping[str, str]:
        """Where each Route answers."""
        return {
            r.metadata.name: f"http://127.0.0.1:{self._port}{r.spec.path}" for r in self.resources if r.kind == "Route"
        }

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def invoke(self, call: Call) -> Reply:
        """Raises ``CallFailed``."""
        return await self._functions.invoke(call)

    async def play(self, case: Case) -> Outcome:
        """One case, and what it wrote."""
        got = Outcome()
        key = self._function_of(case)
        invocation = ""
        try:
            reply = await self.invoke(Call(key, case.event))
            invocation = reply.invocation
            body = reply.body
            if reply.chunks is not None:
                body = b"".join([piece async for piece in reply.chunks])
            got = Outcome(reply.status, reply.headers, body)
        except CallFailed as e:
            invocation = invocation or e.invocation
            got = Outcome(e.status, [], b"", e.kind, e.message)
        if invocation:
            got.log = [line async for line in self.log(key, invocation=invocation)]
        return got

    def _function_of(self, case: Case) -> str:
        declared = [r for r in self.resources if r.kind == "Function"]
        named = [r for r in declared if r.metadata.name == case.function] if case.function else declared
        if len(named) != 1:
            names = ", ".join(sorted(r.metadata.name for r in declared))
            raise Invalid(f"case {case.name!r}: which function?", field="$.function", remedy=f"one of {names}")
        return f"{named[0].metadata.namespace}/{named[0].metadata.name}"

    async def log(self, key: str, *, follow: bool = False, invocation: str = "") -> AsyncIterator[str]:
        """A function's lines, as `edgeward functions logs` prints them."""
        self._functions.dispatcher.flush_logs()
        namespace, _, name = key.partition("/")
        args = {"namespace": namespace, "name": name, "tail": 1000, "follow": follow, "invocation": invocation}
        try:
            lines = functions.read_logs(self._folder, args, NODE)
        except NotFound:
            return
        async for some in lines:
            for line in some.decode(errors="replace").splitlines():
                yield line
