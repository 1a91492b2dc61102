"""What the acts of the demo stand on: the real program as a user types it, waiting for what must come, facts that hold.

A :class:`Stage` has a lab and an audience. It knows the app of examples/01 and where it serves now, and keeps what was
measured and what did not hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from edgeward.core.errors import EdgewardError
from edgeward.lab.emulated import Lab
from edgeward.lab.show import Show
from edgeward.lab.tally import FIELDS
from edgeward.lab.view import example


class Stage:
    def __init__(self, lab: Lab, show: Show) -> None:
        self.lab = lab
        self.show = show
        self.result: dict[str, Any] = dict.fromkeys(FIELDS)
        self.failed: list[str] = []
        self._port = 0

    def hold(self, ok: bool, text: str) -> None:
        """States a fact; one that does not hold fails the demo."""
        self.show.fact(text, ok)
        if not ok:
            self.failed.append(text)

    async def cli(self, *args: str, timeout: float = 60.0) -> str:
        """The real program, as a user types it."""
        context = str(self.lab.cluster.data / "context.json")
        argv = [sys.executable, "-m", "edgeward", *args]
        p = await asyncio.create_subprocess_exec(
            *argv,
            env={**os.environ, "EDGEWARD_CONTEXT": context, "NO_COLOR": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(timeout):
            out, err = await p.communicate()
        if p.returncode:
            raise EdgewardError(f"`edgeward {' '.join(args)}` failed ({p.returncode}): {err.decode().strip()}")
        return out.decode()

    async def app(self, *at: str) -> dict[str, Any]:
        doc: dict[str, Any] = json.loads(await self.cli("get", "app", "hello", "-o", "json", *at))
        return doc

    async def running_port(self, *at: str) -> int:
        for instance in (await self.app(*at))["status"].get("instances", []):
            port = instance.get("ports", {}).get("http")
            if instance.get("phase") == "Running" and port and not instance.get("stale"):
                return int(port)
        return 0

    async def wait_for(self, what: str, ready: Callable[[], Awaitable[Any]], seconds: float = 30.0) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            got = await ready()
            if got:
                return got
            if time.monotonic() > deadline:
                raise EdgewardError(f"{what} did not happen within {seconds:.0f} s")
            await asyncio.sleep(0.05)  # looking again

    def node_port(self) -> int:
        """The port that serves now, from the node's own API (its unix socket, no WAN)."""
        return self._port

    async def follow_port(self) -> None:
        """Keeps :meth:`node_port` true: what a gateway does for clients (the gateway is a later capability)."""
        while True:
            with contextlib.suppress(EdgewardError, OSError, KeyError, ValueError):
                doc = await asyncio.to_thread(self.lab.node_api, "plant-1", "/api/v1/namespaces/default/apps/hello")
                ports = [
                    i["ports"]["http"]
                    for i in doc["status"].get("instances", [])
                    if i.get("phase") == "Running" and i.get("ports", {}).get("http")
                ]
                if ports:
                    self._port = int(ports[0])
            await asyncio.sleep(0.05)  # the period of looking

    def _changed_app(self, greeting: str) -> Path:
        import yaml

        docs = list(yaml.safe_load_all((example() / "app.yaml").read_text()))
        app = next(d for d in docs if d["kind"] == "App")
        app["spec"]["process"]["env"]["GREETING"] = greeting
        return self._file(app, "local.json")

    def _file(self, doc: dict[str, Any], name: str) -> Path:
        path = self.lab.cluster.data / name
        doc = {k: v for k, v in doc.items() if k != "status"}
        meta = doc["metadata"]
        doc["metadata"] = {k: meta[k] for k in ("name", "namespace", "labels", "conflict") if k in meta}
        path.write_text(json.dumps(doc))
        return path
