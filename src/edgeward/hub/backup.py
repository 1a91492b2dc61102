"""The hub's state as one sealed file: what is copied, in which order, and with which key.

In: a connection to the hub's nats-server and the hub's folder; out: the bytes of a sealed file, piece by piece, while
the hub goes on working. Everything is copied by its kind, not by its meaning: each KV bucket as it stood at one moment,
each other stream up to its end (readings only when asked for: they are the bulk), each SQLite file by SQLite's own
backup, each other file of the folder. What is left out is what belongs to a machine or a run: nats-server's folder,
logs, locks, and the recovery key itself. The vault's key is in it, wherever the hub has it from. The way back is in
:mod:`edgeward.hub.restore`.

Consistent means: buckets are read first, files after them. A file may therefore know of something (an identity) that
the buckets do not name yet, never the other way round.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
from nats.aio.client import Client
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from edgeward import __version__
from edgeward.core import clock
from edgeward.core.access import needs
from edgeward.core.describe import described
from edgeward.core.errors import EdgewardError, Refused, Unreachable
from edgeward.core.files import ensure_dir, read_json, write_atomic, write_json
from edgeward.core.jsread import Message, read_batch
from edgeward.core.seal import Sealer, SealingKey, new_keys
from edgeward.core.streaming import flag
from edgeward.core.vault import Vault
from edgeward.hub.archive import FORMAT, PIECE, Data, End, Entry, File, Meta, Msg, Stream, encode

log = logging.getLogger("edgeward.backup")

BUCKET = "KV_resources"
READINGS = "DATA_"
RECOVERY_KEY = "recovery.key"
VAULT_KEY = "identity/vault.key"
_SEAL_FILE = ("recovery", "seal.json")
#: Names (or endings) of what belongs to this machine or this run.
_NOT = {"nats", "run.json", "lock", "scratch", RECOVERY_KEY}
_NOT_ENDING = (".log", ".pid", ".sock", ".tmp", "-wal", "-shm", "-journal")
_BATCH = 500
_API_WAIT = 10.0
#: Seconds for a cluster to elect, when one of its servers has just gone.
_LEADERS = 30.0


# --- the keys -------------------------------------------------------------------------------------------------------


def sealing_key(data: Path) -> SealingKey:
    """The hub's half of its recovery key. At the first start both are made: ``recovery.key`` is the operator's."""
    path = data.joinpath(*_SEAL_FILE)
    doc = read_json(path, None)
    if doc is not None:
        return SealingKey.parse(doc, file=str(path))
    recovery, sealing = new_keys()
    text = (
        f"# The recovery key {recovery.id} of this Edgeward hub. Whoever has it can read the hub's backups;\n"
        f"# without it nobody can. Move this file to a safe place away from the hub.\n{recovery.text()}\n"
    )
    # in this order: a hub whose other half is missing makes both anew, and nothing was sealed to the first one
    write_atomic(data / RECOVERY_KEY, text)
    ensure_dir(path.parent)
    write_json(path, sealing.document())
    log.warning("the recovery key %s is in %s: move it away from the hub", recovery.id, data / RECOVERY_KEY)
    return sealing


def layout_of(data: Path) -> str:
    """Whether a hub's folder is part of a whole system's (`up`, `lab`) or stands alone."""
    return "system" if data.name == "hub" and (data.parent / "context.json").exists() else "hub"


# --- what is copied -------------------------------------------------------------------------------------------------


def files_of(data: Path) -> list[Path]:
    """The regular files of the hub's folder that are its state, sorted; links are not followed."""
    found: list[Path] = []

    def walk(folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            name = path.name
            if (folder == data and (name in _NOT or name.startswith("."))) or name.endswith(_NOT_ENDING):
                continue
            if path.is_symlink():
                log.warning("not in the backup: %s is a link", path)
            elif path.is_dir():
                walk(path)
            elif path.is_file():
                found.append(path)

    walk(data)
    return found


def _copy_database(path: Path, to: Path) -> None:
    """SQLite's own backup: the file as of one moment, while it is written to."""
    source = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        target = sqlite3.connect(to)
        try:
            source.backup(target)
        finally:
            target.close()
    finally:
        source.close()


def _is_database(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(16) == b"SQLite format 3\0"


def _file_entries(path: Path, name: str) -> Iterator[Entry]:
    with path.open("rb") as f:
        info = path.stat()
        left = info.st_size
        yield File(name, stat.S_IMODE(info.st_mode), left)
        while left:
            piece = f.read(min(PIECE, left))  # what is appended meanwhile is of a later moment
            if not piece:
                raise EdgewardError("became shorter while it was read", file=str(path), remedy="try again")
            left -= len(piece)
            yield Data(piece)


async def js_api(client: Client, verb: str, ask: dict[str, Any]) -> dict[str, Any]:
    try:
        msg = await client.request(f"$JS.API.{verb}", msgspec.json.encode(ask), timeout=_API_WAIT)
    except (nats.errors.Error, TimeoutError) as e:
        raise Unreachable(f"the hub's nats-server does not answer ({type(e).__name__})") from e
    answer: dict[str, Any] = msgspec.json.decode(msg.data)
    if "error" in answer:
        raise EdgewardError(f"the hub's nats-server refused: {answer['error'].get('description')}")
    return answer


class Listing:
    """The pages of a list of streams, put together."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        #: Where the next page begins; streams that are left out count.
        self.at = 0
        self.done = False
        self.whole = True

    def take(self, page: dict[str, Any]) -> None:
        some, without, total = page.get("streams") or [], page.get("missing") or [], int(page.get("total", 0))
        self.found |= {str(s["config"]["name"]): s for s in some}
        self.at += len(some) + len(without)
        self.whole = self.whole and not without
        self.done = self.at >= total or not (some or without)
        if self.done:
            self.whole = self.whole and len(self.found) >= total


async def streams_of(client: Client) -> list[dict[str, Any]]:
    """All streams as the server describes them, by name. Raises ``Unreachable`` when not all can be had.

    A cluster leaves out those that have no leader just now, and only says that it did: a backup without them would look
    whole.
    """
    until = clock.monotonic() + _LEADERS
    while True:
        listing = Listing()
        with contextlib.suppress(Unreachable):  # a cluster that elects who answers for it does not answer
            while not listing.done:
                listing.take(await js_api(client, "STREAM.LIST", {"offset": listing.at}))
        if listing.done and listing.whole:
            return [listing.found[name] for name in sorted(listing.found)]
        if clock.monotonic() >= until:
            raise Unreachable("some of the hub's streams have no leader", remedy="wait for its other servers")
        await asyncio.sleep(0.25)  # the pace of asking


def _msg(message: Message) -> Msg:
    """Without the headers that the server adds, and those that were a condition of the first writing."""
    seq, subject, headers, data = message
    keep = {k: v for k, v in headers.items() if not k.lower().startswith("nats-")}
    return Msg(seq, subject, keep, data)


async def _bucket(client: Client, stream: str) -> list[Msg]:
    """Each key's last message, as of one moment: what is overwritten while this reads comes again behind it."""
    latest: dict[str, Msg] = {}
    at = 1
    while True:
        got = await read_batch(client, "$JS.API", stream, at, ">", _BATCH)
        if not got:
            return sorted(latest.values(), key=lambda m: m.seq)
        for message in got:
            latest[message[1]] = _msg(message)
        at = got[-1][0] + 1


async def _messages(client: Client, stream: str, last: int) -> AsyncIterator[Msg]:
    at = 1
    while at <= last:
        got = await read_batch(client, "$JS.API", stream, at, ">", _BATCH)
        if not got:
            return
        for message in got:
            if message[0] <= last:
                yield _msg(message)
        at = got[-1][0] + 1


async def entries(client: Client, data: Path, vault: Vault, *, readings: bool, layout: str) -> AsyncIterator[Entry]:
    """The backup's entries, in order."""
    streams = await streams_of(client)
    buckets = {
        s["config"]["name"]: await _bucket(client, s["config"]["name"])
        for s in streams
        if s["config"]["name"].startswith("KV_")
    }
    resources = buckets.get(BUCKET, [])
    epoch = next((m.data.decode() for m in resources if m.subject.endswith(".m.epoch")), "")
    revision = max((m.seq for m in resources), default=0)
    yield Meta(FORMAT, __version__, clock.timestamp(), epoch, revision, layout, readings)
    count = End(0, 0, 0)
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=data) as scratch:
        for path in files_of(data):
            name, source = path.relative_to(data).as_posix(), path
            try:
                if await asyncio.to_thread(_is_database, path):
                    source = Path(scratch) / "copy.db"
                    source.unlink(missing_ok=True)
                    await asyncio.to_thread(_copy_database, path, source)
                    shutil.copymode(path, source)
                pieces = _file_entries(source, name)
                first = next(pieces)
            except FileNotFoundError:
                continue  # it went while this worked
            except sqlite3.Error as e:
                raise EdgewardError(f"the database cannot be copied: {e}", file=str(path)) from e
            count.files += 1
            yield first
            for piece in pieces:
                yield piece
    if not (data / VAULT_KEY).exists():  # it comes from this machine's keyring or from systemd
        key = vault.export().encode() + b"\n"
        count.files += 1
        yield File(VAULT_KEY, 0o600, len(key))
        yield Data(key)
    for info in streams:
        name, last = info["config"]["name"], int(info["state"]["last_seq"])
        count.streams += 1
        if name in buckets:
            # the moment of the bucket's reading may be later than the listing's
            last = max([last, *(m.seq for m in buckets[name])])
        yield Stream(name, info["config"], last)
        if name in buckets:
            for m in buckets.pop(name):
                count.messages += 1
                yield m
        elif readings or not name.startswith(READINGS):
            async for m in _messages(client, name, last):
                count.messages += 1
                yield m
    yield count


async def sealed(
    client: Client, data: Path, key: SealingKey, vault: Vault, *, readings: bool = False, layout: str = ""
) -> AsyncGenerator[bytes, None]:
    """The bytes of a whole backup file."""
    sealer: Sealer | None = None
    async for entry in entries(client, data, vault, readings=readings, layout=layout or layout_of(data)):
        if sealer is None:
            meta = msgspec.to_builtins(entry)
            notes = {k: meta[k] for k in ("format", "version", "made", "revision", "readings")}
            sealer = Sealer(key, {"what": "backup of an Edgeward hub", **notes})
        if piece := sealer.update(encode(entry)):
            yield piece
    if sealer is not None:
        yield sealer.finish()


# --- over HTTP -----------------------------------------------------------------------------------------------------


def backup_routes(client: Client, data: Path, key: SealingKey, vault: Vault) -> list[Route]:
    """``GET /api/v1/backup``: a whole sealed file; ``?readings=true`` with what sites delivered."""
    busy = asyncio.Lock()

    @described(
        "The hub's state as one sealed file",
        query={"readings": ("boolean", "With what sites delivered")},
        media="application/octet-stream",
    )
    async def backup(request: Request) -> Response:
        if busy.locked():
            raise Refused("a backup is being made", remedy="wait until it is done")
        pieces = sealed(client, data, key, vault, readings=flag(request, "readings"))
        await busy.acquire()
        try:
            first = await anext(pieces)  # a refusal is an answer of its own, not a file that ends early
        except BaseException:
            busy.release()
            raise

        async def body() -> AsyncIterator[bytes]:
            try:
                yield first
                async for piece in pieces:
                    yield piece
            finally:
                await pieces.aclose()
                busy.release()

        return StreamingResponse(body(), media_type="application/octet-stream", headers={"cache-control": "no-store"})

    return [Route("/api/v1/backup", needs("backup", "Hub")(backup), methods=["GET"])]
