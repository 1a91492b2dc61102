"""What a worker may ask of its node while it has a call: publish, its own state, samples. Each is answered once.

In come the frames of ``core/invocation.py`` with the call that they belong to, out goes an ``Answer``: at once where
it can, else as something to wait for. What a function may do is in its :class:`Policy`; what is refused is an exception
in its handler and changes nothing. How much one call may ask is counted here too (:class:`Tally`), so that a handler
cannot make the plane hold more than its share.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial

from edgeward.core import invocation as wire
from edgeward.core.errors import EdgewardError
from edgeward.core.invocation import HOPS, MAX_ASKS, MAX_HOPS, MAX_KEY, MAX_OPEN, MAX_OPEN_BYTES, MAX_VALUE, Event
from edgeward.core.topics import covers
from edgeward.functions.memory import Memory, word
from edgeward.functions.versions import Policy, Version

#: (function's key, topic, data, qos, hops): done when the broker has it. Raises ``EdgewardError``.
Publisher = Callable[[str, str, bytes, int, int], Awaitable[None]]
#: What is still to be done for an answer.
Work = Callable[[], Awaitable[wire.Answer]]
#: (version, the call's id, what is offered): whether it is kept.
Sampler = Callable[[Version, str, wire.Sample], Awaitable[bool]]

_KEY = re.compile(rf"[!-~]{{1,{MAX_KEY}}}")
_TOPIC = 1024


class Tally:
    """What the call in hand has asked for."""

    __slots__ = ("asked", "open", "open_bytes")

    def __init__(self) -> None:
        self.asked = self.open = self.open_bytes = 0

    def begin(self) -> None:
        """Another call. What is still open stays counted."""
        self.asked = 0

    @property
    def wild(self) -> bool:
        """It does not heed what it is told."""
        return self.asked > 2 * MAX_ASKS

    def over(self, size: int) -> str:
        """Why one more of ``size`` bytes is too many; empty: it is not."""
        if self.asked > MAX_ASKS:
            return f"one call may ask {MAX_ASKS} times"
        if self.open >= MAX_OPEN:
            return f"{MAX_OPEN} requests have no answer yet"
        return f"{MAX_OPEN_BYTES} bytes wait already" if self.open_bytes + size > MAX_OPEN_BYTES else ""


def refusal(ask: wire.Ask, kind: str, message: str) -> wire.Answer:
    return wire.Answer(ask.ask, None, (kind, message))


def hops_of(event: Event) -> int:
    """Through how many functions it came."""
    text = event.extensions.get(HOPS, "")
    return min(int(text), MAX_HOPS) if text.isascii() and text.isdigit() and len(text) < 4 else 0


class Asks:
    """The answers of one node."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        #: None: there is no broker, or nobody to keep samples.
        self.publisher: Publisher | None = None
        self.sampler: Sampler | None = None

    def answer(self, version: Version, policy: Policy, call: str, event: Event, ask: wire.Ask) -> wire.Answer | Work:
        """What the ask of this call comes to."""
        if isinstance(ask, wire.Publish):
            why = _may_publish(ask, version, policy, event)
            return why or self._later(ask, partial(self._publish, version, ask, hops_of(event) + 1))
        if isinstance(ask, wire.Sample):
            size = len(ask.input) + len(ask.output)
            if size > version.body or len(ask.tags) > 16 or any(len(k) + len(v) > 512 for k, v in ask.tags.items()):
                return refusal(ask, "too-large", f"a sample may have {version.body} bytes and 16 short tags")
            return self._later(ask, partial(self._sample, version, call, ask))
        return self._state(version, policy, ask)

    def _state(
        self, version: Version, policy: Policy, ask: wire.StateGet | wire.StateSet | wire.StateDelete | wire.StateKeys
    ) -> wire.Answer | Work:
        key = version.key
        if isinstance(ask, wire.StateKeys):
            return self._later(ask, partial(self.memory.keys, key, ask.prefix[:MAX_KEY]))
        try:
            if not _KEY.fullmatch(ask.key):
                return refusal(ask, "refused", f"a key has 1 to {MAX_KEY} visible characters of ASCII")
            if isinstance(ask, wire.StateGet):
                return wire.Answer(ask.ask, self.memory.get(key, ask.key))
        except EdgewardError as e:
            return refusal(ask, word(e), e.message)
        if isinstance(ask, wire.StateDelete):
            return self._later(ask, partial(self.memory.delete, key, ask.key, ask.revision))
        if len(ask.value) > MAX_VALUE:
            return refusal(ask, "too-large", f"a value may have {MAX_VALUE} bytes, this one has {len(ask.value)}")
        return self._later(ask, partial(self.memory.set, key, ask.key, ask.value, ask.revision, policy.state))

    @staticmethod
    def _later(ask: wire.Ask, work: Callable[[], Awaitable[object]]) -> Work:
        async def done() -> wire.Answer:
            try:
                return wire.Answer(ask.ask, await work())
            except EdgewardError as e:
                return refusal(ask, word(e), e.message)

        return done

    async def _publish(self, version: Version, ask: wire.Publish, hops: int) -> None:
        if self.publisher is None:
            raise EdgewardError("the node's broker is not there yet")
        await self.publisher(version.key, ask.topic, ask.data, ask.qos, hops)

    async def _sample(self, version: Version, call: str, ask: wire.Sample) -> bool:
        if self.sampler is None:
            raise EdgewardError("this node keeps no samples")
        return await self.sampler(version, call, ask)


def _may_publish(ask: wire.Publish, version: Version, policy: Policy, event: Event) -> wire.Answer | None:
    """Why it may not; None: it may."""
    if len(ask.data) > version.body:
        return refusal(ask, "too-large", f"a message may have {version.body} bytes, this one has {len(ask.data)}")
    if ask.qos not in (0, 1):
        return refusal(ask, "refused", "qos is 0 or 1")
    if not 0 < len(ask.topic) <= _TOPIC or any(c in "+#*>" or not c.isprintable() or c == " " for c in ask.topic):
        return refusal(ask, "refused", f"{ask.topic[:80]!r} is no topic to publish on")
    if not any(covers(pattern, ask.topic) for pattern in policy.publish):
        allowed = ", ".join(policy.publish) or "nothing"
        return refusal(ask, "refused", f"{ask.topic[:80]!r} is not declared: spec.publish has {allowed}")
    if hops_of(event) >= MAX_HOPS:
        return refusal(ask, "refused", f"this message came through {MAX_HOPS} functions: it goes round in a circle")
    return None
