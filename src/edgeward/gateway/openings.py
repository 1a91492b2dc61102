"""Declared Listeners at work: sockets, handshakes, and what the agent is told of them.

Unlike the port of ``node.json`` a Listener that cannot be opened stops nothing: its status says why, the others and all
Routes go on, and it is tried again. A handshake is taken by the certificates of its moment. How many may be in progress
is bounded; when more come, the oldest one, which is the slowest, makes room.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from edgeward.core import clock
from edgeward.gateway.door import Door
from edgeward.gateway.guests import KEY
from edgeward.gateway.listens import ListenerConfig
from edgeward.gateway.tls import Front, Shown, Unseal, protocol_of

if TYPE_CHECKING:
    from edgeward.gateway.gate import Gate

log = logging.getLogger("edgeward.gateway")

#: Handshakes in progress at a listener, and the seconds that one may take.
HANDSHAKES, HANDSHAKE_TIME = 512, 10.0
#: Seconds that a client has to read the last words, while what it still sends is thrown away.
SHUTDOWN_TIME = 2.0
#: Connections taken in one turn, and seconds until a listener that cannot be opened is tried again.
AT_ONCE, AGAIN = 64, 5.0
_BACKLOG = 1024


def bind(config: ListenerConfig) -> socket.socket:
    """A socket that listens there. Raises ``OSError``."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((config.host, config.port))
        made.listen(_BACKLOG)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made


class Lobby(asyncio.Protocol):
    """A connection whose handshake is over: the protocol that was agreed on takes it."""

    def __init__(self, gate: Gate, opening: Opening) -> None:
        self._gate, self._opening = gate, opening

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast(asyncio.Transport, transport)
        protocol, peer = protocol_of(made.get_extra_info("ssl_object"))
        door: Any
        if protocol == "h2":
            from edgeward.gateway.h2door import H2Door  # some megabytes that a node without HTTP/2 does not need

            door = H2Door(self._gate, self._opening, peer)
        else:
            door = Door(self._gate, self._opening, peer)
        made.set_protocol(door)
        door.connection_made(made)


class Opening:
    """One listener. It is changed in place: connections that came by it see what it is now."""

    def __init__(self, gate: Gate, config: ListenerConfig) -> None:
        self._gate = gate
        self.config = config
        self.front: Front | None = None
        self.sock: socket.socket | None = None
        self.problem = ""
        self.handshakes = self.failed = 0
        self._accepting = False
        self._pending: dict[asyncio.Task[None], None] = {}

    @property
    def redirect(self) -> int:
        return self.config.redirect

    def takes(self, host: str) -> bool:
        """Whether requests for that host are answered here (421 if not)."""
        return self.config.guests or self.front is None or self.front.takes(host)

    def open(self) -> None:
        """Listens, where that is possible now and there is something to show."""
        if self.config.refused or (self.front is not None and self.front.context is None):
            self.close()
            return
        if self.sock is None:
            try:
                self.sock = bind(self.config)
                self.problem = ""
            except OSError as e:
                self.problem = "is in use" if e.errno == errno.EADDRINUSE else (e.strerror or str(e))
                return
        self._accept_on()

    def _accept_on(self) -> None:
        if self.sock is not None and not self._accepting:
            self._accepting = True
            self._gate.loop.add_reader(self.sock.fileno(), self._accept)

    def _accept_off(self) -> None:
        if self.sock is not None and self._accepting:
            self._accepting = False
            self._gate.loop.remove_reader(self.sock.fileno())

    def close(self) -> None:
        """Takes nobody in any more; who is in stays."""
        self._accept_off()
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        for task in tuple(self._pending):
            task.cancel()

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            if self.sock is None:
                return
            try:
                client, _address = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as e:  # no descriptors are left: a turn later there may be some
                log.warning("%s takes no connections for a moment: %s", self.config.address, e)
                self._accept_off()
                self._gate.loop.call_later(0.5, self._accept_on)
                return
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the loop does so for servers of its own only
            task = self._gate.run_task(self._welcome(client))
            self._pending[task] = None
            task.add_done_callback(lambda t: self._pending.pop(t, None))
            if len(self._pending) > HANDSHAKES:
                next(iter(self._pending)).cancel()

    async def _welcome(self, client: socket.socket) -> None:
        gate, loop, front = self._gate, self._gate.loop, self.front
        try:
            if front is None:
                await loop.connect_accepted_socket(lambda: Door(gate, self), client)
            elif front.context is not None:
                self.handshakes += 1
                await loop.connect_accepted_socket(
                    lambda: Lobby(gate, self), client, ssl=front.context,
                    ssl_handshake_timeout=HANDSHAKE_TIME, ssl_shutdown_timeout=SHUTDOWN_TIME,
                )  # fmt: skip
        except (OSError, TimeoutError, ssl.SSLError, asyncio.CancelledError) as e:
            self.failed += 1
            client.close()
            if isinstance(e, asyncio.CancelledError):
                raise

    # -- what is said ------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        config, front = self.config, self.front
        said: dict[str, Any] = {"phase": "Ready", "address": config.address}
        if config.refused:
            said |= {"phase": "Refused", "message": config.refused}
        elif self.problem:
            said |= {"phase": "Failed", "message": f"cannot listen on {config.address}: it {self.problem}"}
        if front is None:
            return said
        said["certificates"] = [
            {"source": s.config.source, "hosts": list(s.config.hosts), "ends": clock.timestamp(s.config.ends)}
            | ({"message": problem} if (problem := self._problem(s)) else {})
            for s in front.shown
        ] + [{"source": c.source, "hosts": list(c.hosts), "message": why} for c, why in front.missing]
        bad = [f"{c['source']} {c['message']}" for c in said["certificates"] if "message" in c]
        if bad and said["phase"] == "Ready":
            phase = "Degraded" if front.context is not None else "Pending"
            said |= {"phase": phase, "message": "; ".join(bad)}
        return said

    @staticmethod
    def _problem(shown: Shown) -> str:
        return shown.problem or ("has ended: clients refuse it" if shown.config.ends <= clock.now() else "")


