"""Images as archives from the hub, with real podman: which one it is, what is refused, a full disk, what goes again."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.core.pair import until
from tests.workloads.engines import BOX, Registry, Store, a_store

from edgeward.core.blobfetch import BlobFetch
from edgeward.core.blobs import BlobAsk, BlobPart
from edgeward.core.errors import Unreachable
from edgeward.workloads.container_spec import Container
from edgeward.workloads.ground import Ground
from edgeward.workloads.images import Images
from edgeward.workloads.podman import Podman

WAIT = 120.0
VERSION = ("default", "web", "1" * 64)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    yield from a_store(tmp_path / "store", monkeypatch)


class Hub:
    """Blobs, as a hub gives them; ``reached``: whether it is."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.reached, self.asked = True, 0

    def add(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return digest

    async def ask(self, verb: str, data: bytes, timeout: float) -> bytes:
        if not self.reached:
            raise Unreachable("the hub is not reached")
        self.asked += 1
        ask = msgspec.msgpack.decode(data, type=BlobAsk)
        blob = self.blobs[ask.digest]
        return msgspec.msgpack.encode(BlobPart(len(blob), blob[ask.offset : ask.offset + ask.most]))


class Node:
    def __init__(self, data: Path) -> None:
        self.hub = Hub()
        self.pokes = 0
        self.data = data
        ground = Ground(
            node="n", site="s", data_dir=data, blobs=BlobFetch(data / "blobs", self.hub.ask), poke=self._poke
        )
        self.images = Images(ground, Podman({}))

    def _poke(self, namespace: str, name: str) -> None:
        self.pokes += 1

    async def waits(self, spec: Container, says: str, version: tuple[str, str, str] = VERSION) -> None:
        """Asks until the answer has these words ("": it is here)."""
        said = ""

        def told() -> bool:
            nonlocal said
            said = self.images.waits_for(version, spec)
            return said == says if not says else says in said

        try:
            await until(told, WAIT)
        except AssertionError:
            raise AssertionError(said) from None


def run(node: Node, main: Any) -> None:
    async def body() -> None:
        running = asyncio.create_task(node.images.run())
        try:
            async with asyncio.timeout(3 * WAIT):
                await main
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(body())


def archive(store: Store, *names: str) -> bytes:
    """An archive of these images, which the store has not any more then."""
    file = store.root / "archive.tar"
    file.unlink(missing_ok=True)
    store.podman("save", "--quiet", "--multi-image-archive", "--output", str(file), *names)
    store.podman("rmi", "--force", *names)
    return file.read_bytes()


def test_an_archive_comes_when_the_hub_is_there_and_its_image_goes_with_the_app(tmp_path: Path, store: Store) -> None:
    node = Node(tmp_path / "node")
    id = store.box("localhost/app:1")
    spec = Container(archive=node.hub.add(archive(store, "localhost/app:1")))
    node.hub.reached = False

    async def main() -> None:
        await node.waits(spec, "the hub is not reached")
        node.hub.reached = True
        node.images.hurry()
        await node.waits(spec, "")
        note = node.images.note(VERSION)
        assert note is not None
        assert (note.id, note.ours) == (id, True)
        assert note.digest.startswith("sha256:")
        assert not list((node.data / "blobs").iterdir()), "the archive is not kept beside the image"
        asked = node.hub.asked
        again = Node(node.data)
        assert again.images.waits_for(VERSION, spec) == "", "the next agent knows"
        await node.images.tidy({VERSION}, 0.0)
        assert store.has(id)
        await node.images.tidy(set(), 0.0)
        assert not store.has(id)
        assert node.images.note(VERSION) is None
        assert node.hub.asked == asked

    run(node, main())


def test_the_image_of_what_may_come_is_got_beside_what_is_waited_for(tmp_path: Path, store: Store) -> None:
    node = Node(tmp_path / "node")
    old, new = ("default", "web", "1" * 64), ("default", "web", "2" * 64)
    for name in ("localhost/app:1", "localhost/app:2"):
        store.box(name, **{"etc/which": name})
    first = Container(archive=node.hub.add(archive(store, "localhost/app:1")))
    second = Container(archive=node.hub.add(archive(store, "localhost/app:2")))
    node.hub.reached = False

    async def main() -> None:
        await node.waits(first, "the hub is not reached", old)
        assert not node.images.ahead(new, second)
        assert node.images.waits_for(old, first), "neither puts the other off"
        assert not node.images.ahead(new, second)
        node.hub.reached = True
        node.images.hurry()
        await node.waits(first, "", old)
        await until(lambda: node.images.ahead(new, second), WAIT)
        note = node.images.note(new)
        assert note is not None
        await node.images.tidy({old}, 1e12)
        assert store.has(note.id), "kept for as long as it may come"
        again = Node(node.data)
        assert again.images.ahead(new, second), "the next agent knows"
        node.images.drop(*new[:2])
        await node.images.tidy({old}, 1e12)
        assert not store.has(note.id)
        node.hub.reached = False
        assert not node.images.ahead(new, second)
        await node.waits(second, "the hub is not reached", new)
        node.images.drop(*new[:2])
        node.hub.reached = True
        node.images.hurry()
        await node.waits(second, "", new)  # its run has come: what was begun goes on

    run(node, main())


def test_an_image_that_was_there_stays(tmp_path: Path, store: Store) -> None:
    node = Node(tmp_path / "node")

    async def main() -> None:
        await node.waits(Container(image=BOX), "")
        await node.images.tidy(set(), 0.0)
        assert store.has(BOX)

    run(node, main())


def test_what_an_archive_holds_is_what_is_asked_for(tmp_path: Path, store: Store) -> None:
    node = Node(tmp_path / "node")
    ids = [store.box(f"localhost/{n}:1", **{"etc/n": n}) for n in ("one", "two")]
    both = node.hub.add(archive(store, "localhost/one:1", "localhost/two:1"))
    rubbish = node.hub.add(b"no archive at all" * 100)
    wrong = node.hub.add(b"these bytes")
    node.hub.blobs[wrong] = b"those bytes"
    none = "0" * 64

    async def main() -> None:
        await node.waits(Container(archive=both), "the archive holds localhost/")
        await node.waits(
            Container(archive=both, image="localhost/three:1"), "(name one of them)", ("default", "a", none)
        )
        await node.waits(Container(archive=rubbish), "the archive cannot be loaded", ("default", "b", none))
        await node.waits(Container(archive=wrong), f"what the hub sent is not {wrong}", ("default", "c", none))
        await node.waits(
            Container(archive=both, image=f"localhost/two:1@sha256:{none}"),
            f"not sha256:{none}",
            ("default", "d", none),
        )
        for n, (name, id) in enumerate(zip(("one", "two"), ids, strict=True)):
            version = ("default", f"e{n}", none)
            await node.waits(Container(archive=both, image=f"{name}:1"), "", version)
            note = node.images.note(version)
            assert note is not None
            assert note.id == id
            exact = Container(archive=both, image=f"localhost/{name}:1@{note.digest}")
            await node.waits(exact, "", ("default", f"f{n}", none))

    run(node, main())


def test_a_disk_that_is_full_while_it_is_loaded(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.box("localhost/app:1", **{"etc/much": "x" * (6 << 20)})
    data = archive(store, "localhost/app:1")
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    done = subprocess.run([*mount, "size=4m", "tmpfs", str(small)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        there = Store(small / "store")
        for name, value in there.env.items():
            monkeypatch.setenv(name, value)
        node = Node(tmp_path / "node")
        spec = Container(archive=node.hub.add(data))

        async def main() -> None:
            await node.waits(spec, "its image cannot be kept: no space left on the node's disk")
            asked = node.hub.asked
            subprocess.run([*mount, "remount,size=64m", "tmpfs", str(small)], check=True)
            node.images.hurry()
            await node.waits(spec, "")
            assert node.hub.asked <= asked + 3, "it had the archive already"

        run(node, main())
        there.close()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_images_from_a_registry(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path / "registry")
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", registry.conf())
    ids, digests = [], []
    for n in ("first", "second"):
        ids.append(store.box("localhost/app:1", **{"etc/n": n}))
        digests.append(registry.take(store, "localhost/app:1", f"team/app:{n}"))
        store.podman("rmi", "--force", "localhost/app:1")
    registry.tags["team/app:1"] = digests[0]
    node = Node(tmp_path / "node")
    image = f"{registry.place}/team/app"

    def version(n: int) -> tuple[str, str, str]:
        return ("default", f"app{n}", str(n) * 64)

    def note(n: int) -> tuple[str, str]:
        found = node.images.note(version(n))
        assert found is not None
        assert found.ours or n in (2, 5)
        return found.id, found.digest

    async def main() -> None:
        registry.broken = True
        await node.waits(Container(image=f"{image}:1"), "cannot be pulled", version(1))
        registry.broken = False
        node.images.hurry()
        await node.waits(Container(image=f"{image}:1"), "", version(1))
        assert note(1) == (ids[0], digests[0])
        registry.tags["team/app:1"] = digests[1]  # the tag moves
        await node.waits(Container(image=f"{image}:1"), "", version(2))
        assert note(2) == (ids[0], digests[0]), "missing: what is here is taken"
        await node.waits(Container(image=f"{image}:1", pull="always"), "", version(3))
        assert note(3) == (ids[1], digests[1])
        assert note(1) == (ids[0], digests[0]), "a version stays what it was"
        store.podman("rmi", "--force", ids[0])
        await node.waits(Container(image=f"{image}@{digests[0]}"), "", version(4))
        assert note(4) == (ids[0], digests[0])
        asked = len(registry.asked)
        await node.waits(Container(image=f"{image}@{digests[0]}"), "", version(5))
        assert note(5) == (ids[0], digests[0])
        assert len(registry.asked) == asked, "what a digest names need not be asked for again"
        # a registry that gives something else under a digest
        (registry.root / "blobs" / ("f" * 64)).write_bytes((registry.root / "blobs" / digests[1][7:]).read_bytes())
        await node.waits(Container(image=f"{image}@sha256:{'f' * 64}"), "cannot be pulled", version(6))

    try:
        run(node, main())
    finally:
        registry.close()
