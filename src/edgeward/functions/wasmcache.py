"""Machine code of WebAssembly functions on the node's disk: made once, found again, never believed.

Code is kept under a name made of the source's digest and of what made it (engine, its settings, this processor). What
is loaded runs as it is, so a file is taken only when it bears this node's own mark: an HMAC over name and code with a
key that lies outside the folder. A file that does not, whatever the reason, is thrown away and the source compiled
again. The folder is the node's alone and bounded: what was not used for longest goes. What is in use is kept in memory,
sealed, bounded too; workers get it as an open file that nobody can change any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import importlib.util
import logging
import os
import platform
import secrets
import stat
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from edgeward.core.files import ensure_dir, write_atomic

log = logging.getLogger("edgeward.functions")

#: Bytes of machine code in one file, in the folder, and held in memory.
MAX_CODE, MAX_FOLDER, MAX_HELD = 128 << 20, 256 << 20, 32 << 20
_MARK = hashlib.sha256().digest_size
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class Code(NamedTuple):
    """Machine code in a sealed file in memory; who is given it closes ``fd``."""

    fd: int
    size: int


def _engine() -> str:
    """Which wasmtime is installed, without loading it: the names of its release, and which library files it has."""
    spec = importlib.util.find_spec("wasmtime")
    if spec is None or not spec.submodule_search_locations:
        return ""
    package = Path(next(iter(spec.submodule_search_locations)))
    found = [path.name for path in package.parent.glob("wasmtime-*.dist-info")]
    for path in package.glob("*/*wasmtime.*"):
        at = path.stat()
        found.append(f"{path.name} {at.st_size} {at.st_mtime_ns}")
    return " ".join(sorted(found))


def maker(config: str) -> str:
    """What machine code depends on beside its source: engine, settings, processor. 16 digits."""
    engine = _engine()
    features = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    text = "\0".join((engine, config, platform.machine(), platform.system(), features))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sealed(data: bytes) -> Code:
    """The data as a file in memory that cannot be changed any more. Raises ``OSError``."""
    fd = os.memfd_create("edgeward-wasm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with memoryview(data) as view:
            at = 0
            while at < len(view):
                at += os.write(fd, view[at:])
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return Code(fd, len(data))


class Cache:
    """Machine code by name. It blocks on the disk, so it is called in threads; one call at a time for one name."""

    def __init__(self, folder: Path, key: Path, config: str, *, folder_bytes: int = MAX_FOLDER) -> None:
        self._folder = ensure_dir(folder)
        folder.chmod(0o700)
        self._key = self._own_key(key)
        self._config, self._bound = config, folder_bytes
        self._maker = ""
        self._held: OrderedDict[str, Code] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def _own_key(path: Path) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            if len(key := path.read_bytes()) == 32:
                return key
        key = secrets.token_bytes(32)
        write_atomic(path, key)  # what an old one marked is compiled again
        return key

    def name(self, digest: str) -> str:
        """The name for code that is made of the source with this digest (hex)."""
        self._maker = self._maker or maker(self._config)
        return f"{digest}-{self._maker}"

    def _mark(self, name: str, code: bytes) -> bytes:
        mark = hmac.new(self._key, name.encode() + b"\0", hashlib.sha256)
        mark.update(code)
        return mark.digest()

    def held(self, name: str) -> Code | None:
        """The code, if it is in memory; does not touch the disk."""
        with self._lock:
            code = self._held.get(name)
            if code is None:
                return None
            self._held.move_to_end(name)
            return Code(os.dup(code.fd), code.size)

    def find(self, name: str) -> Code | None:
        """The code, if it is on the disk and ours."""
        path = self._folder / name
        data = self._read(path)
        if data is None:
            return None
        mark, code = data[:_MARK], data[_MARK:]
        if not hmac.compare_digest(mark, self._mark(name, code)):
            log.warning("machine code %s does not bear this node's mark: it is thrown away and made again", path)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # it was used
        return self._hold(name, code)

    @staticmethod
    def _read(path: Path) -> bytes | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        with os.fdopen(fd, "rb") as file:
            there = os.fstat(fd)
            if not stat.S_ISREG(there.st_mode) or not _MARK < there.st_size <= MAX_CODE + _MARK:
                return b""
            return file.read(MAX_CODE + _MARK + 1)

    def keep(self, name: str, code: bytes) -> Code:
        """Keeps what was just made. A disk that is full is no reason not to run it."""
        try:
            write_atomic(self._folder / name, self._mark(name, code) + code)
            self._sweep(name)
        except OSError as e:
            log.warning("machine code cannot be kept, so it is made again after the next start: %s", e)
        return self._hold(name, code)

    def _hold(self, name: str, code: bytes) -> Code:
        new = sealed(code)
        with self._lock:
            old = self._held.pop(name, None)
            self._held[name] = new
            going = [] if old is None else [old]
            while sum(c.size for c in self._held.values()) > MAX_HELD and len(self._held) > 1:
                going.append(self._held.popitem(last=False)[1])
            for one in going:
                os.close(one.fd)
            return Code(os.dup(new.fd), new.size)

    def _sweep(self, newest: str) -> None:
        """Takes the folder back to its bound, the longest unused first."""
        found = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                at = path.lstat()
                found.append((path.name == newest, at.st_mtime, at.st_size, path))
        found.sort(key=lambda f: f[:2])
        total = sum(size for _, _, size, _ in found)
        for _, _, size, path in found[:-1]:
            if total <= self._bound:
                break
            path.unlink(missing_ok=True)
            total -= size

    def close(self) -> None:
        with self._lock:
            while self._held:
                os.close(self._held.popitem()[1].fd)
