"""The images of this node's Apps: got once for each version, checked, and used by what they hold from then on.

A version that wants an image waits here (``Images.waits_for``) while it is looked for on the node, pulled from its
registry, or fetched as an archive from the hub and loaded; what served before goes on meanwhile. Then it is written
down (``containers/images/``) which image that was: all instances of the version are made of that one, also after a
restart without a link, and whatever becomes of its tag. What was got here and no kept version names any more goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
from pathlib import Path

import msgspec

from edgeward.core.backoff import backoff
from edgeward.core.blobs import hex_of
from edgeward.core.errors import EdgewardError, Invalid, Refused, Unreachable
from edgeward.core.files import ensure_dir, write_atomic
from edgeward.workloads.container_spec import Container
from edgeward.workloads.engine import Engine, Image
from edgeward.workloads.ground import Ground

log = logging.getLogger("edgeward.containers")

Version = tuple[str, str, str]

#: Images that are got at once; seconds between two tries, at first and at most, and what a version's note stays
#: although the version is not kept: one that is waited for is kept only when it is asked for.
_AT_ONCE, _BACK_OFF, _LONGEST, _YOUNG = 2, 1.0, 60.0, 3600.0


class Note(msgspec.Struct):
    """Which image a version is made of. ``digest``: what it is called by; ``ours``: it came here for an App."""

    namespace: str
    name: str
    version: str
    image: str
    id: str
    digest: str
    ours: bool


class Images:
    def __init__(self, ground: Ground, engine: Engine) -> None:
        self._engine, self._blobs, self._poke = engine, ground.blobs, ground.poke
        self._folder = ground.data / "containers" / "images"
        self._notes: dict[Version, Note] = {}
        for file in self._folder.glob("*.json"):
            with contextlib.suppress(msgspec.DecodeError, OSError):
                note = msgspec.json.decode(file.read_bytes(), type=Note)
                self._notes[note.namespace, note.name, note.version] = note
        self._wants: dict[Version, Container] = {}
        #: Of each App: the version that waits for its image, and the one that may come.
        self._asked: dict[tuple[str, str], Version] = {}
        self._ahead: dict[tuple[str, str], Version] = {}
        self._why: dict[Version, str] = {}
        self._tasks: dict[Version, asyncio.Task[None]] = {}
        self._wake, self._hurry = asyncio.Event(), asyncio.Event()
        self._slots = asyncio.Semaphore(_AT_ONCE)

    # -- asked by the runtime ------------------------------------------------------------------------------------------

    def note(self, version: Version) -> Note | None:
        return self._notes.get(version)

    def waits_for(self, version: Version, spec: Container) -> str:
        """ "" when its image is here; else why not yet, and it is being got."""
        if version in self._notes:
            return ""
        self._asked[version[:2]] = version
        self._want(version, spec)
        return self._why.get(version, f"waits for its image {spec.image or spec.archive}")

    def ahead(self, version: Version, spec: Container) -> bool:
        """Whether the image of a version that may come is here; it is being got, and kept until :meth:`drop`."""
        self._ahead[version[:2]] = version
        if version in self._notes:
            self._trim(*version[:2])
            return True
        self._want(version, spec)
        return False

    def drop(self, namespace: str, name: str) -> None:
        """No version is to come any more. What its App waits for itself goes on."""
        if self._ahead.pop((namespace, name), None) is not None:
            self._trim(namespace, name)

    def _want(self, version: Version, spec: Container) -> None:
        self._trim(*version[:2])
        if version not in self._wants:
            self._wants[version] = spec
            self._wake.set()

    def _trim(self, namespace: str, name: str) -> None:
        """What the same App wanted before and has not got, nobody wants any more."""
        app = (namespace, name)
        still = (self._asked.get(app), self._ahead.get(app))
        for other in [v for v in self._wants if v[:2] == app and v not in still]:
            self._drop(other)

    def gone(self, version: Version) -> None:
        """Its image is not on the node any more (somebody took it away): it is got again."""
        self._notes.pop(version, None)
        self._file(version).unlink(missing_ok=True)

    def forget(self, namespace: str, name: str) -> None:
        self._asked.pop((namespace, name), None)
        self._trim(namespace, name)

    def _drop(self, version: Version) -> None:
        self._wants.pop(version, None)
        self._why.pop(version, None)
        if task := self._tasks.pop(version, None):
            task.cancel()

    def _file(self, version: Version) -> Path:
        return self._folder / f"{hashlib.sha256('/'.join(version).encode()).hexdigest()[:32]}.json"

    # -- getting -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                for version, spec in self._wants.items():
                    if version not in self._tasks:
                        self._tasks[version] = group.create_task(self._have(version, spec))
                self._wake.clear()
                await self._wake.wait()

    async def _have(self, version: Version, spec: Container) -> None:
        """Until it is here."""
        tries = 0
        while True:
            try:
                async with self._slots:
                    note = await self._get(version, spec)
                    await asyncio.to_thread(self._write, version, note)
                break
            except EdgewardError as e:
                self._say(version, f"its image: {e}")
            except OSError as e:
                self._say(version, f"its image cannot be kept: {e.strerror or e}")
            tries += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff(tries, _BACK_OFF, _LONGEST)):
                    await self._hurry.wait()
        self._notes[version] = note
        for known in (self._wants, self._why, self._tasks):
            known.pop(version, None)
        log.info("the image of %s/%s is %s", *version[:2], note.digest)
        self._poke(*version[:2])

    def _write(self, version: Version, note: Note) -> None:
        ensure_dir(self._folder)
        write_atomic(self._file(version), msgspec.json.encode(note))

    def hurry(self) -> None:
        """The hub or a registry may be reached again: do not wait for the next try."""
        self._hurry.set()
        self._hurry = asyncio.Event()

    def _say(self, version: Version, why: str) -> None:
        if self._why.get(version) != why:
            self._why[version] = why
            log.info("%s/%s: %s", *version[:2], why)
            self._poke(*version[:2])

    async def _get(self, version: Version, spec: Container) -> Note:
        if why := self._engine.absent():
            raise EdgewardError(why, remedy="install podman or docker on this node")
        if spec.archive:
            image, ours = await self._from_archive(version[0], spec), True
        else:
            found = None if spec.pull == "always" else await self._engine.image(spec.image)
            ours = found is None
            if found is None:
                image = await self._from_registry(spec)
            else:
                image = found
        digest = f"sha256:{image.id}"
        _, _, asked = spec.image.rpartition("@")
        if "@" in spec.image and asked not in (*image.digests, digest):
            raise Refused(
                f"what came has the digest {image.digests[0] if image.digests else digest}, not {asked}",
                field="$.spec.container.image",
                remedy="name the digest of this image, or take the right one",
            )
        if "@" in spec.image:
            digest = asked
        elif image.digests:
            digest = image.digests[0]
        return Note(*version, spec.image, image.id, digest, ours)

    async def _from_registry(self, spec: Container) -> Image:
        if spec.pull == "never":
            raise Refused(
                f"{spec.image} is not on this node",
                field="$.spec.container.pull",
                remedy="load it there, or let it be pulled",
            )
        try:
            await self._engine.pull(spec.image)
        except EdgewardError as e:
            raise Unreachable(f"{spec.image} cannot be pulled: {e.message}", remedy=e.remedy) from None
        image = await self._engine.image(spec.image)
        if image is None:
            raise EdgewardError(f"{spec.image} was pulled and is not there")
        return image

    async def _from_archive(self, namespace: str, spec: Container) -> Image:
        if self._blobs is None:
            raise Unreachable("no hub to fetch it from")
        hex = hex_of(spec.archive, "$.spec.container.archive")
        async with self._blobs.alone(hex):
            file = await self._blobs.get(namespace, hex)
            try:
                names = await self._engine.load(file)
            except Unreachable:
                raise
            except EdgewardError as e:
                if _full(e.message):  # the archive stays for the next try
                    raise OSError(errno.ENOSPC, "no space left on the node's disk") from None
                file.unlink(missing_ok=True)
                raise Invalid(
                    f"the archive cannot be loaded: {e.message}",
                    field="$.spec.container.archive",
                    remedy="make it with podman save or docker save",
                ) from None
            file.unlink(missing_ok=True)
        return await _of_archive(self._engine, names, spec.image)

    # -- what nothing needs --------------------------------------------------------------------------------------------

    async def tidy(self, kept: set[Version], now: float) -> None:
        """Takes away the notes of versions that are not ``kept``, and images that came for them alone."""
        lost = []
        for version, note in list(self._notes.items()):
            if version in kept or version in self._wants or version in self._ahead.values():
                continue
            with contextlib.suppress(OSError):
                since = self._file(version).stat().st_mtime
                if now - _YOUNG < since <= now and any(v[:2] == version[:2] for v in kept):
                    continue
            self.gone(version)
            lost.append(note)
        used = {note.id for note in self._notes.values()}
        for id in {note.id for note in lost if note.ours} - used:
            await self._engine.remove_image(id)


async def _of_archive(engine: Engine, names: list[str], asked: str) -> Image:
    """The image that is meant, of those that an archive brought."""
    name = asked.partition("@")[0]
    for one in names:
        image = await engine.image(one)
        if image is None:
            continue
        if not name or name in (one, *image.names, *(n.removeprefix("localhost/") for n in image.names)):
            if not name and len(names) > 1:
                break
            return image
    raise Invalid(
        f"the archive holds {', '.join(names)[:300] or 'no image'}",
        field="$.spec.container.image",
        remedy="name one of them",
    )


def _full(said: str) -> bool:
    return "no space left on device" in said.lower() or "disk quota exceeded" in said.lower()
