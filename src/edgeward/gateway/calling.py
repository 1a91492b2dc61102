"""A request that a function answers: HTTP in, a call (``core/invocation.py``) out, and its reply as an answer.

What a function returns is not trusted to be HTTP: fields that are none, or that are of the connection, are left out.
"""

from __future__ import annotations

import re
from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec

from edgeward.core import clock
from edgeward.core.invocation import MAX_BODY, Call, CallFailed, Event, Http, Invoker, Reply
from edgeward.gateway.exchange import HELD, Exchange
from edgeward.gateway.http1 import CHUNKED, FALLBACK, HOP, Headers, Response, end_to_end, is_claim

if TYPE_CHECKING:
    from edgeward.gateway.desk import Desk

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,128}")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]{0,8192}")
_DROPPED = HOP | frozenset({"content-length", "date"})


def fields_of(reply_headers: list[tuple[str, str]]) -> Headers:
    """The fields of a function's reply that can be fields of an answer."""
    found: Headers = []
    for given, value in reply_headers[:64]:
        name = given.lower()
        if _NAME.fullmatch(name) and name not in _DROPPED and _VALUE.fullmatch(value):
            found.append((name, value.strip(" \t")))
    return found


def response_of(status: int, headers: Headers, length: int) -> Response:
    response = Response(status if 200 <= status <= 599 else 502, "", headers)
    for name, value in headers:
        response.fields[name] = f"{response.fields[name]}, {value}" if name in response.fields else value
    response.length = length
    return response


#: Kinds of failure after which nothing was done: the handler was not called.
_NOT_CALLED = frozenset({"unknown", "unavailable", "refused", "busy"})


class FunctionExchange(Exchange):
    """An exchange whose target is a function of this node; its other places are asked as everybody's are."""

    def attempt(self) -> None:
        if self.place is not self.rule.home:
            super().attempt()
            return
        if self.rule.config.missing and self._may_say_no:  # it goes on at once, body and all
            self._unserved(404, f"{self.rule.config.target} is not on this node")
            return
        self.deadline = self.gate.loop.time() + self.rule.config.answer + 1.0
        if self.body_done:
            self.task = self.gate.spawn(self, self._call())
        elif self.request.length > MAX_BODY:
            self._too_large()
        elif self.door is not None:
            self.door.want_body(True)

    @property
    def _may_say_no(self) -> bool:
        """Whether somebody else can answer: another place, or the gateway that asks for its own site."""
        return not self._last or FALLBACK in self.request.fields

    def on_request_body(self, piece: bytes) -> None:
        if self.place is not self.rule.home:
            super().on_request_body(piece)
            return
        if self.gate.held + len(piece) > HELD:
            why = "requests in progress have as many bytes in memory as this node's gateway takes"
            self._refuse(503, why, [("retry-after", "1")])
            return
        self._kept += len(piece)
        self.hold(len(piece))
        self._pieces.append(piece)
        self.deadline = self.gate.loop.time() + self.rule.config.answer + 1.0
        if self._kept > MAX_BODY:
            self._too_large()

    def _too_large(self) -> None:
        self._refuse(413, f"a function's event is at most {MAX_BODY} bytes")

    def on_request_end(self) -> None:
        if self.place is not self.rule.home:
            super().on_request_end()
            return
        self.body_done = True
        if not self.ended:
            self.task = self.gate.spawn(self, self._call())

    def _event(self) -> Event:
        request = self.request
        ends = self.rule.guard.dropped if self.rule.guard is not None else ()
        headers = [h for h in end_to_end(request.headers) if not is_claim(h[0]) and h[0] not in ends]
        if request.identity is not None:
            headers += request.identity.fields
        self.gate.calls += 1
        return Event(
            id=f"{self.gate.calls_of}-{self.gate.calls:x}",
            source=f"/routes/{self.rule.key}",
            type="edgeward.http.request",
            data=b"".join(self._pieces),
            datacontenttype=request.fields.get("content-type", ""),
            time=clock.timestamp(),
            http=Http(request.method, request.path, request.query.removeprefix("?"), headers, self.client),
        )

    def _key(self, field: str, cookie: str) -> str | None:
        """Who is asking, so that the answers are of one version: as the Route says, else by address."""
        value = self.request.fields.get(field, "") if field else ""
        if cookie and value:
            pairs = (p.strip().partition("=") for p in value.split(";"))
            value = next((v for name, _, v in pairs if name == cookie), "")
        return value or self.client or None

    async def _call(self) -> None:
        config = self.rule.config
        call = Call(
            config.function, self._event(), deadline=self.gate.loop.time() + config.answer, version=config.version,
            key=self._key(*config.sticky),
        )  # fmt: skip
        invoker: Invoker | None = self.gate.invoker
        try:
            if invoker is None:
                raise CallFailed("unknown", "this node runs no functions", function=config.function)
            self._sent_before, self.sent = self.sent, True
            reply = await invoker.invoke(call)
        except CallFailed as e:
            if e.kind in _NOT_CALLED and self._may_say_no and not self.ended:
                self.sent = self._sent_before
                self._unserved(
                    e.status, f"{config.target}: {e.message}", [h for h in e.headers() if h[0] == "retry-after"]
                )
                return
            body = msgspec.json.encode({**e.problem(), "route": f"Route/{self.rule.key}"})
            self._give(Reply(e.status, [*e.headers(), ("cache-control", "no-store")], body))
            return
        if reply.chunks is None:
            self._give(reply)
        else:
            await self._stream(reply)

    def _give(self, reply: Reply) -> None:
        if self.ended:
            return
        self.on_head(response_of(reply.status, fields_of(reply.headers), len(reply.body)))
        if not self.ended:
            if reply.body and self.status not in (204, 304):
                self.on_body(reply.body)
            self.on_end()

    async def _stream(self, reply: Reply) -> None:
        assert reply.chunks is not None  # noqa: S101 - the caller looked
        async with aclosing(reply.chunks) as chunks:  # type: ignore[type-var]
            if self.ended:
                return
            self.on_head(response_of(reply.status, fields_of(reply.headers), CHUNKED))
            try:
                async for piece in chunks:
                    if self.ended:
                        return
                    if piece:
                        self.on_body(piece)
                    await self._room()
            except CallFailed as e:
                self.on_fail(e.status, str(e))
                return
        if not self.ended:
            self.on_end()

    async def _room(self) -> None:
        """Until the client takes more of the answer; the sweep ends one that does not."""
        door: Desk | None = self.door
        if door is not None and self._storing is None:
            await door.room()
