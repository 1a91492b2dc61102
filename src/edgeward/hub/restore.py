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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client

from edgeward.core import clock, proc
from edgeward.core.audit import KEEP, Audit
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Invalid, NotFound, Refused, Unreachable
from edgeward.core.files import ensure_dir, read_json
from edgeward.core.identity import HubIdentity
from edgeward.core.natsserver import HubSpec, NatsServer
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.seal import RecoveryKey, read_header, unseal
from edgeward.core.store_nats import WAS
from edgeward.core.vault import Vault
from edgeward.hub.archive import Data, Decoder, Entry, File, Meta, Msg, Stream, safe_path
from edgeward.hub.backup import BUCKET, RECOVERY_KEY, VAULT_KEY, js_api, layout_of, sealed, sealing_key
from edgeward.hub.revoked import Revoked, of_records
from edgeward.nodes.ancestry import LINE_MOST, Ancestor
from edgeward.nodes.enrol import Member
from edgeward.nodes.enrol_cloud import MEMBER, REVOKE

#: Revisions that an epoch may use up at least (30 years at a thousand writes a second).
_SPAN = 1 << 40
_YEAR_2020 = 1_577_836_800
#: Seconds before a backup's date within which something may be missing in it: it takes a while to make.
_OVERLAP = 300.0
_IN_FLIGHT = 256
#: Seconds for those in flight, each of them a durable write.
_TAKE = 60.0
#: Bytes that a disk must have beside the backup's own size.
ROOM = 32 << 20


@dataclass
class Report:
    """What a verification saw, or a restore did."""

    key: str = ""
    read: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    files: int = 0
    streams: int = 0
    messages: int = 0
    #: The rest is a restore's.
    epoch: str = ""
    revision: int = 0
    directory: str = ""
    moved: str = ""
    #: Nodes that are let in as the backup has them, and those that are revoked by a witness.
    nodes: list[str] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)
    #: Access tokens that are good again, and those that were left out.
    tokens: list[str] = field(default_factory=list)
    #: Who knew of revocations after the backup.
    witnesses: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        doc: dict[str, Any] = {"backup": self.notes, "key": self.key, "decrypted": self.read}
        if self.read:
            doc |= {"files": self.files, "streams": self.streams, "messages": self.messages}
        if self.directory:
            doc |= {"epoch": self.epoch, "revision": self.revision, "directory": self.directory}
            doc |= {"nodes": self.nodes, "revoked": self.revoked, "witnesses": self.witnesses}
            doc |= {"tokens": self.tokens, "tokensLeftOut": self.left_out}
        if self.moved:
            doc["movedAside"] = self.moved
        return doc


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


