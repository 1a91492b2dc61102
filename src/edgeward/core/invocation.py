"""One call of a function: what the door, the triggers and the dispatcher say to one another, and how a worker is told.

A caller makes an :class:`Event` and a :class:`Call`, an :class:`Invoker` answers with a :class:`Reply` or raises
:class:`CallFailed`, which knows its problem document (RFC 9457). Below that are the frames of the worker protocol
(``docs/functions.md``): a length of four bytes, big-endian, and one msgpack array. :class:`Frames` cuts a byte stream
into frames and refuses what is too long before it is there. Pure: no socket, no clock.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Literal, Protocol

import msgspec

from edgeward.core.errors import EdgewardError

#: Bytes of an event's data and of an answer's body that is sent in one piece, unless a function's limits say less.
MAX_BODY = 6 * 1024 * 1024
#: Bytes of one frame: a body, and what is around it.
MAX_FRAME = MAX_BODY + 256 * 1024
#: Lines of log of one call, the rest is counted; characters of one, and of a trace.
MAX_LINES, MAX_LINE = 1000, 8192
#: What one call may ask its node for (publish, state, samples): altogether, and at once, in number and in bytes.
MAX_ASKS, MAX_OPEN, MAX_OPEN_BYTES = 10_000, 64, 16 * 1024 * 1024
#: Bytes of one value of a function's state, characters of its key.
MAX_VALUE, MAX_KEY = 256 * 1024, 256
#: The event's extension that counts through how many functions a message came, and how many it may be.
HOPS, MAX_HOPS = "edgewardhops", 8
#: The content type of an event that holds several.
BATCH = "application/cloudevents-batch+json"
_ATTRIBUTES = ("id", "source", "type", "subject", "time", "datacontenttype")


class Http(msgspec.Struct, array_like=True):
    """The HTTP request that an event came from. Header names in lower case, each header as often as it was sent."""

    method: str = "POST"
    path: str = "/"
    query: str = ""
    headers: list[tuple[str, str]] = []
    #: Address of the client, without port; empty where not known.
    client: str = ""


class Event(msgspec.Struct, array_like=True):
    """A CloudEvents 1.0 event; ``specversion`` is always 1.0. Optional attributes are empty when not given."""

    id: str
    source: str
    type: str
    data: bytes = b""
    datacontenttype: str = ""
    subject: str = ""
    time: str = ""  #: RFC 3339
    extensions: dict[str, str] = {}
    http: Http | None = None

    def json(self) -> Any:
        """The data, read as JSON; raises ``ValueError``."""
        return msgspec.json.decode(self.data)

    def text(self) -> str:
        return self.data.decode()

    def batch(self) -> list[Event]:
        """The events in this one (``application/cloudevents-batch+json``); itself where it is none."""
        if self.datacontenttype != BATCH:
            return [self]
        found: list[Event] = []
        for doc in msgspec.json.decode(self.data, type=list[dict[str, str]]):
            id, source, type, subject, time, kind = (doc.pop(k, "") for k in _ATTRIBUTES)
            data = base64.b64decode(doc.pop("data_base64", ""))
            doc.pop("specversion", None)
            found.append(Event(id, source, type, data, kind, subject, time, doc))
        return found


def batch_of(events: Sequence[Event], *, id: str, source: str, type: str, subject: str) -> Event:
    """Many events in one, as CloudEvents' JSON batch format has it; their data in base64, whatever it is."""
    docs = []
    for e in events:
        doc = {"specversion": "1.0", "id": e.id, "source": e.source, "type": e.type, "subject": e.subject}
        doc |= {"time": e.time, "datacontenttype": e.datacontenttype} | e.extensions
        docs.append({k: v for k, v in doc.items() if v} | {"data_base64": base64.b64encode(e.data).decode()})
    return Event(id, source, type, msgspec.json.encode(docs), BATCH, subject, events[-1].time)


class Call(msgspec.Struct):
    """One call. ``function`` is ``name`` or ``namespace/name`` (``default`` where left out)."""

    function: str
    event: Event
    #: Seconds of the loop's clock (``loop.time()``, monotonic) until which an answer is wanted; 0: what the function's
    #: own ``limits.timeout`` allows. The earlier of the two counts.
    deadline: float = 0.0
    #: A version's digest (or its first 8 or more digits) or an alias; None: as the function's aliases share calls out.
    version: str | None = None
    #: Calls with the same key go to the same alias.
    key: str | None = None


