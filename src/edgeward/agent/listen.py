"""The agent's API for those at the site who are not the machine's owner: HTTPS with a token, off unless asked for.

``node.json`` names the address (``"api": {"listen": "192.0.2.10:8443"}``). The certificate is the node's own, from its
enrolment, for NAME.node.edgeward.internal; who trusts the hub's CA trusts it. Nobody is let in without an AccessToken
that is meant for this site. A new certificate is taken into use at once; connections that are open then end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from edgeward.core import daemon
from edgeward.core.errors import Invalid, Unauthorized
from edgeward.core.identity import NodeIdentity

log = logging.getLogger("edgeward.listen")
_AGAIN = 5.0


def address_of(config: Any, what: str = "api") -> tuple[str, int] | None:
    """Where to listen; None: nowhere. Raises ``Invalid``."""
    listen = config.get("listen", "") if isinstance(config, dict) else ""
    if not listen:
        return None
    host, _, port = str(listen).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise Invalid(f"{str(listen)[:80]!r} is no address", field=f"$.{what}.listen", remedy="write ADDRESS:PORT")
    return host.strip("[]"), int(port)


def needs_token(token: str | None) -> str:
    """The token, where there is no owner who could do without."""
    if not token:
        raise Unauthorized("the token is missing", remedy="get one: edgeward token create --role ROLE --sites SITE")
    return token


class Listener:
    def __init__(self, identity: NodeIdentity, address: tuple[str, int], say: Callable[[], None]) -> None:
        self._identity, self._say = identity, say
        self._host, self._port = address
        self._renewed = asyncio.Event()
        #: Where it listens now; empty before there is a certificate.
        self.url = ""

    def renewed(self) -> None:
        """There is a new certificate."""
        self._renewed.set()

    async def run(self, app: Any) -> None:
        """Listens until cancelled."""
        while True:
            self._renewed.clear()
            if not self._identity.certificate:
                log.info("the API waits for this node's certificate before it listens on %s", self._host)
                await self._renewed.wait()
                continue
            pem = str(self._identity.tls_file)
            try:
                async with daemon.http_server(app, host=self._host, port=self._port, ssl_certfile=pem, ssl_keyfile=pem):
                    host = f"[{self._host}]" if ":" in self._host else self._host
                    self.url = f"https://{host}:{self._port}"
                    self._say()
                    await self._renewed.wait()
            except OSError as e:
                log.warning("the API cannot listen on %s: %s", self._host, e)
                await asyncio.sleep(_AGAIN)  # the back-off: the address may come with its network
            finally:
                self.url = ""
