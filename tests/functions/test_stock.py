"""A node's stock: fetched over a link that breaks, verified, unpacked by a real process, kept, tidied."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
from tests.core.pair import until
from tests.functions.making import wheel
from tests.functions.node import Node, function, looped

from edgeward.cli.uploads import target_of
from edgeward.core.blobs import BlobAsk, BlobPart, BundleAsk, BundleTold, hex_of
from edgeward.core.errors import Unreachable
from edgeward.functions.archive import digest_of, pack
from edgeward.functions.bundling import Source, make
from edgeward.functions.parts import lock_digest
from edgeward.functions.shelves import code_folder, packages_folder
from edgeward.functions.stock import Missing, Stock


class Hub:
    """Answers as the hub does, over a link that can be cut."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.told = BundleTold("unknown", message="the hub does not know it yet")
        self.cut_after = 1 << 60
        self.asked: list[int] = []
        #: Whether what it lacks is of the moment.
        self.again = False

    async def ask(self, verb: str, data: bytes, timeout: float) -> bytes:
        if self.cut_after <= 0:
            raise Unreachable("the hub is not reached")
        if verb == "bundle":
            msgspec.msgpack.decode(data, type=BundleAsk)
            return msgspec.msgpack.encode(self.told)
        ask = msgspec.msgpack.decode(data, type=BlobAsk)
        self.asked.append(ask.offset)
        self.cut_after -= 1
        blob = self.blobs.get(ask.digest)
        if blob is None:
            return msgspec.msgpack.encode(BlobPart(error="namespace holds no such blob", again=self.again))
        return msgspec.msgpack.encode(BlobPart(len(blob), blob[ask.offset : ask.offset + ask.most]))


@contextlib.asynccontextmanager
async def stocked(data: Path, hub: Hub, **more: Any) -> AsyncIterator[tuple[Stock, list[int]]]:
    moved: list[int] = []
    stock = Stock(data, hub.ask, lambda: moved.append(1), **more)
    task = asyncio.create_task(stock.run())
    try:
        yield stock, moved
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def code(stock: Stock, digest: str) -> Missing | None:
    said = stock.code("default", hex_of(digest))
    stock.settle()
    return said


def packed(folder: Path, main: str, more: bytes = b"") -> tuple[bytes, str]:
    folder.mkdir()
    (folder / "main.py").write_text(main)
    (folder / "data.bin").write_bytes(more)
    return pack(folder)


async def here(looked: Callable[[], Missing | None]) -> None:
    await until(lambda: looked() is None, 90)


@looped
async def test_a_fetch_goes_on_where_it_was(tmp_path: Path) -> None:
    hub = Hub()
    data, digest = packed(tmp_path / "src", "x = 1\n", os.urandom(300_000))
    hub.blobs[digest] = data
    hub.cut_after = 3
    async with stocked(tmp_path / "node", hub) as (stock, _):
        assert code(stock, digest) == Missing("Pending", "waits for its code")
        await until(lambda: "not reached" in (code(stock, digest) or Missing("", "")).message)
    # another process, and the link again
    had = max(hub.asked)
    hub.cut_after, hub.asked = 1 << 60, []
    async with stocked(tmp_path / "node", hub) as (stock, moved):
        await here(lambda: code(stock, digest))
        await until(lambda: bool(moved))
    assert min(hub.asked) > had > 0, "nothing was asked for twice"
    folder = code_folder(tmp_path / "node" / "functions", hex_of(digest))
    assert (folder / "main.py").read_text() == "x = 1\n"
    assert list((tmp_path / "node" / "blobs").iterdir()) == []
    # from here on it needs nobody
    hub.cut_after = 0
    async with stocked(tmp_path / "node", hub) as (stock, _):
        assert code(stock, digest) is None


