"""How a call from outside reaches a function: arguments of the API's request in, a head and pieces of the body out.

The same pieces travel from the plane to the agent, from a node to its hub and on to the caller: first a
:class:`Head`, then the body as it comes. A call that failed is an answer too, whose body is the problem document.
"""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from edgeward.core.describe import FOLLOW, Form
from edgeward.core.errors import EdgewardError, Invalid, TooLarge, Unreachable
from edgeward.core.invocation import MAX_BODY
from edgeward.core.quantity import parse_duration
from edgeward.core.streaming import flag, number
from edgeward.functions.sieve import check as check_regex

#: Seconds that an invocation from outside may take at most; a function's own limit is at most this.
LONGEST = 900.0
#: Seconds without a word after which the one that is asked is taken for gone; a node that waits gives marks.
SILENCE = 45.0


#: What may be asked beside the data; the hub's API has ``node`` beside.
INVOKE: Mapping[str, tuple[Form, str]] = {
    "type": ("string", "The event's type (CloudEvents); edgeward.invoke where left out"),
    "version": ("string", "Only the version with this digest (8 digits or more) may answer; stable or canary"),
    "key": ("string", "Who asks: calls with the same key go to the same version"),
    "timeout": ("string", "Seconds until the call is given up, at most 900"),
}
LOGS: Mapping[str, tuple[Form, str]] = {
    "tail": ("integer", "So many last lines"),
    "since": ("string", "Only what is younger, e.g. 10m"),
    "level": ("string", "debug, info, warning or error: of this weight, or more"),
    "grep": ("string", "Only lines with this text"),
    "regex": ("string", "Only lines with this regular expression (Python's) in their message"),
    "invocation": ("string", "Only of this call"),
    "json": ("boolean", "One JSON object a line"),
    **FOLLOW,
}


SAMPLES: Mapping[str, tuple[Form, str]] = {
    "since": ("string", "Only what is younger, e.g. 24h"),
    "limit": ("integer", "So many of each node, the newest; at most 10000"),
    "why": ("string", "Only what was kept for this reason: error, rate, score or offered"),
}


def sample_args(namespace: str, name: str, request: Request) -> dict[str, Any]:
    """What is asked of a function's samples."""
    why = request.query_params.get("why", "")
    if why not in ("", "error", "rate", "score", "offered"):
        raise Invalid(f"{why[:20]!r} is no reason", field="?why", remedy="error, rate, score or offered")
    return {
        "namespace": namespace,
        "name": name,
        "since": _since(request),
        "limit": number(request, "limit", 100, high=10_000),
        "why": why,
    }


def call_args(
    namespace: str, name: str, data: bytes, query: Mapping[str, str], headers: Mapping[str, str]
) -> dict[str, Any]:
    """The arguments of the plane's verb ``invoke`` from a request to the API. Raises ``Invalid``, ``TooLarge``."""
    if len(data) > MAX_BODY:
        raise TooLarge(f"the event has {len(data)} bytes", remedy=f"at most {MAX_BODY} bytes")
    timeout = 0.0
    if text := query.get("timeout", ""):
        try:
            timeout = float(text)
        except ValueError:
            raise Invalid(f"{text[:40]!r} is no number of seconds", field="?timeout") from None
        if not 0 < timeout <= LONGEST:
            raise Invalid("is out of range", field="?timeout", remedy=f"more than 0, at most {LONGEST:g} seconds")
    for word in ("type", "version", "key"):
        if len(query.get(word, "")) > 256:
            raise Invalid("is too long", field=f"?{word}", remedy="at most 256 characters")
    return {
        "namespace": namespace,
        "name": name,
        "data": data,
        "datacontenttype": str(headers.get("content-type", ""))[:256],
        "type": query.get("type", "") or "edgeward.invoke",
        "version": query.get("version", ""),
        "key": query.get("key", ""),
        "within": timeout,
    }


def _since(request: Request) -> str:
    since = request.query_params.get("since", "")
    try:
        if since:
            parse_duration(since)
    except ValueError as e:
        raise Invalid(str(e), field="?since") from None
    return since


