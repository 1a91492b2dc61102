"""A node's link as its kernel sees it: what it carries, whether it is there, whether it is stuck.

In: the hub's port. Out: for every TCP connection to it the counters of ``struct tcp_info`` (linux/tcp.h), asked of the
kernel by netlink (sock_diag(7)), which needs no rights. The bytes on the link are the stream's, TLS and repeats
included, plus the headers of every packet. :class:`LinkWatch` tells the conversation (:mod:`edgeward.nodes.edge`) at
once when a connection came or went, and has nats-server dial anew when one is stuck. None of it sends a byte over the
link. Where the kernel cannot be asked (not Linux), nothing is counted and only the beats find out.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import random
import socket
import struct
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

import msgspec

from edgeward.core import clock
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError
from edgeward.core.natsconf import SYSTEM_USER

log = logging.getLogger("edgeward.wan")

_SOCK_DIAG = 4
_BY_FAMILY = 20
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_DONE, _ERROR = 3, 2
_INFO = 2  # INET_DIAG_INFO
#: Connections that carry something: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING.
_STATES = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11
ESTABLISHED = 1
_TIMESTAMPS = 1
_IP4, _IP6, _TCP, _STAMP = 20, 40, 20, 12
#: Milliseconds without an acknowledgement after which a connection is stuck; more on a link whose round trip is longer
#: than this, which loses more by a lost packet, up to a bound.
_STUCK_MS, _QUICK_MS, _PER_ROUND_TRIP, _STUCK_MOST_MS = 10_000, 400, 20, 45_000
#: Seconds between two looks at the kernel's list.
LOOK = 1.0
#: Seconds that a connection which is not stuck may go without an answer; doubled for each try in vain, to a bound.
_PATIENCE, _PATIENCE_MOST = 45.0, 300.0
#: Seconds over which rates are told, and between two marks of them.
_SPAN, _MARK = 300.0, 10.0


class TcpInfo(msgspec.Struct, frozen=True):
    """The part of ``struct tcp_info`` that matters here. Bytes are the stream's, repeats included."""

    bytes_sent: int = 0
    bytes_received: int = 0
    packets_sent: int = 0
    packets_received: int = 0
    timestamps: bool = False
    #: Microseconds, smoothed.
    rtt: int = 0
    #: Packets that were sent and not acknowledged, and milliseconds since the last acknowledgement.
    unacked: int = 0
    silent_ms: int = 0

    @property
    def patience_ms(self) -> float:
        """Milliseconds that this link may go without an acknowledgement."""
        return min(_STUCK_MOST_MS, _STUCK_MS + _PER_ROUND_TRIP * max(0.0, self.rtt / 1000 - _QUICK_MS))

    @property
    def stuck(self) -> bool:
        """Packets are out, and nothing has been acknowledged for longer than this link takes."""
        return bool(self.unacked) and self.silent_ms > self.patience_ms

    def on_the_link(self, *, ip: int = _IP4) -> tuple[int, int]:
        """(sent, received) bytes on the link with IP and TCP headers, no link layer."""
        head = ip + _TCP + (_STAMP if self.timestamps else 0)
        return self.bytes_sent + head * self.packets_sent, self.bytes_received + head * self.packets_received


class Connection(msgspec.Struct, frozen=True):
    """One TCP connection: ``local`` tells it from the next one to the same hub."""

    local: tuple[str, int]
    state: int
    info: TcpInfo
    ip: int = _IP4
    inode: int = 0


def parse_tcp_info(raw: bytes) -> TcpInfo:
    """``struct tcp_info`` as this kernel gives it; fields that an old kernel lacks are 0."""
    raw = raw.ljust(216, b"\0")
    (rtt,) = struct.unpack_from("=I", raw, 68)
    (unacked,) = struct.unpack_from("=I", raw, 24)
    (silent,) = struct.unpack_from("=I", raw, 56)
    acked, received = struct.unpack_from("=QQ", raw, 120)
    segs_out, segs_in = struct.unpack_from("=II", raw, 136)
    (sent,) = struct.unpack_from("=Q", raw, 200)
    # before Linux 4.19 only what was acknowledged is known
    return TcpInfo(sent or acked, received, segs_out, segs_in, bool(raw[5] & _TIMESTAMPS), rtt, unacked, silent)


