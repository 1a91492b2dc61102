"""The cache's disk: it gives what was kept, over restarts, kills, damage and full disks, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.gateway import diskchild
from tests.gateway.rig import PATIENCE, Client, Rig, Target

from edgeward.gateway import disk as disks
from edgeward.gateway import spool
from edgeward.gateway.disk import Disk
from edgeward.gateway.entry import PIECE
from edgeward.gateway.files import Reader
from edgeward.gateway.rules import CacheConfig

MIB = 1024**2
LARGE = random.Random(1).randbytes(5 * MIB + 321)


class Site(Target):
    """Answers ``/size/N/...`` with N bytes that follow from the path; a word in the path says how."""

    @staticmethod
    def body(path: str) -> bytes:
        return LARGE[: int(path.split("/")[2])]


async def serve(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        head = (await target.request(reader)).decode()
        if getattr(target, "broken", False):
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            continue
        path = head.split(" ")[1]
        body = Site.body(path)
        age = 0 if "stale" in path else 600
        fields = (
            f'Cache-Control: max-age={age}, stale-if-error=9999\r\nETag: "{len(body)}"\r\nCache-Tag: {path[-1]}\r\n'
        )
        if f'if-none-match: "{len(body)}"' in head.lower():
            writer.write(f"HTTP/1.1 304 Not Modified\r\n{fields}\r\n".encode())
        elif "chunked" in path:
            writer.write(f"HTTP/1.1 200 OK\r\n{fields}Transfer-Encoding: chunked\r\n\r\n".encode())
            for at in range(0, len(body), 100_000):
                piece = body[at : at + 100_000]
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        else:
            writer.write(f"HTTP/1.1 200 OK\r\n{fields}Content-Length: {len(body)}\r\n\r\n".encode())
            for at in range(0, len(body), 100_000):
                writer.write(body[at : at + 100_000])
                await writer.drain()
        await writer.drain()


class Stand:
    """A gateway with a disk that can be ended and begun anew, and its target."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: dict[str, Any] = {"disk": 64 * MIB, "memory": 4 * MIB}
        self.cache = CacheConfig(object=32 * MIB)
        self.begin()
        self.target = self.rig.target(serve)
        self.route()

    def begin(self) -> None:
        self.rig = Rig(self.folder, **self.sizes)
        self.clients: list[Client] = []

    def route(self, port: int = 0) -> None:
        self.rig.routes, self.rig.more = [], dict(self.sizes)
        self.rig.route("/", port or self.target.port, key="default/r", cache=self.cache, failures=0)

    @property
    def disk(self) -> Disk:
        assert self.rig.gate.disk is not None
        return self.rig.gate.disk

    def get(self, path: str, *headers: str, **more: Any) -> Any:
        self.clients.append(Client(self.rig.port))
        return self.clients[-1].get(path, *headers, **more)

    def settle(self) -> None:
        """Until all that was to be written is."""
        waiting = threading.Event()
        for _ in range(int(PATIENCE / 0.01)):
            self.rig.do(self.disk.settle())
            if self.rig.call(lambda: not (self.disk.spools or self.disk._pending or self.disk._jobs)):
                return
            waiting.wait(0.01)  # the pace of looking
        raise AssertionError("it goes on writing")

    def again(self, *, target: bool = True) -> None:
        """Ends the gateway and begins another one on the same folder, with the target or without."""
        self.close()
        self.begin()
        self.target = self.rig.target(serve)
        self.target.broken = not target  # type: ignore[attr-defined]
        self.route()

    def close(self) -> None:
        for c in self.clients:
            c.close()
        self.rig.close()

    @property
    def files(self) -> list[Path]:
        return [p for p in (self.folder / "cache").rglob("*") if p.is_file()]


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    made = Stand(tmp_path)
    yield made
    made.close()


PATHS = ["/size/0/a", "/size/10/b", f"/size/{PIECE}/c", f"/size/{PIECE + 1}/d", f"/size/{300_000}/e",
         f"/size/{2 * MIB}/f", f"/size/{5 * MIB}/chunked/g"]  # fmt: skip


def test_what_was_kept_is_there_after_a_restart_without_its_origin(stand: Stand) -> None:
    for path in PATHS:
        got = stand.get(path)
        assert got.body == Site.body(path)
        assert got.headers["cache-status"].endswith("stored")
    stand.settle()
    assert len(stand.disk) == len(PATHS)
    stand.again(target=False)
    assert len(stand.disk) == len(PATHS)
    for _ in range(2):
        for path in PATHS:
            got = stand.get(path)
            assert (got.status, got.body == Site.body(path)) == (200, True), path
            assert got.headers["cache-status"].startswith("edgeward; hit"), path
    assert stand.target.heads == []
    assert stand.get("/size/11/z").status == 503


