"""``/nodes/NODE/proxy/PORT/...``: the HTTP and the WebSockets of a device behind a node, for a browser or a script.

In comes a request that the gate let in, by a bearer token or by a *ticket* in its path (``/~TICKET/``, for browsers,
which send no token by themselves); out goes the same request to the device, over a stream of the node's tunnel, one
stream a request. Each is decided by the caller's rules and the node's policy, what was used is in the audit. What
changes on the way is in ``proxying.py``. A ticket is the caller's token, sealed with the hub's key, for one port of one
node and for an hour: whoever has it may see that page, and nobody can make a token of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, unquote

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from edgeward.core import clock
from edgeward.core.access import Action, declare, principal
from edgeward.core.audit import Audit
from edgeward.core.authz import TUNNEL, Principal
from edgeward.core.b64url import b64, unb64
from edgeward.core.describe import described
from edgeward.core.errors import EdgewardError, Forbidden, Gone, Invalid, Refused, Unauthorized, Unreachable
from edgeward.core.http_guard import TAKEOVER
from edgeward.core.passage import Passage
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.store import Store
from edgeward.core.streaming import json, only
from edgeward.tunnel import proxying
from edgeward.tunnel.cloud import IDLE, Tunnels
from edgeward.tunnel.framing import Open
from edgeward.tunnel.proxying import Headers, Jar, Place, Where, parse_where
from edgeward.tunnel.session import Stream
from edgeward.tunnel.splice import Socket

#: Seconds that a ticket is good for, and that a device has for the head of its answer.
TICKET, HEAD_TIME = 3600.0, 60.0
#: Bytes of an answer's head.
_HEAD_MOST = 64 * 1024
#: Seconds without a request after which a use is over, for the audit; and between two looks.
_QUIET, _LOOK = 60.0, 1.0
_JARS_MOST, _USES_MOST = 1024, 1024
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
PROTOCOL = "http"


class Tickets:
    """Makes and opens tickets. ``key``: 32 bytes, the same in all processes that shall take them."""

    def __init__(self, key: bytes, now: Callable[[], float] = clock.now) -> None:
        self._cipher, self._now = ChaCha20Poly1305(key), now

    @staticmethod
    def _bound(node: str, where: Where) -> bytes:
        return f"edgeward ticket\n{node}\n{where}".encode()

    def make(self, token: str, node: str, where: Where) -> tuple[str, float]:
        """The ticket, and when it ends (seconds since 1970)."""
        ends = self._now() + TICKET
        nonce = os.urandom(12)
        sealed = self._cipher.encrypt(nonce, msgspec.msgpack.encode((ends, token)), self._bound(node, where))
        return b64(nonce + sealed), ends

    def open(self, ticket: str, node: str, where: Where) -> str:
        """The token. Raises ``Unauthorized``."""
        wrong = Unauthorized("the link to this page is not good", remedy="get one: edgeward tunnel url NODE PORT")
        if not 40 <= len(ticket) <= 1024:
            raise wrong
        try:
            data = unb64(ticket)
            opened = self._cipher.decrypt(data[:12], data[12:], self._bound(node, where))
            ends, token = msgspec.msgpack.decode(opened, type=tuple[float, str])
        except (ValueError, InvalidTag, msgspec.MsgspecError):
            raise wrong from None
        if self._now() >= ends:
            raise Unauthorized("the link to this page has ended", remedy="get a new one: edgeward tunnel url NODE PORT")
        return token


class _Use:
    def __init__(self, who: Principal, source: str) -> None:
        self.who, self.source = who.name, source
        self.began = self.last = clock.monotonic()
        self.requests = self.open = self.to_node = self.from_node = 0


class Proxy:
    """``key``: of the tickets."""

    def __init__(self, tunnels: Tunnels, store: Store, audit: Audit, key: bytes) -> None:
        self._tunnels, self._store, self._audit = tunnels, store, audit
        self.tickets = Tickets(key)
        self._jars: OrderedDict[tuple[str, str, Where], Jar] = OrderedDict()
        self._uses: dict[tuple[str, str, str], _Use] = {}

    def routes(self) -> list[Route]:
        by = Action("own", (TUNNEL,), "Node")
        return [
            Route("/api/v1/nodes/{name}/proxy", declare(self.link, by), methods=["POST"]),
            Route("/nodes/{name}/proxy/{where}/{path:path}", declare(self.serve, by), methods=_METHODS),
        ]

    async def run(self) -> None:
        """Ends uses that are over, for the audit."""
        try:
            while True:
                await asyncio.sleep(_QUIET / 12)  # the period
                await self._end(lambda use: not use.open and clock.monotonic() - use.last > _QUIET)
        finally:
            await self._end(lambda _: True)

    async def _end(self, over: Callable[[_Use], bool]) -> None:
        for key in [k for k, use in self._uses.items() if over(use)]:
            use = self._uses.pop(key)
            detail = {
                "use": key[2], "seconds": round(use.last - use.began, 1), "requests": use.requests,
                "bytesToNode": use.to_node, "bytesFromNode": use.from_node,
            }  # fmt: skip
            await self._record(key[1], use, "ended", detail)

    async def _record(self, node: str, use: _Use, outcome: str, detail: dict[str, Any]) -> None:
        key = Key("Node", CLUSTER, node)
        await self._audit.write(TUNNEL, key, actor=use.who, source=use.source, outcome=outcome, detail=detail)

    # -- who asks ----------------------------------------------------------------------------------------------------

    def ticket(self, scope: Scope) -> str | None:
        """The token of a request that brings a ticket; None: it brings none. Raises ``Unauthorized``."""
        parts = scope["path"].split("/", 6)
        if len(parts) < 6 or parts[1] != "nodes" or parts[3] != "proxy" or not parts[5].startswith("~"):
            return None
        try:
            where = parse_where(parts[4])
        except Invalid:
            return None
        return self.tickets.open(parts[5][1:], parts[2], where)

    def _asker(self, request: Request) -> tuple[Principal, str]:
        """Who asks for which node: who may not use any tunnel to it is told so, whatever else was wrong."""
        who, node = principal(request), request.path_params["name"]
        if not self._tunnels.may_at_all(who, node):
            raise who.refusal(self._tunnels.ask(node))
        return who, node

    @described(
        "A link for a browser to a page behind a node, good for an hour",
        query={"port": ("string", "80, or 192.168.1.20:80 for a machine behind the node")},
    )
    async def link(self, request: Request) -> Response:
        only(request, "port")
        who, node = self._asker(request)
        where = parse_where(request.query_params.get("port", ""))
        await self._tunnels.permit(who, node, _passage(where), _source(request))
        self._store.get(Key("Node", CLUSTER, node))
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Refused(
                "a link is made for a token", remedy="ask with one; on a unix socket use: edgeward tunnel open"
            )
        ticket, ends = self.tickets.make(token.strip(), node, where)
        path = f"/nodes/{quote(node, safe='')}/proxy/{quote(str(where), safe=':[]')}/~{ticket}/"
        return json({"path": path, "expires": clock.timestamp(ends)})

    @described("A page behind a node: the device's own answer", media="*/*")
    async def serve(self, request: Request) -> Response:
        who, node = self._asker(request)
        where = parse_where(request.path_params["where"])
        place, target = _place(request.scope, node, where)
        headers: Headers = [(k.lower(), v) for k, v in request.scope["headers"]]
        if place.browsing and request.method == "OPTIONS" and (said := proxying.preflight(headers)) is not None:
            return _Plain(204, said)
        source = _source(request)
        await self._tunnels.permit(who, node, _passage(where), source)
        self._store.get(Key("Node", CLUSTER, node))
        upgrade = request.headers.get("upgrade", "").lower() == "websocket"
        jar = self._jar(who, node, where)
        cookies = jar.header(unquote(target.split(b"?")[0].decode("latin-1")) or "/")
        head = proxying.request_head(request.method, target, headers, place, cookies, upgrade=upgrade)
        use = await self._used(who, node, where, source)
        args: dict[str, Any] = {"port": where.port} | ({"host": where.host} if where.host else {})
        stream = await self._tunnels.open(node, Open(PROTOCOL, args, who.name, source))
        exchange = _Exchange(stream, place, jar, use, head, request.method == "HEAD", upgrade)
        exchange.allowed = lambda: self._still(request, node, where)
        return exchange

    def _still(self, request: Request, node: str, where: Where) -> bool:
        again = request.scope.get("again")
        try:
            self.ticket(request.scope)  # which ends by itself, whatever the token in it may
            return self._tunnels.may(again() if again else principal(request), node, _passage(where))
        except EdgewardError:
            return False

    def _jar(self, who: Principal, node: str, where: Where) -> Jar:
        key = (who.name, node, where)
        jar = self._jars.pop(key, None) or Jar()
        self._jars[key] = jar
        if len(self._jars) > _JARS_MOST:
            self._jars.popitem(last=False)
        return jar

    async def _used(self, who: Principal, node: str, where: Where, source: str) -> _Use:
        key = (who.name, node, str(_passage(where)))
        use = self._uses.get(key)
        if use is None:
            if len(self._uses) >= _USES_MOST:
                await self._end(lambda one: not one.open)
            use = self._uses[key] = _Use(who, source)
            await self._record(node, use, "opened", {"use": key[2]})
        use.requests += 1
        use.last = clock.monotonic()
        return use


def _passage(where: Where) -> Passage:
    host = where.host if where.host not in ("localhost", "127.0.0.1", "::1") else ""
    return Passage(PROTOCOL, host, where.port)


def _source(request: Request) -> str:
    return request.client.host if request.client and request.client.host else "local"


def _place(scope: Scope, node: str, where: Where) -> tuple[Place, bytes]:
    """Where the page lies, and what the device is asked for, as the browser wrote it."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    parts = raw.split(b"/", 5)
    if len(parts) < 6 or [unquote(p.decode("latin-1")) for p in (parts[2], parts[4])] != [
        node,
        scope["path"].split("/")[4],
    ]:
        raise Invalid("the path cannot be read", remedy="write /nodes/NODE/proxy/PORT/...")
    prefix, rest = b"/".join(parts[:5]), parts[5]
    bearer = dict(scope["headers"]).get(b"authorization", b"").lower().startswith(b"bearer ")
    browsing = rest.startswith(b"~") and not bearer
    if browsing:
        ticket, _, rest = rest.partition(b"/")
        prefix += b"/" + ticket
    query: bytes = scope.get("query_string") or b""
    target = b"/" + rest + (b"?" + query if query else b"")
    return Place(where, prefix.decode("latin-1"), browsing), target


