"""A knock at the node's MQTT listener: nats-server makes its streams for MQTT when the first client comes."""

from __future__ import annotations

import asyncio

from edgeward.core.errors import EdgewardError, Unreachable


async def wake_broker(
    host: str, port: int, user: str, password: str, timeout: float = 10.0, client: str = "edgeward-agent"
) -> None:
    """Connects once by MQTT 3.1.1, so that the broker makes its streams; then leaves."""

    def text(s: str) -> bytes:
        data = s.encode()
        return len(data).to_bytes(2, "big") + data

    body = text("MQTT") + bytes([4, 0xC2]) + (30).to_bytes(2, "big") + text(client) + text(user) + text(password)
    packet = bytes([0x10, len(body)]) + body
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(packet)
                answer = await reader.readexactly(4)
                writer.write(bytes([0xE0, 0]))
                await writer.drain()
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as e:
        raise Unreachable(f"the node's MQTT listener does not answer: {e or type(e).__name__}") from e
    if answer[3] != 0:
        raise EdgewardError(f"the node's MQTT listener refused {user} (code {answer[3]})")
