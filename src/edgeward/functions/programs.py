"""Programs of this machine: where one is, and what else the kernel must open to start it.

In comes a name as a person writes it, out goes a path and the files that Landlock has to let be executed: the program,
the loader that its ELF header names, the interpreter that a script's first line names.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

from edgeward.core.errors import EdgewardError

#: Where programs are looked for before the agent's own PATH; what a program itself is given.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DEPTH = 4
_PT_INTERP = 3


def search_path() -> str:
    own = os.environ.get("PATH", "")
    return ":".join(dict.fromkeys(p for p in f"{PATH}:{own}".split(":") if p.startswith("/")))


def find(name: str) -> str:
    """The program of this name on this machine; empty: there is none."""
    return shutil.which(name, path=search_path()) or ""


def resolve(name: str, folder: str) -> str:
    """The program that a command begins with: an absolute path, a file in ``folder``, or one of the system.

    Raises ``EdgewardError`` where there is none.
    """
    path = name
    if not name.startswith("/"):
        own = str(Path(folder) / name) if folder else ""
        path = own if own and ("/" in name or Path(own).is_file()) else find(name)
    if not path:
        raise EdgewardError(
            f"there is no program {name!r} on this node (looked in {PATH} and the agent's own PATH); "
            "install it there, or bring it along in the source"
        )
    if not Path(path).is_file():
        raise EdgewardError(f"there is no program {name} on this node; install it there, or correct command")
    if not os.access(path, os.X_OK):
        raise not_executable(name)
    return path


def not_executable(name: str) -> EdgewardError:
    return EdgewardError(f"{name} is not executable: begin it with #! and what runs it, or name that first in command")


def needs(path: str, depth: int = _DEPTH) -> list[str]:
    """The files that are executed when ``path`` is: itself, its loader or its interpreter, and what these need."""
    real = os.path.realpath(path)
    found = [real]
    if depth:
        try:
            with open(real, "rb") as file:  # noqa: PTH123
                head = file.read(4096)
        except OSError:
            return found
        if head.startswith(b"\x7fELF"):
            loader = _loader(real, head)
            found += [os.path.realpath(loader)] if loader else []
        else:
            found += interpreters(head.decode(errors="replace"), depth)
    return list(dict.fromkeys(found))


def interpreters(text: str, depth: int = _DEPTH) -> list[str]:
    """What runs a script: of its first line, ``#! /path [argument]``; nothing where there is none."""
    if not text.startswith("#!"):
        return []
    words = text[2:].split("\n", 1)[0].split()
    found = needs(words[0], depth - 1) if words else []
    if len(words) > 1 and words[0].endswith("/env") and (named := find(words[1])):
        found += needs(named, depth - 1)
    return found


def _loader(path: str, head: bytes) -> str:
    """``PT_INTERP`` of an ELF file (elf(5)); empty for a static one."""
    wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
    try:
        if wide:
            at, size, count = *struct.unpack_from(f"{order}Q", head, 32), *struct.unpack_from(f"{order}HH", head, 54)
        else:
            at, size, count = *struct.unpack_from(f"{order}I", head, 28), *struct.unpack_from(f"{order}HH", head, 42)
        with open(path, "rb") as file:  # noqa: PTH123
            file.seek(at)
            table = file.read(size * min(count, 64))
            for entry in range(0, len(table), size):
                if struct.unpack_from(f"{order}I", table, entry)[0] != _PT_INTERP:
                    continue
                shape = (f"{order}Q", 8, 32) if wide else (f"{order}I", 4, 16)
                (where,) = struct.unpack_from(shape[0], table, entry + shape[1])
                (length,) = struct.unpack_from(shape[0], table, entry + shape[2])
                file.seek(where)
                return file.read(min(length, 4096)).rstrip(b"\0").decode(errors="replace")
    except (OSError, struct.error):
        pass
    return ""