class Reply(msgspec.Struct):
    """The answer: a ``body`` or, when ``chunks`` is given, pieces that must be read to the end or closed (aclose)."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""
    chunks: AsyncIterator[bytes] | None = None
    version: str = ""  #: digest of the version that answered
    invocation: str = ""
    duration: float = 0.0  #: seconds in the worker and on the way to it
    cold: bool = False  #: an instance was started for it


class Invoker(Protocol):
    async def invoke(self, call: Call) -> Reply:
        """The answer of the function. Raises :class:`CallFailed`. Cancelling it gives the call up: the instance that
        works on it is ended unless it answers within its own deadline."""
        ...


FailKind = Literal[
    "timeout",  # over its deadline
    "memory",  # over its memory
    "crashed",  # its process ended
    "error",  # the handler raised
    "too-large",  # event or answer over its bound
    "busy",  # at its concurrency bound
    "unavailable",  # no version of it can be started now
    "unknown",  # there is no such function here
    "refused",  # this node must not run it: what it requires is not enforced
]
STATUS: dict[str, int] = {
    "timeout": 504,
    "memory": 502,
    "crashed": 502,
    "error": 500,
    "too-large": 502,
    "busy": 503,
    "unavailable": 503,
    "unknown": 404,
    "refused": 503,
}
_TITLE = {
    "timeout": "FunctionTimeout",
    "memory": "FunctionMemory",
    "crashed": "FunctionCrashed",
    "error": "FunctionError",
    "too-large": "FunctionTooLarge",
    "busy": "FunctionBusy",
    "unavailable": "FunctionUnavailable",
    "unknown": "NotFound",
    "refused": "FunctionRefused",
}


class CallFailed(EdgewardError):
    """A call without an answer. ``limit`` says which bound was met, e.g. ``{"timeout": "2s"}``."""

    reason = "FunctionError"

    def __init__(
        self,
        kind: FailKind,
        message: str,
        *,
        function: str,
        limit: dict[str, Any] | None = None,
        invocation: str = "",
        version: str = "",
        retry_after: float = 0.0,
        status: int = 0,
        **where: Any,
    ) -> None:
        super().__init__(message, **{"resource": f"Function/{function}", **where})
        self.kind, self.function = kind, function
        self.limit = limit or {}
        self.invocation, self.version = invocation, version
        #: Seconds after which it may be tried again; 0: not said.
        self.retry_after = retry_after
        self.status = status or STATUS[kind]  # type: ignore[misc]
        self.exit_code = 5 if kind == "unknown" else 6 if self.status == 503 else 1  # type: ignore[misc]

    def problem(self) -> dict[str, Any]:
        doc = {"type": _KIND + self.kind, **super().problem(), "title": _TITLE[self.kind]}
        doc |= {"status": self.status, "function": self.function, "kind": self.kind}
        if self.limit:
            doc["limit"] = self.limit
        for name in ("invocation", "version"):
            if value := getattr(self, name):
                doc[name] = value
        if self.retry_after:
            doc["retryAfter"] = self.retry_after
        return doc

    def headers(self) -> list[tuple[str, str]]:
        """What an HTTP answer that carries the problem has beside it."""
        found = [("content-type", "application/problem+json")]
        if self.retry_after:
            found.append(("retry-after", str(max(1, round(self.retry_after)))))
        return found


_KIND = "urn:edgeward:problem:function-"


def failed_of(doc: dict[str, Any]) -> CallFailed | None:
    """The failure that a problem document stands for; None when it is of something else."""
    kind = str(doc.get("type", "")).removeprefix(_KIND)
    if not str(doc.get("type", "")).startswith(_KIND) or kind not in STATUS:
        return None
    error = CallFailed(
        kind,  # type: ignore[arg-type]
        str(doc.get("detail", "")),
        function=str(doc.get("function", "")),
        limit=dict(doc.get("limit") or {}),
        invocation=str(doc.get("invocation", "")),
        version=str(doc.get("version", "")),
        retry_after=float(doc.get("retryAfter") or 0.0),
        status=int(doc.get("status") or 0),
    )
    error.remedy = str(doc.get("remedy", ""))
    return error


# -- frames of the worker protocol -------------------------------------------------------------------------------------


class Init(msgspec.Struct, array_like=True, tag=0):
    """To a new worker, once: what it is to run. It answers ``Ready`` or ``Broken``."""

    namespace: str
    name: str
    version: str
    node: str
    site: str
    handler: str  #: ``module:function``, or ``function`` of the module ``main``
    files: dict[str, str] = {}  #: relative path to text; inline source is ``main.py``
    max_body: int = MAX_BODY
    level: str = "info"
    secrets: dict[str, dict[str, str]] = {}  #: name of a Secret to its keys and values


class Invoke(msgspec.Struct, array_like=True, tag=1):
    """To a worker that is ready and has no call: one call. ``left``: seconds until it is ended."""

    id: str
    left: float
    event: Event


class Answer(msgspec.Struct, array_like=True, tag=2):
    """To a worker: what came of what it asked for under the number ``ask``; ``error`` is ``(kind, message)``.

    Kinds: ``refused`` (not allowed to it), ``conflict`` (another revision), ``too-large``, ``too-many``,
    ``unavailable`` (not now). It may come when the call is over: nobody waits then.
    """

    ask: int
    value: Any = None
    error: tuple[str, str] | None = None


class Jailed(msgspec.Struct, array_like=True, tag=15):
    """From what starts a worker, before the function's code is there: what is enforced on it, and what is not (why)."""

    pid: int
    enforced: list[str]
    refused: dict[str, str] = {}
    #: The descriptor by which the worker's connections are asked for; -1: they are not.
    listener: int = -1


