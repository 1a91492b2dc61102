"""A backup back into a folder: checked whole first, put together beside the folder, then moved into place in one step.

In: a sealed file, the recovery key, a folder where no hub runs. Out: a hub's folder that a hub starts from, on this or
any other machine; what was there before is moved aside, never deleted. Whatever stops this, before the last step the
old folder is there as it was.

The store is a new epoch: its revisions begin above all that the old one can have given out, so nobody who was ahead of
the backup (nodes, scripts) ever sees a lower one. Each object carries the revision it had (``store_nats.WAS``), and the
store its line (:mod:`edgeward.nodes.ancestry`): with these a node keeps what is newer than the backup.

What lets somebody in does not come back to life. Join tokens are left out: one that was used after the backup would be
good again. Access tokens are left out unless they are asked for. A node that was revoked after the backup is revoked
again where a witness says so (:mod:`edgeward.hub.revoked`): the audit of the hub that is replaced, or a file. Who is
let in as the backup has it is listed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nats.aio.client import Client

from edgeward.core import clock, proc
from edgeward.core.audit import KEEP, Audit
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Invalid, NotFound, Refused
from edgeward.core.files import ensure_dir, read_json
from edgeward.core.identity import HubIdentity
from edgeward.core.natsserver import HubSpec, NatsServer
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.seal import RecoveryKey, read_header, unseal
from edgeward.core.vault import Vault
from edgeward.hub.archive import Data, Decoder, Entry, File, Meta, Stream
from edgeward.hub.backup import RECOVERY_KEY, layout_of, sealed, sealing_key
from edgeward.hub.rebuild import Report, Restorer
from edgeward.hub.revoked import Revoked, of_records

#: Seconds before a backup's date within which something may be missing in it: it takes a while to make.
_OVERLAP = 300.0
#: What a nats-server leaves that belongs to one run of it.
RUNTIME = ("server.json", "nats.log", "nats.err")
#: Bytes that a disk must have beside the backup's own size.
ROOM = 32 << 20


# --- reading a backup ------------------------------------------------------------------------------------------------


def entries(path: Path, key: RecoveryKey) -> Iterator[Entry]:
    """The entries of a backup file. Good for use only after :func:`verify` went through all of them."""
    decoder = Decoder()
    with path.open("rb") as source:
        header = read_header(source, file=str(path))
        try:
            for chunk in unseal(source, header, key=key, file=str(path)):
                yield from decoder.feed(chunk)
            decoder.close()
        except EdgewardError as e:
            e.file = e.file or str(path)
            raise


def verify(path: Path, key: RecoveryKey | None = None, *, signer: bytes = b"") -> Report:
    """Looks at every byte; with ``key`` also at what is inside. Raises ``Invalid`` or ``Refused`` (exit code 3)."""
    with path.open("rb") as source:
        header = read_header(source, file=str(path))
        report = Report(key=header.key_id, notes=header.notes, read=key is not None)
        if key is None:
            for _ in unseal(source, header, file=str(path), signer=signer):
                pass
            return report
    decoder = Decoder()
    with path.open("rb") as source:
        header = read_header(source, file=str(path))
        try:
            for chunk in unseal(source, header, key=key, file=str(path), signer=signer):
                for _ in decoder.feed(chunk):
                    pass
            decoder.close()
        except EdgewardError as e:
            e.file = e.file or str(path)
            raise
    count = decoder.counts
    report.files, report.streams, report.messages = count.files, count.streams, count.messages
    return report


# --- the folder ------------------------------------------------------------------------------------------------------


def hub_directory(data: Path) -> Path | None:
    """The hub's folder in what a user calls a data directory; None when there is none yet."""
    if (data / "hub.json").exists() or ((data / "identity").is_dir() and (data / "nats").is_dir()):
        return data
    if (data / "hub").is_dir() and any((data / "hub").iterdir()):
        return data / "hub"
    return None


def target_of(data: Path, layout: str) -> Path:
    """Where a restored hub belongs in ``data``: as it is laid out already, else as the backup's was."""
    found = hub_directory(data)
    if found is not None:
        return found
    if layout == "system" or any((data / n).exists() for n in ("nodes", "context.json", "hub")):
        return data / "hub"
    return data


def _lock(path: Path, patience: float) -> IO[bytes] | None:
    file = path.open("ab")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() >= deadline:
                file.close()
                return None
        time.sleep(0.02)  # the pace of asking


