"""Files and folders arrive as they were, go on where they broke off, and land nowhere but where they were sent."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tunnel.ends import ends, served

from edgeward.core.errors import EdgewardError, Gone, NotFound, Refused
from edgeward.tunnel import copying
from edgeward.tunnel.copy import Copy, Result, copy_in, copy_out
from edgeward.tunnel.copying import Begin, Done, End, Entry, Have, Listed, Planned
from edgeward.tunnel.session import Open, Stream


class Node:
    def __init__(self, user: str = "") -> None:
        self.notes: list[dict[str, Any]] = []
        self._copy = Copy(user=user, note=self._keep)

    async def _keep(self, note: dict[str, Any]) -> None:
        self.notes.append(note)

    async def open(self, **args: Any) -> tuple[Stream, asyncio.Task[None]]:
        return await served(self._copy, Open("copy", args, who="alice"))

    async def put(self, source: Path | str, target: Path | str, name: str = "") -> Result:
        stream, task = await self.open(path=str(target), take=True, name=name or Path(source).name)
        try:
            return await copy_out(stream, str(source))
        except EdgewardError:
            stream.reset("ended", "it is over")  # as who connected does it
            raise
        finally:
            await asyncio.wait({task}, timeout=40)
            assert task.done()

    async def get(self, source: Path | str, target: Path | str) -> Result:
        stream, task = await self.open(path=str(source))
        try:
            return await copy_in(stream, str(target), Path(source).name)
        except EdgewardError:
            stream.reset("ended", "it is over")  # as who connected does it
            raise
        finally:
            await asyncio.wait({task}, timeout=40)
            assert task.done()


def tree(root: Path) -> dict[str, tuple[str, int, bytes]]:
    """Kind, mode and content of all below ``root``."""
    found: dict[str, tuple[str, int, bytes]] = {}
    for path in sorted(root.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            found[str(path.relative_to(root))] = ("link", 0, str(path.readlink()).encode())
        elif path.is_dir():
            found[str(path.relative_to(root))] = ("folder", mode, b"")
        else:
            found[str(path.relative_to(root))] = ("file", mode, path.read_bytes())
    return found


def fill(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "big").write_bytes(os.urandom(1000) * 700)
    (root / "a" / "empty").write_bytes(b"")
    (root / "\u00fc \n name").write_bytes(b"x")
    (root / "run.sh").write_bytes(b"#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    (root / "secret").write_bytes(b"s")
    (root / "secret").chmod(0o600)
    (root / "a" / "up").symlink_to("../run.sh")
    (root / "closed").mkdir()
    (root / "closed" / "in").write_bytes(b"y")
    (root / "closed").chmod(0o555)


@pytest.mark.parametrize("way", ["put", "get"])
async def test_a_folder_arrives_as_it_was(tmp_path: Path, way: str) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    source.mkdir()
    there.mkdir()
    fill(source)
    node = Node()
    result = await getattr(node, way)(source, there)
    assert tree(there / "source") == tree(source)
    assert (result.files, result.failed) == (6, [])
    assert (there / "source" / "a" / "b" / "big").stat().st_mtime == (source / "a" / "b" / "big").stat().st_mtime
    assert node.notes[0]["detail"]["files"] == 6
    assert node.notes[0]["who"] == "alice"
    again = await getattr(node, way)(source, there)
    assert (again.files, again.moved) == (6, 0)  # what is there is not sent again
    assert tree(there / "source") == tree(source)


@pytest.mark.parametrize("way", ["put", "get"])
async def test_a_file_goes_where_it_was_sent(tmp_path: Path, way: str) -> None:
    node, source = Node(), tmp_path / "f"
    source.write_bytes(b"content")
    (tmp_path / "folder").mkdir()
    for target, found in (("g", "g"), ("folder", "folder/f"), ("folder/", "folder/f"), ("folder/h", "folder/h")):
        result = await getattr(node, way)(source, f"{tmp_path}/{target}")
        assert (result.files, result.bytes) == (1, 7)
        assert (tmp_path / found).read_bytes() == b"content"
    with pytest.raises(EdgewardError, match="no such"):
        await getattr(node, way)(source, f"{tmp_path}/none/x")
    with pytest.raises(EdgewardError, match="no such"):
        await getattr(node, way)(tmp_path / "none", tmp_path / "x")


async def test_a_file_takes_its_place_at_once_or_not_at_all(tmp_path: Path) -> None:
    """And a copy that broke off goes on where it stopped."""
    source, target = tmp_path / "f", tmp_path / "t"
    source.write_bytes(os.urandom(8_000_000))
    target.write_bytes(b"old")
    stream, task = await Node().open(path=str(source))
    moved = 0

    def half(size: int, total: int) -> None:
        nonlocal moved
        moved += size
        if moved > 3_200_000:
            stream.reset("gone", "the link broke")

    with pytest.raises(Gone):
        await copy_in(stream, str(target), "f", half)
    await asyncio.wait({task}, timeout=40)
    assert target.read_bytes() == b"old"
    result = await Node().get(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert 0 < result.moved < 5_600_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "t"]


async def test_what_broke_off_is_not_gone_on_with_when_the_file_is_another_now(tmp_path: Path) -> None:
    source, target = tmp_path / "f", tmp_path / "t"
    source.write_bytes(b"new" * 1000)
    (tmp_path / ".t.ew-part").write_bytes(b"old" * 500)
    result = await Node().get(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert result.moved == 3000


async def test_what_cannot_be_copied_is_told_and_the_rest_arrives(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good").write_bytes(b"1")
    os.mkfifo(source / "pipe")
    (source / "out").symlink_to("/etc/passwd")
    (source / "up").symlink_to("../../x")
    result = await Node().put(source, tmp_path / "there")
    assert tree(tmp_path / "there") == {"good": ("file", (source / "good").stat().st_mode & 0o777, b"1")}
    assert sorted(p for p, _ in result.failed) == ["out", "pipe", "up"]


async def test_a_target_that_is_in_the_way_fails_alone(tmp_path: Path) -> None:
    source, there = tmp_path / "s", tmp_path / "t"
    source.mkdir()
    (source / "a").write_bytes(b"a")
    (source / "b").write_bytes(b"b")
    (there / "s" / "a").mkdir(parents=True)
    result = await Node().put(source, there)
    assert [p for p, _ in result.failed] == ["a"]
    assert (there / "s" / "b").read_bytes() == b"b"


async def hostile(*said: Any, target: Path) -> None:
    """A giver that says what it likes, against an operator that takes."""
    here, there = await ends()
    taking = asyncio.create_task(copy_in(here, str(target), "x"))
    for m in said:
        await there.write(copying.data(m) if isinstance(m, bytes) else copying.message(m))
    there.end()
    await asyncio.wait_for(taking, 40)


EVIL = [
    Entry([".."], "file", 0o644, 1),
    Entry(["a/b"], "file", 0o644, 1),
    Entry(["/etc/passwd"], "file", 0o644, 1),
    Entry([""], "file", 0o644, 1),
    Entry(["a\0b"], "file", 0o644, 1),
    Entry(["none", "below"], "file", 0o644, 1),
    Entry(["out"], "link", target="/etc"),
    Entry(["out"], "link", target="../.."),
    Entry(["x"], "file", 0o4755 | 1 << 14, 1),
]


@pytest.mark.parametrize("entry", EVIL, ids=range(len(EVIL)))
async def test_a_tampered_giver_leads_nowhere(tmp_path: Path, entry: Entry) -> None:
    with pytest.raises(Refused):
        await hostile(Entry([], "folder", 0o755), entry, Listed(2), target=tmp_path / "t")
    assert not (tmp_path / "t").exists()


async def test_a_giver_does_not_fill_the_memory_with_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "NAMES_MOST", 10_000)
    few, many = ([Entry([f"{n:0200}"], "folder", 0o755) for n in range(count)] for count in (40, 60))
    await hostile(Entry([], "folder", 0o755), *few, Listed(41), target=tmp_path / "few")
    assert len(list((tmp_path / "few").iterdir())) == 40
    with pytest.raises(Refused, match="names"):
        await hostile(Entry([], "folder", 0o755), *many, Listed(61), target=tmp_path / "many")
    assert not (tmp_path / "many").exists()


async def test_a_link_that_is_there_is_not_followed_below_the_target(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "x").mkdir()
    (tmp_path / "t" / "x" / "d").symlink_to(outside)
    said = [Entry([], "folder", 0o755), Entry(["d"], "folder", 0o755), Entry(["d", "f"], "file", 0o644, 1), Listed(3)]
    await hostile(*said, Begin(2, 0), b"x", End("2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"),
                  target=tmp_path / "t")  # fmt: skip
    assert list(outside.iterdir()) == []


async def test_a_giver_that_sends_something_else_is_found_out(tmp_path: Path) -> None:
    said = [Entry([], "file", 0o644, 4), Listed(1), Begin(0, 0), b"evil", End("0" * 64)]
    await hostile(*said, target=tmp_path / "t")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Refused, match="more bytes"):
        await hostile(Entry([], "file", 0o644, 1), Listed(1), Begin(0, 0), b"more", target=tmp_path / "t")
    with pytest.raises(Refused, match="another file"):
        await hostile(Entry([], "file", 0o644, 1), Listed(1), Begin(0, 1), target=tmp_path / "t")


async def test_a_taker_that_claims_what_is_no_file_is_cut(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    stream, task = await Node().open(path=str(tmp_path / "f"))
    await stream.write(copying.message(Have(5, 1, "")) + copying.message(Planned()))
    await stream.write(copying.message(Done(0, 0, 0)))
    with pytest.raises(Refused, match="form"):
        while await stream.read():
            pass
    await asyncio.wait({task}, timeout=40)


def test_links_stay_within_the_copy() -> None:
    assert copying.leads_out(["a", "b"], "../c") == ""
    assert copying.leads_out(["a", "b"], "../../c")
    # a link to the root, and one by way of it: neither says .. too often, together they lead out
    assert copying.leads_out(["b", "up"], "..") == ""
    assert copying.leads_out(["a"], "b/up/..")
    for parts, target in (
        (["a"], ".."),
        (["a", "b"], "../../c"),
        (["a"], "/x"),
        (["a"], ""),
        ([], "x"),
        (["a"], "b/../../c"),
    ):
        assert copying.leads_out(parts, target)


@given(st.binary(max_size=200))
def test_a_stranger_s_bytes_are_messages_or_refused(data: bytes) -> None:
    try:
        copying.Decoder().feed(data)
    except Refused:
        pass


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_files_are_touched_as_the_user_that_the_node_names(open_folder: Path) -> None:
    tmp_path = open_folder
    node, closed, own = Node(user="nobody"), tmp_path / "closed", tmp_path / "own"
    closed.write_bytes(b"root's")
    closed.chmod(0o600)
    own.mkdir()
    os.chown(own, 65534, 65534)
    result = await node.get(closed, tmp_path / "x")
    assert result.failed and "ermission" in result.failed[0][1]
    source = tmp_path / "f"
    source.write_bytes(b"1")
    assert (await node.put(source, own)).files == 1
    assert (own / "f").stat().st_uid == 65534
    assert (await node.put(source, tmp_path / "y")).failed
    # and the agent itself is who it was
    assert closed.read_bytes() == b"root's"
    (tmp_path / "z").write_bytes(b"")
    assert (tmp_path / "z").stat().st_uid == 0


async def test_nothing_there_is_not_found(tmp_path: Path) -> None:
    here, _ = await ends()
    with pytest.raises(NotFound):
        await copy_out(here, str(tmp_path / "none"))
