"""HTTP to docker's socket: one call a connection, answers bounded, streams as they come.

Only what docker's API needs (RFC 9112): lengths, chunks, and bodies that go on until the other side closes. The socket
is the machine's own root, so what answers is trusted not to be hostile, but not to be small or quick.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core.errors import EdgewardError, Unreachable

_MOST = 16 << 20
_PIECE = 1 << 18
#: Streams of output come as frames: the first byte says which, the last four of eight how long.
_FRAME = 8


class Answer:
    """``status`` and the body; :meth:`pieces` once."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self._headers, self._reader = status, headers, reader

    async def pieces(self) -> AsyncIterator[bytes]:
        reader = self._reader
        if "chunked" in self._headers.get("transfer-encoding", ""):
            while size := int((await reader.readline()).split(b";")[0].strip() or b"0", 16):
                while size:
                    data = await reader.read(min(size, _PIECE))
                    if not data:
                        return
                    size -= len(data)
                    yield data
                await reader.readline()
            return
        left = int(self._headers["content-length"]) if "content-length" in self._headers else -1
        while left and (data := await reader.read(_PIECE if left < 0 else min(left, _PIECE))):
            left -= len(data) if left > 0 else 0
            yield data

    async def frames(self) -> AsyncIterator[bytes]:
        """What a container wrote, without the frames around it."""
        kept = b""
        async for piece in self.pieces():
            kept += piece
            while len(kept) >= _FRAME and len(kept) >= (end := _FRAME + int.from_bytes(kept[4:8], "big")):
                yield kept[_FRAME:end]
                kept = kept[end:]


@contextlib.asynccontextmanager
async def opened(
    socket: str, method: str, path: str, body: bytes | Path | None = None, kind: str = "application/json"
) -> AsyncIterator[Answer]:
    """Asks, and has the answer's head. Raises ``Unreachable``."""
    try:
        reader, writer = await asyncio.open_unix_connection(socket, limit=_MOST)
    except OSError as e:
        raise Unreachable(f"docker does not answer at {socket}: {e.strerror or e}", remedy="is it running?") from None
    try:
        size = body.stat().st_size if isinstance(body, Path) else len(body or b"")
        head = f"{method} {path} HTTP/1.1\r\nHost: docker\r\nConnection: close\r\nContent-Length: {size}\r\n"
        writer.write((head + (f"Content-Type: {kind}\r\n" if body is not None else "") + "\r\n").encode("ascii"))
        if isinstance(body, Path):
            with body.open("rb") as file:
                while data := await asyncio.to_thread(file.read, _PIECE):
                    writer.write(data)
                    await writer.drain()
        elif body:
            writer.write(body)
        await writer.drain()
        status = int((await reader.readline()).split(None, 2)[1])
        headers: dict[str, str] = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        yield Answer(status, headers, reader)
    except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as e:
        raise Unreachable(f"docker's answer broke off: {e}") from None
    finally:
        writer.close()


async def call(
    socket: str,
    method: str,
    path: str,
    body: Any = None,
    *,
    timeout: float,
    missing: tuple[int, ...] = (),
    kind: str = "application/json",
) -> bytes | None:
    """The answer's body; None for a status of ``missing``. Raises ``EdgewardError`` with docker's own words."""
    raw = body if isinstance(body, bytes | Path) or body is None else msgspec.json.encode(body)
    try:
        async with asyncio.timeout(timeout), opened(socket, method, path, raw, kind) as answer:
            data = bytearray()
            async for piece in answer.pieces():
                data += piece
                if len(data) > _MOST:
                    raise EdgewardError("docker's answer is too long")
    except TimeoutError:
        raise Unreachable(f"docker did not answer within {timeout:g} s") from None
    if answer.status in missing:
        return None
    if answer.status >= 400:
        raise EdgewardError(said(bytes(data)) or f"docker answered with status {answer.status}")
    return bytes(data)


def said(data: bytes) -> str:
    """The message of an error."""
    with contextlib.suppress(msgspec.DecodeError, AttributeError):
        doc = msgspec.json.decode(data)
        return str(doc.get("message") or doc.get("cause") or "")[:600]
    return data.decode("utf-8", "replace").strip()[:600]