@contextlib.contextmanager
def unused(data: Path, hub: Path, *, server: bool = True) -> Iterator[None]:
    """Holds the folder's locks, so that nothing starts there meanwhile. Raises ``Refused`` while something runs.

    ``server``: not even the nats-server that a killed hub leaves behind may run.
    """
    locks = [(data, "lock", "a system", 0.0)] if data != hub else []
    # a server that has just ended may hold its lock for a moment more: until its last thread is gone
    locks += [(hub / "nats", "server.lock", "a hub's nats-server", 3.0)] if server else []
    with contextlib.ExitStack() as held:
        for folder, name, who, patience in locks:
            if not folder.is_dir():
                continue
            lock = _lock(folder / name, patience)
            if lock is None:
                raise Refused(f"{who} is running from this directory", resource=str(data), remedy="stop it first")
            held.enter_context(lock)
        state = read_json(hub / "run.json", {})
        pid, start = state.get("pid"), state.get("start")
        if isinstance(pid, int) and start is not None and proc.alive(proc.ProcId(pid, start)):
            raise Refused("a hub is running from this directory", resource=str(hub), remedy="stop it first")
        yield


@asynccontextmanager
async def offline_server(hub: Path) -> AsyncIterator[Client]:
    """A connection to a nats-server on the folder of a hub that does not run; it ends with the block."""
    identity = HubIdentity.open(hub / "identity")
    server = NatsServer(hub / "nats", HubSpec(identity.operator_jwt, identity.system_account, identity.accounts))
    try:
        await server.start()
        bus = await Bus.connect(server.url, name="care", user=identity.user)
        try:
            yield bus.client
        finally:
            await bus.close()
    finally:
        await server.stop()


# --- the way back ----------------------------------------------------------------------------------------------------


def sync_all(folder: Path) -> None:
    """Everything below ``folder`` on the disk, before it is moved to where it counts."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _move_into_place(staging: Path, target: Path) -> Path | None:
    """Gives where the old folder is now. Killed between the two steps, the old one is under its new name, whole."""
    aside = None
    if target.is_dir() and any(target.iterdir()):
        aside = target.with_name(
            f"{target.name}.before-restore-{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(2)}"
        )
        target.rename(aside)
        key = aside / RECOVERY_KEY
        if key.is_file() and not (staging / RECOVERY_KEY).exists():
            with contextlib.suppress(EdgewardError, OSError):
                kept = RecoveryKey.parse(key.read_text())
                if kept.recipient == sealing_key(staging).recipient:  # still good for the restored hub's backups
                    shutil.copy2(key, staging / RECOVERY_KEY)
    elif target.is_dir():
        target.rmdir()
    staging.rename(target)
    for folder in {target.parent}:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)
    return aside


def _witness(old: Path, new: Path, since: str) -> Revoked | None:
    """What the audit of the hub that is replaced knows, if it is the same hub; None where it cannot be read."""
    ours, theirs = (read_json(d / "identity" / "nats.json", {}).get("operator_jwt") for d in (new, old))
    if ours is None or ours != theirs or not (old / "audit.db").is_file():
        return None
    try:
        audit = Audit(old / "audit.db")
        try:
            return of_records(audit.items(limit=2 * KEEP), since)
        finally:
            audit.close()
    except (EdgewardError, OSError, sqlite3.Error):
        return None


async def _testify(staging: Path, known: Revoked) -> None:
    """What was known is in the restored hub's audit: the next restore into this folder finds it there."""
    audit = Audit(staging / "audit.db")
    try:
        for verb, kind, names in (("revoke", "Node", known.nodes), ("delete", "AccessToken", known.tokens)):
            for name in sorted(names):
                await audit.write(verb, Key(kind, CLUSTER, name), actor="restore")
    finally:
        audit.close()


@dataclass
class Source:
    """A backup that was checked, and what its restore is to heed."""

    path: Path
    meta: Meta
    rest: Iterator[Entry]
    report: Report
    #: What is older than this (RFC 3339) is in the backup as it is.
    since: str
    known: Revoked
    with_tokens: bool
    say: Callable[[str], None]


