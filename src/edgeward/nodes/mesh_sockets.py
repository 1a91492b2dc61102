"""Where the mesh listens: what ``node.json`` says of it, and the sockets made from that.

One port number for datagrams and connections, on one address of the node. The group of the multicast is heard on that
address's network only.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import msgspec

from edgeward.core.errors import Invalid
from edgeward.nodes.mesh_wire import Address, address_of

#: Where nodes that do not know of one another's place are called, within one network (RFC 2365, 6.1).
GROUP: Address = ("239.255.69.87", 26987)
_REMEDY = "write ADDRESS:PORT, or nothing for a port of its own choice"
_ALL = ("0.0.0.0", "::", "")  # noqa: S104 - compared, not bound
_IP_MULTICAST_ALL = 49


class Settings(msgspec.Struct, frozen=True):
    """``mesh`` of ``node.json``. ``host``: empty for nowhere; ``port`` 0: one of its own choice, kept."""

    host: str
    port: int = 0
    #: What the others are told instead of ``host``.
    address: str = ""
    #: Why what is written cannot be done.
    problem: str = ""
    #: Whether those whose place is not known are called by multicast.
    multicast: bool = False


def settings_of(given: Any, bind: str, address: str) -> Settings:
    """What ``node.json`` says under ``mesh``. A mistake there is told and stops nothing but the mesh."""
    config = given if isinstance(given, dict) else {}
    listen, called = config.get("listen"), config.get("multicast") is True
    if listen is None:
        return Settings(bind, 0, address, multicast=called)
    if listen == "":
        return Settings("")
    at = address_of(listen)
    if at is None:
        wrong = f"{str(listen)[:80]!r} is no address"
        return Settings("", problem=str(Invalid(wrong, file="node.json", field="$.mesh.listen", remedy=_REMEDY)))
    return Settings(at[0], at[1], address if at[0] in _ALL else at[0], multicast=called)


class Datagrams(asyncio.DatagramProtocol):
    def __init__(self, received: Callable[[bytes, Address], None], lost: asyncio.Future[None]) -> None:
        self._received, self._lost = received, lost

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self._received(data, (str(addr[0]), int(addr[1])))

    def error_received(self, exc: Exception) -> None:
        """A peer's machine says that nobody listens there: as good as silence."""

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._lost.done():
            self._lost.set_result(None)


def both(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tcp = socket.socket(family, socket.SOCK_STREAM)
    udp = socket.socket(family, socket.SOCK_DGRAM)
    try:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for sock in (tcp, udp):
            sock.setblocking(False)
            sock.bind((host, port))
        tcp.listen(64)
    except BaseException:
        tcp.close()
        udp.close()
        raise
    return udp, tcp


def joined(host: str, udp: socket.socket) -> socket.socket:
    """A socket that hears the group on the network of ``host`` and nothing else; ``udp`` sends to it there."""
    here = socket.inet_aton(host)
    udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
    udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(GROUP)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP[0]) + here)
        with contextlib.suppress(OSError):  # Linux: not what others of this machine joined on other networks
            sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
    except BaseException:
        sock.close()
        raise
    return sock
