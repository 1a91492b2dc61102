"""Blobs: files that are named by what is in them. What hub and nodes say to each other about them. Pure.

A blob's name is ``sha256:`` and 64 hex digits. Whoever gets one hashes it, so it does not matter where it came from. A
namespace holds a blob when somebody of it brought it; another that knows only the name gets nothing. Nodes ask for a
blob piece by piece from where they are (``ew.hub.blob.<node>``), and for the bundle of a lock file
(``ew.hub.bundle.<node>``), which the hub makes when nobody has. The hub's side is ``hub/blobs.py`` and
``hub/bundles.py``, the node's is ``functions/stock.py``.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from edgeward.core.errors import Invalid

PREFIX = "sha256:"
DIGEST = r"^sha256:[0-9a-f]{64}$"
_DIGEST = re.compile(DIGEST)
#: Bytes of one piece at the hub, and the most that one answer carries.
PIECE = 512 * 1024
#: Bytes of a blob as the hub takes it, unless it is told otherwise, and at most (images are large).
LARGEST, MOST = 256 << 20, 4 << 30
#: What a node asks for at first, and at least.
_FIRST, _LEAST = 32 * 1024, 8 * 1024
#: A piece that takes longer holds up what else wants over the link (heartbeats above all); one that is much faster
#: wastes round trips. Seconds.
_LONG, _SHORT = 2.0, 0.5


def hex_of(digest: str, field: str = "") -> str:
    """The 64 hex digits. Raises ``Invalid``."""
    if not _DIGEST.fullmatch(digest):
        raise Invalid(
            f"{digest[:80]!r} is no digest", field=field, remedy="write sha256: and 64 of the digits 0-9 and a-f"
        )
    return digest.removeprefix(PREFIX)


class BlobAsk(msgspec.Struct, omit_defaults=True):
    """Node to hub: at most ``most`` bytes of the blob from ``offset`` on."""

    namespace: str
    digest: str
    offset: int = 0
    most: int = PIECE


class BlobPart(msgspec.Struct, omit_defaults=True):
    """Hub to node: the blob's size and the bytes; fewer than asked for, but some, unless it ends there.

    ``again``: the error is of the moment, not of the blob.
    """

    size: int = 0
    data: bytes = b""
    error: str = ""
    again: bool = False


class Target(msgspec.Struct, omit_defaults=True):
    """What packages are to run on: ``python`` like ``3.11``, ``platforms`` best first (PEP 425), ``environment`` of
    markers (PEP 508)."""

    python: str
    platforms: list[str]
    environment: dict[str, str]


class BundleAsk(msgspec.Struct, omit_defaults=True):
    """Node to hub: the bundle of the lock file with this digest, for this target."""

    namespace: str
    lock: str
    target: Target


State = Literal["ready", "making", "failed", "unknown"]


class BundleTold(msgspec.Struct, omit_defaults=True):
    """Hub to node. ``unknown``: the hub does not know of such a function of the node's, or cannot look just now."""

    state: State = "unknown"
    digest: str = ""
    message: str = ""


class Pace:
    """How much to ask for at once: as much as the link brings in a short while."""

    def __init__(self) -> None:
        self.most = _FIRST

    def took(self, seconds: float) -> None:
        """The last piece was there after so long."""
        if seconds > _LONG:
            self.most = max(_LEAST, self.most // 2)
        elif seconds < _SHORT:
            self.most = min(PIECE, self.most * 2)

    def failed(self) -> None:
        self.most = max(_LEAST, self.most // 4)