def parse_dump(data: bytes, port: int) -> tuple[list[Connection], bool]:
    """The connections to ``port`` in one answer of the kernel, and whether it was the last one. Raises ``OSError``."""
    found: list[Connection] = []
    at = 0
    while at + 16 <= len(data):
        size, kind, _, _, _ = struct.unpack_from("=IHHII", data, at)
        if size < 16 or at + size > len(data):
            break
        body = data[at + 16 : at + size]
        at += (size + 3) & ~3
        if kind == _DONE:
            return found, True
        if kind == _ERROR:
            (code,) = struct.unpack_from("=i", body)
            raise OSError(-code, "sock_diag")
        if kind != _BY_FAMILY or len(body) < 72:
            continue
        family, state = body[0], body[1]
        local_port, remote_port = struct.unpack_from(">HH", body, 4)
        if remote_port != port:
            continue
        raw = body[8:12] if family == socket.AF_INET else body[8:24]
        info = TcpInfo()
        attr = 72
        while attr + 4 <= len(body):
            length, what = struct.unpack_from("=HH", body, attr)
            if length < 4:
                break
            if what == _INFO:
                info = parse_tcp_info(body[attr + 4 : attr + length])
            attr += (length + 3) & ~3
        ip = _IP4 if family == socket.AF_INET else _IP6
        (inode,) = struct.unpack_from("=I", body, 68)
        found.append(Connection((str(ipaddress.ip_address(raw)), local_port), state, info, ip, inode))
    return found, False


def connections(port: int) -> list[Connection] | None:
    """The TCP connections of this network namespace to a remote ``port``; None where the kernel cannot be asked."""
    if sys.platform != "linux":
        return None
    found: list[Connection] = []
    try:
        for family in (socket.AF_INET, socket.AF_INET6):
            with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _SOCK_DIAG) as sock:
                sock.settimeout(0.2)  # the kernel answers within the question; this is for the case that it does not
                # the remote port is asked for too, but kernels take it as a hint for a dump: parse_dump looks again
                ask = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 1 << (_INFO - 1), 0, _STATES)
                ask += struct.pack(">HH", 0, port) + bytes(36) + b"\xff" * 8
                sock.send(struct.pack("=IHHII", 16 + len(ask), _BY_FAMILY, _DUMP, 1, 0) + ask)
                done = False
                while not done:
                    part, done = parse_dump(sock.recv(1 << 18), port)
                    found += part
    except OSError:
        return None
    return found


def owns(pid: int | None, inode: int) -> bool:
    """Whether the socket belongs to the process: nodes that share a machine share the list of connections."""
    if pid is None:
        return False
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path) == f"socket:[{inode}]":  # noqa: PTH115 - many a second
                        return True
    except OSError:
        return True  # another user's process: the port alone must do
    return False


class Meter:
    """Adds the connections of a link up over its life: :meth:`look` now and then, :meth:`totals` at any time."""

    def __init__(self) -> None:
        self._now: dict[tuple[str, int], Connection] = {}
        self._sent = self._received = 0
        #: Connections seen so far.
        self.connections = 0

    def look(self, found: Iterable[Connection]) -> bool:
        """Takes what :func:`connections` found. True when an established connection came or went."""
        before = self._live()
        now = {c.local: c for c in found}
        for local, old in self._now.items():
            new = now.get(local)
            if new is None or new.info.bytes_sent < old.info.bytes_sent:
                sent, received = old.info.on_the_link(ip=old.ip)
                self._sent, self._received = self._sent + sent, self._received + received
        for local, new in now.items():
            had = self._now.get(local)
            if had is None or new.info.bytes_sent < had.info.bytes_sent:
                self.connections += 1
        self._now = now
        return self._live() != before

    def _live(self) -> set[tuple[str, int]]:
        return {local for local, c in self._now.items() if c.state == ESTABLISHED}

    @property
    def established(self) -> bool:
        return bool(self._live())

    @property
    def stuck(self) -> bool:
        """All connections are."""
        live = [c for c in self._now.values() if c.state == ESTABLISHED]
        return bool(live) and all(c.info.stuck for c in live)

    @property
    def patience(self) -> float:
        """Seconds that the present connections may go without an acknowledgement."""
        live = (c.info.patience_ms for c in self._now.values() if c.state == ESTABLISHED)
        return max(live, default=_STUCK_MS) / 1000

    @property
    def rtt(self) -> float:
        """Seconds; 0 when there is no connection."""
        return max((c.info.rtt for c in self._now.values() if c.state == ESTABLISHED), default=0) / 1e6

    def totals(self) -> tuple[int, int]:
        """(sent, received) bytes on the link since this meter began."""
        sent, received = self._sent, self._received
        for c in self._now.values():
            s, r = c.info.on_the_link(ip=c.ip)
            sent, received = sent + s, received + r
        return sent, received


