"""One health check: http, tcp or exec, each bounded in time; True or the reason why not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


async def http(host: str, port: int, path: str, timeout: float) -> str:
    """GET; "" when the status is 200 to 399, else why not."""
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, port, limit=65536)
            try:
                ask = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUser-Agent: edgeward\r\nConnection: close\r\n\r\n"
                writer.write(ask.encode("ascii", "replace"))
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError:
        return f"no answer within {timeout:g} s"
    except (OSError, ValueError) as e:
        return f"no answer: {e}"
    parts = line.split(None, 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/") or not parts[1].isdigit():
        return "the answer is no HTTP"
    status = int(parts[1])
    return "" if 200 <= status < 400 else f"status {status}"


async def tcp(host: str, port: int, timeout: float) -> str:
    """ "" when a connection opens, else why not."""
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
    except TimeoutError:
        return f"no connection within {timeout:g} s"
    except OSError as e:
        return f"no connection: {e}"
    return ""


async def command(
    argv: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float, user: Mapping[str, Any] | None = None
) -> str:
    """ "" when the command ends with status 0 in time, else why not. ``user``: the ``user``, ``group`` and
    ``extra_groups`` to run it as, those of the app; a check gets no rights that the app has not."""
    # a task of its own: a cancellation while it starts would leave the command's children behind
    starting = asyncio.create_task(
        asyncio.create_subprocess_exec(
            *argv,
            env=dict(env),
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            **(user or {}),
        )
    )
    try:
        async with asyncio.timeout(timeout):
            process = await asyncio.shield(starting)
            status = await process.wait()
    except TimeoutError:
        return f"did not end within {timeout:g} s"
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        return f"cannot be run: {getattr(e, 'strerror', None) or e}"
    finally:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            process = await starting
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
                await process.wait()
    if status < 0:
        return f"ended by signal {-status}"
    return "" if status == 0 else f"ended with status {status}"
