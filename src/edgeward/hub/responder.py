"""The DNS responder of steering: UDP and TCP on one port, a bound for each source, and answers that are kept.

Bytes come in and go out; what they say is decided in ``gateway/dnszone.py``. Answers are kept until anything changes
that they were made of, so that most queries cost a look-up; those made for who asked are kept for that one alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from edgeward.core import clock
from edgeward.core.throttle import Throttle, source_of
from edgeward.gateway import dnswire
from edgeward.gateway.dnszone import Zone, respond
from edgeward.gateway.steer import Steering

#: Answers that are kept, and the longest query whose answer is.
_KEPT, _KEPT_QUERY = 8192, 256
#: Over TCP: connections, queries on one, bytes of a query, seconds of silence.
_CONNECTIONS, _QUERIES, _QUERY, _SILENCE = 64, 64, 1024, 10.0


class Responder:
    """Messages in, answers out, for both transports. ``now`` gives what is known of the sites at present."""

    def __init__(self, zone: Zone, now: Callable[[], Steering], rate: float) -> None:
        self.zone, self._now = zone, now
        self._throttle = Throttle(burst=rate, rate=rate)
        self._of: Steering | None = None
        self._kept: dict[Any, bytes] = {}
        self.counts: Counter[str] = Counter()

    def udp(self, data: bytes, host: str, now: float) -> bytes | None:
        if self._throttle.take(host if "." in host and ":" not in host else source_of(host), now):
            return self._too_many(data)
        steering = self._now()
        if steering is not self._of:
            self._of = steering
            self._kept.clear()
        asked = data[2:]
        kept = self._kept.get(asked) or self._kept.get((asked, host))
        if kept is not None:
            self.counts["udp"] += 1
            return data[:2] + kept
        answer, mine = respond(data, host, self.zone, steering.steer)
        if answer is None:
            self.counts["dropped"] += 1
            return None
        self.counts["udp"] += 1
        if len(data) <= _KEPT_QUERY:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[(asked, host) if mine else asked] = answer[2:]
        return answer

    def _too_many(self, data: bytes) -> bytes | None:
        """Every other one is told to come by TCP, where it has to be who it says: who is real gets through."""
        self.counts["over"] += 1
        query = dnswire.parse(data) if self.counts["over"] % 2 else None
        if query is None:
            return None
        return dnswire.answer(query, query.fault, limit=0)

    def tcp(self, data: bytes, host: str) -> bytes | None:
        self.counts["tcp"] += 1
        return respond(data, host, self.zone, self._now().steer, udp=False)[0]


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, responder: Responder) -> None:
        self._responder, self._full = responder, False
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def pause_writing(self) -> None:
        self._full = True  # what the kernel does not take is not heaped up

    def resume_writing(self) -> None:
        self._full = False

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        if self._full or not addr[1]:
            return
        answer = self._responder.udp(data, addr[0], clock.monotonic())
        if answer is not None:
            self._transport.sendto(answer, addr)


class DnsServer:
    """UDP and TCP on one port."""

    def __init__(self, responder: Responder) -> None:
        self._responder = responder
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None
        self._open: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self.address: tuple[str, int] = ("", 0)

    async def open(self, host: str, port: int) -> None:
        """Raises ``OSError`` where it may not listen."""
        for left in reversed(range(1 if port else 8)):  # a port that is free for TCP may be another's for UDP
            self._tcp = await asyncio.start_server(self._connection, host, port, limit=_QUERY * 2)
            self.address = self._tcp.sockets[0].getsockname()[:2]
            loop = asyncio.get_running_loop()
            try:
                self._udp, _ = await loop.create_datagram_endpoint(
                    lambda: _Udp(self._responder), local_addr=self.address
                )
                return
            except OSError:
                self._tcp.close()
                if not left:
                    raise

    async def close(self) -> None:
        if self._udp is not None:
            self._udp.close()
        if self._tcp is not None:
            self._tcp.close()
        for writer in self._open.values():
            writer.transport.abort()  # the end of what it reads ends its task; a cancelled one Python 3.11 complains of
        if self._open:
            await asyncio.wait(tuple(self._open), timeout=_SILENCE)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._open) >= _CONNECTIONS:
            writer.close()
            return
        self._open[task] = writer
        try:
            host = str(writer.get_extra_info("peername")[0])
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                for _ in range(_QUERIES):
                    async with asyncio.timeout(_SILENCE):
                        if not await self._one(reader, writer, host):
                            break
        finally:
            del self._open[task]
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> bool:
        length = int.from_bytes(await reader.readexactly(2), "big")
        if length > _QUERY:
            return False
        answer = self._responder.tcp(await reader.readexactly(length), host)
        if answer is None:
            return False
        writer.write(len(answer).to_bytes(2, "big") + answer)
        await writer.drain()
        return True
