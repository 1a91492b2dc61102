"""Unpacks what came from elsewhere, as a process of its own: an archive, or the wheels of a bundle.

``python -m edgeward.functions.unpack archive FILE TARGET`` or ``... bundle FILE TARGET LOCK``; ``... target`` says what
packages this Python can run. One JSON document on standard output: what was made, or a problem. The agent starts it
(``stock.py``). Before it looks at what came it gives away what it does not need: it can write beside ``TARGET`` only,
has no socket, starts no program, and has bounds on memory, time and files; an archive that is made to harm can end this
process and no more. It makes ``TARGET`` at once or not at all, read-only, its modules compiled (which runs nothing).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import py_compile
import re
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core.blobs import Target
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.files import sync_tree
from edgeward.functions import archive, sandbox
from edgeward.functions.wheels import lacking, parse_lock, tags_of, wanted, wheel_of, where

#: Memory and processor time of this process.
_MEMORY, _CPU = 1 << 30, 300
#: Seconds for the compiler; code that it does not bear is compiled when it is loaded, or not at all.
_COMPILE = 120.0
_BOUNDS = archive.Bounds(files=50_000, bytes=2 << 30)
_DATA = re.compile(r"^[^/]+\.data/(purelib|platlib)/(.+)$")
_LEFT_OUT = re.compile(r"^[^/]+\.data/")


def here() -> Target:
    """What packages for this Python on this machine may be."""
    from packaging.markers import default_environment
    from packaging.tags import platform_tags

    environment = {k: str(v) for k, v in default_environment().items()}
    return Target(f"{sys.version_info[0]}.{sys.version_info[1]}", list(platform_tags())[:100], environment)


def remove(folder: Path) -> None:
    """A read-only folder, and everything in it."""
    for at, folders, _ in os.walk(folder):
        for name in (*folders, "."):
            with contextlib.suppress(OSError):
                (Path(at) / name).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _wheels(file: Path, root: Path, lock: str, scratch: Path, me: Target) -> None:
    """Unpacks the bundle's wheels, each held against the lock file, as an installer would lay them out (PEP 427)."""
    pins = wanted(parse_lock(lock), me.environment)
    tags, known = tags_of(me), {h: p for p in pins for h in p.hashes}
    names: list[str] = []
    wheels: list[Path] = []
    with tarfile.open(file, mode="r|") as tar:
        for entry in tar:
            if not entry.isreg() or "/" in entry.name or entry.issparse() or len(names) > 2 * len(known):
                raise Invalid(f"the entry {entry.name[:80]!r} is no wheel", remedy="make the bundle anew")
            name = wheel_of(entry.name)[0]
            data = tar.extractfile(entry)
            path = scratch / f"{len(names)}.whl"
            digest = hashlib.sha256()
            with path.open("wb") as out:
                while data is not None and (piece := data.read(1 << 18)):
                    digest.update(piece)
                    out.write(piece)
            pin = known.get(digest.hexdigest())
            if pin is None or pin.name != name:
                raise Invalid(f"{entry.name[:120]} is not what the lock file names", remedy="make the bundle anew")
            names.append(entry.name)
            wheels.append(path)
    if why := lacking(pins, names, tags, where(me)):
        raise Invalid(why, remedy="lock a version that has one, or bundle for this kind of node")
    total = archive.Target(root, sum(p.stat().st_size for p in wheels), _BOUNDS)
    for path in wheels:
        archive.unzip(path, total, _installed)
        path.unlink()


def _installed(name: str) -> str | None:
    """Where an installer puts a wheel's entry; programs, headers and data for elsewhere are left out."""
    if found := _DATA.match(name):
        return found[2]
    return None if _LEFT_OUT.match(name) else name


def _compile(folder: Path, shown: Path) -> None:
    until = time.monotonic() + _COMPILE
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    for path in sorted(folder.rglob("*.py")):
        if time.monotonic() > until:
            return
        with contextlib.suppress(py_compile.PyCompileError, OSError, ValueError, RecursionError, MemoryError):
            name = str(shown / path.relative_to(folder))
            py_compile.compile(str(path), dfile=name, doraise=True, invalidation_mode=mode)


def unpack(file: Path, target: Path, lock: str = "", me: Target | None = None) -> dict[str, Any]:
    """Makes ``target``; ``{files, bytes}``. ``me``: what wheels are for; without it ``file`` is an archive.

    Raises ``EdgewardError``; then it is not there.
    """
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=target.parent) as scratch:
        root = Path(scratch) / "root"
        root.mkdir()
        try:
            if me is not None:
                _wheels(file, root, lock, Path(scratch), me)
            else:
                archive.unpack(file, root)
        except archive.DAMAGED as e:
            raise Invalid(f"cannot be unpacked: {e or type(e).__name__}", remedy="make it anew") from None
        _compile(root, target)
        files = size = 0
        for at, folders, names in os.walk(root):
            for name in names:
                path = Path(at) / name
                path.chmod(0o555 if path.stat().st_mode & 0o100 else 0o444)
                files, size = files + 1, size + path.stat().st_size
            for name in folders:
                (Path(at) / name).chmod(0o755)
        root.chmod(0o755)
        sync_tree(root)
        if target.exists():
            return {"files": files, "bytes": size}
        root.rename(target)
        sync_tree(target.parent)
        return {"files": files, "bytes": size}


def main() -> int:
    words = sys.argv[1:]
    try:
        if words == ["target"]:
            said: Any = here()
        else:
            for what, bound in (
                (resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CPU, _CPU), (resource.RLIMIT_FSIZE, _BOUNDS.bytes),
                (resource.RLIMIT_CORE, 0),
            ):  # fmt: skip
                with contextlib.suppress(OSError, ValueError):
                    resource.setrlimit(what, (bound, bound))
            lock = Path(words[3]).read_text() if len(words) > 3 else ""
            me = here() if words[0] == "bundle" else None
            sandbox.shut_in(str(Path(words[2]).parent), [words[1]])
            said = unpack(Path(words[1]), Path(words[2]), lock, me)
    except EdgewardError as e:
        said = {"error": e.problem()}
    except MemoryError:
        said = {"error": Invalid("takes too much memory to unpack", remedy="make it anew").problem()}
    except OSError as e:
        said = {"error": EdgewardError(f"cannot be unpacked here: {e.strerror or e}").problem()}
    sys.stdout.buffer.write(msgspec.json.encode(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
