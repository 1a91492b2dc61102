"""What a function is made of beside its own text: the archive of its source and the lock file of its packages. Pure.

Both are named by digests: an archive by that of its bytes, a lock file by that of its text, so that every node names
the packages alike, whichever wheels bring them there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from edgeward.core.blobs import DIGEST, hex_of
from edgeward.core.resource import Resource

_DIGEST = re.compile(DIGEST)


def lock_digest(text: str) -> str:
    """64 hex digits for a lock file."""
    return hashlib.sha256(text.encode()).hexdigest()


class Parts(NamedTuple):
    """``archives``: (namespace, hex); ``locks``: (namespace, hex) to text."""

    archives: set[tuple[str, str]]
    locks: dict[tuple[str, str], str]

    @property
    def all(self) -> set[tuple[str, str]]:
        return self.archives | set(self.locks)

    def add(self, namespace: str, spec: Any) -> None:
        """What a Function's spec names, or a patch of one."""
        _look(spec, namespace, self)


def _look(spec: Any, namespace: str, into: Parts) -> None:
    if not isinstance(spec, dict):
        return
    archive = (spec.get("source") or {}).get("archive") if isinstance(spec.get("source"), dict) else None
    digest = archive.get("digest") if isinstance(archive, dict) else None
    if isinstance(digest, str) and _DIGEST.fullmatch(digest):
        into.archives.add((namespace, hex_of(digest)))
    dependencies = spec.get("dependencies")
    lock = dependencies.get("lock") if isinstance(dependencies, dict) else None
    if isinstance(lock, str) and lock:
        into.locks[namespace, lock_digest(lock)] = lock


def parts_of(resources: Iterable[Resource]) -> Parts:
    """The parts of Functions, and those that Overrides of Functions name."""
    into = Parts(set(), {})
    for r in resources:
        if r.kind == "Function":
            _look(msgspec.to_builtins(r.spec), r.metadata.namespace, into)
        elif r.kind == "Override" and r.spec.target.kind == "Function":
            _look(r.spec.patch, r.spec.target.namespace, into)
    return into


def named(texts: Iterable[bytes]) -> set[str]:
    """Every run of 64 hex digits in some files: what a plane's configuration and its memory refer to."""
    return {found.decode() for text in texts for found in re.findall(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", text)}
