"""What a node gives to its runtimes: folders, output, the words in an instance's environment.

Every instance has a folder (``apps/NS/APP/INSTANCE``) and a log (``logs/NS/APP/INSTANCE.log``), whichever runtime runs
it; what it writes goes into pipes (``pipes.py``), which :meth:`Ground.run` looks after.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core.blobfetch import BlobFetch
from edgeward.workloads.pipes import Pipes
from edgeward.workloads.spec import AppSpec, check_path, substitute
from edgeward.workloads.state import InstanceRow, Snapshot

MARK = "EDGEWARD_INSTANCE"


class Ground:
    """``settings``: what ``node.json`` says of containers. ``poke``: called with (namespace, name) of an App when what
    it waits for has come, or cannot come."""

    def __init__(
        self,
        *,
        node: str,
        site: str,
        data_dir: Path,
        address: str = "127.0.0.1",
        settings: Mapping[str, Any] | None = None,
        blobs: BlobFetch | None = None,
        poke: Callable[[str, str], None] = lambda namespace, name: None,
    ) -> None:
        self.node, self.site, self.address = node, site, address
        self.data, self.apps, self.logs = data_dir, data_dir / "apps", data_dir / "logs"
        self.settings = dict(settings or {})
        self.blobs, self.poke = blobs, poke
        self.pipes = Pipes(self.logs)

    def folder(self, row: InstanceRow) -> Path:
        return self.apps / row.namespace / row.name / row.id

    def log_file(self, row: InstanceRow) -> Path:
        return self.logs / row.namespace / row.name / f"{row.id}.log"

    def environment(
        self,
        row: InstanceRow,
        snapshot: Snapshot,
        extra: Mapping[str, str],
        own: Mapping[str, str],
        field: str,
        inside: Mapping[str, int] | None = None,
    ) -> dict[str, str]:
        """The words for an instance: ``extra`` (its Services), its settings, who it is, its ports, and its ``own``.

        ``inside``: ports that have another number where the instance listens. ``field``: of ``own``, for errors.
        """
        spec = msgspec.convert(snapshot.spec, AppSpec)
        env = dict(extra) | snapshot.env
        env |= {
            "EDGEWARD_APP": row.name,
            "EDGEWARD_NAMESPACE": row.namespace,
            "EDGEWARD_NODE": self.node,
            "EDGEWARD_SITE": self.site,
            "EDGEWARD_VERSION": row.version[:12],
            MARK: row.id,
        }
        for port in spec.ports:
            if port.env:
                env[port.env] = str((inside or {}).get(port.name, row.ports[port.name]))
        if "EDGEWARD_DATA" in os.environ:
            env["EDGEWARD_DATA"] = os.environ["EDGEWARD_DATA"]
        return env | {name: substitute(value, env, f"{field}.{name}") for name, value in own.items()}

    def forget(self, namespace: str, name: str) -> None:
        """The app is gone from this node: so is what it wrote."""
        for root in (self.apps, self.logs):
            shutil.rmtree(root / namespace / name, ignore_errors=True)
        self.pipes.poke()

    def sweep(self, known: set[str]) -> None:
        """Takes away the folders of instances that are not among ``known``: a kill may have left them."""
        for folder in self.apps.glob("*/*/*"):
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)

    async def run(self) -> None:
        """Until cancelled: keeps what moves the instances' output."""
        await self.pipes.run()

    async def close(self, *, leave: bool) -> None:
        """The agent ends. ``leave``: its instances go on, and so does what they need."""
        await self.pipes.close(leave=leave)


def write_file(folder: Path, path: str, text: str, mode: int = 0o600) -> list[Path]:
    """A file of an instance below its folder; what was made for it, folders first."""
    check_path(path, "$.spec.files")
    target = folder / path
    made = []
    for parent in reversed([p for p in target.parents if folder in p.parents]):
        parent.mkdir(mode=0o700, exist_ok=True)
        made.append(parent)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "w", encoding="utf-8") as f:
        os.fchmod(fd, mode)
        f.write(text)
    return [*made, target]
