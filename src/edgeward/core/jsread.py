"""Batched direct reads of a JetStream stream from a sequence on: no consumer, no state at the server.

A reader that keeps its own position survives every restart of the server by asking again from there.
"""

from __future__ import annotations

import contextlib
from datetime import datetime

import msgspec
import nats.errors
from nats.aio.client import Client

from edgeward.core.bus import cancellable
from edgeward.core.errors import Unreachable

_LOCAL = "ew.local"
#: (sequence, subject, headers, data)
Message = tuple[int, str, dict[str, str], bytes]


async def read_batch(
    client: Client, api: str, stream: str, seq: int, subject: str, batch: int, *, timeout: float = 5.0
) -> list[Message]:
    """Up to ``batch`` messages with sequence >= ``seq`` on ``subject`` (wildcards allowed); [] at the end.

    ``api``: the JetStream API prefix, e.g. ``$JS.API`` or ``$JS.hub.API``. The stream must allow direct reads.
    Raises ``Unreachable`` when nothing answers in time.
    """
    inbox = client.new_inbox()
    if api == "$JS.API":
        # this server's own stream: at a node an inbox is a subject that crosses the link, and each read would send the
        # subscription to it and its end over it; devices may not listen here either
        inbox = f"{_LOCAL}.{inbox.rsplit('.', 1)[1]}"
    sub = await client.subscribe(inbox, pending_msgs_limit=batch + 8, pending_bytes_limit=64 * 1024 * 1024)
    try:
        ask = {"seq": max(1, seq), "next_by_subj": subject, "batch": batch, "max_bytes": 4 * 1024 * 1024}
        await client.publish(f"{api}.DIRECT.GET.{stream}", msgspec.json.encode(ask), reply=inbox)
        got: list[Message] = []
        while True:
            msg = await cancellable(sub.next_msg(timeout=timeout))
            headers = msg.headers or {}
            status = headers.get("Status")
            if status in ("404", "204"):
                return got
            if status:
                raise Unreachable(f"stream {stream} answered {status} {headers.get('Description', '')}")
            got.append((int(headers["Nats-Sequence"]), headers["Nats-Subject"], headers, msg.data))
    except nats.errors.TimeoutError as e:
        raise Unreachable(f"stream {stream} does not answer", remedy="is the NATS server up?") from e
    finally:
        with contextlib.suppress(nats.errors.Error):
            await sub.unsubscribe()


def stamp_of(headers: dict[str, str]) -> int:
    """Nanoseconds of a direct read's ``Nats-Time-Stamp`` (RFC 3339 with up to nine decimals)."""
    text = headers["Nats-Time-Stamp"].removesuffix("Z")
    whole, _, fraction = text.partition(".")
    seconds = int(datetime.fromisoformat(whole + "+00:00").timestamp())
    return seconds * 1_000_000_000 + int(fraction.ljust(9, "0")[:9] or 0)
