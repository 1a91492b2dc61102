"""What a guest may ask for: layouts, bounds, and that nothing beyond its memory is touched."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import wasmtime

from edgeward.functions import wasi
from edgeward.functions.wasi import System


class Memory:
    def __init__(self, size: int = 65536) -> None:
        self.data = bytearray(size)

    def read(self, at: int, size: int) -> bytes:
        if at + size > len(self.data):
            raise wasi.Fault
        return bytes(self.data[at : at + size])

    def write(self, at: int, data: bytes) -> None:
        if at + len(data) > len(self.data):
            raise wasi.Fault
        self.data[at : at + len(data)] = data

    def number(self, at: int, size: int = 4) -> int:
        return int.from_bytes(self.read(at, size), "little")

    def vectors(self, *pieces: tuple[int, int]) -> None:
        self.write(0, b"".join(struct.pack("<II", *p) for p in pieces))


class World:
    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self.slept: list[int] = []
        self.pieces: list[Any] = []

    def clock(self, which: int) -> int:
        return 1000 + which

    def sleep(self, nanoseconds: int) -> None:
        self.slept.append(nanoseconds)

    def random(self, size: int) -> bytes:
        return b"\x07" * size

    def log(self, level: int, text: str) -> None:
        self.lines.append((level, text))

    def piece(self, status: int, headers: Any, data: bytes, first: bool) -> None:
        self.pieces.append((status, list(headers), data, first))


@pytest.fixture
def world() -> World:
    return World()


def system(world: World, data: bytes = b"", bound: int = 1 << 20, **env: str) -> System:
    return System(world, [b"f", b"-x"], lambda: env, data, bound)


def test_the_event_is_read_in_pieces(world: World) -> None:
    memory, s = Memory(), system(world, b"0123456789")
    memory.vectors((1000, 4), (2000, 2))
    assert s.fd_read(memory, 0, 0, 2, 64) == 0
    assert (memory.number(64), memory.read(1000, 4), memory.read(2000, 2)) == (6, b"0123", b"45")
    assert s.edgeward_read(memory, 3000, 100) == 4
    assert memory.read(3000, 4) == b"6789"
    assert s.fd_read(memory, 0, 0, 2, 64) == 0
    assert memory.number(64) == 0, "the end"
    assert s.fd_read(memory, 1, 0, 1, 64) == wasi.BADF


def test_the_answer_is_bounded(world: World) -> None:
    memory, s = Memory(), system(world, bound=10)
    memory.write(1000, b"hello")
    memory.vectors((1000, 5), (1000, 5))
    assert s.fd_write(memory, 1, 0, 2, 64) == 0
    assert memory.number(64) == 10
    assert s.body() == b"hellohello"
    assert s.fd_write(memory, 1, 0, 2, 64) == 0, "what was sent no longer counts"
    with pytest.raises(wasi.TooLarge):
        s.edgeward_write(memory, 1000, 1)


def test_one_call_moves_a_bounded_number_of_bytes(world: World) -> None:
    memory, s = Memory(3 << 20), system(world, bound=1 << 30)
    memory.vectors(*[(0, 2 << 20)] * 64)
    assert s.fd_write(memory, 1, 0, 64, 4000) == 0
    assert memory.number(4000) == 1 << 20
    assert s.fd_write(memory, 1, 0, 1025, 4000) == wasi.INVAL
    assert s.random_get(memory, 0, 1 << 30) == wasi.INVAL


def test_pointers_beyond_the_memory_are_faults(world: World) -> None:
    memory, s = Memory(100), system(world, b"data", A="b")
    memory.vectors((90, 20))
    for call in (
        lambda: s.fd_read(memory, 0, 96, 1, 64),
        lambda: s.fd_write(memory, 1, 0, 1, 64),
        lambda: s.random_get(memory, 4294967295, 4294967),
        lambda: s.clock_time_get(memory, 0, 0, 99),
        lambda: s.args_get(memory, 0, 98),
        lambda: s.poll_oneoff(memory, 90, 0, 1, 0),
    ):
        with pytest.raises(wasi.Fault):
            call()
    assert not s.body()


def test_arguments_and_environment_are_laid_out(world: World) -> None:
    memory, s = Memory(), system(world, A="1", LONG="xyz")
    assert s.args_sizes_get(memory, 0, 4) == 0
    assert (memory.number(0), memory.number(4)) == (2, 5)
    assert s.environ_sizes_get(memory, 0, 4) == 0
    assert (memory.number(0), memory.number(4)) == (2, 13)
    assert s.environ_get(memory, 100, 1000) == 0
    assert (memory.number(100), memory.number(104)) == (1000, 1004)
    assert memory.read(1000, 13) == b"A=1\0LONG=xyz\0"
    memory.write(2000, b"LONG")
    assert s.edgeward_env(memory, 2000, 4, 3000, 2) == 3, "what does not fit is not written"
    assert memory.read(3000, 3) == bytes(3)
    assert s.edgeward_env(memory, 2000, 4, 3000, 3) == 3
    assert memory.read(3000, 3) == b"xyz"
    assert s.edgeward_env(memory, 2000, 3, 3000, 3) == -1


def test_lines_of_the_log_are_cut_and_have_levels(world: World) -> None:
    memory, s = Memory(), system(world)
    for text in (b"on", b"e\n<4>two\n\n", b"x" * 10000, b"y"):
        memory.write(1000, text)
        memory.vectors((1000, len(text)))
        assert s.fd_write(memory, 2, 0, 1, 64) == 0
    s.end()
    assert world.lines[:3] == [(20, "one"), (30, "two"), (20, "")]
    assert [len(text) for _, text in world.lines[3:]] == [wasi.MAX_LINE, 10001 - wasi.MAX_LINE]
    assert s.edgeward_log(memory, 4000000, 1000, 1) == 0
    assert world.lines[-1] == (50, "y")


def test_headers_are_bounded_and_come_before_the_first_piece(world: World) -> None:
    memory, s = Memory(1 << 20), system(world)
    memory.write(1000, b"X-Av\xff")
    assert s.edgeward_status(memory, 201) == 0
    assert s.edgeward_status(memory, 199) == wasi.INVAL
    assert s.edgeward_header(memory, 1000, 3, 1003, 1) == 0
    assert s.edgeward_header(memory, 1000, 5, 1003, 1) == wasi.INVAL, "not ASCII"
    assert s.edgeward_header(memory, 1000, 0, 1003, 1) == wasi.INVAL
    memory.write(3000, b"v\r\nset-cookie: a=b")
    assert s.edgeward_header(memory, 1000, 3, 3000, 19) == wasi.INVAL
    assert s.edgeward_header(memory, 1000, 3, 2000, 70000) == wasi.TOOBIG
    s.edgeward_write(memory, 1000, 1)
    assert s.edgeward_flush(memory) == 0
    assert world.pieces == [(201, [("x-a", "v")], b"X", True)]
    assert s.edgeward_status(memory, 500) == wasi.INVAL
    assert s.edgeward_header(memory, 1000, 3, 1003, 1) != 0


def test_sleeping_is_the_hosts_business(world: World) -> None:
    memory, s = Memory(), system(world)

    def clock(user: int, timeout: int, flags: int = 0) -> bytes:
        return struct.pack("<QB7xI4xQQH6x", user, 0, 1, timeout, 0, flags)

    memory.write(0, clock(7, 500) + clock(8, 300))
    assert s.poll_oneoff(memory, 0, 1000, 2, 2000) == 0
    assert (world.slept, memory.number(2000), memory.number(1000, 8)) == ([300], 1, 8)
    memory.write(0, clock(7, 900, 1))
    assert s.poll_oneoff(memory, 0, 1000, 1, 2000) == 0
    assert world.slept[-1] == 0, "that time has gone by"
    memory.write(0, clock(7, 500) + struct.pack("<QB7xI4x24x", 9, 1, 0))
    assert s.poll_oneoff(memory, 0, 1000, 2, 2000) == 0
    assert (len(world.slept), memory.number(2000), memory.number(1000, 8)) == (2, 1, 9), "streams are ready at once"
    assert s.poll_oneoff(memory, 0, 1000, 0, 2000) == wasi.INVAL


def test_there_are_no_files_and_no_network() -> None:
    absent = {name: wasi.absent(name) for name in wasi.PREVIEW1 if not hasattr(System, name)}
    assert {name for name in absent if name.startswith("path_")} == {n for n in wasi.PREVIEW1 if n.startswith("path_")}
    assert {"fd_prestat_get", "sock_send", "fd_readdir", "proc_raise"} <= set(absent)
    assert all(absent.values())


def test_every_function_is_typed_as_in_the_standard() -> None:
    """wasmtime's own WASI takes a module that imports all of them with our types."""
    kinds = {"i": "i32", "I": "i64"}
    text = "".join(
        f'(import "wasi_snapshot_preview1" "{name}" (func (param {" ".join(kinds[p] for p in parameters)})'
        f"{'' if name == 'proc_exit' else ' (result i32)'}))"
        for name, parameters in wasi.PREVIEW1.items()
    )
    engine = wasmtime.Engine()
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    linker.instantiate_pre(wasmtime.Module(engine, f"(module {text})"))
