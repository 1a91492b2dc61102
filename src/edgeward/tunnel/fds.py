"""Descriptors of pipes and terminals, read and written without a thread and without a buffer of our own."""

from __future__ import annotations

import asyncio
import errno
import os


async def wait_for(fd: int, *, write: bool = False) -> None:
    """Until the descriptor can be read (or written)."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    (loop.add_writer if write else loop.add_reader)(fd, ready.set)
    try:
        await ready.wait()
    finally:
        (loop.remove_writer if write else loop.remove_reader)(fd)


async def take(fd: int, n: int, over: asyncio.Event | None = None, patience: float = 0.5) -> bytes:
    """Some bytes, ``b""`` at the end. Once ``over`` is set, ``patience`` seconds of silence are the end as well."""
    while True:
        try:
            return os.read(fd, n)
        except BlockingIOError:
            pass
        except OSError as e:
            if e.errno == errno.EIO:  # a terminal whose programs are all gone
                return b""
            raise
        waiting = asyncio.ensure_future(wait_for(fd))
        gone = asyncio.ensure_future(over.wait()) if over is not None else None
        try:
            if gone is not None:
                await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    await asyncio.wait({waiting}, timeout=patience)
                    if not waiting.done():
                        return b""
            else:
                await waiting
        finally:
            for task in (waiting, gone):
                if task is not None and not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)


async def put(fd: int, data: bytes) -> None:
    """All of it. Raises ``BrokenPipeError`` when nobody reads there any more."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            await wait_for(fd, write=True)
        except OSError as e:
            if e.errno == errno.EIO:
                raise BrokenPipeError(e.errno, e.strerror) from None
            raise
