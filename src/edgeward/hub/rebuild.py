"""A backup's entries become files and streams again; what lets somebody in is sifted on the way.

In: entries in the backup's order, a folder, a connection to the nats-server(s) that take the streams. Out: the same
state in a new epoch, and a :class:`Report` of who is let in by it. Where it happens is :mod:`edgeward.hub.restore`'s.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client

from edgeward.core import clock
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.files import ensure_dir
from edgeward.core.store_nats import WAS
from edgeward.core.vault import Vault
from edgeward.hub.archive import Data, Entry, File, Meta, Msg, Stream, safe_path
from edgeward.hub.backup import BUCKET, VAULT_KEY, js_api
from edgeward.hub.revoked import Revoked
from edgeward.nodes.ancestry import LINE_MOST, Ancestor
from edgeward.nodes.enrol import Member
from edgeward.nodes.enrol_cloud import MEMBER, REVOKE

#: Revisions that an epoch may use up at least (30 years at a thousand writes a second).
_SPAN = 1 << 40
_YEAR_2020 = 1_577_836_800
_IN_FLIGHT = 256
#: Seconds for those in flight, each of them a durable write.
_TAKE = 60.0


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


def _config(config: dict[str, Any], first: int, replicas: int) -> dict[str, Any]:
    """The stream's configuration on new servers."""
    kept = {k: v for k, v in config.items() if k not in ("placement", "sealed", "mirror", "sources", "first_seq")}
    kept["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if not k.startswith("_nats.")}
    return {**kept, "num_replicas": replicas, "first_seq": first}


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


class Restorer:
    def __init__(
        self, staging: Path, now: float, revoked: Revoked, report: Report, *, with_tokens: bool, replicas: int
    ) -> None:
        self.staging, self._replicas = staging, replicas
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
            await js_api(client, f"STREAM.CREATE.{stream.name}", _config(stream.config, first, self._replicas))
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
