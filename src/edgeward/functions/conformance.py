"""Does a worker keep to the protocol? ``python -m edgeward.functions.conformance -- PROGRAM [ARGUMENT...]``

For whoever writes a worker in a language that has no SDK yet. The program is started as a node does it, a socket at the
descriptor that ``EDGEWARD_WORKER_FD`` names, and is sent frames as a node sends them and as it might: byte by
byte, with every width that msgpack allows, with elements that a later release may add. What it has to do with a call is
said by the event's ``type`` (``docs/functions.md`` has the table). Each check is one line, ``ok`` or what was wrong.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core import invocation as wire
from edgeward.functions.stdio import WORKER_ENV

#: Seconds in which a worker answers.
PATIENCE = 30.0
#: And in which it ends when its socket is closed.
ENDING = 30.0
#: Bytes of an answer in one piece that the worker is told to keep to.
MAX_BODY = 2 << 20


class Wrong(Exception):
    """A check that did not hold."""


def wide(value: Any) -> bytes:
    """A value in msgpack, each in the widest form there is: other peers than ours may write so."""
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return struct.pack(">BQ", 0xCF, value) if value >= 0 else struct.pack(">Bq", 0xD3, value)
    if isinstance(value, float):
        return struct.pack(">Bd", 0xCB, value)
    if isinstance(value, str):
        return struct.pack(">BI", 0xDB, len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    if isinstance(value, dict):
        return struct.pack(">BI", 0xDF, len(value)) + b"".join(wide(k) + wide(v) for k, v in value.items())
    return struct.pack(">BI", 0xDD, len(value)) + b"".join(wide(v) for v in value)


class Peer:
    """The node's end of one worker."""

    def __init__(self, argv: Sequence[str], folder: Path | None, files: dict[str, str]) -> None:
        self.files = files
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        self._sock, self._frames, self._came = ours, wire.Frames(), list[bytes]()
        self.logs: list[wire.Log] = []
        self._calls = 0
        with theirs:
            self.process = subprocess.Popen(
                argv,
                cwd=folder,
                env={**os.environ, WORKER_ENV: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def close(self) -> None:
        self._sock.close()
        self.process.kill()
        self.process.wait()

    def send(self, *messages: Any, piece: int = 0) -> None:
        """Messages in one write, or ``piece`` bytes at a time; a ``bytes`` is a payload as it is."""
        data = b"".join(
            len(m).to_bytes(4, "big") + m if isinstance(m, bytes) else bytes(wire.frame(m)) for m in messages
        )
        for at in range(0, len(data), piece or len(data)):
            self._sock.sendall(data[at : at + (piece or len(data))])

    def next(self) -> wire.FromWorker:
        """The next message that is no log line."""
        while True:
            while not self._came:
                try:
                    data = self._sock.recv(65536)
                except TimeoutError:
                    raise Wrong(f"nothing came within {PATIENCE:g} s") from None
                except OSError as e:
                    raise Wrong(f"its socket broke: {e}") from None
                if not data:
                    raise Wrong("it closed its socket")
                self._came += self._frames.feed(data)
            try:
                message: wire.FromWorker = wire.decode_from_worker(self._came.pop(0))
            except msgspec.MsgspecError as e:
                raise Wrong(f"it sent what is no message: {e}") from None
            if not isinstance(message, wire.Log):
                return message
            self.logs.append(message)

    def init(self, handler: str = "handler") -> wire.Init:
        return wire.Init("default", "conformance", "0123456789ab", "n1", "s1", handler, self.files, MAX_BODY, "debug")

    def invoke(self, what: str, data: bytes = b"", **more: Any) -> wire.Invoke:
        self._calls += 1
        event = wire.Event(f"event-{self._calls}", "/conformance", f"conformance.{what}", data, **more)
        return wire.Invoke(f"call-{self._calls:04d}", 20.0, event)

    def result(self, call: wire.Invoke) -> wire.Result:
        message = self.next()
        if not isinstance(message, wire.Result):
            raise Wrong(f"a Result was due, it sent {message!r:.200}")
        _equal("the id of the Result", message.id, call.id)
        return message

    def call(self, what: str, data: bytes = b"", **more: Any) -> wire.Result:
        call = self.invoke(what, data, **more)
        self.send(call)
        return self.result(call)


def _equal(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Wrong(f"{what} is {found!r:.200}, not {wanted!r:.200}")


# -- the checks --------------------------------------------------------------------------------------------------------


def _echoes(peer: Peer) -> None:
    every = bytes(range(256))
    _equal("the body", peer.call("echo", every).body, every)
    _equal("the body", peer.call("echo").body, b"")
    reply = peer.call("echo", "grüße".encode(), datacontenttype="text/x-own")
    _equal("content-type", dict(reply.headers).get("content-type"), "text/x-own")


def _long(peer: Peer) -> None:
    for size in (31, 32, 255, 256, 65535, 65536, MAX_BODY):
        data = bytes(size - 1) + b"x"
        _equal(f"an echo of {size} bytes being right", peer.call("echo", data).body == data, True)


def _in_pieces(peer: Peer) -> None:
    call = peer.invoke("echo", b"in pieces")
    peer.send(call, piece=1)
    _equal("the body", peer.result(call).body, b"in pieces")


def _every_width(peer: Peer) -> None:
    call = peer.invoke("echo", b"wide", extensions={"k": "v" * 40})
    peer.send(wide(msgspec.msgpack.decode(msgspec.msgpack.encode(call))))
    _equal("the body", peer.result(call).body, b"wide")


def _later_releases(peer: Peer) -> None:
    call = peer.invoke("echo", b"later")
    number, id, left, event = msgspec.msgpack.decode(msgspec.msgpack.encode(call))
    peer.send(msgspec.msgpack.encode([number, id, left, [*event, {"new": [1, -1, 1.5, None]}], "more"]))
    _equal("the body", peer.result(call).body, b"later")
    peer.send(msgspec.msgpack.encode([2, 77, None, None]))  # an answer to something that was never asked
    _equal("the body", peer.call("echo", b"goes on").body, b"goes on")


def _attributes(peer: Peer) -> None:
    time, more = "2026-01-02T03:04:05Z", {"traceparent": "00-ab"}
    reply = peer.call("attributes", subject="ein Öl", time=time, extensions=more)
    lines = reply.body.decode().split("\n")
    wanted = [
        f"event-{peer._calls}",
        "/conformance",
        "conformance.attributes",
        "ein Öl",
        "2026-01-02T03:04:05Z",
        "00-ab",
    ]
    _equal("the attributes", lines[:6], wanted)
    http = wire.Http("PUT", "/a b", "q=1&q=2", [("x-a", "1"), ("x-a", "2")], "192.0.2.1")
    reply = peer.call("http", http=http)
    _equal("the request", reply.body.decode().split("\n"), ["PUT", "/a b", "q=1&q=2", "x-a=1,x-a=2", "192.0.2.1"])


def _status(peer: Peer) -> None:
    reply = peer.call("status", b"418")
    _equal("the status", reply.status, 418)
    _equal("the header x-conformance", dict(reply.headers).get("x-conformance"), "yes")


def _stream(peer: Peer) -> None:
    call = peer.invoke("stream", b"5")
    peer.send(call)
    head = peer.next()
    if not isinstance(head, wire.Head):
        raise Wrong(f"a Head was due, it sent {head!r:.200}")
    _equal("the id of the Head", head.id, call.id)
    body = b""
    while isinstance(message := peer.next(), wire.Chunk):
        _equal("the id of a Chunk", message.id, call.id)
        body += message.data
    _equal("what ends the answer", message, wire.End(call.id))
    _equal("the pieces", body, b"".join(b"piece %d\n" % n for n in range(5)))
    _equal("the body of the next call", peer.call("echo", b"next").body, b"next")


def _raises(peer: Peer) -> None:
    call = peer.invoke("raise", b"no")
    peer.send(call)
    message = peer.next()
    if not isinstance(message, wire.Raised):
        raise Wrong(f"a Raised was due, it sent {message!r:.200}")
    _equal("id and kind", (message.id, message.kind), (call.id, "error"))
    _equal("the body of the next call", peer.call("echo", b"next").body, b"next")


def _too_large(peer: Peer) -> None:
    call = peer.invoke("large", str(MAX_BODY + 1).encode())
    peer.send(call)
    message = peer.next()
    if isinstance(message, wire.Raised):
        _equal("id and kind", (message.id, message.kind), (call.id, "too-large"))
    elif isinstance(message, wire.Head):  # in pieces: as good
        while isinstance(peer.next(), wire.Chunk):
            pass
    else:
        raise Wrong(
            f"an answer over {MAX_BODY} bytes takes Raised too-large, or pieces; it sent {type(message).__name__}"
        )
    _equal("the body of the next call", peer.call("echo", b"next").body, b"next")


def _logs(peer: Peer) -> None:
    peer.logs.clear()
    call = peer.invoke("log", b"eine Zeile")
    peer.send(call)
    peer.result(call)
    if not peer.logs:
        raise Wrong("there was no Log before the Result")
    line = peer.logs[0]
    _equal("id, level and message", (line.id, line.level, line.message), (call.id, 30, "eine Zeile"))


def _ends(peer: Peer) -> None:
    peer._sock.close()
    try:
        peer.process.wait(ENDING)
    except subprocess.TimeoutExpired:
        raise Wrong(f"it still runs {ENDING:g} s after its socket was closed") from None


CHECKS: dict[str, Callable[[Peer], None]] = {
    "answers a call with the bytes it was given": _echoes,
    "reads and writes frames of every length": _long,
    "reads a frame that comes byte by byte": _in_pieces,
    "reads every width of msgpack": _every_width,
    "ignores what a later release may add": _later_releases,
    "knows an event's attributes and its HTTP request": _attributes,
    "answers with a status and headers": _status,
    "answers in pieces": _stream,
    "says that the handler raised, and goes on": _raises,
    "says that an answer is too large, and goes on": _too_large,
    "logs a line with the call's id": _logs,
    "ends when its socket closes": _ends,
}


def check(
    argv: Sequence[str],
    folder: Path | None = None,
    files: dict[str, str] | None = None,
    tell: Callable[[str, str], None] = lambda name, wrong: None,
) -> dict[str, str]:
    """What was wrong, by the name of the check; empty: it keeps to the protocol. ``files``: what Init carries."""
    found: dict[str, str] = {}

    def held(name: str, work: Callable[[], object]) -> bool:
        wrong = ""
        try:
            work()
        except Wrong as e:
            wrong = found[name] = str(e)
        tell(name, wrong)
        return not wrong

    peer = Peer(argv, folder, files or {})
    try:

        def start() -> None:
            peer.send(peer.init(), piece=7)
            message = peer.next()
            if not isinstance(message, wire.Ready):
                raise Wrong(f"a Ready was due, it sent {message!r:.300}")
            _equal("the protocol", message.protocol, 1)

        if held("says Ready when it was told what it is to run", start):
            for name, work in CHECKS.items():
                if not held(name, lambda work=work: work(peer)):  # type: ignore[misc]
                    break  # where it is in the conversation is not known any more
    finally:
        with contextlib.suppress(OSError):
            peer.close()
    return found


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] == ["--"]:
        argv = argv[1:]
    if not argv:
        sys.exit("usage: python -m edgeward.functions.conformance -- PROGRAM [ARGUMENT...]")
    found = check(
        argv, tell=lambda name, wrong: print(f"{'FAILED' if wrong else 'ok':6} {name}{': ' * bool(wrong)}{wrong}")
    )
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
