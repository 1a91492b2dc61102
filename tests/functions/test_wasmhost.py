"""A worker by itself, with nobody who ends its process: what ends here was ended by the engine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from tests.functions.wat import LOOP, module, say

from edgeward.core import invocation as wire
from edgeward.core.invocation import Event
from edgeward.functions.wasmwire import Compiled, Load

_RUN = """
import socket, sys
from edgeward.functions.wasmengine import Machine
from edgeward.functions.wasmhost import Worker
try:
    Worker(socket.socket(fileno=int(sys.argv[1])), Machine()).run()
except ConnectionError:
    pass
"""
_decode = msgspec.msgpack.Decoder(wire.FromWorker | Compiled).decode


class Peer:
    """The node's end of a worker."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(60)
        with theirs:
            argv = [sys.executable, "-c", _RUN, str(theirs.fileno())]
            self.process = subprocess.Popen(argv, pass_fds=[theirs.fileno()])

    def send(self, *messages: Any, fds: list[int] | None = None) -> None:
        data = b"".join(wire.frame(m) for m in messages)
        if fds:
            socket.send_fds(self.sock, [data], fds)
        else:
            self.sock.sendall(data)

    def receive(self) -> Any:
        def exactly(size: int) -> bytes:
            data = b""
            while len(data) < size:
                piece = self.sock.recv(size - len(data))
                assert piece, "the worker ended"
                data += piece
            return data

        return _decode(exactly(int.from_bytes(exactly(4), "big")))

    def call(self, data: bytes, left: float) -> Any:
        self.send(wire.Invoke("1", left, Event("1", "/", "t", data)))
        return self.receive()


@contextlib.contextmanager
def peer() -> Iterator[Peer]:
    made = Peer()
    try:
        yield made
    finally:
        made.sock.close()
        try:
            made.process.wait(60)
        finally:
            made.process.kill()
            made.process.wait()


def _file(data: bytes = b"") -> int:
    fd = os.memfd_create("test")
    os.write(fd, data)
    return fd


def _compiled(source: bytes, startup: float = 30.0) -> tuple[int, Compiled]:
    given, out = _file(source), _file()
    with peer() as p:
        p.send(Load(True, len(source), 1 << 24, handler="handler", startup=startup), fds=[given, out])
        told = p.receive()
    os.close(given)
    return out, told


@contextlib.contextmanager
def serving(text: str) -> Iterator[Peer]:
    code, told = _compiled(text.encode())
    assert told.size, told.error
    with peer() as p:
        p.send(Load(False, told.size, 1 << 24, {"A": "b"}), fds=[code])
        os.close(code)
        p.send(wire.Init("default", "f", "v", "n1", "s1", "handler"))
        assert isinstance(p.receive(), wire.Ready)
        yield p


@pytest.mark.parametrize("what", ["loops", "sleeps", "waits for its node"])
def test_a_call_over_its_deadline_is_ended_and_its_process_goes_on(what: str) -> None:
    sleep = (
        '(module (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))'
        '(import "edgeward" "read" (func $take (param i32 i32) (result i32)))'
        '(import "edgeward" "write" (func $put (param i32 i32) (result i32)))'
        '(memory (export "memory") 1) (data (i32.const 1024) "well") (func (export "_start")'
        "(if (call $take (i32.const 4096) (i32.const 1)) (then (i64.store (i32.const 24) (i64.const 3600000000000))"
        "(drop (call $poll (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 128)))))"
        "(drop (call $put (i32.const 1024) (i32.const 4)))))"
    )
    ask = "(drop (call $get (i32.const 1024) (i32.const 1) (i32.const 0) (i32.const 0)))"
    asks = f"(if (call $take (i32.const 4096) (i32.const 1)) (then {ask})) {say(1, 4)}"
    text = {"loops": LOOP, "sleeps": sleep}.get(what) or module(asks, data="well")
    with serving(text) as p:
        assert p.call(b"", 600.0).body == b"well"
        for _ in range(2):
            told = p.call(b"x", 0.2)
            if isinstance(told, wire.StateGet):  # it may have been too late even for that
                told = p.receive()
            assert (told.id, told.kind) == ("1", "timeout")
            p.send(wire.Answer(1, None), wire.Answer(99, None))  # too late, and unknown: nobody waits for them
            assert p.call(b"", 600.0).body == b"well"
        assert p.process.poll() is None


def test_a_guest_that_is_ended_leaves_nothing_to_the_next_deadline() -> None:
    """An alarm that rings for a call that has just ended does not end the next one."""
    busy = module(f"(loop $l (local.set $i (i32.add (local.get $i) (i32.const 1))) (br_if $l (i32.lt_u (local.get $i) "
                  f"(i32.const 200000)))) {say(1, 4)}", data="well")  # fmt: skip
    with serving(busy) as p:
        for n in range(300):
            told = p.call(b"", 0.004 if n % 2 else 600.0)
            if n % 2:
                assert isinstance(told, wire.Result) or told.kind == "timeout"
            else:
                assert isinstance(told, wire.Result), "a call with all the time there is"


def test_compiling_tells_what_is_wrong() -> None:
    hang = '(module (func $s (loop $l (br $l))) (start $s) (func (export "_start")))'
    for text, why in (
        ("(module", "cannot be compiled"),
        ("\udcff", "neither WebAssembly nor its text"),
        ('(module (import "a" "b" (func)))', "unknown import"),
    ):
        out, told = _compiled(text.encode("utf-8", "surrogateescape"))
        os.close(out)
        assert why in told.error
        assert told.final
    out, told = _compiled(hang.encode(), startup=0.2)
    os.close(out)
    assert "not ready within 0.2 s" in told.error
    assert not told.final, "on a machine that has less to do it may be"
