"""A worker that runs WebAssembly: one process, in a cage, with a fresh instance for each call.

In come frames of ``core/invocation.py`` on its socket, after one :class:`Load` with the compiled code as an open file;
out go results, pieces, errors and log lines. What a guest may ask for is ``wasi.py``, how it is run ``wasmengine.py``;
here is what lies between them and the socket. The same process is used, once, to compile: then it gets the source and
gives back machine code.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import wasmtime

from edgeward.core import invocation as wire
from edgeward.core.invocation import MAX_LINE, MAX_LINES
from edgeward.functions import wasi
from edgeward.functions.stdio import environment
from edgeward.functions.wasmasks import Asking
from edgeward.functions.wasmengine import Failed, Machine, Program
from edgeward.functions.wasmwire import Compiled, Load

SDK = "edgeward-wasm/1"
_READ = 256 * 1024
#: Seconds after which a worker's alarm looks up as long as it has had no call.
_LOOKS = 2.0
_CLOCKS = (time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_PROCESS_CPUTIME_ID, time.CLOCK_THREAD_CPUTIME_ID)


class Alarm(threading.Thread):
    """Moves the epoch on when the deadline has come; sleeps through the calls that end in time."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(daemon=True)
        self._machine = machine
        self._bell = threading.Condition(threading.Lock())
        self._at = self._wakes = float("inf")
        #: Until the first call it looks up now and then: to be woken for it would cost that call the most.
        self._looks: float = _LOOKS

    def set(self, at: float) -> None:
        self._at, self._looks = at, float("inf")
        if at < self._wakes:
            with self._bell:
                self._bell.notify()

    def run(self) -> None:
        rung = 0.0
        with self._bell:
            while True:
                self._wakes = float("inf")  # whoever sets another deadline from here on rings
                at, now = self._at, time.monotonic()
                if at <= now:
                    if at != rung:
                        self._machine.tick()
                    rung, at = at, float("inf")
                wakes = self._wakes = min(at, now + self._looks)
                self._bell.wait(None if wakes == float("inf") else max(0.0, wakes - now))