class Talk(Protocol):
    """What the watch needs of the conversation."""

    @property
    def online(self) -> bool: ...
    @property
    def silence(self) -> float: ...
    def link_changed(self) -> None: ...


class LinkWatch:
    """Looks at the link of one node, until cancelled.

    ``ports``: the hub's (or its proxy's); ``pid``: of the nats-server that dials; ``redial``: ends the leaf connection,
    so that it is dialled anew.
    """

    def __init__(
        self, talk: Talk, ports: Iterable[int], pid: Callable[[], int | None], redial: Callable[[], Awaitable[None]]
    ) -> None:
        self._talk, self._ports, self._pid, self._redial = talk, sorted(set(ports)), pid, redial
        self._mine: dict[int, bool] = {}
        self.meter = Meter()
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=int(_SPAN / _MARK) + 1)
        #: Since when there is the present connection, and how long it may give no answer.
        self._since = 0.0
        self._patience = _PATIENCE
        self.redials = 0

    async def run(self) -> None:
        while True:
            asked = [connections(port) for port in self._ports]
            if None in asked:
                log.info("this system does not tell what the link carries")
                return
            await self.step(self._own([c for found in asked for c in found or ()]), clock.monotonic())
            await asyncio.sleep(LOOK)  # the period of looking

    def _own(self, found: list[Connection]) -> list[Connection]:
        pid = self._pid()
        self._mine = {c.inode: self._mine.get(c.inode) or owns(pid, c.inode) for c in found}
        return [c for c in found if self._mine[c.inode]]

    async def step(self, found: list[Connection], now: float) -> None:
        """One look."""
        if self.meter.look(found):
            self._since = now
            self._talk.link_changed()
        if not self._marks or now - self._marks[-1][0] >= _MARK:
            self._marks.append((now, *self.meter.totals()))
        online, patience = self._talk.online, self.meter.patience
        if online:
            self._patience = _PATIENCE
        # a connection that is new has had no acknowledgement since the machine was started, so to say: not stuck yet
        stuck = self.meter.stuck and now - self._since > patience
        # TCP waits twice as long after each loss: on a link that loses much a new connection is sooner there than the
        # old one's next try, so it is dialled before anybody takes the node for gone
        if stuck and online:
            stuck = self._talk.silence > patience
        if self.meter.established and (stuck or (not online and now - self._since > self._patience)):
            log.info("the link gives no answer, dialling anew")
            # a hub that is only slow must not be dialled by all of its fleet at once, again and again
            self._patience = min(_PATIENCE_MOST, self._patience * 2) * random.uniform(0.7, 1.0)  # noqa: S311 - jitter
            self._since = now
            self.redials += 1
            with contextlib.suppress(EdgewardError):
                await self._redial()

    def usage(self) -> dict[str, Any]:
        """What is shown of the link: bytes since the agent began, kbit/s over the last minutes."""
        sent, received = self.meter.totals()
        kbit = [0.0, 0.0]
        if self._marks and (span := clock.monotonic() - self._marks[0][0]) > 0:
            _, sent0, received0 = self._marks[0]
            kbit = [round((b - a) * 8 / span / 1000, 3) for a, b in ((sent0, sent), (received0, received))]
        return {
            "sent": sent,
            "received": received,
            "kbitUp": kbit[0],
            "kbitDown": kbit[1],
            "rttMs": round(self.meter.rtt * 1000, 1),
            "connections": self.meter.connections,
        }


async def redial(url: str, secret: str) -> None:
    """Has the nats-server at ``url`` end its leaf connections; it dials again by itself."""
    bus = await Bus.connect(url, name="redial", username=SYSTEM_USER, password=secret, timeout=5.0)
    try:
        msg = await bus.request("$SYS.REQ.SERVER.PING.LEAFZ", timeout=3.0)
        answer = msgspec.json.decode(msg.data)
        server = answer["server"]["id"]
        for leaf in answer["data"].get("leafs") or []:
            await bus.request(f"$SYS.REQ.SERVER.{server}.KICK", msgspec.json.encode({"cid": leaf["id"]}), timeout=3.0)
    except (msgspec.DecodeError, KeyError, TypeError) as e:
        raise EdgewardError(f"nats-server's answer is not understood: {e}") from e
    finally:
        await bus.close()
