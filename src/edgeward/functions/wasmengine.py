"""The engine of the WebAssembly tier: wasmtime with its bounds, the guest's memory seen from outside, one fresh run.

In come machine code (:class:`Machine` compiles it, and loads it again) and, for each call, a ``wasi.System`` and a
deadline; a :class:`Program` makes a store with bounds on memory and time, an instance in it, runs that and throws both
away, so nothing is left for the next call. What ends it otherwise is a :class:`Failed`. Engine and host functions are
made once, before workers are forked.

The hot path calls wasmtime's C functions with plain numbers: through its Python classes a call takes three times as
long.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import time
from collections.abc import Callable
from ctypes import byref, c_int32, c_size_t, c_uint8, c_uint64, c_void_p
from typing import Any

import wasmtime
from wasmtime import _ffi as ffi

from edgeward.functions import wasi, wasmasks

#: Bytes of stack that a guest may use, of the 8 MiB that its thread has; elements of its tables.
_STACK, _TABLE = 512 * 1024, 1 << 20
_CALLBACK = ctypes.CFUNCTYPE(c_size_t, c_void_p, c_void_p, c_void_p, c_size_t)
_EPOCH = ctypes.CFUNCTYPE(c_size_t, c_void_p, c_void_p, ctypes.POINTER(c_uint64), ctypes.POINTER(c_uint8))
_CONTINUE = 0
#: Less of its memory left than this, and it failed: it was over it.
_NEAR = 1 << 20
_NO_FINALIZER = ctypes.cast(0, ctypes.CFUNCTYPE(None, c_void_p))
_MEMORY, _IS_MEMORY, _IS_FUNC = b"memory", int(ffi.WASMTIME_EXTERN_MEMORY.value), int(ffi.WASMTIME_EXTERN_FUNC.value)
#: A program that does nothing much, for :meth:`Machine.warm`.
_SAMPLE = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1) (data (i32.const 64) "x")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 1))
    (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"""