def _config(config: dict[str, Any], first: int) -> dict[str, Any]:
    """The stream's configuration on a single new server."""
    kept = {k: v for k, v in config.items() if k not in ("placement", "sealed", "mirror", "sources", "first_seq")}
    kept["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if not k.startswith("_nats.")}
    return {**kept, "num_replicas": 1, "first_seq": first}


def first_revision(last: int, now: float) -> int:
    """The first revision of a restored store: above any that the old one, or another restore, can have given out.

    Far above the backup's last, and by the clock (four million a second since 2020), so that the same backup restored
    twice does not use the same numbers twice. It stays below 2**53 until the year 2088.
    """
    return max(last + _SPAN, int(max(0.0, now - _YEAR_2020) * (1 << 22)))


class _Publisher:
    """Writes one stream's messages in order, a bounded number in flight."""

    def __init__(self, client: Client) -> None:
        self._js = client.jetstream(publish_async_max_pending=_IN_FLIGHT)
        self._waiting: list[asyncio.Future[Any]] = []
        self.last = 0

    async def put(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        self._waiting.append(
            await self._js.publish_async(subject, data, wait_stall=10.0, headers=dict(headers) or None)
        )
        if len(self._waiting) >= _IN_FLIGHT:
            await self.flush()

    async def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        try:
            async with asyncio.timeout(_TAKE):
                acks = await asyncio.gather(*waiting)
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as e:
            raise Unreachable(
                f"nats-server did not take the backup: {e or type(e).__name__}", remedy="is there room on the disk?"
            ) from e
        self.last = int(acks[-1].seq)


class _Restorer:
    def __init__(self, staging: Path, now: float, revoked: Revoked, report: Report, *, with_tokens: bool) -> None:
        self.staging = staging
        self._revoked, self._report, self._with_tokens = revoked, report, with_tokens
        self._vault: Vault | None = None
        self._now = now
        self._out: IO[bytes] | None = None
        self.meta: Meta | None = None
        self.epoch = clock.new_id(16)
        self.revision = 0

    def file(self, entry: File | Data) -> None:
        if isinstance(entry, Data):
            if self._out is not None:
                self._out.write(entry.data)
            return
        self.end_file()
        path = self.staging.joinpath(*safe_path(entry.path).parts)
        ensure_dir(path.parent)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._out = os.fdopen(fd, "wb")
        os.fchmod(fd, entry.mode & 0o755)

    def end_file(self) -> None:
        if self._out is not None:
            self._out.close()
            self._out = None

    async def streams(self, client: Client, entry: Stream, rest: Iterator[Entry]) -> None:
        """This stream and all that follow."""
        following: Entry | None = entry
        while isinstance(following, Stream):
            stream = following
            bucket = stream.name.startswith("KV_")
            first = first_revision(stream.last, self._now) if bucket else stream.last + 1_000_000
            await js_api(client, f"STREAM.CREATE.{stream.name}", _config(stream.config, first))
            publisher = _Publisher(client)
            line: list[Ancestor] = []
            count = 0
            following = None
            for following in rest:
                if not isinstance(following, Msg):
                    break
                headers, name = following.headers, following.subject
                if stream.name == BUCKET:
                    name = following.subject.removeprefix("$KV.resources.")
                    if name == "m.line":
                        line = msgspec.json.decode(following.data, type=list[Ancestor])
                    if name in ("m.line", "m.epoch", f"m.{REVOKE}") or not self._lets_in(name, following):
                        continue
                    if name.startswith("r.") and "KV-Operation" not in headers:
                        headers = {**headers, WAS: str(following.seq)}
                await publisher.put(following.subject, following.data, headers)
                count += 1
            if stream.name == BUCKET and self.meta is not None:
                end = first + count + 1  # with the line and the epoch behind it
                line = [*line, Ancestor(self.meta.epoch, self.meta.revision, end)][-LINE_MOST:]
                await publisher.put("$KV.resources.m.line", msgspec.json.encode(line), {})
                await publisher.put("$KV.resources.m.epoch", self.epoch.encode(), {})
                # the hub does it before it takes any node's word (nodes/enrol_cloud.py)
                await publisher.put(f"$KV.resources.m.{REVOKE}", msgspec.json.encode(self._report.revoked), {})
                count += 3
                self.revision = end + 1
            if stream.name == "RECORDS" and self.meta is not None:
                await publisher.put("ew.rec.events", msgspec.json.encode(self._event(self.meta)), {})
                count += 1
            await publisher.flush()
            if count and publisher.last != first + count - 1:
                raise EdgewardError(f"stream {stream.name} did not take all: {publisher.last - first + 1} of {count}")

    def _lets_in(self, name: str, message: Msg) -> bool:
        """Whether a key of the bucket is restored; says in the report what it lets in."""
        sort, _, rest = name.partition(".")
        kind, _, item = rest.partition("._.")
        if sort in ("r", "s") and kind == "JoinToken":
            return False
        if sort in ("r", "s") and kind == "AccessToken":
            kept = self._with_tokens and item not in self._revoked.tokens
            if sort == "r" and "KV-Operation" not in message.headers:
                (self._report.tokens if kept else self._report.left_out).append(item)
            return kept
        if name.startswith(f"m.{MEMBER}") and self._holds(name.removeprefix("m."), message.data):
            node = name.removeprefix(f"m.{MEMBER}")
            (self._report.revoked if node in self._revoked.nodes else self._report.nodes).append(node)
        return True

    def _holds(self, fact: str, data: bytes) -> bool:
        """Whether somebody holds this node's name, as the backup has it; in doubt yes."""
        try:
            if self._vault is None:
                self._vault = Vault.of_file(self.staging / VAULT_KEY)
            member = msgspec.json.decode(self._vault.unseal(data, fact), type=Member)
        except (EdgewardError, OSError, msgspec.DecodeError):
            return True
        return bool(member.key or member.legacy) and not member.revoked

    def _event(self, meta: Meta) -> dict[str, str]:
        nodes, revoked, tokens, out = (
            len(x) for x in (self._report.nodes, self._report.revoked, self._report.tokens, self._report.left_out)
        )
        return {
            "time": clock.timestamp(),
            "type": "Warning",
            "reason": "HubRestored",
            "resource": "Hub",
            "message": f"restored from the backup of {meta.made} (revision {meta.revision}); what was written since is "
            "kept by the sites that have it, and is in the journal as they send it; "
            f"nodes let in as the backup has them: {nodes}, revoked since: {revoked}; "
            f"access tokens good again: {tokens}, left out: {out}",
        }


def _sync_all(folder: Path) -> None:
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


async def restore(
    path: Path,
    data: Path,
    key: RecoveryKey,
    *,
    with_tokens: bool = False,
    revoked: Callable[[str], Revoked] = lambda _: Revoked(),
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Puts the hub of a backup into ``data``. Raises ``Invalid`` or ``Refused`` before anything there has changed.

    ``with_tokens``: access tokens are good again, but for those that are known to be revoked. ``revoked``: what was
    since the time that it is given (RFC 3339), beside what the hub that is replaced knows itself.
    """
    say("checking the backup")
    report = await asyncio.to_thread(verify, path, key)
    stream = entries(path, key)
    meta = next(stream)
    if not isinstance(meta, Meta):
        raise Invalid("does not begin as a backup does", file=str(path))
    data = data.absolute()
    target = target_of(data, meta.layout)
    try:
        since = clock.timestamp(clock.parse_timestamp(meta.made) - _OVERLAP)
    except ValueError:
        since = ""  # all that a witness says counts
    known = revoked(since)
    ensure_dir(target.parent)
    _check_room(path, target.parent)
    with unused(data, target):
        staging = target.with_name(f".{target.name}.restore-{secrets.token_hex(4)}")
        ensure_dir(staging)
        try:
            restorer = await _restore_into(staging, meta, stream, say, target, known, since, report, with_tokens)
            await asyncio.to_thread(_sync_all, staging)
            aside = _move_into_place(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    report.epoch, report.revision, report.directory = restorer.epoch, restorer.revision, str(target)
    report.moved = str(aside) if aside else ""
    return report


def _check_room(backup: Path, folder: Path) -> None:
    """What is there already stays beside what is restored. Raises ``Refused``."""
    size = backup.stat().st_size
    wanted, free = size + size // 4 + ROOM, shutil.disk_usage(folder).free
    if free < wanted:
        raise Refused(
            f"has {free >> 20} MiB free, a restore needs {(wanted >> 20) + 1}",
            resource=str(folder),
            remedy="free space, or restore onto a larger disk",
        )


async def _restore_into(
    staging: Path,
    meta: Meta,
    rest: Iterator[Entry],
    say: Callable[[str], None],
    old: Path,
    known: Revoked,
    since: str,
    report: Report,
    with_tokens: bool,
) -> _Restorer:
    restorer = _Restorer(staging, clock.now(), known, report, with_tokens=with_tokens)
    restorer.meta = meta
    say("files")
    first: Entry | None = None
    for first in rest:
        if not isinstance(first, File | Data):
            break
        restorer.file(first)
    restorer.end_file()
    if not isinstance(first, Stream):
        raise Invalid("has no streams in it", remedy="it is no backup of a hub that ran")
    if (audit := _witness(old, staging, since)) is not None:
        known.add(audit)
        report.witnesses.append(f"the audit of {old}")
    await _testify(staging, known)
    say("resources, events and streams")
    async with offline_server(staging) as client:
        await restorer.streams(client, first, rest)
    for name in ("server.json", "nats.log", "nats.err"):
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
