"""Drops a publisher's own repeats: MQTT 3.1.1 QoS 1 sends again after a lost acknowledgement. Pure.

The window holds the identities of the last readings that were taken over; its state is read from the queue's own tail
after a start, so it cannot disagree with the data.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec


def identity_of(payload: bytes, path: Sequence[str]) -> str | None:
    """What makes the reading itself, as text; None when the payload has no such field."""
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
    return f"{type(value).__name__}:{value}"


class Window:
    """The last ``size`` identities."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._seen: OrderedDict[str, None] = OrderedDict()

    def known(self, identity: str) -> bool:
        return identity in self._seen

    def add(self, identity: str) -> None:
        self._seen[identity] = None
        self._seen.move_to_end(identity)
        while len(self._seen) > self.size:
            self._seen.popitem(last=False)

    def __len__(self) -> int:
        return len(self._seen)
