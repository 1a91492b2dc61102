"""The hub's end of tunnels: operators' WebSockets on one side, nodes' on the other, and streams joined between them.

An operator's stream is decided when it is opened: the caller's rules by service, host and port, then the node's own
policy at the node; what was used is in the audit, with bytes and seconds when it ends. A caller whose token ends or
whose role changes is looked at again every second, and streams that idle are cut. Nodes dial in when they are asked to
(``edge.py``), to whichever hub process their way leads to; another process that needs the node asks for it by name and
passes its streams by NATS (``peers.py``).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edgeward.core import clock
from edgeward.core.access import Action, ask_for, declare, opened, principal
from edgeward.core.audit import Audit
from edgeward.core.authz import TUNNEL, Ask, Principal, perhaps
from edgeward.core.context import correlation
from edgeward.core.describe import described
from edgeward.core.errors import (
    Conflict,
    EdgewardError,
    Forbidden,
    Gone,
    Invalid,
    NotFound,
    Refused,
    TooMany,
    Unreachable,
)
from edgeward.core.http_guard import TAKEOVER
from edgeward.core.passage import Passage
from edgeward.core.problems import refused
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.store import Store
from edgeward.core.throttle import Throttle
from edgeward.tunnel.edge import PATH, answered, transcript, use_of
from edgeward.tunnel.exec import told
from edgeward.tunnel.framing import Open, accept_key
from edgeward.tunnel.inside import app_of
from edgeward.tunnel.link import WebLink
from edgeward.tunnel.session import Session, Stream
from edgeward.tunnel.splice import join

log = logging.getLogger("edgeward.tunnel")

#: Seconds in which a node must have dialled in.
DIAL_IN = 15.0
#: Seconds between two looks at who may still do what; without a stream after which a node's tunnel is closed; without
#: a byte after which a stream is cut.
_AGAIN, _UNUSED, IDLE = 1.0, 60.0, 1800.0
#: Seconds for the last records of a process that stops.
_LAST = 2.0
#: Sessions of operators at once, and of one of them.
_MOST, _MOST_OF_ONE = 2048, 64
#: Different things that one session may do: each is a record of the audit.
_MOST_USES = 256


class Peers(Protocol):
    """Other hub processes (``peers.py``)."""

    async def reach(self, node: str) -> Session | None: ...

    def hold(self, node: str, held: bool) -> None: ...

    def used(self, node: str) -> bool: ...


class _Taken(Response):
    """The answer that is the end of HTTP on this connection."""

    def __init__(self, session: Session, received: int, more: Callable[[int], dict[str, str]] = lambda _: {}) -> None:
        """``received``: what the other end has; ``more``: headers that say more than what this end has."""
        super().__init__(status_code=101)
        self._session, self._received, self._more = session, received, more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # from here on nothing waits: the old link must bring nothing between what we say that we have and its end
        if not self._session.knows(self._received):
            stale = Conflict("the link has brought more since this was asked", remedy="ask again")
            await refused(stale)(scope, receive, send)
            return
        key = dict(scope["headers"]).get(b"sec-websocket-key", b"")
        link = WebLink(self._session, client=False)
        lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
        mine = self._session.received_bytes
        headers = {"Edgeward-Received": str(mine), **self._more(mine)}
        lines += [f"Sec-WebSocket-Accept: {accept_key(key).decode()}", *(f"{k}: {v}" for k, v in headers.items())]
        try:
            transport = scope["extensions"][TAKEOVER](link)
        except ConnectionResetError:
            return
        transport.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        self._session.attach(link, self._received)


def _upgrade(request: Request) -> None:
    h = request.headers
    if h.get("upgrade", "").lower() != "websocket" or not h.get("sec-websocket-key"):
        raise Refused("this is a WebSocket", remedy="use: edgeward tunnel open NODE PORT")
    if TAKEOVER not in request.scope.get("extensions", {}):
        raise Refused("this listener takes no tunnels")


def _number(request: Request, name: str) -> int:
    text = request.headers.get(name, "0")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise Invalid("is no number", field=name)
    return int(text)


def _session_id(request: Request) -> str:
    text = request.headers.get("edgeward-session", "")
    if not 32 <= len(text) <= 64 or not text.isalnum():
        raise Invalid("a session has a random name of 32 to 64 letters and digits", field="Edgeward-Session")
    return text


class _Use:
    """One thing that a session does, for the audit."""

    def __init__(self, passage: Passage) -> None:
        self.passage = passage
        self.began = clock.monotonic()
        self.streams = self.open = self.to_node = self.from_node = 0
        self.error = ""


class Desk:
    """An operator's session with one node."""

    def __init__(self, tunnels: Tunnels, id: str, node: str, who: Callable[[], Principal], source: str) -> None:
        self._tunnels, self.id, self.node, self._again, self.source = tunnels, id, node, who, source
        self.principal = who()
        self._labels = tunnels.ask(node).labels
        self.uses: dict[str, _Use] = {}
        self.streams: dict[Stream, tuple[Passage, str, Key | None]] = {}
        self.session = Session(
            f"{self.principal.name}@{node}", dials=False, serve=self._serve, on_end=lambda _: tunnels.left(self)
        )

    def _serve(self, stream: Stream) -> None:
        self._tunnels.spawn(self.serve(stream))

    async def serve(self, stream: Stream) -> None:
        tunnels, purpose = self._tunnels, stream.purpose
        try:
            use, app = use_of(purpose), app_of(purpose.service, purpose.args)
            await tunnels.permit(self.principal, self.node, use, self.source, app)
            what = await self._note(use, purpose)
            self.streams[stream] = (use, what, app)
            tunnels.spawn(self._watch(stream, what))
            asked = Open(purpose.service, purpose.args, self.principal.name, self.source)
            await tunnels.forward(stream, self.node, asked, self.session)
        except EdgewardError as e:
            stream.fail(e)

    async def _note(self, use: Passage, purpose: Open) -> str:
        """The use's first stream is a record; so is each run of a program."""
        what = str(use) if use.port else f"{use} {secrets.token_hex(4)}"
        if what not in self.uses:
            if len(self.uses) >= _MOST_USES:
                raise TooMany("this session does too many different things", remedy="open another one")
            self.uses[what] = _Use(use)
            await self._tunnels.record(self, use, "opened", told(purpose.service, purpose.args))
        self.uses[what].streams += 1
        self.uses[what].open += 1
        return what

    async def _watch(self, stream: Stream, what: str) -> None:
        await stream.wait_closed()
        self.streams.pop(stream, None)
        known = self.uses.get(what)
        if known is None:
            return  # it was said already, at the session's end
        known.open -= 1
        known.to_node += stream.came
        known.from_node += stream.went
        if stream.error is not None and self.session.error is None and not isinstance(stream.error, Gone):
            known.error = str(stream.error)
        if not known.passage.port:  # a program's run ends with its stream
            await self._ended(what)

    async def _ended(self, what: str) -> None:
        known = self.uses.pop(what)
        outcome = f"ended: {known.error}" if known.error else "ended"
        detail = {
            "seconds": round(clock.monotonic() - known.began, 1),
            "streams": known.streams,
            "bytesToNode": known.to_node,
            "bytesFromNode": known.from_node,
        }
        await self._tunnels.record(self, known.passage, outcome, detail)

    async def close(self) -> None:
        """What is left to be said of it."""
        for stream in tuple(self.streams):
            _, what, _ = self.streams.pop(stream)
            known = self.uses.get(what)
            if known is not None:
                known.to_node += stream.came
                known.from_node += stream.went
        why = str(self.session.error) if isinstance(self.session.error, Forbidden) else ""
        for what in tuple(self.uses):
            self.uses[what].error = self.uses[what].error or why
            await self._ended(what)

    def look(self, now: float, idle: float) -> None:
        """Ends what its principal may not do any more, and what idles. Called every second."""
        try:
            who = self._again()
        except EdgewardError as e:
            self.session.close(Forbidden(f"the session ended: {e.message}", remedy="get a new token"))
            return
        labels = self._tunnels.ask(self.node).labels
        changed = (who.rules, labels) != (self.principal.rules, self._labels)
        self.principal, self._labels = who, labels
        for stream, (use, _, app) in tuple(self.streams.items()):
            # an App's labels are looked at each time
            if (changed or app is not None) and not self._tunnels.may(who, self.node, use, app):
                ask = self._tunnels.ask(self.node, use, app)
                whose = "node" if app is None else "App"
                stream.fail(who.refusal(ask, f"your role has changed, or the {whose}'s labels"))
            elif now - stream.moved > idle:
                stream.fail(Gone(f"nothing moved for {idle:g} s", remedy="open it again"))
        if changed and not self._tunnels.may_at_all(who, self.node):
            self.session.close(who.refusal(self._tunnels.ask(self.node), "your role has changed, or the node's labels"))