class Ready(msgspec.Struct, array_like=True, tag=16):
    """From a worker: the handler is loaded."""

    protocol: int = 1
    sdk: str = ""


class Broken(msgspec.Struct, array_like=True, tag=17):
    """From a worker: the handler cannot be loaded; the worker then ends."""

    message: str
    trace: str = ""


class Result(msgspec.Struct, array_like=True, tag=18):
    """The whole answer to a call."""

    id: str
    body: bytes
    status: int = 200
    headers: list[tuple[str, str]] = []


class Head(msgspec.Struct, array_like=True, tag=19):
    """The beginning of an answer that comes in pieces: ``Chunk`` as often as need be, then ``End``."""

    id: str
    status: int = 200
    headers: list[tuple[str, str]] = []


class Chunk(msgspec.Struct, array_like=True, tag=20):
    id: str
    data: bytes


class End(msgspec.Struct, array_like=True, tag=21):
    id: str


class Raised(msgspec.Struct, array_like=True, tag=22):
    """The handler raised; ``kind`` is ``error``, ``memory`` or ``too-large``. Ends the call, not the worker."""

    id: str
    kind: str
    message: str
    trace: str = ""


class Log(msgspec.Struct, array_like=True, tag=23):
    """One line of the function's log. ``id`` is empty outside a call; ``level`` is Python's number."""

    id: str
    level: int
    time: float
    message: str
    fields: dict[str, Any] = {}


class Publish(msgspec.Struct, array_like=True, tag=24):
    """Publish on a topic of the node's broker. Answered with nil: taken (``qos`` 1: on the broker's disk)."""

    id: str
    ask: int
    topic: str
    data: bytes = b""
    qos: int = 1


class StateGet(msgspec.Struct, array_like=True, tag=25):
    """Answered with ``(value, revision)``, or nil when there is none."""

    id: str
    ask: int
    key: str


class StateSet(msgspec.Struct, array_like=True, tag=26):
    """Answered with the new revision. ``revision``: nil whatever is there, 0 only if nothing is, else only if it is."""

    id: str
    ask: int
    key: str
    value: bytes
    revision: int | None = None


class StateDelete(msgspec.Struct, array_like=True, tag=27):
    """Answered with whether it was there."""

    id: str
    ask: int
    key: str
    revision: int | None = None


class StateKeys(msgspec.Struct, array_like=True, tag=28):
    """Answered with the keys that begin so, sorted."""

    id: str
    ask: int
    prefix: str = ""


class Sample(msgspec.Struct, array_like=True, tag=29):
    """An input and what was made of it, for those who train the model. Answered with whether it is kept."""

    id: str
    ask: int
    input: bytes
    output: bytes = b""
    score: float | None = None
    tags: dict[str, str] = {}


class Leaving(msgspec.Struct, array_like=True, tag=30):
    """From a worker in a call: it takes no other call after this one. Its socket is closed when it has answered."""

    id: str


ToWorker = Init | Invoke | Answer
Ask = Publish | StateGet | StateSet | StateDelete | StateKeys | Sample
FromWorker = Result | Jailed | Head | Chunk | End | Raised | Log | Ready | Broken | Leaving | Ask

_encoder = msgspec.msgpack.Encoder()
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode


class FrameTooLong(ValueError):
    """The peer announces a frame over the bound."""


def frame(message: Any) -> bytearray:
    """One message as it goes over the socket."""
    out = bytearray(4)
    _encoder.encode_into(message, out, 4)
    out[:4] = (len(out) - 4).to_bytes(4, "big")
    return out


class Frames:
    """Cuts what comes from a socket into frames. Raises ``FrameTooLong`` as soon as a length says so."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self.limit = limit

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """The payloads that ``data`` completes; to be read to the end."""
        if not self._buffer and len(data) >= 4:
            # the usual case: exactly one whole frame, not copied twice
            size = int.from_bytes(data[:4], "big")
            if size == len(data) - 4 and size <= self.limit:
                yield bytes(data[4:])
                return
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= 4:
                size = int.from_bytes(buffer[at : at + 4], "big")
                if size > self.limit:
                    raise FrameTooLong(f"a frame of {size} bytes; at most {self.limit} are allowed")
                if len(buffer) - at - 4 < size:
                    break
                yield bytes(buffer[at + 4 : at + 4 + size])
                at += 4 + size
        finally:
            del buffer[:at]
