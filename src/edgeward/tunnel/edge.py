"""The node's end of the tunnel: dials when the hub asks for it, serves the streams that come.

The hub's ask comes over the leaf's link (``ew.node.<n>.call.tunnel``), so a tunnel that nobody uses costs nothing. The
node proves itself to the hub by its device key, the hub to the node by its CA, whoever looks into TLS in between. What
a stream is for is held against the node's own policy before its service is called; the hub has asked who may. Services
are registered by name; here is ``tcp``, and ``reverse`` that listens for the operator's side.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NoReturn

import msgspec

from edgeward.core import passage
from edgeward.core.authz import PROGRAMS
from edgeward.core.errors import EdgewardError, Forbidden, Invalid, Refused, Unreachable
from edgeward.core.passage import Passage
from edgeward.core.spans import host_port
from edgeward.tunnel.framing import Open
from edgeward.tunnel.link import Redial, Way, dial
from edgeward.tunnel.session import Session, Stream
from edgeward.tunnel.splice import Socket

log = logging.getLogger("edgeward.tunnel")

Service = Callable[[Open, Stream], Awaitable[None]]
#: Seconds in which a port of the node, or of a machine behind it, must answer.
DIAL_PORT = 10.0
#: Another ask of the hub within so many seconds is by a hub process that did not know of the first.
_JUST_DIALLED = 5.0
PATH = "/tunnel"


class Policy(msgspec.Struct, frozen=True):
    """``tunnel`` in ``node.json``: what the node itself lets through, whoever the hub lets in."""

    allow: tuple[str, ...] = (passage.ANY,)
    #: false: no program is run and no file is read or written, for anybody.
    exec: bool = True

    @classmethod
    def read(cls, given: Any) -> Policy:
        """Raises ``Invalid`` for what is none: a policy that is not understood must not be a wide one."""
        if given is None or given is True:
            return cls()
        if given is False:
            return cls((), False)
        allow = given.get("allow", [passage.ANY]) if isinstance(given, dict) else None
        if not isinstance(allow, list) or not all(isinstance(a, str) for a in allow):
            raise Invalid("expected an object with a list", field="tunnel.allow", file="node.json")
        if not isinstance(given.get("exec", True), bool):
            raise Invalid("expected true or false", field="tunnel.exec", file="node.json")
        for text in allow:
            passage.parse(text)
        return cls(tuple(allow), given.get("exec", True))

    def check(self, use: Passage) -> None:
        """Raises ``Forbidden``."""
        if (use.protocol in PROGRAMS and not self.exec) or not passage.allowed(self.allow, use):
            raise Forbidden(f"the node's own policy does not let {use} through", remedy="see tunnel in its node.json")


def use_of(purpose: Open) -> Passage:
    """What a stream is for. Raises ``Invalid``."""
    host, port = purpose.args.get("host", ""), purpose.args.get("port", 0)
    if not isinstance(host, str) or len(host) > 253 or isinstance(port, bool) or not isinstance(port, int):
        raise Invalid("a host is a text and a port a number", field="host, port")
    if purpose.service in ("tcp", "http", "reverse") and not (0 <= port <= 65535):
        raise Invalid("a port is a number from 1 to 65535", field="port")
    if not purpose.service.isidentifier() or len(purpose.service) > 32:
        raise Invalid("there is no such service")
    return Passage(purpose.service, "" if host.lower() in passage.ITSELF else host, port)


def transcript(node: str, session: str, nonce: str, attempt: int, received: int) -> bytes:
    """What a node signs to be let in."""
    parts = (node, session, nonce, str(attempt), str(received))
    return b"edgeward tunnel 1\0" + b"".join(len(p).to_bytes(4, "big") + p.encode() for p in parts)


class TunnelEdge:
    """``ways``: where the hub is; ``sign``: by the device key; ``hubs``: whether a signature is the hub's CA's."""

    def __init__(
        self,
        node: str,
        *,
        ways: Callable[[], list[Way]],
        sign: Callable[[bytes], bytes],
        hubs: Callable[[bytes, bytes], bool],
        policy: Policy,
        services: Mapping[str, Service] | None = None,
    ) -> None:
        self._node, self._ways, self._sign, self._hubs = node, ways, sign, hubs
        self._policy = policy
        self._services: dict[str, Service] = {"tcp": tcp, "reverse": self._reverse, **(services or {})}
        self._session: Session | None = None
        self._redial: Redial | None = None
        self._id, self._dialled = "", 0.0
        self._way = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def called(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        """The hub wants the tunnel: dials in. Raises why it cannot."""
        now, session = asyncio.get_running_loop().time(), self._session
        if session is None or session.error is not None:
            anew = True
        elif args.get("id") == self._id:  # the hub still has our session, and only its link is lost
            self._poke(session)
            anew = False
        else:
            anew = now - self._dialled > _JUST_DIALLED
        if anew:
            self._dialled = now
            await self._open(str(args.get("nonce", "")))
        yield b"ok"

    async def run(self) -> None:
        """Until it is cancelled; then every stream ends."""
        try:
            await asyncio.Event().wait()
        finally:
            if self._session is not None:
                self._session.close(Unreachable("the node's agent stops"))
            if self._redial is not None:
                self._redial.close()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self, nonce: str) -> None:
        old, self._session = self._session, None
        if old is not None:
            old.close(Unreachable("the node opens its tunnel anew"))
        id = secrets.token_hex(16)
        session = Session(
            f"{self._node}", dials=True, serve=self.serve, on_end=self._ended, on_suspect=lambda: self._poke(session)
        )
        redial = Redial(session, lambda s, attempt: self._dial(s, id, nonce if attempt == 0 else "", attempt))
        try:
            await redial.first()
        except EdgewardError as e:
            session.close(e, tell=False)
            raise
        self._session, self._redial, self._id = session, redial, id
        log.info("the tunnel to the hub is open")

    async def _dial(self, session: Session, id: str, nonce: str, attempt: int) -> None:
        ways = self._ways()
        if not ways:
            raise Unreachable("this node has no hub")
        failed: EdgewardError | None = None
        for n in range(len(ways)):
            way = ways[(self._way + n) % len(ways)]
            try:
                await self._by(way, session, id, nonce, attempt)
                self._way = (self._way + n) % len(ways)
                return
            except EdgewardError as e:
                # one hub process of several may not know the session; a refusal of all of them is one
                failed = e if failed is None or isinstance(failed, Unreachable) else failed
        raise failed or Unreachable("no address of the hub is known")

    async def _by(self, way: Way, session: Session, id: str, nonce: str, attempt: int) -> None:
        said = session.received_bytes
        asked = transcript(self._node, id, nonce, attempt, said)
        signature = base64.b64encode(self._sign(asked)).decode()
        headers = {
            "Edgeward-Node": self._node,
            "Edgeward-Session": id,
            "Edgeward-Nonce": nonce,
            "Edgeward-Attempt": str(attempt),
            "Edgeward-Received": str(said),
            "Edgeward-Signature": signature,
        }
        upgraded = await dial(way, PATH, headers)
        received = upgraded.headers.get("edgeward-received", "")
        try:
            proof = base64.b64decode(upgraded.headers.get("edgeward-proof", ""), validate=True)
        except (ValueError, binascii.Error):
            proof = b""
        if not received.isdigit() or not self._hubs(answered(asked, int(received)), proof):
            upgraded.close()
            raise Refused(f"what answers at {way} is not the hub", remedy="something in between answers in its place")
        upgraded.take(session, int(received), said)

    def _poke(self, session: Session) -> None:
        if self._session is session and self._redial is not None:
            self._redial.poke()

    def _ended(self, session: Session) -> None:
        log.info("the tunnel to the hub has ended: %s", session.error)
        if self._session is session:
            self._session = None

    # -- streams -----------------------------------------------------------------------------------------------------

    def serve(self, stream: Stream) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: Stream) -> None:
        purpose = stream.purpose
        try:
            use = use_of(purpose)
            service = self._services.get(purpose.service)
            if service is None:
                raise Refused(f"this node serves no {purpose.service}", remedy="upgrade the node's agent")
            self._policy.check(use)
            await _while_open(service(purpose, stream), stream)
            stream.end()
        except EdgewardError as e:
            stream.fail(e)
        except asyncio.CancelledError:
            stream.fail(Unreachable("the node's agent stops"))
            raise
        except Exception:
            log.exception("a stream for %s failed", purpose.service)
            stream.fail(EdgewardError("the service failed; the agent's log says why"))

    async def _reverse(self, purpose: Open, stream: Stream) -> None:
        """Listens on a port of the node; each connection goes to the operator's machine."""
        loop = asyncio.get_running_loop()
        host = str(purpose.args.get("host") or "127.0.0.1")
        session = stream.session

        class Back(Socket):
            def opened(self) -> Stream | None:
                if session.error is not None:
                    return None
                return session.open_for(Open("back", {}, listen=purpose.listen))

        try:
            server = await loop.create_server(Back, host, int(purpose.args.get("port", 0)))
        except OSError as e:
            raise Refused(f"the node cannot listen there: {e.strerror or e}", field="port") from None
        async with server:
            at = server.sockets[0].getsockname()
            stream.accept({"host": at[0], "port": at[1]})
            while await stream.read():
                pass


