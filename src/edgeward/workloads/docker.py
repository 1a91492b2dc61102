"""Docker, by its socket, where a host has that and no podman.

The daemon keeps containers and their output. The agent's part is the same as with podman: a container's first process
is waited for, limited and signalled as any of the node's; only the output has to be asked for. For each container a
task follows it from the moment that was written down last (``logged`` in the instance's folder), so that an agent that
comes back takes up what was written meanwhile, each line once (after a SIGKILL the last half second twice).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from edgeward.core import clock
from edgeward.core.errors import EdgewardError, NotFound
from edgeward.core.files import write_atomic
from edgeward.workloads.docker_http import call, opened
from edgeward.workloads.engine import INSTANCE_LABEL, NODE_LABEL, Image, Run
from edgeward.workloads.podman import facts
from edgeward.workloads.podman_argv import loaded

log = logging.getLogger("edgeward.containers")

_SOCKETS = ("/run/docker.sock", "/var/run/docker.sock")
_SHORT, _MAKE, _LONG = 30.0, 90.0, 3600.0
_LOOKS, _LOOK = 100, 0.1
_ID = re.compile("[0-9a-f]{64}")
_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")
#: Seconds between two tries to follow a container's output, and between two notes of how far it is; what docker itself
#: keeps of it meanwhile.
_AGAIN, _EACH, _KEPT = 2.0, 0.5, {"max-size": "1m", "max-file": "2"}


class Docker:
    name = "docker"
    keeps_output = True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """``settings``: ``containers`` of ``node.json``; its ``socket`` says where docker listens."""
        given = str(settings.get("socket") or os.environ.get("DOCKER_HOST", "")).removeprefix("unix://")
        self._socket = given or next((s for s in _SOCKETS if Path(s).is_socket()), _SOCKETS[0])
        self._follow: dict[str, asyncio.Task[None]] = {}
        self._new: list[tuple[str, Path, int]] = []
        self._wake = asyncio.Event()

    def absent(self) -> str:
        return "" if Path(self._socket).is_socket() else f"docker does not listen at {self._socket}"

    async def _call(self, method: str, path: str, body: Any = None, **more: Any) -> bytes | None:
        return await call(self._socket, method, path, body, **({"timeout": _SHORT} | more))

    async def _doc(self, path: str) -> Any:
        """A document; None where there is no such thing."""
        data = await self._call("GET", path, missing=(404,))
        try:
            return None if data is None else msgspec.json.decode(data)
        except msgspec.DecodeError as e:
            raise EdgewardError(f"docker's answer is not understood: {e}") from None

    # -- images --------------------------------------------------------------------------------------------------------

    async def image(self, ref: str) -> Image | None:
        doc = await self._doc(f"/images/{quote(_exact(ref), safe='')}/json")
        if doc is None:
            return None
        digests = tuple(str(d).rpartition("@")[2] for d in doc.get("RepoDigests") or [])
        return Image(str(doc["Id"]).removeprefix("sha256:"), digests, tuple(doc.get("RepoTags") or ()))

    async def pull(self, ref: str) -> None:
        name, at, digest = ref.partition("@")
        place, colon, tag = name.rpartition(":")
        if not colon or "/" in tag:  # the colon was a port's
            place, tag = name, "latest"
        query = urlencode({"fromImage": place, "tag": digest if at else tag})
        _progress(await self._call("POST", f"/images/create?{query}", timeout=_LONG))

    async def load(self, file: Path) -> list[str]:
        data = await self._call("POST", "/images/load?quiet=1", file, timeout=_LONG, kind="application/x-tar")
        return loaded(_progress(data))

    async def remove_image(self, id: str) -> None:
        with contextlib.suppress(EdgewardError):  # a container uses it
            await self._call("DELETE", f"/images/{_exact(id)}", timeout=_MAKE, missing=(404,))

    # -- containers ----------------------------------------------------------------------------------------------------

    async def run(self, run: Run, out: int) -> None:
        data = await self._call("POST", f"/containers/create?name={run.name}", created(run), timeout=_MAKE)
        cid = str(msgspec.json.decode(data or b"{}").get("Id", ""))
        await self._call("POST", f"/containers/{cid}/start", timeout=_MAKE)
        self.follow(run.name, run.folder, os.dup(out))
        doc = await self._doc(f"/containers/{cid}/json")
        pid = int(((doc or {}).get("State") or {}).get("Pid") or 0)
        write_atomic(run.folder / "cid", cid)
        write_atomic(run.folder / "pid", str(pid))

    async def wait(self, name: str) -> int | None:
        for _ in range(_LOOKS):
            doc = await self._doc(f"/containers/{name}/json")
            if doc is None:
                return None
            if not doc["State"]["Running"]:
                return int(doc["State"]["ExitCode"])
            await asyncio.sleep(_LOOK)  # the daemon hears of the end a moment later
        return None

    async def remove(self, name: str) -> None:
        if (task := self._follow.pop(name, None)) is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN):  # its last words
                    await asyncio.shield(task)
            task.cancel()
        await self._call("DELETE", f"/containers/{name}?force=true&v=true", timeout=_MAKE, missing=(404,))

    async def containers(self, node: str) -> dict[str, str]:
        chosen = quote(msgspec.json.encode({"label": [f"{NODE_LABEL}={node}"]}).decode())
        found = await self._doc(f"/containers/json?all=true&filters={chosen}")
        return {str(c["Names"][0]).lstrip("/"): str(c["Labels"].get(INSTANCE_LABEL, "")) for c in found or []}

    def exec(
        self,
        name: str,
        argv: list[str],
        *,
        stdin: bool = False,
        tty: bool = False,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[list[str], dict[str, str]]:
        around = {k: os.environ[k] for k in ("PATH", "PYTHONPATH", "LANG") if k in os.environ}
        if program := shutil.which("docker"):
            how = [*(["--interactive"] if stdin else []), *(["--tty"] if tty else [])]
            how += [f"--env={k}={v}" for k, v in env.items()]
            return [program, "--host", f"unix://{self._socket}", "exec", *how, name, *argv], around
        if stdin or tty or env:
            raise NotFound("docker's command line is not on this node", remedy="install docker-cli, or podman")
        return [sys.executable, "-m", "edgeward.workloads.docker", self._socket, name, *argv], around

    # -- output --------------------------------------------------------------------------------------------------------

    def follow(self, name: str, folder: Path, out: int) -> None:
        self._new.append((name, folder, out))
        self._wake.set()

    async def background(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    while self._new:
                        name, folder, out = self._new.pop()
                        self._follow[name] = group.create_task(self._copy(name, folder, out))
                    self._wake.clear()
                    await self._wake.wait()
        finally:
            for _, _, out in self._new:
                os.close(out)

    async def _copy(self, name: str, folder: Path, out: int) -> None:
        """Moves a container's output into the pipe ``out`` until it has ended and all is there."""
        os.set_blocking(out, False)
        said = _Said(folder / "logged")
        try:
            while True:
                try:
                    if await self._copied(name, out, said):
                        return
                except EdgewardError as e:
                    log.warning("the output of %s cannot be followed: %s", name, e)
                finally:
                    said.keep()
                await asyncio.sleep(_AGAIN)  # the pace of trying
        finally:
            os.close(out)
            self._follow.pop(name, None)

    async def _copied(self, name: str, out: int, said: _Said) -> bool:
        doc = await self._doc(f"/containers/{name}/json")
        if doc is None:
            return True
        status = str(doc["State"].get("Status"))
        if status == "created":
            return False
        over = status in ("exited", "dead", "stopped")
        query = {"stdout": 1, "stderr": 1, "timestamps": 1, "follow": int(not over)}
        if said.at:
            query["since"] = said.at // 10**9
        had, skip = said.at, said.count
        async with opened(self._socket, "GET", f"/containers/{name}/logs?{urlencode(query)}") as answer:
            if answer.status >= 400:
                raise EdgewardError(f"status {answer.status}")
            async for line in answer.frames():
                stamp, _, text = line.partition(b" ")
                at = nanoseconds(stamp)
                if at < had or (at == had and skip > 0):
                    skip -= at == had
                    continue
                await _write(out, text)
                said.hear(at)
        return over


