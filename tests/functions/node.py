"""A dispatcher with real workers, for tests: functions in, answers and what the node said out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop
from tests.core.pair import until

from edgeward.core import kinds as _core_kinds  # noqa: F401
from edgeward.core.invocation import Call, CallFailed, Event, Reply
from edgeward.core.resource import decode
from edgeward.functions import spec as _spec  # noqa: F401
from edgeward.functions.dispatcher import Dispatcher
from edgeward.functions.logs import LogFile
from edgeward.functions.versions import Config, config_of

HELLO = 'def handler(event, context):\n    return {"hello": event.data.decode(), "version": context.version}\n'


def function(name: str, code: str, **spec: Any) -> Config:
    """One function as the plane is told of it; it goes the way of a document, so it is checked too."""

    doc = {
        "apiVersion": "edgeward/v1",
        "kind": "Function",
        "metadata": {"name": name},
        "spec": {"runtime": "python", "source": {"inline": code}} | spec,
    }
    return config_of(decode(doc), {}, {}, [])


def looped(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs an asynchronous test on the loop that the plane runs on."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        uvloop.run(asyncio.wait_for(test(*args, **kwargs), 120))

    return run


class Node:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: dict[str, dict[str, Any] | None] = {}
        self.told: list[str] = []
        self.good: list[str] = []

    async def __aenter__(self) -> Node:
        self.d = Dispatcher(
            self.folder,
            "n1",
            "s1",
            report=lambda ns, name, status: self.said.__setitem__(name, status),
            tell=lambda type, reason, message, ns, name: self.told.append(f"{reason} {name}: {message}"),
            good=lambda config: self.good.append(config.version.digest),
        )
        self._task = asyncio.create_task(self.d.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def call(
        self, name: str, data: bytes = b"", *, timeout: float = 0.0, version: str | None = None, key: str | None = None
    ) -> Reply:
        deadline = asyncio.get_running_loop().time() + timeout if timeout else 0.0
        return await self.d.invoke(Call(f"default/{name}", Event("1", "/test", "test", data), deadline, version, key))

    async def fails(self, name: str, data: bytes = b"", **more: Any) -> CallFailed:
        try:
            reply = await self.call(name, data, **more)
        except CallFailed as e:
            return e
        raise AssertionError(f"{name} answered {reply.body[:200]!r}")

    def status(self, name: str) -> dict[str, Any]:
        return self.d.status(f"default/{name}") or {}

    async def phase(self, name: str, phase: str) -> None:
        await until(lambda: self.status(name).get("phase") == phase, 30)

    def log(self, name: str) -> LogFile:
        """What it wrote, all of it on the disk."""
        self.d.flush_logs()
        file = self.d._functions[f"default/{name}"].log
        assert file
        return file

    def logged(self, name: str) -> str:
        """The text of its log; empty before the first line."""
        path = self.log(name).path
        return path.read_text() if path.exists() else ""
