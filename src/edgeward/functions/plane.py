"""The functions' share of a node's data plane: the dispatcher with its configuration, its control verbs, its memory.

What a function last ran well with is kept in ``functions/good.json``, and which version was taken back and why: a plane
that starts in the middle of an update or of a canary, or with a version that turns out bad, goes on with it, without
the cloud. Secret values are sealed there too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from edgeward.core import clock
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.files import read_json, write_atomic
from edgeward.core.invocation import Call, CallFailed, Event, Reply
from edgeward.functions.clockwork import Clockwork
from edgeward.functions.dispatcher import Dispatcher
from edgeward.functions.edge import place
from edgeward.functions.inlets import Inlets
from edgeward.functions.measure import with_memory
from edgeward.functions.relay import Head
from edgeward.functions.stats import metrics
from edgeward.functions.triggers import Reach
from edgeward.functions.versions import Config

if TYPE_CHECKING:
    from edgeward.core.vault import Vault

log = logging.getLogger("edgeward.functions")

_PIECE = 48 * 1024

Verb = Callable[[dict[str, Any]], AsyncIterator[dict[str, Any]]]


class Voice(Protocol):
    def report(self, kind: str, namespace: str, name: str, status: dict[str, Any] | None) -> None: ...
    def event(self, type: str, reason: str, message: str, namespace: str, name: str, kind: str) -> None: ...


class Entry(msgspec.Struct, omit_defaults=True):
    """One function as it lies in the plane's configuration and in ``good.json``."""

    key: str
    digest: str = ""
    config: Config | None = None
    sealed: str = ""
    #: Why it is not complete yet, and what its status says meanwhile.
    waiting: str = ""
    phase: str = "Pending"
    generation: int = 0
    #: What a canary is tried beside, for a node that did not have it.
    before: Entry | None = None


class Prepared(msgspec.Struct):
    """What was made ready. ``reach``: how the node's broker is reached; None: it is not there yet."""

    entries: list[Entry]
    reach: Reach | None


class Kept(msgspec.Struct, omit_defaults=True):
    """``good.json``. ``verdicts``: by function, the version that was taken back here, and why."""

    good: list[Entry] = []
    verdicts: dict[str, tuple[str, str]] = {}