class _Said:
    """How far an output has come: the time of its last line, in nanoseconds, and how many lines have that time (some
    engines know only seconds)."""

    def __init__(self, file: Path) -> None:
        self._file, self._kept = file, 0.0
        self.at = self.count = 0
        with contextlib.suppress(OSError, ValueError):
            self.at, self.count = map(int, file.read_text("ascii").split())

    def hear(self, at: int) -> None:
        self.at, self.count = at, self.count + 1 if at == self.at else 1
        if (now := clock.monotonic()) - self._kept > _EACH:
            self._kept = now
            self.keep()

    def keep(self) -> None:
        with contextlib.suppress(OSError):  # the instance may be gone
            self._file.write_text(f"{self.at} {self.count}", "ascii")


def nanoseconds(stamp: bytes) -> int:
    """Of a time as RFC 3339 has it, with up to nine digits behind the point; 0 for what is none."""
    found = _STAMP.fullmatch(stamp)
    if found is None:
        return 0
    whole, digits, zone = (part.decode("ascii") if part else "" for part in found.groups())
    at = datetime.fromisoformat(whole + ("+00:00" if zone == "Z" else zone))
    return int(at.timestamp()) * 10**9 + int(digits.ljust(9, "0"))


async def _write(out: int, data: bytes) -> None:
    """All of it into a pipe, which may be full for a while."""
    loop = asyncio.get_running_loop()
    while data:
        try:
            data = data[os.write(out, data) :]
        except BlockingIOError:
            room = asyncio.Event()
            loop.add_writer(out, room.set)
            try:
                await room.wait()
            finally:
                loop.remove_writer(out)


