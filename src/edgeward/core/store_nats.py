"""The hub's store: a JetStream KV bucket (`sync_interval: always`, so an acknowledged write is on the disk).

Keys are ``r.<Kind>.<ns>.<name>`` (desired state) and ``s.<Kind>.<ns>.<name>`` (status); the stream's sequence is the
revision of both, so one number orders everything. Writes carry ``Nats-Expected-Last-Subject-Sequence``: of two writers
with the same base one is refused, whichever hub process they come through. The cache follows the stream by direct
reads behind its own sequence, woken by the messages themselves, so a restart of the server costs one read and a lost
wake-up nothing. Buckets stay readable for the ``nats kv`` tool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from edgeward.core import clock
from edgeward.core.bus import cancellable
from edgeward.core.errors import Conflict, EdgewardError, TooLarge, Unreachable
from edgeward.core.jsread import read_batch
from edgeward.core.resource import Key, Resource
from edgeward.core.store import Entry, Store
from edgeward.core.vault import Plain, Vault

log = logging.getLogger("edgeward.store")

#: The header by which an object of a restored bucket names the revision it had in the backup.
WAS = "Ew-Was"
_BATCH = 500
_TIMEOUT = 5.0
#: Seconds after which a write that was not answered is sent again: whoever took it may have died with it.
_ATTEMPT = 1.0
#: nats-server errors.json: JSStreamWrongLastSequenceErrF; JSStreamDuplicateMessageConflict (that very message is being
#: stored). What is out of service for now has the code 503.
_WRONG_LAST, _ON_ITS_WAY = 10071, 10158
_ID = "Nats-Msg-Id"
#: When something was deleted, by the clock of the hub that did it.
_TIME = "Ew-Time"


class NatsStore(Store):
    """Open with :meth:`open`, keep :meth:`run` running; reads work from the cache at once."""

    def __init__(
        self,
        client: Client,
        bucket: str = "resources",
        *,
        domain: str = "",
        vault: Vault | None = None,
        replicas: int = 1,
    ) -> None:
        super().__init__()
        self._vault = vault or Plain()
        self._replicas = replicas
        #: Keys whose stored secrets are not sealed yet.
        self._plain: set[Key] = set()
        self._nc = client
        self._bucket = bucket
        self._stream = f"KV_{bucket}"
        self._prefix = f"$KV.{bucket}."
        self._api = f"$JS.{domain}.API" if domain else "$JS.API"
        self._js = client.jetstream(domain=domain) if domain else client.jetstream()
        self._wake = asyncio.Event()
        self._moved = asyncio.Condition()
        self._statuses: dict[Key, bytes] = {}
        #: The revision of each status, or of its deletion.
        self._status_seq: dict[Key, int] = {}
        self._extra: dict[str, bytes] = {}
        #: The revision that an object had in the store that this one was restored from, while nobody changed it since.
        self.was: dict[Key, int] = {}
        self._extra_seq: dict[str, int] = {}
        #: Random id of this bucket; a node that finds another one starts its replica's sync anew.
        self.epoch = ""

    async def open(self) -> None:
        """Creates the bucket where it is missing and fills the cache."""
        config = StreamConfig(
            name=self._stream,
            subjects=[f"{self._prefix}>"],
            max_msgs_per_subject=1,
            num_replicas=self._replicas,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            allow_rollup_hdrs=True,
            deny_delete=True,
            allow_direct=True,
            max_msg_size=4 * 1024 * 1024,
            duplicate_window=60.0,
        )
        try:
            await self._js.stream_info(self._stream)
        except nats.js.errors.NotFoundError:
            await self._js.add_stream(config)
        await self._nc.subscribe(f"{self._prefix}>", cb=self._woken)
        await self._follow()
        if "m.epoch" not in self._extra:
            with contextlib.suppress(Conflict):  # another hub process was faster: its epoch is read below
                await self._publish("m.epoch", clock.new_id(16).encode(), 0)
        await self._follow()
        self.epoch = self._extra["m.epoch"].decode()

    async def seal(self) -> int:
        """Seals the secrets that an earlier release stored in plain; how many there were."""
        sealed = 0
        while self._plain:
            key = self._plain.pop()
            entry = self._entries.get(key)
            if entry is None:
                continue
            with contextlib.suppress(Conflict):  # written meanwhile, and sealed by that
                await self._put(entry.resource, entry)
                sealed += 1
        return sealed

    async def _woken(self, _: Msg) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Keeps the cache behind the stream; returns never, survives restarts of the server."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2.0):  # a lost wake-up costs at most this
                    await self._wake.wait()
            woken, before = self._wake.is_set(), self.revision
            self._wake.clear()
            try:
                await self._follow()
                if woken and self._replicas > 1 and self.revision == before:
                    # we were told of a message that the replica that we read from does not have yet
                    await asyncio.sleep(0.05)  # the pace of looking again
                    await self._follow()
            except (nats.errors.Error, TimeoutError, EdgewardError) as e:
                log.debug("cannot follow %s: %s", self._stream, e or type(e).__name__)
                self._wake.set()
                async with asyncio.timeout(None):
                    await asyncio.sleep(0.2)  # the pace of asking while the server is away

    # -- reading the stream --------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Direct reads from behind the cache to the end of the stream."""
        # in a cluster the server that was asked may be dead, and another one answers at once
        patience = 1.0 if self._replicas > 1 else _TIMEOUT
        every = f"{self._prefix}>"
        while True:
            got = await read_batch(
                self._nc, self._api, self._stream, self.revision + 1, every, _BATCH, timeout=patience
            )
            for seq, subject, headers, data in got:
                if seq > self.revision:
                    self._take(seq, subject.removeprefix(self._prefix), headers, data)
            if got:
                async with self._moved:
                    self._moved.notify_all()
            if not got:  # a short answer is not the end: the bytes of one are bounded too
                return

    def _take(self, seq: int, name: str, headers: dict[str, str] | None, data: bytes) -> None:
        deleted = (headers or {}).get("KV-Operation") in ("DEL", "PURGE")
        sort, _, rest = name.partition(".")
        if sort == "m":
            self._extra[name] = data
            self._extra_seq[name] = seq
            self.revision = max(self.revision, seq)
            return
        kind, ns, item = rest.split(".", 2)
        key = Key(kind, ns, item)
        if sort == "s":
            self._status_seq[key] = seq
            if deleted:
                self._statuses.pop(key, None)
                self.revision = max(self.revision, seq)
                return
            self._statuses[key] = data
            entry = self._entries.get(key)
            if entry is None:
                self.revision = max(self.revision, seq)
                return
            status = msgspec.json.decode(data)
            self._changed(seq, key, msgspec.structs.replace(entry.resource, status=status), status_only=True)
            return
        if deleted:
            self.was.pop(key, None)
            self._buried[key] = float((headers or {}).get(_TIME) or 0)
            if key in self._entries:
                self._changed(seq, key, None)
            else:
                self._tombs[key] = seq
                self.revision = max(self.revision, seq)
            return
        was = (headers or {}).get(WAS, "")
        if was.isdigit():
            self.was[key] = int(was)
        else:
            self.was.pop(key, None)
        status_data = self._statuses.get(key)
        try:
            resource = self._vault.decode(data, msgspec.json.decode(status_data) if status_data else {})
            if self._vault.is_plain(data):
                self._plain.add(key)
        except (EdgewardError, msgspec.DecodeError) as e:
            # one unreadable object (a newer release's) must not take the others down
            log.error("stored %s is not readable: %s", key, e)
            self.revision = max(self.revision, seq)
            return
        self._changed(seq, key, resource)

    # -- writing ---------------------------------------------------------------------------------------------------

    async def _publish(self, name: str, data: bytes, expect: int | None, *, operation: str = "") -> int:
        # by its id the stream knows a write that is sent again
        headers: dict[str, Any] = {_ID: clock.new_id(16)}
        if expect is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expect)
        if operation:
            headers |= {"KV-Operation": operation, _TIME: str(clock.now())}
        seq = await self._acknowledged(f"{self._prefix}{name}", data, headers)
        if seq == self.revision + 1:
            self._take(seq, name, headers, data)
            async with self._moved:
                self._moved.notify_all()
        elif seq > self.revision:
            await self._reach(seq)
        return seq

    async def _acknowledged(self, subject: str, data: bytes, headers: dict[str, Any]) -> int:
        """Sends until the stream says that it has it, for some seconds: a cluster's leader may have to be elected."""
        until, tries = clock.monotonic() + _TIMEOUT, 0
        while True:
            why: Exception | None = None
            try:
                if self._nc.is_connected:
                    tries += 1
                    limit = min(_ATTEMPT, max(0.1, until - clock.monotonic()))
                    return int((await cancellable(self._js.publish(subject, data, timeout=limit, headers=headers))).seq)
            except nats.js.errors.APIError as e:
                if e.err_code not in (_WRONG_LAST, _ON_ITS_WAY) and e.code != 503:
                    raise EdgewardError(
                        f"the store refused the write: {e.description}", remedy="see the hub's log"
                    ) from e
                why = e
            except nats.errors.MaxPayloadError as e:
                raise TooLarge("is more than one message may hold", remedy="split it") from e
            except (nats.errors.Error, TimeoutError) as e:
                why = e
            if isinstance(why, nats.js.errors.APIError) and why.err_code == _WRONG_LAST:
                # with an earlier try unanswered, it may be that one that is there
                mine = await self._seq_of(subject, headers[_ID]) if tries > 1 else 0
                if mine == 0:
                    raise Conflict(
                        "changed meanwhile", remedy="read it again, repeat your change on what you read"
                    ) from why
                if mine is not None:
                    return mine
            if clock.monotonic() >= until - 0.1:
                raise Unreachable(
                    f"the hub's store does not answer ({type(why).__name__ if why else 'not connected'}); "
                    "the write may or may not have happened",
                    remedy="try again; the revision check makes that safe",
                ) from why
            await asyncio.sleep(0.05)  # the pace of asking while another server takes over

    async def _seq_of(self, subject: str, id: str) -> int | None:
        """Where the last message of ``subject`` is if it is the write ``id``; 0 if it is another, None: no answer."""
        try:
            # the stream's leader says it; a replica may be behind
            last = await cancellable(self._js.get_last_msg(self._stream, subject))
        except nats.js.errors.NotFoundError:
            return 0
        except (nats.errors.Error, TimeoutError):
            return None
        return (last.seq or 0) if (last.headers or {}).get(_ID) == id else 0

    async def _reach(self, seq: int) -> None:
        """Until the cache holds what was just written; other processes write in between."""
        self._wake.set()
        until = clock.monotonic() + _TIMEOUT
        while self.revision < seq:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.25), self._moved:
                    await self._moved.wait_for(lambda: self.revision >= seq)
                    return
            if clock.monotonic() >= until:
                raise Unreachable(
                    "the write is stored, but this process cannot read it back yet", remedy="read it again"
                )
            with contextlib.suppress(nats.errors.Error, TimeoutError, EdgewardError):
                await self._follow()  # nobody else does while the hub starts

    def _base(self, key: Key, old: Entry | None) -> int:
        return old.revision if old else self._tombs.get(key, 0)

    async def _put(self, resource: Resource, old: Entry | None) -> Resource:
        key = resource.key
        try:
            await self._publish(
                f"r.{key.kind}.{key.namespace}.{key.name}", self._vault.encode(resource), self._base(key, old)
            )
        except Conflict as e:
            await self._follow()
            e.resource = str(key)
            raise
        entry = self._entries.get(key)
        return entry.resource if entry else resource

    async def put_status(self, key: Key, status: dict[str, Any], *, checked: bool = False) -> None:
        """``checked``: raises ``Conflict`` when the status is not the one that this process knew."""
        if self.get(key).status == status:
            return
        expect = self._status_seq.get(key, 0) if checked else None
        try:
            await self._publish(f"s.{key.kind}.{key.namespace}.{key.name}", msgspec.json.encode(status), expect)
        except Conflict as e:
            await self._follow()
            e.resource = str(key)
            raise

    async def remove(self, key: Key, *, expect: int | None = None) -> None:
        self.get(key)
        entry = self._entries[key]
        self.check_expected(key, entry, expect)
        base = f"{key.kind}.{key.namespace}.{key.name}"
        try:
            await self._publish(f"r.{base}", b"", expect or entry.revision, operation="DEL")
        except Conflict as e:
            await self._follow()
            e.resource = str(key)
            raise
        if key in self._statuses:
            await self._publish(f"s.{base}", b"", None, operation="DEL")

    # -- small facts of controllers, in the same bucket -------------------------------------------------------------

    def fact(self, name: str) -> bytes | None:
        """A controller's own durable value (``m.<name>``), e.g. the last change taken over from a node."""
        return self._extra.get(f"m.{name}")

    def facts(self, prefix: str) -> dict[str, bytes]:
        """Those whose name begins so, by the rest of their name."""
        start = f"m.{prefix}"
        return {name.removeprefix(start): data for name, data in self._extra.items() if name.startswith(start)}

    def fact_revision(self, name: str) -> int:
        """What :meth:`set_fact` takes as ``expect``; 0 when there is none."""
        return self._extra_seq.get(f"m.{name}", 0)

    async def set_fact(self, name: str, value: bytes, *, expect: int | None = None) -> None:
        """``expect``: the revision it was read at; raises ``Conflict`` when another process was faster."""
        try:
            await self._publish(f"m.{name}", value, expect)
        except Conflict:
            await self._follow()
            raise
