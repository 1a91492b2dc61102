"""The Python side of a function: the handler's contract, and the loop that serves calls over the worker's socket.

In come frames of ``core/invocation.py`` (``docs/functions.md`` describes them for any language), out go results,
pieces, errors and log lines. One call at a time: the dispatcher sends the next when this one is answered. Nothing here
decides about limits or versions; that is the sandbox's and the dispatcher's business. It imports no room and little
else, since every worker carries what it imports.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import io
import json
import linecache
import logging
import os
import socket
import sys
import threading
import time
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from edgeward.core import invocation as wire
from edgeward.core.invocation import MAX_LINE, MAX_LINES, Event

__all__ = ["Conflict", "Context", "Event", "Refused", "Response", "State", "serve"]

SDK = "edgeward-python/1"
_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"
_READ = 256 * 1024
#: What is received; made before the fork, so that a worker has of it only what it used.
_BUFFER = memoryview(bytearray(_READ))
_encode_json = msgspec.json.Encoder().encode


class Response:
    """An answer with a status and headers of its own. ``body``: bytes, text, or anything JSON can say."""

    __slots__ = ("body", "headers", "status")

    def __init__(
        self,
        body: Any = b"",
        status: int = 200,
        headers: dict[str, str] | list[tuple[str, str]] | None = None,
    ) -> None:
        self.body, self.status = body, status
        self.headers = list(headers.items()) if isinstance(headers, dict) else list(headers or [])


class Refused(RuntimeError):
    """The node did not do what the handler asked for. ``kind``: refused, too-large, too-many, unavailable."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Conflict(Refused):
    """The state's key has another revision than was said."""


#: Sends a question and waits for the answer; raises ``Refused``.
Ask = Callable[..., Any]


class State:
    """The function's key-value memory on this node: kept over calls, versions and restarts. Other nodes have theirs."""

    __slots__ = ("_ask",)

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def get(self, key: str, default: Any = None) -> Any:
        """The value (bytes), or ``default``."""
        found = self._ask(wire.StateGet, key)
        return default if found is None else found[0]

    def entry(self, key: str) -> tuple[bytes, int] | None:
        """The value and its revision, or None."""
        found = self._ask(wire.StateGet, key)
        return None if found is None else (found[0], found[1])

    def set(self, key: str, value: Any, revision: int | None = None) -> int:
        """Keeps bytes, text or anything JSON can say; it is on the disk when this returns. Gives the new revision.

        With ``revision`` only when that is the present one (0: only when there is none), else ``Conflict``.
        """
        return int(self._ask(wire.StateSet, key, _body(value)[0], revision))

    def delete(self, key: str, revision: int | None = None) -> bool:
        """Whether it was there. ``revision`` as in :meth:`set`."""
        return bool(self._ask(wire.StateDelete, key, revision))

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin so, sorted."""
        return list(self._ask(wire.StateKeys, prefix))


class Context:
    """What a handler is told beside the event, and what it may ask of its node."""

    __slots__ = (
        "_ask",
        "deadline",
        "invocation",
        "logger",
        "name",
        "namespace",
        "node",
        "secrets",
        "site",
        "state",
        "version",
    )

    def __init__(self, init: wire.Init, ask: Ask) -> None:
        self._ask = ask
        self.state = State(ask)
        #: Name of a Secret that the function lists to its keys and values.
        self.secrets = init.secrets
        self.name, self.namespace, self.version = init.name, init.namespace, init.version
        self.node, self.site = init.node, init.site
        #: Id of this call.
        self.invocation = ""
        #: On the clock of ``time.monotonic()``: then this worker is ended.
        self.deadline = 0.0
        self.logger = logging.getLogger(init.name)

    def left(self) -> float:
        """Seconds until this worker is ended."""
        return self.deadline - time.monotonic()

    def publish(self, topic: str, data: Any = b"", qos: int = 1) -> None:
        """Publishes bytes, text or JSON on a topic that the function declares (``publish``). With QoS 1 it is on the
        broker's disk when this returns. Raises ``Refused``."""
        self._ask(wire.Publish, topic, _body(data)[0], qos)

    def sample(
        self, input: Any, output: Any = b"", *, score: float | None = None, tags: dict[str, str] | None = None
    ) -> bool:
        """Offers an input and what was made of it to those who train the model; whether it is kept."""
        tags = {str(k): str(v) for k, v in (tags or {}).items()}
        return bool(self._ask(wire.Sample, _body(input)[0], _body(output)[0], score, tags))


