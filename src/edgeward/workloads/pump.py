"""The pump: a process of its own that moves what instances write from their pipes into files, and holds the cap.

An instance's stdout and stderr are a named pipe below ``logs/``; its name says whose it is and how many bytes may be
kept (``<instance>.<cap>.pipe``), so the folder is all that the pump must know, and the next pump finds it all there. It
fills ``<instance>.log`` to half of the cap, makes it ``.log.1`` in place of the one before, and goes on: the two are
never larger than the cap. One pump serves a node. It outlives the agent, and whoever starts it again loses nothing: the
kernel moves the bytes (splice), so they are in the pipe or in the file and never only in our memory.

A pipe that nobody has open for writing any more is over and is taken away; with none left for ``LINGER`` seconds the
pump ends. An app that writes faster than ``CHUNK`` bytes each ``PACE`` seconds waits; a disk that takes nothing makes
nobody wait: what it did not take is counted, and the log says so when it takes again.

``<instance>.<cap>.<pid>.cut`` names an instance of an older release, which writes into its file itself: that one is
copied and cut, as far as looking now and then can do it.

It is run by ``python -I -S -E`` and imports nothing of ours and little of Python, to stay small. ``pipes.py`` is the
agent's side.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 64 * 1024
PACE = 0.004
LINGER = 20.0
#: Seconds between two looks at the files of an older release: of one that grew, of one that did not.
SOON, LATE = 0.02, 0.1
#: The most that the kernel keeps in one pipe.
_PIPE = 1 << 20
#: A file system that cannot be spliced to; there we copy.
_NO_SPLICE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class Source:
    """One instance's pipe and its two files. Raises ``OSError`` when the pipe cannot be opened."""

    def __init__(self, path: str, instance: str, cap: int) -> None:
        self.path, self.half = path, cap // 2
        self.log = os.path.join(os.path.dirname(path), instance + ".log")
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.lost, self.why = 0, ""
        self._out = -1
        self._copies = not hasattr(os, "splice")
        with contextlib.suppress(OSError):
            self._room()

    def close(self) -> None:
        os.close(self.fd)
        self._shut()

    def _shut(self) -> None:
        if self._out >= 0:
            os.close(self._out)
        self._out = -1

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._out = os.open(self.log, flags, 0o600)
        return os.fstat(self._out).st_size

    def _room(self) -> tuple[int, int]:
        """Where to write, and how many bytes fit there; begins a new file when none do."""
        # asked each time: an operator may have cut the file
        size = os.fstat(self._out).st_size if self._out >= 0 else self._open()
        if size >= self.half:
            self._shut()
            # a reader may have the oldest open: its bytes must be gone from the disk all the same
            with contextlib.suppress(FileNotFoundError):
                os.truncate(self.log + ".1", 0)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.log, self.log + ".1")
            size = self._open()
        return size, self.half - size

    def move(self) -> int:
        """Moves at most ``CHUNK`` bytes: how many. 0: it is over. ``BlockingIOError``: nothing is there now."""
        try:
            at, room = self._room()
            if self.lost:
                note = b"\n[edgeward: %d bytes of output were lost: %s]\n" % (self.lost, self.why.encode())
                at += os.pwrite(self._out, note[:room], at)
                room = max(0, room - len(note))
                self.lost = 0
            return self._into(at, min(room, CHUNK)) if room else 1
        except BlockingIOError:
            raise
        except OSError as e:
            return self._drop(e)

    def _into(self, at: int, count: int) -> int:
        if not self._copies:
            try:
                return os.splice(self.fd, self._out, count, offset_dst=at)
            except BlockingIOError:
                raise
            except OSError as e:
                if e.errno not in _NO_SPLICE:
                    raise
                self._copies = True
        data = os.read(self.fd, count)
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._out, data[done:], at + done)
        except OSError as e:
            self.lost, self.why = self.lost + len(data) - done, e.strerror or str(e)
        return len(data)

    def _drop(self, e: OSError) -> int:
        """The disk takes nothing: the app lives on, its words are lost and counted."""
        self._shut()
        gone = len(os.read(self.fd, CHUNK))
        self.lost, self.why = self.lost + gone, e.strerror or str(e)
        return gone


class Cut:
    """The file of an instance that an older release started."""

    def __init__(self, path: str, instance: str, cap: int, pid: int) -> None:
        self.path, self.half, self._pid = path, cap // 2, pid
        self.log = os.path.join(os.path.dirname(path), instance + ".log")
        self._size = 0

    def over(self) -> bool:
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def look(self) -> bool:
        """Cuts the file when it passed half of the cap; True when it grew."""
        try:
            size = os.stat(self.log).st_size
            grew, self._size = size != self._size, size
            if size > self.half:
                self._copy(size)
                os.truncate(self.log, 0)
                self._size = 0
            return grew
        except OSError:
            return False

    def _copy(self, size: int) -> None:
        old = self.log + ".1"
        try:
            with open(self.log, "rb") as source, open(old, "wb") as target:
                source.seek(size - self.half)
                left = self.half
                while left > 0 and (data := source.read(min(left, CHUNK))):
                    target.write(data)
                    left -= len(data)
        except OSError:
            # a full disk: what is cut is lost, but the app and the node live on
            with contextlib.suppress(OSError):
                os.unlink(old)