async def _while_open(work: Awaitable[None], stream: Stream) -> None:
    """The service, until the stream is reset: it need not be reading to be ended."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(stream.wait_failed())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
        with contextlib.suppress(asyncio.CancelledError, EdgewardError):
            await task


def answered(asked: bytes, received: int) -> bytes:
    """What the hub's CA signs: the answer to this very ask."""
    import hashlib

    return b"edgeward tunnel answer 1\0" + hashlib.sha256(asked).digest() + received.to_bytes(8, "big")


async def tcp(purpose: Open, stream: Stream) -> None:
    """A connection to ``args.port`` of ``args.host``, or of the node itself."""
    host, port = str(purpose.args.get("host") or ""), int(purpose.args.get("port") or 0)
    if not port:
        raise Invalid("which port?", field="port")
    await reach(host, port, Socket(stream))
    stream.accept()
    await stream.wait_closed()


async def reach(host: str, port: int, protocol: Socket) -> None:
    """Connects; the node itself is reached by IPv4 or IPv6, whichever answers. Raises ``Unreachable``."""
    loop = asyncio.get_running_loop()
    hosts = ["127.0.0.1", "::1"] if host.lower() in ("", "localhost") else [host]
    where = host_port(host, port) if host else f"port {port} of the node"

    def none(e: OSError | TimeoutError) -> NoReturn:
        why = "no answer in time" if isinstance(e, TimeoutError) else e.strerror or str(e)
        raise Unreachable(f"nothing answers at {where}: {why}", remedy="does it listen there?") from None

    for n, one in enumerate(hosts):
        try:
            async with asyncio.timeout(DIAL_PORT):
                await loop.create_connection(lambda: protocol, one, port)
            return
        except (OSError, TimeoutError) as e:
            if n == len(hosts) - 1:
                none(e)
