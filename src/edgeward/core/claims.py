"""Account JWTs into a running nats-server: in goes what the hub signed, out comes the server's word that it holds.

A push takes effect at once and cuts the connections of keys that the new JWT revokes; nothing is reloaded, nobody else
notices. In a cluster the servers hand it to one another. What an account may do is decided in ``core/identity.py``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path

from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.nkeys import claims_of

_AT_ONCE = 32
_TIMEOUT = 5.0


class Claims:
    """``system``: a connection as the system account's user. ``directory``: the server's own copy, where it is here."""

    def __init__(self, system: Bus, directory: Path | None = None) -> None:
        self._system = system
        self._directory = directory

    async def push(self, jwt: str) -> None:
        """Raises ``Unreachable`` when the server does not answer, ``EdgewardError`` when it refuses."""
        msg = await self._system.request("$SYS.REQ.CLAIMS.UPDATE", jwt.encode(), timeout=_TIMEOUT)
        try:
            doc = json.loads(msg.data)
            code = int((doc.get("data") or {}).get("code", 0))
        except (ValueError, AttributeError, TypeError):
            code, doc = 0, {}
        if code != 200:
            why = (doc.get("error") or {}).get("description") or "it did not say why"
            raise EdgewardError(f"nats-server did not take an account: {why}", remedy="see the hub's nats.log")

    def missing(self, jwts: Iterable[str]) -> list[str]:
        """Those that the server does not have in this form."""
        if self._directory is None:
            return list(jwts)
        found = []
        for jwt in jwts:
            file = self._directory / f"{claims_of(jwt)['sub']}.jwt"
            try:
                present = file.read_text()
            except (OSError, UnicodeDecodeError):
                present = ""
            if present != jwt:
                found.append(jwt)
        return found

    async def bring(self, jwts: Iterable[str], *, patience: float = 30.0) -> int:
        """Has the server know all of them; how many were new to it."""
        wanted = self.missing(jwts)
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(jwt: str) -> None:
            async with slots:
                while True:
                    try:
                        await self.push(jwt)
                        return
                    except Unreachable:
                        await asyncio.sleep(0.1)  # the pace of asking while the server starts

        try:
            async with asyncio.timeout(patience), asyncio.TaskGroup() as group:
                for jwt in wanted:
                    group.create_task(one(jwt))
        except TimeoutError:
            raise Unreachable(f"nats-server took no accounts for {patience:g} s", remedy="see nats.log") from None
        return len(wanted)
