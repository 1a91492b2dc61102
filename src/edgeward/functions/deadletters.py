"""Messages that no call answered: kept on the node with the reason, until somebody tries them again or drops them.

They lie in a stream of the node's nats-server, one subject for each function, bounded: the oldest go first. A letter
holds the event as the handler got it (a batch's messages one by one). Nothing here decides what becomes one.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, TooLarge, Unreachable
from edgeward.core.invocation import Call, CallFailed, Event, Reply
from edgeward.core.jsread import read_batch
from edgeward.functions.triggers import DEAD, DEAD_STREAM, Taking

#: Bytes of all functions' letters on a node, letters of one function.
MAX_BYTES, MAX_LETTERS = 64 << 20, 1000
_READ = 64
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Event).decode
_ASCII = str.maketrans(dict.fromkeys(range(32), " "))

CONFIG = StreamConfig(
    name=DEAD_STREAM,
    subjects=[f"{DEAD}.>"],
    retention=RetentionPolicy.LIMITS,
    discard=DiscardPolicy.OLD,
    storage=StorageType.FILE,
    max_bytes=MAX_BYTES,
    max_msgs_per_subject=MAX_LETTERS,
    allow_direct=True,
    num_replicas=1,
)


def subject_of(key: str) -> str:
    return f"{DEAD}.{key.replace('/', '.')}"


class DeadLetters:
    """``bus`` may write and read the stream, which is there."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def keep(self, key: str, plan: Taking, event: Event, tries: int, error: CallFailed) -> None:
        """Done when it is kept. Raises ``EdgewardError``."""
        headers = {
            "Nats-Msg-Id": event.id,  # kept, but the acknowledgement was lost: not a second time
            "Ew-Reason": f"{error.kind}: {error.message}".translate(_ASCII).encode("ascii", "replace").decode()[:1000],
            "Ew-Tries": str(tries),
            "Ew-At": clock.timestamp(),
            "Ew-Trigger": plan.kind,
        }
        try:
            await self._bus.publish_acked(subject_of(key), _encode(event), headers=headers)
        except TooLarge:
            # at the bound of what the broker takes there is no room for the reason beside it
            headers["Ew-Reason"] += f" (its data, {len(event.data)} bytes, was too large to keep)"
            short = msgspec.structs.replace(event, data=b"")
            await self._bus.publish_acked(subject_of(key), _encode(short), headers=headers)

    async def counts(self) -> dict[str, int]:
        """Letters of each function that has some."""
        try:
            info = await self._bus.jetstream().stream_info(DEAD_STREAM, subjects_filter=f"{DEAD}.>")
        except nats.js.errors.NotFoundError:
            return {}
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the node's nats-server does not answer ({type(e).__name__})") from e
        found = info.state.subjects or {}
        return {s.removeprefix(f"{DEAD}.").replace(".", "/", 1): int(n) for s, n in found.items()}

    async def letters(self, key: str) -> AsyncIterator[tuple[int, Event, dict[str, str]]]:
        """(sequence, event, headers), oldest first: those that are there when it begins."""
        at, subject = 1, subject_of(key)
        last = await self._bus.last_message(DEAD_STREAM, subject)
        while last is not None and at <= last.seq:
            got = await read_batch(self._bus.client, "$JS.API", DEAD_STREAM, at, subject, _READ)
            if not got:
                return
            for seq, _, headers, data in got:
                with contextlib.suppress(msgspec.DecodeError):
                    yield seq, _decode(data), headers
            at = got[-1][0] + 1

    async def forget(self, seq: int) -> None:
        try:
            await self._bus.jetstream().delete_msg(DEAD_STREAM, seq)
        except nats.js.errors.NotFoundError:
            return
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the node's nats-server does not answer ({type(e).__name__})") from e


async def listed(
    letters: DeadLetters, key: str, do: str, invoke: Callable[[Call], Awaitable[Reply]]
) -> AsyncIterator[dict[str, Any]]:
    """What ``edgeward functions deadletters`` shows, a document a letter; ``do``: list, replay or drop."""
    async for seq, event, headers in letters.letters(key):
        doc: dict[str, Any] = {
            "id": event.id,
            "type": event.type,
            "subject": event.subject,
            "time": event.time,
            "at": headers.get("Ew-At", ""),
            "tries": int(headers.get("Ew-Tries", "0")),
            "bytes": len(event.data),
            "reason": headers.get("Ew-Reason", ""),
            "outcome": "kept",
        }
        if do == "list":  # who may call it again or drop it may perhaps not read what it was
            doc["data"] = event.data[:200].decode("utf-8", "replace")
        elif do == "replay":
            why = await _again(invoke, key, event)
            doc |= {"outcome": "kept", "reason": why} if why else {"outcome": "answered"}
        elif do == "drop":
            doc["outcome"] = "dropped"
        if doc["outcome"] != "kept":
            await letters.forget(seq)
        yield doc


async def _again(invoke: Callable[[Call], Awaitable[Reply]], key: str, event: Event) -> str:
    """Why it failed once more; empty: it did not."""
    try:
        reply = await invoke(Call(key, event))
        if reply.chunks is not None:
            async for _ in reply.chunks:
                pass
    except EdgewardError as e:
        return e.message
    return f"answered with status {reply.status}" if reply.status >= 400 else ""
