"""Where a worker comes from: one :class:`Origin` per runtime, all of which give the pool the same thing.

The pool (``pool.py``) knows calls, deadlines and versions; it asks the origin of a version's runtime for a worker and
gets a process at the other end of a socket that speaks the frames of ``core/invocation.py``. A Python worker is forked
from the zygote (``nursery.py``); so is the process whose place a program takes, in the same cage. Whatever else there
is to a runtime differs here and in ``sources.py``, nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Protocol

from edgeward.functions import programs
from edgeward.functions.nursery import Ended, Nursery, code_of, probe
from edgeward.functions.sandbox import Cage
from edgeward.functions.versions import Version
from edgeward.functions.zygote import Program


class Worker(Protocol):
    """A process that may be given calls; ``nursery.Child`` is one."""

    #: Connected stream socket. The first frame on it is ``Jailed``, then comes what the protocol says.
    sock: socket.socket
    pid: int
    #: Where what it writes to standard output and error can be read, e.g. a pipe; None: it cannot.
    output: IO[bytes] | None
    #: How it ended; set when it did.
    ended: asyncio.Future[Ended]

    def kill(self) -> None:
        """Ends exactly this process, at once; does nothing when it has ended."""
        ...


class Origin(Protocol):
    async def lacks(self, version: Version) -> str:
        """What this node would need to run it at all, and the remedy; empty: nothing. The function is then refused, and
        it is looked again later."""
        ...

    def files(self, version: Version) -> dict[str, str]:
        """What ``Init`` carries to the worker of the version's files."""
        ...

    async def worker(self, version: Version, cage: Cage, env: dict[str, str]) -> Worker:
        """A new worker, about to say ``Jailed``. Raises ``EdgewardError`` that says why there is none."""
        ...


class Forked:
    """Python: a fork of the zygote."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery

    async def lacks(self, version: Version) -> str:
        return ""

    def files(self, version: Version) -> dict[str, str]:
        return version.files

    async def worker(self, version: Version, cage: Cage, env: dict[str, str]) -> Worker:
        return await self._nursery.spawn(cage, env)


#: What a program of the system may need beside libraries: all of it is there for everybody to read.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt")
_CONFIGURED = ("/etc/alternatives", "/etc/perl", "/etc/ssl/openssl.cnf")
_ANY = "runtime command starts programs of the system, each in the same cage; require: [exec] allows its own only"


class _Probed:
    """What the cage of a program does not hold on this node, tried once."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._trying = asyncio.Lock()
        self._refuted: dict[str, str] | None = None

    async def refuted(self, cage: Cage) -> dict[str, str]:
        async with self._trying:
            if self._refuted is None:
                name, tmp = f"{cage.instance}-probe", f"{cage.tmp}-probe"
                runs = programs.needs(sys.executable)  # anything that is not what the probe tries to start
                like = Cage(name, tmp, cage.user, cage.memory, None, cage.pids, runs=runs)
                self._refuted = (await probe(self._nursery, like)).refused
            return self._refuted


class Programs:
    """command: a program of the node's or of the function's own."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery, self._probed = nursery, _Probed(nursery)

    async def lacks(self, version: Version) -> str:
        return ""  # a program that is not there is found out when it is started: the version before goes on

    def files(self, version: Version) -> dict[str, str]:
        return {}  # they lie in its working directory

    async def worker(self, version: Version, cage: Cage, env: dict[str, str]) -> Worker:
        argv = list(version.command)
        own = version.files.get(argv[0].removeprefix("./"))
        cage.code = code_of(cage) if version.files else cage.library[0] if cage.library else ""
        if own is not None:
            if not own.startswith("#!"):
                raise programs.not_executable(argv[0])
            argv[0] = f"./{argv[0].removeprefix('./')}"
            cage.runs = programs.interpreters(own)
        else:
            path = programs.resolve(argv[0], "" if version.files else cage.code)
            cage.runs = programs.needs(path)
            argv[0] = f".{path.removeprefix(cage.code)}" if cage.code and path.startswith(f"{cage.code}/") else path
        cage.runs += [cage.code] if cage.code else []
        cage.library = [*cage.library, "/usr", *_CONFIGURED]
        if "exec" not in version.require:
            cage.runs += _SYSTEM
            cage.runs_more = _ANY
        cage.refuted = await self._probed.refuted(cage)
        program = Program(argv, version.per_call)
        return await self._nursery.spawn(cage, {"PATH": programs.PATH, **env}, program=program, code=version.files)


#: The oldest Node that the SDK runs on.
_NODE = 18
NODE_SDK = str(Path(__file__).with_name("sdk.mjs"))
_NODE_LIBRARY = ("/usr/share/nodejs", "/usr/share/node_modules", "/usr/include/node", "/etc/ssl/openssl.cnf")


class Node:
    """node: Node with the SDK (``sdk.mjs``), which loads the handler."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery, self._probed = nursery, _Probed(nursery)
        #: path and time of change -> major version
        self._known: dict[tuple[str, int], int] = {}

    async def lacks(self, version: Version) -> str:
        path = programs.find("node")
        if not path:
            return "there is no node on this machine: install Node 18 or newer (Debian: apt-get install nodejs)"
        major = await self._major(path)
        if major < _NODE:
            is_ = f"is version {major}" if major else "does not say its version"
            return f"{path} {is_}: install Node {_NODE} or newer"
        return ""

    async def _major(self, path: str) -> int:
        """0: it does not run, or says something else than its version."""
        key = (path, os.stat(path).st_mtime_ns)  # noqa: PTH116
        if key not in self._known:
            self._known[key] = await asyncio.to_thread(_major_of, path)
        return self._known[key]

    def files(self, version: Version) -> dict[str, str]:
        return {}  # they lie in its working directory

    async def worker(self, version: Version, cage: Cage, env: dict[str, str]) -> Worker:
        path = os.path.realpath(programs.find("node"))
        cage.code = code_of(cage) if version.files else cage.library[0] if cage.library else ""
        cage.runs = programs.needs(path)
        cage.library = [*cage.library, *([cage.code] if cage.code else []), NODE_SDK, *_NODE_LIBRARY]
        cage.refuted = await self._probed.refuted(cage)
        # few threads: they count as processes do; and a heap that is collected before the kernel ends it
        argv = [path, "--v8-pool-size=1", f"--max-old-space-size={version.memory >> 20}", NODE_SDK]
        env = {"PATH": programs.PATH, "UV_THREADPOOL_SIZE": "2", "NO_COLOR": "1", **env}
        return await self._nursery.spawn(cage, env, program=Program(argv), code=version.files)


def _major_of(path: str) -> int:
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    found = re.match(r"v(\d{1,4})\.", told)
    return int(found.group(1)) if found else 0
