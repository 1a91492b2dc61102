"""The embedded engine: listeners, the table of rules, the cache and the targets' connections of one node's gateway.

A new configuration is made whole beside the present one (``provision``: what cannot be understood or bound raises, and
nothing has changed) and then takes its place at once (``commit``). Requests in progress end by the rules they began
with, connections stay. Nothing here waits for the agent or the hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import shutil
from collections.abc import AsyncIterator, Coroutine, Hashable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from edgeward.core import clock
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.invocation import Invoker
from edgeward.gateway import rules
from edgeward.gateway.accesslog import AccessLog
from edgeward.gateway.balance import Endpoint
from edgeward.gateway.cache import Stored
from edgeward.gateway.calling import FunctionExchange
from edgeward.gateway.desk import Desk
from edgeward.gateway.disk import Disk
from edgeward.gateway.door import Door
from edgeward.gateway.exchange import Exchange
from edgeward.gateway.explain import explain, purge_args
from edgeward.gateway.files import Reader
from edgeward.gateway.guards import Guards
from edgeward.gateway.http1 import FALLBACK, Bad, Request, parse_request
from edgeward.gateway.http2 import request_of
from edgeward.gateway.match import Table, clean
from edgeward.gateway.openings import Opening, Openings
from edgeward.gateway.peer import Peer
from edgeward.gateway.rules import GatewayConfig, Listen, Place, Rule
from edgeward.gateway.shelf import Key, Shelf, key_of
from edgeward.gateway.site import SiteExchange, sites
from edgeward.gateway.squeeze import INLINE, Budget, eligible, press, pressed, takes, with_vary
from edgeward.gateway.stats import disk_metrics, metrics
from edgeward.gateway.statuses import statuses
from edgeward.gateway.tls import Unseal
from edgeward.gateway.upstream import Pool

if TYPE_CHECKING:
    from edgeward.gateway.engine import Planned
    from edgeward.gateway.front import Front

log = logging.getLogger("edgeward.gateway")

#: Connections of clients at once, for all listeners together.
CONNECTIONS = 4096
#: Heads that are remembered with what they meant, and the longest of them.
REMEMBERED = 1024
REMEMBERED_BYTES = 2048
#: Stored answers that are compressed in threads at once.
ZIPPING = 2
#: Seconds between two looks at deadlines while there are connections.
SWEEP = 0.25
#: Proofs for ACME authorities at once.
PROOFS = 256
#: Seconds that a first look at the cache's disk is waited for.
SCAN = 5.0
_SECRET = frozenset({"authorization", "cookie", "proxy-authorization"})


def zipped(stored: Stored, body: bytes) -> Stored:
    """A stored answer's compressed representation."""
    headers = pressed(stored.headers)
    fields = {**stored.fields, **{n: v for n, v in headers if n == "etag"}}
    fields.pop("accept-ranges", None)
    return replace(stored, headers=headers, fields=fields, body=body, written=(-1, b""), squeezable=False, zipped=None)


def _no_vault(sealed: bytes, place: str) -> bytes:
    raise Invalid("this plane has no vault", resource=place)


class Voice(Protocol):
    """By which a room in the plane tells the agent what it has to say."""

    def report(self, kind: str, namespace: str, name: str, status: dict[str, Any] | None) -> None: ...
    def event(self, type: str, reason: str, message: str, namespace: str, name: str, kind: str) -> None: ...


class AnyDoor(Protocol):
    """A client's connection, whatever it speaks."""

    @property
    def listener(self) -> Opening | None: ...
    @property
    def idle(self) -> bool: ...
    @property
    def beginning(self) -> bool: ...
    @property
    def idle_since(self) -> float: ...
    def check(self, now: float) -> None: ...
    def retire(self) -> None: ...
    def drop(self) -> None: ...