class Failed(Exception):
    """A call without an answer; ``kind`` as in ``Raised`` (``core/invocation.py``), or ``timeout``."""

    def __init__(self, kind: str, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.trace = kind, message, trace


def _engine() -> wasmtime.Engine:
    """As ``wasmwire.CONFIG`` says."""
    config = wasmtime.Config()
    config.epoch_interruption = True
    config.max_wasm_stack = _STACK
    config.parallel_compilation = False  # threads of its own would not live through a fork
    config.wasm_threads = False
    config.wasm_memory64 = False
    return wasmtime.Engine(config)


_KINDS = {"i": wasmtime.ValType.i32, "I": wasmtime.ValType.i64, "d": wasmtime.ValType.f64}
#: How values lie in wasmtime's array, 16 bytes each.
_LAYOUT = {"i": "I12x", "I": "q8x", "d": "d8x"}


def _type(parameters: str, gives: str) -> wasmtime.FuncType:
    return wasmtime.FuncType([_KINDS[p]() for p in parameters], [_KINDS[g]() for g in gives])


class Guest:
    """The instance of the call in hand: its memory, checked at each touch (:class:`wasi.Memory`)."""

    def __init__(self) -> None:
        self.system: wasi.System | None = None
        #: What ended the call from our side.
        self.left: BaseException | None = None
        self.deadline = 0.0
        self.known = False
        self._memory = ffi.wasmtime_extern_t()
        self._base = self._size = 0

    def begin(self, system: wasi.System, deadline: float) -> None:
        self.system, self.left, self.known, self.deadline = system, None, False, deadline

    def at(self, caller: int) -> None:
        """Looks where the memory is now: it may have grown since the last time."""
        if not self.known:
            found = _export(caller, _MEMORY, len(_MEMORY), byref(self._memory))
            self.known = bool(found) and int(self._memory.kind) == _IS_MEMORY
        if not self.known:
            self._base = self._size = 0
            return
        context, memory = _context(caller), byref(self._memory.of.memory)
        self._base, self._size = _memory_data(context, memory), _memory_size(context, memory)

    def read(self, at: int, size: int) -> bytes:
        if at + size > self._size:
            raise wasi.Fault
        return ctypes.string_at(self._base + at, size)

    def write(self, at: int, data: bytes) -> None:
        if at + len(data) > self._size:
            raise wasi.Fault
        ctypes.memmove(self._base + at, data, len(data))


def _raw(name: str, *kinds: Any, gives: Any = None) -> Any:
    """A C function with plain numbers for pointers: each is converted once less."""
    return ctypes.CFUNCTYPE(gives, *kinds)((name, ffi.dll))


_export = _raw("wasmtime_caller_export_get", c_void_p, ctypes.c_char_p, c_size_t, c_void_p, gives=ctypes.c_bool)
_context = _raw("wasmtime_caller_context", c_void_p, gives=c_void_p)
_memory_data = _raw("wasmtime_memory_data", c_void_p, c_void_p, gives=c_void_p)
_memory_size = _raw("wasmtime_memory_data_size", c_void_p, c_void_p, gives=c_size_t)
_store_new = _raw("wasmtime_store_new", c_void_p, c_void_p, c_void_p, gives=c_void_p)
_store_context = _raw("wasmtime_store_context", c_void_p, gives=c_void_p)
_store_delete = _raw("wasmtime_store_delete", c_void_p)
_limiter = _raw("wasmtime_store_limiter", c_void_p, *[ctypes.c_int64] * 5)
_epoch_deadline = _raw("wasmtime_context_set_epoch_deadline", c_void_p, c_uint64)
_epoch_callback = _raw("wasmtime_store_epoch_deadline_callback", c_void_p, _EPOCH, c_void_p, c_void_p)
_increment = _raw("wasmtime_engine_increment_epoch", c_void_p)
_instantiate = _raw("wasmtime_instance_pre_instantiate", c_void_p, c_void_p, c_void_p, c_void_p, gives=c_void_p)
_instance_export = _raw(
    "wasmtime_instance_export_get", c_void_p, c_void_p, ctypes.c_char_p, c_size_t, c_void_p, gives=ctypes.c_bool
)
_func_type = _raw("wasmtime_func_type", c_void_p, c_void_p, gives=c_void_p)
_func_call = _raw(
    "wasmtime_func_call", c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, gives=c_void_p
)
_trap_new = _raw("wasmtime_trap_new", ctypes.c_char_p, c_size_t, gives=c_size_t)
_error_new = _raw("wasmtime_error_new", ctypes.c_char_p, gives=c_size_t)


class Machine:
    """Engine and host functions; one guest at a time."""

    def __init__(self) -> None:
        self.engine = _engine()
        self.linker = wasmtime.Linker(self.engine)
        self.guest = Guest()
        self._kept: list[Any] = []  # ctypes does not keep what C may call
        for name, parameters in wasi.PREVIEW1.items():
            self._define("wasi_snapshot_preview1", name, parameters, "" if name == "proc_exit" else "i")
        for name, kinds in (wasi.EDGEWARD | wasmasks.ASKS).items():
            parameters, _, gives = kinds.partition(">")
            self._define("edgeward", name, parameters, gives or "i")
        self.on_epoch = _EPOCH(self._epoch)
        self.at: int = ctypes.cast(self.engine.ptr(), c_void_p).value or 0
        self._sample = bytes(wasmtime.Module(self.engine, _SAMPLE).serialize())

    def tick(self) -> None:
        """Moves the epoch on: each guest that runs looks whether its deadline has come."""
        _increment(self.at)

    def compile(self, source: bytes) -> wasmtime.Module:
        """Of WebAssembly or its text. Raises ``WasmtimeError``, ``UnicodeDecodeError``."""
        return wasmtime.Module(self.engine, source if source[:4] == b"\0asm" else source.decode())

    def warm(self, host: wasi.Host) -> None:
        """Runs something once: what a first run touches of memory is then this process's own, and the next is fast."""
        with mmap.mmap(-1, len(self._sample)) as code:
            code.write(self._sample)
            program = Program(self, self.load(code), "_start", 1 << 20)
        for _ in range(2):
            system = wasi.System(host, [b"x"], dict, b"x", 16)
            program.run(system, time.monotonic() + 60.0)

    def load(self, code: mmap.mmap) -> wasmtime.Module:
        """A module of machine code that was made here. Nothing in it is checked: whoever gives it has to know it."""
        size = len(code)
        found = ctypes.POINTER(ffi.wasmtime_module_t)()
        view = (c_uint8 * size).from_buffer(code)
        error = ffi.wasmtime_module_deserialize(self.engine.ptr(), view, size, byref(found))
        del view
        if error:
            raise wasmtime.WasmtimeError._from_ptr(error)
        return wasmtime.Module._from_ptr(found)

    def _define(self, module: str, name: str, parameters: str, gives: str) -> None:
        method = name if module != "edgeward" else f"edgeward_{name}"
        callback = _CALLBACK(_gate(self.guest, method, parameters, gives))
        kind = _type(parameters, gives)  # it must be there until it was read
        self._kept.append(callback)
        error = ffi.wasmtime_linker_define_func_unchecked(
            self.linker.ptr(),
            ctypes.create_string_buffer(module.encode()),
            len(module),
            ctypes.create_string_buffer(name.encode()),
            len(name),
            kind.ptr(),
            ctypes.cast(callback, ffi.wasmtime_func_unchecked_callback_t),
            None,
            _NO_FINALIZER,
        )
        if error:
            raise wasmtime.WasmtimeError._from_ptr(error)

    def _epoch(self, context: int, data: int, delta: Any, kind: Any) -> int:
        """The epoch went on: is it this guest's deadline, or that of one that has gone?"""
        guest = self.guest
        if guest.left is None and time.monotonic() < guest.deadline:
            delta[0], kind[0] = 1, _CONTINUE
            return 0
        guest.left = guest.left or wasi.Late("over its deadline")
        return int(_error_new(b"over its deadline"))


def _gate(guest: Guest, method: str, parameters: str, gives: str) -> Callable[[int, int, int, int], int]:
    """What wasmtime calls for one host function: numbers out of its array, one number back into it."""
    layout = struct.Struct("<" + "".join(_LAYOUT[p] for p in parameters))
    work = getattr(wasmasks.Asking, method, None)
    missing = wasi.absent(method)
    size, unpack = layout.size, layout.unpack
    at, result = ctypes.string_at, (ctypes.c_int64 if gives == "I" else c_int32).from_address

    def gate(_: int, caller: int, values: int, count: int) -> int:
        try:
            if work is None:
                result(values).value = missing
                return 0
            guest.at(caller)
            try:
                given = work(guest.system, guest, *unpack(at(values, size)))
            except wasi.Fault:
                given = wasi.FAULT
            result(values).value = given
            return 0
        except BaseException as e:  # noqa: BLE001 - nothing may pass through the guest's frames
            guest.left = e
            return int(_trap_new(b"left", 4))

    return gate


class Program:
    """Loaded code, of which each :meth:`run` makes an instance."""

    def __init__(self, machine: Machine, module: wasmtime.Module, handler: str, memory: int) -> None:
        """``handler``: the export that is called where there is no ``_start``; ``memory``: bytes of a guest's memory.

        Raises ``WasmtimeError`` where it imports what is not here.
        """
        self._machine, self._memory = machine, memory
        self._pre = machine.linker.instantiate_pre(module)
        self._pre_at = ctypes.cast(self._pre.ptr(), c_void_p).value
        self._module, self._handler = module, handler
        self._entry, self._prelude, self._results = b"", b"", 0

    def run(self, system: wasi.System, deadline: float, *, only_make: bool = False) -> None:
        """A fresh instance, and in it the entry, until it ends or ``deadline`` (``time.monotonic()``).

        Raises :class:`Failed`. ``only_make``: the entry is looked for and not called.
        """
        machine = self._machine
        machine.guest.begin(system, deadline)
        store = _store_new(machine.at, None, None)
        try:
            _limiter(store, self._memory, _TABLE, 1, 16, 1)
            context = _store_context(store)
            _epoch_deadline(context, 1)
            _epoch_callback(store, machine.on_epoch, None, None)
            if time.monotonic() >= deadline:  # the epoch may have moved just before
                raise Failed("timeout", "over its deadline")
            instance = ffi.wasmtime_instance_t()
            trap = ctypes.POINTER(ffi.wasm_trap_t)()
            error = _instantiate(self._pre_at, context, byref(instance), byref(trap))
            self._judge(error, trap, context, instance)
            if not self._entry:
                self._look(context, instance)
            if only_make:
                return
            if self._prelude:
                self._call(context, instance, self._prelude, 0)
            if given := self._call(context, instance, self._entry, self._results):
                raise Failed(self._why(context, instance), f"{given} (given back)")
        finally:
            _store_delete(store)
            machine.guest.system = None

    def _look(self, context: int, instance: Any) -> None:
        """Finds out what is to be called. Raises :class:`Failed`."""
        found = ffi.wasmtime_extern_t()
        names = (b"_start", b"_initialize", self._handler.encode())
        there = [n for n in names if _instance_export(context, byref(instance), n, len(n), byref(found))]
        entry = b"_start" if b"_start" in there else names[2]
        if not _instance_export(context, byref(instance), entry, len(entry), byref(found)) or (
            int(found.kind) != _IS_FUNC
        ):
            other = sorted(e.name for e in self._module.exports if isinstance(e.type, wasmtime.FuncType))[:8]
            why = f"it exports no function {self._handler!r} and no _start; it has: {', '.join(other) or 'none'}"
            raise Failed("error", why)
        at = ctypes.cast(_func_type(context, byref(found.of.func)), ctypes.POINTER(ffi.wasm_functype_t))
        kind = wasmtime.FuncType._from_ptr(at, None)
        results = kind.results
        if kind.params or len(results) > 1 or any(str(r) != "i32" for r in results):
            raise Failed("error", f"{entry.decode()} must take nothing and give back nothing or one i32")
        self._entry, self._results = entry, len(results)
        if entry != b"_start" and b"_initialize" in there:
            self._prelude = b"_initialize"

    def _call(self, context: int, instance: Any, name: bytes, results: int) -> int:
        found, value = ffi.wasmtime_extern_t(), ffi.wasmtime_val_t()
        trap = ctypes.POINTER(ffi.wasm_trap_t)()
        if not _instance_export(context, byref(instance), name, len(name), byref(found)):
            return 0
        error = _func_call(context, byref(found.of.func), None, 0, byref(value), results, byref(trap))
        self._judge(error, trap, context, instance)
        return int(value.of.i32) if results else 0

    def _judge(self, error: int | None, trap: Any, context: int, instance: Any) -> None:
        """Nothing, when all went well; else what ended it."""
        if not error and not trap:
            return
        guest = self._machine.guest
        problem: BaseException
        if error:
            problem = wasmtime.WasmtimeError._from_ptr(ctypes.cast(error, ctypes.POINTER(ffi.wasmtime_error_t)))
        else:
            problem = wasmtime.Trap._from_ptr(trap)
        left, guest.left = guest.left, None
        if isinstance(left, wasi.Exited):
            if left.code == 0:
                return
            raise Failed(self._why(context, instance), str(left))
        if isinstance(left, wasi.TooLarge):
            raise Failed("too-large", str(left))
        if isinstance(left, wasi.Late):
            raise Failed("timeout", str(left))
        if left is not None and not isinstance(left, Exception):
            raise left
        if left is not None:
            raise Failed("error", f"{type(left).__name__}: {left}")
        text = str(problem)
        short = text.strip().split("\n")[-1].strip() if isinstance(problem, wasmtime.Trap) else text.split("\n")[0]
        kind = "memory" if "memory" in short and "limit" in short else self._why(context, instance)
        raise Failed(kind, short.removeprefix("wasm trap: "), text)

    def _why(self, context: int, instance: Any) -> str:
        """What a failure counts as: a guest that fails with hardly any memory left was over it."""
        found = ffi.wasmtime_extern_t()
        if not _instance_export(context, byref(instance), _MEMORY, len(_MEMORY), byref(found)):
            return "error"
        if int(found.kind) != _IS_MEMORY:
            return "error"
        left = self._memory - _memory_size(context, byref(found.of.memory))
        return "memory" if left < max(_NEAR, self._memory // 16) else "error"
