"""What a Site's verdicts may be told to check at a node beside its reports: ``check/<type>`` in the registry.

A check is ``async (address, port, timeout) -> bool``; its weight, period and patience are the Site's (``probing.py``).
None is run unless a Site asks for it. The command line reads this file for the names alone, so what only a check needs
is imported where it runs.
"""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

from edgeward.core.registry import extensions

if TYPE_CHECKING:
    import asyncio


async def tcp(address: str, port: int, timeout: float) -> bool:
    """Whether a connection to the port opens."""
    import asyncio

    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1.0):
            await writer.wait_closed()
    return True


async def http(address: str, port: int, timeout: float) -> bool:
    """Whether ``GET /`` on the port is answered with a status below 500."""
    import asyncio

    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(address, port)
            host = f"[{address}]" if ":" in address else address
            writer.write(f"GET / HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
            line = await reader.readline()
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        if writer is not None:
            writer.close()
    words = line.split()
    return len(words) > 1 and words[0].startswith(b"HTTP/1.") and words[1].isdigit() and int(words[1]) < 500


async def ping(address: str, port: int, timeout: float) -> bool:
    """Whether the machine answers an ICMP echo: by the system's ``ping``, which may send one without our being root."""
    import asyncio

    program = shutil.which("ping")
    if program is None:
        return False
    wait = str(max(1, round(timeout)))
    child = await asyncio.create_subprocess_exec(
        program, "-n", "-q", "-c", "1", "-W", wait, address,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout + 1.0):
            return await child.wait() == 0
    except TimeoutError:
        return False
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


if "tcp" not in extensions.names("check"):
    extensions.add("check", "tcp", tcp)
    extensions.add("check", "http", http)
    extensions.add("check", "ping", ping)
