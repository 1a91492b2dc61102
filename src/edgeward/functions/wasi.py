"""What a WebAssembly guest may ask of its host: WASI preview 1 without files and network, and the module ``edgeward``.

In come the guest's calls (plain numbers, and its memory as an object that checks its bounds), out go error numbers and
what was written. One :class:`System` is one call of a function: standard input is the event's data, standard output the
answer, standard error the log. Clocks, randomness, sleep and the ways out are given to it. Every call moves a bounded
number of bytes, so none can outlast its deadline by much. Pure. Numbers and layouts: wasi_snapshot_preview1 (witx).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Protocol

BADF, FAULT, INVAL, NOSYS, NOTSUP, SPIPE, TOOBIG, NOTCAPABLE = 8, 21, 28, 52, 58, 70, 1, 76
#: Bytes that one call of the guest moves at most; it is told how many they were.
_PIECE = 1 << 20
#: Pieces of one ``fd_write`` or ``fd_read``, subscriptions of one ``poll_oneoff``.
_MANY = 1024
#: Bytes of the answer's headers, and of one line of the log.
MAX_HEADERS, MAX_LINE = 64 * 1024, 8192
_FOREVER = 1 << 62
#: Priorities of syslog, as ``<3>`` before a line has them, in Python's numbers.
_LEVELS = {b"0": 50, b"1": 50, b"2": 50, b"3": 40, b"4": 30, b"5": 20, b"6": 20, b"7": 10}
#: Event types of ``poll_oneoff``, and where a subscription has what.
_CLOCK, _READ, _WRITE = 0, 1, 2
_SUBSCRIPTION = struct.Struct("<QB7xI4xQQH6x")
_EVENT = struct.Struct("<QHB5xQH6x")

#: name -> parameters (i: 32 bits, I: 64 bits); each gives back 32 bits, an error number, unless it says otherwise.
PREVIEW1 = {
    "args_get": "ii", "args_sizes_get": "ii", "environ_get": "ii", "environ_sizes_get": "ii",
    "clock_res_get": "ii", "clock_time_get": "iIi",
    "fd_advise": "iIIi", "fd_allocate": "iII", "fd_close": "i", "fd_datasync": "i", "fd_fdstat_get": "ii",
    "fd_fdstat_set_flags": "ii", "fd_fdstat_set_rights": "iII", "fd_filestat_get": "ii",
    "fd_filestat_set_size": "iI", "fd_filestat_set_times": "iIIi", "fd_pread": "iiiIi", "fd_prestat_get": "ii",
    "fd_prestat_dir_name": "iii", "fd_pwrite": "iiiIi", "fd_read": "iiii", "fd_readdir": "iiiIi",
    "fd_renumber": "ii", "fd_seek": "iIii", "fd_sync": "i", "fd_tell": "ii", "fd_write": "iiii",
    "path_create_directory": "iii", "path_filestat_get": "iiiii", "path_filestat_set_times": "iiiiIIi",
    "path_link": "iiiiiii", "path_open": "iiiiiIIii", "path_readlink": "iiiiii", "path_remove_directory": "iii",
    "path_rename": "iiiiii", "path_symlink": "iiiii", "path_unlink_file": "iii",
    "poll_oneoff": "iiii", "proc_exit": "i", "proc_raise": "i", "sched_yield": "", "random_get": "ii",
    "sock_accept": "iii", "sock_recv": "iiiiii", "sock_send": "iiiii", "sock_shutdown": "ii",
}  # fmt: skip
#: What a guest may import from the module ``edgeward``. Pointers and lengths are 32 bits.
EDGEWARD = {
    "status": "i",  # of the answer, 200 to 599
    "header": "iiii",  # name, value: one more of the answer
    "flush": "",  # what was written goes out as a piece of the answer
    "log": "iii",  # level (Python's numbers), text
    "read": "ii",  # of the event's data into the buffer; gives back how many bytes, 0 at the end
    "write": "ii",  # to the answer; gives back how many bytes
    "env": "iiii",  # name, buffer: a variable's value; gives back its length (more than fits: nothing is written) or -1
}


class Memory(Protocol):
    """The guest's memory. Both raise :class:`Fault` beyond its end."""

    def read(self, at: int, size: int) -> bytes: ...
    def write(self, at: int, data: bytes) -> None: ...


class Fault(Exception):
    """The guest named memory that it does not have."""


class Leave(Exception):
    """The call is over: the guest does not run on."""


