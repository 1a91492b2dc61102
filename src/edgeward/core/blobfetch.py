"""Blobs that a node gets from the hub: piece by piece, from where it was cut off, hashed before anybody opens them.

A fetch goes on where it was after a cut or a restart; its pieces are as large as the link brings in a moment. Rooms
that use what comes (``functions/stock.py``, ``workloads/images.py``) take the file away when they are done with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from edgeward.core import clock
from edgeward.core.blobs import MOST, PREFIX, BlobAsk, BlobPart, Pace
from edgeward.core.errors import Invalid, Refused, Unreachable
from edgeward.core.files import ensure_dir, sha256_of
from edgeward.core.quantity import format_bytes

#: (verb, message, seconds) to the hub's answer; raises ``Unreachable``.
Ask = Callable[[str, bytes, float], Awaitable[bytes]]

ANSWER = 60.0
#: Bytes that stay free on the disk.
_FREE = 64 << 20


class BlobFetch:
    """``parts``: the folder where a blob is while it comes."""

    def __init__(self, parts: Path, ask: Ask) -> None:
        self.parts, self._ask = parts, ask
        #: Of each blob that is being fetched: two who want the same one are served one after the other.
        self._fetching: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def alone(self, hex: str) -> AsyncIterator[None]:
        """Nobody else fetches or uses this blob's file meanwhile."""
        lock = self._fetching.setdefault(hex, asyncio.Lock())
        async with lock:
            yield

    async def get(self, namespace: str, hex: str) -> Path:
        """The blob as a file, whole and right; the caller holds :meth:`alone`.

        Raises ``Unreachable``, ``Refused``, ``Invalid``, and ``OSError`` when it cannot be kept.
        """
        file = ensure_dir(self.parts) / f"{hex}.part"
        pace, at = Pace(), file.stat().st_size if file.exists() else 0
        with file.open("ab") as out:
            while True:
                ask = msgspec.msgpack.encode(BlobAsk(namespace, PREFIX + hex, at, pace.most))
                began = clock.monotonic()
                part = decoded(await self._ask("blob", ask, ANSWER), BlobPart)
                pace.took(clock.monotonic() - began)
                if part.error:
                    raise (Unreachable if part.again else Refused)(part.error)
                self._check_room(part.size, at)
                at += len(part.data)
                out.write(part.data)
                if at >= part.size or not part.data:
                    break
        if await asyncio.to_thread(sha256_of, file) != hex:
            file.unlink()
            raise Invalid(f"what the hub sent is not {PREFIX}{hex}", remedy="upload it again")
        return file

    def _check_room(self, size: int, have: int) -> None:
        if size > MOST:
            raise Refused(f"has {size} bytes", remedy=f"at most {MOST}")
        free = shutil.disk_usage(self.parts).free
        if free < 2 * size - have + _FREE:
            raise Refused(f"has {format_bytes(size)}, the node's disk {format_bytes(free)}", remedy="free disk space")


def decoded(data: bytes, form: Any) -> Any:
    """The hub's answer. Raises ``Unreachable`` for one that is not understood."""
    try:
        return msgspec.msgpack.decode(data, type=form)
    except msgspec.DecodeError as e:
        raise Unreachable(f"the hub's answer is not understood: {e}", remedy="update the hub") from None