class Pump:
    def __init__(self, root: str, sign: Callable[[], bool] = lambda: True) -> None:
        """``sign`` writes into the lock who holds it; False: the disk takes nothing now."""
        self.root = root
        self._sign, self._signed = sign, sign()
        self.control = os.open(os.path.join(root, ".pump"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.sources: dict[int, Source] = {}
        self.cuts: dict[str, Cut] = {}
        self.stop = False
        self._poll = select.poll()
        self._poll.register(self.control, select.POLLIN)
        self._again = False

    def scan(self) -> None:
        """Makes what is served be what is in the folders."""
        known = {s.path: s for s in self.sources.values()}
        there = set()
        self._again = False
        for path, instance, cap, pid in names(self.root):
            there.add(path)
            try:
                if pid and path not in self.cuts:
                    self.cuts[path] = Cut(path, instance, cap, pid)
                elif not pid and path not in known:
                    source = Source(path, instance, cap)
                    self.sources[source.fd] = source
                    self._poll.register(source.fd, select.POLLIN)
                    self._first(source)
            except OSError:
                self._again = True  # too many open files, say
        for path, source in known.items():
            if path not in there:
                self._end(source)
        for path in [p for p in self.cuts if p not in there]:
            del self.cuts[path]

    def _end(self, source: Source) -> None:
        self._poll.unregister(source.fd)
        del self.sources[source.fd]
        source.close()
        with contextlib.suppress(OSError):
            os.unlink(source.path)

    def _first(self, source: Source) -> None:
        """Takes what is there: of a pipe whose last writer went before we came poll would never say that it is over."""
        taken = 0
        with contextlib.suppress(BlockingIOError):
            while (moved := source.move()) and taken < _PIPE:
                taken += moved
            if not moved:
                self._end(source)

    def _serve(self, source: Source) -> bool:
        """True when there is more than one look can take."""
        try:
            moved = source.move()
        except BlockingIOError:
            return False
        except OSError:
            moved = 0
        if moved == 0:
            self._end(source)
        return moved >= CHUNK // 2

    def _told(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.stop = b"q" in os.read(self.control, 4096)
        self._signed = self._signed or self._sign()
        self.scan()

    def _cut(self) -> float:
        """Looks at all files of an older release; the seconds until the next look."""
        grew = False
        for path, cut in list(self.cuts.items()):
            grew = cut.look() or grew
            if cut.over():
                del self.cuts[path]
                with contextlib.suppress(OSError):
                    os.unlink(path)
        return SOON if grew else LATE

    def _wait(self, look: float) -> int | None:
        """How long to wait for something, in milliseconds; None: for ever."""
        if self.cuts:
            return int(look * 1000)
        if self._again:
            return 1000
        return None if self.sources else int(LINGER * 1000)

    def run(self) -> None:
        self.scan()
        look = LATE
        while not self.stop:
            ready = self._poll.poll(self._wait(look))
            busy = False
            for fd, _ in ready:
                if fd == self.control:
                    self._told()
                elif fd in self.sources:
                    busy = self._serve(self.sources[fd]) or busy
            if self.cuts:
                look = self._cut()
            if not ready and not self.cuts:
                self.scan()
                if not self.sources and not self.cuts and not self._again:
                    return
            if busy:
                time.sleep(PACE)  # the pace that an app may write at
        self._drain()

    def _drain(self) -> None:
        """What is in the pipes now (an app that never stops writing does not keep us)."""
        for source in list(self.sources.values()):
            with contextlib.suppress(OSError):
                for _ in range(32):
                    if not source.move():
                        break


def _folders(root: str) -> list[str]:
    """The folders in a folder; none when it is gone."""
    try:
        return [e.path for e in os.scandir(root) if e.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def names(root: str) -> list[tuple[str, str, int, int]]:
    """Every pipe and mark in ``root/<namespace>/<app>/``: path, instance, cap, pid (0: it is a pipe)."""
    found = []
    for app in (app for namespace in _folders(root) for app in _folders(namespace)):
        with contextlib.suppress(OSError):
            for name in os.listdir(app):
                parts = name.rsplit(".", 3 if name.endswith(".cut") else 2)
                if parts[-1] in ("pipe", "cut") and all(p.isdecimal() for p in parts[1:-1]) and len(parts) > 2:
                    pid = int(parts[2]) if len(parts) == 4 else 0
                    found.append((os.path.join(app, name), parts[0], int(parts[1]), pid))
    return found


def main(root: str, code: str) -> None:
    def sign() -> bool:
        # our stdin is the lock; a full disk does not keep us from serving: apps would wait for us
        try:
            os.ftruncate(0, 0)
            return os.pwrite(0, f"{os.getpid()} {code}\n".encode(), 0) > 0
        except OSError:
            return False

    pump = Pump(root, sign)

    def end(*_: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(pump.control, b"q")

    signal.signal(signal.SIGTERM, end)
    pump.run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
