"""Lock files and wheels: which packages a function is to have, and which files bring them to one kind of node. Pure.

In comes the text of a requirements file with hashes (as ``uv pip compile --generate-hashes`` or ``pip-compile`` write
it), out come its pins. Only ``name==version`` with an optional marker and sha256 hashes is taken: no address, no
option, no other file, so nothing in it can say where something is fetched from or have something built. A *bundle* is
the wheels themselves, unchanged, in one tar: the node holds each against the hashes of the lock file, so neither the
hub nor whoever made the bundle can put in what the lock file does not name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from edgeward.core.blobs import Target
from edgeward.core.errors import Invalid

if TYPE_CHECKING:
    from packaging.tags import Tag

#: Of a lock file.
MAX_LOCK = 128 * 1024
MAX_PINS = 500
_PIN = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?)(?:\[[A-Za-z0-9._, -]{0,200}\])?\s*==\s*"
    r"(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]{0,99})\s*(?:;\s*(?P<marker>.{1,500}))?"
)
_HASH = re.compile(r"--hash[= ]sha256:([0-9a-f]{64})")


class Pin(msgspec.Struct, frozen=True):
    """One package of a lock file: normalised name, version, sha256 of the files that it may be."""

    name: str
    version: str
    hashes: frozenset[str]
    marker: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def line(self) -> str:
        return f"{self.name}=={self.version} " + " ".join(f"--hash=sha256:{h}" for h in sorted(self.hashes))


def normal(name: str) -> str:
    """A package's name as all its spellings (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_lock(text: str, field: str = "$.spec.dependencies.lock") -> list[Pin]:
    """The pins, in order. Raises ``Invalid`` with the line that is not taken."""
    if len(text.encode()) > MAX_LOCK:
        raise Invalid(f"is more than {MAX_LOCK} bytes", field=field, remedy="leave out the hashes of source archives")
    found: dict[str, Pin] = {}
    for raw in text.replace("\r\n", "\n").replace("\\\n", " ").split("\n"):
        line = re.sub(r"(^|\s)#.*$", "", raw).strip()
        if not line:
            continue
        hashes = frozenset(_HASH.findall(line))
        rest = _HASH.sub("", line).strip()
        pin = _PIN.fullmatch(rest)
        if pin is None:
            raise Invalid(
                f"the line {line[:80]!r} is not taken",
                field=field,
                remedy="only name==version --hash=sha256:..., as `uv pip compile --generate-hashes` writes them",
            )
        name = normal(pin["name"])
        if not hashes:
            raise Invalid(f"{name} has no hash", field=field, remedy="lock with hashes: --generate-hashes")
        one = Pin(name, pin["version"], hashes, (pin["marker"] or "").strip())
        if name in found and found[name].marker == one.marker:
            raise Invalid(f"{name} is there twice", field=field, remedy="keep one of them")
        if name in found:
            raise Invalid(
                f"{name} is there twice, for different machines", field=field, remedy="lock for one kind of machine"
            )
        found[name] = one
    if not found:
        raise Invalid("names no package", field=field, remedy="leave dependencies out, or lock them")
    if len(found) > MAX_PINS:
        raise Invalid(f"names {len(found)} packages", field=field, remedy=f"at most {MAX_PINS}")
    return list(found.values())


def wanted(pins: Iterable[Pin], environment: Mapping[str, str]) -> list[Pin]:
    """Those whose marker holds where they are to run (PEP 508). Raises ``Invalid`` for a marker that is none."""
    from packaging.markers import InvalidMarker, Marker

    found = []
    for pin in pins:
        try:
            if not pin.marker or Marker(pin.marker).evaluate({**environment, "extra": ""}):
                found.append(pin)
        except (InvalidMarker, ValueError, KeyError, RecursionError) as e:
            raise Invalid(
                f"the marker of {pin.name} is not understood: {e}", field="$.spec.dependencies.lock"
            ) from None
    return found


def tags_of(target: Target) -> set[Tag]:
    """What a wheel's name may promise to run there (PEP 425)."""
    from packaging.tags import compatible_tags, cpython_tags

    version = python_of(target)
    interpreter = f"cp{version[0]}{version[1]}"
    return {
        *cpython_tags(version, platforms=target.platforms),
        *compatible_tags(version, interpreter=interpreter, platforms=target.platforms),
    }


def python_of(target: Target) -> tuple[int, int]:
    found = re.fullmatch(r"(3)\.(\d{1,2})", target.python)
    if found is None:
        raise Invalid(f"{target.python[:20]!r} is no version of Python", remedy="write e.g. 3.11")
    return int(found[1]), int(found[2])


def platforms(arch: str, glibc: int = 17) -> list[str]:
    """The platforms of a Linux with this processor and glibc 2.``glibc``, best first."""
    named = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}
    found = []
    for minor in range(glibc, 4, -1):
        found.append(f"manylinux_2_{minor}_{arch}")
        found += [f"{named[minor]}_{arch}"] if minor in named else []
    return [*found, f"linux_{arch}"]


def wheel_of(filename: str) -> tuple[str, str, frozenset[Tag]]:
    """Normalised name, version and tags of a wheel by its file's name. Raises ``Invalid``."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename
    from packaging.version import InvalidVersion

    try:
        name, version, _, tags = parse_wheel_filename(filename)
    except (InvalidWheelFilename, InvalidVersion, ValueError):
        raise Invalid(f"{filename[:80]!r} is no wheel", remedy="bundles hold wheels only") from None
    return normal(name), str(version), tags


def lacking(pins: Iterable[Pin], files: Collection[str], tags: Collection[Tag], where: str) -> str:
    """Why these wheels do not bring these packages to that place; nothing: they do. ``where``: for people."""
    have: dict[str, list[str]] = {}
    for file in files:
        have.setdefault(wheel_of(file)[0], []).append(file)
    for pin in pins:
        there = have.get(pin.name, [])
        if not there:
            return f"{pin} has no wheel in the bundle"
        if not any(wheel_of(f)[2] & set(tags) for f in there):
            return f"{pin} has no wheel for {where}, only {there[0][:120]}"
    return ""


def where(target: Target) -> str:
    """A target in words."""
    return f"Python {target.python} on {target.platforms[0] if target.platforms else 'an unknown platform'}"
