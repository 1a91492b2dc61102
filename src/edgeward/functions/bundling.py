"""Makes the bundle of a lock file: wheels fetched by pip, held against the hashes, put unchanged into one tar.

pip runs as a process of its own, by argument list, told to take wheels only and nothing that the lock file does not
name by hash; so nothing of a package is run or built here. It is ended when it takes too long or fetches too much. What
cannot be had is said with the package's name. The hub does this for its nodes (``hub/bundles.py``), and so does
``edgeward functions bundle`` on a machine that reaches a registry when the hub does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgeward.core.blobs import LARGEST, Target
from edgeward.core.errors import EdgewardError, Invalid, TooLarge, Unreachable
from edgeward.functions.wheels import Pin, lacking, parse_lock, python_of, tags_of, wanted, where

#: Seconds that pip may take, and how often it is looked at what it has fetched.
TIME, _LOOK = 600.0, 0.5
_PASSED_ON = ("PATH", "HOME", "LANG", "PYTHONPATH", "SSL_CERT_FILE", "XDG_CONFIG_HOME", "XDG_CONFIG_DIRS")
_NO_MATCH = re.compile(r"No matching distribution found for ([A-Za-z0-9._-]+)==(\S+)")
_BAD_HASH = re.compile(r"([A-Za-z0-9._-]+)==(\S+) from|^\s+([A-Za-z0-9._-]+)==(\S+):?$", re.M)


class Source(msgspec.Struct, frozen=True):
    """Where packages come from. Neither: where pip of this machine and user is told to look.

    ``index``: address of a package index (PEP 503). ``find_links``: a folder of wheels; without an index nothing else
    is asked.
    """

    index: str = ""
    find_links: str = ""

    @classmethod
    def read(cls, given: object) -> Source:
        """From ``packages`` of ``hub.json``: ``{index, findLinks}``."""
        doc = given if isinstance(given, dict) else {}
        return cls(str(doc.get("index", "")), str(doc.get("findLinks", "")))

    def options(self) -> list[str]:
        found = [f"--find-links={self.find_links}"] if self.find_links else []
        if self.index:
            found.append(f"--index-url={self.index}")
        elif self.find_links:
            found.append("--no-index")
        return found


def command(target: Target, source: Source, lock: Path, into: Path) -> list[str]:
    """pip's arguments."""
    major, minor = python_of(target)
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    words += ["--retries=2", "--timeout=20", "--quiet", "download"]
    words += ["--only-binary=:all:", "--no-deps", "--require-hashes", f"--dest={into}", f"--requirement={lock}"]
    words += [f"--python-version={target.python}", "--implementation=cp"]
    words += [f"--abi={abi}" for abi in (f"cp{major}{minor}", "abi3", "none")]
    words += [f"--platform={p}" for p in (*target.platforms, "any")]
    return [*words, *source.options()]


async def make(lock: str, target: Target, source: Source, to: Path) -> list[str]:
    """Writes the bundle to the file ``to``; the names of its wheels. Beside it there must be room for as much again.

    Raises ``EdgewardError`` with what is missing and what to do.
    """
    pins = wanted(parse_lock(lock), target.environment)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=to.parent) as folder:
        into, file = Path(folder) / "wheels", Path(folder) / "lock.txt"
        into.mkdir()
        file.write_text("".join(f"{p.line()}\n" for p in pins))
        if pins:
            await _run(command(target, source, file, into), into, target)
        return await asyncio.to_thread(collect, into, pins, target, to)


async def _run(words: Sequence[str], into: Path, target: Target) -> None:
    env = {
        k: v for k, v in os.environ.items() if k in _PASSED_ON or k.startswith("PIP_") or k.lower().endswith("_proxy")
    }
    # of its own session, so that what it starts ends with it
    process = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        env={**env, "PYTHONDONTWRITEBYTECODE": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LARGEST, LARGEST))
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        text = await _watched(process, into)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if process.returncode:
        raise failure(text, target)


async def _watched(process: asyncio.subprocess.Process, into: Path) -> str:
    assert process.stderr is not None  # noqa: S101 - asked for
    reading = asyncio.ensure_future(_tail(process.stderr))
    until = asyncio.get_running_loop().time() + TIME
    try:
        while not reading.done():
            await asyncio.wait({reading}, timeout=_LOOK)
            if sum(p.stat().st_size for p in into.iterdir() if p.is_file()) > LARGEST:
                raise TooLarge(f"the packages are more than {LARGEST >> 20} MiB", remedy="lock fewer")
            if asyncio.get_running_loop().time() > until:
                raise Unreachable(f"the packages could not be fetched within {TIME:g} s", remedy="try again")
        await process.wait()
        return reading.result()
    finally:
        reading.cancel()


async def _tail(stream: asyncio.StreamReader) -> str:
    kept = b""
    while piece := await stream.read(65536):
        kept = (kept + piece)[-65536:]
    return kept.decode("utf-8", "replace")


def failure(text: str, target: Target) -> EdgewardError:
    """What pip's words mean."""
    elsewhere = "or bundle it on a machine that reaches one: edgeward functions bundle"
    if "No module named pip" in text:
        return Invalid("there is no pip beside the hub", remedy=f"install pip in its environment, {elsewhere}")
    if "DO NOT MATCH THE HASHES" in text:
        found = _BAD_HASH.search(text.partition("DO NOT MATCH")[2])
        name = " ".join(w for w in (found.groups() if found else ()) if w) or "a package"
        return Invalid(f"{name}: its file is not the one that the lock file names", remedy="lock anew")
    if found := _NO_MATCH.search(text):
        return Invalid(
            f"{found[1]} {found[2]} has no wheel for {where(target)}",
            remedy=f"lock a version that has one; is the hub's registry the right one? {elsewhere}",
        )
    last = [line for line in text.splitlines() if line.strip()]
    why = last[-1].removeprefix("ERROR: ")[:300] if last else "pip failed and said nothing"
    return Unreachable(f"the packages cannot be fetched: {why}", remedy=f"does the hub reach a registry? {elsewhere}")


def collect(folder: Path, pins: Sequence[Pin], target: Target, to: Path) -> list[str]:
    """The wheels of a folder as a bundle: the same wheels are the same bytes. Raises ``Invalid``, ``TooLarge``."""
    files = sorted(p for p in folder.iterdir() if p.suffix == ".whl" and p.is_file())
    if sum(p.stat().st_size for p in files) > LARGEST:
        raise TooLarge(f"the packages are more than {LARGEST >> 20} MiB", remedy="lock fewer")
    import tarfile  # half a megabyte that a hub without packages does not need

    known = frozenset().union(*(p.hashes for p in pins)) if pins else frozenset()
    names = []
    with tarfile.open(to, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in files:
            with path.open("rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() not in known:
                    continue
                data.seek(0)
                entry = tarfile.TarInfo(path.name)
                entry.size, entry.mode = path.stat().st_size, 0o644
                tar.addfile(entry, data)
            names.append(path.name)
    why = lacking(pins, names, tags_of(target), where(target))
    if why:
        raise Invalid(why, remedy="lock a version that has one, or lock for this kind of node")
    return names
