"""Two ends of a stream, for tests of services: what lies between them is a session in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from edgeward.core.errors import EdgewardError
from edgeward.tunnel.session import Open, Stream, pair


async def ends(purpose: Open | None = None) -> tuple[Stream, Stream]:
    """The operator's and the node's."""
    came: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()
    one, _ = pair(came.set_result)
    return one.open_for(purpose or Open("test")), await came


async def served(
    service: Callable[[Open, Stream], Awaitable[None]], purpose: Open
) -> tuple[Stream, asyncio.Task[None]]:
    """The operator's end of a stream that is served, as ``edge.py`` does it; and the service."""
    here, there = await ends(purpose)

    async def serve() -> None:
        try:
            await service(there.purpose, there)
        except EdgewardError as e:
            there.fail(e)

    return here, asyncio.create_task(serve())