def test_what_is_stale_stands_in_after_a_restart(stand: Stand) -> None:
    paths = [p.replace("size/", "size/").replace("/chunked", "") + "/stale" for p in PATHS]
    for path in paths:
        stand.get(path)
    stand.settle()
    stand.again(target=False)
    for path in paths:
        got = stand.get(path)
        assert (got.status, got.body == Site.body(path)) == (200, True), path
        assert "stale-if-error-503" in got.headers["cache-status"]
    stand.target.broken = False  # type: ignore[attr-defined]
    for path in paths:
        got = stand.get(path)
        assert got.body == Site.body(path)
        assert "fwd-status=304" in got.headers["cache-status"], path
    assert all(b"if-none-match" in h for h in stand.target.heads[-len(paths) :])


def test_a_large_answer_is_given_in_parts_and_costs_no_memory(stand: Stand) -> None:
    path = f"/size/{5 * MIB}/x"
    data = Site.body(path)
    assert stand.get(path).body == data
    stand.settle()
    assert stand.rig.gate.shelf.used < MIB
    for start, end in ((0, 0), (PIECE - 1, PIECE), (3 * PIECE + 5, 9 * PIECE + 7), (5 * MIB - 3, 5 * MIB - 1)):
        got = stand.get(path, f"Range: bytes={start}-{end}")
        assert (got.status, got.body == data[start : end + 1]) == (206, True)
        assert got.headers["content-range"] == f"bytes {start}-{end}/{len(data)}"
    assert stand.get(path, "Range: bytes=-10").body == data[-10:]
    assert stand.get(path, f"Range: bytes={5 * MIB}-").status == 416
    assert stand.get(path, f'If-None-Match: "{len(data)}"').status == 304
    head = stand.get(path, method="HEAD")
    assert (head.status, head.headers["content-length"]) == (200, str(len(data)))
    assert stand.get(path).body == data
    assert stand.rig.gate.shelf.used < MIB
    assert len(stand.target.heads) == 1


