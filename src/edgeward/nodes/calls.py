"""Calls from the hub to a node that answer with a stream of bytes: logs, usage.

The hub publishes ``ew.node.<node>.call.<verb>`` with a reply subject of that node's own; the node sends each piece as a
*request* on it and waits for the answer before the next one. So a slow reader slows the sender, nothing piles up in
between, and a caller that went away (no responders) ends the stream within one piece. An empty piece is the end. A
``Piece`` comes with its mark, by which a handler that knows ``after`` goes on behind it for a caller that asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from edgeward.core import clock
from edgeward.core.bus import cancellable
from edgeward.core.errors import EdgewardError, Unreachable, from_problem
from edgeward.core.streaming import Piece

log = logging.getLogger("edgeward.calls")

Handler = Callable[[dict[str, Any]], AsyncIterator[bytes]]
#: Calls a node serves at once.
_AT_ONCE = 32
#: Seconds without a piece after which a mark finds out whether somebody still listens.
_IDLE = 5.0
#: How long a node waits until its piece is taken.
_TAKEN = 20.0
#: How long a caller waits for the next piece or mark.
_SILENCE = 15.0


async def call(
    client: Client, node: str, verb: str, args: dict[str, Any], *, timeout: float = 10.0
) -> AsyncIterator[bytes]:
    """The node's answer, piece by piece. Raises what the node raised, ``Unreachable`` when it does not answer."""
    reply = f"ew.hub.reply.{node}.{clock.new_id(16)}"
    sub = await client.subscribe(reply, pending_msgs_limit=4)
    try:
        await client.publish(f"ew.node.{node}.call.{verb}", msgspec.msgpack.encode(args), reply=reply)
        wait = timeout
        while True:
            try:
                msg = await cancellable(sub.next_msg(timeout=wait))
            except nats.errors.TimeoutError as e:
                raise Unreachable(
                    f"node {node} does not answer",
                    resource=f"Node/{node}",
                    remedy="is its link up? see: edgeward get node",
                ) from e
            wait = _SILENCE
            headers = msg.headers or {}
            if "Status" in headers and not msg.data:
                raise Unreachable(f"node {node} is not connected", resource=f"Node/{node}")
            await msg.respond(b"")
            if "Ew-Error" in headers:
                raise from_problem(msgspec.json.decode(msg.data))
            if "Ew-Idle" in headers:
                continue
            if not msg.data:
                return
            mark = msgspec.json.decode(headers["Ew-Mark"], type=dict[str, str]) if "Ew-Mark" in headers else None
            yield msg.data if mark is None else Piece(msg.data, mark)
    finally:
        with contextlib.suppress(nats.errors.Error):
            await sub.unsubscribe()


class CallServer:
    """Serves calls on a node until its :meth:`run` is cancelled."""

    def __init__(self, node: str, handlers: dict[str, Handler]) -> None:
        self._node = node
        self._handlers = handlers
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def run(self, client: Client) -> None:
        async with asyncio.TaskGroup() as group:

            async def called(msg: Msg) -> None:
                group.create_task(self._serve(client, msg))

            await client.subscribe(f"ew.node.{self._node}.call.*", cb=called, pending_msgs_limit=100)
            await asyncio.Event().wait()

    async def _send(self, client: Client, reply: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        await client.request(reply, data, timeout=_TAKEN, headers=headers)

    async def _serve(self, client: Client, msg: Msg) -> None:
        verb = msg.subject.rsplit(".", 1)[1]
        try:
            if self._slots.locked():
                raise EdgewardError("the node serves too many calls at once", remedy="try again later")
            async with self._slots:
                handler = self._handlers.get(verb)
                if handler is None:
                    raise EdgewardError(f"this node knows no call {verb!r}", remedy="upgrade the node's agent")
                pieces = handler(msgspec.msgpack.decode(msg.data))
                async with contextlib.aclosing(pieces):  # type: ignore[type-var]
                    await self._pump(client, msg.reply, pieces)
                await self._send(client, msg.reply, b"")
        except EdgewardError as e:
            await self._refuse(client, msg.reply, e)
        except (nats.errors.Error, TimeoutError, msgspec.DecodeError) as e:
            log.debug("call %s ended: %s", verb, e or type(e).__name__)
        except Exception:
            log.exception("call %s failed", verb)
            await self._refuse(client, msg.reply, EdgewardError("the call failed; the agent's log says why"))

    async def _refuse(self, client: Client, reply: str, error: EdgewardError) -> None:
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await self._send(client, reply, msgspec.json.encode(error.problem()), {"Ew-Error": "1"})

    async def _pump(self, client: Client, reply: str, pieces: AsyncIterator[bytes]) -> None:
        """Sends pieces; while there is none, an idle mark now and then finds out whether somebody still listens."""
        following = asyncio.ensure_future(anext(pieces, b""))
        try:
            while True:
                done, _ = await asyncio.wait({following}, timeout=_IDLE)
                if not done:
                    await self._send(client, reply, b"", {"Ew-Idle": "1"})
                    continue
                piece = following.result()
                if not piece:
                    return
                for at in range(0, len(piece), 65536):
                    last = at + 65536 >= len(piece)
                    mark = getattr(piece, "mark", None) if last else None
                    headers = {"Ew-Mark": msgspec.json.encode(mark).decode()} if mark else None
                    await self._send(client, reply, piece[at : at + 65536], headers)
                following = asyncio.ensure_future(anext(pieces, b""))
        finally:
            if not following.done():
                following.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await following
