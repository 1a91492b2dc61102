"""Where WebAssembly workers come from: a zygote of their own that has the engine loaded, and code that is made ahead.

In comes a version, out goes a worker (``wasmhost.py``) that was given machine code. The source is compiled once, in a
cage like any worker's, when the version is provisioned; what comes out is kept (``wasmcache.py``). The node's own
process never loads the engine and never looks into source or code. A node without wasmtime says so.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import importlib.util
import logging
import os
import platform
import secrets
import socket
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core import cgroup
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.invocation import MAX_FRAME, Broken, Jailed, frame
from edgeward.functions.nursery import Child, Nursery
from edgeward.functions.sandbox import Cage
from edgeward.functions.shelves import code_folder
from edgeward.functions.versions import Version
from edgeward.functions.wasmcache import MAX_CODE, Cache, Code, sealed
from edgeward.functions.wasmwire import CONFIG, Compiled, Load

log = logging.getLogger("edgeward.functions")

#: Bytes and seconds that compiling one source may take.
_MEMORY, _TIME = 768 << 20, 60.0
#: Bytes that a worker needs beside its guest's memory: the engine's own, the code, the answer.
_BESIDE = 48 << 20
#: Sources that cannot be compiled and why; remembered, so that they are not tried again and again.
_BAD = 64
#: Versions whose code's name is known; bytes of a source.
_NAMES, _SOURCE = 512, 64 << 20
#: Workers that wait fully caged; processes and threads, and open files, of one.
_SPARES, _PIDS, _FILES = 2, 8, 64
#: Seconds after a start until what can wait is done.
_PAUSE = 0.005
#: Their user numbers, beyond those of functions (``versions.py``).
_USERS, _USER_SPAN = 2_010_000_000, 100_000_000
#: Seconds until it is known how a process ended.
_ENDED = 2.0
_decode = msgspec.msgpack.Decoder(Jailed | Broken | Compiled).decode


class Wasm:
    """The origin of ``runtime: wasm``."""

    def __init__(
        self, folder: Path, node: str, prefix: str, new_instance: Callable[[], str], spawn: Callable[[Any], None]
    ) -> None:
        """``folder``: of the node's functions; ``prefix``: of its groups' names; ``spawn``: owns what goes on in the
        background."""
        self._spawn = spawn
        self.nursery = Nursery(folder / "wasm.log", node, prefix, "edgeward.functions.wasmzygote")
        self._folder, self._node, self._new_instance = folder, node, new_instance
        self._cache: Cache | None = None
        self._turns: dict[str, asyncio.Lock] = {}
        self._bad: OrderedDict[str, str] = OrderedDict()
        self._names: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._spares: deque[Child] = deque()
        self._filling: asyncio.Future[None] | None = None
        #: No more are kept ready.
        self._closed = False
        self._user = secrets.randbelow(_USER_SPAN)

    async def lacks(self, version: Version) -> str:
        if importlib.util.find_spec("wasmtime") is None:
            return "this node has no wasmtime: pip install wasmtime"
        if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
            return f"wasmtime does not run on {platform.system()} {platform.machine()}"
        return ""

    def files(self, version: Version) -> dict[str, str]:
        return {}

    async def worker(self, version: Version, cage: Cage, env: dict[str, str]) -> Child:
        try:
            code = await self._code(version)
        except OSError as e:  # no descriptor, no memory, a folder that cannot be made
            raise Unreachable(f"its machine code cannot be held: {e}") from None
        try:
            own = {k: v for k, v in env.items() if k in version.env}
            load = Load(False, code.size, version.memory, own)
            return await self._loaded(load, [code.fd], version.memory + _BESIDE, version.cpu)
        finally:
            os.close(code.fd)

    async def _loaded(self, load: Load, fds: list[int], memory: int, cpu: float | None) -> Child:
        """A worker in its cage, with its limits, that has been told what to load. Raises ``EdgewardError``."""
        child = await self._caged(memory, cpu)
        try:
            await _give(child, load, fds)
            if memory < (child.cage.memory or 0):  # it was ready before it was known what for
                self._later(lambda: self._spawn(self._tighten(child, memory)))
        except BaseException as e:
            child.kill()
            child.sock.close()
            if isinstance(e, OSError):
                raise Unreachable(f"a worker cannot be given its code: {e}") from None
            raise
        return child

    async def _tighten(self, child: Child, memory: int) -> None:
        """Its group's bound comes down to what it needs; the engine holds the guest to its own bound already."""
        if child.ended.done():
            return
        child.cage.memory = memory
        await asyncio.to_thread(cgroup.prepare, self._node, child.cage.instance, cgroup.Limits(memory, None, _PIDS))

    def _later(self, work: Callable[[], None]) -> None:
        """Not now: it would take its time from the start that is on."""
        if not self._closed:
            asyncio.get_running_loop().call_later(_PAUSE, work)

    async def _caged(self, memory: int, cpu: float | None) -> Child:
        """One of those that wait, fully caged, for whatever code comes first: a start is a message and a mapping."""
        self._later(self._refill)
        while self._spares and cpu is None:
            child = self._spares.popleft()
            if not child.ended.done():
                return child
            child.sock.close()
        return await self.nursery.spawn(self._cage(memory, cpu), {})

    def _cage(self, memory: int, cpu: float | None = None) -> Cage:
        # a user number of its own for each worker: not even two of the same function can touch one another
        self._user += 1
        user = _USERS + self._user % _USER_SPAN
        return Cage(self._new_instance(), "", user, memory, cpu, _PIDS, MAX_CODE, _FILES)

    def _refill(self) -> None:
        if self._filling is None and len(self._spares) < _SPARES and not self._closed:
            self._filling = asyncio.ensure_future(self._fill())

    async def _fill(self) -> None:
        try:
            while len(self._spares) < _SPARES:
                child = await self.nursery.spawn(self._cage(_MEMORY), {})
                if "memory" not in child.cage.grouped:
                    # its bound was set for good when it was caged: it cannot wait for one that is not known yet
                    child.kill()
                    child.sock.close()
                    self._closed = True
                    return
                self._spares.append(child)
        except EdgewardError as e:
            log.info("no worker is kept ready for WebAssembly: %s", e)
        finally:
            self._filling = None

    # -- machine code ----------------------------------------------------------------------------------------------

    async def _code(self, version: Version) -> Code:
        """Machine code of the version; the caller closes it. Raises ``EdgewardError``."""
        if self._cache is None:
            self._cache = Cache(self._folder / "wasm", self._folder / "wasm.key", CONFIG)
        cache, name = self._cache, self._name(self._cache, version)
        if (held := cache.held(name)) is not None:
            return held
        turn = self._turns.setdefault(name, asyncio.Lock())
        try:
            async with turn:
                found = cache.held(name) or await asyncio.to_thread(cache.find, name)
                if found is None:
                    source = await asyncio.to_thread(_source, self._folder, version)
                    found = await asyncio.to_thread(cache.keep, name, await self._compile(name, source, version))
                return found
        finally:
            if not turn.locked():
                self._turns.pop(name, None)

    def _name(self, cache: Cache, version: Version) -> str:
        """Under what its machine code is kept; found out once for each version."""
        at = (version.key, version.digest)
        if at not in self._names:
            source = version.code or "".join(version.files.values())
            # with what an instance was made with when it was tried
            text = f"{version.handler}\0{version.memory}\0{source}"
            self._names[at] = cache.name(hashlib.sha256(text.encode()).hexdigest())
            while len(self._names) > _NAMES:
                self._names.popitem(last=False)
        return self._names[at]

    async def _compile(self, name: str, source: bytes, version: Version) -> bytes:
        if name in self._bad:
            raise EdgewardError(self._bad[name])
        with contextlib.ExitStack() as stack:
            given = sealed(source)
            stack.callback(os.close, given.fd)
            out = os.memfd_create("edgeward-wasm", os.MFD_CLOEXEC)
            stack.callback(os.close, out)
            load = Load(True, given.size, version.memory, handler=version.handler, startup=version.startup)
            child = await self._loaded(load, [given.fd, out], _MEMORY, None)
            stack.callback(child.kill)
            told = await self._told(child)
            if not told.error and 0 < told.size <= MAX_CODE:
                return await asyncio.to_thread(os.pread, out, told.size, 0)
        why = (told.error or "there is too much machine code").strip()
        if told.final:
            self._bad[name] = why
            while len(self._bad) > _BAD:
                self._bad.popitem(last=False)
        raise EdgewardError(why)

    async def _told(self, child: Child) -> Compiled:
        """What the compiler says. Raises ``EdgewardError`` where it could not say anything."""
        with child.sock:
            reader, writer = await asyncio.open_unix_connection(sock=child.sock)
            try:
                async with asyncio.timeout(_TIME):
                    while True:
                        told = _decode(await _frame(reader))
                        if isinstance(told, Compiled):
                            return told
                        if isinstance(told, Broken):
                            raise EdgewardError(f"cannot be compiled: {told.message}")
            except TimeoutError:
                raise EdgewardError(f"was not compiled within {_TIME:g} s") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                child.kill()
                over = await _over(child)
                what = f"it took more than {_MEMORY >> 20} MiB" if over else "the compiler ended"
                return Compiled(0, what)
            finally:
                writer.close()

    async def close(self) -> None:
        self._closed = True
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
        while self._spares:
            self._spares.popleft().sock.close()
        await self.nursery.close()
        if self._cache is not None:
            self._cache.close()


