"""The lab's control socket: ``lab cut plant`` in another terminal reaches the running lab by ``DIR/lab.sock``.

One JSON object a line in, one out: ``{"verb": "cut", "args": {"site": "plant"}}`` gives ``{"result": ...}`` or
``{"error": {problem}}``. The socket is for the owner only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from edgeward.core.daemon import socket_path
from edgeward.core.errors import EdgewardError, Invalid, Unreachable, from_problem

Verb = Callable[[dict[str, Any]], Awaitable[Any]]
_LIMIT = 1 << 20


@contextlib.asynccontextmanager
async def serve(directory: Path, verbs: dict[str, Verb]) -> AsyncIterator[None]:
    """Serves the verbs inside the block."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(120):
                line = await reader.readline()
                answer: dict[str, Any]
                try:
                    ask = json.loads(line)
                    verb = verbs.get(ask["verb"])
                    if verb is None:
                        raise Invalid(
                            f"the lab knows no {ask['verb']!r}", remedy=f"it knows: {', '.join(sorted(verbs))}"
                        )
                    answer = {"result": await verb(ask.get("args", {}))}
                except EdgewardError as e:
                    answer = {"error": e.problem()}
                except (ValueError, KeyError, TypeError) as e:
                    answer = {"error": Invalid(f"not understood: {e}").problem()}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, OSError):
            pass  # the asker went away
        finally:
            writer.close()

    path = socket_path(directory, "lab.sock")
    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(talk, path, limit=_LIMIT)
    path.chmod(0o600)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def ask(directory: Path, verb: str, timeout: float = 120.0, **args: Any) -> Any:
    """Asks the lab that runs from ``directory``; raises what it raised, ``Unreachable`` when none runs there."""
    path = socket_path(directory, "lab.sock")
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(timeout)
            s.connect(os.fspath(path))
            s.sendall(json.dumps({"verb": verb, "args": args}).encode() + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                piece = s.recv(65536)
                if not piece:
                    break
                data += piece
    except OSError as e:
        raise Unreachable(
            f"no lab runs from {directory} ({e.strerror or e})", remedy="start one with: edgeward lab up -f FILE"
        ) from None
    answer = json.loads(data or b"{}")
    if "error" in answer:
        raise from_problem(answer["error"])
    return answer.get("result")
