"""A node's seat in its site's council: reports go out and come in over the mesh, verdicts go to whoever acts on them.

All deciding is ``voting.py``'s (the vote) and ``probing.py``'s (the checks); here are the clock, the mesh, the hub as
one more way to hear a node, and the file by which a restart does not forget who is dead. Who acts on a verdict is in
the agent: placement, Services, the status of Nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edgeward.core import clock
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.files import read_json, write_json
from edgeward.core.registry import extensions
from edgeward.nodes.liveness import BEAT
from edgeward.nodes.mesh_wire import Heard, PeerInfo
from edgeward.nodes.probing import DOUBT, Look, Probes, linked, pull
from edgeward.nodes.verdict_spec import Wish
from edgeward.nodes.voting import HUB, Council, PassOn, Report, Say, Told, Verdict
from edgeward.nodes.wire import ReachAnswer, ReachAsk

log = logging.getLogger("edgeward.verdicts")

TOPIC = "verdict"
#: What a report's signature is of, beside its bytes.
_DOMAIN = b"edgeward verdict report 1\0"
_MOST_TOLD = 16
#: Seconds between two questions to the hub about nodes that are missed: at first, and later.
_ASK, _ASK_LATER, _SOON = 3.0, 30.0, 60.0
#: Seconds between two looks at whom nobody hears.
_LOOK = 1.0
#: Nodes about which the hub is asked at once, and nodes of a site that ask it.
_ASK_MOST, _ASKERS = 8, 3
_ASK_TIMEOUT = 8.0
#: Seconds between two moves of this node's beat.
_PULL = 30.0
#: Seconds between two looks at a link of which an answer is due.
_DOUBTFUL = 0.25
#: Seconds for which an answer of the hub stands against the doubts of others.
_AGAIN = 3.0
#: Looks of checks that are out at once.
_LOOKS = 16


class MeshLike(Protocol):
    """What is needed of the mesh."""

    node: str
    site: str
    epoch: int

    def peers(self) -> Mapping[str, PeerInfo]: ...
    def say(self, topic: str, data: bytes, peers: Iterable[str] | None = None) -> int: ...
    def hear(self, topic: str, fn: Callable[[str, bytes, Heard], None]) -> None: ...
    def sign(self, data: bytes) -> bytes: ...
    def check(self, node: str, data: bytes, signature: bytes) -> bool: ...


class LinkLike(Protocol):
    """What is needed of the conversation with the hub (:class:`~edgeward.nodes.edge.NodeEdge`)."""

    @property
    def online(self) -> bool: ...
    @property
    def good(self) -> bool: ...
    @property
    def unanswered(self) -> float: ...
    @property
    def silence(self) -> float: ...
    @property
    def next_beat(self) -> float: ...
    def beat_within(self, seconds: float) -> None: ...
    def excuse(self) -> None: ...


class Verdicts:
    """``ask_hub(verb, data, timeout)`` gives its answer or raises; ``names()``: the nodes of the site that ever said
    where their mesh is; ``changed`` gets those whose verdict or evidence is new."""

    def __init__(
        self,
        mesh: MeshLike,
        path: Path,
        *,
        link: LinkLike,
        ask_hub: Callable[[str, bytes, float], Awaitable[bytes]],
        wish: Callable[[], Wish],
        names: Callable[[], Iterable[str]],
        changed: Callable[[set[str]], None],
    ) -> None:
        self._mesh, self._path, self._wish, self._changed = mesh, path, wish, changed
        self._names = names
        self._link, self._ask_hub = link, ask_hub
        try:
            kept = read_json(path, {})
        except Invalid:
            kept = {}
        kept = kept if isinstance(kept, dict) else {}
        gone = [str(n) for n in kept.get("gone", [])]
        now = clock.monotonic()
        self.council = Council(mesh.node, mesh.site, mesh.epoch, now, gone=gone)
        self._kept: dict[str, Any] = {k: v for k, v in kept.items() if k in ("gone", "alone")}
        #: Since when this node has no majority, as the run before has it: a restart must not count that anew.
        alone = kept.get("alone")
        self._alone_at = float(alone) if isinstance(alone, (int, float)) else None
        self._started = now if self._alone_at is None else min(now, now - (clock.steady() - self._alone_at))
        self._probes = Probes()
        self._pulled = -math.inf
        self._wake = asyncio.Event()
        self._looks = asyncio.Semaphore(_LOOKS)
        self.verdicts: dict[str, Verdict] = {}
        self._held: dict[str, list[tuple[int, int]]] = {}
        self._since: dict[str, str] = {}
        #: When each dead node was found dead (monotonic).
        self.dead_since: dict[str, float] = dict.fromkeys(gone, now)

    # -- what others ask ---------------------------------------------------------------------------------------------

    def dead(self) -> dict[str, float]:
        """Who is dead by the site's last decision, and for how many seconds."""
        now = clock.monotonic()
        return {n: now - self.dead_since.get(n, now) for n in self.council.gone}

    def alone(self) -> float:
        """Seconds for which this node has not had a majority of its site with it, in this run or since the one before
        lost it; 0: it has."""
        if self.council.quorum:
            return 0.0
        return clock.monotonic() - max(self.council.together, self._started)

    def joined(self) -> bool:
        """Whether it has had one in this run."""
        return self.council.together > -math.inf

    def status(self, node: str) -> dict[str, Any]:
        """``verdict`` and ``evidence`` of a Node's status; {} of one that takes no part."""
        v = self.verdicts.get(node)
        if v is None:
            return {}
        evidence: dict[str, Any] = {"heard": v.heard, "group": f"{v.group} of {v.nodes}"}
        if v.link is not None:
            evidence["link"] = "up" if v.link else "down"
        if v.lost:
            evidence["lost"] = list(v.lost)
        if failing := self._probes.failing(node):
            evidence["failing"] = failing
        if v.why:
            evidence["why"] = v.why
        return {"verdict": v.state, "evidence": {**evidence, "since": self._since.get(node, "")}}

    def keep(self, holds: list[tuple[int, int]], runs: list[tuple[int, int]]) -> None:
        """What this node took over and keeps, and what it has run for how long: said with its next report."""
        news = holds != self.council.holds
        self.council.holds, self.council.runs = holds, runs
        if news:
            self._do([Say(None)])

    def speaker(self) -> str:
        """The node that speaks for its site where one word is enough: the first that is heard."""
        return self.council.present()[0]

    def told(self) -> bytes:
        """This node's report, signed, for whoever asks by another way than the mesh."""
        return msgspec.msgpack.encode(self._make(to_all=False))

    def hurry(self) -> None:
        """The link came or went: not at the next look."""
        self._wake.set()

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs until cancelled."""
        self._mesh.hear(TOPIC, self._heard)
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(self._asks())
            due = clock.monotonic()
            while True:
                now = clock.monotonic()
                if (slept := now - due) > 1.0:
                    self.council.forgive(slept, now)
                self._members(now)
                self._watch_link(now)
                self._do(self.council.tick(now))
                self._vote(now)
                for look in self._probes.due(now):
                    group.create_task(self._look(look))
                due = now + min(
                    self.council.due(now), _DOUBTFUL if self._link.online and self._link.unanswered else math.inf
                )
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(due - now):
                        await self._wake.wait()
                due = min(due, clock.monotonic()) if self._wake.is_set() else due

    def _members(self, now: float) -> None:
        # one whose agent never said where its mesh is does not take part: not started yet, or of an earlier release
        names = {*self._names(), *(n for n, p in self._mesh.peers().items() if p.linked)} - {self._mesh.node}
        self.council.members(names, now)
        wish = self._wish()
        self.council.settings = wish.settings
        self._probes.set(wish.checks, wish.agent, names, now)
        present = set(self.council.present())
        for name in names:
            self.council.checked(name, self._probes.works(name, name in present))
        for name in self.verdicts.keys() - {self._mesh.node, *names}:
            del self.verdicts[name]
            self._since.pop(name, None)
            self._changed({name})

    def _watch_link(self, now: float) -> None:
        """Says what the link is, asks the hub when others doubt it, and has the site's beats come one after another."""
        link, council = self._link, self.council
        waits, others = link.unanswered, council.doubters()
        doubt = link.online and link.good and waits >= DOUBT
        up = linked(link.online, link.good, waits, others) and (council.link or not waits)
        beat = round(link.next_beat, 1) if link.online and link.good else -1.0
        if not up and (link.online or council.all_cut()):
            link.excuse()
        self._do(council.linked(up, doubt=doubt, beat=beat))
        if beat < 0 or waits:
            return
        if others and link.silence > _AGAIN:
            link.beat_within(0.0)
        elif (earlier := pull(beat, council.beats(now), council.size, BEAT)) < beat and now - self._pulled > _PULL:
            self._pulled = now
            link.beat_within(earlier)

    def _make(self, *, to_all: bool) -> Told:
        report = self.council.report(clock.monotonic(), clock.steady(), to_all=to_all)
        body = msgspec.msgpack.encode(report)
        return Told(body, self._mesh.sign(_DOMAIN + body))

    def _do(self, acts: list[Say | PassOn]) -> None:
        for act in acts:
            if isinstance(act, PassOn):
                self._mesh.say(TOPIC, msgspec.msgpack.encode([act.told]), [act.to])
            else:
                told = self._make(to_all=act.to is None)
                self._mesh.say(TOPIC, msgspec.msgpack.encode([told]), act.to)

    def _heard(self, peer: str, data: bytes, meta: Heard) -> None:
        for told in msgspec.msgpack.decode(data, type=list[Told])[:_MOST_TOLD]:
            self._take(told, peer)
        if self.council.stirred:
            self._watch_link(clock.monotonic())
            self._vote(clock.monotonic())

    def _take(self, told: Told, via: str) -> None:
        try:
            report = msgspec.msgpack.decode(told.body, type=Report)
        except msgspec.DecodeError:
            self.council.counters["strange"] += 1
            return
        if not self._mesh.check(report.node, _DOMAIN + told.body, told.signature):
            self.council.counters["forged"] += 1
            return
        self._do(self.council.take(report, told, via, clock.monotonic(), clock.steady()))

    # -- the vote ----------------------------------------------------------------------------------------------------

    def _vote(self, now: float) -> None:
        self.council.stirred = False
        found = self.council.vote(now)
        changed = {n for n, v in found.items() if v != self.verdicts.get(n)}
        for name in changed:
            old = self.verdicts.get(name)
            if old is None or old.state != found[name].state:
                self._since[name] = clock.timestamp()
        gone = self.council.gone
        self.dead_since = {n: self.dead_since.get(n, now) for n in gone}
        kept: dict[str, Any] = {"gone": sorted(gone)}
        if self.council.quorum:
            self._alone_at = None
        else:
            self._alone_at = self._alone_at or math.floor(clock.steady() - self.alone())
            kept["alone"] = self._alone_at
        if kept != self._kept:
            self._kept = kept
            with contextlib.suppress(OSError):  # a full disk: it is decided again after a restart
                write_json(self._path, kept)
        self.verdicts = found
        held = self.council.held()
        if changed or held != self._held:
            self._held = held
            self._changed(changed)

    # -- checks --------------------------------------------------------------------------------------------------------

    async def _look(self, look: Look) -> None:
        check = self._probes.checks[look.check]
        peer = self._mesh.peers().get(look.node)
        ok = False
        async with self._looks:
            if peer is not None and peer.address is not None and check.type in extensions.names("check"):
                with contextlib.suppress(OSError):
                    ok = await extensions.get("check", check.type)(peer.address[0], check.port, check.timeout)
        self._probes.result(look, ok, clock.monotonic())

    # -- the hub as one more way ---------------------------------------------------------------------------------------

    async def _asks(self) -> None:
        """Asks the hub for nodes that the site does not hear: one that it reaches is not dead, whatever the site's own
        network does. It goes on for as long as they are heard this way only."""
        since: dict[str, float] = {}
        asked = -math.inf
        while True:
            now = clock.monotonic()
            names = self.council.unheard(now)
            since = {n: since.get(n, now) for n in names}
            present = self.council.present()
            soon = any(n in present or now - since[n] < _SOON for n in names)
            if names and self.council.link and self._may_ask() and now - asked >= (_ASK if soon else _ASK_LATER):
                asked = now
                await self._ask(names[:_ASK_MOST])
            await asyncio.sleep(_LOOK)  # the pace of looking at whom nobody hears

    def _may_ask(self) -> bool:
        linked = [n for n in self.council.present() if (v := self.verdicts.get(n)) is not None and v.link]
        return self._mesh.node in linked[:_ASKERS]

    async def _ask(self, nodes: list[str]) -> None:
        try:
            data = await self._ask_hub("reach", msgspec.msgpack.encode(ReachAsk(nodes)), _ASK_TIMEOUT)
            answer = msgspec.msgpack.decode(data, type=ReachAnswer)
        except (EdgewardError, msgspec.DecodeError):
            return
        if answer.error:
            return  # of an earlier release, say: it is one voice less, not a voice against
        for node, packed in answer.told.items():
            with contextlib.suppress(msgspec.DecodeError):
                if node in nodes:
                    self._take(msgspec.msgpack.decode(packed, type=Told), HUB)
        missing = set(self.council.missing())
        parted = {n for n in nodes if n not in answer.told} & missing
        if parted != self.council.parted & missing:
            self.council.parted = (self.council.parted & missing) | parted
            self._do([Say(None)])
        self._vote(clock.monotonic())
