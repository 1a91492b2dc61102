"""Drops a publisher's own repeats: MQTT 3.1.1 QoS 1 sends again after a lost acknowledgement. Pure.

The window holds the identities of the last readings that were taken over. After a start it is made of what was saved
and of the queue's readings behind that (``streams/capture.py``), so it cannot disagree with the data.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec

#: Bytes of an identity.
SIZE = 16


def identity_of(topic: str, payload: bytes, path: Sequence[str]) -> bytes | None:
    """What makes the reading itself, among those of its topic; None when the payload has no such field.

    16 bytes of BLAKE2b: two readings that differ are never taken for one, and a window of a million fits in memory.
    """
    try:
        value: Any = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    if value is None or isinstance(value, dict | list):
        return None
    text = f"{topic}\0{type(value).__name__}:{value}"
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=SIZE).digest()


class Window:
    """The last ``size`` identities."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def known(self, identity: bytes) -> bool:
        return identity in self._seen

    def add(self, identity: bytes) -> None:
        self._seen[identity] = None
        self._seen.move_to_end(identity)
        while len(self._seen) > self.size:
            self._seen.popitem(last=False)

    def dump(self) -> bytes:
        """All identities, oldest first."""
        return b"".join(self._seen)

    def load(self, data: bytes) -> None:
        """Adds what :meth:`dump` gave."""
        for at in range(0, len(data) - SIZE + 1, SIZE):
            self.add(data[at : at + SIZE])

    def __len__(self) -> int:
        return len(self._seen)
