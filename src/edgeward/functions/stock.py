"""The agent's stock of code and packages: fetched from the hub by digest, verified, unpacked, kept for when it is away.

``edge.py`` asks for what a function needs; what is not there yet is fetched in the background and the plane is told of
the function only when all of it lies in its folder (``shelves.py``), so nothing that runs waits for a link. A fetch
goes on where it was, after a cut or a restart; its pieces are as large as the link brings in a moment. Whatever came is
hashed before it is opened, and opened by a process of its own (``unpack.py``). What nothing refers to any more stays
within a bound, oldest first to go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgeward.core import clock
from edgeward.core.backoff import backoff
from edgeward.core.blobfetch import ANSWER, Ask, BlobFetch, decoded
from edgeward.core.blobs import BundleAsk, BundleTold, Target, hex_of
from edgeward.core.errors import EdgewardError, Invalid, Refused, Unreachable, from_problem
from edgeward.core.files import ensure_dir
from edgeward.functions.parts import Parts, lock_digest, named
from edgeward.functions.shelves import CODE, PACKAGES, code_folder, packages_folder

log = logging.getLogger("edgeward.functions")

#: (namespace, spec) of Functions
Kept = Callable[[], Iterable[tuple[str, Any]]]

#: Fetches at once.
_AT_ONCE = 3
#: Seconds: for unpacking; between two questions whether a bundle is made; between two tries, at first and at most.
_UNPACK, _ASK_AGAIN, _BACK_OFF, _LONGEST = 600.0, 2.0, 1.0, 60.0
#: Bytes that stay of what nothing refers to, seconds that it stays in any case, and between two looks.
KEEP, _YOUNG, _TIDY = 512 << 20, 3600.0, 3600.0
_PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")


class Want(NamedTuple):
    """``kind``: ``code`` (an archive) or ``packages``; ``hex``: of the archive, or of the lock file."""

    kind: str
    namespace: str
    hex: str


class Missing(NamedTuple):
    """Why a function has to wait. ``phase``: ``Pending`` while it is on its way, ``Degraded`` when it cannot be had."""

    phase: str
    message: str


async def run_unpack(*words: str) -> Any:
    """What ``unpack.py`` says, run as a process of its own. Raises what it raised."""
    env = {k: os.environ[k] for k in _PASSED_ON if k in os.environ} | {"LANG": "C.UTF-8"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edgeward.functions.unpack", *words, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, env=env, start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(_UNPACK):
            data, _ = await process.communicate()
    except TimeoutError:
        raise Invalid(f"takes more than {_UNPACK:g} s to unpack", remedy="leave out what is not needed") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    try:
        said = msgspec.json.decode(data)
    except msgspec.DecodeError:
        raise Invalid("ended the process that unpacked it", remedy="make it anew, and smaller") from None
    if "error" in said:
        raise from_problem(said["error"])
    return said


async def place(kind: str, file: Path, target: Path, lock: str = "") -> None:
    """Unpacks an archive (``code``) or a bundle (``packages``) to where a function finds it."""
    ensure_dir(target.parent)
    if kind == CODE:
        await run_unpack("archive", str(file), str(target))
        return
    text = file.with_suffix(".lock")
    text.write_text(lock)
    try:
        await run_unpack("bundle", str(file), str(target), str(text))
    finally:
        text.unlink(missing_ok=True)


class Stock:
    def __init__(
        self,
        data: Path,
        ask: Ask,
        moved: Callable[[], None],
        *,
        kept: Kept = lambda: (),
        keep: int = KEEP,
        blobs: BlobFetch | None = None,
    ) -> None:
        """``data``: the node's folder. ``moved``: called when an answer of :meth:`code` or :meth:`packages` changes.
        ``kept``: versions that there is a way back to, whose code and packages stay.
        """
        self._data, self._functions = data, data / "functions"
        self._ask, self._moved, self._kept, self._keep = ask, moved, kept, keep
        self._wants: dict[Want, str] = {}
        self._touched: dict[Want, str] = {}
        self._missing: dict[Want, Missing] = {}
        self._tasks: dict[Want, asyncio.Task[None]] = {}
        self._wake, self._hurry = asyncio.Event(), asyncio.Event()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._blobs = blobs or BlobFetch(data / "blobs", ask)
        self._target: Target | None = None

    # -- asked by edge.py ------------------------------------------------------------------------------------------

    def code(self, namespace: str, hex: str) -> Missing | None:
        """None when the archive is there; else it is fetched."""
        return self._look(Want(CODE, namespace, hex), code_folder(self._functions, hex), "")

    def packages(self, namespace: str, lock: str) -> Missing | None:
        hex = lock_digest(lock)
        return self._look(Want(PACKAGES, namespace, hex), packages_folder(self._functions, hex), lock)

    def _look(self, want: Want, folder: Path, lock: str) -> Missing | None:
        self._touched[want] = lock
        if folder.is_dir():
            return None
        return self._missing.get(want, Missing("Pending", f"waits for its {want.kind}"))

    def settle(self) -> None:
        """All functions have been looked at: what was not asked for since the last time is not wanted any more."""
        if self._touched != self._wants:
            for want in self._wants.keys() - self._touched.keys():
                with contextlib.suppress(OSError):  # calls of it may still be in hand: it is young once more
                    os.utime(self._folder(want))
            self._wants = self._touched
            self._wake.set()
        self._touched = {}

    def hurry(self) -> None:
        """The hub may be reached again: do not wait for the next try."""
        self._hurry.set()
        self._hurry = asyncio.Event()

    # -- fetching --------------------------------------------------------------------------------------------------

    def _folder(self, want: Want) -> Path:
        make = code_folder if want.kind == CODE else packages_folder
        return make(self._functions, want.hex)

    async def run(self) -> None:
        await asyncio.to_thread(self._sweep_up)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tidy_up())
            while True:
                for want in [w for w in self._tasks if w not in self._wants]:
                    self._tasks.pop(want).cancel()
                    self._missing.pop(want, None)
                for want, lock in self._wants.items():
                    if want not in self._tasks and not self._folder(want).is_dir():
                        self._tasks[want] = group.create_task(self._have(want, lock))
                self._wake.clear()
                await self._wake.wait()

    async def _have(self, want: Want, lock: str) -> None:
        """Until it is there."""
        tries = 0
        while True:
            try:
                async with self._slots:
                    await self._fetch(want, lock)
                break
            except EdgewardError as e:
                # what is wrong with the link is no fault of the function's
                phase = "Pending" if isinstance(e, Unreachable) else "Degraded"
                self._say(want, Missing(phase, f"its {want.kind}: {e}"))
            except OSError as e:
                self._say(want, Missing("Degraded", f"its {want.kind} cannot be kept: {e.strerror or e}"))
            tries += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff(tries, _BACK_OFF, _LONGEST)):
                    await self._hurry.wait()
        self._missing.pop(want, None)
        self._tasks.pop(want, None)
        log.info("%s %s is here", want.kind, want.hex)
        self._moved()

    def _say(self, want: Want, missing: Missing) -> None:
        if self._missing.get(want) != missing:
            self._missing[want] = missing
            log.info("%s %s: %s", want.kind, want.hex, missing.message)
            self._moved()

    async def _fetch(self, want: Want, lock: str) -> None:
        hex = want.hex if want.kind == CODE else hex_of(await self._bundle(want))
        async with self._blobs.alone(hex):  # functions of two namespaces may want the same one
            if self._folder(want).is_dir():
                return  # it came for another namespace meanwhile
            file = await self._blobs.get(want.namespace, hex)
            try:
                await place(want.kind, file, self._folder(want), lock)
            except Invalid:
                file.unlink(missing_ok=True)
                raise
            file.unlink(missing_ok=True)

    async def _bundle(self, want: Want) -> str:
        """The digest of the bundle for this node; waits while the hub makes it."""
        if self._target is None:
            self._target = msgspec.convert(await run_unpack("target"), Target)
        ask = msgspec.msgpack.encode(BundleAsk(want.namespace, want.hex, self._target))
        while True:
            told = decoded(await self._ask("bundle", ask, ANSWER), BundleTold)
            if told.state == "ready":
                return str(told.digest)
            if told.state != "making":
                error = Unreachable if told.state == "unknown" else Refused
                raise error(told.message or "the hub does not have it")
            self._say(want, Missing("Pending", told.message))
            await asyncio.sleep(_ASK_AGAIN)  # the period of asking

    # -- what nothing needs ----------------------------------------------------------------------------------------

    def _sweep_up(self) -> None:
        """What an agent that was killed left half unpacked."""
        for parent in (CODE, PACKAGES):
            for path in (self._functions / parent).glob(".unpack-*"):
                shutil.rmtree(path, ignore_errors=True)

    async def _tidy_up(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.tidy, clock.now())
            except OSError as e:
                log.warning("code and packages that nothing needs were not taken away: %s", e)
            await asyncio.sleep(_TIDY)  # the period

    def tidy(self, now: float) -> None:
        """Takes away what nothing refers to, oldest first, beyond what may stay."""
        files = [self._data / "plane.json", *self._functions.glob("*.json")]
        back = Parts(set(), {})
        for namespace, spec in self._kept():
            back.add(namespace, spec)
        used = named(f.read_bytes() for f in files if f.is_file()) | {w.hex for w in self._wants}
        used |= {hex for _, hex in back.all}
        unused: list[tuple[float, int, Path]] = []
        for parent in (CODE, PACKAGES):
            for path in (self._functions / parent).glob("[0-9a-f]*"):
                if path.name[:64] in used:
                    os.utime(path, (now, now))
                elif (since := path.stat().st_mtime) < now - _YOUNG or since > now:
                    unused.append((since, _bytes_of(path), path))
        total = sum(size for _, size, _ in unused)
        for _, size, path in sorted(unused):
            if total <= self._keep:
                break
            gone = path.with_name(f".unpack-{path.name}")  # no longer whole from here on, whatever happens
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            total -= size
        for path in self._blobs.parts.glob("*.part"):
            if path.stat().st_mtime < now - 24 * _YOUNG:
                path.unlink(missing_ok=True)


def _bytes_of(folder: Path) -> int:
    return sum((Path(at) / name).stat().st_size for at, _, names in os.walk(folder) for name in names)