def _compiled(name: str, text: str) -> types.CodeType:
    """The code of a file, whose lines a traceback then shows."""
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    return compile(text, name, "exec")


class _Source(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports a function's files from memory: its folder need not be on the node's disk."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        base = fullname.replace(".", "/")
        for name in (f"{base}/__init__.py", f"{base}.py"):
            if name in self.files:
                return importlib.util.spec_from_loader(
                    fullname, self, origin=name, is_package=name.endswith("/__init__.py")
                )
        return None

    def _file(self, fullname: str) -> str:
        base = fullname.replace(".", "/")
        return f"{base}/__init__.py" if f"{base}/__init__.py" in self.files else f"{base}.py"

    def is_package(self, fullname: str) -> bool:
        return self._file(fullname).endswith("/__init__.py")

    def get_source(self, fullname: str) -> str:
        return self.files[self._file(fullname)]

    def get_code(self, fullname: str) -> Any:
        name = self._file(fullname)
        return _compiled(name, self.files[name])

    def get_data(self, path: str) -> bytes:
        """For ``pkgutil.get_data``: a file that is no module."""
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path].encode()


class _Lines(io.TextIOBase):
    """``print`` becomes log lines."""

    def __init__(self, say: Callable[[int, str], None], level: int) -> None:
        self._say, self._level, self._begun = say, level, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        if len(self._begun) > MAX_LINE:
            lines, self._begun = [*lines, self._begun], ""
        for line in lines:
            self._say(self._level, line)
        return len(text)

    def rest(self) -> None:
        if self._begun:
            self.write("\n")


class _Handler(logging.Handler):
    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info))
        fields = getattr(record, "fields", None)
        self._worker.log(record.levelno, text, fields if isinstance(fields, dict) else {})


