"""The node's broker, told which subjects to take nothing on.

In comes the set of subjects that Exports cannot keep more of (``refusal.py``), out goes nats-server's configuration, by
a reload that every connection survives. QoS 2 is refused whole meanwhile: the broker says PUBREC before it looks at the
topic, so a message on a closed one would be acknowledged and lost.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable

import nats.errors
import nats.js.errors

from edgeward.core.bus import Bus
from edgeward.core.errors import Unreachable

log = logging.getLogger("edgeward.streams")

#: Where nats-server keeps a QoS 2 message between PUBLISH and PUBREL.
_QOS2 = "$MQTT_qos2in"

Close = Callable[[tuple[str, ...]], Awaitable[None]]


class Turnstile:
    def __init__(self, bus: Bus, close: Close | None = None, closed: Iterable[str] = ()) -> None:
        """``close`` brings a set of closed subjects into force, whole; None: nothing can be closed. ``closed``: what an
        earlier run of the agent left closed."""
        self._bus, self._close = bus, close
        self.closed = frozenset(closed)
        self._known = False

    @property
    def works(self) -> bool:
        return self._close is not None

    async def set(self, subjects: Iterable[str]) -> bool:
        """Closes these and no others; whether that changed anything. ``Unreachable``: ask again."""
        wanted = frozenset(subjects)
        if self._close is None or (self._known and wanted == self.closed):
            return False
        if wanted:  # before the first topic is closed, and until the last one is open again
            await self._qos2(refused=True)
        await self._close(tuple(sorted(wanted)))
        if not wanted:
            await self._qos2(refused=False)
        changed, self.closed, self._known = wanted != self.closed, wanted, True
        return changed

    async def _qos2(self, *, refused: bool) -> None:
        js = self._bus.jetstream()
        size = 1 if refused else -1  # a limit of a message takes away none that is there
        try:
            config = (await js.stream_info(_QOS2)).config
            if config.max_msg_size != size:
                config.max_msg_size = size
                await js.update_stream(config)
        except nats.js.errors.NotFoundError:
            return  # no MQTT client ever came
        except (nats.errors.Error, TimeoutError) as e:
            raise Unreachable(f"the node's nats-server does not answer ({type(e).__name__})") from e
