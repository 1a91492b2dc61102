"""Where a worker comes from: one :class:`Origin` per runtime, all of which give the pool the same thing.

The pool (``pool.py``) knows calls, deadlines and versions; it asks the origin of a version's runtime for a worker and
gets a process at the other end of a socket that speaks the frames of ``core/invocation.py``. A Python worker is forked
from the zygote (``nursery.py``). Whatever else there is differs here and in ``sources.py``, nowhere else.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from edgeward.functions.nursery import Ended, Nursery
from edgeward.functions.sandbox import Cage
from edgeward.functions.versions import Version


class Worker(Protocol):
    """A process that may be given calls; ``nursery.Child`` is one."""

    #: Connected stream socket. The first frame on it is ``Jailed``, then comes what the protocol says.
    sock: socket.socket
    pid: int
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