class Worker:
    """One worker on its socket; :meth:`run` until the other end closes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._frames = wire.Frames()
        self._waiting: deque[bytes] = deque()
        # whoever reads the socket holds it; another thread's answer waits until its turn
        self._reading = threading.Lock()
        self._asks = 0
        self._call = ""
        self._lines = self._dropped = 0
        self._level = logging.INFO
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bound = wire.MAX_BODY

    # -- frames ----------------------------------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        data = wire.frame(message)
        with self._lock:
            self._sock.sendall(data)

    def receive(self) -> wire.ToWorker | None:
        """The next message that is no late answer; None when the other end has closed."""
        with self._reading:
            while True:
                while self._waiting:
                    message: wire.ToWorker = wire.decode_to_worker(self._waiting.popleft())
                    if not isinstance(message, wire.Answer):
                        return message
                if not self._more(self._waiting):
                    return None

    def _more(self, into: deque[bytes]) -> bool:
        size = self._sock.recv_into(_BUFFER)
        into.extend(self._frames.feed(_BUFFER[:size]))
        return size > 0

    def ask(self, kind: Any, *what: Any) -> Any:
        """Asks the node something while a call is in hand, one thing at a time. Raises ``Refused``."""
        call = self._call
        with self._reading:
            if not call or call != self._call:
                raise Refused("refused", "there is no call in hand")
            self._asks += 1
            number = self._asks
            try:
                self.send(kind(call, number, *what))
            except (TypeError, ValueError) as e:
                raise Refused("refused", f"cannot be sent: {e}") from None
            got: deque[bytes] = deque()
            while True:
                while got:
                    payload = got.popleft()
                    message = wire.decode_to_worker(payload)
                    if not isinstance(message, wire.Answer):
                        self._waiting.append(payload)  # a thread asks while the call ends: the next call
                    elif message.ask == number:
                        self._waiting.extend(got)
                        return _value(message)
                if not self._more(got):
                    raise Refused("unavailable", "the node has gone")

    def log(self, level: int, text: str, fields: dict[str, Any] | None = None) -> None:
        """One line of the function's log; over its number of lines it is only counted."""
        if level < self._level:
            return
        self._lines += 1
        if self._lines > MAX_LINES:
            self._dropped += 1
            return
        try:
            self.send(wire.Log(self._call, level, time.time(), text[:MAX_LINE], fields or {}))
        except (TypeError, ValueError):  # fields that msgpack cannot say
            self.send(wire.Log(self._call, level, time.time(), text[:MAX_LINE], {"fields": repr(fields)[:MAX_LINE]}))

    # -- life ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        init = self.receive()
        if not isinstance(init, wire.Init):
            return
        self._level = logging.getLevelName(init.level.upper())
        self._bound = init.max_body
        root = logging.getLogger()
        root.handlers[:] = [_Handler(self)]
        root.setLevel(self._level)
        sys.stdout = out = _Lines(self.log, logging.INFO)
        sys.stderr = err = _Lines(self.log, logging.WARNING)
        context = Context(init, self.ask)
        try:
            handler = self._load(init)
        except BaseException as e:  # noqa: BLE001 - whatever a module does while it is loaded, SystemExit too
            self.send(wire.Broken(f"{type(e).__name__}: {e}"[:MAX_LINE], _trace(e)))
            return
        out.rest()
        err.rest()
        self.send(wire.Ready(1, SDK))
        while True:
            message = self.receive()
            if message is None:
                return
            if isinstance(message, wire.Invoke):
                self._serve(handler, message, context)
                out.rest()
                err.rest()

    def _load(self, init: wire.Init) -> Callable[[Event, Context], Any]:
        sys.meta_path.insert(0, _Source(init.files))
        module_name, _, name = init.handler.rpartition(":")
        module = (
            importlib.import_module(module_name or "main")  # of an archive, or one that is named
            if module_name or "main.py" not in init.files
            else self._main(init.files)
        )
        handler = getattr(module, name, None)
        if not callable(handler):
            raise AttributeError(f"{module_name or 'main'} has no function {name!r}")
        if inspect.iscoroutinefunction(handler) or inspect.isasyncgenfunction(handler):
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        return handler  # type: ignore[no-any-return]

    def _main(self, files: dict[str, str]) -> types.ModuleType:
        """The module ``main``, the short way: importing it would cost every worker what the machinery touches."""
        module = types.ModuleType("main")
        module.__file__ = "main.py"
        sys.modules["main"] = module
        exec(_compiled("main.py", files["main.py"]), module.__dict__)  # noqa: S102 - this is what workers are for
        return module

    def _serve(self, handler: Callable[[Event, Context], Any], call: wire.Invoke, context: Context) -> None:
        self._call, self._lines = call.id, 0
        context.invocation = call.id
        context.deadline = time.monotonic() + call.left
        try:
            answer = handler(call.event, context)
            if self._loop is not None and inspect.isawaitable(answer):
                answer = self._loop.run_until_complete(answer)
            if type(answer) is dict:  # the usual answer, the short way
                body = _encode_json(answer)
                if len(body) <= self._bound:
                    self.send(wire.Result(call.id, body, 200, [("content-type", _JSON)]))
                    return
            self._answer(call.id, answer)
        except MemoryError as e:
            self.send(wire.Raised(call.id, "memory", "MemoryError", _trace(e)))
        except BaseException as e:
            self.send(wire.Raised(call.id, "error", type(e).__name__, _trace(e)))
            if isinstance(e, SystemExit | KeyboardInterrupt):
                raise
        finally:
            if self._dropped:
                dropped, self._dropped, self._lines = self._dropped, 0, 0
                self.log(logging.WARNING, f"{dropped} more lines were dropped")
            self._call = ""

    # -- answers ---------------------------------------------------------------------------------------------------

    def _answer(self, id: str, answer: Any) -> None:
        status, headers = 200, []
        if isinstance(answer, Response):
            status, headers, answer = answer.status, [(k.lower(), str(v)) for k, v in answer.headers], answer.body
        if inspect.isgenerator(answer) or inspect.isasyncgen(answer):
            self._stream(id, status, headers, answer)
            return
        body, kind = _body(answer)
        if kind and not any(k == "content-type" for k, _ in headers):
            headers.append(("content-type", kind))
        if len(body) > self._bound:
            message = f"the answer has {len(body)} bytes; at most {self._bound} are allowed in one piece: yield pieces"
            self.send(wire.Raised(id, "too-large", message))
            return
        self.send(wire.Result(id, body, status, headers))

    def _stream(self, id: str, status: int, headers: list[tuple[str, str]], pieces: Any) -> None:
        begun = False
        for piece in pieces if inspect.isgenerator(pieces) else self._drained(pieces):
            body, kind = _body(piece)
            if not begun:
                begun = True
                if kind and not any(k == "content-type" for k, _ in headers):
                    headers.append(("content-type", kind))
                self.send(wire.Head(id, status, headers))
            for at in range(0, len(body), _READ):
                self.send(wire.Chunk(id, body[at : at + _READ]))
        if not begun:
            self.send(wire.Head(id, status, headers))
        self.send(wire.End(id))

    def _drained(self, pieces: Any) -> Iterator[Any]:
        if self._loop is None:
            raise TypeError("an asynchronous generator of a handler that is not")
        while True:
            try:
                yield self._loop.run_until_complete(anext(pieces))
            except StopAsyncIteration:
                return


