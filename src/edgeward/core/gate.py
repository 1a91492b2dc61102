"""The gate around every request of hub and agent: correlation id, token, errors as problems.

In: a request as ASGI gives it. Who calls is asked of ``auth`` and put into the scope, where ``access.py`` finds it;
wrong tokens are slowed down by address, refusals go into the audit, a stream ends when its caller's rules do. What an
error looks like is in ``problems.py``. It never knows a route's meaning.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgeward.core import clock
from edgeward.core.audit import Audit
from edgeward.core.authz import Principal, Rule
from edgeward.core.context import correlation
from edgeward.core.errors import EdgewardError, Forbidden, TooMany, Unauthorized
from edgeward.core.problems import failed_inside, refused
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.throttle import Throttle, source_of

log = logging.getLogger("edgeward.api")

#: Seconds after which a caller whose answer is still streaming is looked at again: tokens end, roles change.
_AGAIN = 1.0

#: (token, client) to who that is; raises ``Unauthorized``.
Auth = Callable[[str | None, Any], Principal]


class _Ended(Exception):
    """Ends a stream whose caller may no longer see it."""


class Gate:
    """Around every request: correlation id, token, errors as problems, nothing of the inside in an answer."""

    def __init__(self, app: Starlette, auth: Auth, open_paths: frozenset[str], audit: Audit) -> None:
        self.routes = app.routes
        self._app, self._auth, self._open, self._audit = app, auth, open_paths, audit
        # a good token always passes: only bad ones are counted, so nobody can lock another one out
        self._bad = Throttle(burst=20, rate=1.0)
        # a refused caller must not be able to push what others did out of the audit
        self._refused = Throttle(burst=30, rate=1 / 60)
        self._unkept: dict[str, int] = {}
        #: The token that a request brings in another way than by its header, where it may; None: none.
        self.ticket: Callable[[Scope], str | None] = lambda _: None

    def _login(self, scope: Scope, headers: dict[bytes, bytes]) -> Callable[[], Principal]:
        """Who calls, as a question that can be asked again. Raises ``Unauthorized``, or ``TooMany`` of such."""
        client = scope.get("client")
        scheme, _, secret = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        token = secret.strip() if scheme.lower() == "bearer" else self.ticket(scope)

        def who() -> Principal:
            return self._auth(token, client)

        try:
            scope["principal"] = who()
        except Unauthorized:
            wait = self._bad.take(source_of(client[0] if client else ""), clock.monotonic()) if token else 0.0
            if wait:
                raise TooMany(
                    "too many wrong tokens from your address", after=wait, remedy="wait, and use a valid token"
                ) from None
            raise
        return who

    async def _note(self, scope: Scope, e: Forbidden) -> None:
        """A refused call goes into the audit; a storm of them does not flood it."""
        who, m = scope.get("principal"), e.members
        if who is None:
            return
        if self._refused.take(who.name, clock.monotonic()):
            self._unkept[who.name] = self._unkept.get(who.name, 0) + 1
            return
        more = self._unkept.pop(who.name, 0)
        client = scope.get("client")
        key = Key(m.get("kind", ""), m.get("namespace") or CLUSTER, m.get("name", ""))
        source = client[0] if client and client[0] else "local"
        try:
            await self._audit.write(
                m.get("verb", "?"), key, actor=who.name, source=source, request=correlation.get(),
                outcome=f"{e.reason}: {e.message}" + (f" (and {more} refused calls before, not kept)" if more else ""),
            )  # fmt: skip
        except EdgewardError as failed:
            log.warning("a refusal was not audited: %s", failed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if 0 < len(given) <= 64 and given.isprintable() else clock.new_id(12)
        token = correlation.set(request_id)
        started = False
        again: Callable[[], Principal] | None = None
        looked = clock.monotonic()

        async def sending(message: Any) -> None:
            nonlocal started, looked
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("latin-1"))]
            elif again is not None and message.get("more_body") and clock.monotonic() - looked > _AGAIN:
                looked = clock.monotonic()
                try:
                    same = again().rules == scope["principal"].rules
                except EdgewardError:
                    same = False
                if not same:
                    raise _Ended
            await send(message)

        try:
            response: Response | None = None
            try:
                if not self._needs_nobody(scope):
                    scope["again"] = again = self._login(scope, headers)
                await self._app(scope, receive, sending)
                if isinstance(refusal := scope.get("refusal"), Forbidden):
                    await self._note(scope, refusal)
            except EdgewardError as e:
                response = refused(e)
            except _Ended:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except (ClientDisconnect, asyncio.CancelledError):
                raise
            except Exception:
                log.exception("request %s %s failed", scope.get("method"), _shown(scope["path"]))
                response = failed_inside()
            if response is not None and not started:
                await response(scope, receive, sending)
        finally:
            correlation.reset(token)

    def _needs_nobody(self, scope: Scope) -> bool:
        path, client = scope["path"], scope.get("client")
        local = client is None or client[0] in ("127.0.0.1", "::1", "")
        if path == "/metrics" and local:
            scope["principal"] = _SCRAPER
            return True
        return path in self._open


#: A token in a path (``tunnel/proxy.py``): whoever reads the log must not have it.
_TICKET = re.compile(r"/~[^/]{16,}")


def _shown(path: str) -> str:
    return _TICKET.sub("/~(hidden)", path)


#: What scrapes metrics on the machine itself.
_SCRAPER = Principal("metrics", "local", rules=(Rule(verbs=["metrics"], kinds=["Hub"]),))
