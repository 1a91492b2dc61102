"""Podman, by its command line: no daemon, so containers outlive whoever started them, and nobody has to be trusted.

A container's output goes straight from its processes into the pipe of ours that podman was started with (its
``passthrough`` log driver), its first process is a process of the node whose number podman leaves in the instance's
folder, and conmon, a small process beside each container, keeps its exit status. So most of what the agent asks is
answered by the kernel and files; podman itself runs for a moment to make, start and remove. Arguments never pass a
shell.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from edgeward.core import cgroup, proc
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.files import write_atomic
from edgeward.workloads import podman_argv
from edgeward.workloads.engine import INSTANCE_LABEL, NODE_LABEL, Image, Run
from edgeward.workloads.podman_argv import Facts, options

#: Of the agent's environment: where podman finds its helpers, configuration, storage and registries.
_PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME",
    "DBUS_SESSION_BUS_ADDRESS", "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF", "CONTAINERS_REGISTRIES_CONF",
    "REGISTRY_AUTH_FILE", "STORAGE_DRIVER", "STORAGE_OPTS", "SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY",
    "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
#: Seconds: for a look, for making and starting, for getting an image.
_SHORT, _MAKE, _LONG = 30.0, 90.0, 3600.0
_MAX_ANSWER = 4 << 20
#: Looks for the end of a container whose first process ended, and seconds between.
_LOOKS, _LOOK = 100, 0.1
_CAP_SYS_RESOURCE = 24
_BIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@functools.cache
def facts() -> Facts:
    """What this host can do that podman has to be told."""
    both = Path("/sys/fs/cgroup/unified").is_dir() and not Path("/sys/fs/cgroup/cgroup.controllers").exists()
    root = os.geteuid() == 0
    network = ""
    if root:  # others have podman's own choice, which needs no rights
        network = "bridge" if shutil.which("iptables", path=_BIN) else ""
        network = network or ("slirp4netns" if shutil.which("slirp4netns", path=_BIN) else "bridge")
    rlimits = {}
    if root and proc.capable(_CAP_SYS_RESOURCE) is False:
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        most = _pid_max()  # podman takes its own down to that, and cannot give more on
        rlimits = {
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
            "nproc": (min(soft, most) if soft >= 0 else most, min(hard, most) if hard >= 0 else most),
        }
    oom = 0
    with contextlib.suppress(OSError, ValueError):
        oom = int(Path("/proc/self/oom_score_adj").read_text())
    return Facts(
        root,
        Path("/run/systemd/system").is_dir(),
        12 if both else cgroup.host().version,
        shutil.which("runc", path=_BIN) is not None,
        network,
        rlimits,
        tuple(cgroup.available()),
        oom,
    )


def _pid_max() -> int:
    try:
        return int(Path("/proc/sys/kernel/pid_max").read_text())
    except (OSError, ValueError):
        return 32768


class Podman:
    name = "podman"
    keeps_output = False

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """``settings``: ``containers`` of ``node.json``; its ``podman`` holds options for every call."""
        given = settings.get("podman", [])
        self._given = [str(word) for word in given] if isinstance(given, list) else []

    def absent(self) -> str:
        return "" if self._program() else "podman is not installed"

    @staticmethod
    def _program() -> str | None:
        return shutil.which("podman", path=f"{os.environ.get('PATH', '')}:{_BIN}")

    def _words(self, *words: str) -> list[str]:
        program = self._program()
        if program is None:
            raise EdgewardError("podman is not installed on this node", remedy="install podman (or docker)")
        return [program, *options(facts()), *self._given, *words]

    @staticmethod
    def _env() -> dict[str, str]:
        return {k: os.environ[k] for k in _PASSED_ON if k in os.environ} | {"LC_ALL": "C.UTF-8"}

    async def _call(
        self, *words: str, timeout: float = _SHORT, beside: Mapping[str, str] | None = None, out: int | None = None
    ) -> tuple[int, str, str]:
        """Exit status, and what it said. ``out``: both outputs go there instead. Raises ``Unreachable`` when it does
        not end in time."""
        starting = asyncio.create_task(
            asyncio.create_subprocess_exec(
                *self._words(*words),
                env=self._env() | dict(beside or {}),
                cwd="/",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if out is None else out,
                stderr=asyncio.subprocess.PIPE if out is None else out,
                start_new_session=True,
                limit=_MAX_ANSWER,
            )
        )
        try:
            async with asyncio.timeout(timeout):
                # by itself: a cancellation while it starts would leave the process behind
                process = await asyncio.shield(starting)
                said, why = await process.communicate()
        except TimeoutError:
            what = f"podman {words[0]} did not end within {timeout:g} s"
            raise Unreachable(what, remedy="is its disk slow?") from None
        except (OSError, ValueError) as e:  # a zero byte among the words is a ValueError
            raise EdgewardError(f"podman cannot be run: {getattr(e, 'strerror', None) or e}") from None
        finally:
            with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
                process = await starting
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        texts = [(data or b"").decode("utf-8", "replace") for data in (said, why)]
        return process.returncode or 0, texts[0], texts[1]

    async def _ask(self, *words: str, timeout: float = _SHORT, beside: Mapping[str, str] | None = None) -> str:
        """What it said. Raises ``EdgewardError`` with its own words when it fails."""
        status, said, why = await self._call(*words, timeout=timeout, beside=beside)
        if status:
            raise EdgewardError(_reason(why) or f"podman {words[0]} ended with status {status}")
        return said

    # -- images --------------------------------------------------------------------------------------------------------

    async def image(self, ref: str) -> Image | None:
        status, said, why = await self._call("image", "inspect", "--format", "json", "--", ref)
        if status:
            if "no such image" in why or "image not known" in why or "failed to find image" in why:
                return None
            raise EdgewardError(_reason(why))
        try:
            doc = msgspec.json.decode(said)[0]
            digests = [str(d).rpartition("@")[2] for d in [*(doc.get("RepoDigests") or []), str(doc.get("Digest", ""))]]
            names = tuple(str(n) for n in doc.get("RepoTags") or [])
            return Image(str(doc["Id"]), tuple(dict.fromkeys(d for d in digests if d)), names)
        except (msgspec.DecodeError, LookupError, AttributeError, TypeError) as e:
            raise EdgewardError(f"podman's answer is not understood: {e}") from None

    async def pull(self, ref: str) -> None:
        await self._ask("pull", "--quiet", "--", ref, timeout=_LONG)

    async def load(self, file: Path) -> list[str]:
        return podman_argv.loaded(await self._ask("load", "--quiet", "--input", str(file), timeout=_LONG))

    async def remove_image(self, id: str) -> None:
        await self._call("image", "rm", "--", id, timeout=_MAKE)

    # -- containers ----------------------------------------------------------------------------------------------------

    async def run(self, run: Run, out: int) -> None:
        argv, beside, text = podman_argv.run_argv(run, facts())
        file = run.folder / "env"
        write_atomic(file, text)
        try:
            status, _, _ = await self._call(*argv, timeout=_MAKE, beside=beside, out=out)
            if status:
                # its own words went where the program's go: it says them again
                await self._afresh(run)
                status, _, why = await self._call(*argv, timeout=_MAKE, beside=beside)
                await self._afresh(run)
                raise EdgewardError(_reason(why) if status else "podman could not start it at the first try")
        finally:
            file.unlink(missing_ok=True)

    async def _afresh(self, run: Run) -> None:
        await self.remove(run.name)
        for name in ("pid", "cid"):
            (run.folder / name).unlink(missing_ok=True)

    async def wait(self, name: str) -> int | None:
        # `podman wait` waits for more than the end: for a clean-up that may never come
        for _ in range(_LOOKS):
            status, said, _ = await self._call(
                "container", "inspect", "--format", "{{.State.Running}} {{.State.ExitCode}}", "--", name
            )
            running, _, code = said.strip().partition(" ")
            if status or not code.lstrip("-").isdigit():
                return None
            if running == "false":
                return int(code)
            await asyncio.sleep(_LOOK)  # conmon writes the status a moment after the end
        return None

    async def remove(self, name: str) -> None:
        await self._ask("rm", "--force", "--ignore", "--volumes", "--time", "0", name, timeout=_MAKE)

    async def containers(self, node: str) -> dict[str, str]:
        form = f'{{{{.Names}}}} {{{{index .Labels "{INSTANCE_LABEL}"}}}}'
        said = await self._ask("ps", "--all", "--no-trunc", "--filter", f"label={NODE_LABEL}={node}", "--format", form)
        return dict(line.split()[:2] for line in said.splitlines() if len(line.split()) == 2)

    def exec(
        self,
        name: str,
        argv: list[str],
        *,
        stdin: bool = False,
        tty: bool = False,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[list[str], dict[str, str]]:
        how = [*(["--interactive"] if stdin else []), *(["--tty"] if tty else [])]
        how += [f"--env={k}={v}" for k, v in env.items()]
        return self._words("exec", *how, name, *argv), self._env()

    def follow(self, name: str, folder: Path, out: int) -> None:
        os.close(out)  # its processes have the pipe themselves

    async def background(self) -> None:
        """Nothing of it needs us."""


def _reason(said: str) -> str:
    """The reason among podman's complaints, bounded: that a disk is full, wherever it says so; else its last word."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    full = [line for line in lines if "no space left on device" in line or "disk quota exceeded" in line]
    errors = [line for line in lines if line.startswith("Error: ")]
    found = (full or errors[-1:] or lines[-1:] or [""])[0]
    return found.removeprefix("Error: ").rstrip(":")[:600]
