"""Archives: a folder as one file, the same bytes for the same content, and a file as a folder, whoever made it.

Packing takes regular files, sorted, with nothing of the machine in them (owners, times), and leaves out what belongs to
a workshop (``.git``, ``__pycache__``, ``.venv``). Unpacking trusts nothing: it makes files and folders of its own below
the target and nothing else, so no link is ever there to be followed; names that lead out, links, devices, what comes
twice and what is more than its bounds are refused with the entry's name. Nothing here runs what it finds.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import msgspec

from edgeward.core.blobs import LARGEST, PREFIX
from edgeward.core.errors import Invalid, TooLarge

#: Names that are never packed, wherever they are.
IGNORED = frozenset(
    {".git", ".hg", ".svn", "__pycache__", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".DS_Store"}
)
_PIECE = 256 * 1024
#: What Python's readers raise for bytes that are no archive, or a broken one.
DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, NotImplementedError,
)  # fmt: skip


class Bounds(msgspec.Struct, frozen=True):
    """Of what is unpacked. ``ratio``: unpacked bytes for each packed one, counted beyond the first ``free`` bytes."""

    files: int = 20_000
    bytes: int = 1 << 30
    ratio: int = 200
    free: int = 16 << 20
    depth: int = 32


# -- packing -----------------------------------------------------------------------------------------------------------


def _inside(folder: Path, without: Path | None) -> Iterator[tuple[str, Path]]:
    """Relative name and place of each file, links within the folder followed."""
    root, left_out = folder.resolve(), without and without.resolve()

    def walk(at: Path, name: str, above: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
        for path in sorted(at.iterdir()):
            if path.name in IGNORED or path.suffix == ".pyc":
                continue
            relative, real = f"{name}{path.name}", path.resolve()
            if path.is_symlink() and not real.is_relative_to(root):
                raise Invalid(f"{relative} is a link that leads out of the folder", file=str(folder), remedy="copy it")
            if real.is_dir():
                if real in above:
                    raise Invalid(f"{relative} is a link to what it is in", file=str(folder), remedy="remove it")
                yield from walk(path, f"{relative}/", (*above, real))
            elif real == left_out:
                continue
            elif real.is_file():
                yield relative, path
            else:
                raise Invalid(f"{relative} is no regular file", file=str(folder), remedy="remove it")

    return walk(folder, "", (root,))


def pack(folder: Path, without: Path | None = None) -> tuple[bytes, str]:
    """The folder as a tar.gz, and its digest; ``without`` a file: the document that declares it may lie in it.

    Raises ``Invalid``, ``TooLarge``.
    """
    if not folder.is_dir():
        raise Invalid("is no folder", file=str(folder), field="$.spec.source.folder", remedy="name one that is there")
    packed = io.BytesIO()
    count = size = 0
    # no name and no time in the head: the same content is the same bytes
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=6, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, path in sorted(_inside(folder, without)):
            with path.open("rb") as f:
                about = os.fstat(f.fileno())
                count, size = count + 1, size + about.st_size
                if count > Bounds().files or size > Bounds().bytes or packed.tell() > LARGEST:
                    raise TooLarge(
                        "is too much for an archive", file=str(folder),
                        remedy=f"at most {Bounds().files} files and {LARGEST >> 20} MiB packed",
                    )  # fmt: skip
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = about.st_size, 0o755 if about.st_mode & 0o100 else 0o644
                tar.addfile(entry, f)
    if not count:
        raise Invalid("has no file", file=str(folder), field="$.spec.source.folder", remedy="name another folder")
    data = packed.getvalue()
    if len(data) > LARGEST:
        raise TooLarge(f"packs to {len(data)} bytes", file=str(folder), remedy=f"at most {LARGEST}")
    return data, digest_of(data)


def digest_of(data: bytes) -> str:
    return PREFIX + hashlib.sha256(data).hexdigest()


# -- unpacking ---------------------------------------------------------------------------------------------------------


class Target:
    """A folder that is being filled, within bounds."""

    def __init__(self, root: Path, packed: int, bounds: Bounds) -> None:
        self._root, self._bounds = root, bounds
        self._most = min(bounds.bytes, bounds.free + packed * bounds.ratio)
        self._entries = 0
        self.bytes = 0
        self.files: list[str] = []

    def place(self, name: str) -> Path:
        """Where an entry of this name goes. Raises ``Invalid`` for one that would leave the folder."""
        self._entries += 1
        if self._entries > self._bounds.files:
            raise TooLarge(f"has more than {self._bounds.files} entries", remedy="leave out what is not needed")
        parts = PurePosixPath(name).parts
        wrong = (
            not parts
            or len(name) > 1024
            or len(parts) > self._bounds.depth
            or parts[0] == "/"
            or any(p == ".." or len(p.encode("utf-8", "replace")) > 255 for p in parts)
            or "\\" in name
            or not name.isprintable()
        )
        if wrong:
            raise Invalid(f"the entry {name[:80]!r} has a name that is not taken", remedy="relative ones only, no ..")
        return self._root.joinpath(*parts)

    def folder(self, name: str) -> None:
        self._made(self.place(name), name)

    def _made(self, path: Path, name: str) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError:
            raise Invalid(f"the entry {name[:80]!r} lies where a file is", remedy="each name once") from None

    def file(self, name: str, read: Callable[[int], bytes], *, program: bool = False) -> Path:
        path = self.place(name)
        self._made(path.parent, name)
        mode = 0o555 if program else 0o444
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        except (FileExistsError, IsADirectoryError):
            raise Invalid(f"the entry {name[:80]!r} comes twice", remedy="each name once") from None
        with os.fdopen(fd, "wb") as out:
            while piece := read(_PIECE):
                self.bytes += len(piece)
                if self.bytes > self._most:
                    raise TooLarge(
                        f"unpacks to more than {self._most} bytes", remedy="it is no archive that is meant to be used"
                    )
                out.write(piece)
        self.files.append(name)
        return path


def _untar(source: Path, target: Target) -> None:
    # as a stream: nothing is read twice, and no entry can refer to another one's place
    with tarfile.open(source, mode="r|*", errorlevel=2) as tar:
        for entry in tar:
            if entry.isdir():
                if entry.name not in (".", "./"):
                    target.folder(entry.name)
            elif entry.isreg() and not entry.issparse():
                data = tar.extractfile(entry)
                assert data is not None  # noqa: S101 - it is a regular file
                target.file(entry.name, data.read, program=bool(entry.mode & 0o100))
            else:
                kind = "a link" if entry.issym() or entry.islnk() else "no regular file"
                raise Invalid(f"the entry {entry.name[:80]!r} is {kind}", remedy="pack regular files and folders only")


def unzip(source: Path | IO[bytes], target: Target, where: Callable[[str], str | None] = lambda name: name) -> None:
    """``where``: the name that an entry gets; None: it is left out."""
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        for entry in entries:
            name = where(entry.filename)
            if name is None:
                continue
            mode = entry.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
                raise Invalid(f"the entry {name[:80]!r} is {kind}", remedy="pack regular files and folders only")
            if entry.is_dir():
                target.folder(name)
                continue
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Invalid(f"the entry {name[:80]!r} is packed in a way that is not taken", remedy="use deflate")
            with archive.open(entry) as data:
                target.file(name, data.read, program=bool(mode & 0o100))


def unpack(source: Path, root: Path, bounds: Bounds | None = None) -> Target:
    """Unpacks a tar (gz, bz2, xz or none) or zip into ``root``, which is there and empty.

    Raises ``Invalid`` or ``TooLarge``; then what is in ``root`` is of no use.
    """
    target = Target(root, source.stat().st_size, bounds or Bounds())
    try:
        with source.open("rb") as f:
            zipped = f.read(2) == b"PK"  # not is_zipfile: it also takes a tar whose last entry is a zip
        if zipped:
            unzip(source, target)
        else:
            _untar(source, target)
    except DAMAGED as e:
        raise Invalid(f"cannot be unpacked: {e or type(e).__name__}", remedy="make it anew: tar.gz or zip") from e
    except OSError as e:
        if e.errno:  # a disk that is full is no fault of the archive
            raise
        raise Invalid(f"cannot be unpacked: {e}", remedy="make it anew: tar.gz or zip") from e
    if not target.files:
        raise Invalid("has no file", remedy="make it anew")
    return target