def _source(functions: Path, version: Version) -> bytes:
    """WebAssembly, or its text. Raises ``EdgewardError``."""
    if version.code:
        return _packed(code_folder(functions, version.code))
    if text := version.files.get("main.wat"):
        return text.encode()
    try:
        return base64.b64decode(version.files.get("main.wasm", ""), validate=True)
    except binascii.Error:
        raise EdgewardError("main.wasm is not base64") from None


def _packed(folder: Path) -> bytes:
    for name in ("main.wasm", "main.wat"):
        with contextlib.suppress(FileNotFoundError), (folder / name).open("rb") as file:
            source = file.read(_SOURCE + 1)
            if len(source) > _SOURCE:
                raise EdgewardError(f"{name} has more than {_SOURCE >> 20} MiB")
            return source
    raise EdgewardError("there is neither main.wasm nor main.wat in its archive")


async def _give(child: Child, load: Load, fds: list[int]) -> None:
    """The first message to a worker, with descriptors. Raises ``OSError``."""
    data = bytes(frame(load))
    sent = socket.send_fds(child.sock, [data], fds)
    if sent < len(data):
        async with asyncio.timeout(_ENDED):
            await asyncio.get_running_loop().sock_sendall(child.sock, data[sent:])


async def _frame(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(4), "big")
    if size > MAX_FRAME:
        raise EdgewardError("the compiler's answer is too long")
    return await reader.readexactly(size)


async def _over(child: Child) -> bool:
    """Whether it was over its memory."""
    try:
        async with asyncio.timeout(_ENDED):
            return (await asyncio.shield(child.ended)).out_of_memory
    except TimeoutError:
        return False
