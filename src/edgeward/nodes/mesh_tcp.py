"""Questions from node to node of a site: TCP, TLS 1.3, both sides show who they are.

A question goes out over a connection of its own or one that lies idle, an answer comes back whole or in pieces. Who
the other is, three things say together: its certificate is of the hub's CA and for its name, it holds the certificate's
key, and the device key that the hub names for that node has signed this certificate. So a certificate may have ended
while the site is cut off, and one that was made for a box that lost its name opens nothing. Strangers cost a handshake
each, few at a time. What verbs there are and what they do is their owners' business.

Frames: ``kind(1) length(4) body``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from edgeward.core import clock
from edgeward.core.certs import NODE_DOMAIN
from edgeward.core.errors import EdgewardError, Invalid, Refused, Unreachable, from_problem
from edgeward.core.identity import NodeIdentity
from edgeward.nodes.mesh_wire import Address, signed, to_sign_certificate

log = logging.getLogger("edgeward.mesh")

Handler = Callable[[str, bytes], Awaitable[bytes] | AsyncIterator[bytes]]

#: Bytes of a question, of an answer or one piece of it.
MOST = 4 << 20
_VOUCH, _ASK, _PIECE, _END, _ERROR = 1, 2, 3, 4, 5
_BOUND = {_VOUCH: 512, _ASK: MOST + 64, _PIECE: MOST, _END: 0, _ERROR: 8192}
_HEAD = struct.Struct(">BI")
#: Connections that have not proved anything yet: in all, and of one address; and of one peer.
_PENDING, _PENDING_OF_ONE, _OF_ONE = 64, 24, 8
#: Seconds: to prove oneself; that a connection may lie idle, at the asking side less; for a handler; for one write.
_PROOF, _IDLE, _IDLE_HERE, _WORK, _WRITE = 5.0, 60.0, 20.0, 60.0, 30.0
_KEPT = 2
#: X509_V_FLAG_NO_CHECK_TIME (openssl/x509_vfy.h): the device key says who it is, also when the hub was long away.
_NO_CHECK_TIME = 0x200000
_READ = 256 * 1024


class _Vouch(msgspec.Struct, array_like=True):
    node: str
    signature: bytes


class _Ask(msgspec.Struct, array_like=True):
    verb: str
    data: bytes


class Papers:
    """What this node shows of itself: made anew when its certificate is."""

    def __init__(self, identity: NodeIdentity, node: str) -> None:
        cert = x509.load_pem_x509_certificate(identity.certificate.encode())
        print_ = hashlib.sha256(cert.public_bytes(serialization.Encoding.DER)).digest()
        self.vouch = msgspec.msgpack.encode(_Vouch(node, identity.sign(to_sign_certificate(print_))))
        self.server = self._context(identity, ssl.PROTOCOL_TLS_SERVER)
        self.server.num_tickets = 0  # each connection proves itself anew
        self.client = self._context(identity, ssl.PROTOCOL_TLS_CLIENT)

    @staticmethod
    def _context(identity: NodeIdentity, protocol: Any) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(identity.ca_file)
        context.load_cert_chain(identity.tls_file)
        context.verify_flags |= _NO_CHECK_TIME
        return context


class Line(NamedTuple):
    """One connection whose other side is known."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, kind: int, body: bytes = b"") -> None:
        self.writer.write(_HEAD.pack(kind, len(body)) + body)
        async with asyncio.timeout(_WRITE):
            await self.writer.drain()

    async def receive(self, only: int = 0) -> tuple[int, bytes]:
        """``only``: the one kind that may come."""
        kind, length = _HEAD.unpack(await self.reader.readexactly(_HEAD.size))
        if length > _BOUND.get(kind, -1) or only not in (0, kind):
            raise Invalid(f"a frame of kind {kind} and {length} bytes")
        return kind, await self.reader.readexactly(length) if length else b""

    def close(self) -> None:
        self.writer.transport.abort()


def _proved(line: Line, body: bytes, key_of: Callable[[str], bytes | None]) -> str:
    """Whose connection it is. Raises ``Refused``."""
    said = msgspec.msgpack.decode(body, type=_Vouch)
    der = line.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    cert = x509.load_der_x509_certificate(der)
    names = [a.value for a in cert.subject if a.oid == NameOID.COMMON_NAME]
    key = key_of(said.node)
    if names != [said.node] or key is None:
        raise Refused(f"{said.node[:63]!r} is no node of this site, or not the one of this certificate")
    if not signed(key, to_sign_certificate(hashlib.sha256(der).digest()), said.signature):
        raise Refused("another box has this name now", resource=f"Node/{said.node}")
    return said.node


