"""The plane's place at the node's broker: what triggers take from it, what functions publish to it, dead letters.

In comes which triggers there should be (``Taking``) and how the node's nats-server is reached, out go calls. It has two
connections, made when a function needs them: one that may use the triggers' consumers and streams, and one that may
hear and speak on topics as a device may. It needs neither the hub nor the agent. What a trigger still wants is kept by
the broker: a consumer for each, on the broker's own stream of MQTT messages, or on a stream that holds what is
published on the declared subjects until every trigger took it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
import nats.js.errors

from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Refused, Unreachable
from edgeward.core.invocation import Call, CallFailed, Event, Reply
from edgeward.core.mqtt import wake_broker
from edgeward.core.throttle import Throttle
from edgeward.core.topics import to_subject
from edgeward.functions.deadletters import CONFIG as DEAD_CONFIG
from edgeward.functions.deadletters import DeadLetters, listed, subject_of
from edgeward.functions.holding import bus_config, have_consumer, have_stream
from edgeward.functions.listener import Listener
from edgeward.functions.triggers import (
    BUS_STREAM,
    DEAD_STREAM,
    HOPS_HEADER,
    MQTT_PREFIX,
    MQTT_STREAM,
    Reach,
    Taking,
    consumer,
    overlap,
    owner,
)

log = logging.getLogger("edgeward.functions")

#: Seconds between two tries to make things as they should be; between two looks at what waits.
_RETRY, _LOOK = 1.0, 10.0
#: Messages that one function may publish in a second, and at once.
_RATE, _BURST = 5000.0, 10_000.0
#: Seconds between two events about dead letters of one function.
_QUIET = 60.0


class Intake:
    """All triggers of one node that come from its broker; :meth:`run` until cancelled."""

    def __init__(
        self,
        node: str,
        mark: Path,
        invoke: Callable[[Call], Awaitable[Reply]],
        told: Callable[[str], None] = lambda _: None,
        event: Callable[[str, str, str], None] = lambda *_: None,
    ) -> None:
        """``mark``: a file that is there while the broker may keep something for a trigger; ``told``: something of this
        function's triggers may look otherwise; ``event``: key, reason, message."""
        self._node, self._invoke, self._told, self._event = node, invoke, told, event
        self._mark = mark
        self.reach: Reach | None = None
        self._wanted: dict[str, tuple[str, Taking]] = {}
        #: Keys of all functions there are, those that are not whole yet among them; None: not said yet.
        self._keys: frozenset[str] | None = None
        #: Those of them whose triggers are not known: something that they use is not here yet.
        self._unsure: frozenset[str] = frozenset()
        self._speaks = False
        self._joined: Reach | None = None
        self._bus: Bus | None = None
        self._ears: Bus | None = None
        self._letters: DeadLetters | None = None
        self._running: dict[str, tuple[Listener, asyncio.Task[None]]] = {}
        self._news = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._pace = Throttle(burst=_BURST, rate=_RATE)
        self._quiet: dict[str, tuple[float, int]] = {}
        self.dead: dict[str, int] = {}
        self.problem = ""
        self._looks = 0

    # -- what should be ----------------------------------------------------------------------------------------------

    def configure(
        self,
        wanted: Mapping[str, Sequence[Taking]],
        keys: Collection[str],
        reach: Reach | None,
        *,
        unsure: Collection[str] = (),
        speaks: bool = False,
    ) -> None:
        """Returns at once. ``keys``: all functions; ``unsure``: those whose triggers are not known; ``speaks``: one of
        them may publish."""
        self._wanted = {consumer(key, plan): (key, plan) for key, plans in wanted.items() for plan in plans}
        self._keys, self._unsure = frozenset(keys), frozenset(unsure)
        self.reach, self._speaks = reach, speaks
        for name, (listener, _) in self._running.items():
            if name in self._wanted and self._wanted[name][1] != listener.taking:
                listener.adjust(self._wanted[name][1])
        self._news.set()

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK if self._bus is not None else None):
                            await self._news.wait()
                    changed = self._news.is_set()
                    self._news.clear()
                    await self._step(changed)
        finally:
            self._group = None
            await self._leave()

    async def _step(self, changed: bool) -> None:
        """Makes it so, or tries again in a while."""
        was = self.problem
        try:
            if changed:
                await self._make()
            await self._look()
            self.problem = ""
        except (EdgewardError, nats.errors.Error, TimeoutError, OSError) as e:
            self.problem = str(e) or type(e).__name__
            asyncio.get_running_loop().call_later(_RETRY, self._news.set)
        if self.problem != was:
            if self.problem:
                log.warning("triggers: %s", self.problem)
            for key in {key for key, _ in self._wanted.values()}:
                self._told(key)

    async def _make(self) -> None:
        wanted = dict(self._wanted)
        for name in [n for n in self._running if n not in wanted]:
            await self._end(name)
        if self._joined != self.reach and self._must_join_anew():
            await self._leave()
        self._joined = self.reach
        if not wanted and not self._speaks and self._bus is None and not self._mark.exists():
            return  # no connection for nothing
        bus, ears = await self._join()
        if wanted:
            self._mark.touch()
        await self._streams(bus, wanted)
        for name, (key, plan) in wanted.items():
            if plan.durable:
                await have_consumer(bus, name, plan)
            if name not in self._running:
                self._start(name, key, plan, bus, ears)
        await self._prune(bus, wanted)
        if not wanted and not self._unsure:
            self._mark.unlink(missing_ok=True)
            if not self._speaks:
                await self._leave()

    def _must_join_anew(self) -> bool:
        """Whether more than the closed subjects has changed."""
        old, new = self._joined, self.reach
        return old is None or new is None or msgspec.structs.replace(old, closed=new.closed) != new

    async def _join(self) -> tuple[Bus, Bus]:
        reach = self.reach
        if reach is None:
            raise Unreachable("the node's broker is not there yet")
        if self._bus is None or self._ears is None:
            name, password = f"plane-{self._node}", reach.password
            bus = await Bus.connect(
                reach.url, name=name, username=reach.user, password=password, inbox="ew.local.plane", timeout=5.0
            )
            try:
                ears = await Bus.connect(reach.url, name=name, username=reach.speaker, password=password, timeout=5.0)
            except EdgewardError:
                await bus.close(0.5)
                raise
            self._bus, self._ears, self._letters = bus, ears, DeadLetters(bus)
        return self._bus, self._ears

    async def _leave(self) -> None:
        for name in tuple(self._running):
            await self._end(name)
        buses, self._bus, self._ears, self._letters = (self._bus, self._ears), None, None, None
        for bus in buses:
            if bus is not None:
                await bus.close(1.0)

    def _start(self, name: str, key: str, plan: Taking, bus: Bus, ears: Bus) -> None:
        if self._group is None:
            return
        listener = Listener(key, plan, node=self._node, invoke=self._invoke, bury=self._bury)
        self._running[name] = (listener, self._group.create_task(self._listen(listener, bus, ears)))
        self._told(key)

    async def _listen(self, listener: Listener, bus: Bus, ears: Bus) -> None:
        """One that ends is begun again when things are made anew."""
        try:
            await listener.run(bus, ears)
        except (EdgewardError, ExceptionGroup) as e:
            log.warning("a trigger of %s ended: %s", listener.key, e, exc_info=isinstance(e, ExceptionGroup))
            listener.problem = str(e)
        self._running.pop(listener.name, None)
        asyncio.get_running_loop().call_later(_RETRY, self._news.set)

    async def _end(self, name: str) -> None:
        listener, task = self._running.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._told(listener.key)

    # -- what the broker keeps ---------------------------------------------------------------------------------------

    async def _streams(self, bus: Bus, wanted: Mapping[str, tuple[str, Taking]]) -> None:
        js = bus.jetstream()
        plans = [plan for _, plan in wanted.values()]
        if any(p.dead for p in plans):
            await have_stream(js, DEAD_CONFIG)
        if self._speaks or any(p.kind == "mqtt" for p in plans):
            await self._wake(js)
        subjects = [s for p in plans if p.kind != "mqtt" for s in p.subjects]
        if subjects:
            await have_stream(js, bus_config(subjects))

    async def _wake(self, js: Any) -> None:
        """Has nats-server make its streams for MQTT."""
        reach = self.reach
        try:
            await js.stream_info(MQTT_STREAM)
        except nats.js.errors.NotFoundError:
            if reach is not None:
                await wake_broker(
                    reach.mqtt_host, reach.mqtt_port, reach.speaker, reach.password, client="edgeward-plane"
                )

    async def _prune(self, bus: Bus, wanted: Mapping[str, tuple[str, Taking]]) -> None:
        """Consumers that no trigger has: the broker would keep messages for them for ever."""
        if self._keys is None:
            return
        js = bus.jetstream()
        waiting = tuple(owner(k) for k in self._unsure)
        for stream in (MQTT_STREAM, BUS_STREAM):
            try:
                found = [c.name for c in await js.consumers_info(stream)]
            except nats.js.errors.NotFoundError:
                continue
            for name in found:
                if name.startswith("fn-") and name not in wanted and not name.startswith(waiting):
                    await js.delete_consumer(stream, name)
        subjects = [s for _, p in wanted.values() if p.kind != "mqtt" for s in p.subjects]
        if subjects:
            await have_stream(js, bus_config(subjects), exactly=True)
        else:
            with contextlib.suppress(nats.js.errors.NotFoundError):
                await js.delete_stream(BUS_STREAM)
        if self._letters is not None:
            for key in set(await self._letters.counts()) - self._keys:
                await js.purge_stream(DEAD_STREAM, subject=subject_of(key))

    # -- what is seen ------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """How much waits, and what is over its bound."""
        if self._bus is None or self._letters is None:
            return
        js = self._bus.jetstream()
        for name, (listener, _) in tuple(self._running.items()):
            if listener.taking.durable:
                given = listener.given
                info = await js.consumer_info(listener.stream, name)
                over = listener.looked(int(info.num_pending or 0), given)
                if over:
                    bound = listener.taking.backlog
                    self._event(
                        listener.key,
                        "TriggerBacklog",
                        f"{over} messages over its backlog of {bound} are passed over, oldest first",
                    )
        self._looks += 1
        was, self.dead = self.dead, await self._letters.counts()
        for key in {listener.key for listener, _ in self._running.values()}:
            # how much waits changes all the time, and a status goes over the link
            if self._looks % 3 == 0 or was.get(key) != self.dead.get(key):
                self._told(key)

    async def _bury(self, key: str, plan: Taking, event: Event, tries: int, error: CallFailed) -> None:
        if self._letters is None:
            raise Unreachable("the node's broker is away")
        await self._letters.keep(key, plan, event, tries, error)
        self.dead[key] = self.dead.get(key, 0) + 1
        self._told(key)
        now = asyncio.get_running_loop().time()
        since, count = self._quiet.get(key, (now - _QUIET, 0))
        if now - since < _QUIET:
            self._quiet[key] = (since, count + 1)
            return
        self._quiet[key] = (now, 0)
        more = f"; {count} more since the last such event" if count else ""
        self._event(key, "DeadLetter", f"{plan.kind} {event.subject}, tried {tries} times: {error.message}{more}")

    def status(self, key: str) -> list[dict[str, Any]]:
        """The triggers of a function, for its status."""
        found = []
        for name, (owner_key, plan) in sorted(self._wanted.items(), key=lambda kv: (kv[1][1].kind, kv[1][1].name)):
            if owner_key != key:
                continue
            running = self._running.get(name)
            if running is not None and running[0].connected:
                found.append(running[0].status())
            else:
                message = self.problem or (running[0].problem if running else "") or "is being connected"
                found.append({plan.kind: plan.name, "connected": False, "message": message})
        return found

    def counters(self) -> list[tuple[str, str, Listener]]:
        return [(li.key, f"{li.taking.kind} {li.taking.name}", li) for li, _ in self._running.values()]

    # -- what functions say ------------------------------------------------------------------------------------------

    async def publish(self, key: str, topic: str, data: bytes, qos: int, hops: int) -> None:
        """On a topic of the node's broker, as an MQTT client would; done when it is taken. Raises ``EdgewardError``.

        With QoS 1 it is first kept where nats-server keeps what it acknowledges (as it does between the servers of a
        cluster), then told to who listens.
        """
        bus, ears, reach = self._bus, self._ears, self.reach
        if bus is None or ears is None or reach is None:
            raise Unreachable("the node's broker is not there yet")
        if self._pace.take(key, asyncio.get_running_loop().time()):
            raise Refused(f"more than {_RATE:.0f} messages a second")
        subject = to_subject(topic)
        if any(overlap(closed, subject) for closed in reach.closed):
            raise Unreachable(f"the broker takes nothing on {topic[:80]!r}: an Export there is full")
        headers = {"Nmqtt-Pub": str(qos), HOPS_HEADER: str(hops)}
        if qos:
            await bus.publish_acked(MQTT_PREFIX + subject, data, headers=headers)
        await ears.publish(subject, data, headers=headers)

    async def letters(self, key: str, do: str) -> AsyncIterator[dict[str, Any]]:
        """The function's dead letters; ``do``: list, replay or drop."""
        if self._letters is None:
            await self._join()
        if self._letters is not None and await self._letters.counts():
            async for doc in listed(self._letters, key, do, self._invoke):
                yield doc
            self.dead = await self._letters.counts()
            self._told(key)