def _value(answer: wire.Answer) -> Any:
    if answer.error is None:
        return answer.value
    kind, message = answer.error
    raise (Conflict if kind == "conflict" else Refused)(kind, message)


def _body(value: Any) -> tuple[bytes, str]:
    """Bytes and their media type of what a handler returned."""
    if value is None:
        return b"", ""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), "application/octet-stream"
    if isinstance(value, str):
        return value.encode(), _TEXT
    try:
        return _encode_json(value), _JSON
    except (TypeError, ValueError):
        return json.dumps(value).encode(), _JSON


def _trace(e: BaseException) -> str:
    lines = traceback.format_exception(e)
    # the frames of this file tell the function's author nothing
    return "".join(line for line in lines if f'"{__file__}"' not in line)[-MAX_LINE:]


def give_names(text: str) -> None:
    """Makes ``EDGEWARD_HOSTS`` what names mean here: the node looks them up when they are connected to.

    ``text``: ``name=v4,v6`` with blanks between. Other names are unknown, at once; there is no DNS to ask.
    """
    hosts = {name: addresses.split(",") for name, _, addresses in (part.partition("=") for part in text.split())}
    plain = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0) -> list[Any]:
        if host is None:
            return plain(host, port, family, type, proto, flags)
        name = host.decode() if isinstance(host, bytes) else str(host)
        addresses = hosts.get(name.lower().rstrip("."))
        if addresses is None:
            try:
                return plain(name, port, family, type, proto, flags | socket.AI_NUMERICHOST)
            except socket.gaierror as e:
                if e.errno == socket.EAI_NONAME:
                    raise socket.gaierror(e.errno, f"{name!r} is not in limits.network") from None
                raise
        wanted = [a for a in addresses if family == 0 or (":" in a) == (family == socket.AF_INET6)]
        return [one for a in wanted for one in plain(a, port, family, type, proto, flags | socket.AI_NUMERICHOST)]

    def gethostbyname(name: str) -> str:
        return str(getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])

    socket.getaddrinfo = getaddrinfo
    socket.gethostbyname = gethostbyname


def serve(sock: socket.socket) -> None:
    """Serves calls on a connected stream socket until it closes."""
    if hosts := os.environ.get("EDGEWARD_HOSTS"):
        give_names(hosts)
    Worker(sock).run()