async def open_source(
    path: Path,
    key: RecoveryKey,
    *,
    with_tokens: bool = False,
    revoked: Callable[[str], Revoked] = lambda _: Revoked(),
    say: Callable[[str], None] = lambda _: None,
) -> Source:
    """Checks all of a backup. Raises ``Invalid`` or ``Refused``.

    ``with_tokens``: access tokens are good again, but for those that are known to be revoked. ``revoked``: what was
    since the time that it is given (RFC 3339), beside what the hub that is replaced knows itself.
    """
    say("checking the backup")
    report = await asyncio.to_thread(verify, path, key)
    stream = entries(path, key)
    meta = next(stream)
    if not isinstance(meta, Meta):
        raise Invalid("does not begin as a backup does", file=str(path))
    try:
        since = clock.timestamp(clock.parse_timestamp(meta.made) - _OVERLAP)
    except ValueError:
        since = ""  # all that a witness says counts
    return Source(path, meta, stream, report, since, revoked(since), with_tokens, say)


async def restore(path: Path, data: Path, key: RecoveryKey, **how: Any) -> Report:
    """Puts the hub of a backup into ``data``. Raises ``Invalid`` or ``Refused`` before anything there has changed.

    ``how``: as of :func:`open_source`.
    """
    source = await open_source(path, key, **how)
    report = source.report
    data = data.absolute()
    target = target_of(data, source.meta.layout)
    ensure_dir(target.parent)
    check_room(path, target.parent)
    with unused(data, target):
        staging = target.with_name(f".{target.name}.restore-{secrets.token_hex(4)}")
        ensure_dir(staging)
        try:
            restorer = await restore_into(staging, source, offline_server, old=target)
            await asyncio.to_thread(sync_all, staging)
            aside = _move_into_place(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    report.epoch, report.revision, report.directory = restorer.epoch, restorer.revision, str(target)
    report.moved = str(aside) if aside else ""
    return report


def check_room(backup: Path, folder: Path, copies: int = 1) -> None:
    """What is there already stays beside what is restored. Raises ``Refused``."""
    size = backup.stat().st_size * copies
    wanted, free = size + size // 4 + ROOM, shutil.disk_usage(folder).free
    if free < wanted:
        raise Refused(
            f"has {free >> 20} MiB free, a restore needs {(wanted >> 20) + 1}",
            resource=str(folder),
            remedy="free space, or restore onto a larger disk",
        )


Server = Callable[[Path], contextlib.AbstractAsyncContextManager[Client]]


async def restore_into(
    staging: Path, source: Source, server: Server, *, old: Path | None = None, replicas: int = 1
) -> Restorer:
    """Files and streams of a backup into an empty folder. ``server``: starts what takes the streams, when the files
    are there. ``old``: the folder that is replaced, a witness."""
    known, since, report, say = source.known, source.since, source.report, source.say
    restorer = Restorer(staging, clock.now(), known, report, with_tokens=source.with_tokens, replicas=replicas)
    restorer.meta = source.meta
    say("files")
    first: Entry | None = None
    for first in source.rest:
        if not isinstance(first, File | Data):
            break
        restorer.file(first)
    restorer.end_file()
    if not isinstance(first, Stream):
        raise Invalid("has no streams in it", remedy="it is no backup of a hub that ran")
    if old is not None and (audit := _witness(old, staging, since)) is not None:
        known.add(audit)
        report.witnesses.append(f"the audit of {old}")
    await _testify(staging, known)
    say("resources, events and streams")
    async with server(staging) as client:
        await restorer.streams(client, first, source.rest)
    for name in RUNTIME:
        (staging / "nats" / name).unlink(missing_ok=True)
    return restorer


async def create_offline(data: Path, *, readings: bool = False) -> AsyncIterator[bytes]:
    """The bytes of a backup of a hub that does not run."""
    hub = find_hub(data)
    with unused(data.absolute(), hub, server=False):
        key, vault = sealing_key(hub), Vault.open(hub / "identity")
        async with offline_server(hub) as client:
            async for piece in sealed(client, hub, key, vault, readings=readings, layout=layout_of(hub)):
                yield piece


def find_hub(data: Path) -> Path:
    """The hub's folder in ``data``. Raises ``NotFound``."""
    found = hub_directory(data.absolute())
    if found is None:
        raise NotFound(
            "has no hub in it", resource=str(data), remedy="name the folder that `edgeward up` or a hub uses"
        )
    return found