def log_args(namespace: str, name: str, request: Request) -> dict[str, Any]:
    """What is asked of a function's log. Raises ``Invalid`` here, before an answer is begun."""
    check_regex(request.query_params.get("regex", ""))
    return {
        "namespace": namespace,
        "name": name,
        "tail": number(request, "tail", 200, high=100_000),
        "follow": flag(request, "follow"),
        "json": flag(request, "json"),
        "since": _since(request),
        **{word: request.query_params.get(word, "")[:256] for word in ("level", "grep", "regex", "invocation")},
    }


#: What is done with dead letters; the hub's API has ``node`` beside.
LETTERS: Mapping[str, tuple[Form, str]] = {"do": ("string", "replay: call it again with each; drop: forget them")}


def doing(request: Request) -> str:
    """What a POST about dead letters is to do. To list them takes another right. Raises ``Invalid``."""
    do = request.query_params.get("do", "replay")
    if do == "list":
        raise Invalid("'list' is nothing that is done", field="?do", remedy="replay or drop; GET lists")
    return do


def letter_args(namespace: str, name: str, do: str) -> dict[str, Any]:
    """What is asked about a function's dead letters. Raises ``Invalid``."""
    if do not in ("list", "replay", "drop"):
        raise Invalid(f"{do[:40]!r} is nothing that can be done", field="?do", remedy="replay or drop")
    return {"namespace": namespace, "name": name, "do": do}


async def letters_of(docs: AsyncIterator[dict[str, Any]], node: str) -> AsyncIterator[bytes]:
    """What the plane's verb ``functions.deadletters`` says, one JSON object a line."""
    async for doc in docs:
        yield msgspec.json.encode({"node": node, **doc.get("letter", {})}) + b"\n"


class Head(msgspec.Struct):
    """The first piece of an answer that travels from a plane to a caller; the body follows in pieces."""

    status: int
    headers: list[tuple[str, str]]
    version: str = ""
    invocation: str = ""
    node: str = ""
    duration: float = 0.0
    cold: bool = False

    def http(self) -> list[tuple[bytes, bytes]]:
        """Its headers for an HTTP answer; those that are the connection's business are left out."""
        own = [("ew-invocation", self.invocation), ("ew-version", self.version), ("ew-node", self.node)]
        own.append(("ew-duration", f"{self.duration:.6f}"))
        found = []
        for name, value in [*self.headers, *own]:
            if value and name.lower() not in _CONNECTION and _NAME.fullmatch(name) and _VALUE.fullmatch(value):
                found.append((name.lower().encode("latin-1", "replace"), value.encode("latin-1", "replace")))
        return found


#: What a function says is not trusted to be HTTP.
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
#: Without control characters (RFC 9110, 5.5): the hub's server would break off an answer that has them.
_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
_CONNECTION = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
    "upgrade", "content-length",
}  # fmt: skip


def encode_head(head: Head) -> bytes:
    """A head as the one piece that a message carries."""
    data = msgspec.json.encode(head)
    if len(data) > 60_000:
        raise EdgewardError(f"the answer's headers have {len(data)} bytes", remedy="at most 60000")
    return data


decode_head = msgspec.json.Decoder(Head).decode


async def pieces_of(docs: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """What the plane's verb ``invoke`` says, as pieces."""
    async for doc in docs:
        if "head" in doc:
            yield encode_head(msgspec.convert(doc["head"], Head))
        elif data := base64.b64decode(str(doc.get("data", ""))):
            yield data


def to_plane(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments as they go over the plane's control socket, which speaks JSON."""
    return {**args, "data": base64.b64encode(args["data"]).decode()}


async def answer(pieces: AsyncIterator[bytes]) -> Response:
    """The HTTP answer that pieces are, streamed. Raises what the pieces raise before the head is there."""
    try:
        head = decode_head(await anext(pieces))
    except StopAsyncIteration:
        raise Unreachable("the node ended the call without an answer") from None
    except msgspec.DecodeError:
        raise EdgewardError("the node's answer is not understood", remedy="upgrade the node's agent") from None
    response = StreamingResponse(pieces, head.status if 200 <= head.status <= 599 else 502)
    response.raw_headers = head.http()
    return response