class Tunnels:
    """``key_of``: the public device key of a node that may come in; ``prove``: the CA's signature; ``verify``: a key,
    what was signed, the signature; ``call``: asks a node to dial in, with a nonce; ``use_nonce``: raises for one that
    is not good."""

    def __init__(
        self,
        store: Store,
        audit: Audit,
        *,
        key_of: Callable[[str], str],
        verify: Callable[[str, bytes, bytes], bool],
        prove: Callable[[bytes], bytes],
        nonce: Callable[[], str],
        use_nonce: Callable[[str], None],
        call: Callable[[str, dict[str, Any]], Awaitable[None]],
        online: Callable[[str], bool],
        idle: float = IDLE,
    ) -> None:
        self._store, self._audit = store, audit
        self._key_of, self._verify, self._prove = key_of, verify, prove
        self._nonce, self._use_nonce, self._call, self._online = nonce, use_nonce, call, online
        self._idle = idle
        #: What nodes are held here: their session, its name, the attempt that its present link was, its key.
        self.nodes: dict[str, _Held] = {}
        self.desks: dict[str, Desk] = {}
        self._desk_attempts: dict[str, int] = {}
        #: Where connections to a reverse tunnel's port go: by node and the tunnel's name.
        self._back: dict[tuple[str, str], Session] = {}
        self.peers: Peers | None = None
        self._waiting: dict[str, asyncio.Event] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        # who is refused must not be able to push what others did out of the audit (as core/gate.py)
        self._refused = Throttle(burst=30, rate=1 / 60)

    def routes(self) -> list[Route]:
        by = Action("own", (TUNNEL,), "Node")
        return [
            Route(PATH, opened(self.node_link), methods=["GET"]),
            Route("/api/v1/nodes/{name}/tunnel", declare(self.client_link, by), methods=["GET"]),
        ]

    def spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                await asyncio.sleep(_AGAIN)  # the period
                now = loop.time()
                for desk in tuple(self.desks.values()):
                    desk.look(now, self._idle)
                wanted = {desk.node for desk in self.desks.values()} | self._waiting.keys()
                for node, held in tuple(self.nodes.items()):
                    self._look(node, held, node in wanted, now)
        finally:
            for desk in tuple(self.desks.values()):
                desk.session.close(Unreachable("this hub process stops", remedy="open it again"))
            for held in tuple(self.nodes.values()):
                held.session.close(Unreachable("this hub process stops"))
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=_LAST)  # what is left to be recorded
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _look(self, node: str, held: _Held, wanted: bool, now: float) -> None:
        if self._key_of(node) != held.key:
            held.session.close(Forbidden("the node is revoked, or another box has its name"))
        if wanted or held.session.streams or (self.peers is not None and self.peers.used(node)):
            held.used = now
        elif now - held.used > _UNUSED:
            held.session.close(Gone("nobody uses the tunnel"))

    # -- who may ---------------------------------------------------------------------------------------------------

    def ask(self, node: str, use: Passage | None = None, app: Key | None = None) -> Ask:
        """``app``: for a program inside it, whatever is allowed on the node."""
        if app is not None:
            return ask_for(self._store, "exec", app)
        known = ask_for(self._store, TUNNEL, Key("Node", CLUSTER, node))
        return Ask(TUNNEL, "Node", CLUSTER, node, known.labels, use)

    def may(self, who: Principal, node: str, use: Passage, app: Key | None = None) -> bool:
        return who.may(self.ask(node, use, app))

    def may_at_all(self, who: Principal, node: str) -> bool:
        """Whether there may be a session, of which each stream is decided by itself."""
        ask = self.ask(node)
        if who.may(ask) or who.may(Ask("exec", "Node", CLUSTER, node, ask.labels)):
            return True
        return perhaps(who.rules, "exec", "App")

    async def permit(self, who: Principal, node: str, use: Passage, source: str, app: Key | None = None) -> None:
        """Raises ``Forbidden``, which is in the audit then; of a storm of them the first."""
        if self.may(who, node, use, app):
            return
        refusal = who.refusal(self.ask(node, use, app))
        if self._refused.take(who.name, clock.monotonic()):
            raise refusal
        key = Key("Node", CLUSTER, node)
        await self._audit.write(TUNNEL, key, actor=who.name, source=source, outcome=f"Forbidden: {refusal.message}")
        raise refusal

    async def record(self, desk: Desk, use: Passage, outcome: str, detail: dict[str, Any]) -> None:
        key = Key("Node", CLUSTER, desk.node)
        await self._audit.write(
            TUNNEL, key, actor=desk.principal.name, source=desk.source, request=correlation.get(), outcome=outcome,
            detail={"use": str(use), **detail},
        )  # fmt: skip

    # -- operators ---------------------------------------------------------------------------------------------------

    @described("A tunnel to a node: a WebSocket that carries the streams of `edgeward tunnel`", code=101)
    async def client_link(self, request: Request) -> Response:
        who, node = principal(request), request.path_params["name"]
        if not self.may_at_all(who, node):
            raise who.refusal(self.ask(node))
        _upgrade(request)
        self._store.get(Key("Node", CLUSTER, node))
        id, attempt = _session_id(request), _number(request, "edgeward-attempt")
        desk = self.desks.get(id)
        if desk is None:
            if attempt:
                raise Gone("this hub process does not know the session", remedy="open it anew")
            desk = await self._new_desk(request, who, id, node)
        elif desk.node != node or desk.principal.name != who.name or attempt <= self._desk_attempts[id]:
            raise Forbidden("the session is somebody else's")
        self._desk_attempts[id] = attempt
        return _Taken(desk.session, _number(request, "edgeward-received"))

    async def _new_desk(self, request: Request, who: Principal, id: str, node: str) -> Desk:
        await self.prepare(node)  # an operator hears at once that a node is away, and the first stream need not wait
        # nothing waits from here on: of two that came at once with one name, one would be a session nobody looks at
        if id in self.desks:
            raise Forbidden("the session is somebody else's")
        own = sum(d.principal.name == who.name for d in self.desks.values())
        if len(self.desks) >= _MOST or own >= _MOST_OF_ONE:
            raise TooMany(f"{own} tunnels of yours are open", remedy="close some")
        again = request.scope.get("again") or (lambda: who)
        source = request.client.host if request.client and request.client.host else "local"
        desk = self.desks[id] = Desk(self, id, node, again, source)
        return desk

    def left(self, desk: Desk) -> None:
        self.desks.pop(desk.id, None)
        self._desk_attempts.pop(desk.id, None)
        self.spawn(desk.close())

    async def prepare(self, node: str) -> None:
        """For streams that will come. Raises why there can be none now: a session that waits for its link to come
        again is no reason to let a new operator wait as well."""
        self._check_online(node)
        await self.reach(node)

    async def forward(self, stream: Stream, node: str, purpose: Open, origin: Session) -> None:
        """Joins the stream to a new one at the node. Raises ``Unreachable``."""
        self._lead(stream, node, purpose, origin, await self.reach(node))

    def _lead(self, stream: Stream, node: str, purpose: Open, origin: Session, session: Session) -> None:
        if stream.error is not None:
            return
        if purpose.service == "reverse":
            purpose.listen = purpose.listen or secrets.token_hex(16)
            self._back[(node, purpose.listen)] = origin
            self.spawn(self._forget_back((node, purpose.listen), stream))
        join(stream, session.open_for(purpose))

    def passed_on(self, node: str, stream: Stream, origin: Session) -> None:
        """A stream of another hub process, which has let its caller in, to a node that is held here."""
        held = self.nodes.get(node)
        if held is None or held.session.error is not None:
            stream.fail(Unreachable(f"node {node} is not held here any more", remedy="try again"))
            return
        try:
            self._lead(stream, node, stream.purpose, origin, held.session)
        except EdgewardError as e:
            stream.fail(e)

    async def _forget_back(self, key: tuple[str, str], stream: Stream) -> None:
        await stream.wait_closed()
        self._back.pop(key, None)

    def back(self, node: str, stream: Stream) -> None:
        """A stream that a node opens: a connection to the port of a reverse tunnel."""
        origin = self._back.get((node, stream.purpose.listen)) if stream.purpose.service == "back" else None
        if origin is None or origin.error is not None:
            stream.fail(NotFound("nobody waits for this connection"))
            return
        join(stream, origin.open_for(Open("back", {}, listen=stream.purpose.listen)))

    async def open(self, node: str, purpose: Open) -> Stream:
        """A stream of the hub's own, for a caller whom :meth:`permit` let in. Raises ``Unreachable``, at once for a
        node that is away."""
        self._check_online(node)
        return (await self.reach(node)).open_for(purpose)

    # -- nodes -------------------------------------------------------------------------------------------------------

    async def reach(self, node: str) -> Session:
        """The session that leads to the node, here or by another hub process. Raises ``Unreachable``."""
        try:
            async with asyncio.timeout(DIAL_IN):
                while True:
                    held = self.nodes.get(node)
                    if held is not None and held.session.error is None:
                        if held.session.link is None:  # perhaps another run of the agent, or it went elsewhere
                            await self._have_dial(node, held.id)
                            held = self.nodes.get(node, held)
                        return held.session
                    if self.peers is not None and (session := await self.peers.reach(node)) is not None:
                        return session
                    await self._have_dial(node)
        except TimeoutError:
            raise Unreachable(
                f"node {node} did not open its tunnel", resource=f"Node/{node}", remedy="its agent's log says why"
            ) from None

    def _check_online(self, node: str) -> None:
        if not self._online(node):
            raise Unreachable(
                f"node {node} is not connected",
                resource=f"Node/{node}",
                remedy="is its link up? see: edgeward get node",
            )

    async def _have_dial(self, node: str, id: str = "") -> None:
        self._check_online(node)
        task = self._asking.get(node)
        if task is None:
            task = self._asking[node] = asyncio.get_running_loop().create_task(self._ask_node(node, id))
            task.add_done_callback(lambda _: self._asking.pop(node, None))
        await asyncio.shield(task)

    async def _ask_node(self, node: str, id: str) -> None:
        """Has the node dial in; it is there when this returns, here or at another hub process. ``id``: a session that
        is here, without a link: who still has it shall go on with it."""
        event = self._waiting.setdefault(node, asyncio.Event())
        try:
            await self._call(node, {"nonce": self._nonce(), "id": id})
            async with asyncio.timeout(2.0):
                await event.wait()
        except TimeoutError:
            pass  # it came in before, or somewhere else: the caller looks again
        finally:
            self._waiting.pop(node, None)

    def held_elsewhere(self, node: str) -> None:
        """Another hub process holds the node now."""
        held = self.nodes.get(node)
        if held is not None and held.session.link is None:
            held.session.close(Unreachable("the node opened its tunnel at another hub process"), tell=False)
        self.came_in(node)

    def came_in(self, node: str) -> None:
        """The node is held somewhere: whoever waits for it looks again."""
        if (event := self._waiting.get(node)) is not None:
            event.set()

    @described("A node's end of its tunnel: a WebSocket that the node signs for with its device key", code=101)
    async def node_link(self, request: Request) -> Response:
        _upgrade(request)
        h = request.headers
        node, nonce, id = h.get("edgeward-node", ""), h.get("edgeward-nonce", ""), _session_id(request)
        attempt, received = _number(request, "edgeward-attempt"), _number(request, "edgeward-received")
        asked = transcript(node, id, nonce, attempt, received)
        key = self._key_of(node)
        try:
            signature = base64.b64decode(h.get("edgeward-signature", ""), validate=True)
        except (ValueError, binascii.Error):
            signature = b""
        if not key or not self._verify(key, asked, signature):
            raise Forbidden("the node's signature is wrong, or it is revoked", resource=f"Node/{node[:63]}")
        held = self.nodes.get(node)
        if held is not None and held.id == id:
            if attempt <= held.attempt:
                raise Forbidden("this was signed for a link before", resource=f"Node/{node}")
        elif attempt:
            raise Gone("this hub process does not know the session")
        else:
            self._use_nonce(nonce)
            held = self._take(node, id, key)
        held.attempt = attempt

        def proof(mine: int) -> dict[str, str]:
            return {"Edgeward-Proof": base64.b64encode(self._prove(answered(asked, mine))).decode()}

        return _Taken(held.session, received, proof)

    def _take(self, node: str, id: str, key: str) -> _Held:
        old = self.nodes.pop(node, None)
        session = Session(
            node,
            dials=False,
            serve=lambda stream: self.back(node, stream),
            on_end=lambda session: self._lost(node, session),
        )
        held = self.nodes[node] = _Held(session, id, key)
        if old is not None:
            old.session.close(Unreachable("the node opened its tunnel anew"))
        log.info("node %s opened its tunnel", node)
        if self.peers is not None:
            self.peers.hold(node, True)
        self.came_in(node)
        return held

    def _lost(self, node: str, session: Session) -> None:
        held = self.nodes.get(node)
        if held is None or held.session is not session:
            return
        del self.nodes[node]
        log.info("the tunnel of node %s has ended: %s", node, session.error)
        if self.peers is not None:
            self.peers.hold(node, False)


class _Held:
    def __init__(self, session: Session, id: str, key: str) -> None:
        self.session, self.id, self.key = session, id, key
        self.attempt = -1
        self.used = asyncio.get_running_loop().time()
