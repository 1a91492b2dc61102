"""What two sides say to one another to copy files and folders, and what they may say. Pure.

One side *gives*, the other *takes*; either may be the node. The giver lists all there is (``Entry``, then ``Listed``).
The taker answers with what it has of each file already (``Have``: so many bytes, and their SHA-256), then ``Planned``.
The giver sends each file (``Begin`` at an offset, data, ``End`` with the SHA-256 of the whole), so two round trips do
for any number of files, and a copy that broke off goes on where it stopped. The taker says what it could not keep
(``Failed``) and what came of all (``Done``). A name that would lead out of the folder is no entry: :func:`check_parts`.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec

from edgeward.core.errors import EdgewardError, Invalid, Refused

MOST = 256 * 1024
#: Entries of one copy; a file system with more is not copied by hand.
ENTRIES_MOST = 200_000
#: Bytes of all their names, which the taker holds in memory: of a small box, and by a stranger's word.
NAMES_MOST = 64 << 20
DEPTH_MOST = 64
_HEAD = struct.Struct(">cI")
#: A message, and bytes of the file that began last.
MESSAGE, DATA = b"m", b"d"


class Entry(msgspec.Struct, tag="entry", omit_defaults=True):
    """One file, folder or link. ``parts``: its place below the root of the copy, empty for the root itself."""

    parts: list[str]
    kind: Literal["file", "folder", "link"]
    mode: int = 0
    size: int = 0
    mtime: float = 0.0
    #: Of a link.
    target: str = ""


class Listed(msgspec.Struct, tag="listed", omit_defaults=True):
    """No more entries. ``skipped``: what is neither file, folder nor link, or cannot be read: path and why."""

    count: int
    skipped: list[tuple[str, str]] = []


class Have(msgspec.Struct, tag="have"):
    """The taker has the first ``size`` bytes of entry ``n``, with this SHA-256 (hex)."""

    n: int
    size: int
    sha256: str


class Planned(msgspec.Struct, tag="planned"):
    """No more of what the taker has."""


class Begin(msgspec.Struct, tag="begin"):
    n: int
    offset: int


class End(msgspec.Struct, tag="end", omit_defaults=True):
    """The file that began last is whole, with this SHA-256; or the giver could not read it (``error``)."""

    sha256: str = ""
    error: str = ""


class Failed(msgspec.Struct, tag="failed"):
    """The taker could not keep an entry."""

    path: str
    why: str


class Done(msgspec.Struct, tag="done"):
    """All is there that did not fail. ``bytes``: of the files, ``moved``: that had to be sent."""

    files: int
    bytes: int
    moved: int


Message = Entry | Listed | Have | Planned | Begin | End | Failed | Done


def broken(what: str) -> Refused:
    return Refused(f"the other side does not keep to the copy's form: {what}", remedy="is it an Edgeward of this age?")


def message(m: Message) -> bytes:
    data = msgspec.msgpack.encode(m)
    return _HEAD.pack(MESSAGE, len(data)) + data


def data(piece: bytes) -> bytes:
    return _HEAD.pack(DATA, len(piece)) + piece


_decoder = msgspec.msgpack.Decoder(Message)


class Decoder:
    """Bytes in; messages and pieces of data out."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[Message | bytes]:
        """Raises ``Refused``."""
        self._data += data
        found: list[Message | bytes] = []
        at = 0
        while len(self._data) - at >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._data, at)
            if kind not in (MESSAGE, DATA) or length > MOST:
                raise broken(f"a record {kind!r} of {length} bytes")
            end = at + _HEAD.size + length
            if len(self._data) < end:
                break
            body = bytes(self._data[at + _HEAD.size : end])
            at = end
            if kind == DATA:
                found.append(body)
                continue
            try:
                found.append(_decoder.decode(body))
            except msgspec.MsgspecError as e:
                raise broken(str(e)[:200]) from None
        del self._data[:at]
        return found

    @property
    def empty(self) -> bool:
        return not self._data


def check_parts(parts: list[str]) -> None:
    """Whether these are names one below the other, and nothing that leads elsewhere. Raises ``Refused``."""
    if len(parts) > DEPTH_MOST:
        raise Refused(f"folders more than {DEPTH_MOST} deep are not copied")
    for part in parts:
        if (
            not part
            or part in (".", "..")
            or "/" in part
            or "\0" in part
            or len(part.encode(errors="surrogateescape")) > 255
        ):
            raise Refused(f"{part[:80]!r} is no name of a file", remedy="the other side may have been tampered with")


def size_of(entry: Entry) -> int:
    """Bytes of its names, and something for each."""
    return sum(len(p) + 8 for p in entry.parts) + len(entry.target)


def check_entry(entry: Entry, seen: dict[tuple[str, ...], str]) -> None:
    """An entry that a taker accepts: below folders that were listed, once, sizes and modes in bounds.

    ``seen``: kinds of what was listed before, by parts; the entry is added. Raises ``Refused``.
    """
    check_parts(entry.parts)
    place = tuple(entry.parts)
    if place in seen:
        raise broken("an entry is listed twice")
    if len(seen) >= ENTRIES_MOST:
        raise Refused(f"more than {ENTRIES_MOST} files and folders", remedy="copy an archive of them")
    if place and seen.get(place[:-1]) != "folder":
        raise broken("an entry stands below what is no folder")
    if not place and seen:
        raise broken("the root is not the first entry")
    if not 0 <= entry.size < 1 << 50 or entry.mode & ~0o7777:
        raise broken("a size or a mode that no file has")
    if entry.kind == "link" and (why := leads_out(entry.parts, entry.target)):
        raise Refused(f"the link {'/'.join(entry.parts)} {why}")
    seen[place] = entry.kind


def leads_out(parts: list[str], target: str) -> str:
    """Why a link at ``parts`` may not be copied; empty: it stays within the copy."""
    if not target or "\0" in target or len(target) > 4096:
        return "has no usable target"
    if target.startswith("/"):
        return "has an absolute target"
    depth = len(parts) - 1
    if depth < 0:
        return "is the root of the copy"
    down = False
    for step in target.split("/"):
        if step == "..":
            depth -= 1
            if down:  # behind a name that may be a link itself, nobody can tell where it leads
                return "has .. behind a name"
        elif step not in ("", "."):
            down = True
        if depth < 0:
            return "leads out of the copy"
    return ""


class CopyArgs(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a stream of ``copy`` is opened with. ``take``: the node takes; ``name``: what the root is called when
    ``path`` is a folder that is there."""

    path: str
    take: bool = False
    name: str = ""


def parse(args: Any) -> CopyArgs:
    """Raises ``Invalid``."""
    try:
        found = msgspec.convert(dict(args), CopyArgs)
    except (msgspec.ValidationError, TypeError, ValueError) as e:
        raise Invalid(str(e), remedy="upgrade the older side") from None
    if not found.path or "\0" in found.path or len(found.path) > 4096:
        raise Invalid("names no file", field="path", remedy="edgeward cp NODE:PATH PATH")
    if found.name:
        try:
            check_parts([found.name])
        except EdgewardError as e:
            raise Invalid(str(e), field="name") from None
    return found