class FunctionsPart:
    def __init__(self, *, data: Path, node: str, site: str, voice: Voice) -> None:
        self._data = data
        self._vault: Vault | None = None
        self._voice = voice
        self.dispatcher = Dispatcher(
            data / "functions",
            node,
            site,
            report=self._report,
            tell=lambda type, reason, message, ns, name: voice.event(type, reason, message, ns, name, "Function"),
            good=self._good,
            judged=self._judged,
        )
        self._clockwork = Clockwork(data / "functions" / "cron.json", node, self.dispatcher.invoke, self._failed)
        self._inlets = Inlets(node, data / "functions", self.dispatcher.invoke, self._changed, self._warned)
        self.dispatcher.asks.publisher = self._inlets.publish
        self._node = node
        self._known: dict[str, Entry] = {}
        self._keep = data / "functions" / "good.json"
        kept = self._read_kept()
        self._kept: dict[str, Entry] = {e.key: e for e in kept.good}
        self._verdicts = kept.verdicts
        #: What was kept before the version that is kept now: where a version that is taken back goes back to.
        self._former: dict[str, Entry] = {}
        self._serial = 0
        self._unwritten = asyncio.Event()
        self._some = asyncio.Event()
        self.verbs: Mapping[str, Verb] = {
            "invoke": self._invoke,
            "functions.stats": self._stats,
            "functions.numbers": self._numbers,
            "functions.deadletters": self._deadletters,
        }

    async def invoke(self, call: Call) -> Reply:
        return await self.dispatcher.invoke(call)

    def _failed(self, key: str, error: CallFailed) -> None:
        """A call that nobody waits for has failed."""
        namespace, _, name = key.partition("/")
        self._voice.event(
            "Warning", "TriggerFailed", f"called by its schedule: {error.message}", namespace, name, "Function"
        )

    def _report(self, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        if status is not None:
            status = self._inlets.adorn(f"{namespace}/{name}", status)
        self._voice.report("Function", namespace, name, status)

    def _changed(self, key: str) -> None:
        """Something of its triggers looks otherwise."""
        status = self.dispatcher.status(key)
        if status is not None:
            namespace, _, name = key.partition("/")
            self._report(namespace, name, status)

    def _warned(self, key: str, reason: str, message: str) -> None:
        namespace, _, name = key.partition("/")
        self._voice.event("Warning", reason, message, namespace, name, "Function")

    # -- configuration -------------------------------------------------------------------------------------------------

    async def provision(self, section: dict[str, Any]) -> Prepared | None:
        """Makes the section ready. Raises ``Invalid``; then nothing has changed."""
        if "functions" not in section:
            return None  # nothing is said: no reason to forget what functions remember
        try:
            entries = msgspec.convert(section["functions"], list[Entry])
            reach = msgspec.convert(section.get("broker"), Reach | None)
        except msgspec.ValidationError as e:
            raise Invalid(f"the functions are not understood: {e}", field="$.functions") from None
        for entry in entries:
            self._opened(entry)
            if entry.before is not None:
                self._opened(entry.before)
        return Prepared(entries, reach)

    def commit(self, prepared: Prepared | None) -> None:
        configs, fallbacks, known, held = [], {}, {}, {}
        for given in prepared.entries if prepared is not None else []:
            entry = given if given.config is not None else self._known.get(given.key)
            if entry is None:
                namespace, _, name = given.key.partition("/")
                status: dict[str, Any] = {"phase": given.phase, "message": given.waiting}
                if given.phase != "Pending":  # this is how it is, not how it begins
                    status["observedGeneration"] = given.generation
                self._voice.report("Function", namespace, name, status)
                continue
            if given.config is None:
                held[entry.key] = (given.phase, given.waiting, given.generation)
            known[entry.key] = entry
            configs.append(self._opened(entry))
            kept = self._kept.get(entry.key) or entry.before
            if kept is not None and kept.digest != entry.digest:
                try:
                    fallbacks[entry.key] = self._opened(kept).version
                except EdgewardError as e:
                    log.warning("%s: the version that ran before cannot be used: %s", entry.key, e)
        self._known = known
        if prepared is not None:
            keys = {e.key for e in prepared.entries}
            self.dispatcher.spawn(self.dispatcher.asks.memory.keep(keys))
            self._inlets.configure(configs, keys, keys - known.keys(), prepared.reach)
        if (self._kept.keys() | self._verdicts.keys()) - known.keys():
            self._kept = {k: v for k, v in self._kept.items() if k in known}
            self._verdicts = {k: v for k, v in self._verdicts.items() if k in known}
            self._unwritten.set()
        self.dispatcher.configure(configs, fallbacks, dict(self._verdicts), held)
        self._clockwork.configure({c.version.key: c.policy.crons for c in configs})
        if configs:
            self._some.set()

    def _opened(self, entry: Entry) -> Config:
        """The configuration with its secret values in it."""
        if entry.config is None or not entry.sealed:
            return entry.config  # type: ignore[return-value]  # asked only of those that are whole
        if self._vault is None:
            from edgeward.core.vault import Vault  # some megabytes that a node without such secrets does not need

            self._vault = Vault.open(self._data / "identity")
        try:
            sealed = base64.b64decode(entry.sealed, validate=True)
        except binascii.Error:
            raise Invalid("its secret values are damaged", resource=f"Function/{entry.key}") from None
        plain = msgspec.json.decode(self._vault.unseal(sealed, place(entry.key, entry.digest)), type=dict[str, str])
        secrets: dict[str, dict[str, str]] = {name: {} for name in entry.config.version.secrets}
        for name in [k for k in plain if "/" in k]:
            secret, _, key = name.partition("/")
            secrets[secret][key] = plain.pop(name)
        env = {**plain, **entry.config.version.env}
        version = msgspec.structs.replace(entry.config.version, env=env, secrets=secrets)
        return Config(version, entry.config.policy)

    def _good(self, config: Config) -> None:
        """A version took over, or was put back into its place."""
        key, digest = config.version.key, config.version.digest
        kept = self._kept.get(key)
        if kept is not None and kept.digest == digest:
            return
        for entry in (self._known.get(key), self._former.get(key)):
            if entry is not None and entry.digest == digest:
                if kept is not None:
                    self._former[key] = kept
                self._kept[key] = msgspec.structs.replace(entry, before=None)
                self._unwritten.set()
                return

    def _judged(self, key: str, verdict: tuple[str, str] | None) -> None:
        """A version was taken back, or is to be tried again."""
        if verdict is not None:
            self._verdicts[key] = verdict
        else:
            self._verdicts.pop(key, None)
        self._unwritten.set()

    def _read_kept(self) -> Kept:
        try:
            return msgspec.convert(read_json(self._keep, {}), Kept)
        except (EdgewardError, msgspec.ValidationError) as e:
            log.error("what ran well before is not readable, so it is no way back: %s", e)
            return Kept()

    async def _write_kept(self) -> None:
        while True:
            await self._unwritten.wait()
            self._unwritten.clear()
            data = msgspec.json.encode(Kept(sorted(self._kept.values(), key=lambda e: e.key), self._verdicts))
            await asyncio.to_thread(write_atomic, self._keep, data)

    async def run(self) -> None:
        """Until cancelled. The sandbox is probed when there is something to put into it."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.dispatcher.run())
            group.create_task(self._write_kept())
            group.create_task(self._clockwork.run())
            group.create_task(self._inlets.run())
            await self._some.wait()
            try:
                await self.dispatcher.probe()
            except EdgewardError as e:
                log.error("the sandbox cannot be probed: %s", e)

    # -- verbs -----------------------------------------------------------------------------------------------------

    async def _invoke(self, args: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """``{head}``, then ``{data}`` (base64) as often as need be. A call that failed is an answer too."""
        now = asyncio.get_running_loop().time()
        timeout = float(args.get("within") or 0.0)
        self._serial += 1
        event = Event(
            id=f"{self._node}-{int(clock.now() * 1000):x}-{self._serial:x}",
            source=f"/nodes/{self._node}/invoke",
            type=str(args.get("type") or "edgeward.invoke"),
            data=base64.b64decode(str(args.get("data", ""))),
            datacontenttype=str(args.get("datacontenttype", "")),
            time=clock.timestamp(),
        )
        call = Call(
            f"{args.get('namespace') or 'default'}/{args.get('name')}",
            event,
            now + timeout if timeout else 0.0,
            str(args.get("version") or "") or None,
            str(args.get("key") or "") or None,
        )
        try:
            reply = await self.dispatcher.invoke(call)
        except CallFailed as e:
            head = Head(e.status, e.headers(), e.version, e.invocation, self._node)
            yield {"head": msgspec.to_builtins(head)}
            yield {"data": base64.b64encode(msgspec.json.encode(e.problem())).decode()}
            return
        head = Head(
            reply.status, reply.headers, reply.version, reply.invocation, self._node, reply.duration, reply.cold
        )
        yield {"head": msgspec.to_builtins(head)}
        if reply.chunks is None:
            for at in range(0, len(reply.body), _PIECE):
                yield {"data": base64.b64encode(reply.body[at : at + _PIECE]).decode()}
            return
        try:
            async for piece in reply.chunks:
                yield {"data": base64.b64encode(piece).decode()}
        finally:
            await reply.chunks.aclose()  # type: ignore[attr-defined]

    async def _stats(self, _: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"metrics": metrics(self.dispatcher.counters()) | self._inlets.metrics()}

    async def _deadletters(self, args: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """``{letter}`` each; ``do``: list, replay or drop."""
        async for doc in self._inlets.letters(f"{args['namespace']}/{args['name']}", str(args.get("do") or "list")):
            yield {"letter": doc}

    async def _numbers(self, args: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield await asyncio.to_thread(with_memory, self.dispatcher.numbers(str(args.get("key", ""))))