def _exact(ref: str) -> str:
    """An id so that nobody takes it for a name."""
    return f"sha256:{ref}" if _ID.fullmatch(ref) else ref


def created(run: Run) -> dict[str, Any]:
    """The body of ``POST /containers/create``. Pure but for the host's own facts."""
    host = facts()
    config: dict[str, Any] = {
        "Mounts": [
            {"Type": "volume" if m.volume else "bind", "Source": m.source, "Target": m.target, "ReadOnly": m.read_only}
            for m in run.mounts
        ],
        "NetworkMode": "host" if run.host_network else "bridge",
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": "json-file", "Config": _KEPT},
        "Ulimits": [{"Name": n, "Soft": s, "Hard": h} for n, (s, h) in sorted(host.rlimits.items())],
    }
    limits = run.limits
    if limits.memory is not None:
        config |= {"Memory": limits.memory, "MemorySwap": limits.memory}
    if limits.cpu is not None:
        config["NanoCpus"] = int(limits.cpu * 1e9)
    if limits.pids is not None:
        config["PidsLimit"] = limits.pids
    doc: dict[str, Any] = {
        "Image": _exact(run.image),
        "Env": [f"{k}={v}" for k, v in sorted(run.env.items())],
        "Labels": {NODE_LABEL: run.node, INSTANCE_LABEL: run.instance},
        "HostConfig": config,
    }
    if run.command is not None:
        doc["Entrypoint"] = run.command
    if run.args:
        doc["Cmd"] = run.args
    if run.user:
        doc["User"] = run.user
    if run.workdir:
        doc["WorkingDir"] = run.workdir
    if not run.host_network:
        bindings: dict[str, list[dict[str, str]]] = {}
        for address, port, inside in run.publish:
            bindings.setdefault(f"{inside}/tcp", []).append({"HostIp": address, "HostPort": str(port)})
        config["PortBindings"] = bindings
        doc["ExposedPorts"] = {port: {} for port in bindings}
    return doc


def _progress(data: bytes | None) -> str:
    """The words of an answer that comes as lines of JSON. Raises ``EdgewardError`` with the error among them."""
    words = []
    for line in (data or b"").splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            doc = msgspec.json.decode(line)
            if isinstance(doc, dict):
                if error := doc.get("error"):
                    raise EdgewardError(str(error)[:600])
                words.append(str(doc.get("stream") or doc.get("status") or ""))
    return "\n".join(words)


async def _exec(socket: str, name: str, argv: list[str]) -> int:
    """Runs a command in a container; its exit status."""
    ask = {"AttachStdout": True, "AttachStderr": True, "Cmd": argv}
    made = await call(socket, "POST", f"/containers/{name}/exec", ask, timeout=_SHORT)
    id = str(msgspec.json.decode(made or b"{}")["Id"])
    body = msgspec.json.encode({"Detach": False, "Tty": False})
    async with opened(socket, "POST", f"/exec/{id}/start", body) as answer:
        async for data in answer.frames() if answer.status < 400 else answer.pieces():
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    doc = msgspec.json.decode(await call(socket, "GET", f"/exec/{id}/json", timeout=_SHORT) or b"{}")
    return int(doc.get("ExitCode") or 0)


if __name__ == "__main__":  # what Docker.exec() gives where docker's own command line is missing
    try:
        sys.exit(asyncio.run(_exec(sys.argv[1], sys.argv[2], sys.argv[3:])))
    except EdgewardError as error:
        sys.exit(str(error))
