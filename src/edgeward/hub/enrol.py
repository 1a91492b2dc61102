"""Enrolment over HTTP: what is open to strangers, and what an operator asks.

Open without a token: the CAs, a nonce, and the signed asks of boxes (enrol, renew, leave), which prove themselves.
Their bodies are small, and only so many are worked on at once. Every answer to a box is signed by the CA: who stands in
between and looks into TLS cannot pass for the hub. The decisions are in ``nodes/enrol.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.core import clock
from edgeward.core.access import needs, opened, principal
from edgeward.core.body import parse_body
from edgeward.core.certs import Trust, fingerprint
from edgeward.core.describe import described
from edgeward.core.errors import Conflict, EdgewardError, Invalid, TooMany, Unreachable
from edgeward.core.identity import HubIdentity
from edgeward.core.misfit import invalid_from
from edgeward.core.quantity import parse_duration
from edgeward.core.resource import check_name
from edgeward.core.streaming import json, read_body
from edgeward.core.throttle import Throttle, source_of
from edgeward.nodes.enrol import DEFAULT_TTL, Answer, EnrolAsk, Grant, LeaveAsk, RenewAsk
from edgeward.nodes.enrol_cloud import Enrolment

log = logging.getLogger("edgeward.enrol")

MAX_ASK = 32 * 1024
_AT_ONCE = 64
_READ, _WORK = 10.0, 30.0
#: Nodes that are told at once to renew: each starts its nats-server anew when the CAs are others.
_TELL_AT_ONCE = 8
#: Seconds between two looks for nodes that are online and have not heard of other CAs or addresses; and until a node
#: that was told, and did not renew, is told again.
_LOOK, _AGAIN = 5.0, 600.0
#: Asks of one source that may fail at once, and how fast that grows back.
_FAILURES, _FAILURES_PER_SECOND = 20, 0.5

A = TypeVar("A", EnrolAsk, RenewAsk, LeaveAsk)


class IssueAsk(msgspec.Struct, forbid_unknown_fields=True):
    node: str
    site: str = ""
    ttl: str | float = DEFAULT_TTL
    replace: bool = False


def _decoded(body: bytes, form: type[A]) -> A:
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as e:
        raise invalid_from(e, form) from None
    except msgspec.DecodeError:
        raise Invalid("the body is no valid JSON", field="$") from None


def _from(request: Request) -> str:
    return request.client.host if request.client and request.client.host else "local"


class EnrolRoutes:
    def __init__(
        self,
        enrolment: Enrolment,
        identity: HubIdentity,
        *,
        tell: Callable[[str], Awaitable[None]],
        online: Callable[[str], bool],
        new_ca: Callable[[], None],
        leads: Callable[[], bool] = lambda: True,
    ) -> None:
        """``tell``: has an online node renew now. ``new_ca``: the listener's certificate is to be made anew."""
        self._enrolment, self._identity = enrolment, identity
        self._tell, self._online, self._new_ca = tell, online, new_ca
        self._leads = leads
        self._told_at: dict[str, float] = {}
        self._telling: asyncio.Task[None] | None = None
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._failures = Throttle(burst=_FAILURES, rate=_FAILURES_PER_SECOND)

    def routes(self) -> list[Route]:
        base = "/api/v1"
        return [
            Route(f"{base}/ca", opened(self.ca), methods=["GET"]),
            Route(f"{base}/nonce", opened(self.nonce), methods=["GET"]),
            Route(f"{base}/enrol", opened(self.enrol), methods=["POST"]),
            Route(f"{base}/renew", opened(self.renew), methods=["POST"]),
            Route(f"{base}/leave", opened(self.leave), methods=["POST"]),
            Route(f"{base}/ca/rotate", needs("rotate", "Hub")(self.rotate), methods=["POST"]),
            Route(f"{base}/ca/activate", needs("rotate", "Hub")(self.activate), methods=["POST"]),
            Route(f"{base}/ca/retire", needs("rotate", "Hub")(self.retire), methods=["POST"]),
            Route(f"{base}/ca/state", needs("rotate", "Hub")(self.state), methods=["GET"]),
            Route(f"{base}/issue/jointoken", needs("issue", "JoinToken")(self.issue), methods=["POST"]),
            Route(f"{base}/nodes/{{name}}/revoke", needs("revoke", "Node", "object")(self.revoke), methods=["POST"]),
        ]

    # -- open to strangers -------------------------------------------------------------------------------------------

    @described("The certificate authorities to trust, and who vouches for them", answer=Trust)
    async def ca(self, request: Request) -> Response:
        return json(self._identity.authority.trust())

    @described("A number for a box to sign, good for two minutes")
    async def nonce(self, request: Request) -> Response:
        return json({"nonce": self._enrolment.nonce()})

    @described("A box joins by its token", body=EnrolAsk, answer=Answer)
    async def enrol(self, request: Request) -> Response:
        return await self._ask(request, EnrolAsk, self._enrolment.enrol)

    @described("A node asks for new credentials with its device key", body=RenewAsk, answer=Answer)
    async def renew(self, request: Request) -> Response:
        return await self._ask(request, RenewAsk, self._enrolment.renew)

    @described("A node goes for good", body=LeaveAsk, answer=Answer)
    async def leave(self, request: Request) -> Response:
        return await self._ask(request, LeaveAsk, self._enrolment.leave)

    async def _ask(
        self, request: Request, form: type[A], work: Callable[[A, str], Awaitable[Grant | None]]
    ) -> Response:
        source = _from(request)
        try:
            async with asyncio.timeout(_READ):  # without a slot: a slow sender hinders nobody
                body = await read_body(request, MAX_ASK)
            async with asyncio.timeout(_WORK), self._slots:
                grant = await work(_decoded(body, form), source)
        except TimeoutError:
            raise Unreachable("the hub is busy with other boxes", remedy="try again in a few seconds") from None
        except EdgewardError as e:
            # No secret here can be guessed, and a good ask is never refused for the bad ones of its neighbours behind
            # one address; this keeps a flood out of the logs and tells a broken box to slow down.
            wait = self._failures.take(source_of(source), clock.monotonic()) if e.status < 500 else 0.0
            if wait:
                raise TooMany(f"{e.message}; and too many such asks came from there", after=wait, remedy="wait") from e
            log.info("%s from %s: %s", request.url.path, source, e)
            raise
        said = msgspec.json.encode(grant)
        return json(Answer(said, self._enrolment.proof(body, said)))

    # -- the CA ----------------------------------------------------------------------------------------------------

    @described("Make the next certificate authority, and have the nodes trust it")
    async def rotate(self, request: Request) -> Response:
        """Makes the next CA; nodes that are online are told at once, the others when they are back."""
        self._identity.authority.rotate()
        self._told_at.clear()
        self._tell_nodes()
        return await self.state(request)

    @described("Sign with the next certificate authority from now on")
    async def activate(self, request: Request) -> Response:
        """The next CA signs from now on, the listener's certificate first."""
        self._identity.authority.activate()
        self._new_ca()
        return await self.state(request)

    @described("End the trust in all authorities but the one that signs")
    async def retire(self, request: Request) -> Response:
        if self._identity.authority.next is not None:
            raise Conflict("a next CA waits", remedy="activate it first")
        self._identity.authority.retire()
        self._told_at.clear()
        self._tell_nodes()
        return await self.state(request)

    @described("Which authority signs, and which nodes have not heard of it")
    async def state(self, request: Request) -> Response:
        authority = self._identity.authority
        waiting = self._enrolment.waiting()
        return json(
            {
                "signing": fingerprint(authority.cert).hex(),
                "next": fingerprint(authority.next).hex() if authority.next else None,
                "trusted": len(authority.trust().trusted),
                "waiting": waiting,
                "waitingOnline": [n for n in waiting if self._online(n)],
            }
        )

    async def run(self) -> None:
        """A hub whose addresses are others than a node was told has it renew: one that became three, say."""
        while True:
            await asyncio.sleep(_LOOK)  # the period
            if self._leads():
                self._tell_nodes()

    def _tell_nodes(self) -> None:
        if self._telling is None or self._telling.done():
            self._telling = asyncio.get_running_loop().create_task(self._tell_all())

    async def _tell_all(self) -> None:
        slots = asyncio.Semaphore(_TELL_AT_ONCE)

        async def one(node: str) -> None:
            async with slots:
                self._told_at[node] = clock.monotonic()
                with contextlib.suppress(EdgewardError):  # it renews when it is back
                    await self._tell(node)

        now = clock.monotonic()
        waiting = [n for n in self._enrolment.waiting() if self._online(n)]
        self._told_at = {n: at for n, at in self._told_at.items() if n in waiting}
        await asyncio.gather(*(one(n) for n in waiting if now - self._told_at.get(n, -_AGAIN) >= _AGAIN))

    # -- an operator's -----------------------------------------------------------------------------------------------

    @described("Make a join token for one node; its text is shown here only", body=IssueAsk, code=201)
    async def issue(self, request: Request) -> Response:
        data = parse_body(await read_body(request), request.headers.get("content-type", "application/json"))
        try:
            ask = msgspec.convert(data, IssueAsk)
        except msgspec.ValidationError as e:
            raise invalid_from(e, IssueAsk) from None
        try:
            ttl = parse_duration(ask.ttl)
        except ValueError as e:
            raise Invalid(str(e), field="$.ttl") from None
        actor = principal(request).name
        token, name, expires = await self._enrolment.issue(
            ask.node, ask.site, ttl=ttl, replace=ask.replace, actor=actor
        )
        return json({"token": token, "name": name, "expires": expires}, 201)

    @described("Cut a node off, for good")
    async def revoke(self, request: Request) -> Response:
        name = check_name(request.path_params["name"], "name", "Node")
        await self._enrolment.revoke(name, principal(request).name, _from(request))
        return json({"name": name, "revoked": True})
