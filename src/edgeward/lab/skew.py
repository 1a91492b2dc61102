"""Gives a running process another wall clock, so that a wrong or a stepping clock can be rehearsed for real.

In goes a process id and a number of seconds; from then on that process sees the wall clock so much later (or earlier),
also a static Go binary such as nats-server, which no ``LD_PRELOAD`` reaches. Nothing else on the machine notices.

A program asks for the time in the vDSO (vdso(7)), a page of code that the kernel maps into it. Three functions there
tell the wall clock; they are written over, in that process alone, by ones that ask by system call and add the seconds;
the kernel keeps a private copy of the page, as it does for a debugger's breakpoints. Monotonic clocks, timers and what
the kernel itself stamps (files, sockets) stay as they are. Linux on x86-64, and the right to trace the process: one's
own, or root.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from edgeward.core.errors import NotFound, Refused

_STOP_TIMEOUT = 5.0
_TRIES = 200
_SHT_DYNSYM = 11

# x86-64. Each asks by system call and adds 64 bits of seconds, which stand where `_HERE` is; a second shift writes
# those eight bytes only. Arguments as in C: edi/rdi the first, rsi the second; rcx and r11 are free.
_HERE = b"\x11\x22\x33\x44\x55\x66\x77\x08"
_LOAD = b"\x48\xb9" + _HERE  # mov rcx, seconds
_CODE = {
    # clock_gettime(clock, timespec*): only CLOCK_REALTIME (0) and CLOCK_REALTIME_COARSE (5) are the wall clock
    "__vdso_clock_gettime": b"\xb8\xe4\x00\x00\x00\x0f\x05"  # mov eax, 228; syscall
    b"\x85\xc0\x75\x16"  # test eax, eax; jnz end
    b"\x85\xff\x74\x05"  # test edi, edi; jz add
    b"\x83\xff\x05\x75\x0d" + _LOAD + b"\x48\x01\x0e"  # cmp edi, 5; jnz end; add [rsi], rcx
    b"\xc3",
    "__vdso_gettimeofday": b"\xb8\x60\x00\x00\x00\x0f\x05"  # mov eax, 96; syscall
    b"\x85\xc0\x75\x12"  # test eax, eax; jnz end
    b"\x48\x85\xff\x74\x0d" + _LOAD + b"\x48\x01\x0f"  # test rdi, rdi; jz end; add [rdi], rcx
    b"\xc3",
    "__vdso_time": b"\xb8\xc9\x00\x00\x00\x0f\x05" + _LOAD + b"\x48\x01\xc8"  # mov eax, 201; syscall; add rax, rcx
    b"\x48\x85\xff\x74\x03\x48\x89\x07"  # test rdi, rdi; jz end; mov [rdi], rax
    b"\xc3",
}


def possible() -> str:
    """Why no process can be given another clock here; empty: it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "only Linux on x86-64 has it"
    try:
        _functions(*_vdso(os.getpid()))
    except (NotFound, OSError) as e:
        return str(e)
    return ""


def set_skew(pid: int, seconds: int) -> None:
    """Has the process see the wall clock ``seconds`` later than it is; 0 undoes that. Raises ``Refused``, ``NotFound``.

    It is stopped for some milliseconds. A program that it starts, or turns into by exec, has the right clock again.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Refused("no process can be given another clock here", remedy="Linux on x86-64")
    try:
        base, image = _vdso(pid)
        found = _functions(base, image)
        patched = all(_is_ours(image[at - base :], name) for name, (at, _) in found.items())
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            for name, (at, room) in found.items():
                code = _CODE[name].replace(_HERE, struct.pack("<q", seconds))
                if len(code) > room:
                    raise Refused(f"this kernel's {name} has no room for another one", resource=f"process {pid}")
                if patched:
                    memory.seek(at + _CODE[name].index(_HERE))
                    memory.write(struct.pack("<q", seconds))
            if not patched:
                with _outside(pid, base, base + len(image)):
                    for name, (at, _) in found.items():
                        memory.seek(at)
                        memory.write(_CODE[name].replace(_HERE, struct.pack("<q", seconds)))
    except FileNotFoundError:
        raise NotFound("there is no such process", resource=f"process {pid}") from None
    except OSError as e:
        raise Refused(
            f"cannot be given another clock: {e.strerror}", resource=f"process {pid}", remedy="as root, or its owner"
        ) from None


def _is_ours(code: bytes, name: str) -> bool:
    before, _, after = _CODE[name].partition(_HERE)
    return code.startswith(before) and code[len(before) + len(_HERE) :].startswith(after)


def _vdso(pid: int) -> tuple[int, bytes]:
    """Where the page is in that process, and what is in it."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            begin, end = (int(x, 16) for x in line.split()[0].split("-"))
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                memory.seek(begin)
                return begin, memory.read(end - begin)
    raise NotFound("has no vDSO", resource=f"process {pid}", remedy="the kernel's boot parameter vdso=1")


def _functions(base: int, image: bytes) -> dict[str, tuple[int, int]]:
    """Address and size of the functions that tell the wall clock, from the page's own symbol table (elf(5))."""
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count = struct.unpack_from("<HH", image, 0x3A)
    heads = [struct.unpack_from("<IIQQQQIIQQ", image, table + n * size) for n in range(count)]
    found: dict[str, tuple[int, int]] = {}
    for head in heads:
        if head[1] != _SHT_DYNSYM:
            continue
        names = heads[head[6]][4]
        for at in range(head[4], head[4] + head[5], 24):
            name_at, _, _, _, value, room = struct.unpack_from("<IBBHQQ", image, at)
            name = image[names + name_at : image.index(b"\0", names + name_at)].decode()
            if name in _CODE:
                found[name] = (base + value, room)
    if missing := _CODE.keys() - found.keys():
        raise NotFound(f"this kernel's vDSO has no {', '.join(sorted(missing))}")
    return found


@contextlib.contextmanager
def _outside(pid: int, begin: int, end: int) -> Iterator[None]:
    """The process stands still, and none of its threads in the page: it would go on in the middle of other code."""
    for _ in range(_TRIES):
        os.kill(pid, signal.SIGSTOP)
        try:
            if all(not begin <= pc < end for pc in _counters(pid)):
                yield
                return
        finally:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)
    raise Refused("is never outside of its clock", resource=f"process {pid}")


def _counters(pid: int) -> list[int]:
    """Where each thread of a stopped process is (proc(5), ``syscall``: the last word)."""
    deadline = time.monotonic() + _STOP_TIMEOUT
    while time.monotonic() < deadline:
        words = []
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that just ended
                words.append((task / "syscall").read_text().split())
        if all(w != ["running"] for w in words):
            return [int(w[-1], 16) for w in words]
        time.sleep(0.001)
    raise Refused("does not stop", resource=f"process {pid}")
