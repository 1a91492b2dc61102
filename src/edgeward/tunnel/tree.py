"""Files and folders under one root, for a copy: read or written, never a step outside.

Every name is opened below the folder before it and never followed where it is a link, so what a copy says decides
nothing about where it lands but names. A file is written beside its place (``.NAME.ew-part``), checked, and then takes
the place at once; what broke off stays and is gone on with. These calls block: ``copy.py`` makes them in a thread of
their own, which at a node acts as the user that node.json names (:func:`become`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgeward.core.errors import NotFound, Refused
from edgeward.tunnel.copying import DEPTH_MOST, Entry, leads_out

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_PIECE = 256 * 1024
#: What of a file's mode is copied: nothing that gives rights of another.
_MODE = 0o777
#: linux: setgroups of this thread alone; the C library's own is of the whole process.
_SETGROUPS = {"x86_64": 116, "aarch64": 159, "armv7l": 206, "riscv64": 159}


def become(uid: int, gid: int, groups: Sequence[int]) -> None:
    """This thread touches files as that user from now on, without root's rights over them (setfsuid(2))."""
    number = _SETGROUPS.get(platform.machine())
    if number is None:
        raise Refused("files cannot be touched as another user on this machine", field="$.tunnel.user")
    libc: Any = ctypes.CDLL(None, use_errno=True)
    ids = (ctypes.c_uint32 * max(len(groups), 1))(*groups)
    if libc.syscall(number, len(groups), ids) != 0:
        raise OSError(ctypes.get_errno(), "setgroups")
    libc.setfsgid(gid)
    libc.setfsuid(uid)
    if libc.setfsuid(-1) != uid or libc.setfsgid(-1) != gid:
        raise OSError(errno.EPERM, "setfsuid")


def why(e: OSError) -> str:
    return e.strerror or str(e)