class Worker:
    """One worker on its socket: what it is (``Load``, ``Init``), then calls, one at a time, until the socket closes."""

    def __init__(self, sock: socket.socket, machine: Machine) -> None:
        self._sock, self._machine = sock, machine
        self._frames = wire.Frames()
        self._waiting: list[bytes] = []
        self._call = ""
        self._lines = self._dropped = self._asks = 0
        self._level = logging.INFO
        self._init: wire.Init
        self._args: list[bytes] = []
        self._own: dict[str, str] = {}

    # -- frames ----------------------------------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        self._sock.sendall(wire.frame(message))

    def _receive(self) -> bytes | None:
        while not self._waiting:
            data = self._sock.recv(_READ)
            if not data:
                return None
            self._waiting = list(self._frames.feed(data))
        return self._waiting.pop(0)

    def _first(self) -> tuple[Load, list[int]]:
        data, fds, _, _ = socket.recv_fds(self._sock, 4096, 2)
        self._waiting = list(self._frames.feed(data))
        while not self._waiting:
            data = self._sock.recv(4096)
            if not data:
                raise ConnectionResetError
            self._waiting = list(self._frames.feed(data))
        return msgspec.msgpack.decode(self._waiting.pop(0), type=Load), fds

    # -- life ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self._alarm = Alarm(self._machine)
        with contextlib.suppress(RuntimeError):  # it may start no thread: then the node ends the process at a deadline
            self._alarm.start()
        self._warm()
        load, fds = self._first()
        try:
            # private: the file is sealed, and ctypes wants to be able to write
            with mmap.mmap(fds[0], load.size, flags=mmap.MAP_PRIVATE) as given:
                if load.compile:
                    self.send(self._compile(given[:], fds[1], load))
                    return
                self._own = load.env
                program = self._start(given, load)
        finally:
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._serve(program)

    def _warm(self) -> None:
        """Does once what a start and a call do, before anybody waits for it: memory that a fork shares is copied when
        it is first written to, and that is most of what they take."""
        self._machine.warm(self)
        event = wire.Event("", "", "", http=wire.Http())
        for message in (wire.Init("", "", "", "", "", ""), wire.Invoke("", 0.0, event)):
            for data in wire.Frames().feed(wire.frame(message)):
                wire.decode_to_worker(data)
        wire.frame(wire.Result("", b"x", 200, _typed([], b"x")))

    def _compile(self, source: bytes, out: int, load: Load) -> Compiled:
        """Machine code into ``out``, when an instance could be made of it."""
        try:
            module = self._machine.compile(source)
            program = Program(self._machine, module, load.handler, load.memory)
            deadline = time.monotonic() + load.startup
            self._alarm.set(deadline)  # its start function runs here, and may not end
            program.run(Asking(self, [], dict, b"", wire.MAX_BODY, {}), deadline, only_make=True)
            code = bytes(module.serialize())
            os.ftruncate(out, len(code))
            at = 0
            while at < len(code):
                at += os.pwrite(out, code[at : at + (1 << 20)], at)
        except UnicodeDecodeError:
            return Compiled(0, "it is neither WebAssembly nor its text")
        except (wasmtime.WasmtimeError, OSError, MemoryError) as e:
            return Compiled(0, f"it cannot be compiled: {e}"[:MAX_LINE])
        except Failed as e:
            late = e.kind == "timeout"
            why = f"it was not ready within {load.startup:g} s" if late else f"no instance can be made: {e.message}"
            if e.kind == "memory":
                why += f"; limits.memory is {load.memory} bytes"
            return Compiled(0, why[:MAX_LINE], not late)
        return Compiled(len(code))

    def _start(self, code: mmap.mmap, load: Load) -> Program:
        """Loads the code; says ``Ready``, or ``Broken`` and ends. That an instance can be made was tried when it was
        compiled."""
        try:
            module: wasmtime.Module | wasmtime.WasmtimeError = self._machine.load(code)
        except wasmtime.WasmtimeError as e:
            module = e
        first = self._receive()
        init = None if first is None else wire.decode_to_worker(first)
        if not isinstance(init, wire.Init):
            raise ConnectionResetError
        self._init = init
        self._level = logging.getLevelName(init.level.upper())
        self._args = [init.name.encode()]
        try:
            if isinstance(module, wasmtime.WasmtimeError):
                raise module
            program = Program(self._machine, module, init.handler, load.memory)
        except wasmtime.WasmtimeError as e:
            why = str(e)
            self.send(wire.Broken(why.split("\n")[0][:MAX_LINE], why[:MAX_LINE]))
            raise ConnectionResetError from None
        self.send(wire.Ready(1, SDK))
        return program

    def _serve(self, program: Program) -> None:
        while True:
            data = self._receive()
            if data is None:
                return
            message = wire.decode_to_worker(data)
            if isinstance(message, wire.Invoke):
                self._invoke(program, message)

    def _variables(self, event: wire.Event, left: float) -> Callable[[], dict[str, str]]:
        init, call = self._init, self._call
        where = {"EDGEWARD_NODE": init.node, "EDGEWARD_SITE": init.site}
        # what comes from outside changes nothing that was declared
        name = f"{init.namespace}/{init.name}"
        return lambda: {**environment(name, init.version, call, left, event), **where, **self._own}

    # -- a call ----------------------------------------------------------------------------------------------------

    def _invoke(self, program: Program, call: wire.Invoke) -> None:
        self._call, self._lines = call.id, 0
        event = call.event
        # a little before the node would end the whole process
        deadline = time.monotonic() + call.left - min(0.005, call.left / 10)
        env = self._variables(event, call.left)
        system = Asking(self, self._args, env, event.data, self._init.max_body, self._init.secrets)
        self._alarm.set(deadline)
        try:
            program.run(system, deadline)
            system.end()
            self._answer(call.id, system)
        except Failed as e:
            system.end()
            self.send(wire.Raised(call.id, e.kind, e.message[:MAX_LINE], e.trace[:MAX_LINE]))
        finally:
            self._alarm.set(float("inf"))
            if self._dropped:
                dropped, self._dropped, self._lines = self._dropped, 0, 0
                self.log(logging.WARNING, f"{dropped} more lines were dropped")
            self._call = ""

    def _answer(self, id: str, system: wasi.System) -> None:
        body = system.body()
        if system.streaming:
            if body:
                self._chunks(id, body)
            self.send(wire.End(id))
        else:
            self.send(wire.Result(id, body, system.status, _typed(system.headers, body)))

    def _chunks(self, id: str, data: bytes) -> None:
        for at in range(0, len(data), _READ):
            self.send(wire.Chunk(id, data[at : at + _READ]))

    # -- what a system needs (wasi.Host) ---------------------------------------------------------------------------

    def clock(self, which: int) -> int:
        return time.clock_gettime_ns(_CLOCKS[which])

    def sleep(self, nanoseconds: int) -> None:
        left = self._machine.guest.deadline - time.monotonic()
        time.sleep(max(0.0, min(nanoseconds / 1e9, left)))
        if nanoseconds / 1e9 > left:
            raise wasi.Late("over its deadline")

    def ask(self, make: Callable[[str, int], wire.Ask]) -> wire.Answer:
        self._asks += 1
        if not self._call:
            return wire.Answer(self._asks, None, ("refused", "there is no call"))
        self.send(make(self._call, self._asks))
        try:
            while True:
                left = self._machine.guest.deadline - time.monotonic()
                if left <= 0:
                    raise wasi.Late("over its deadline")
                self._sock.settimeout(left)
                data = self._receive()
                if data is None:
                    raise ConnectionResetError
                answer = wire.decode_to_worker(data)
                if isinstance(answer, wire.Answer) and answer.ask == self._asks:
                    return answer
        except TimeoutError:
            raise wasi.Late("over its deadline") from None
        finally:
            self._sock.settimeout(None)

    def random(self, size: int) -> bytes:
        return os.urandom(size)

    def log(self, level: int, text: str) -> None:
        if level < self._level or not self._call:
            return
        self._lines += 1
        if self._lines > MAX_LINES:
            self._dropped += 1
            return
        self.send(wire.Log(self._call, level, time.time(), text))

    def piece(self, status: int, headers: list[tuple[str, str]], data: bytes, first: bool) -> None:
        if not self._call:
            return
        if first:
            self.send(wire.Head(self._call, status, _typed(headers, data)))
        self._chunks(self._call, data)


def _typed(headers: list[tuple[str, str]], body: bytes) -> list[tuple[str, str]]:
    """With a media type: a guest that says none writes text, if it is text."""
    if not body or any(name == "content-type" for name, _ in headers):
        return headers
    try:
        body.decode()
    except UnicodeDecodeError:
        return [*headers, ("content-type", "application/octet-stream")]
    return [*headers, ("content-type", "text/plain; charset=utf-8")]