@looped
async def test_two_namespaces_that_want_the_same_archive_have_it_fetched_once(tmp_path: Path) -> None:
    class Turns(Hub):
        async def ask(self, verb: str, data: bytes, timeout: float) -> bytes:
            await asyncio.sleep(0)  # as over a link: the others have their turn
            return await super().ask(verb, data, timeout)

    hub, said = Turns(), set[str]()
    data, digest = packed(tmp_path / "src", "x = 1\n", os.urandom(300_000))
    hub.blobs[digest] = data
    async with stocked(tmp_path / "node", hub) as (stock, moved):

        def both() -> bool:
            missing = [stock.code(namespace, hex_of(digest)) for namespace in ("staging", "prod")]
            stock.settle()
            said.update(m.phase for m in missing if m is not None)
            return not any(missing) and len(moved) >= 2

        await until(both, 90)
    assert said == {"Pending"}
    assert len(hub.asked) == len(set(hub.asked)), "no piece came twice"
    assert list((tmp_path / "node" / "blobs").iterdir()) == []


@looped
async def test_other_bytes_than_the_name_says_are_refused(tmp_path: Path) -> None:
    hub = Hub()
    data, digest = packed(tmp_path / "src", "x = 1\n")
    hub.again = True
    async with stocked(tmp_path / "node", hub) as (stock, _):
        await until(lambda: "no such blob" in (code(stock, digest) or Missing("", "")).message)
        assert (code(stock, digest) or Missing("", "")).phase == "Pending", "another process of the hub may have it"
        hub.blobs[digest] = data[:-1] + bytes([data[-1] ^ 1])
        await until(lambda: (code(stock, digest) or Missing("", "")).phase == "Degraded")
        said = code(stock, digest)
        assert said is not None and f"is not {digest}" in said.message
        assert not code_folder(tmp_path / "node" / "functions", hex_of(digest)).exists()
        hub.blobs[digest] = data  # put right: it is tried again
        stock.hurry()
        await here(lambda: code(stock, digest))


@looped
async def test_an_archive_that_is_none_is_named_and_its_neighbour_is_not_harmed(tmp_path: Path) -> None:
    hub = Hub()
    data, digest = packed(tmp_path / "src", "x = 1\n")
    bad = digest_of(b"no archive")
    hub.blobs |= {digest: data, bad: b"no archive"}
    async with stocked(tmp_path / "node", hub) as (stock, _):

        def both() -> list[Missing | None]:
            said = [stock.code("default", hex_of(d)) for d in (digest, bad)]
            stock.settle()
            return said

        await until(lambda: both()[0] is None and (both()[1] or Missing("", "")).phase == "Degraded")
        assert "cannot be unpacked" in str(both()[1])


@looped
async def test_packages_are_waited_for_and_what_is_wrong_with_them_is_told(tmp_path: Path) -> None:
    lock = wheel(tmp_path / "w", "tiny", {"tiny.py": "VALUE = 7\n"})
    await make(lock, target_of("", "", 28), Source(find_links=str(tmp_path / "w")), tmp_path / "bundle")
    bundle = (tmp_path / "bundle").read_bytes()
    hub = Hub()

    def said(stock: Stock) -> Missing:
        found = stock.packages("default", lock) or Missing("", "")
        stock.settle()
        return found

    async with stocked(tmp_path / "node", hub) as (stock, _):
        await until(lambda: "does not know it yet" in said(stock).message)
        assert said(stock).phase == "Pending"
        hub.told = BundleTold("failed", message="tiny 1.0 has no wheel for here; lock another version")
        stock.hurry()
        await until(lambda: said(stock).phase == "Degraded")
        assert "tiny 1.0 has no wheel for here; lock another version" in said(stock).message
        hub.blobs[digest_of(bundle)] = bundle
        hub.told = BundleTold("ready", digest_of(bundle))
        await until(lambda: said(stock).phase == "" or stock.hurry() or False)
    folder = packages_folder(tmp_path / "node" / "functions", lock_digest(lock))
    assert (folder / "tiny.py").read_text() == "VALUE = 7\n"


