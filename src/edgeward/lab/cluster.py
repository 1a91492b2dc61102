"""A whole system on this machine: a hub, sites and nodes as separate processes, supervised.

``up``, ``lab up`` and ``demo`` are this with different topologies. In: a data directory, a topology, a backing (how the
links are emulated, or none). Out: running processes, and a *context* file that tells scripts how to reach them. A child
that dies is started again, except one that was killed on purpose (``kill``), until ``start``. Nothing is kept in this
process that a second start from the same directory would miss.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edgeward.core import proc
from edgeward.core.errors import Conflict, EdgewardError, NotFound, Refused, from_problem
from edgeward.core.files import ensure_dir, read_json, write_json
from edgeward.core.identity import NodeIdentity
from edgeward.core.natsserver import free_port
from edgeward.core.proc import ending
from edgeward.lab.topology import Topology
from edgeward.nodes.enrol import decode_token
from edgeward.nodes.enrol_edge import join

log = logging.getLogger("edgeward.lab")

START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0
LINK_TIMEOUT = 15.0
_LOOK = 0.05

Say = Callable[[str], None]


class Links(Protocol):
    """What the cluster needs of a backing."""

    async def open(self, topology: Topology, hub_port: int) -> None: ...
    def link_address(self, node: str) -> tuple[str, int]: ...
    def spawn_prefix(self, node: str | None) -> list[str]: ...
    def host_address(self, node: str | None) -> str: ...
    def bind_address(self, node: str | None) -> str: ...
    async def close(self) -> None: ...


class DirectLinks:
    """No emulation: every node dials the hub on loopback (``edgeward up``)."""

    def __init__(self) -> None:
        self._port = 0

    async def open(self, topology: Topology, hub_port: int) -> None:
        self._port = hub_port

    def link_address(self, node: str) -> tuple[str, int]:
        return "127.0.0.1", self._port

    def spawn_prefix(self, node: str | None) -> list[str]:
        return []

    def host_address(self, node: str | None) -> str:
        return "127.0.0.1"

    def bind_address(self, node: str | None) -> str:
        return "127.0.0.1"

    async def close(self) -> None:
        return None


class Child:
    """One supervised process: the hub, or a node's agent."""

    def __init__(self, name: str, argv: list[str], directory: Path, log_file: Path, say: Say = log.warning) -> None:
        self._say = say
        self.name = name
        self.argv = argv
        self.directory = directory
        self.log_file = log_file
        self.process: asyncio.subprocess.Process | None = None
        self.wanted = False
        self.restarts = 0
        self._task: asyncio.Task[None] | None = None
        #: Held while it is started, and by whoever ends it: nothing is started behind the back of an end.
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process and self.process.returncode is None else None

    @property
    def run_file(self) -> Path:
        return self.directory / "run.json"

    def state(self) -> dict[str, Any]:
        """What the process last wrote about itself; {} before."""
        try:
            doc = read_json(self.run_file, {})
        except EdgewardError:
            return {}
        return doc if isinstance(doc, dict) else {}

    def ready(self) -> bool:
        state = self.state()
        return bool(state.get("ready")) and self.pid is not None and state.get("pid") == self.pid

    async def start(self, group: asyncio.TaskGroup) -> None:
        self.wanted = True
        async with self._starting:
            if self.pid is None:
                await self._spawn()
        if self._task is None or self._task.done():
            self._task = group.create_task(self._supervise())

    async def _spawn(self) -> None:
        ensure_dir(self.directory)
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with self.log_file.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                *self.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=env,
                start_new_session=True,
            )

    async def _supervise(self) -> None:
        delay = 0.1
        while self.wanted and self.process is not None:
            started = time.monotonic()
            await self.process.wait()
            if not self.wanted:
                return
            delay = 0.1 if time.monotonic() - started > 10 else min(5.0, delay * 2)
            self._say(f"{self.title} {ending(self.process.returncode)}, starting it again")
            self.restarts += 1
            await asyncio.sleep(delay)  # the back-off of a child that keeps dying
            async with self._starting:
                if self.wanted and self.pid is None:  # `kill` and `start` may have come in between
                    await self._spawn()

    async def unwanted(self) -> None:
        """From here on it is not started again, and what was being started is :attr:`process`."""
        self.wanted = False
        async with self._starting:
            pass

    async def stop(self, sig: int = signal.SIGTERM) -> None:
        await self.unwanted()
        process = self.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(sig)
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await process.wait()
        except TimeoutError:
            self._say(f"{self.title} did not stop within {STOP_TIMEOUT:.0f} s and is killed")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    @property
    def title(self) -> str:
        """What it is, in the product's words."""
        return "the hub" if self.name == "hub" else f"the agent of {self.name}"

    def last_words(self, lines: int = 12) -> str:
        try:
            with self.log_file.open("rb") as f:
                f.seek(max(0, self.log_file.stat().st_size - 8192))
                return "\n".join(f.read().decode(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


class Cluster:
    """Open with :meth:`up`, then :meth:`run`; everything else may be called in between."""

    def __init__(
        self,
        data: Path,
        topology: Topology,
        *,
        links: Links | None = None,
        port: int = 0,
        ready_file: Path | None = None,
        say: Say | None = None,
    ) -> None:
        self.data = data
        self.topology = topology
        self.links: Links = links or DirectLinks()
        self._port = port
        self._ready_file = ready_file
        self._say: Say = say or (lambda _: None)
        self.hub = Child("hub", [], data / "hub", data / "hub" / "hub.log", self._say)
        self.nodes: dict[str, Child] = {}
        self.site_of: dict[str, str] = {}
        for site in topology.sites:
            for node in site.node_names:
                directory = data / "nodes" / node
                self.nodes[node] = Child(node, [], directory, directory / "agent.log", self._say)
                self.site_of[node] = site.name
        self._group: asyncio.TaskGroup | None = None
        self._lock: int | None = None
        self._context: dict[str, Any] = {}
        self.token = ""

    # -- life ------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Cluster:
        ensure_dir(self.data)
        self._take_lock()
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        try:
            await self.down()
        finally:
            if self._group is not None:
                await self._group.__aexit__(None, None, None)
            await self.links.close()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _take_lock(self) -> None:
        import fcntl

        fd = os.open(self.data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise Refused(
                "a system is running from this directory already",
                resource=str(self.data),
                remedy="stop it with Ctrl-C there, or give another --data",
            ) from None
        self._lock = fd

    def _python(self, node: str | None, module: str, *args: str) -> list[str]:
        return [*self.links.spawn_prefix(node), sys.executable, "-m", module, *args]

    async def up(self) -> None:
        """Starts all and returns when every node is ready; the context is written then."""
        if self._ready_file is not None:
            self._ready_file.unlink(missing_ok=True)  # of a run that was killed: this one is not ready yet
        await self._clear_leftovers()
        ensure_dir(self.hub.directory)
        port = self._port or int(read_json(self.hub.directory / "hub.json", {}).get("port", 0)) or free_port()
        await self.links.open(self.topology, port)
        bind, seen = self.links.bind_address(None), self.links.host_address(None)
        names = sorted({self.links.link_address(n)[0] for n in self.nodes} | {seen})
        config = read_json(self.hub.directory / "hub.json", {})  # what else the operator wrote there stays
        config |= {"port": port, "bind": bind, "advertise": seen, "names": names}
        write_json(self.hub.directory / "hub.json", config)
        self.hub.argv = self._python(None, "edgeward.hub", "--data", str(self.hub.directory), "--die-with-parent")
        await self._start(self.hub)
        self._say("hub is ready")
        identity = self.hub.directory / "identity"
        self.token = (identity / "admin.token").read_text().strip()
        self._api = Api(f"https://{seen}:{port}", identity / "ca.crt", self.token)
        await asyncio.to_thread(self._declare)
        for name, child in self.nodes.items():
            self._configure(name, child)
        async with asyncio.TaskGroup() as group:
            for child in self.nodes.values():
                group.create_task(self._start(child))
        await self._linked()
        self._write_context()

    async def _linked(self) -> None:
        """Until the hub hears every node whose link carries anything, or for a while: a bad link is no failure."""
        expected = {n for site in self.topology.sites if not site.profile.silent for n in site.node_names}
        missing = expected
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINK_TIMEOUT):
                while True:
                    nodes = (await asyncio.to_thread(self._api.call, "GET", "/api/v1/nodes"))["items"]
                    missing = expected - {n["metadata"]["name"] for n in nodes if n.get("status", {}).get("online")}
                    if not missing:
                        return
                    await asyncio.sleep(_LOOK)  # looking at what the hub says
        self._say(f"not heard by the hub yet: {', '.join(sorted(missing))}")

    async def _clear_leftovers(self) -> None:
        """Ends processes of an earlier run whose supervisor was killed. Apps are left: their agent adopts them."""
        left = []
        for child in (self.hub, *self.nodes.values()):
            state = child.state()
            pid, start = state.get("pid"), state.get("start")
            if isinstance(pid, int) and start is not None:
                left.append(proc.ProcId(pid, start))
            child.run_file.unlink(missing_ok=True)
        for one in left:
            if proc.alive(one):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)
                async with asyncio.timeout(5):
                    await proc.wait_exit(one)

    async def _start(self, child: Child) -> None:
        if self._group is None:
            raise EdgewardError("the cluster is not open")
        if child.pid is None:  # what a running one says of itself is true, and it says it once
            child.run_file.unlink(missing_ok=True)
        before = child.restarts
        await child.start(self._group)
        try:
            async with asyncio.timeout(START_TIMEOUT):
                while not child.ready():
                    if child.restarts - before > 3:
                        raise EdgewardError(
                            f"{child.name} does not stay up; its last words:\n{child.last_words()}",
                            remedy=f"see {child.log_file}",
                        )
                    await asyncio.sleep(_LOOK)  # looking at the file that the child writes when it is ready
        except TimeoutError:
            raise EdgewardError(
                f"{child.name} was not ready within {START_TIMEOUT:.0f} s; its last words:\n{child.last_words()}",
                remedy=f"see {child.log_file}",
            ) from None

    def _declare(self) -> None:
        """Sites as resources; nodes join by tokens, as any box does."""
        for site in self.topology.sites:
            doc = {"apiVersion": "edgeward/v1", "kind": "Site", "metadata": {"name": site.name}, "spec": {}}
            with contextlib.suppress(Conflict):
                self._api.call("POST", "/api/v1/sites", doc)
        known = {n["metadata"]["name"]: n.get("status", {}) for n in self._api.call("GET", "/api/v1/nodes")["items"]}
        for name, child in self.nodes.items():
            identity = NodeIdentity.open(child.directory / "identity")
            if identity.enrolled and name in known:
                continue
            if identity.enrolled:  # its Node was deleted, and its key with it
                identity.forget()
            # whoever runs the lab owns its boxes: a directory that was wiped is a box that was set up anew
            ask = {"node": name, "site": self.site_of[name], "replace": known.get(name, {}).get("revoked") is False}
            try:
                got = self._api.call("POST", "/api/v1/issue/jointoken", ask)
            except Refused:
                got = self._api.call("POST", "/api/v1/issue/jointoken", {**ask, "replace": False})
            join(child.directory, decode_token(got["token"]), hub=self._api.url)

    def _configure(self, name: str, child: Child) -> None:
        host, port = self.links.link_address(name)
        config = read_json(child.directory / "node.json", {})  # what else the operator wrote there stays
        config |= {
            "node": name,
            "site": self.site_of[name],
            "hub": {"host": host, "port": port},
            "bind": self.links.bind_address(name),
            "address": self.links.host_address(name),
            "onStop": "stop",
        }
        write_json(child.directory / "node.json", config)
        child.argv = self._python(name, "edgeward.agent", "--data", str(child.directory), "--die-with-parent")

    async def run(self) -> None:
        """Keeps the context true until cancelled."""
        while True:
            await asyncio.sleep(0.2)  # the period of looking for changed pids
            self._write_context()

    async def down(self) -> None:
        """Stops agents (their apps with them), then the hub."""
        self._say("stopping")
        await asyncio.gather(*(c.stop() for c in self.nodes.values()))
        await self.hub.stop()

    # -- acts -----------------------------------------------------------------------------------------------------

    def node(self, name: str) -> Child:
        child = self.nodes.get(name)
        if child is None:
            raise NotFound(f"there is no node {name!r}", remedy=f"nodes: {', '.join(self.nodes)}")
        return child

    async def kill(self, name: str) -> list[int]:
        """SIGKILL of all of a node's processes; it stays down until :meth:`start`."""
        child = self.node(name)
        await child.unwanted()
        victims = [p for p in (child.pid, child.state().get("nats")) if isinstance(p, int)]
        victims += [p for p in node_processes(child.directory) if p not in victims]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if child.process is not None:
            await child.process.wait()
        # what was being started between the look and the kill
        for pid in node_processes(child.directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return victims

    async def start(self, name: str) -> None:
        await self._start(self.node(name))
        self._write_context()

    # -- the context --------------------------------------------------------------------------------------------------

    def context(self) -> dict[str, Any]:
        hub = self.hub.state()
        nodes = []
        for name, child in self.nodes.items():
            state = child.state()
            nodes.append(
                {
                    "name": name,
                    "site": self.site_of[name],
                    "api": state.get("api"),
                    "mqtt_url": state.get("mqtt_url"),
                    "mqtt_user": state.get("mqtt_user"),
                    "mqtt_password": state.get("mqtt_password"),
                    "gateway_url": state.get("gateway_url"),
                    "pids": {
                        "agent": child.pid,
                        "nats": state.get("nats") if child.pid else None,
                        "plane": state.get("plane") if child.pid else None,
                    },
                }
            )
        return {
            "hub_url": hub.get("url"),
            "ca_file": str(self.hub.directory / "identity" / "ca.crt"),
            "token": self.token,
            "pids": {"hub": self.hub.pid, "nats": hub.get("nats")},
            "nodes": nodes,
        }

    def _write_context(self) -> None:
        context = self.context()
        if context == self._context:
            return
        self._context = context
        write_json(self.data / "context.json", context)
        if self._ready_file is not None:
            write_json(self._ready_file, context)


def node_processes(directory: Path) -> list[int]:
    """Pids whose environment says that they belong to the node with this data directory (Linux; [] elsewhere)."""
    marker = f"EDGEWARD_DATA={directory}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


class Api:
    """The hub's API for the lab's own few calls (blocking; run it in a thread)."""

    def __init__(self, url: str, ca_file: Path, token: str) -> None:
        self.url, self._token = url, token
        self._context = ssl.create_default_context(cafile=str(ca_file))

    def call(self, method: str, path: str, body: Any = None, timeout: float = 10.0) -> Any:
        import urllib.error
        import urllib.request

        data = None if body is None else msgspec.json.encode(body)
        request = urllib.request.Request(  # noqa: S310 - the scheme is ours: https
            self.url + path,
            data=data,
            method=method,
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout, context=self._context) as got:  # noqa: S310
                return json.loads(got.read() or b"null")
        except urllib.error.HTTPError as e:
            try:
                doc = json.loads(e.read())
            except ValueError:
                doc = {}
            raise from_problem(doc, e.code) from None