class Exited(Leave):
    """It ended itself."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


class TooLarge(Leave):
    """Its answer is over the bound."""


class Late(Leave):
    """Its time is over."""


class Host(Protocol):
    """What a system needs of the world."""

    def clock(self, which: int) -> int:
        """Nanoseconds: 0 since 1970, 1 monotonic, 2 and 3 of processor time."""
        ...

    def sleep(self, nanoseconds: int) -> None:
        """Raises :class:`Late` when the deadline comes first."""
        ...

    def random(self, size: int) -> bytes: ...

    def log(self, level: int, text: str) -> None: ...

    def piece(self, status: int, headers: list[tuple[str, str]], data: bytes, first: bool) -> None:
        """Sends a piece of the answer."""
        ...


class System:
    """One call: what it was given, and what it has written so far."""

    def __init__(self, host: Host, args: list[bytes], env: Callable[[], dict[str, str]], data: bytes, bound: int):
        self._host, self._args, self._env, self._bound = host, args, env, bound
        self._made: list[bytes] | None = None
        self._data, self._at = data, 0
        self._out: list[bytes] = []
        self._written = 0
        self._line = b""
        self._open = {0, 1, 2}
        self._headed = 0
        self.status, self.headers = 200, list[tuple[str, str]]()
        #: A piece was sent.
        self.streaming = False

    def body(self) -> bytes:
        """What was written and not sent."""
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out, self._written = [], 0
        return data

    def end(self) -> None:
        """A last line without its end is a line too."""
        if self._line:
            self._say(self._line)
            self._line = b""

    # -- standard streams ------------------------------------------------------------------------------------------

    def _take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + min(size, _PIECE)]
        self._at += len(piece)
        return piece

    def _put(self, data: bytes) -> None:
        self._written += len(data)
        if self._written > self._bound:
            raise TooLarge(f"the answer is over {self._bound} bytes; at most these go in one piece: flush pieces")
        if data:
            self._out.append(data)

    def _errors(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._say(line)
        while len(self._line) > MAX_LINE:
            self._say(self._line[:MAX_LINE])
            self._line = self._line[MAX_LINE:]

    def _say(self, line: bytes) -> None:
        level = 20
        if line[:1] == b"<" and line[2:3] == b">" and line[1:2] in _LEVELS:
            level, line = _LEVELS[line[1:2]], line[3:]
        self._host.log(level, line[:MAX_LINE].decode("utf-8", "replace"))

    @staticmethod
    def _pieces(memory: Memory, at: int, count: int) -> Iterable[tuple[int, int]]:
        data = memory.read(at, 8 * count)
        return struct.iter_unpack("<II", data)

    def fd_read(self, memory: Memory, fd: int, iovs: int, count: int, told: int) -> int:
        if fd != 0 or fd not in self._open:
            return BADF
        if count > _MANY:
            return INVAL
        total = 0
        for at, size in self._pieces(memory, iovs, count):
            piece = self._take(min(size, _PIECE - total))
            memory.write(at, piece)
            total += len(piece)
            if len(piece) < size:
                break
        memory.write(told, total.to_bytes(4, "little"))
        return 0

    def fd_write(self, memory: Memory, fd: int, iovs: int, count: int, told: int) -> int:
        if fd not in (1, 2) or fd not in self._open:
            return BADF
        if count > _MANY:
            return INVAL
        gathered: list[bytes] = []
        total = 0
        for at, size in self._pieces(memory, iovs, count):
            piece = memory.read(at, min(size, _PIECE - total))
            gathered.append(piece)
            total += len(piece)
            if len(piece) < size:
                break
        memory.write(told, total.to_bytes(4, "little"))
        data = gathered[0] if len(gathered) == 1 else b"".join(gathered)
        (self._put if fd == 1 else self._errors)(data)
        return 0

    def fd_close(self, memory: Memory, fd: int) -> int:
        if fd not in self._open:
            return BADF
        self._open.discard(fd)
        return 0

    def fd_fdstat_get(self, memory: Memory, fd: int, out: int) -> int:
        if fd not in self._open:
            return BADF
        rights = 1 << 1 if fd == 0 else 1 << 6
        memory.write(out, struct.pack("<BxHxxxxQQ", 0, 0, rights, 0))
        return 0

    def fd_fdstat_set_flags(self, memory: Memory, fd: int, flags: int) -> int:
        return 0 if fd in self._open else BADF

    def fd_filestat_get(self, memory: Memory, fd: int, out: int) -> int:
        if fd not in self._open:
            return BADF
        memory.write(out, bytes(64))
        return 0

    def fd_seek(self, memory: Memory, fd: int, offset: int, whence: int, out: int) -> int:
        return SPIPE if fd in self._open else BADF

    def fd_tell(self, memory: Memory, fd: int, out: int) -> int:
        return SPIPE if fd in self._open else BADF

    # -- arguments and environment ---------------------------------------------------------------------------------

    def _variables(self) -> list[bytes]:
        if self._made is None:
            self._made = [f"{k}={v}".replace("\0", "").encode("utf-8", "replace") for k, v in self._env().items()]
        return self._made

    @staticmethod
    def _sizes(memory: Memory, values: list[bytes], count: int, size: int) -> int:
        memory.write(count, len(values).to_bytes(4, "little"))
        memory.write(size, sum(len(v) + 1 for v in values).to_bytes(4, "little"))
        return 0

    @staticmethod
    def _lay(memory: Memory, values: list[bytes], pointers: int, at: int) -> int:
        places = []
        for value in values:
            places.append(at)
            at += len(value) + 1
        memory.write(places[0] if places else at, b"".join(v + b"\0" for v in values))
        memory.write(pointers, struct.pack(f"<{len(places)}I", *places))
        return 0

    def args_sizes_get(self, memory: Memory, count: int, size: int) -> int:
        return self._sizes(memory, self._args, count, size)

    def args_get(self, memory: Memory, pointers: int, at: int) -> int:
        return self._lay(memory, self._args, pointers, at)

    def environ_sizes_get(self, memory: Memory, count: int, size: int) -> int:
        return self._sizes(memory, self._variables(), count, size)

    def environ_get(self, memory: Memory, pointers: int, at: int) -> int:
        return self._lay(memory, self._variables(), pointers, at)

    # -- time, randomness, the end ---------------------------------------------------------------------------------

    def clock_res_get(self, memory: Memory, which: int, out: int) -> int:
        if which > 3:
            return INVAL
        memory.write(out, (1000).to_bytes(8, "little"))
        return 0

    def clock_time_get(self, memory: Memory, which: int, precision: int, out: int) -> int:
        if which > 3:
            return INVAL
        memory.write(out, (self._host.clock(which) & (1 << 64) - 1).to_bytes(8, "little"))
        return 0

    def random_get(self, memory: Memory, at: int, size: int) -> int:
        if size > 16 * _PIECE:
            return INVAL
        memory.read(at, size)
        memory.write(at, self._host.random(size))
        return 0

    def sched_yield(self, memory: Memory) -> int:
        return 0

    def proc_exit(self, memory: Memory, code: int) -> int:
        raise Exited(code)

    def poll_oneoff(self, memory: Memory, asked: int, out: int, count: int, told: int) -> int:
        """Clocks, and the streams, which are always ready."""
        if not 0 < count <= _MANY:
            return INVAL
        ready: list[bytes] = []
        first = _FOREVER
        clocks: list[tuple[int, int]] = []
        for user, kind, which, timeout, _, flags in _SUBSCRIPTION.iter_unpack(memory.read(asked, 48 * count)):
            if kind == _CLOCK and which <= 1:
                after = max(0, timeout - self._host.clock(which)) if flags & 1 else timeout
                clocks.append((user, after))
                first = min(first, after)
            elif kind in (_READ, _WRITE) and which in self._open:
                left = len(self._data) - self._at if which == 0 else _PIECE
                ready.append(_EVENT.pack(user, 0, kind, left, 0))
            else:
                ready.append(_EVENT.pack(user, BADF if kind != _CLOCK else NOTSUP, kind, 0, 0))
        if not ready:
            self._host.sleep(first)
            ready = [_EVENT.pack(user, 0, _CLOCK, 0, 0) for user, after in clocks if after <= first]
        memory.write(out, b"".join(ready))
        memory.write(told, len(ready).to_bytes(4, "little"))
        return 0

    # -- module edgeward -------------------------------------------------------------------------------------------

    def edgeward_status(self, memory: Memory, status: int) -> int:
        if not 200 <= status <= 599 or self.streaming:
            return INVAL
        self.status = status
        return 0

    def edgeward_header(self, memory: Memory, name: int, name_size: int, value: int, value_size: int) -> int:
        self._headed += name_size + value_size + 32
        if self._headed > MAX_HEADERS:
            return TOOBIG
        if not name_size or self.streaming:
            return INVAL
        try:
            key, text = memory.read(name, name_size).decode("ascii"), memory.read(value, value_size).decode()
        except UnicodeDecodeError:
            return INVAL
        if any(c < " " or c == "\x7f" for c in key + text):
            return INVAL  # a line of its own would be another field
        self.headers.append((key.lower(), text))
        return 0

    def edgeward_flush(self, memory: Memory) -> int:
        first, self.streaming = not self.streaming, True
        self._host.piece(self.status, self.headers, self.body(), first)
        return 0

    def edgeward_log(self, memory: Memory, level: int, at: int, size: int) -> int:
        self._host.log(max(10, min(50, level)), memory.read(at, min(size, MAX_LINE)).decode("utf-8", "replace"))
        return 0

    def edgeward_read(self, memory: Memory, at: int, size: int) -> int:
        piece = self._take(size)
        memory.write(at, piece)
        return len(piece)

    def edgeward_write(self, memory: Memory, at: int, size: int) -> int:
        data = memory.read(at, min(size, _PIECE))
        self._put(data)
        return len(data)

    def edgeward_env(self, memory: Memory, name: int, name_size: int, at: int, size: int) -> int:
        wanted = memory.read(name, min(name_size, 1024)) + b"="
        for variable in self._variables():
            if variable.startswith(wanted):
                value = variable[len(wanted) :]
                if len(value) <= size:
                    memory.write(at, value)
                return len(value)
        return -1


def absent(name: str) -> int:
    """The error of a function of preview 1 that is not here."""
    if name.startswith("path_"):
        return NOTCAPABLE  # there is no folder that it could begin from
    return BADF if name.startswith(("fd_", "sock_")) else NOSYS
