"""An agent's app runtime alone, for test_kill_at_every_step: ends when the wanted version is whole, or dies at a step.

``python driver.py DIR VERSION STEP [IMAGE]``: a step is the moment before or after anything that changes the disk or a
process; with an image the app is a container of it, and steps are those that concern it.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeward.core.resource import Resource, decode
from edgeward.hub.kinds import load
from edgeward.workloads import process
from edgeward.workloads.container import ContainerRuntime
from edgeward.workloads.edge import AppsEdge
from edgeward.workloads.podman import Podman
from edgeward.workloads.process import ProcessRuntime
from edgeward.workloads.state import WorkloadState

STEP = int(sys.argv[3])
IMAGE = sys.argv[4] if len(sys.argv) > 4 else ""
os.environ["EDGEWARD_DATA"] = sys.argv[1]  # as the agent does: by it the test finds what runs
steps = itertools.count()
WRITES = ("save_app", "save_version", "trim_versions", "save_instance", "remove_instance")


def step() -> None:
    if next(steps) == STEP:
        os.kill(os.getpid(), signal.SIGKILL)


def stepped(owner: Any, name: str) -> None:
    inner: Callable[..., Any] = getattr(owner, name)
    if asyncio.iscoroutinefunction(inner):

        @functools.wraps(inner)
        async def call(*args: Any, **kwargs: Any) -> Any:
            step()
            got = await inner(*args, **kwargs)
            step()
            return got
    else:

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            got = inner(*args, **kwargs)
            step()
            return got

    setattr(owner, name, call)


class Wishes:
    def __init__(self, version: str) -> None:
        what: dict[str, Any] = {"process": {"command": ["sleep", version]}}
        if IMAGE:
            what = {"container": {"image": IMAGE, "args": [f"exec sleep {version}"]}}
        spec = what | {
            "health": {"window": "100ms"},
            "stop": {"grace": "2s"},
        }
        doc = {"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": "web"}, "spec": spec}
        self._app: Resource = decode(doc)

    def apps(self) -> dict[tuple[str, str], tuple[Resource, int]]:
        return {("default", "web"): (self._app, 1)}

    def config(self, namespace: str, name: str) -> dict[str, str] | None:
        return None

    def secret(self, namespace: str, name: str) -> dict[str, str] | None:
        return None

    def service_env(self, namespace: str) -> dict[str, str]:
        return {}


async def main() -> None:
    whole = asyncio.Event()
    version = sys.argv[2]

    def report(namespace: str, name: str, status: dict[str, Any] | None) -> None:
        instances = (status or {}).get("instances", [])
        if status and status["phase"] == "Running" and len(instances) == 1:
            pid = instances[0]["pid"]
            if f"sleep\0{version}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                whole.set()

    for name in () if IMAGE else WRITES:
        stepped(WorkloadState, name)
    for name in ("stop", "clean") if IMAGE else ("start", "stop", "clean"):
        stepped(ContainerRuntime if IMAGE else ProcessRuntime, name)
    if IMAGE:
        stepped(Podman, "run")
    else:
        stepped(process.proc, "spawn_detached")
    apps = AppsEdge(
        node="n", site="s", data_dir=Path(sys.argv[1]), source=Wishes(version), report=report, event=lambda *_: None
    )
    running = asyncio.create_task(apps.run())
    async with asyncio.timeout(90):
        await whole.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await apps.shutdown(leave=True)


load()
asyncio.run(main())