class _Plain(Response):
    def __init__(self, status: int, headers: Headers) -> None:
        super().__init__(status_code=status)
        self.raw_headers = headers


class _Answer:
    """A device's answer as it is read (``httptools`` calls these)."""

    def __init__(self) -> None:
        import httptools

        self.headers: Headers = []
        self.body = bytearray()
        self.headed = self.whole = False
        self._bytes = 0
        self.parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Raises ``Unreachable`` for what is no HTTP."""
        import httptools

        if not self.headed:
            self._bytes += len(data)
            if self._bytes > _HEAD_MOST + 65536:
                raise Unreachable("the device's answer has too large a head")
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError as e:
            if not self.whole:
                raise Unreachable(
                    f"what answers there does not speak HTTP: {e}", remedy="is it the right port?"
                ) from None

    def taken(self) -> bytes:
        """What there is of the body; it is kept no longer."""
        body = bytes(self.body)
        self.body.clear()
        return body

    @property
    def status(self) -> int:
        return int(self.parser.get_status_code())

    def on_message_begin(self) -> None:
        self.headers, self.headed = [], False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.headed = self.status >= 200 or self.status == 101  # others come before the answer

    def on_body(self, body: bytes) -> None:
        self.body += body  # chunks may be of one byte

    def on_message_complete(self) -> None:
        self.whole = self.headed


class _Exchange(Response):
    """The answer to one request: what the device says, as it comes."""

    def __init__(
        self, stream: Stream, place: Place, jar: Jar, use: _Use, head: bytes, bodiless: bool, upgrade: bool
    ) -> None:
        super().__init__()
        self._stream, self._place, self._jar, self._use = stream, place, jar, use
        self._head, self._bodiless = head, bodiless
        self._upgrade = upgrade
        #: Whether the caller still may.
        self.allowed: Callable[[], bool] = lambda: True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._use.open += 1
        asking = asyncio.create_task(self._ask(scope, receive))
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        answering = asyncio.create_task(self._answer(scope, sending))
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({asking, answering}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and asking.exception() is None and not scope.get("taken"):
                return  # the client is gone
            try:
                await answering  # what a device says to half a request is worth more than that it did not read the rest
            except EdgewardError:
                if not started:
                    raise
                # an answer in the middle is only broken off: the server closes the connection
        finally:
            for task in (asking, answering, watching):
                task.cancel()
            await asyncio.gather(asking, answering, watching, return_exceptions=True)
            if not self._stream.closed:
                self._stream.fail(Gone("the request is over"))
            self._use.open -= 1
            self._use.last = clock.monotonic()
            self._use.to_node += self._stream.went
            self._use.from_node += self._stream.came

    async def _ask(self, scope: Scope, receive: Receive) -> None:
        """The request to the device; then it waits for the client to go."""
        await self._stream.write(self._head)
        chunked = any(k.lower() == b"transfer-encoding" for k, _ in scope["headers"])
        more = not self._upgrade
        while more:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                return
            body: bytes = message.get("body", b"")
            more = bool(message.get("more_body"))
            if body:
                await self._stream.write(b"%x\r\n%b\r\n" % (len(body), body) if chunked else body)
        if chunked and not self._upgrade:
            await self._stream.write(b"0\r\n\r\n")
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _watch(self) -> None:
        """Ends what the caller may not any more, and what idles: an upload, a quiet page of events, a WebSocket."""
        stream, loop = self._stream, asyncio.get_running_loop()
        while not stream.closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):
                    await stream.wait_closed()
            if not self.allowed():
                stream.fail(Forbidden("the caller may not any more"))
            elif loop.time() - stream.moved > IDLE:
                stream.fail(Gone(f"nothing moved for {IDLE:g} s"))

    async def _answer(self, scope: Scope, send: Send) -> None:
        answer, raw = _Answer(), b""
        try:
            async with asyncio.timeout(HEAD_TIME):
                while not answer.headed:
                    data = await self._stream.read()
                    if not data:
                        raise Unreachable("the device closed the connection without an answer")
                    raw += data if self._upgrade else b""
                    answer.feed(data)
        except TimeoutError:
            raise Unreachable(f"the device does not answer within {HEAD_TIME:g} s") from None
        self._jar.take(v for k, v in answer.headers if k.lower() == b"set-cookie")
        if answer.status > 599:
            raise Unreachable(f"the device answers with a status that is none: {answer.status}")
        if answer.status == 101:
            if not self._upgrade or TAKEOVER not in scope.get("extensions", {}):
                raise Unreachable("the device wants to speak something else than HTTP")
            await self._take_over(scope, answer, raw.partition(b"\r\n\r\n")[2])
            return
        headers = proxying.answer_headers(answer.headers, self._place)
        if self._bodiless or answer.status in (204, 304):
            if not self._bodiless:  # a length of nothing is an answer that broke off, for the server
                headers = [(k, v) for k, v in headers if k != b"content-length"]
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        kind = next((v for k, v in headers if k == b"content-type"), b"").decode("latin-1")
        first = b""
        if proxying.is_rewritten(kind):
            first, headers = await self._rewritten(answer, headers, kind)
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        if first:
            await send({"type": "http.response.body", "body": first, "more_body": True})
        while True:
            if body := answer.taken():
                await send({"type": "http.response.body", "body": body, "more_body": True})
            if answer.whole:
                break
            data = await self._stream.read()
            if not data:
                if any(k == b"content-length" for k, _ in headers):
                    raise Unreachable("the device broke off its answer")
                break
            answer.feed(data)
        await send({"type": "http.response.body", "body": b""})

    async def _rewritten(self, answer: _Answer, headers: Headers, kind: str) -> tuple[bytes, Headers]:
        """A page with its links put below the path; one that is too large, or packed as we do not know it, as it is."""
        while not answer.whole and len(answer.body) <= proxying.REWRITE_MOST:
            data = await self._stream.read()
            if not data:
                answer.whole = True
                break
            answer.feed(data)
        body = answer.taken()
        packed = next((v for k, v in headers if k == b"content-encoding"), b"identity").strip().lower()
        # half a second of work for a large one: not in the loop that all links of this hub go through
        plain = await asyncio.to_thread(_unpacked, body, packed) if answer.whole else None
        if plain is None:
            return body, headers
        dropped = (b"content-length", b"content-encoding", b"etag", b"content-md5", b"digest", b"accept-ranges")
        kept = [(k, v) for k, v in headers if k not in dropped]
        page = await asyncio.to_thread(proxying.rewrite, plain, kind.lower(), self._place)
        return page, [*kept, (b"content-length", str(len(page)).encode())]

    async def _take_over(self, scope: Scope, answer: _Answer, rest: bytes) -> None:
        """From here on bytes both ways, until either ends or the caller may not any more."""
        lines = [b"HTTP/1.1 101 Switching Protocols", b"Connection: Upgrade", b"Upgrade: websocket"]
        lines += [k + b": " + v for k, v in answer.headers if k.lower().startswith(b"sec-websocket-")]
        stream = self._stream
        scope["taken"] = True
        try:
            transport = scope["extensions"][TAKEOVER](_Held())
        except ConnectionResetError:
            stream.fail(Gone("the client is gone"))
            return
        transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + rest)
        socket = Socket(stream)
        transport.set_protocol(socket)
        socket.connection_made(transport)
        await stream.wait_closed()


class _Held(asyncio.Protocol):
    """Between two protocols of one connection."""


def _unpacked(body: bytes, packed: bytes) -> bytes | None:
    if packed in (b"identity", b""):
        return body
    if packed not in (b"gzip", b"x-gzip"):
        return None
    try:
        unpacker = zlib.decompressobj(31)
        plain = unpacker.decompress(body, proxying.REWRITE_MOST)
    except zlib.error:
        return None
    return plain if unpacker.eof and not unpacker.unconsumed_tail else None


def ticket_key(secret: bytes) -> bytes:
    return hashlib.sha256(b"edgeward proxy tickets\0" + secret).digest()