class Prepared(NamedTuple):
    config: GatewayConfig
    table: Table[Rule]
    #: Listeners that are new, already bound; they accept when the configuration is taken.
    opened: dict[Listen, asyncio.Server]
    #: For the engine before the plane, when there is one.
    planned: Planned | None = None
    disk: Disk | None = None


class Gate:
    def __init__(
        self, *, node: str, log_file: Path, voice: Voice, invoker: Invoker | None = None, unseal: Unseal | None = None
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.node = node
        self.voice, self.invoker = voice, invoker
        self.config = GatewayConfig()
        self.table: Table[Rule] = Table([])
        self.pool = Pool(log_file.parent / "identity" / "ca.crt")
        self.shelf = Shelf(self.config.memory)
        self.disk: Disk | None = None
        self.access = AccessLog(log_file)
        self.data = log_file.parent
        #: Threads for what waits for a disk.
        self.reader = Reader()
        #: What compression on the way may take; answers that are compressed in a thread.
        self.presses = Budget()
        self._zipping: set[int] = set()
        self.guards = Guards(log_file.parent, self.run_task, self._keys_said)
        self.via_name = f" {node}.edgeward"  # with both its ends: n1 is not n10
        self.via = f"1.1{self.via_name}"
        self.authority = node
        #: Answers that are being fetched, for those who want the same.
        self.fetching: dict[Key, Exchange] = {}
        self.exchanges: set[Exchange] = set()
        self.held = 0  # bytes of bodies in memory (``exchange.HELD``)
        self.doors: dict[AnyDoor, None] = {}  # in the order of their coming
        self.refusals: dict[int, int] = {}
        #: What was written for requests that are remembered: (rule, client, head).
        self.wires: dict[Request, tuple[Rule, str, bytes]] = {}
        #: Events of functions are numbered, behind a name of this run.
        self.calls, self.calls_of = 0, clock.new_id(12)
        #: Proofs for ACME authorities (RFC 8555, section 8.3), by path.
        self.challenges: dict[str, bytes] = {}
        self.openings = Openings(self, unseal or _no_vault)
        self._memo: dict[Any, tuple[Request, Rule | None]] = {}
        self._memo_tls: dict[Any, tuple[Request, Rule | None]] = {}
        self._servers: dict[Listen, asyncio.Server] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy = asyncio.Event()
        self._drained = asyncio.Event()
        self._said: set[str] = set()
        #: The engine that listens in place of this process.
        self.front: Front | None = None
        self._engine_missing = False
        self.verbs = {
            "gateway.explain": self._explain,
            "gateway.purge": self._purge,
            "gateway.stats": self._stats,
            "gateway.challenge": self._challenge,
        }

    # -- configuration -------------------------------------------------------------------------------------------------

    async def provision(self, section: dict[str, Any]) -> Prepared:
        """Raises ``EdgewardError``; then nothing has changed."""
        config = rules.decode(section)
        table = rules.table(
            config, self.table, self.guards.of(config.routes, self.table),
            sites(config.routes, {r.key: r.site for r in self.table.rules if r.site is not None}, self.data),
        )  # fmt: skip
        planned = await self._planned(config, table)
        opened: dict[Listen, asyncio.Server] = {}
        try:
            for listen in () if planned is not None else config.listen:
                if listen not in self._servers and listen not in opened:
                    opened[listen] = await self.loop.create_server(
                        lambda: Door(self), listen.host, listen.port, backlog=1024, start_serving=False
                    )
        except OSError as e:
            for server in opened.values():
                server.close()
            taken = "is in use" if e.errno == errno.EADDRINUSE else (e.strerror or str(e))
            raise EdgewardError(
                f"the gateway cannot listen: {listen.host}:{listen.port} {taken}",
                field="$.gateway.listen",
                remedy="name another address in node.json: gateway: {listen: ADDRESS:PORT}",
            ) from None
        return Prepared(config, table, opened, planned, await self._disk_for(config))

    async def _planned(self, config: GatewayConfig, table: Table[Rule]) -> Planned | None:
        """What an engine before the plane is to do, and that engine at work; None: the plane listens itself."""
        if config.engine == "embedded":
            if self.front is not None:
                await self.front.stop()  # its ports are wanted now
                self.front = None
            return None
        from edgeward.gateway.engine import binary  # what a plane that listens itself does not need
        from edgeward.gateway.front import Front

        if binary() is None:
            if not self._engine_missing:
                self._engine_missing = True
                text = "there is no nginx on this machine: the gateway serves by itself (node.json: gateway.engine)"
                self.voice.event("Warning", "EngineMissing", text, "", "", "Node")
            return None
        if self.front is None:
            self.front = Front(self)
        held = tuple(self._servers)
        try:
            return await self.front.plan(config, table, self._give_up_ports)
        except EdgewardError:
            for listen in held:
                if listen not in self._servers:  # the engine does not start: we listen on
                    self._servers[listen] = await self.loop.create_server(
                        lambda: Door(self), listen.host, listen.port, backlog=1024
                    )
            raise

    async def _give_up_ports(self) -> None:
        """The engine listens in our place from now on."""
        servers, self._servers = self._servers, {}
        for server in servers.values():
            server.close()
        await asyncio.sleep(0)  # they are closed by the loop

    def commit(self, prepared: Prepared) -> None:
        """From here on requests go by the new rules."""
        config = prepared.config
        self._forget_heads()
        listens = () if prepared.planned is not None else config.listen
        gone = [s for listen, s in self._servers.items() if listen not in listens]
        self._servers = {k: s for k, s in self._servers.items() if k in listens} | prepared.opened
        for server in gone:
            server.close()  # its open connections stay
        for server in prepared.opened.values():
            self.run_task(server.start_serving())
        self.config, self.table = config, prepared.table
        self.openings.commit(config.listeners)
        self.shelf.limit = config.memory
        if self.front is not None and prepared.planned is not None:
            self.front.commit(prepared.planned)
        self._take_disk(config, prepared.disk)
        self._report()

    async def _disk_for(self, config: GatewayConfig) -> Disk | None:
        """The cache's disk, with what is on it. One that fails is said; the memory is enough to go on."""
        if not config.disk or self.disk is not None:
            return self.disk
        disk = Disk(
            self.data / "cache", config.disk, self.reader, self.run_task, self._disk_said, lambda key: key in self.shelf
        )
        looking = self.run_task(disk.open())
        await asyncio.wait({looking}, timeout=SCAN)  # a slow one is looked at while requests are answered
        looking.add_done_callback(self._looked)
        return None if looking.done() and looking.exception() is not None else disk

    def _looked(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._disk_said("CacheDiskFailed", f"answers are kept in memory only: {error}")

    def _take_disk(self, config: GatewayConfig, disk: Disk | None) -> None:
        if config.disk:
            self.disk = disk
            if disk is not None:
                disk.resize(config.disk)
            return
        old, self.disk = self.disk, None
        if old is not None:
            old.close()
        with contextlib.suppress(OSError):  # purges would not reach what is left there
            gone = self.data / f"cache.gone-{clock.new_id(8)}"
            (self.data / "cache").rename(gone)
            self.run_task(self.reader.run(shutil.rmtree, gone, True))

    def _disk_said(self, reason: str, text: str) -> None:
        log.warning("%s", text)
        self.voice.event("Normal" if reason == "CacheDiskBack" else "Warning", reason, text, "", "", "Node")

    def _report(self) -> None:
        told = statuses(self.table)
        for key in [*told, *(self._said - told.keys())]:
            namespace, _, name = key.partition("/")
            self.voice.report("Route", namespace, name, told.get(key))
        self._said = set(told)

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks after deadlines until cancelled, then closes all."""
        try:
            while True:
                if not self.doors and not self.exchanges:
                    self.access.flush()
                    self.pool.close()
                    self._busy.clear()
                    await self._busy.wait()
                await asyncio.sleep(SWEEP)
                self._sweep(self.loop.time())
        finally:
            self.close()

    def _sweep(self, now: float) -> None:
        for door in tuple(self.doors):
            door.check(now)
        for exchange in tuple(self.exchanges):
            exchange.check(now)
        self.pool.sweep(now)
        self.access.flush()

    def close(self) -> None:
        for server in self._servers.values():
            server.close()
        self._servers.clear()
        self.openings.close()
        if self.front is not None:
            self.front.close()
        for door in tuple(self.doors):
            door.drop()
        for task in tuple(self._tasks):
            task.cancel()
        self.pool.close()
        if self.disk is not None:
            self.disk.close()
        self.reader.close()
        self.access.flush()

    async def drain(self, patience: float) -> None:
        """Takes no new connections and lets requests in progress end, ``patience`` seconds at most."""
        for server in self._servers.values():
            server.close()
        self.openings.close()
        if self.front is not None:
            await self.front.stop()
            self.front = None
        for door in tuple(self.doors):
            if not isinstance(door, Door):
                door.retire()  # HTTP/2 can say it
        self._drained = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                if self.exchanges:
                    await self._drained.wait()
                if self.disk is not None:
                    await self.disk.settle()

    def run_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def spawn(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that belongs to an exchange; one that fails fails the exchange."""
        task = self.run_task(work)

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("a request of %s failed", exchange.rule, exc_info=error)
                if not exchange.ended:
                    exchange.on_fail(500, "the gateway failed at this request")

        task.add_done_callback(ended)
        return task

    # -- requests ------------------------------------------------------------------------------------------------------

    def entered(self, door: AnyDoor) -> bool:
        if len(self.doors) >= CONNECTIONS:
            # who has begun a request and does not say it to its end comes next: honest heads take no time
            idle = [d for d in self.doors if d.idle] or [d for d in self.doors if d.beginning]
            if not idle:
                return False
            oldest = min(idle, key=lambda d: d.idle_since)
            self.doors.pop(oldest, None)
            oldest.drop()  # who does nothing makes room for who wants something
        self.doors[door] = None
        self._busy.set()
        return True

    def retire(self, listener: Opening) -> None:
        """A listener is declared no longer: its connections end with what they do."""
        for door in tuple(self.doors):
            if door.listener is listener:
                door.retire()

    def left(self, door: AnyDoor) -> None:
        self.doors.pop(door, None)

    def known(self, scheme: str, peer: Peer | None) -> dict[Any, tuple[Request, Rule | None]]:
        """What such clients' heads meant. One with a certificate has nothing in common with others."""
        return {} if peer is not None else self._memo if scheme == "http" else self._memo_tls

    def read(self, head: bytes, scheme: str = "http", peer: Peer | None = None) -> tuple[Request, Rule | None]:
        """The request of a head and its rule (None: no rule takes it). Raises ``Bad``.

        Clients say the same again and again: what a head meant is remembered until the rules change, unless there is
        a secret in it, or a certificate beside it.
        """
        memo = self.known(scheme, peer)
        return memo.get(head) or self._read(parse_request(head, scheme), peer, memo, head, len(head))

    def read2(self, headers: list[tuple[bytes, bytes]], ended: bool, peer: Peer | None) -> tuple[Request, Rule | None]:
        """The same for a request of HTTP/2. ``ended``: it has no body."""
        head, memo = (ended, *headers), self.known("https", peer)
        known = memo.get(head)
        if known is not None:
            return known
        size = sum(len(n) + len(v) for n, v in headers)
        return self._read(request_of(headers, ended, "https"), peer, memo, head, size)

    def _read(
        self,
        request: Request,
        peer: Peer | None,
        memo: dict[Any, tuple[Request, Rule | None]],
        head: Hashable,
        size: int,
    ) -> tuple[Request, Rule | None]:
        request.peer = peer
        request.path, request.query = clean(request.target)
        rule: Rule | None
        try:
            rule = self.table.find(request)
        except Bad:
            rule = None
        guarded = rule is not None and rule.guard is not None
        if rule is not None and request.fields.get(FALLBACK, rule.key) != rule.key:
            rule = None  # another site's gateway asks for a Route that is not the one here
        if peer is None and size <= REMEMBERED_BYTES and not guarded and not _SECRET & request.fields.keys():
            if len(memo) >= REMEMBERED:
                self._forget_heads()
            request.known = True
            memo[head] = request, rule
        return request, rule

    def _forget_heads(self) -> None:
        self._memo.clear()
        self._memo_tls.clear()
        self.wires.clear()

    def via_of(self, request: Request) -> str:
        """What this gateway says of a request that it passes on (RFC 9110, section 7.6.3)."""
        return self.via if request.minor < 2 else f"2.0{self.via_name}"

    def exchange(self, door: Desk | None, request: Request, rule: Rule, client: str, **more: Any) -> Exchange:
        kind: type[Exchange] = Exchange
        if rule.config.to == "function":
            kind = FunctionExchange
        elif rule.site is not None:
            kind = SiteExchange
        return kind(self, door, request, rule, client, **more)

    def renew(self, request: Request, rule: Rule, client: str, key: Key, stored: Stored) -> None:
        """Asks again for what was just given stale; nobody waits for it."""
        exchange = self.exchange(None, request, rule, client, key=key, stored=stored, fwd="stale")
        self.exchanges.add(exchange)
        self._busy.set()
        self.fetching.setdefault(key, exchange)
        exchange.attempt()

    def keep(self, key: Key, rule: Rule, stored: Stored, old: Stored | None = None) -> None:
        """Into the cache. ``old``: what it was, of which the body is the same."""
        if rule.compress is not None and eligible(rule.compress, stored.status, stored.fields, len(stored.body)):
            stored.squeezable = True
            stored.headers = with_vary(stored.headers)
            if old is not None and old.zipped is not None:
                stored.zipped = zipped(stored, old.zipped.body)
        self.shelf.put(key, stored)
        if self.disk is not None and rule.cache is not None and rule.cache.disk:
            self.disk.keep(key, stored, same_body=old is not None)

    def fitting(self, key: Key, stored: Stored, request: Request) -> Stored:
        """What is kept, in the representation that the client takes. Large ones are compressed in a thread; until that
        is done they are given as they are."""
        if not stored.squeezable or stored.blob is not None or not takes(request):
            return stored
        if stored.zipped is None:
            if len(stored.body) <= INLINE:
                stored.zipped = zipped(stored, press(stored.body))
                self.shelf.grew(key, stored, stored.zipped.size)
            elif len(self._zipping) < ZIPPING and id(stored) not in self._zipping:
                self._zipping.add(id(stored))
                self.run_task(self._zip(key, stored))
        return stored.zipped or stored

    async def _zip(self, key: Key, stored: Stored) -> None:
        try:
            made = zipped(stored, await self.reader.run(press, stored.body))
            stored.zipped = made
            self.shelf.grew(key, stored, made.size)
        finally:
            self._zipping.discard(id(stored))

    def forget(self, request: Request) -> None:
        """RFC 9111, section 4.4: an unsafe request that succeeded makes what is kept of its target unsure."""
        key = key_of(request)
        self.shelf.drop(key)
        if self.disk is not None:
            self.disk.drop(key)

    def hit(
        self, client: str, request: Request, rule: Rule, stored: Stored | None, status: int, size: int, word: str
    ) -> None:
        """Answered by the gateway itself; ``stored``: from the cache."""
        if stored is not None:
            stored.hits += 1
        rule.counters.count(status, 0.0, size, word)
        if self.config.access_log == "all":
            self.access.add(
                (clock.now(), client, request.method, request.authority, request.path + request.query, status, size,
                 0.0, rule.key, rule.config.target, word)
            )  # fmt: skip

    def finished(self, exchange: Exchange) -> None:
        self.exchanges.discard(exchange)
        if not self.exchanges:
            self._drained.set()
        rule, request = exchange.rule, exchange.request
        took = clock.monotonic() - exchange.started
        status = exchange.status or 499
        rule.counters.count(status, took, exchange.size, exchange.cache_word)
        if len(rule.places) > 1:
            places = rule.counters.places
            places[exchange.place.kind] = places.get(exchange.place.kind, 0) + 1
        if self.config.access_log == "all" or (self.config.access_log == "errors" and status >= 400):
            target = str(exchange.endpoint) if exchange.endpoint is not None else rule.config.target
            place = (str(exchange.place), "; ".join(exchange.because)) if len(rule.places) > 1 else ()
            self.access.add(
                (clock.now(), exchange.client, request.method, request.authority, request.path + request.query, status,
                 exchange.size, took, rule.key, target, exchange.cache_word, *place)
            )  # fmt: skip

    def refused(self, client: str, request: Request | None, status: int) -> None:
        self.refusals[status] = self.refusals.get(status, 0) + 1
        if self.config.access_log != "off":
            said = (request.method, request.authority, request.path + request.query) if request else ("", "", "")
            self.access.add((clock.now(), client, *said, status, 0, 0.0, "", "", ""))

    def _keys_said(self, url: str, why: str) -> None:
        """An issuer's keys were fetched, or (``why``) were not."""
        for rule in self.table.rules:
            auth = rule.config.auth
            if auth is not None and auth.jwt is not None and auth.jwt.url == url and why:
                namespace, _, name = rule.key.partition("/")
                text = f"the keys at {url} cannot be fetched, the last ones hold: {why}"
                self.voice.event("Warning", "KeysNotFetched", text, namespace, name, "Route")

    def opened(self, rule: Rule, place: Place, endpoint: Endpoint, why: str) -> None:
        """An endpoint failed so often that it is left alone for a while."""
        namespace, _, name = rule.key.partition("/")
        text = f"{place.target} at {endpoint} is left alone for {rule.config.pause:g} s: {why}"
        self.voice.event("Warning", "CircuitOpen", text, namespace, name, "Route")

    # -- verbs of the control socket ---------------------------------------------------------------------------------

    async def _explain(self, args: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        doc = explain(self.table, self.shelf, args, self.loop.time(), clock.now(), self.disk)
        if self.front is not None and "route" in doc:
            doc["engine"] = self.front.explain(next(r for r in self.table.rules if r.key == doc["route"]))
        yield doc

    async def _purge(self, args: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        what = purge_args(args)
        gone = self.disk.purge(**what) if self.disk is not None else []
        only = [m for m in gone if not self.shelf.has(m.key, m.owner, m.varied)]
        n = self.shelf.purge(**what) + len(only)
        if self.disk is not None and gone:
            await self.disk.settle()  # a power cut from here on brings nothing back
        yield {"purged": n}

    async def _challenge(self, args: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What ACME authorities shall find under which path, in place of what there was."""
        proofs = args.get("proofs")
        if not isinstance(proofs, dict) or len(proofs) > PROOFS:
            raise Invalid(f"proofs are an object of at most {PROOFS} texts", field="proofs")
        self.challenges = {str(k): str(v).encode() for k, v in proofs.items()}
        yield {"proofs": len(self.challenges)}

    async def _stats(self, args: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        values = metrics(self.table, self.shelf, self.pool, self.refusals, len(self.doors), self.access.dropped)
        values["edgeward_gateway_compress_refused_total"] = float(self.presses.refused)
        if self.disk is not None:
            values |= disk_metrics(self.disk)
        values |= self.openings.metrics()
        yield {"metrics": values | (self.front.numbers() if self.front is not None else {})}

    @property
    def addresses(self) -> list[str]:
        return [f"{listen.host}:{listen.port}" for listen in self._servers]
