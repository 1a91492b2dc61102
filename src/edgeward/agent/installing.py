"""Makes a release of the agent whole on this disk: an archive of wheels becomes a Python environment of its own.

In: the archive, verified by its digest. Out: ``releases/<digest>/``, which is there whole or not at all. No index is
asked and no program of a wheel runs while it is made: wheels are laid out as an installer does (PEP 427). Then
:func:`check` has the new release look at this node's folder, before anything else depends on it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.files import ensure_dir, sync_tree
from edgeward.functions.archive import DAMAGED

#: Bytes that a release may unpack to, files of it, seconds for its check.
_BYTES, _FILES, _CHECK = 2 << 30, 50_000, 120.0
_DATA = re.compile(r"^[^/]+\.data/(purelib|platlib|scripts)/(.+)$")
_OTHER = re.compile(r"^[^/]+\.data/")


def this_platform() -> str:
    """What archives are named by: system, processor and Python, as ``linux-x86_64-cp311``."""
    return f"{platform.system().lower()}-{platform.machine()}-cp{sys.version_info[0]}{sys.version_info[1]}"


def install(archive: Path, target: Path) -> None:
    """Makes ``target`` of the archive (a tar of wheels, packed or not). Raises ``Invalid``, or ``OSError``."""
    if target.is_dir():
        return
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=ensure_dir(target.parent)) as scratch:
        root = Path(scratch) / "root"
        venv.EnvBuilder(with_pip=False, symlinks=True).create(root)
        packages = root / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        room = _Room()
        try:
            with tarfile.open(archive, mode="r|*") as tar:
                for entry in tar:
                    data = tar.extractfile(entry) if entry.isreg() else None
                    if data is None or not re.fullmatch(r"[A-Za-z0-9][\w.+!-]{0,200}\.whl", entry.name):
                        raise Invalid(f"the entry {entry.name[:80]!r} is no wheel", remedy="edgeward release create")
                    wheel = Path(scratch) / "one.whl"
                    with wheel.open("wb") as out:
                        shutil.copyfileobj(data, out)
                    _lay_out(wheel, packages, root / "bin", room)
        except (*DAMAGED, RuntimeError) as e:  # what asks for a password is one
            raise Invalid(f"cannot be unpacked: {e or type(e).__name__}", remedy="edgeward release create") from None
        if not (packages / "edgeward" / "agent" / "__main__.py").is_file():
            raise Invalid("has no agent in it", remedy="put the wheel of edgeward among the wheels")
        sync_tree(root)
        root.rename(target)
        sync_tree(target.parent)


class _Room:
    """What may still be written."""

    def __init__(self) -> None:
        self.bytes, self.files = _BYTES, _FILES

    def take(self, size: int) -> None:
        self.bytes, self.files = self.bytes - size, self.files - 1
        if self.bytes < 0 or self.files < 0:
            raise Invalid("unpacks to too much", remedy=f"at most {_BYTES} bytes in {_FILES} files")


def _lay_out(wheel: Path, packages: Path, programs: Path, room: _Room) -> None:
    with zipfile.ZipFile(wheel) as z:
        for info in z.infolist():
            name, into = info.filename, packages
            if found := _DATA.match(name):
                name, into = found[2], programs if found[1] == "scripts" else packages
            elif _OTHER.match(name):
                continue
            parts = name.split("/")
            if info.is_dir():
                continue
            if name.startswith("/") or "\\" in name or any(p in ("", ".", "..") for p in parts):
                raise Invalid(f"the entry {name[:80]!r} leads out of the release", remedy="build the wheel anew")
            room.take(info.file_size)
            path = into.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with z.open(info) as data, path.open("wb") as out:
                shutil.copyfileobj(data, out)
            path.chmod(0o755 if into is programs or (info.external_attr >> 16) & 0o100 else 0o644)


def check(release: Path, data: Path) -> None:
    """Raises ``Invalid`` when the release does not load, or does not read this node's folder."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    argv = [str(release / "bin" / "python"), "-m", "edgeward.agent", "--check", "--data", str(data)]
    try:
        done = subprocess.run(
            argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_CHECK, check=False
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Invalid(f"does not load here: {e}"[:300], remedy="make the release anew") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"status {done.returncode}"
        raise Invalid(f"does not load here: {last}"[:300], remedy="make the release anew")


def look(data: Path) -> None:
    """What ``--check`` does: this release reads the node's folder and has what it needs; nothing is changed."""
    import sqlite3

    from edgeward.core.files import read_json
    from edgeward.core.natsserver import find_binary

    read_json(data / "node.json")
    find_binary()
    for file in sorted(data.glob("*.db")):
        try:
            with sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=10.0) as db:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            db.close()
        except sqlite3.Error as e:
            raise EdgewardError(f"cannot be read: {e}", file=str(file)) from None


def tidy(releases: Path, keep: set[str]) -> None:
    """Takes away the releases that are neither kept nor run by any process: what a release started may outlive it."""
    for path in releases.iterdir() if releases.is_dir() else ():
        if path.name.startswith(".unpack-"):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch("[0-9a-f]{64}", path.name) and path.name not in keep and not _in_use(path):
            gone = path.with_name(f".unpack-{path.name}")  # not whole from here on, whatever happens
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    inside = os.fsencode(str(folder)) + b"/"
    for found in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if inside in found.read_bytes():
                return True
        except OSError:
            continue
    return False