class Openings:
    """All of a node's."""

    def __init__(self, gate: Gate, unseal: Unseal) -> None:
        self._gate, self._unseal = gate, unseal
        self._open: dict[str, Opening] = {}
        self._again: asyncio.TimerHandle | None = None
        #: Why the guests' door is not open, as it was said last.
        self._closed = ""

    def commit(self, configs: Sequence[ListenerConfig]) -> None:
        """From here on these. Addresses that are given up are closed before others are opened."""
        wanted = {c.key: c for c in configs}
        for key, opening in list(self._open.items()):
            config = wanted.get(key)
            if config is None or config.address != opening.config.address:
                opening.close()
            if config is None:
                del self._open[key]
                self._gate.retire(opening)
                self._say(key, None)
        for key, config in wanted.items():
            opening = self._open.get(key) or Opening(self._gate, config)
            self._open[key] = opening
            if (
                opening.config.tls is None
                or config.tls is None
                or opening.front is None
                or opening.config.tls != config.tls
            ):
                old = opening.front
                opening.front = Front(key, config.tls, self._unseal, old) if config.tls is not None else None
            opening.config = config
        self._try()

    def _try(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        for key, opening in self._open.items():
            opening.open()
            self._say(key, opening.status())
        if any(o.problem and not o.config.refused for o in self._open.values()):
            self._again = self._gate.loop.call_later(AGAIN, self._try)

    def _say(self, key: str, status: dict[str, Any] | None) -> None:
        if key == KEY:  # no declared one: what it says is an event
            now = status.get("message", "") if status is not None and status["phase"] != "Ready" else ""
            if now and now != self._closed:
                self._gate.voice.event("Warning", "DoorClosed", f"other sites cannot ask: {now}", "", "", "Node")
            self._closed = now
            return
        namespace, _, name = key.partition("/")
        self._gate.voice.report("Listener", namespace, name, status)

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        for opening in self._open.values():
            opening.close()

    def metrics(self) -> dict[str, float]:
        p, values = "edgeward_gateway_", dict[str, float]()
        for key, opening in self._open.items():
            if opening.front is None:
                continue
            values[f'{p}handshakes_total{{listener="{key}"}}'] = float(opening.handshakes)
            values[f'{p}handshakes_failed_total{{listener="{key}"}}'] = float(opening.failed)
            for shown in opening.front.shown:
                name = f'listener="{key}",source="{shown.config.source}"'
                values[f"{p}certificate_end_seconds{{{name}}}"] = shown.config.ends
        return values
