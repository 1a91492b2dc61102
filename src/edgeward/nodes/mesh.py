"""The mesh: the nodes of a site speak with one another directly, with no hub and nobody in the lead.

Words for many go by datagram (:meth:`Mesh.say`), questions to one by TCP (:meth:`Mesh.ask`), both on one port of the
node's own address. Who may take part the hub has said: the Nodes of the replica with their device keys, those last
known while it is away. What of a datagram counts is decided in ``mesh_links.py``, who is at the other end of a
connection in ``mesh_tcp.py``; here are the sockets, the clock and the file that outlives a run. A mesh that cannot
listen stops nothing else: it says so and tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from edgeward.core import clock, daemon
from edgeward.core.errors import EdgewardError, Invalid, Refused
from edgeward.core.files import read_json, write_json
from edgeward.core.identity import NodeIdentity
from edgeward.core.natsserver import free_port
from edgeward.core.nkeys import public_raw
from edgeward.core.spans import is_address
from edgeward.nodes.mesh_links import Links
from edgeward.nodes.mesh_sockets import GROUP, Datagrams, Settings, both, joined
from edgeward.nodes.mesh_tcp import Handler, Papers, Requests, whole
from edgeward.nodes.mesh_wire import (
    Address,
    Card,
    Heard,
    Known,
    PeerInfo,
    address_of,
    check_topic,
    signed,
    text_of,
    to_sign_card,
    to_sign_report,
)

log = logging.getLogger("edgeward.mesh")

Hear = Callable[[str, bytes, Heard], None]
Event = Callable[[str, str, str], None]

#: Seconds between two tries to listen; two looks at whom the hub names; two writes of where peers are; two calls to
#: all who may hear.
_AGAIN, _LOOK, _KEEP, _CALL = 5.0, 5.0, 60.0, 10.0
#: Signatures that are remembered as good: reports come by many ways.
_REMEMBERED = 4096
#: Bytes that may wait to be sent; what comes on top of them is dropped, as a network would.
_BACKLOG = 256 * 1024


class Mesh:
    """One node's part of it; :meth:`run` until cancelled. All else may be called before, while and after it runs."""

    def __init__(
        self,
        node: str,
        site: str,
        identity: NodeIdentity,
        file: Path,
        settings: Settings,
        known: Callable[[], Iterable[Known]],
        *,
        event: Event = lambda *_: None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """``file``: what outlives a run. ``known``: whom the hub names, asked often. ``changed``: the address did."""
        self.node, self.site = node, site
        self._identity, self._file, self._settings, self._known = identity, file, settings, known
        self._event, self._changed = event, changed
        try:
            kept = read_json(file, {})
        except Invalid:
            kept = {}
        self._kept: dict[str, Any] = kept if isinstance(kept, dict) else {}
        before = self._kept.get("epoch")
        #: Of this run: larger than that of any run before.
        self.epoch = max((before if isinstance(before, int) else 0) + 1, int(clock.now() * 1000))
        self._kept["epoch"] = self.epoch
        write_json(file, self._kept)
        key = X25519PrivateKey.generate()
        card = Card(node, site, self.epoch, key.public_key().public_bytes_raw())
        packed = msgspec.msgpack.encode(card)
        self._links = Links(card, packed, identity.sign(to_sign_card(packed)), key)
        #: What came and what became of it, by name.
        self.counters = self._links.counters
        self.counters |= {"answered": 0, "refused": 0, "unsent": 0}
        self._own_key = public_raw(identity.public_key, "user")
        self._papers: Papers | None = None
        self._requests = Requests(
            self._present_papers, self._links.key_of, self._links.addresses, self._was_heard, self.counters
        )
        self._hearers: dict[str, list[Hear]] = {}
        self._good: OrderedDict[tuple[bytes, bytes, bytes], None] = OrderedDict()
        self._transport: asyncio.DatagramTransport | None = None
        self._waiting: Callable[[], int] = lambda: 0
        self._wake = asyncio.Event()
        self._renewed = asyncio.Event()
        self.on_peers: list[Callable[[], None]] = []
        #: Where it listens, as the others are told; empty: nowhere, and why.
        self.address = self.problem = ""
        self.look()

    # -- what others use -----------------------------------------------------------------------------------------------

    def peers(self) -> Mapping[str, PeerInfo]:
        """The other nodes of the site, as the hub names them."""
        return self._links.peers()

    def say(self, topic: str, data: bytes, peers: Iterable[str] | None = None) -> int:
        """Sends a datagram to linked peers; how many. It may be lost, and come in another order than it was said."""
        sent = self._links.say(topic, data, peers, clock.monotonic())
        self._flush()
        return sent

    def hear(self, topic: str, fn: Hear) -> None:
        """Has ``fn(peer, data, heard)`` called for each datagram of a topic: in the loop, so it must be quick."""
        self._hearers.setdefault(check_topic(topic).decode(), []).append(fn)

    def serve(self, verb: str, handler: Handler) -> None:
        """``handler(peer, data)`` answers a verb: whole (a coroutine) or in pieces (an async generator)."""
        self._requests.serve(verb, handler)

    async def ask(self, peer: str, verb: str, data: bytes = b"", timeout: float = 10.0) -> bytes:
        """The answer. Raises ``Unreachable`` where there is none, else what the handler there raised.

        An answer that was lost does not say that the question was: who asks again must bear that it is done twice.
        """
        return await whole(self.stream(peer, verb, data, timeout))

    def stream(self, peer: str, verb: str, data: bytes = b"", timeout: float = 10.0) -> AsyncIterator[bytes]:
        """The answer in pieces; ``timeout``: until the first one, and between two."""
        return self._requests.stream(peer, verb, data, timeout)

    def sign(self, data: bytes) -> bytes:
        """64 bytes that :meth:`check` takes at every node of the site, whoever passes them on."""
        return self._identity.sign(to_sign_report(data))

    def check(self, node: str, data: bytes, signature: bytes) -> bool:
        """Whether this node of the site signed ``data`` by its present device key, and is not revoked."""
        key = self._own_key if node == self.node else self._links.key_of(node)
        if key is None:
            return False
        what = key, signature, hashlib.sha256(data).digest()
        if what in self._good:
            return True
        if not signed(key, to_sign_report(data), signature):
            return False
        self._good[what] = None
        if len(self._good) > _REMEMBERED:
            self._good.popitem(last=False)
        return True

    # -- what the agent tells it ---------------------------------------------------------------------------------------

    def look(self) -> None:
        """The hub may have said something new of the site's nodes."""
        kept = self._kept.get("addresses")
        where = {str(n): a for n, t in kept.items() if (a := address_of(t))} if isinstance(kept, dict) else {}
        for node in self._links.learn(self._known(), where):
            self._requests.drop(node)
        self._after()

    def renewed(self) -> None:
        """There is a new certificate."""
        self._papers = None
        self._renewed.set()

    def status(self) -> dict[str, Any]:
        """Members of the Node's status."""
        return {"mesh": self.address} if self.address else {"meshProblem": self.problem} if self.problem else {}

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Listens, and keeps the links."""
        if not self._settings.host:
            if self._settings.problem:
                self._down(Invalid(self._settings.problem))
            return
        while True:
            try:
                udp, tcp = self._bind()
                try:
                    self._present_papers()
                    await self._serve(udp, tcp)
                finally:
                    udp.close()
                    tcp.close()
            except (OSError, EdgewardError, ValueError) as e:
                self._down(e)
            except Exception as e:  # the agent goes on without it, and it is tried again
                log.exception("the mesh failed")
                self._down(e)
            self._renewed.clear()
            with contextlib.suppress(TimeoutError):  # the back-off; a certificate that came ends it
                async with asyncio.timeout(_AGAIN):
                    await self._renewed.wait()

    def _down(self, error: Exception) -> None:
        host, port = self._settings.host, self._settings.port or self._kept.get("port", 0)
        why = getattr(error, "strerror", "") or str(error)
        problem = f"cannot listen on {text_of((host, port))}: {why}" if isinstance(error, OSError) else why
        if problem == self.problem:
            return
        self.problem, self.address = problem, ""
        log.warning("the mesh is down: %s", problem)
        if isinstance(error, OSError):
            problem += ' (free the port or name another in node.json: "mesh": {"listen": "ADDRESS:PORT"})'
        self._event("Warning", "MeshDown", f"this node does not speak with others of its site: {problem}")
        self._changed()

    def _bind(self) -> tuple[socket.socket, socket.socket]:
        """Both sockets on one port: the one that ``node.json`` names, or that of the run before, or a free one."""
        host, port = self._settings.host, self._settings.port
        if port:
            return both(host, port)
        tries = [p] if isinstance(p := self._kept.get("port"), int) else []
        tries += [free_port(host) for _ in range(8)]
        for n, port in enumerate(tries):
            try:
                found = both(host, port)
            except OSError as e:
                if e.errno != errno.EADDRINUSE or n == len(tries) - 1:
                    raise
                continue
            if port != self._kept.get("port"):
                self._kept["port"] = port
                write_json(self._file, self._kept)
            return found
        raise OSError(errno.EADDRINUSE, "no port is free")

    async def _serve(self, udp: socket.socket, tcp: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        lost = loop.create_future()
        transport, _ = await loop.create_datagram_endpoint(lambda: Datagrams(self._received, lost), sock=udp)
        self._transport = transport
        self._waiting = transport.get_write_buffer_size  # type: ignore[attr-defined]  # both loops' transports have it
        told = self._settings.address
        host = told if is_address(told) else daemon.local(self._settings.host)
        self.address, problem, self.problem = text_of((host, tcp.getsockname()[1])), self.problem, ""
        if problem:
            self._event("Normal", "MeshUp", f"this node speaks with others of its site again, at {self.address}")
        log.info("the mesh listens on %s", self.address)
        self._changed()
        try:
            async with asyncio.TaskGroup() as group:
                if self._settings.multicast:
                    group.create_task(self._call(udp))
                group.create_task(self._requests.run(tcp))
                group.create_task(self._ticks())
                await lost
                raise OSError(errno.EIO, "the socket was lost")
        except ExceptionGroup as group_error:
            first = group_error.exceptions[0]
            raise first if isinstance(first, OSError) else group_error from None
        finally:
            self._transport = None
            transport.abort()

    async def _ticks(self) -> None:
        looked = kept = clock.monotonic()
        while True:
            now = clock.monotonic()
            if now - looked >= _LOOK:
                looked = now
                self.look()
                self._requests.tidy(now)
            if now - kept >= _KEEP:
                kept = now
                await self._keep_addresses()
            due = self._links.tick(now)
            self._flush()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(due - now, _LOOK)):
                    await self._wake.wait()

    async def _call(self, udp: socket.socket) -> None:
        """Hears those who call the whole network, and calls while somebody of the site is not linked."""
        try:
            sock = joined(self._settings.host, udp)
        except OSError as e:
            log.warning("no multicast on %s: %s", self._settings.host, e.strerror or e)
            return
        lost = asyncio.get_running_loop().create_future()
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: Datagrams(self._received, lost), sock=sock
        )
        try:
            wait = 0.5
            while True:
                if not all(p.linked for p in self.peers().values()):
                    self._links.out.append((self._links.cry(), GROUP))
                    self._flush()
                await asyncio.sleep(wait)  # the period
                wait = min(_CALL, 2 * wait)
        finally:
            transport.abort()

    async def _keep_addresses(self) -> None:
        """So that a node that starts with no hub finds those that moved since it last heard the hub."""
        where = {n: text_of(p.address) for n, p in self.peers().items() if p.address is not None}
        if where == self._kept.get("addresses"):
            return
        self._kept["addresses"] = where
        try:
            await asyncio.to_thread(write_json, self._file, self._kept)
        except OSError as e:
            log.warning("where the site's nodes are was not kept: %s", e)

    # -- datagrams -----------------------------------------------------------------------------------------------------

    def _received(self, data: bytes, address: Address) -> None:
        said = self._links.receive(data, address, clock.monotonic())
        self._after()
        if said is None:
            return
        for fn in self._hearers.get(said.topic, ()):
            try:
                fn(said.peer, said.data, said.heard)
            except (EdgewardError, ValueError, msgspec.MsgspecError) as e:
                log.warning("what node %s said of %s is not understood: %s", said.peer, said.topic, e)
            except Exception:  # a hearer's fault ends no other's hearing
                log.exception("what node %s said of %s was not heard", said.peer, said.topic)

    def _after(self) -> None:
        self._flush()
        if self._links.hurried:
            self._wake.set()
        if self._links.moved:
            self._links.moved = False
            for fn in self.on_peers:
                try:
                    fn()
                except Exception:  # nor this one's
                    log.exception("nobody was told of the peers")

    def _flush(self) -> None:
        out, self._links.out = self._links.out, []
        transport = self._transport
        if transport is None or not out:
            return
        for data, address in out:
            if self._waiting() > _BACKLOG:
                self.counters["unsent"] += 1
                continue
            try:
                transport.sendto(data, address)
            except (OSError, ValueError) as e:  # an address of another family, a network that is away
                self.counters["unsent"] += 1
                log.debug("nothing goes to %s: %s", address, e)

    def _was_heard(self, node: str) -> None:
        self._links.was_heard(node, clock.monotonic())

    def _present_papers(self) -> Papers:
        if self._papers is None:
            if not self._identity.certificate:
                raise Refused("this node has no certificate yet", remedy="it comes with its enrolment")
            self._papers = Papers(self._identity, self.node)
        return self._papers