class Requests:
    """Both sides of it. ``key_of``: the device key of a peer; ``heard``: a peer proved that it is there."""

    def __init__(
        self,
        papers: Callable[[], Papers],
        key_of: Callable[[str], bytes | None],
        addresses: Callable[[str], list[Address]],
        heard: Callable[[str], None],
        counters: dict[str, int],
    ) -> None:
        self._papers, self._key_of, self._addresses, self._heard = papers, key_of, addresses, heard
        self._counters = counters
        self._handlers: dict[str, Handler] = {}
        self._idle: dict[str, list[tuple[float, Line]]] = {}
        self._served: dict[str, set[Line]] = {}
        self._pending: dict[str, int] = {}

    def serve(self, verb: str, handler: Handler) -> None:
        self._handlers[verb] = handler

    def drop(self, node: str) -> None:
        """It is no peer any more."""
        for _, line in self._idle.pop(node, []):
            line.close()
        for line in self._served.get(node, ()):
            line.close()

    # -- answering ---------------------------------------------------------------------------------------------------

    async def run(self, sock: socket.socket) -> None:
        """Answers who comes to ``sock`` (listening, non-blocking) until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    try:
                        client, address = await loop.sock_accept(sock)
                    except OSError as e:  # no descriptors are left, say
                        log.warning("the mesh takes no connections for a moment: %s", e)
                        await asyncio.sleep(0.5)  # the back-off
                        continue
                    host = str(address[0])
                    if sum(self._pending.values()) >= _PENDING or self._pending.get(host, 0) >= _PENDING_OF_ONE:
                        self._counters["flooded"] += 1
                        client.close()
                        continue
                    self._pending[host] = self._pending.get(host, 0) + 1
                    group.create_task(self._welcome(client, host))
        finally:
            for node in {*self._idle, *self._served}:
                self.drop(node)

    async def _welcome(self, client: socket.socket, host: str) -> None:
        line: Line | None = None
        try:
            try:
                async with asyncio.timeout(_PROOF):
                    line = await _line(self._papers().server, sock=client)
                    _, body = await line.receive(_VOUCH)  # a stranger's question is not even read
                    peer = _proved(line, body, self._key_of)
                    if len(self._served.get(peer, ())) >= _OF_ONE:
                        return
                    await line.send(_VOUCH, self._papers().vouch)
            finally:
                self._pending[host] -= 1
                if not self._pending[host]:
                    del self._pending[host]
            served = self._served.setdefault(peer, set())
            served.add(line)
            try:
                await self._answers(peer, line)
            finally:
                served.discard(line)
                if not served and self._served.get(peer) is served:
                    del self._served[peer]
        except (OSError, ssl.SSLError, TimeoutError, asyncio.IncompleteReadError) as e:
            log.debug("a connection from %s ended: %s", host, e)
        except (EdgewardError, ValueError, msgspec.MsgspecError) as e:
            self._counters["refused"] += 1
            log.info("a connection from %s is refused: %s", host, e)
        except Exception:  # whatever one connection brings, the others go on
            log.exception("a connection from %s failed", host)
        finally:
            if line is None:
                client.close()
            else:
                line.close()

    async def _answers(self, peer: str, line: Line) -> None:
        while True:
            async with asyncio.timeout(_IDLE):
                kind, body = await line.receive()
            if kind != _ASK or self._key_of(peer) is None:
                return
            ask = msgspec.msgpack.decode(body, type=_Ask)
            self._heard(peer)
            self._counters["answered"] += 1
            try:
                await self._answer(peer, ask, line)
            except EdgewardError as e:
                await line.send(_ERROR, msgspec.json.encode(e.problem())[: _BOUND[_ERROR]])
                continue
            except (OSError, asyncio.IncompleteReadError):
                raise
            except Exception:  # a fault of the handler's ends no other's conversation
                log.exception("%r of node %s failed", ask.verb[:40], peer)
                await line.send(_ERROR, msgspec.json.encode(EdgewardError("failed there").problem()))
                continue
            await line.send(_END)

    async def _answer(self, peer: str, ask: _Ask, line: Line) -> None:
        handler = self._handlers.get(ask.verb)
        if handler is None:
            raise Refused(f"nothing here answers {ask.verb[:40]!r}", remedy="upgrade the node")
        answer = handler(peer, ask.data)
        if isinstance(answer, AsyncIterator):
            async for piece in answer:
                await line.send(_PIECE, piece)
            return
        try:
            async with asyncio.timeout(_WORK):
                whole = await answer
        except TimeoutError:
            raise Unreachable(f"{ask.verb[:40]!r} took too long there") from None
        if len(whole) > MOST:
            raise Invalid(f"the answer has {len(whole)} bytes", remedy=f"at most {MOST}: send it in pieces")
        await line.send(_PIECE, whole)

    # -- asking ------------------------------------------------------------------------------------------------------

    async def stream(self, peer: str, verb: str, data: bytes, timeout: float) -> AsyncIterator[bytes]:
        """The pieces of the answer; ``timeout``: until the first, and between two."""
        if len(data) > MOST:
            raise Invalid(f"a question of {len(data)} bytes", remedy=f"at most {MOST}")
        line: Line | None = None
        whole = False
        try:
            async with asyncio.timeout(timeout):
                line = await self._open(peer, timeout)
                await line.send(_ASK, msgspec.msgpack.encode(_Ask(verb, data)))
            while True:
                async with asyncio.timeout(timeout):
                    kind, body = await line.receive()
                self._heard(peer)
                if kind == _PIECE:
                    yield body
                    continue
                whole = kind in (_END, _ERROR)
                if kind == _ERROR:
                    raise from_problem(msgspec.json.decode(body, type=dict[str, Any]))
                return
        except (OSError, ssl.SSLError, TimeoutError, asyncio.IncompleteReadError) as e:
            why = "no answer in time" if isinstance(e, TimeoutError) else str(e) or type(e).__name__
            raise Unreachable(why, resource=f"Node/{peer}", remedy="it is asked again when it is there") from e
        except (ValueError, msgspec.MsgspecError) as e:
            raise Unreachable(f"its answer is not understood: {e}", resource=f"Node/{peer}") from e
        finally:
            if line is not None:
                self._put_back(peer, line) if whole else line.close()

    def _put_back(self, peer: str, line: Line) -> None:
        idle = self._idle.setdefault(peer, [])
        if len(idle) < _KEPT and self._key_of(peer) is not None:
            idle.append((clock.monotonic(), line))
        else:
            line.close()

    def tidy(self, now: float) -> None:
        """Ends what lay idle for long; ``now``: monotonic."""
        for node, idle in list(self._idle.items()):
            for at, line in idle:
                if now - at > _IDLE_HERE:
                    line.close()
            kept = [(at, line) for at, line in idle if now - at <= _IDLE_HERE]
            if kept:
                self._idle[node] = kept
            else:
                del self._idle[node]

    async def _open(self, peer: str, timeout: float) -> Line:
        idle = self._idle.get(peer, [])
        while idle:
            at, line = idle.pop()
            if clock.monotonic() - at <= _IDLE_HERE and not line.reader.at_eof() and not line.writer.is_closing():
                return line
            line.close()
        places = self._addresses(peer) if self._key_of(peer) is not None else []
        if not places:
            raise Unreachable("it is not known where it is", resource=f"Node/{peer}")
        for n, place in enumerate(places):
            try:
                async with asyncio.timeout(timeout / len(places)):
                    return await self._dial(peer, place)
            except (OSError, ssl.SSLError, TimeoutError, asyncio.IncompleteReadError, Refused) as e:
                if n == len(places) - 1:
                    if isinstance(e, Refused):
                        raise Unreachable(str(e), resource=f"Node/{peer}") from e
                    raise
        raise AssertionError("unreachable")

    async def _dial(self, peer: str, place: Address) -> Line:
        papers = self._papers()
        line = await _line(papers.client, host=place[0], port=place[1], server_hostname=peer + NODE_DOMAIN)
        try:
            await line.send(_VOUCH, papers.vouch)
            kind, body = await line.receive()
            if kind != _VOUCH or _proved(line, body, self._key_of) != peer:
                raise Refused("another node answers at its address")
        except BaseException:
            line.close()
            raise
        return line


async def _line(
    context: ssl.SSLContext, *, sock: socket.socket | None = None, host: str = "", port: int = 0, **tls: Any
) -> Line:
    """A connection with TLS on it: one that came in, or one to ``host``."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_READ)
    protocol = asyncio.StreamReaderProtocol(reader)
    tls |= {"ssl": context, "ssl_handshake_timeout": _PROOF, "ssl_shutdown_timeout": 1.0}
    if sock is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, **tls)
    else:
        transport, _ = await loop.create_connection(lambda: protocol, host, port, **tls)
    return Line(reader, asyncio.StreamWriter(transport, protocol, reader, loop))


async def whole(pieces: AsyncIterator[bytes]) -> bytes:
    """All of an answer. Raises ``Unreachable`` where it is longer than one may be."""
    found: list[bytes] = []
    async with contextlib.aclosing(pieces) as stream:  # type: ignore[type-var]
        async for piece in stream:
            found.append(piece)
            if sum(map(len, found)) > MOST:
                raise Unreachable(f"the answer has more than {MOST} bytes")
    return b"".join(found)