@looped
async def test_what_nothing_refers_to_goes_oldest_first(tmp_path: Path) -> None:
    node = tmp_path / "node"
    functions = node / "functions"
    now = 10_000_000.0
    for n in range(4):
        folder = code_folder(functions, f"{n}" * 64)
        folder.mkdir(parents=True)
        (folder / "f").write_bytes(bytes(1000))
        os.utime(folder, (now - 10_000 + n, now - 10_000 + n))
    (functions / "good.json").write_text(f'[{{"code": "{"0" * 64}"}}]')
    lock = "a==1 --hash=sha256:" + "9" * 64
    packages = packages_folder(functions, lock_digest(lock))
    packages.mkdir(parents=True)
    (packages / "f").write_bytes(bytes(1000))
    os.utime(packages, (now - 20_000, now - 20_000))
    back = {"source": {"archive": {"digest": f"sha256:{'1' * 64}"}}, "dependencies": {"lock": lock}}
    stock = Stock(node, Hub().ask, lambda: None, kept=lambda: [("default", back)], keep=500)
    stock.tidy(now)
    left = sorted(p.name[0] for p in (functions / "code").iterdir())
    assert left == ["0", "1"], "what good.json and the way back name stays"
    assert packages.is_dir()
    Stock(node, Hub().ask, lambda: None, keep=500).tidy(now + 20_000)
    assert [p.name[0] for p in (functions / "code").iterdir()] == ["0"]
    assert not packages.exists()


@looped
async def test_a_function_runs_from_its_folder_and_its_packages_inside_the_cage(tmp_path: Path) -> None:
    lock = wheel(tmp_path / "w", "tiny", {"tiny.py": "VALUE = 7\n", "typer/__init__.py": "MINE = 1\n"})
    await make(lock, target_of("", "", 28), Source(find_links=str(tmp_path / "w")), tmp_path / "bundle")
    bundle = (tmp_path / "bundle").read_bytes()
    main = (
        "import tiny, typer, pathlib\nHERE = pathlib.Path(__file__).parent\n"
        "def handler(event, context):\n"
        "    try:\n        (HERE / 'main.py').write_text('x')\n        wrote = True\n"
        "    except OSError:\n        wrote = False\n"
        "    try:\n        other = (HERE.parent.parent / 'secret').read_text()\n"
        "    except OSError:\n        other = ''\n"
        "    data = len((HERE / 'data.bin').read_bytes())\n"
        "    return {'value': tiny.VALUE, 'mine': typer.MINE, 'data': data, 'wrote': wrote, 'other': other}\n"
    )
    data, digest = packed(tmp_path / "src", main, bytes(10))
    hub = Hub()
    hub.blobs |= {digest: data, digest_of(bundle): bundle}
    hub.told = BundleTold("ready", digest_of(bundle))
    node = tmp_path / "node"
    wanted = function("f", "", source={"archive": {"digest": digest}}, dependencies={"lock": lock})
    async with stocked(node, hub) as (stock, _):

        def missing() -> Missing | None:
            said = stock.code("default", hex_of(digest)) or stock.packages("default", lock)
            stock.settle()
            return said

        await here(missing)
    (node / "functions" / "secret").write_text("of another")
    async with Node(node / "functions") as n:
        n.d.configure([wanted])
        await n.phase("f", "Running")
        enforced = n.status("f")["enforced"]
        answer = msgspec.json.decode((await n.call("f")).body)
        assert (answer["value"], answer["data"]) == (7, 10)
        assert answer["mine"] == 1, "its own package, not Edgeward's"
        if "files" in enforced:
            assert (answer["wrote"], answer["other"]) == (False, "")
        if os.geteuid() == 0 and "files" in enforced:
            assert "user" in enforced, "a folder of the node's own is closed to others, and read all the same"


@looped
async def test_a_version_whose_code_is_gone_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with Node(tmp_path / "functions") as n:
        n.d.configure([function("f", "", source={"archive": {"digest": f"sha256:{'0' * 64}"}})])
        await n.phase("f", "Refused")
        assert "its code is not on this node" in n.status("f")["message"]