def _open_folder(root: int, parts: Sequence[str]) -> int:
    """The folder below ``root``; the caller closes it."""
    fd = os.dup(root)
    for part in parts:
        try:
            inner = os.open(part, _FOLDER, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


class Giver:
    """Reads what is at ``path``: a file or a folder."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.skipped: list[tuple[str, str]] = []
        self._fd = -1
        try:
            real = self.path.resolve(strict=True)  # the root itself may be named by a link
            self._base = os.open(real.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise _no(path, e) from None
        self._name = real.name or "."

    def entries(self) -> Iterator[Entry]:
        """All there is, each folder before what is in it. Raises ``NotFound``, ``Refused``."""
        found = os.stat(self._name, dir_fd=self._base, follow_symlinks=False)
        root = self._entry([], found, self._base, self._name)
        if root is None or root.kind == "link":
            raise Refused("is neither a file nor a folder", resource=str(self.path))
        yield root
        if root.kind == "folder":
            fd = os.open(self._name, _FOLDER, dir_fd=self._base)
            try:
                yield from self._below(fd, [])
            finally:
                os.close(fd)

    def _below(self, fd: int, parts: list[str]) -> Iterator[Entry]:
        try:
            names = sorted(os.listdir(fd))
        except OSError as e:
            self._skip(parts, why(e))
            return
        for name in names:
            if name.endswith(".ew-part") and name.startswith("."):
                continue  # of a copy that broke off
            place = [*parts, name]
            try:
                name.encode()
            except UnicodeEncodeError:
                self._skip([*parts, name.encode(errors="replace").decode()], "has a name that is no UTF-8")
                continue
            try:
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
                entry = self._entry(place, found, fd, name)
                if entry is None:
                    continue
                inner = os.open(name, _FOLDER, dir_fd=fd) if entry.kind == "folder" else -1
            except OSError as e:
                self._skip(place, why(e))
                continue
            yield entry
            if inner >= 0:
                try:
                    if len(place) >= DEPTH_MOST:
                        self._skip(place, f"is more than {DEPTH_MOST} folders deep")
                    else:
                        yield from self._below(inner, place)
                finally:
                    os.close(inner)

    def _entry(self, parts: list[str], found: os.stat_result, fd: int, name: str) -> Entry | None:
        mode = stat.S_IMODE(found.st_mode) & _MODE
        if stat.S_ISDIR(found.st_mode):
            return Entry(parts, "folder", mode, mtime=found.st_mtime)
        if stat.S_ISREG(found.st_mode):
            return Entry(parts, "file", mode, found.st_size, found.st_mtime)
        if stat.S_ISLNK(found.st_mode):
            target = os.readlink(name, dir_fd=fd)
            if reason := leads_out(parts, target):
                self._skip(parts, f"is a link that {reason}")
                return None
            return Entry(parts, "link", target=target)
        self._skip(parts, "is neither file, folder nor link")
        return None

    def _skip(self, parts: list[str], reason: str) -> None:
        if len(self.skipped) < 1000:
            self.skipped.append(("/".join(parts), reason))

    def open(self, entry: Entry) -> None:
        """The file that :meth:`read` reads. Raises ``OSError``."""
        self.close_file()
        if entry.parts:
            root = os.open(self._name, _FOLDER, dir_fd=self._base)
            try:
                folder = _open_folder(root, entry.parts[:-1])
            finally:
                os.close(root)
        else:
            folder = os.dup(self._base)
        try:
            self._fd = os.open(entry.parts[-1] if entry.parts else self._name, _READ, dir_fd=folder)
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close_file()
            raise OSError(errno.EINVAL, "is no file any more")

    def hash_first(self, size: int) -> Any:
        """The SHA-256 of the first ``size`` bytes, as far as there are so many; the next read goes on behind them."""
        return _hash_first(self._fd, size)

    def rewind(self) -> None:
        os.lseek(self._fd, 0, os.SEEK_SET)

    def read(self, most: int) -> bytes:
        return os.read(self._fd, min(most, _PIECE))

    def close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        self.close_file()
        if self._base >= 0:
            os.close(self._base)
            self._base = -1


def _hash_first(fd: int, size: int) -> Any:
    found, left = hashlib.sha256(), size
    while left > 0 and (piece := os.read(fd, min(left, _PIECE))):
        found.update(piece)
        left -= len(piece)
    return found


class Taker:
    """Writes below ``path``, or as ``path`` itself; ``name``: what the root is called in a folder that is there."""

    def __init__(self, path: str, name: str) -> None:
        target = Path(path)
        if target.is_dir() or path.endswith("/"):
            if not name:
                raise Refused("is a folder", resource=path, remedy="name the file")
            target = target / name
        self.target = target
        try:
            self._base = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise _no(str(target.parent), e) from None
        self._fd, self._folder, self._at = -1, -1, ""
        self._hash: Any = None
        self._modes: list[tuple[list[str], int, float]] = []

    def _parent(self, entry: Entry) -> tuple[int, str]:
        if not entry.parts:
            return os.dup(self._base), self.target.name
        root = os.open(self.target.name, _FOLDER, dir_fd=self._base)
        try:
            return _open_folder(root, entry.parts[:-1]), entry.parts[-1]
        finally:
            os.close(root)

    def make(self, entry: Entry) -> None:
        """A folder or a link. Raises ``OSError``."""
        folder, name = self._parent(entry)
        try:
            if entry.kind == "folder":
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=folder)
                os.close(os.open(name, _FOLDER, dir_fd=folder))  # it is a folder, and no link to one
                self._modes.append((entry.parts, entry.mode & _MODE, entry.mtime))
            else:
                with contextlib.suppress(FileNotFoundError):
                    if not stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                        raise FileExistsError(errno.EEXIST, "something else is there")
                    os.unlink(name, dir_fd=folder)
                os.symlink(entry.target, name, dir_fd=folder)
        finally:
            os.close(folder)

    def have(self, entry: Entry) -> tuple[int, str, bool] | None:
        """What is there of a file, with its SHA-256: the whole of it (True), or what came when a copy broke off."""
        try:
            folder, name = self._parent(entry)
        except OSError:
            return None
        try:
            for known, whole in ((name, True), (_part(name), False)):
                with contextlib.suppress(OSError):
                    fd = os.open(known, _READ, dir_fd=folder)
                    try:
                        found = os.fstat(fd)
                        fits = found.st_size == entry.size if whole else 0 < found.st_size <= entry.size
                        if stat.S_ISREG(found.st_mode) and fits:
                            return found.st_size, _hash_first(fd, found.st_size).hexdigest(), whole
                    finally:
                        os.close(fd)
        finally:
            os.close(folder)
        return None

    def settle(self, entry: Entry) -> None:
        """The whole file is there already: it gets its mode and time. Raises ``OSError``."""
        folder, name = self._parent(entry)
        try:
            fd = os.open(name, _READ, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            os.fchmod(fd, entry.mode & _MODE)
            os.utime(fd, (entry.mtime, entry.mtime))
        finally:
            os.close(fd)

    def begin(self, entry: Entry, offset: int) -> None:
        """From here on :meth:`write` writes this file, behind ``offset``. Raises ``OSError``."""
        self.abandon()
        self._folder, self._at = self._parent(entry)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        part = _part(self._at)
        fd = self._fd = os.open(part, flags, 0o600, dir_fd=self._folder)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size < offset:
            raise OSError(errno.EEXIST, f"{part} is not what it was")
        os.fchmod(fd, 0o600)
        self._hash = _hash_first(fd, offset)
        os.ftruncate(fd, offset)

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def keep(self, entry: Entry, sha256: str) -> None:
        """The file is whole: it takes its place. Raises ``Refused`` when it is not what was sent; then it is gone."""
        if self._hash.hexdigest() != sha256:
            os.unlink(_part(self._at), dir_fd=self._folder)
            self.abandon()
            raise Refused("what arrived is not what was sent", remedy="copy again")
        os.fchmod(self._fd, entry.mode & _MODE)
        os.utime(self._fd, (entry.mtime, entry.mtime))
        os.fsync(self._fd)
        os.rename(_part(self._at), self._at, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self.abandon()

    def abandon(self) -> None:
        """The file that began last stays as far as it came."""
        for fd in (self._fd, self._folder):
            if fd >= 0:
                os.close(fd)
        self._fd = self._folder = -1

    def finish(self) -> None:
        """Folders get their modes and times last, the inner ones first: a folder that may not be written is filled."""
        for parts, mode, mtime in reversed(self._modes):
            with contextlib.suppress(OSError):
                folder, name = self._parent(Entry(parts, "folder"))
                try:
                    fd = os.open(name, _FOLDER, dir_fd=folder)
                finally:
                    os.close(folder)
                try:
                    os.fchmod(fd, mode)
                    os.utime(fd, (mtime, mtime))
                finally:
                    os.close(fd)

    def close(self) -> None:
        self.abandon()
        if self._base >= 0:
            os.close(self._base)
            self._base = -1


def _part(name: str) -> str:
    if len(os.fsencode(name)) > 240:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.ew-part"


def _no(path: str, e: OSError) -> NotFound | Refused:
    if isinstance(e, FileNotFoundError | NotADirectoryError):
        return NotFound("there is no such file or folder", resource=path)
    return Refused(f"cannot be opened: {why(e)}", resource=path)
