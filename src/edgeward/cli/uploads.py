"""What the command line brings to the hub beside documents: packed folders, and bundles of packages made here.

What the namespace holds already is not sent again. Only the hub keeps blobs: at a cut site a function's text is given
in its document.
"""

from __future__ import annotations

import asyncio
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeward.cli.manifests import read_declared
from edgeward.cli.output import write
from edgeward.cli.session import Session, UsageError
from edgeward.core.blobs import PREFIX, Target
from edgeward.core.errors import EdgewardError, NotFound, Refused

if TYPE_CHECKING:
    from edgeward.cli.client import Api


def upload(api: Api, at: str | None, namespace: str, blobs: Sequence[tuple[str, bytes | Path]]) -> None:
    """Makes the namespace hold these: (digest, bytes or a file)."""
    if at and any(isinstance(data, Path) for _, data in blobs):
        raise Refused(
            "an image archive is uploaded to the hub only",
            field="$.spec.container.archive",
            remedy="apply it without --at, or load it on the node (podman load) and name it with image:",
        )
    if at:
        raise Refused(
            "a folder is uploaded to the hub only",
            field="$.spec.source.folder",
            remedy="apply it without --at, or give the code as files:",
        )
    for digest, data in blobs:
        path = f"/api/v1/namespaces/{namespace}/blobs/{digest}"
        try:
            api.request("GET", path)
        except NotFound:
            api.upload(path, data)


def target_of(python: str, arch: str, glibc: int) -> Target:
    """A Linux node of that Python, processor and glibc, as markers and tags name it."""
    from edgeward.functions.wheels import platforms, python_of

    version = python or f"{sys.version_info[0]}.{sys.version_info[1]}"
    machine = arch or platform.machine()
    target = Target(version, platforms(machine, glibc), {})
    python_of(target)
    target.environment = {
        "implementation_name": "cpython",
        "implementation_version": f"{version}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{version}.0",
        "python_version": version,
        "sys_platform": "linux",
    }
    return target


def bundle_all(
    session: Session, files: Sequence[str], *, python: str, arch: str, glibc: int, index: str, find_links: str
) -> None:
    from edgeward.functions.archive import digest_of
    from edgeward.functions.bundling import Source, make
    from edgeward.functions.parts import lock_digest

    if session.at:
        raise UsageError("bundles are brought to the hub: leave out --at")
    target = target_of(python, arch, glibc)
    found = [d for d in read_declared(session, files, pack=False) if d.kind.name == "Function"]
    found = [d for d in found if d.resource.spec.dependencies is not None]
    if not found:
        raise EdgewardError("no Function with dependencies found", file=", ".join(files))
    with session.api() as api, tempfile.TemporaryDirectory() as scratch:
        for d in found:
            lock, namespace = d.resource.spec.dependencies.lock, d.namespace or "default"
            source = Source(index, find_links and str(Path(find_links).absolute()))
            wheels = asyncio.run(make(lock, target, source, Path(scratch) / "bundle"))
            data = (Path(scratch) / "bundle").read_bytes()
            digest = digest_of(data)
            upload(api, None, namespace, [(digest, data)])
            path = f"/api/v1/namespaces/{namespace}/bundles/{PREFIX}{lock_digest(lock)}"
            api.request("PUT", path, body={"digest": digest, "wheels": wheels})
            write(f"function/{d.name}: {len(wheels)} packages, {len(data)} bytes, for Python {target.python}")
