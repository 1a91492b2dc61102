"""What a canary is tried beside, on a node that has nothing: it got the function in the middle of the trial.

Such a node asks the hub once for the code that answers elsewhere and keeps it in its history; until the answer is there
the function waits, so that no caller gets the canary for want of the other. A hub that does not answer, or knows of no
version before, ends the wait: then the canary is all there is. Nodes that were there have their own and never ask.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from edgeward.core.errors import EdgewardError
from edgeward.core.resource import Resource
from edgeward.functions.history import put_back
from edgeward.functions.keeping import BESIDE, BesideAsk, BesideTold, EdgeHistory
from edgeward.functions.spec import FunctionSpec

log = logging.getLogger("edgeward.functions")

#: (verb, message, seconds): the hub's answer. Raises ``EdgewardError``.
Ask = Callable[[str, bytes, float], Awaitable[bytes]]
#: Seconds that the hub has.
_ANSWER = 15.0


class Beside:
    """``spawn``: makes a task that somebody owns; ``moved``: what the plane is told has changed."""

    def __init__(
        self,
        history: EdgeHistory,
        ask: Ask,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        moved: Callable[[], None],
    ) -> None:
        self._history, self._ask, self._spawn, self._moved = history, ask, spawn, moved
        #: Functions whose answer is awaited, and those that have it (or have none).
        self._asking: set[tuple[str, str]] = set()
        self._asked: set[tuple[str, str]] = set()

    def of(self, function: Resource) -> tuple[bool, Resource | None]:
        """(whether to wait, the Function with the code that its canary is tried beside)."""
        at = (function.metadata.namespace, function.metadata.name)
        if function.spec.canary is None:
            self._asked.discard(at)  # another trial is another question
            return False, None
        code = self._history.back(*at, function)
        if code is not None:
            return False, _with(function, code)
        if at not in self._asked and at not in self._asking:
            self._asking.add(at)
            self._spawn(self._fetch(at))
        return at in self._asking, None

    async def _fetch(self, at: tuple[str, str]) -> None:
        try:
            data = await self._ask(BESIDE, msgspec.msgpack.encode(BesideAsk(*at)), _ANSWER)
            told = msgspec.msgpack.decode(data, type=BesideTold)
            if told.spec is not None:
                self._history.adopt(*at, told.spec)
        except (EdgewardError, msgspec.MsgspecError) as e:
            log.warning("what the canary of %s/%s is tried beside is not known: %s", *at, e)
        finally:
            self._asking.discard(at)
            self._asked.add(at)
        self._moved()


def _with(function: Resource, code: dict[str, Any]) -> Resource | None:
    """The Function as it would be with that code; None where this release does not understand it."""
    try:
        spec = msgspec.convert(put_back(msgspec.to_builtins(function.spec), {"spec": code}), FunctionSpec)
    except msgspec.ValidationError as e:
        log.warning("the version before of %s is not understood here: %s", function.key, e)
        return None
    return msgspec.structs.replace(function, spec=spec)
