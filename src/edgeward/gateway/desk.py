"""What becomes of a client's request, whatever protocol it came by: refused, answered from the memory, or asked on.

A desk serves one request at a time. How bytes come and go is its heirs' matter: ``door.py`` is a connection of HTTP/1.1
with its requests one after another, ``h2door.py`` has a desk for each stream of HTTP/2. An exchange knows of its client
only what stands here.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from edgeward.core import clock
from edgeward.core.throttle import source_of
from edgeward.gateway.answers import problem_parts
from edgeward.gateway.auth import Denied, Guard
from edgeward.gateway.cache import Stored, choose, http_date
from edgeward.gateway.cors import CorsConfig, is_preflight, preflight, with_cors
from edgeward.gateway.exchange import StoredExchange
from edgeward.gateway.files import NotCached
from edgeward.gateway.guests import why_not
from edgeward.gateway.http1 import FALLBACK, REFUSED, UNTOUCHED, Bad, Headers, Request
from edgeward.gateway.match import NotAllowed
from edgeward.gateway.peer import Peer
from edgeward.gateway.rules import Rule
from edgeward.gateway.serving import from_store
from edgeward.gateway.shelf import Key, key_of
from edgeward.gateway.site import Kept, Site, answer_of

if TYPE_CHECKING:
    from edgeward.gateway.exchange import Exchange
    from edgeward.gateway.gate import Gate
    from edgeward.gateway.openings import Opening

#: Seconds for a head from its first byte, between requests, and to read what a refused client still sends.
HEAD_TIME = 15.0
IDLE_TIME = 75.0
LINGER_TIME = 2.0
#: A body must come at this pace (bytes a second), after a start of so many seconds.
PACE = 512
BODY_TIME = 20.0
#: Smaller answers are written with their head in one piece.
WHOLE = 64 * 1024


class Desk:
    """One request of one client."""

    def __init__(self, gate: Gate, client: str = "") -> None:
        self.gate, self.client = gate, client
        self.exchange: Exchange | None = None
        #: By which declared Listener it came, and with which certificate.
        self.listener: Opening | None = None
        self.peer: Peer | None = None
        #: For an answer that another one's request brings.
        self.waiting = False
        #: The connection ends after the answer that is being written.
        self.closing = False
        self._full = False
        self._roomy: asyncio.Future[None] | None = None

    # -- what the heirs do ---------------------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        """The client is still there."""
        raise NotImplementedError

    def head(self, status: int, fields: Headers, reason: str = "") -> None:
        """The head of an answer; its body follows by :meth:`write`, its end by :meth:`finished`."""
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        """A piece of an answer's body."""
        raise NotImplementedError

    def whole(self, status: int, fields: Headers, body: bytes, reason: str = "") -> None:
        """Head and body."""
        self.head(status, fields, reason)
        if body:
            self.write(body)

    def respond(self, request: Request, status: int, fields: Headers, body: bytes, reason: str = "") -> None:
        """A whole answer of the gateway's own, to its end."""
        raise NotImplementedError

    def give(self, stored: Stored, now: float) -> None:
        """The whole of a stored answer, to a plain request."""
        raise NotImplementedError

    def refuse(
        self, status: int, why: str, request: Request | None = None,
        *, keep: bool = False, headers: Headers | None = None, remedy: str = "",
    ) -> None:  # fmt: skip
        """A refusal by the gateway itself. Without ``keep`` what follows is not to be trusted."""
        raise NotImplementedError

    def expect_body(self, request: Request) -> None:
        """What follows the head is a body, whatever becomes of the request."""
        raise NotImplementedError

    def body_may_come(self) -> None:
        """The request is on its way: what is there of its body can be read."""

    def go_on(self) -> None:
        """The client waits for a word before it sends its body: 100 (Continue)."""
        raise NotImplementedError

    def want_body(self, wanted: bool) -> None:
        """From the exchange: whether more of the body, or of the tunnel, can be taken."""
        raise NotImplementedError

    def finished(self) -> None:
        """From the exchange: it is over, and the answer is written."""
        raise NotImplementedError

    def drop(self) -> None:
        """Ends at once, so that the client sees that it was no good end."""
        raise NotImplementedError

    def switch(self) -> None:
        """From here on the bytes are the two sides' own."""
        raise NotImplementedError

    def end(self) -> None:
        """The target ended what was switched to; what it said last still goes out."""
        raise NotImplementedError

    def went_on(self) -> None:
        """An answer that was waited for came: what is behind the request may be read."""

    # -- requests ------------------------------------------------------------------------------------------------------

    def take(self, request: Request, rule: Rule | None) -> None:
        """A request that was read whole, but for its body."""
        if (self.listener is not None or self.gate.challenges) and self._at_listener(request):
            return
        if rule is not None:
            if (rule.guests is not None or self.guests_only) and (why := self._stranger(request, rule)):
                self.refuse(403, why, request, keep=request.length == 0)
            else:
                self._begin(request, rule)
            return
        try:
            found = self.gate.table.find(request)
            raise Bad(421, f"Route/{found.key} would answer it here, not Route/{request.fields.get(FALLBACK)}")
        except Bad as e:
            allow = [("allow", ", ".join(e.methods))] if isinstance(e, NotAllowed) else []
            remedy = "see: edgeward gateway explain URL" if e.status == 404 else ""
            self.refuse(e.status, e.why, request, keep=request.length == 0, headers=allow, remedy=remedy)

    @property
    def guests_only(self) -> bool:
        """Whether the connection came by the door for other sites' gateways."""
        return self.listener is not None and self.listener.config.guests

    def _stranger(self, request: Request, rule: Rule) -> str:
        return why_not(
            rule.key,
            door=self.guests_only,
            gateway=FALLBACK in request.fields,
            peer=request.peer,
            guests=rule.guests,
        )

    def _at_listener(self, request: Request) -> bool:
        """What is answered before any Route is looked at; False: nothing."""
        proof = self.gate.challenges.get(request.path) if request.scheme == "http" else None
        if proof is not None and request.method in ("GET", "HEAD") and request.length == 0:
            fields = [("content-type", "application/octet-stream"), ("content-length", str(len(proof)))]
            self.respond(request, 200, fields, proof if request.method == "GET" else b"")
            return True
        listener = self.listener
        if listener is None:
            return False
        if not listener.takes(request.host):
            why = f"{request.host or 'a request without a host'} is not served here: no certificate is for it"
            self.refuse(421, why, request, keep=request.length == 0)
            return True
        if listener.redirect:
            self._redirect(request, listener.redirect)
            return True
        return False

    def _redirect(self, request: Request, port: int) -> None:
        authority = request.authority or self.gate.node
        host = authority[: authority.rfind(":")] if re.search(r":[0-9]+$", authority) else authority
        where = f"https://{host}{'' if port == 443 else f':{port}'}{request.path}{request.query}"
        self.refuse(
            308, "this is served by https only", request, keep=request.length == 0, headers=[("location", where)]
        )

    def _begin(self, request: Request, rule: Rule) -> None:
        gate = self.gate
        config = rule.config
        if gate.via_name in request.fields.get("via", ""):
            self.refuse(508, "the request has been here before: a target leads back to this gateway", request)
            return
        if rule.cors is not None and is_preflight(request) and request.length == 0:
            self._preflight(request, rule, rule.cors)
            return
        if rule.pace is not None and (wait := rule.pace.take(source_of(self.client), gate.loop.time())):
            after = [("retry-after", str(max(1, round(wait))))]
            why = f"more than {config.burst} requests at once, or {config.rate:g} a second (limits.rate)"
            headers = with_cors(rule.cors, request, after)
            self.refuse(429, why, request, keep=request.length == 0, headers=headers)
            return
        if rule.guard is not None and not self._admit(request, rule, rule.guard):
            return
        if request.length > config.body:
            self.refuse(413, f"a body of more than {config.body} bytes", request)
            return
        if rule.site is not None and not request.length:
            self._from_site(request, rule, rule.site)
        elif rule.cache is not None and not request.upgrade:
            self._from_memory(request, rule)
        else:
            self._start(request, rule, gate.exchange(self, request, rule, self.client))

    def _admit(self, request: Request, rule: Rule, guard: Guard) -> bool:
        """Whether the client is let in; before anything of the request is used, and before the cache answers."""
        try:
            request.identity = guard.admit(request, clock.now())
        except Denied as e:
            headers = with_cors(rule.cors, request, e.headers)
            self.refuse(e.status, e.why, request, keep=request.length == 0, headers=headers)
            return False
        request.plain = False  # the cache looks at it: RFC 9111, section 3.5
        return True

    def _preflight(self, request: Request, rule: Rule, cors: CorsConfig) -> None:
        self.respond(request, 204, preflight(cors, request), b"")
        self.gate.hit(self.client, request, rule, None, 204, 0, "")

    def _start(self, request: Request, rule: Rule, exchange: Exchange) -> None:
        gate = self.gate
        self.exchange = exchange
        gate.exchanges.add(exchange)
        if request.length:
            self.expect_body(request)
        if rule.active[0] > rule.config.requests:
            exchange.busy()
            return
        rule.budget.earn()
        if request.expect:
            self.go_on()
        exchange.attempt()
        self.body_may_come()

    def _break(self, status: int, why: str) -> None:
        """The body cannot go on: neither the target nor the client may take what came for the whole."""
        exchange, self.exchange = self.exchange, None
        answered = exchange is not None and exchange.answered
        if exchange is not None:
            exchange.give_up()
        if answered:
            self.drop()
        else:
            self.refuse(status, why)

    # -- files ---------------------------------------------------------------------------------------------------------

    def give_kept(self, request: Request, kept: Kept, now: float) -> None:
        """A small file, whole, to a plain request."""
        fields = [*kept.fields, ("content-length", str(len(kept.body))), ("date", http_date(now))]
        self.respond(request, 200, fields, kept.body)

    def _from_site(self, request: Request, rule: Rule, site: Site) -> None:
        """A file that is in memory; others are an exchange's."""
        gate = self.gate
        name = site.name(request)
        kept = None
        if name is not None and request.method in ("GET", "HEAD"):
            kept = site.kept(name, site.codings(name, request), gate.loop.time())
        if kept is None:
            self._start(request, rule, gate.exchange(self, request, rule, self.client))
            return
        now = clock.now()
        if rule.compress is not None:
            kept = site.squeezed(kept, request)
        if request.plain and rule.cors is None:
            self.give_kept(request, kept, now)
            gate.hit(self.client, request, rule, None, 200, len(kept.body), "")
            return
        status, fields, body = answer_of(request, kept, site, rule.cors, now)
        self.respond(request, status, fields, body)
        gate.hit(self.client, request, rule, None, status, len(body), "")

    # -- what is in the memory -----------------------------------------------------------------------------------------

    def _from_memory(
        self, request: Request, rule: Rule, waited: bool = False, *, looked: bool = False, found: Stored | None = None
    ) -> None:
        """Answers from the store, or asks the target. ``looked``: also on the disk, where this was ``found``."""
        gate = self.gate
        key = key_of(request)
        stored, others = gate.shelf.find(key, request, rule.owner)
        if stored is None and gate.disk is not None:
            stored = found
            if not looked and (mark := gate.disk.find(key, request, rule.owner)) is not None:
                try:
                    stored = gate.disk.load_now(mark)
                except NotCached:
                    self.waiting = True
                    gate.disk.load(mark, lambda found: self._loaded(request, rule, key, found))
                    return
                if stored is not None:
                    gate.shelf.put(key, stored)
        now = clock.now()
        given = stored
        if stored is not None and rule.compress is not None:
            given = gate.fitting(key, stored, request)
        if (
            given is not None
            and request.plain
            and given.ttl(now) > 0.0
            and len(given.body) < WHOLE
            and given.blob is None
            and rule.cors is None
        ):
            self.give(given, now)
            gate.hit(self.client, request, rule, stored, given.status, len(given.body), "hit")
            return
        choice = choose(request, stored, now, other_variant=others)
        way = choice.way
        if stored is not None and given is not None and way in ("hit", "stale", "renew"):
            if way == "renew" and not stored.renewing:
                stored.renewing = True
                gate.renew(request, rule, self.client, key, stored)
            if given.blob is not None:
                self._start(request, rule, StoredExchange(gate, self, request, rule, self.client, given, way))
                return
            status, fields, body = from_store(request, given, now, cors=rule.cors)
            self.respond(request, status, fields, body, stored.reason if status == stored.status else "")
            gate.hit(self.client, request, rule, stored, status, len(body), way)
            return
        if way == "refuse":
            self.refuse(504, "not in the cache, and the request wants it from there only", request, keep=True)
            return
        keep = way in ("miss", "validate") and request.method == "GET"
        conditional = way == "miss" and not request.unconditional
        if keep and not conditional:
            leader = gate.fetching.get(key)
            if leader is not None and not waited and way == "miss":
                self.waiting = True
                leader.waiters.append(lambda _stored: self._waited(request, rule))
                return
            exchange = gate.exchange(
                self, request, rule, self.client, key=key, stored=stored if way == "validate" else None,
                fwd=choice.fwd,
            )  # fmt: skip
            if leader is None:
                gate.fetching[key] = exchange
        else:
            exchange = gate.exchange(self, request, rule, self.client, fwd=choice.fwd)
        self._start(request, rule, exchange)

    def _loaded(self, request: Request, rule: Rule, key: Key, found: Stored | None) -> None:
        """What lay on the disk is here."""
        if found is not None and self.gate.shelf.find(key, request, rule.owner)[0] is None:
            self.gate.shelf.put(key, found)
        if self.waiting and self.open:
            self.waiting = False
            self._from_memory(request, rule, looked=True, found=found)
            self.went_on()

    def _waited(self, request: Request, rule: Rule) -> None:
        if self.waiting and self.open:
            self.waiting = False
            self._from_memory(request, rule, waited=True)
            self.went_on()

    # -- room ----------------------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        if self._roomy is not None and not self._roomy.done():
            self._roomy.set_result(None)
        self._roomy = None

    async def room(self) -> None:
        """Until the client takes more."""
        if self._full and self.open:
            self._roomy = self._roomy or self.gate.loop.create_future()
            await asyncio.shield(self._roomy)


def refusal(
    status: int, why: str, request: Request | None, *, close: bool, headers: Headers | None, remedy: str = ""
) -> tuple[Headers, bytes]:
    """The fields and the body of a refusal."""
    if request is not None and FALLBACK in request.fields:
        headers = [*(headers or ()), (REFUSED, UNTOUCHED)]
    head = request is not None and request.method == "HEAD"
    return problem_parts(status, why, remedy=remedy, close=close, head=head, headers=headers or ())