@pytest.mark.parametrize("how", ["", "chunked/"], ids=["length known", "chunked"])
def test_a_target_that_is_faster_than_the_disk_waits_for_it(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(spool, "BEHIND", 100_000)
    monkeypatch.setattr(spool, "SPOOL", 3 * MIB)
    monkeypatch.setattr(spool, "LATE", PATIENCE)
    append, slow = spool.Spool._append, threading.Event()

    def slowly(self: spool.Spool, data: bytes) -> None:
        slow.wait(0.02)  # a slow disk
        append(self, data)

    monkeypatch.setattr(spool.Spool, "_append", slowly)
    path = f"/size/{5 * MIB}/{how}x"
    assert stand.get(path).body == Site.body(path)
    stand.settle()
    assert len(stand.disk) == 1
    assert stand.get(path).headers["cache-status"].startswith("edgeward; hit")


def test_a_disk_that_stands_still_holds_nobody_up(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "BEHIND", 100_000)
    monkeypatch.setattr(spool, "LATE", 0.1)
    still = threading.Event()
    append = spool.Spool._append

    def never(self: spool.Spool, data: bytes) -> None:
        still.wait(PATIENCE)
        append(self, data)

    monkeypatch.setattr(spool.Spool, "_append", never)
    path = f"/size/{5 * MIB}/x"
    assert stand.get(path).body == Site.body(path)
    still.set()
    stand.settle()
    assert len(stand.disk) == 0
    assert list((stand.folder / "cache" / "tmp").iterdir()) == []


def test_a_client_that_leaves_leaves_no_half_an_answer(stand: Stand) -> None:
    path = f"/size/{5 * MIB}/x"
    for _ in range(3):
        c = Client(stand.rig.port)
        c.send(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        c.until(b"\r\n\r\n")
        c.close()
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if stand.rig.call(lambda: not stand.rig.gate.exchanges):
            break
        waiting.wait(0.01)  # the pace of looking
    stand.settle()
    assert stand.get(path).body == Site.body(path)
    stand.settle()
    assert list((stand.folder / "cache" / "tmp").iterdir()) == []
    assert stand.disk.spools == 0


@pytest.mark.parametrize(
    "how", [{"path": PATHS[1]}, {"prefix": "/size/10/"}, {"tag": "b"}], ids=["path", "prefix", "tag"]
)
def test_a_purge_reaches_both_and_for_good(stand: Stand, how: dict[str, str]) -> None:
    for path in PATHS:
        stand.get(path)
    stand.settle()

    async def purge() -> Any:
        return [d async for d in stand.rig.gate.verbs["gateway.purge"](how)]

    assert stand.rig.do(purge()) == [{"purged": 1}]
    n = len(stand.target.heads)
    stand.again()
    assert len(stand.disk) == len(PATHS) - 1
    assert stand.get(PATHS[1]).body == Site.body(PATHS[1])
    assert len(stand.target.heads) == 1
    assert n == len(PATHS)
    stand.settle()
    # what is only on the disk, and large ones
    stand.again()
    how = {"prefix": "/"}
    assert stand.rig.do(purge()) == [{"purged": len(PATHS)}]
    assert stand.files == []


def test_an_unsafe_request_takes_it_off_the_disk(stand: Stand) -> None:
    stand.get(PATHS[1])
    stand.settle()
    stand.again()
    assert stand.get(PATHS[1], method="POST", body=b"x").status == 200
    stand.settle()
    assert stand.files == []


def test_the_disk_has_its_bound_and_the_oldest_goes_first(stand: Stand) -> None:
    stand.sizes = {"disk": 2 * MIB, "memory": MIB}
    stand.route()
    for n in range(40):
        stand.get(f"/size/100000/{n:02}")
        stand.settle()
    assert stand.disk.used <= 2 * MIB
    assert sum(p.stat().st_size for p in stand.files) <= 2 * MIB
    stand.again(target=False)
    assert stand.get("/size/100000/39").status == 200
    assert stand.get("/size/100000/00").status == 503


def test_nothing_that_was_damaged_is_given(stand: Stand) -> None:
    """Two hundred times: files cut, changed, swapped, emptied, replaced; seeded."""
    rng = random.Random(20)
    for _ in range(20):
        for path in PATHS:
            assert stand.get(path).body == Site.body(path)
        stand.settle()
        for _ in range(10):
            files = sorted(p for p in stand.files if p.parent.name != "tmp")
            if not files:
                break
            file, other = rng.choice(files), rng.choice(files)
            data = file.read_bytes()
            what = rng.randrange(6)
            if what == 0:
                file.write_bytes(data[: rng.randrange(len(data) + 1)])
            elif what == 1 and data:
                at = rng.randrange(len(data))
                file.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
            elif what == 2:
                file.write_bytes(other.read_bytes())
            elif what == 3:
                file.write_bytes(b"\0" * len(data))
            elif what == 4:
                file.unlink()
            else:
                (file.parent / f"{rng.randrange(10**9)}.e").write_bytes(data)
        if rng.random() < 0.5:
            stand.again()
        else:
            stand.rig.call(lambda: stand.rig.gate.shelf.purge(prefix="/"))
        for path in PATHS:
            with contextlib.suppress(EOFError):  # broken off: the client knows
                got = stand.get(path)
                assert (got.status, got.body == Site.body(path)) == (200, True), path
    assert stand.disk.dropped


def test_foreign_things_are_removed_and_nothing_outside_is_touched(stand: Stand, tmp_path_factory: Any) -> None:
    outside: Path = tmp_path_factory.mktemp("outside")
    (outside / "keep").write_bytes(b"keep")
    stand.get(PATHS[1])
    stand.settle()
    part = stand.files[0].parent
    (part / "x.e").symlink_to(outside / "keep")
    (part / "y.b").write_bytes(b"orphan")
    (part / "z").write_bytes(b"foreign")
    (part / "folder").mkdir()
    stand.again()
    assert (outside / "keep").read_bytes() == b"keep"
    assert [p.suffix for p in stand.files] == [".e"]
    assert len(stand.disk) == 1


def test_a_full_disk_means_memory_only_and_is_said_once(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "PAUSE", 0.0)

    def full(self: Disk, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def said() -> list[str]:
        return [r for r, _ in stand.rig.heard.events if r.startswith("CacheDisk")]

    with monkeypatch.context() as m:
        m.setattr(Disk, "room", full)
        for path in PATHS:
            assert stand.get(path).body == Site.body(path)
        stand.settle()
        for path in PATHS[:5]:
            assert stand.get(path).headers["cache-status"].startswith("edgeward; hit")
        assert said() == ["CacheDiskFailed"]
        assert stand.files == []
    stand.rig.call(lambda: stand.rig.gate.shelf.purge(prefix="/"))
    for path in PATHS:
        assert stand.get(path).body == Site.body(path)
    stand.settle()
    assert len(stand.disk) == len(PATHS)
    assert said() == ["CacheDiskFailed", "CacheDiskBack"]


def test_a_folder_that_cannot_be_used_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    made = Stand(tmp_path)
    try:
        assert made.rig.gate.disk is None
        assert made.get(PATHS[1]).body == Site.body(PATHS[1])
        assert made.get(PATHS[1]).headers["cache-status"].startswith("edgeward; hit")
        assert "CacheDiskFailed" in [r for r, _ in made.rig.heard.events]
        assert made.get(f"/size/{5 * MIB}/x").body == Site.body(f"/size/{5 * MIB}/x")
    finally:
        made.close()


def test_a_slow_look_at_the_disk_holds_nobody_up(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in PATHS:
        stand.get(path)
    stand.settle()
    go, scan = threading.Event(), Disk._scan

    def slowly(self: Disk) -> Any:
        found = scan(self)
        go.wait(PATIENCE)
        return found

    monkeypatch.setattr("edgeward.gateway.gate.SCAN", 0.0)
    monkeypatch.setattr(Disk, "_scan", slowly)
    stand.again()
    assert len(stand.disk) == 0
    assert stand.get("/size/10/new").body == Site.body("/size/10/new")  # from the target, into the memory
    go.set()
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if rig_has(stand, len(PATHS)):
            break
        waiting.wait(0.01)  # the pace of looking
    assert rig_has(stand, len(PATHS))
    stand.target.broken = True  # type: ignore[attr-defined]
    for path in PATHS:
        assert stand.get(path).body == Site.body(path), path


def rig_has(stand: Stand, n: int) -> bool:
    return bool(stand.rig.call(lambda: len(stand.disk) == n))


def test_without_a_disk_nothing_stays_on_it(stand: Stand) -> None:
    stand.get(PATHS[1])
    stand.settle()
    assert stand.files
    stand.cache = CacheConfig(object=32 * MIB, disk=False)
    stand.route()
    stand.get("/size/20/n")
    stand.settle()
    assert len(stand.disk) == 1  # the Route's new answers are not for the disk
    stand.sizes["disk"] = 0
    stand.route()
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if not (stand.folder / "cache").exists():
            break
        waiting.wait(0.01)  # the pace of looking
    assert not (stand.folder / "cache").exists()
    assert stand.get(PATHS[1]).status == 200


def test_many_who_want_the_same_from_the_disk(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the kernel has nothing in its memory: threads read, and one read is for all."""
    for path in PATHS[:5]:
        stand.get(path)
    stand.settle()
    stand.again(target=False)
    monkeypatch.setattr(disks, "read_cached", lambda fd, size, at: None)
    reads: list[str] = []
    read = Disk._read
    monkeypatch.setattr(Disk, "_read", lambda self, mark: (reads.append(mark.name), read(self, mark))[1])
    for path in PATHS[:5]:
        clients = [Client(stand.rig.port) for _ in range(8)]
        stand.clients += clients
        for c in clients:
            c.send(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        for c in clients:
            got = c.answer()
            assert (got.status, got.body == Site.body(path)) == (200, True)
    assert len(reads) == 5


# -- kills ------------------------------------------------------------------------------------------------------------


async def _whole(folder: Path) -> int:
    """Opens what is there and asks for all of it: how many there are. What is given must be what was kept."""
    made = diskchild.disk(folder, Reader())
    await made.open()
    await made.settle()
    assert list((folder / "tmp").iterdir()) == []
    marks = list(made._marks.values())
    for mark in marks:
        stored = made._read(mark)
        body = stored.body
        if stored.blob is not None:
            body = b"".join([p async for p in made.pieces(stored.blob, 0, stored.blob.length)])
        path, version = mark.key[1], stored.fields["etag"]
        assert body == diskchild.body_of(path, version), mark.key
    sizes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert sizes <= diskchild.LIMIT
    made.close()
    made._reader.close()
    return len(marks)


def test_fifty_kills_in_the_middle_of_writes(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, diskchild.__file__, str(folder)]
    found = []
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None and process.stdout is not None
        for seed in range(50):
            process.stdin.write(f"{seed}\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            for _ in range(random.Random(seed).randrange(1, 30)):
                assert process.stdout.readline().strip().isdigit()
            os.kill(child, signal.SIGKILL)
            while not process.stdout.readline().endswith("ended\n"):  # what it began to say stands before it
                pass
            found.append(asyncio.run(_whole(folder)))
        process.stdin.close()
    assert found[-1] > 5
