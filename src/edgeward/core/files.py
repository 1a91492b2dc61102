"""Small files that must survive a power cut: keys, configuration, records of processes.

A write goes to a temporary file beside the target, is synced, renamed over it, and the directory is synced: a reader
sees the old content or the new one, never half of it, and what was written before ``write_atomic`` returned is there
after the machine comes back. Nothing here takes a lock: one file has one writing process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from edgeward.core.errors import Invalid

_MISSING: Any = object()


def ensure_dir(path: Path, mode: int = 0o700) -> Path:
    """The directory, made with its parents if need be; new ones, parents too, are for their owner only."""
    if not path.is_dir():
        missing = [path]
        missing += [p for p in path.parents if not p.exists()]
        for one in reversed(missing):
            one.mkdir(mode=mode, exist_ok=True)
            _sync_dir(one.parent)
    return path


def sha256_of(file: Path) -> str:
    """Of what is in it, in hex. It reads all of it: call it in a thread."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """A file for ``path``'s new content: it takes the place when all of it is on the disk, or nothing happened."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as out:
            os.fchmod(out.fileno(), mode)  # the umask may have taken bits away that the caller asked for
            yield out
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_dir(path.parent)


def write_atomic(path: Path, data: bytes | str, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data`` (text is UTF-8) so that a crash at any point leaves the old or the new content."""
    with replacing(path, mode) as out:
        out.write(data.encode() if isinstance(data, str) else data)


def remove(path: Path) -> bool:
    """Delete ``path`` durably. False when it was not there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    _sync_dir(path.parent)
    return True


def write_json(path: Path, value: Any, mode: int = 0o600) -> None:
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", mode)


def read_json(path: Path, default: Any = _MISSING) -> Any:
    """The JSON value in ``path``. A missing file gives ``default`` if there is one; a damaged file is never guessed at.

    Raises ``FileNotFoundError``, or ``Invalid`` naming the file and line.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if default is _MISSING:
            raise
        return default
    line = 0
    try:
        return json.loads(raw.decode())
    except json.JSONDecodeError as exc:
        why, line = exc.msg, exc.lineno
    except UnicodeDecodeError as exc:
        why, line = exc.reason, raw.count(b"\n", 0, exc.start) + 1
    except RecursionError:
        why = "nested too deep"
    raise Invalid(f"not JSON: {why}", file=str(path), line=line, remedy="restore the file from a backup or remove it")


def sync_tree(folder: Path) -> None:
    """All that is below the folder on the disk, with all else of its file system: before it gets its name."""
    import ctypes  # few need it

    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) < 0:
            os.sync()
    finally:
        os.close(fd)


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
